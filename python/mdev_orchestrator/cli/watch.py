# SPDX-License-Identifier: GPL-2.0-or-later
"""``mdo watch``."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Any

from mdev_orchestrator.cli import output
from mdev_orchestrator.cli.options import Option
from mdev_orchestrator.host.events import (
    Event,
    MdevEvent,
    NodeEvent,
    ParentEvent,
    Rescan,
    events,
    udev_monitor,
)
from mdev_orchestrator.machine import Machine
from mdev_orchestrator.qemu.events import (
    GuestEvent,
    StateChange,
    Unwatched,
    Watched,
    guest_events,
)

EVERY = (700, 10, 10)
"""How often garbage is looked for: Python's own numbers, because this command lives long."""


def watch(
    *,
    json: Annotated[bool, Option("--json", help="One JSON document a line.")] = False,
) -> None:
    """Print events of parents, devices, VFIO nodes and guests as they happen, until ctrl-C."""
    gc.set_threshold(*EVERY)
    output.run(_watch(json=json))


async def _watch(*, json: bool) -> None:
    root = output.host_root()
    # gather would return while one of them still ends, and asyncio.run() cancel it a second time
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(_print(events(lambda: udev_monitor(root)), json=json))
            group.create_task(_print(guest_events(Machine(root)), json=json))
    except BaseExceptionGroup as failed:
        raise failed.exceptions[0] from None


async def _print(stream: AsyncGenerator[Any, None], *, json: bool) -> None:
    async with aclosing(stream):
        async for event in stream:
            if json:
                output.emit_json(shape(event))
            else:
                output.emit(line(event))


def shape(event: Event | GuestEvent) -> dict[str, str]:
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
        case Watched() | Unwatched() | StateChange():
            return {"event": "guest"} | _guest_shape(event)


def _guest_shape(event: GuestEvent) -> dict[str, str]:
    match event:
        case Watched(guest):
            return {"action": "watched", "guest": guest}
        case Unwatched(guest):
            return {"action": "unwatched", "guest": guest}
        case StateChange(guest, uuid, parent, group, before, state, reason):
            told = {"action": "change", "guest": guest, "uuid": str(uuid), "parent": parent}
            told |= {"old_state": before, "state": state}
            told |= {"group_uuid": str(group)} if group else {}
            return told | ({"reason": reason} if reason else {})


def line(event: Event | GuestEvent) -> str:
    """An event as a line for people."""
    kind, *values = shape(event).values()
    return "  ".join((kind.ljust(6), *values))
