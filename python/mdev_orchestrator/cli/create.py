# SPDX-License-Identifier: GPL-2.0-or-later
"""``mdo create``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

import typer

from mdev_orchestrator.cli import output
from mdev_orchestrator.cli.context import run
from mdev_orchestrator.cli.host import mdev_shape
from mdev_orchestrator.cli.params import Json, ParentOfType, complete_type, seconds
from mdev_orchestrator.engine import model_cache
from mdev_orchestrator.engine.context import DEADLINE
from mdev_orchestrator.engine.devices import create_devices
from mdev_orchestrator.errors import RequestError
from mdev_orchestrator.host.sysfs import scan
from mdev_orchestrator.machine import Machine
from mdev_orchestrator.model import Host, Mdev, parse_uuid


def create(
    type_id: Annotated[
        str,
        typer.Argument(
            metavar="TYPE",
            help="Id of a type; mdo host lists them.",
            autocompletion=complete_type,
        ),
    ],
    *,
    count: Annotated[
        int | None, typer.Option("-n", "--count", metavar="COUNT", help="How many devices.")
    ] = None,
    parent: ParentOfType = None,
    uuid: Annotated[
        list[str] | None,
        typer.Option(metavar="UUID", help="UUID to use; may be repeated. Others are random."),
    ] = None,
    group: Annotated[
        str | None,
        typer.Option(metavar="UUID|NAME", help="Start group that they are put into."),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FILE=VALUE", help="Write a file of each; may be repeated."),
    ] = None,
    deadline: Annotated[float, seconds("Seconds for each device.", least=0.1)] = DEADLINE,
    json: Json = False,
) -> None:
    """Create devices of one type, all or none; prints their UUIDs, one a line."""
    uuids = [parse_uuid(text) for text in uuid or ()]
    attributes = parse_attributes(set_ or ())

    async def work(machine: Machine) -> tuple[Host, tuple[Mdev, ...]]:
        return await scan(machine), await create_devices(
            machine,
            type_id,
            count,
            parent=parent,
            uuids=uuids,
            group=group,
            attributes=attributes,
            deadline=deadline,
        )

    before, devices = run(work)
    made = f"created mdev {', '.join(str(mdev.uuid) for mdev in devices)}"
    if json:
        output.emit_json({"created": [mdev_shape(mdev) for mdev in devices]}, made=made)
    else:
        output.emit("\n".join(str(mdev.uuid) for mdev in devices), made=made)
    run(lambda machine: model_cache.learn_from(machine, before))


def parse_attributes(texts: Iterable[str]) -> list[tuple[str, str]]:
    """``FILE=VALUE`` as given on the command line; the value may contain more of them.

    :raise RequestError: One is something else.
    """
    found = []
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise RequestError(f"--set {text!r} has no '='", "write it like --set vgpu_params=a=1")
        found.append((name, value))
    return found
