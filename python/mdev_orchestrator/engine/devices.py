# SPDX-License-Identifier: GPL-2.0-or-later
"""Creates and removes mdevs as one: all, or none.

Everything that can be known is checked before the first write. What the kernel then refuses, or the
user interrupts, is undone (:mod:`.executor`); a failed undo stands beside the first error and never
in its place.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from uuid import UUID, uuid4

from msgspec import Struct

from mdev_orchestrator.engine.context import DEADLINE, ROOT, Context, machine_of
from mdev_orchestrator.engine.executor import Planned, execute
from mdev_orchestrator.engine.journal import Journal
from mdev_orchestrator.engine.journal_db import Change, DeviceRecord, read_managed
from mdev_orchestrator.engine.recovery import recover
from mdev_orchestrator.engine.steps import Create
from mdev_orchestrator.errors import (
    BusyError,
    CapacityError,
    DeadlineError,
    HostError,
    MdoError,
    RequestError,
    UnknownError,
    UuidError,
)
from mdev_orchestrator.host import sysfs
from mdev_orchestrator.host.holders import Holders, find_holders
from mdev_orchestrator.model import (
    GROUP_FILE,
    Host,
    Mdev,
    MdevType,
    check_attribute,
    group_uuid,
    parse_uuid,
)

Detach = Callable[[str, UUID, float], Awaitable[None]]
"""Takes a guest's name, an mdev and seconds; returns when the guest has let go."""

_GRACE = 0.5  # seconds that the driver may take to give back the instances just removed
_LISTED = 8  # candidates that fit one line


class Placement(Struct, frozen=True):
    """What is to be created and where."""

    type_: MdevType
    uuids: tuple[UUID, ...]


def place(
    host: Host,
    type_id: str,
    count: int | None = None,
    *,
    parent: str | None = None,
    uuids: Sequence[str] = (),
) -> Placement:
    """Decide where ``count`` instances of a type go, or say why they cannot.

    :param count: How many; without it as many as there are UUIDs, at least one.
    :param parent: Needed when several parents offer the type.
    :param uuids: UUIDs to use; the rest is random.
    :raise UuidError: One is malformed, given twice, or taken.
    :raise UnknownError: Type or parent is not there, or several parents offer the type.
    :raise CapacityError: So many do not fit.
    :raise RequestError: The count makes no sense.
    :raise HostError: The host has no mdev bus.
    """
    given = _distinct(uuids)
    wanted = max(len(given), 1) if count is None else count
    if wanted < 1:
        raise RequestError(f"cannot create {wanted} devices", "ask for one or more")
    if len(given) > wanted:
        raise RequestError(f"{len(given)} UUIDs were given for {wanted} devices")
    if not host.mdev_bus:
        raise HostError(
            "this host has no mdev bus", "modprobe mdev and the vendor's driver; see mdo doctor"
        )
    for uuid in given:
        if (mdev := host.find(uuid)) is not None:
            raise UuidError(
                f"mdev {uuid} exists already under parent {mdev.parent}"
                + (f" as {mdev.type_id}" if mdev.type_id else " and is being removed"),
                "choose another UUID",
            )
    type_ = _find_type(host, type_id, parent)
    if type_.available_instances is not None and type_.available_instances < wanted:
        raise _too_many(host, type_, wanted)
    fresh = (uuid4() for _ in range(wanted - len(given)))
    return Placement(type_, (*given, *fresh))


async def create_devices(
    type_id: str,
    count: int | None = None,
    *,
    parent: str | None = None,
    uuids: Sequence[str] = (),
    group: str | None = None,
    attributes: Sequence[tuple[str, str]] = (),
    deadline: float = DEADLINE,
    root: Path = ROOT,
    journal: Path | None = None,
) -> tuple[Mdev, ...]:
    """Create mdevs of one type, all or none, and wait until each is usable. They are ours then.

    Takes what :func:`place` takes and raises what it raises; when cancelled it undoes what it did
    before it ends.

    :param group: Start group that they are put into, by its UUID or by a name
        (:func:`mdev_orchestrator.model.group_uuid`).
    :param attributes: Files of each mdev's directory and what is written there, in this order and
        before it is put into the group. A file that is a command (vfio-ap's ``assign_adapter``)
        stands there once for each time that it is to be written.
    :param deadline: Seconds for each device.
    :param journal: The journal's file; the state directory's without it.
    :raise HostError: The driver has no start groups, or no such file; or the journal cannot be
        written, and nothing was done.
    :raise DeadlineError: It took longer; everything was undone.
    :raise MdoError: The kernel refused; everything was undone. Its notes name what was not.
    """
    files = [*attributes]
    if group is not None:
        files.append((GROUP_FILE, str(group_uuid(group))))
    for name, value in files:
        check_attribute(name, value)
    groups = [UUID(value) for name, value in files if name == GROUP_FILE]
    if len(groups) > 1:
        raise RequestError("the start group is given twice", "a device is in one: leave one out")
    placement = await find_place(type_id, count, parent, uuids, root)
    type_ = placement.type_
    for group_id in groups:
        _check_group(await sysfs.scan(machine_of(root)), group_id, type_.parent)
    devices = [
        DeviceRecord(
            uuid=uuid,
            parent=type_.parent,
            type=type_.id,
            group=groups[0] if groups else None,
            attributes=tuple(files),
        )
        for uuid in placement.uuids
    ]
    context = Context(host=root, deadline=deadline)
    with Journal.open(journal) as book:
        await recover(book, context=context)
        title = f"{len(devices)} x {type_.id}"
        await execute(book, "create", title, _creations(devices), context)
    return tuple(
        mdev
        for uuid in placement.uuids
        if (mdev := sysfs.read_mdev(machine_of(root), uuid)) is not None
    )


def _creations(devices: Sequence[DeviceRecord]) -> list[Planned]:
    """All at the same time; those of a group in turn, as drivers number them in that order."""
    return [
        Planned(Create(device=device), (number - 1,) if device.group and number else ())
        for number, device in enumerate(devices)
    ]


async def remove_devices(
    uuids: Sequence[str],
    *,
    detach: Detach | None = None,
    deadline: float = DEADLINE,
    root: Path = ROOT,
    journal: Path | None = None,
) -> tuple[UUID, ...]:
    """Remove mdevs concurrently, after checking that all of them can be.

    :param detach: How to take an mdev out of the guest that holds it; without it a held one is
        refused.
    :param deadline: Seconds for each.
    :return: What was removed.
    :raise UuidError: One is malformed or given twice.
    :raise UnknownError: One is not there; nothing was removed.
    :raise BusyError: One is held; nothing was removed.
    :raise DeadlineError: One is still there.
    :raise MdoError: The kernel refused. The first error is raised, the others are its notes.
    """
    wanted = _distinct(uuids)
    found = [_removable(uuid, root) for uuid in wanted]
    held = await find_holders(machine_of(root), found)
    for mdev in found:
        _refuse_held(mdev, held, may_detach=detach is not None)

    talking = asyncio.Lock()  # a guest's monitor takes one client at a time

    async def remove(mdev: Mdev) -> None:
        if detach is not None:
            for holder in held.of(mdev.uuid):
                async with talking:
                    await detach(holder.guest or "", mdev.uuid, deadline)
        try:
            await sysfs.remove(machine_of(root), mdev.uuid, deadline)
        except DeadlineError as error:
            who = (await find_holders(machine_of(root), (mdev,))).of(mdev.uuid)
            if not who:
                raise
            names = ", ".join(map(str, who))
            raise DeadlineError(
                f"mdev {mdev.uuid} was not removed within {deadline:g} s: held by {names}",
                error.hint,
            ) from None

    try:
        await _all(remove(mdev) for mdev in found)
    finally:
        await _forget(wanted, root, journal)
    return wanted


async def _forget(uuids: Sequence[UUID], root: Path, journal: Path | None) -> None:
    """Note that devices are not ours any more, those of them that were and have gone."""
    ours = read_managed(journal).devices
    gone = {
        uuid: None
        for uuid in uuids
        if uuid in ours and sysfs.directory(machine_of(root), uuid) is None
    }
    if gone:
        with Journal.open(journal) as book:
            await book.put(Change(devices=gone))


def _check_group(host: Host, group: UUID, parent: str) -> None:
    for known in host.groups:
        if known.uuid == group and known.parent != parent:
            raise RequestError(
                f"start group {group} is on parent {known.parent}, and the devices would be on "
                f"{parent}",
                f"a group is on one parent: --parent {known.parent}, or another --group",
            )


async def find_place(
    type_id: str, count: int | None, parent: str | None, uuids: Sequence[str], root: Path
) -> Placement:
    """Place, and when it does not fit look again for a moment.

    The core gives an instance back when the device's last reference goes, which may be after
    ``remove`` has returned, and no event tells of it.
    """
    loop = asyncio.get_running_loop()
    end = loop.time() + _GRACE
    while True:
        try:
            return place(
                await sysfs.scan(machine_of(root)), type_id, count, parent=parent, uuids=uuids
            )
        except CapacityError:
            if loop.time() >= end:
                raise
        await asyncio.sleep(_GRACE / 5)


def _distinct(texts: Iterable[str]) -> tuple[UUID, ...]:
    uuids = tuple(parse_uuid(text) for text in texts)
    for uuid, times in Counter(uuids).items():
        if times > 1:
            raise UuidError(f"mdev {uuid} is given {times} times", "name each device once")
    return uuids


def _find_type(host: Host, type_id: str, parent: str | None) -> MdevType:
    names = [p.name for p in host.parents]
    if not names:
        raise UnknownError(
            "no device of this host offers mdevs", "load the vendor's driver; see mdo doctor"
        )
    if parent is not None and parent not in names:
        raise UnknownError(f"there is no parent {parent!r}", _candidates(parent, names))
    everywhere = [t for p in host.parents for t in p.types]
    offers = [t for t in everywhere if t.id == type_id]
    if not offers:
        raise UnknownError(f"no parent offers a type {type_id!r}", _type_hint(type_id, everywhere))
    if parent is None:
        if len(offers) == 1:
            return offers[0]
        raise UnknownError(
            f"several parents offer {type_id}: " + _some(map(_place_of, offers)),
            "choose one with --parent",
        )
    for type_ in offers:
        if type_.parent == parent:
            return type_
    raise UnknownError(
        f"parent {parent} does not offer {type_id}", "on " + _some(map(_place_of, offers))
    )


def _type_hint(asked: str, types: list[MdevType]) -> str:
    for type_ in types:
        if type_.name == asked:
            return f"that is the name of {type_.id}"
    return _candidates(asked, list(dict.fromkeys(type_.id for type_ in types)))


def _candidates(asked: str, names: list[str]) -> str:
    close = get_close_matches(asked, names, n=3, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(close) + "?"
    return "there are " + _some(names) if names else ""


def _place_of(type_: MdevType) -> str:
    free = type_.available_instances
    return f"{type_.parent} ({'?' if free is None else free} free)"


def _some(names: Iterable[str]) -> str:
    names = list(names)
    more = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {more} more" if more > 0 else "")


def _too_many(host: Host, type_: MdevType, wanted: int) -> CapacityError:
    available = type_.available_instances
    if available:
        return CapacityError(
            f"{wanted} of {type_.id} do not fit on {type_.parent}: {available} would; "
            "nothing was created",
            f"-n {available}",
        )
    used = Counter(m.type_id for m in host.mdevs if m.parent == type_.parent)
    in_use = _some(
        f"{count} of {id_}" if id_ else f"{count} being removed" for id_, count in used.items()
    )
    siblings = next(p.types for p in host.parents if p.name == type_.parent)
    fits = _some(f"{t.available_instances} of {t.id}" for t in siblings if t.available_instances)
    return CapacityError(
        f"no instance of {type_.id} is left on {type_.parent}: in use there "
        f"{in_use or 'nothing'}; nothing was created",
        f"{fits} would fit instead" if fits else "remove a device first",
    )


def _no_such_mdev(uuid: UUID, root: Path) -> UnknownError:
    known = [str(mdev.uuid) for mdev in sysfs.read_host(machine_of(root)).mdevs]
    if not known:
        return UnknownError(f"there is no mdev {uuid}", "this host has none")
    close = get_close_matches(str(uuid), known, n=1, cutoff=0.8)
    return UnknownError(
        f"there is no mdev {uuid}", f"did you mean {close[0]}?" if close else "mdo host lists them"
    )


def _removable(uuid: UUID, root: Path) -> Mdev:
    mdev = sysfs.read_mdev(machine_of(root), uuid)
    if mdev is None:
        raise _no_such_mdev(uuid, root)
    file = mdev.path / "remove"  # it is not there while a removal is under way
    if file.exists() and not os.access(file, os.W_OK):
        raise HostError(f"no permission to remove mdev {uuid}", "run as root")
    return mdev


def _refuse_held(mdev: Mdev, held: Holders, *, may_detach: bool) -> None:
    for holder in held.of(mdev.uuid):
        if holder.guest is None:
            raise BusyError(f"mdev {mdev.uuid} is held by {holder}", "end that process first")
        if not may_detach:
            raise BusyError(
                f"mdev {mdev.uuid} is held by {holder}",
                f"mdo remove --detach {mdev.uuid} takes it out of the guest first",
            )


async def _all(coroutines: Iterable[Coroutine[None, None, None]]) -> None:
    """Run all to their ends, then raise the first error; when cancelled, cancel all."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        await asyncio.wait(tasks)
    except asyncio.CancelledError:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        raise
    _raise_first([error for task in tasks if (error := task.exception()) is not None])


def _raise_first(errors: Sequence[BaseException]) -> None:
    if not errors:
        return
    first, *others = errors
    for other in others:
        first.add_note(str(other))
    raise first


def _carry_notes(source: BaseException, target: MdoError) -> MdoError:
    for note in getattr(source, "__notes__", ()):
        target.add_note(note)
    return target
