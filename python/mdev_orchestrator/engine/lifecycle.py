# SPDX-License-Identifier: GPL-2.0-or-later
"""Guests and their start groups: exactly one starts a group, and what is ours is stopped.

A group comes online before the first open of any member. Who sees to that is decided for each
launch and each attach (docs/lifecycle.md has the whole picture):

====================================  ==========  ==========================
the group                             starts it   stops it
====================================  ==========  ==========================
has no ``online``                     the driver  the driver
is online already                     somebody    that somebody, never we
is offline, QEMU has ``mdev-start``   QEMU        QEMU; we, if it could not
is offline, any other QEMU            we          we, when its user has gone
====================================  ==========  ==========================

Nothing in sysfs tells whether a driver with ``online`` would also start by itself, and it does not
matter: a 1 for a group that is online is ignored, and a start that was asked for is refused with
its reason, where a start inside an open is refused with an error number. Only when we may not write
the file, QEMU is run nevertheless, and the driver has its chance.

The guest outlives the command that started it, so "we" are whichever command looks next. For each
group that was offline when a guest got it there is a file in the guest's directory before it comes
online, ``started/UUID.json``. It goes when the group is offline again: at ``guest stop``, at
``detach``, or at the next :func:`reclaim_groups`, which every command that touches guests begins
with. The kernel is the judge: a 0 is refused as long as any member is open.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
from collections.abc import AsyncIterator, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal
from uuid import UUID

import msgspec
from msgspec import Struct

from mdev_orchestrator.errors import (
    BusyError,
    DeadlineError,
    HostError,
    MdoError,
    QemuError,
    RequestError,
    UnknownError,
)
from mdev_orchestrator.host import groups, sysfs
from mdev_orchestrator.host.holders import Holders, holders
from mdev_orchestrator.host.readiness import wait_ready
from mdev_orchestrator.host.sysfs import ROOT
from mdev_orchestrator.machine import Machine
from mdev_orchestrator.model import Host, Mdev, StartGroup
from mdev_orchestrator.qemu import features, hotplug, process
from mdev_orchestrator.qemu.command import GuestMdev, GuestSpec
from mdev_orchestrator.qemu.process import Ended, RunningGuest
from mdev_orchestrator.state import decode, private_dir
from mdev_orchestrator.system.writer import Writer, write_or_kill

START_SECONDS = 30.0
"""For one group to come online."""
READY_SECONDS = 10.0
"""For an mdev that exists to be openable."""
STOP_SECONDS = 5.0
"""For one group to go offline."""
_LOOK_SECONDS = 0.2


class Started(msgspec.Struct, frozen=True):
    """``started/UUID.json``: a group that was offline before a guest got it.

    :ivar group: Its ``group_uuid``; ``None`` for a single mdev.
    :ivar by: Who was to start it: ``mdo`` or ``qemu``.
    """

    parent: str
    group: UUID | None
    members: list[UUID]
    by: Literal["mdo", "qemu"]


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
        return f"guest {self.guest} has no use for {self.group} any more: it is offline now"


class _GuestsIn(Machine):
    """The machine whose guests are in a directory of any name."""

    def __init__(self, root: Path, guests: Path) -> None:
        super().__init__(root, state=guests.parent)
        self._guests = guests

    @property
    def guests_dir(self) -> Path:
        return self._guests


def machine_of(guests: Path | None, host: Path = ROOT) -> Machine:
    """The machine whose guests are in a directory."""
    return Machine(host) if guests is None else _GuestsIn(host, guests)


# ---------------------------------------------------------------- launch and attach


async def usable_mdev(uuid: UUID, deadline: float, host: Path = ROOT) -> GuestMdev:
    """Find an mdev of the host that can be opened; who has it is looked at when it is given away.

    :param deadline: Seconds; at most :data:`READY_SECONDS` of them.
    :raise UnknownError: There is no such mdev.
    :raise DeadlineError: It cannot be opened; says why.
    """
    mdev = sysfs.read_mdev(uuid, host)
    if mdev is None:
        raise UnknownError(f"there is no mdev {uuid}", "mdo host lists them; mdo create makes one")
    await wait_ready(uuid, min(deadline, READY_SECONDS), host)
    return GuestMdev(uuid, mdev.path, mdev.device_api or "vfio-pci")


async def launch(
    spec: GuestSpec,
    *,
    deadline: float = process.START_SECONDS,
    root: Path | None = None,
    host: Path = ROOT,
    write: Writer = write_or_kill,
) -> RunningGuest:
    """Start a guest, and the groups of its mdevs before that; all of it or nothing.

    :param deadline: Seconds until QEMU must answer, and for each group at most
        :data:`START_SECONDS` of them before that.
    :param root: Where guests live.
    :param host: Directory in which ``sys`` stands.
    :raise BusyError: Somebody else has a member of a group.
    :raise RequestError: A group is not complete.
    :raise MdoError: A group did not come online, see :func:`mdev_orchestrator.host.groups.start`;
        or what :func:`mdev_orchestrator.qemu.process.start` raises.
    """
    await reclaim_groups(root=root, host=host, write=write)
    found = sysfs.scan(host, types=False) if spec.mdevs else Host()
    wanted = _groups_of(found, (mdev.uuid for mdev in spec.mdevs))
    held = _holders_of(wanted, found, host)
    for group in wanted:
        _check_users(group, held)
    _check_complete(f"guest {spec.name}", wanted, {mdev.uuid for mdev in spec.mdevs})
    qemu = shutil.which(spec.qemu) or spec.qemu
    drivers = {mdev.uuid: mdev.device_api for mdev in spec.mdevs}
    left_to_qemu = {
        group
        for group in wanted
        if group.online is False
        and features.START in await features.properties(qemu, drivers[_one(group, drivers)])
    }

    @contextlib.asynccontextmanager
    async def around(directory: Path) -> AsyncIterator[None]:
        place = directory / process.STARTED
        async with contextlib.AsyncExitStack() as stack:
            for group in wanted:
                by: Literal["mdo", "qemu"] = "qemu" if group in left_to_qemu else "mdo"
                await stack.enter_async_context(
                    _online(place, group, by, min(deadline, START_SECONDS), host, write)
                )
            with _explained(wanted, host):
                yield

    return await process.start(machine_of(root, host), spec, deadline=deadline, around=around)


async def attach(
    guest: RunningGuest,
    mdev: GuestMdev,
    *,
    deadline: float = hotplug.ATTACH_SECONDS,
    wait_guest: bool = False,
    host: Path = ROOT,
    write: Writer = write_or_kill,
) -> str | None:
    """Plug an mdev into a running guest, and start its group before that if it is offline.

    :param deadline: Seconds for the whole.
    :return: The port that it sits in, as :func:`mdev_orchestrator.qemu.hotplug.plug_by` gives it.
    :raise BusyError: Another process has a member of the group.
    :raise MdoError: The group did not come online; or what ``plug_by`` raises.
    """
    from mdev_orchestrator.qemu.monitor import connect

    loop = asyncio.get_running_loop()
    end = loop.time() + deadline
    async with (
        process.attaching(guest),
        connect(guest.qmp_socket, guest.label, deadline=deadline) as qmp,
        contextlib.AsyncExitStack() as stack,
    ):
        found = sysfs.scan(host, types=False)
        for group in _groups_of(found, [mdev.uuid]):
            _check_users(group, _holders_of([group], found, host), guest)
            by: Literal["mdo", "qemu"] = "mdo"
            if group.online is False and await features.has_property(
                qmp, mdev.device_api, features.START
            ):
                by = "qemu"
            await stack.enter_async_context(
                _online(guest.started, group, by, end - loop.time(), host, write)
            )
            stack.enter_context(_explained([group], host))
        return await hotplug.plug_by(qmp, hotplug.device_for(mdev), end, wait_guest=wait_guest)


# ---------------------------------------------------------------- detach and end


async def detach(
    guest: str,
    uuid: UUID,
    deadline: float = hotplug.DETACH_SECONDS,
    *,
    root: Path | None = None,
    host: Path = ROOT,
    write: Writer = write_or_kill,
) -> None:
    """Take an mdev out of a running guest, and its group offline when that was the last of it.

    :raise MdoError: What :func:`mdev_orchestrator.qemu.hotplug.detach` raises; or the device is out
        and its group does not go offline.
    """
    machine = machine_of(root, host)
    await hotplug.detach(machine, guest, uuid, deadline)
    found = process.find(machine, guest)
    if not process.has_started(found):
        return
    for swept in await _tidy(found, host, write):
        if swept.error:
            raise MdoError(f"mdev {uuid} is out of guest {guest}, but {swept.group}: {swept.error}")


async def end(
    guest: RunningGuest,
    *,
    deadline: float = process.STOP_SECONDS,
    force: bool = False,
    host: Path = ROOT,
    write: Writer = write_or_kill,
) -> Ended:
    """End a guest, take what was started for it offline, and remove its directory.

    :raise MdoError: What :func:`mdev_orchestrator.qemu.process.stop` raises; or the guest has ended
        and a group does not go offline: then its directory stays, and the next command tries again.
    """

    async def release(ended: RunningGuest) -> None:
        if not process.has_started(ended):
            return
        for swept in await _tidy(ended, host, write):
            if swept.error:
                raise MdoError(
                    f"{ended.label} has ended, but {swept.group} may still be online: "
                    f"{swept.error}",
                    "the next mdo guest command tries again",
                )

    return await process.stop(
        machine_of(guest.directory.parent, host),
        guest,
        deadline=deadline,
        force=force,
        release=release,
    )


async def reclaim_groups(
    *, root: Path | None = None, host: Path = ROOT, write: Writer = write_or_kill
) -> tuple[ReclaimedGroup, ...]:
    """Take offline what was started for guests that have ended, or have let go of it since.

    Never raises for a group that it cannot stop, and leaves alone what somebody has open.
    """
    done: list[ReclaimedGroup] = []
    left = [
        g for g in process.list_guests(machine_of(root)) if process.has_started(g) or _drafts(g)
    ]
    if not left:
        return ()
    found = sysfs.scan(host, types=False)
    held = holders(found.mdevs, host)  # one look for all guests: it reads every process
    for guest in left:
        if not _has_all_in_use(guest, found, held):
            # one that is being started or changed at this moment can wait for the next sweep
            with contextlib.suppress(BusyError):
                done += await _tidy(guest, host, write, wait=0, starting=0)
    return tuple(done)


def _has_all_in_use(guest: RunningGuest, found: Host, held: Holders) -> bool:
    """Whether a guest that lives has let go of nothing: there is nothing to tidy up after it."""
    if not guest.alive or _drafts(guest):
        return False
    try:
        all_started = [_read(file) for file in guest.started.glob("*.json")]
    except MdoError:
        return False
    left = [_left_of(started, found) for started in all_started]
    return all(mdevs and _users(found.group_of(mdevs[0]), held) for mdevs in left)


async def _tidy(
    guest: RunningGuest,
    host: Path,
    write: Writer,
    *,
    wait: float = process.LOCK_SECONDS,
    starting: float = START_SECONDS,
) -> list[ReclaimedGroup]:
    """Take offline what a guest had and nobody has open; what was done, and what could not be.

    :param wait: Seconds for somebody else who is at it.
    :param starting: Seconds for a group that is just starting.
    """
    done: list[ReclaimedGroup] = []
    try:
        async with process.tidying(guest, wait) as alive:
            for draft in _drafts(guest):
                draft.unlink(missing_ok=True)
            for file in sorted(guest.started.glob("*.json")):
                try:
                    started = _read(file)
                    done += await _give_back(
                        guest.name, file, started, host, write, alive=alive, starting=starting
                    )
                except MdoError as error:
                    done.append(
                        ReclaimedGroup(guest.name, f"start group {file.stem}", error.message)
                    )
            cut_short = not alive and guest.record is None and not process.has_started(guest)
    except FileNotFoundError:
        return done  # somebody else has tidied up
    if cut_short:  # its starter was killed before QEMU began: there is nothing else to keep it for
        with contextlib.suppress(BusyError):
            process.remove(guest)
    return done


async def _give_back(
    guest: str,
    file: Path,
    started: Started,
    host: Path,
    write: Writer,
    *,
    alive: bool,
    starting: float = 0,
) -> list[ReclaimedGroup]:
    """Take one group offline unless it is in use, and forget it then."""
    found = sysfs.scan(host, types=False)
    left = _left_of(started, found)
    was_online = False
    if left:
        group = found.group_of(left[0])
        users = _users(group, _holders_of([group], found, host))
        if users or not await _stopped(left[0].uuid, starting, host, write):
            who = "held by " + ", ".join(sorted(users)) if users else "the driver says it is in use"
            return [] if alive else [ReclaimedGroup(guest, group.label, who)]
        was_online = left[0].online is True
    _forget(file)
    return [ReclaimedGroup(guest, _named(started))] if was_online else []


def _left_of(started: Started, found: Host) -> list[Mdev]:
    """The members that are in the group still.

    One that was removed meanwhile is offline, one that went elsewhere is not ours any more.
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


async def _stopped(uuid: UUID, seconds: float, host: Path, write: Writer) -> bool:
    """Stop a group that nobody has open.

    When the driver says that it is in use nevertheless, it is just starting: who asked for that has
    been killed, and the driver goes on.
    """
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    while not await groups.stop(uuid, STOP_SECONDS, host, write=write):
        if loop.time() >= end:
            return False
        await asyncio.sleep(_LOOK_SECONDS)
    return True


# ---------------------------------------------------------------- what is ours


@contextlib.asynccontextmanager
async def _online(
    place: Path,
    group: StartGroup,
    by: Literal["mdo", "qemu"],
    deadline: float,
    host: Path,
    write: Writer,
) -> AsyncIterator[None]:
    """A group that is online before the block, or will be by QEMU; undone if the block fails.

    What is online already, or cannot be told, is none of ours.
    """
    if group.online is not False:
        yield
        return
    file = _note(place, Started(group.parent, group.uuid, list(group.members), by))
    denied = ""
    try:
        if by == "mdo":
            try:
                await groups.start(group, max(deadline, 0.1), host, write=write)
            except HostError as error:
                denied = error.message
                _forget(file)
            except DeadlineError:
                raise  # it may come online yet
            except MdoError:
                now = groups.find(group.members[0], host)
                if now is None or now[1].online is False:
                    _forget(file)  # all or nothing: it was nothing
                raise
        yield
    except BaseException as error:
        if denied:
            error.add_note(f"{denied}, and its driver did not start it by itself")
        elif file.exists():
            await _undo(file, host, write, error)
        raise


async def _undo(file: Path, host: Path, write: Writer, cause: BaseException) -> None:
    """Give back what a failed launch or attach started; what cannot be becomes a note."""
    started = _read(file)
    try:
        # a device that was plugged in spite of the failure is in use, and its group stays
        await _give_back("", file, started, host, write, alive=True)
    except MdoError as error:
        cause.add_note(f"{_named(started)} may still be online: {error.message}")


@contextlib.contextmanager
def _explained(wanted: Sequence[StartGroup], host: Path) -> Iterator[None]:
    """Add what the drivers know to what QEMU says when it could not open a device."""
    try:
        yield
    except QemuError as error:
        for group in wanted:
            if words := groups.explain(group, host):
                error.add_note(words)
        raise


def _note(place: Path, started: Started) -> Path:
    """Write down what is about to come online; on disk before anything happens."""
    private_dir(place)
    name = str(started.group or started.members[0])
    file = place / f"{name}.json"
    scratch = place / f".{name}.new"
    try:
        with scratch.open("wb") as stream:
            stream.write(msgspec.json.encode(started) + b"\n")
            stream.flush()
            os.fsync(stream.fileno())
        scratch.rename(file)
    except OSError as error:
        scratch.unlink(missing_ok=True)
        raise HostError(f"cannot write {file}: {error.strerror}") from error
    return file


def _drafts(guest: RunningGuest) -> list[Path]:
    """What somebody was writing down when he was killed: nothing had begun to come online."""
    return [*guest.started.glob(".*.new")]


def _forget(file: Path) -> None:
    file.unlink(missing_ok=True)


def _read(file: Path) -> Started:
    try:
        return decode(file.read_bytes(), Started)
    except (OSError, ValueError) as error:
        raise HostError(
            f"{file} cannot be used: {error}", "remove it when you have looked"
        ) from error


def _named(started: Started) -> str:
    if started.group is not None:
        return f"start group {started.group}"
    return f"mdev {started.members[0]}" if started.members else "a start group"


# ---------------------------------------------------------------- checks


def _groups_of(found: Host, uuids: Iterable[UUID]) -> tuple[StartGroup, ...]:
    """The start groups of some mdevs, each once; an mdev that is not there is QEMU's to refuse."""
    mdevs = (found.find(uuid) for uuid in uuids)
    return tuple(dict.fromkeys(found.group_of(mdev) for mdev in mdevs if mdev is not None))


def _holders_of(wanted: Collection[StartGroup], found: Host, host: Path) -> Holders:
    """Who has members of some start groups open, by one look at all processes."""
    members = {uuid for group in wanted for uuid in group.members}
    return holders([mdev for mdev in found.mdevs if mdev.uuid in members], host)


def _one(group: StartGroup, of: Collection[UUID]) -> UUID:
    return next(uuid for uuid in group.members if uuid in of)


def _check_complete(who: str, wanted: Iterable[StartGroup], given: Collection[UUID]) -> None:
    for group in wanted:
        missing = [uuid for uuid in group.members if uuid not in given]
        if missing:
            raise RequestError(
                f"{who}: {group.label} is not complete: it lacks mdev "
                + ", ".join(map(str, missing)),
                "give the guest all members, by --mdev " + " --mdev ".join(map(str, missing)),
            )


def _check_users(group: StartGroup, held: Holders, guest: RunningGuest | None = None) -> None:
    """A group has one user, and so has an mdev that is in none."""
    own = guest.record.pid if guest is not None and guest.record is not None else None
    for uuid in group.members:
        others = [holder for holder in held.of(uuid) if holder.pid != own]
        if not others:
            continue
        held_by = f"held by {', '.join(map(str, others))}"
        if group.uuid is None:
            raise BusyError(f"mdev {uuid} is {held_by}", "detach it there, or take another")
        raise BusyError(
            f"{group.label} has a user already: mdev {uuid} of it is {held_by}",
            "a start group belongs to one guest; stop that one, or take other devices",
        )
