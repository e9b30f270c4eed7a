# SPDX-License-Identifier: GPL-2.0-or-later
"""``mdo watch``."""

from __future__ import annotations

from contextlib import aclosing
from typing import Annotated

import typer

from mdev_orchestrator.cli import output
from mdev_orchestrator.host.events import (
    Event,
    MdevEvent,
    NodeEvent,
    ParentEvent,
    Rescan,
    events,
    udev_monitor,
)


def watch(
    *,
    json: Annotated[bool, typer.Option("--json", help="One JSON document a line.")] = False,
) -> None:
    """Print events of parents, devices and VFIO nodes as they happen, until ctrl-C."""
    output.run(_watch(json=json))


async def _watch(*, json: bool) -> None:
    root = output.host_root()
    async with aclosing(events(lambda: udev_monitor(root))) as stream:
        async for event in stream:
            if json:
                output.emit_json(shape(event))
            else:
                output.emit(line(event))


def shape(event: Event) -> dict[str, str]:
    """The documented JSON shape of an event."""
    match event:
        case ParentEvent(parent, registered):
            action = "registered" if registered else "unregistered"
            return {"event": "parent", "action": action, "parent": parent}
        case MdevEvent(action, uuid, parent, state):
            told = {"event": "mdev", "action": action, "uuid": str(uuid), "parent": parent}
            return told if state is None else told | {"state": state}
        case NodeEvent(action, node):
            return {"event": "node", "action": action, "node": node}
        case Rescan(reason):
            return {"event": "rescan", "reason": reason}


def line(event: Event) -> str:
    """An event as a line for people."""
    kind, *values = shape(event).values()
    return "  ".join((kind.ljust(6), *values))
