# SPDX-License-Identifier: GPL-2.0-or-later
"""``mdo create``."""

from __future__ import annotations

from typing import Annotated

import typer

from mdev_orchestrator.cli import output
from mdev_orchestrator.cli.host import mdev_shape
from mdev_orchestrator.engine.devices import DEADLINE, create_devices


def create(
    type_id: Annotated[
        str, typer.Argument(metavar="TYPE", help="Id of a type; mdo host lists them.")
    ],
    *,
    count: Annotated[int | None, typer.Option("-n", "--count", help="How many devices.")] = None,
    parent: Annotated[str | None, typer.Option(help="Parent, when several offer the type.")] = None,
    uuid: Annotated[
        list[str] | None, typer.Option(help="UUID to use; may be given again. Others are random.")
    ] = None,
    deadline: Annotated[float, typer.Option(min=0.1, help="Seconds for the whole.")] = DEADLINE,
    json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """Create devices of one type, all or none; prints their UUIDs, one a line."""
    made = output.run(
        create_devices(
            type_id,
            count,
            parent=parent,
            uuids=uuid or (),
            deadline=deadline,
            root=output.host_root(),
        )
    )
    if json:
        output.emit_json({"created": [mdev_shape(mdev) for mdev in made]})
    else:
        output.emit("\n".join(str(mdev.uuid) for mdev in made))
