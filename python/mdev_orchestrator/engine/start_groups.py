# SPDX-License-Identifier: GPL-2.0-or-later
"""Start groups of guests: exactly one program starts a group, and what was started is stopped.

A group comes online before the first open of any member. Which program starts it is decided for
each launch and each attach (docs/lifecycle.md has the whole picture):

====================================  ===============  ===============================
the group                             is started by    is stopped by
====================================  ===============  ===============================
has no ``online``                     the driver       the driver
is online already                     another program  that program, never mdo
is offline, QEMU has ``mdev-start``   QEMU             QEMU; mdo, if QEMU was killed
is offline, any other QEMU            mdo              mdo, when its guest has ended
====================================  ===============  ===============================

Nothing in sysfs tells whether a driver with ``online`` would also start by itself, and it does not
matter: a 1 for a group that is online is ignored, and a start that was asked for is refused with
its reason, where a start inside an open is refused with an error number. Only when mdo may not
write the file, QEMU is run nevertheless, and the driver may start the group in its open.

A guest outlives the command that started it. For each group that was offline when a guest got it
there is a file in the guest's directory before the group comes online, ``started/UUID.json``. It
goes when the group is offline again: at ``guest stop``, at ``detach``, or in
:func:`reclaim_groups`, with which every command that touches guests begins. The kernel decides: it
refuses a 0 as long as any member is open.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Collection, Iterable, Sequence
from pathlib import Path
from typing import Literal
from uuid import UUID

import msgspec
from msgspec import Struct

from mdev_orchestrator import errors
from mdev_orchestrator.errors import Outcome
from mdev_orchestrator.host import groups, sysfs
from mdev_orchestrator.host.holders import Holders, find_holders
from mdev_orchestrator.machine import Machine
from mdev_orchestrator.model import Host, Mdev, StartGroup
from mdev_orchestrator.qemu import process
from mdev_orchestrator.qemu.guest_dir import remove, tidying
from mdev_orchestrator.qemu.process import RunningGuest
from mdev_orchestrator.state import decode, private_dir
from mdev_orchestrator.system.directory_lock import LOCK_SECONDS
from mdev_orchestrator.system.files import write_atomic

Starter = Literal["mdo", "qemu"]

START_SECONDS = 30.0
"""For one group to come online."""
STOP_SECONDS = 5.0
"""For one group to go offline."""
_LOOK_SECONDS = 0.2


class StartedRecord(msgspec.Struct, frozen=True):
    """``started/UUID.json``: a group that was offline before a guest got it.

    :ivar group: Its ``group_uuid``; ``None`` for a single mdev.
    :ivar by: The program that was to start it: ``mdo`` or ``qemu``.
    """

    parent: str
    group: UUID | None
    members: list[UUID]
    by: Starter

    @property
    def label(self) -> str:
        """How messages name it."""
        if self.group is not None:
            return f"start group {self.group}"
        return f"mdev {self.members[0]}" if self.members else "a start group"


class ReclaimedGroup(Struct, frozen=True):
    """What :func:`reclaim_groups` did about one group that had no user any more.

    :ivar error: Why it may still be online; empty when it is offline.
    """

    guest: str
    group: str
    error: str = ""

    def __str__(self) -> str:
        if self.error:
            return f"guest {self.guest}: {self.group} may still be online: {self.error}"
        return f"guest {self.guest} does not use {self.group} any more: it is offline now"


# ---------------------------------------------------------------- stopping


async def reclaim_groups(machine: Machine) -> tuple[ReclaimedGroup, ...]:
    """Stop the groups of guests that have ended, or have closed their members since.

    Never raises for a group that it cannot stop, and leaves alone what a process has open.
    """
    done: list[ReclaimedGroup] = []
    left = [g for g in process.list_guests(machine) if process.has_started(g) or _drafts(g)]
    if not left:
        return ()
    found = await sysfs.scan(machine, types=False)
    held = await find_holders(machine, found.mdevs)  # one walk of /proc for all guests
    for guest in left:
        if not _uses_all(guest, found, held):
            # one that is being started or changed just now is left to the next call
            with contextlib.suppress(errors.BusyError):
                done += await release_groups(machine, guest, wait=0, starting=0)
    return tuple(done)


def _uses_all(guest: RunningGuest, found: Host, held: Holders) -> bool:
    """Whether a guest that runs has all its groups open still."""
    if not guest.alive or _drafts(guest):
        return False
    try:
        all_started = [_read(file) for file in guest.started.glob("*.json")]
    except errors.MdoError:
        return False
    left = [_members_left(started, found) for started in all_started]
    return all(mdevs and _users(found.group_of(mdevs[0]), held) for mdevs in left)


async def release_groups(
    machine: Machine,
    guest: RunningGuest,
    *,
    wait: float = LOCK_SECONDS,
    starting: float = START_SECONDS,
) -> list[ReclaimedGroup]:
    """Stop the groups of one guest that no process has open.

    :param wait: Seconds for another command that works in the guest's directory.
    :param starting: Seconds for a group that is just starting.
    :return: What was done, and what could not be.
    """
    done: list[ReclaimedGroup] = []
    try:
        async with tidying(guest, wait) as alive:
            for draft in _drafts(guest):
                draft.unlink(missing_ok=True)
            for file in sorted(guest.started.glob("*.json")):
                try:
                    done += await _release(
                        machine, guest.name, file, alive=alive, starting=starting
                    )
                except errors.MdoError as error:
                    label = f"start group {file.stem}"
                    done.append(ReclaimedGroup(guest.name, label, error.message))
            cut_short = not alive and guest.record is None and not process.has_started(guest)
    except FileNotFoundError:
        return done  # another command has removed the directory
    if cut_short:  # the command that started it was killed before QEMU began
        with contextlib.suppress(errors.BusyError):
            remove(guest)
    return done


async def _release(
    machine: Machine, guest: str, file: Path, *, alive: bool, starting: float = 0
) -> list[ReclaimedGroup]:
    """Stop one group unless it is in use, and delete its record then."""
    started = _read(file)
    found = await sysfs.scan(machine, types=False)
    left = _members_left(started, found)
    was_online = False
    if left:
        group = found.group_of(left[0])
        users = _users(group, await holders_of(machine, [group], found))
        if users or not await _stopped(machine, left[0].uuid, starting):
            held_by = "held by " + ", ".join(sorted(users)) if users else "its driver says so"
            return [] if alive else [ReclaimedGroup(guest, group.label, held_by)]
        was_online = left[0].online is True
    _delete(file)
    return [ReclaimedGroup(guest, started.label)] if was_online else []


def _members_left(started: StartedRecord, found: Host) -> list[Mdev]:
    """The members that are in the group still.

    One that was removed meanwhile is offline; one that is in another group now is not the guest's.
    """
    return [
        mdev
        for uuid in started.members
        if (mdev := found.find(uuid)) is not None
        and mdev.group_uuid == started.group
        and mdev.online is not None
    ]


def _users(group: StartGroup, held: Holders) -> set[str]:
    return {str(holder) for uuid in group.members for holder in held.of(uuid)}


async def _stopped(machine: Machine, uuid: UUID, seconds: float) -> bool:
    """Stop a group that no process has open.

    When the driver says that it is in use nevertheless, it is just starting: the command that asked
    for that was killed, and the driver goes on.
    """
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    while not await groups.stop(machine, uuid, STOP_SECONDS):
        if loop.time() >= end:
            return False
        await asyncio.sleep(_LOOK_SECONDS)
    return True


# ---------------------------------------------------------------- starting


@contextlib.asynccontextmanager
async def online(
    machine: Machine, place: Path, group: StartGroup, by: Starter, deadline: float
) -> AsyncIterator[None]:
    """Have a group online before the block, or let QEMU start it; undone if the block fails.

    A group that is online already, or whose state its driver does not tell, is left alone.

    :param place: Directory of the guest's records.
    :param deadline: Seconds for the group to come online.
    """
    if group.online is not False:
        yield
        return
    with errors.before_acting():
        started = StartedRecord(group.parent, group.uuid, list(group.members), by)
        file = _write(place, started)
    denied = ""
    try:
        if by == "mdo":
            try:
                await groups.start(machine, group, max(deadline, 0.1))
            except errors.HostError as error:
                denied = error.message
                file.unlink(missing_ok=True)
            except errors.MdoError as error:
                if error.outcome is Outcome.NO_EFFECT:
                    file.unlink(missing_ok=True)  # all members or none: it was none
                raise
        yield
    except BaseException as error:
        if denied:
            error.add_note(f"{denied}, and its driver did not start it by itself")
        elif file.exists():
            await _undo(machine, file, error)
        raise


async def _undo(machine: Machine, file: Path, cause: BaseException) -> None:
    """Stop what a failed launch or attach started; a failure becomes a note."""
    started = _read(file)
    try:
        # a device that was plugged in spite of the failure is in use, and its group stays online
        await _release(machine, "", file, alive=True)
    except errors.MdoError as error:
        cause.add_note(f"{started.label} may still be online: {error.message}")


@contextlib.asynccontextmanager
async def explained(machine: Machine, wanted: Sequence[StartGroup]) -> AsyncIterator[None]:
    """Add what the drivers know to what QEMU says when it cannot open a device."""
    try:
        yield
    except errors.QemuError as error:
        for group in wanted:
            if words := groups.explain(machine, group):
                error.add_note(words)
        raise


def _write(place: Path, started: StartedRecord) -> Path:
    """Record what is about to come online; on the disk before anything happens."""
    private_dir(place)
    file = place / f"{started.group or started.members[0]}.json"
    try:
        write_atomic(file, msgspec.json.encode(started) + b"\n")
    except OSError as error:
        raise errors.HostError(f"cannot write {file}: {error.strerror}") from error
    return file


def _delete(file: Path) -> None:
    file.unlink(missing_ok=True)


def _drafts(guest: RunningGuest) -> list[Path]:
    """Records that were being written when a command was killed: no group had begun to start."""
    return [*guest.started.glob(".*.new")]


def _read(file: Path) -> StartedRecord:
    try:
        return decode(file.read_bytes(), StartedRecord)
    except (OSError, ValueError) as error:
        raise errors.HostError(
            f"{file} cannot be used: {error}", "remove it when you have looked"
        ) from error


# ---------------------------------------------------------------- checks


def groups_of(found: Host, uuids: Iterable[UUID]) -> tuple[StartGroup, ...]:
    """The start groups of some mdevs, each once; QEMU refuses an mdev that is not there."""
    mdevs = (found.find(uuid) for uuid in uuids)
    return tuple(dict.fromkeys(found.group_of(mdev) for mdev in mdevs if mdev is not None))


async def holders_of(machine: Machine, wanted: Collection[StartGroup], found: Host) -> Holders:
    """The processes that have members of some start groups open, by one walk of /proc."""
    members = {uuid for group in wanted for uuid in group.members}
    return await find_holders(machine, [mdev for mdev in found.mdevs if mdev.uuid in members])


def check_complete(label: str, wanted: Iterable[StartGroup], given: Collection[UUID]) -> None:
    """Check that a guest gets all members of its groups.

    :raise RequestError: A group is not complete.
    """
    for group in wanted:
        missing = [uuid for uuid in group.members if uuid not in given]
        if missing:
            raise errors.RequestError(
                f"{label}: {group.label} is not complete: it lacks mdev "
                + ", ".join(map(str, missing)),
                "give the guest all members, by --mdev " + " --mdev ".join(map(str, missing)),
                subject=group.label,
            )


def check_users(group: StartGroup, held: Holders, own: int | None = None) -> None:
    """Check that no process but a guest has a member of a group open.

    :param own: The guest's process, if it runs.
    :raise BusyError: Another process has.
    """
    for uuid in group.members:
        others = [holder for holder in held.of(uuid) if holder.pid != own]
        if not others:
            continue
        held_by = f"held by {', '.join(map(str, others))}"
        if group.uuid is None:
            raise errors.BusyError(
                f"mdev {uuid} is {held_by}",
                "detach it there, or take another",
                subject=f"mdev {uuid}",
            )
        raise errors.BusyError(
            f"{group.label} has a user already: mdev {uuid} of it is {held_by}",
            "a start group belongs to one guest; stop that one, or take other devices",
            subject=group.label,
        )
