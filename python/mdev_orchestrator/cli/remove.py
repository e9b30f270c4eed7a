# SPDX-License-Identifier: GPL-2.0-or-later
"""``mdo remove``."""

from __future__ import annotations

from typing import Annotated

import typer

from mdev_orchestrator.cli import output
from mdev_orchestrator.cli.context import run
from mdev_orchestrator.cli.params import Json, complete_device, seconds
from mdev_orchestrator.engine.context import DEADLINE
from mdev_orchestrator.engine.devices import remove_devices
from mdev_orchestrator.model import parse_uuid


def remove(
    uuids: Annotated[
        list[str],
        typer.Argument(
            metavar="UUID...", help="Devices to remove.", autocompletion=complete_device
        ),
    ],
    *,
    detach: Annotated[
        bool, typer.Option("--detach", help="Detach a device from the guest that holds it first.")
    ] = False,
    deadline: Annotated[
        float, seconds("Seconds for each device, and again for each detach.", least=0.1)
    ] = DEADLINE,
    json: Json = False,
) -> None:
    """Remove devices. One that a guest holds is refused at once, and none is removed then."""
    wanted = [parse_uuid(text) for text in uuids]
    removed = run(lambda machine: remove_devices(machine, wanted, detach=detach, deadline=deadline))
    if json:
        words = [str(uuid) for uuid in removed]
        output.emit_json({"removed": words}, made=f"removed mdev {', '.join(words)}")
