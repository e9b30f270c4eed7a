# SPDX-License-Identifier: GPL-2.0-or-later
"""What a listing of guests shows: the record, the process, and what QEMU says itself."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import msgspec
from msgspec import Struct

from mdev_orchestrator.errors import BusyError, DeadlineError, MdoError
from mdev_orchestrator.qemu.hotplug import Plugged, mdevs
from mdev_orchestrator.qemu.process import RunningGuest

LOOK_SECONDS = 5.0
CONSOLE_ID = "console"


class Report(Struct, frozen=True):
    """One guest, looked at.

    :ivar status: QEMU's run state (``running``, ``paused``, ``prelaunch``, ``shutdown``…), ``None``
        for a guest that does not run or does not answer.
    :ivar mdevs: What QEMU says it has; ``None`` if it does not say.
    :ivar damage: Why something is not known.
    """

    guest: RunningGuest
    status: str | None = None
    mdevs: tuple[Plugged, ...] | None = None
    damage: str = ""


class _Status(msgspec.Struct, frozen=True):
    """StatusInfo of QMP."""

    status: str


class _Chardev(msgspec.Struct, frozen=True):
    """ChardevInfo of QMP."""

    label: str
    filename: str


async def look(guest: RunningGuest, *, deadline: float = LOOK_SECONDS) -> Report:
    """Ask one guest's QEMU. A guest that cannot be asked is reported, never raised."""
    if not guest.alive:
        return Report(guest, damage=guest.damage)
    from mdev_orchestrator.qemu.monitor import connect

    try:
        async with (
            asyncio.timeout(deadline),
            connect(guest.query_socket, guest.label, deadline=deadline) as qmp,
        ):
            status = await qmp.execute("query-status", _Status)
            return Report(guest, status.status, await mdevs(qmp))
    except TimeoutError:
        return Report(guest, damage=f"its monitor did not answer within {deadline:g} s")
    except MdoError as error:
        return Report(guest, damage=error.message)


async def look_all(
    guests: Iterable[RunningGuest], *, deadline: float = LOOK_SECONDS
) -> list[Report]:
    """Ask all at once; one that hangs costs no more than the deadline."""
    return await asyncio.gather(*(look(guest, deadline=deadline) for guest in guests))


async def check_console_free(guest: RunningGuest, *, deadline: float = LOOK_SECONDS) -> None:
    """See that nobody else is connected to the console: QEMU would let us wait without a word.

    :raise BusyError: Somebody is.
    :raise DeadlineError: QEMU does not answer.
    """
    from mdev_orchestrator.qemu.monitor import connect

    try:
        async with (
            asyncio.timeout(deadline),
            connect(guest.query_socket, guest.label, deadline=deadline) as qmp,
        ):
            devices = await qmp.execute("query-chardev", list[_Chardev])
    except TimeoutError:
        raise DeadlineError(f"{guest.label}: QEMU did not answer within {deadline:g} s") from None
    for device in devices:
        if device.label == CONSOLE_ID and not device.filename.startswith("disconnected:"):
            raise BusyError(
                f"{guest.label}: somebody else is connected to its console",
                f"mdo guest console --log {guest.name} shows what it printed",
            )
