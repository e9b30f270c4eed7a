# SPDX-License-Identifier: GPL-2.0-or-later
"""Ends a guest's QEMU: asks the guest, and with ``force`` QEMU, and then the kernel."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Awaitable, Callable

from msgspec import Struct

from mdev_orchestrator import errors
from mdev_orchestrator.errors import Outcome
from mdev_orchestrator.machine import Machine
from mdev_orchestrator.qemu.guest_dir import remove
from mdev_orchestrator.qemu.pending import ASKED, still_asked, time_left
from mdev_orchestrator.qemu.process import (
    KILL_SECONDS,
    RunningGuest,
    await_end,
    find_strays,
    is_listening,
    is_stopped,
    kill,
    kill_strays,
    pidfd,
    runs_on,
    send_signal,
    wait_ended,
)

Release = Callable[["RunningGuest"], Awaitable[None]]
"""Gives back what a guest had whose process has ended."""
STOP_SECONDS = 60.0
PRESS_AGAIN_SECONDS = 10.0
"""Between two presses of a guest's power button."""
OBEY_SECONDS = 30.0
"""For a guest to end after its button was pressed: nothing tells that it is about to."""
REFUSED_SECONDS = 1.0
"""For a guest to end whose monitor could not be reached: it may be ending already."""
QUIT_SECONDS = 2.0
"""For QEMU to end by ``quit``, connecting to its monitor included."""
TERM_SECONDS = 3.0
"""For QEMU to end by SIGTERM."""


class Ended(Struct, frozen=True):
    """How :func:`stop` ended a guest.

    :ivar how: ``powerdown``, ``quit``, ``terminated``, ``killed``, or ``gone`` if it was already.
    """

    name: str
    how: str


async def stop_qemu(
    machine: Machine,
    guest: RunningGuest,
    *,
    deadline: float = STOP_SECONDS,
    force: bool = False,
    release: Release | None = None,
) -> Ended:
    """End a guest and remove its directory.

    Asks it to power down and waits. Only with ``force``, and at the deadline: QEMU's ``quit``, then
    SIGTERM, then SIGKILL. That takes at most :data:`QUIT_SECONDS`, :data:`TERM_SECONDS` and
    :data:`KILL_SECONDS` beyond the deadline. A QEMU that is stopped (SIGSTOP) obeys none but the
    last: with ``force`` it gets SIGKILL at once. A guest that has ended already only has its
    directory removed.

    :param deadline: Seconds for the guest to power down; 0 with ``force`` does not ask it.
    :param release: Called when the process has ended and before the directory is removed.
    :raise DeadlineError: The guest did not power down; it still runs, and nothing was removed. The
        outcome is unknown if its button was pressed: it may power down yet.
    :raise BusyError: Its process has ended, but another one runs as this guest, and ``force`` was
        not given.
    :raise RequestError: Its record is damaged and ``force`` was not given.
    """
    if guest.record is None:
        how = await _end_damaged(machine, guest, force=force)
    else:
        how = "gone"
        with pidfd(guest.record) as process:
            if process is not None:
                how = await _end(guest, process, deadline, force=force)
        if how == "gone" and (strays := await find_strays(machine, guest)):
            if not force:
                raise runs_on(guest, strays)
            await _end_strays(machine, guest)
            how = "killed"
    if release:
        await release(guest)
    # another process that starts or stops it removes it
    with contextlib.suppress(errors.BusyError):
        remove(guest)
    return Ended(guest.name, how)


async def await_pending_shutdown(guest: RunningGuest, *, deadline: float = OBEY_SECONDS) -> bool:
    """Wait whether a guest ends whose button was pressed; ``False`` at once if it was not.

    A press cannot be taken back: after a stop that was interrupted or has an unknown outcome, only
    this tells whether the guest will run on.

    :param deadline: Seconds to wait.
    :raise DeadlineError: They were over before :data:`OBEY_SECONDS` had passed since the press, and
        the guest may power down yet.
    """
    asked = guest.directory / ASKED
    left = time_left(asked, OBEY_SECONDS)
    if left is None:
        return False
    if await wait_ended(guest, max(min(left, deadline), 0)):
        return True
    if deadline < left:
        raise still_asked(guest.label, "power down", left - deadline)
    asked.unlink(missing_ok=True)
    return False


async def _end(guest: RunningGuest, process: int, deadline: float, *, force: bool) -> str:
    """Escalate until the process has ended; return what it took."""
    loop = asyncio.get_running_loop()
    end = loop.time() + deadline
    asked = guest.directory / ASKED
    trouble: errors.MdoError | None = None
    pressed = asked.exists()  # by an earlier command
    while trouble is None and end > loop.time() and not (force and is_stopped(guest)):
        with contextlib.suppress(OSError):  # on a full disk it is stopped all the same
            asked.touch()
        try:
            await _press(guest, end)
        except errors.MdoError as error:
            trouble = error
        pressed = pressed or trouble is None or trouble.outcome is not Outcome.NO_EFFECT
        # a guest that boots does not feel its button yet
        patience = PRESS_AGAIN_SECONDS if trouble is None else REFUSED_SECONDS
        if await await_end(process, max(min(end - loop.time(), patience), 0)):
            return "powerdown"
    if force:
        return await _force(guest, process)
    if not pressed:
        asked.unlink(missing_ok=True)
    raise errors.DeadlineError(
        f"{guest.label} did not power down within {deadline:g} s{_why(guest, trouble)}",
        f"it still runs; mdo guest stop --force {guest.name} ends it without asking",
        outcome=Outcome.UNKNOWN if pressed else Outcome.NO_EFFECT,
        subject=guest.label,
    )


def _why(guest: RunningGuest, trouble: errors.MdoError | None) -> str:
    """Why a guest did not power down, as the end of a message; empty if there is nothing to say."""
    if guest.record and is_stopped(guest):
        pid = guest.record.pid
        return f": its QEMU is stopped (SIGSTOP); kill -CONT {pid} lets it go on"
    return f": {str(trouble).removeprefix(f'{guest.label}: ')}" if trouble else ""


async def _press(guest: RunningGuest, end: float) -> None:
    """Press the guest's power button."""
    from mdev_orchestrator.qemu import monitor

    async with monitor.connect(guest.qmp_socket, guest.label, deadline=None, end=end) as qmp:
        await qmp.execute("system_powerdown", object)


async def _force(guest: RunningGuest, process: int) -> str:
    """End a guest's process without asking the guest; return what it took."""
    if not is_stopped(guest):
        if await _quit(guest, process):
            return "quit"
        send_signal(process, signal.SIGTERM)
        if await await_end(process, TERM_SECONDS):
            return "terminated"
    if await kill(process):
        return "killed"
    raise _does_not_end(guest, guest.record.pid if guest.record else "?")


def _does_not_end(guest: RunningGuest, pid: int | str) -> errors.MdoError:
    return errors.DeadlineError(
        f"{guest.label}: process {pid} does not end {KILL_SECONDS:g} s after SIGKILL",
        "the kernel holds it, perhaps in a driver; see dmesg",
        outcome=Outcome.UNKNOWN,
        subject=guest.label,
    )


async def _quit(guest: RunningGuest, process: int) -> bool:
    """Have QEMU end by itself; whether it has."""
    from mdev_orchestrator.qemu import monitor

    loop = asyncio.get_running_loop()
    end = loop.time() + QUIT_SECONDS
    with contextlib.suppress(errors.MdoError):  # a QEMU that does not answer is killed
        async with monitor.connect(guest.qmp_socket, guest.label, end=end) as qmp:
            await qmp.quit()
    return await await_end(process, max(end - loop.time(), 0))


async def _end_strays(machine: Machine, guest: RunningGuest, patience: float = 0) -> None:
    """End the QEMUs that run as a guest without being its recorded process."""
    uuid = guest.record.uuid if guest.record else None
    _, left = await kill_strays(machine, guest.directory, uuid, patience=patience)
    if left:
        raise _does_not_end(guest, left[0])


async def _end_damaged(machine: Machine, guest: RunningGuest, *, force: bool) -> str:
    """End a guest whose record does not say which process it is; return what it took."""
    from mdev_orchestrator.qemu import monitor

    if not force:
        raise errors.RequestError(
            f"{guest.label}: {guest.damage}",
            f"mdo guest stop --force {guest.name} ends the QEMU that uses its directory",
            outcome=Outcome.NO_EFFECT,
            subject=guest.label,
        )
    how = "gone"
    if is_listening(guest.qmp_socket):
        how = "quit"
        with contextlib.suppress(errors.MdoError):  # a QEMU that does not answer is killed
            end = asyncio.get_running_loop().time() + QUIT_SECONDS
            async with monitor.connect(guest.qmp_socket, guest.label, end=end) as qmp:
                await qmp.quit()
        await _end_strays(machine, guest, patience=TERM_SECONDS)
    elif await find_strays(machine, guest):
        await _end_strays(machine, guest)
        how = "killed"
    return how
