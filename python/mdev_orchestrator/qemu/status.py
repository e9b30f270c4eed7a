# SPDX-License-Identifier: GPL-2.0-or-later
"""What a listing of guests shows: the record, the process, and what QEMU says itself."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from enum import StrEnum

import msgspec
from msgspec import Struct

from mdev_orchestrator.errors import BusyError, MdoError
from mdev_orchestrator.qemu.hotplug import Plugged, mdevs
from mdev_orchestrator.qemu.process import RunningGuest, State, is_stopped

LOOK_SECONDS = 5.0
CONSOLE_ID = "console"


class GuestState(StrEnum):
    """What a guest does, as seen from its files, its process and its QEMU."""

    STARTING = "starting"
    """It is being started, and its QEMU has not answered yet."""
    RUNNING = "running"
    """Its CPUs run."""
    PAUSED = "paused"
    """Its QEMU answers and its CPUs do not run; :attr:`Report.status` says why."""
    STOPPED = "stopped"
    """Its QEMU is stopped by a signal (SIGSTOP) or a debugger, and so answers nothing."""
    SILENT = "not answering"
    """Its QEMU runs and does not answer: it is busy, or another program holds its monitor."""
    GONE = "gone"
    """Its process has ended; its directory is still there."""
    DAMAGED = "damaged"
    """Its record cannot be used."""


class Report(Struct, frozen=True):
    """One guest, looked at.

    :ivar status: QEMU's run state (``running``, ``paused``, ``prelaunch``, ``shutdown``…), ``None``
        for a guest that does not run or does not answer.
    :ivar mdevs: What QEMU says it has; ``None`` if it does not say.
    :ivar damage: Why something is not known.
    :ivar running: Whether QEMU says that the guest's CPUs run; ``None`` if it does not say.
    :ivar stopped: Whether QEMU is stopped by a signal or a debugger.
    """

    guest: RunningGuest
    status: str | None = None
    mdevs: tuple[Plugged, ...] | None = None
    damage: str = ""
    running: bool | None = None
    stopped: bool = False

    @property
    def state(self) -> GuestState:
        """What the guest does, for a listing."""
        if not self.guest.alive or self.guest.state is not State.RUNNING:
            return GuestState(self.guest.state.value)
        if self.stopped:
            return GuestState.STOPPED
        if self.running is None:
            return GuestState.SILENT
        return GuestState.RUNNING if self.running else GuestState.PAUSED


class _Status(msgspec.Struct, frozen=True):
    """StatusInfo of QMP."""

    status: str
    running: bool


class _Chardev(msgspec.Struct, frozen=True):
    """ChardevInfo of QMP."""

    label: str
    filename: str


async def look(guest: RunningGuest, *, deadline: float = LOOK_SECONDS) -> Report:
    """Ask one guest's QEMU. A guest that cannot be asked is reported, never raised.

    :param deadline: Seconds for the whole. A QEMU that is stopped is not waited for.
    """
    if not guest.alive:
        return Report(guest, damage=guest.damage)
    if is_stopped(guest):
        pid = guest.record.pid if guest.record else 0
        damage = f"its QEMU is stopped (SIGSTOP); kill -CONT {pid} lets it go on"
        return Report(guest, damage=damage, stopped=True)
    from mdev_orchestrator.qemu.monitor import connect

    end = asyncio.get_running_loop().time() + deadline
    try:
        async with connect(guest.query_socket, guest.label, deadline=None, end=end) as qmp:
            status = await qmp.execute("query-status", _Status)
            return Report(guest, status.status, await mdevs(qmp), running=status.running)
    except MdoError as error:
        return Report(guest, damage=error.message)


async def look_all(
    guests: Iterable[RunningGuest], *, deadline: float = LOOK_SECONDS
) -> list[Report]:
    """Ask all at once; one that hangs costs no more than the deadline."""
    return await asyncio.gather(*(look(guest, deadline=deadline) for guest in guests))


async def check_console_free(guest: RunningGuest, *, deadline: float = LOOK_SECONDS) -> None:
    """See that no other program is connected to the console: QEMU serves one, silently.

    :param deadline: Seconds for the whole.
    :raise BusyError: Another program is connected.
    :raise DeadlineError: QEMU does not answer.
    """
    from mdev_orchestrator.qemu.monitor import connect

    end = asyncio.get_running_loop().time() + deadline
    async with connect(guest.query_socket, guest.label, deadline=None, end=end) as qmp:
        devices = await qmp.execute("query-chardev", list[_Chardev])
    for device in devices:
        if device.label == CONSOLE_ID and not device.filename.startswith("disconnected:"):
            raise BusyError(
                f"{guest.label}: another program is connected to its console",
                f"mdo guest console --log {guest.name} shows what it printed",
                subject=guest.label,
            )
