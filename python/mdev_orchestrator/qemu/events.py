# SPDX-License-Identifier: GPL-2.0-or-later
"""Events of the mdevs in all guests' QEMUs, as one typed async iterator.

The patched QEMU sends ``VFIO_MDEV_STATE_CHANGED`` (docs/qmp.md) to the clients of its monitors.
Each guest has a monitor for this alone, ``watch.sock``: a watcher stays connected, and a monitor
serves one client at a time. So there is one watcher of a guest; another one waits, and has the
events from the moment at which the first has gone.

As with those of the kernel, events are hints: what happens before :class:`Watched` and after
:class:`Unwatched` is not seen, and ``mdo guest list`` shows what is.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from uuid import UUID

import msgspec
from msgspec import Struct

from mdev_orchestrator.errors import QemuError
from mdev_orchestrator.machine import Machine
from mdev_orchestrator.qemu.monitor import connect
from mdev_orchestrator.qemu.process import RunningGuest, list_guests

STATE_CHANGED = "VFIO_MDEV_STATE_CHANGED"
LOOK_SECONDS = 1.0
"""How often new guests are looked for: a directory that appears has no event that asyncio knows."""
IDLE_SECONDS = 3600.0


class Watched(Struct, frozen=True):
    """From now on the events of this guest's QEMU are heard."""

    guest: str


class Unwatched(Struct, frozen=True):
    """They are heard no more: QEMU has ended, or sent more than could be read."""

    guest: str


class StateChange(Struct, frozen=True):
    """An mdev came online or went offline in a guest's QEMU, or could not.

    :ivar group: Its start group, ``None`` for one of its own.
    :ivar before: ``online`` or ``offline``; equal to ``state`` if it could not, or if its driver
        asks for it back.
    :ivar reason: Why something is not as it should be; empty when all went well.
    """

    guest: str
    uuid: UUID
    parent: str
    group: UUID | None
    before: str
    state: str
    reason: str = ""


GuestEvent = Watched | Unwatched | StateChange
Put = Callable[[GuestEvent], Awaitable[None]]


class _Data(msgspec.Struct, frozen=True, rename="kebab"):
    """What is used of the event's data."""

    uuid: UUID
    parent: str
    old_state: str
    new_state: str
    group: UUID | None = None
    reason: str = ""


async def guest_events(machine: Machine) -> AsyncGenerator[GuestEvent, None]:
    """Give the events of all guests, those that start later too, without end.

    A guest whose QEMU knows no such event, or is from before there was a monitor for it, is silent.

    :raise MdoError: The guests cannot be listed.
    """
    queue: asyncio.Queue[GuestEvent] = asyncio.Queue(1)
    looking = asyncio.ensure_future(_look(machine, queue.put))
    try:
        while True:
            getting = asyncio.ensure_future(queue.get())
            try:
                await asyncio.wait((getting, looking), return_when=asyncio.FIRST_COMPLETED)
                if not getting.done():
                    looking.result()  # it ends by an error only
            finally:
                getting.cancel()
            yield getting.result()
    finally:
        looking.cancel()
        await asyncio.wait((looking,))


async def _look(machine: Machine, put: Put) -> None:
    """Listen to each guest that there is, without end."""
    listening: dict[int, asyncio.Task[None]] = {}
    try:
        async with asyncio.TaskGroup() as group:
            while True:
                listening = {pid: task for pid, task in listening.items() if not task.done()}
                for guest in list_guests(machine):
                    record = guest.record
                    if record and record.ready and guest.alive and record.pid not in listening:
                        listening[record.pid] = group.create_task(_listen(guest, put))
                await asyncio.sleep(LOOK_SECONDS)
    except BaseExceptionGroup as failed:
        raise failed.exceptions[0] from None


async def _listen(guest: RunningGuest, put: Put) -> None:
    """Pass on the events of one guest's QEMU, until it hangs up."""
    if not guest.watch_socket.exists():
        return
    watched = False
    try:
        async with connect(guest.watch_socket, guest.label, deadline=None) as qmp:
            with qmp.events((STATE_CHANGED,), lambda _: True) as events:
                watched = True
                await put(Watched(guest.name))
                while True:
                    if event := await events.next(IDLE_SECONDS):
                        await put(_change(guest.name, msgspec.convert(event.data, _Data)))
    except (QemuError, msgspec.ValidationError):
        if watched:
            await put(Unwatched(guest.name))


def _change(guest: str, data: _Data) -> StateChange:
    states = data.old_state, data.new_state
    return StateChange(guest, data.uuid, data.parent, data.group, *states, data.reason)
