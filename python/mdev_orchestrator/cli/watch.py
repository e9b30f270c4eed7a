# SPDX-License-Identifier: GPL-2.0-or-later
"""``mdo watch``."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from mdev_orchestrator.cli import output
from mdev_orchestrator.cli.context import run
from mdev_orchestrator.cli.params import Json
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

GARBAGE = (700, 10, 10)
"""Thresholds of garbage collection: those of Python 3.11, because this command runs for long."""


def watch(
    *,
    json: Json = False,
) -> None:
    """Print events of parents, devices, VFIO nodes and guests as they happen, until ctrl-C."""
    gc.set_threshold(*GARBAGE)
    run(lambda machine: _watch(machine, json=json))


async def _watch(machine: Machine, *, json: bool) -> None:
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(_print(events(lambda: udev_monitor(machine)), json=json))
            group.create_task(_print(guest_events(machine), json=json))
    except BaseExceptionGroup as both:
        raise both.exceptions[0] from None  # the first that failed ended the other


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
            result = {"event": "mdev", "action": action, "uuid": str(uuid), "parent": parent}
            return result if state is None else result | {"state": state}
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
            result = {"action": "change", "guest": guest, "uuid": str(uuid), "parent": parent}
            result |= {"old_state": before, "state": state}
            result |= {"group_uuid": str(group)} if group else {}
            return result | ({"reason": reason} if reason else {})


def line(event: Event | GuestEvent) -> str:
    """An event as a line for people."""
    kind, *values = shape(event).values()
    return "  ".join((kind.ljust(6), *values))
