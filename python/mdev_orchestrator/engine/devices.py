# SPDX-License-Identifier: GPL-2.0-or-later
"""Creates and removes mdevs: all that are asked for, or none.

All that can be checked is checked before the first write. What the kernel then refuses, or the user
interrupts, is undone.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from uuid import UUID, uuid4

from mdev_orchestrator.capacity.models import survey
from mdev_orchestrator.capacity.planner import Request
from mdev_orchestrator.capacity.planner import plan as make_plan
from mdev_orchestrator.capacity.shortage import capacity_error
from mdev_orchestrator.engine import model_cache
from mdev_orchestrator.engine.context import DEADLINE, Context
from mdev_orchestrator.engine.executor import Observer, PlannedStep, ignore
from mdev_orchestrator.engine.foreign import domains
from mdev_orchestrator.engine.operation import Operation, Plan, perform
from mdev_orchestrator.engine.records import DeviceRecord, GuestRecord, Managed
from mdev_orchestrator.engine.steps import Create, Detach, DetachDomain, Remove
from mdev_orchestrator.errors import (
    BusyError,
    HostError,
    RequestError,
    UnknownError,
    UuidError,
)
from mdev_orchestrator.host import sysfs
from mdev_orchestrator.host.holders import Holders, find_holders
from mdev_orchestrator.interop.libvirt import Domain
from mdev_orchestrator.machine import Machine
from mdev_orchestrator.model import (
    GROUP_FILE,
    Host,
    Mdev,
    MdevType,
    check_attribute,
    group_uuid,
    is_uuid,
)
from mdev_orchestrator.qemu import process
from mdev_orchestrator.spec.structures import MAX_DEVICES

_LISTED = 8  # candidates that fit one line


# ---------------------------------------------------------------- creating


async def create_devices(
    machine: Machine,
    type_id: str,
    count: int | None = None,
    *,
    parent: str | None = None,
    uuids: Sequence[UUID] = (),
    group: str | None = None,
    attributes: Sequence[tuple[str, str]] = (),
    deadline: float = DEADLINE,
    observe: Observer = ignore,
) -> tuple[Mdev, ...]:
    """Create mdevs of one type, all or none, and wait until each is usable. They are managed then.

    When cancelled it undoes what it did before it ends.

    :param count: How many; without it as many as there are UUIDs, at least one.
    :param parent: Needed when several parents offer the type.
    :param uuids: UUIDs to use; the rest is random.
    :param group: Start group that they are put into, by its UUID or by a name
        (:func:`mdev_orchestrator.model.group_uuid`).
    :param attributes: Files of each mdev's directory and what is written there, in this order and
        before it is put into the group. A file that is a command (vfio-ap's ``assign_adapter``)
        stands there once for each time that it is to be written.
    :param deadline: Seconds for each device.
    :raise UuidError: A UUID is given twice, or taken.
    :raise UnknownError: Type or parent is not there, or several parents offer the type.
    :raise CapacityError: So many do not fit.
    :raise RequestError: The count makes no sense.
    :raise HostError: The host has no mdev bus, the driver has no start groups, or no such file; or
        the journal cannot be written.
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

    async def look(_: Managed) -> Plan[tuple[UUID, ...]]:
        host = await sysfs.scan(machine)
        type_, placed = place(machine, host, type_id, count, parent=parent, uuids=uuids)
        for group_id in groups:
            _check_group(host, group_id, type_.parent)
        devices = [
            DeviceRecord(
                uuid=uuid,
                parent=type_.parent,
                type=type_.id,
                label=None if group is None or is_uuid(group) else group,
                group=groups[0] if groups else None,
                attributes=tuple(files),
            )
            for uuid in placed
        ]
        return Plan(placed, creations(devices))

    wanted = max(len(uuids), 1) if count is None else count
    operation = Operation(kind="create", title=f"{wanted} x {type_id}", look=look)
    made = await perform(operation, Context(machine, deadline), observe=observe)
    found = (sysfs.read_mdev(machine, uuid) for uuid in made)
    return tuple(mdev for mdev in found if mdev is not None)


def place(
    machine: Machine,
    host: Host,
    type_id: str,
    count: int | None = None,
    *,
    parent: str | None = None,
    uuids: Sequence[UUID] = (),
) -> tuple[MdevType, tuple[UUID, ...]]:
    """Decide where instances of a type go and which UUIDs they get, or say why they cannot.

    Takes and raises what :func:`create_devices` does.
    """
    for uuid, times in Counter(uuids).items():
        if times > 1:
            raise UuidError(f"mdev {uuid} is given {times} times", "name each device once")
    wanted = max(len(uuids), 1) if count is None else count
    if not 1 <= wanted <= MAX_DEVICES:
        raise RequestError(f"cannot create {wanted} devices", f"ask for 1 to {MAX_DEVICES}")
    if len(uuids) > wanted:
        raise RequestError(f"{len(uuids)} UUIDs were given for {wanted} devices")
    if not host.mdev_bus:
        raise HostError(
            "this host has no mdev bus", "modprobe mdev and the vendor's driver; see mdo doctor"
        )
    for uuid in uuids:
        if (mdev := host.find(uuid)) is not None:
            raise UuidError(
                f"mdev {uuid} exists already under parent {mdev.parent}"
                + (f" as {mdev.type_id}" if mdev.type_id else " and is being removed"),
                "choose another UUID",
                subject=f"mdev {uuid}",
            )
    type_ = _find_type(host, type_id, parent)
    if type_.available_instances is not None:  # otherwise only the driver knows
        request = Request(key=type_.id, type_id=type_.id, count=wanted, parent=type_.parent)
        plan = make_plan([request], survey(host, learned=model_cache.load(machine)))
        if not plan.fits:
            raise capacity_error(plan, [request])
    fresh = (uuid4() for _ in range(wanted - len(uuids)))
    return type_, (*uuids, *fresh)


def creations(devices: Sequence[DeviceRecord]) -> list[PlannedStep]:
    """All at the same time; those of a group in turn, as drivers number them in that order."""
    return [
        PlannedStep(Create(device=device), (number - 1,) if device.group and number else ())
        for number, device in enumerate(devices)
    ]


def _check_group(host: Host, group: UUID, parent: str) -> None:
    for known in host.groups:
        if known.uuid == group and known.parent != parent:
            raise RequestError(
                f"start group {group} is on parent {known.parent}, and the devices would be on "
                f"{parent}",
                f"a group is on one parent: --parent {known.parent}, or another --group",
                subject=known.label,
            )


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


# ---------------------------------------------------------------- removing


async def remove_devices(
    machine: Machine,
    uuids: Sequence[UUID],
    *,
    detach: bool = False,
    deadline: float = DEADLINE,
    observe: Observer = ignore,
) -> tuple[UUID, ...]:
    """Remove mdevs, all or none, after checking that all of them can be removed.

    When one cannot be removed, or the call is cancelled, those that are gone are created again.

    :param detach: Unplug an mdev from the guest that holds it first; otherwise it is refused.
    :param deadline: Seconds for each, and again for each detach.
    :return: What was removed.
    :raise UuidError: One is given twice.
    :raise UnknownError: One is not there; nothing was removed.
    :raise BusyError: One is held, or another command changes it; nothing was removed.
    :raise DeadlineError: One is still there.
    :raise MdoError: The kernel refused. The first error is raised, the others are its notes.
    """
    for uuid, times in Counter(uuids).items():
        if times > 1:
            raise UuidError(f"mdev {uuid} is given {times} times", "name each device once")

    async def look(managed: Managed) -> Plan[tuple[UUID, ...]]:
        found = [_removable(machine, uuid) for uuid in uuids]
        held = await find_holders(machine, found)
        steps: list[PlannedStep] = []
        for mdev in found:
            needs: list[int] = []
            for step in _detaches(machine, mdev, held, deadline if detach else None):
                # the monitor of a guest serves one client at a time
                before = [n for n, one in enumerate(steps) if not isinstance(one.step, Remove)]
                needs.append(len(steps))
                steps.append(PlannedStep(step, tuple(before[-1:])))
            steps.append(PlannedStep(removal_of(mdev, managed), tuple(needs)))
        return Plan(tuple(uuids), steps)

    title = str(uuids[0]) if len(uuids) == 1 else f"{len(uuids)} devices"
    operation = Operation(kind="remove", title=title, look=look, ends_things=True)
    return await perform(operation, Context(machine, deadline), observe=observe)


def removal_of(mdev: Mdev, managed: Managed) -> Remove:
    """The step that removes a device, managed here or not."""
    known = managed.devices.get(mdev.uuid)
    if known is not None:
        return Remove(device=known)
    as_is = DeviceRecord(
        uuid=mdev.uuid,
        parent=mdev.parent,
        type=mdev.type_id or "",
        group=mdev.group_uuid,
        params=mdev.params or "",
    )
    return Remove(device=as_is, unrecorded=True)


def _no_such_mdev(machine: Machine, uuid: UUID) -> UnknownError:
    known = [str(mdev.uuid) for mdev in sysfs.read_host(machine, types=False).mdevs]
    close = get_close_matches(str(uuid), known, n=1, cutoff=0.8)
    hint = f"did you mean {close[0]}?" if close else "mdo host lists them"
    return UnknownError(
        f"there is no mdev {uuid}",
        hint if known else "this host has none",
        subject=f"mdev {uuid}",
    )


def _removable(machine: Machine, uuid: UUID) -> Mdev:
    mdev = sysfs.read_mdev(machine, uuid)
    if mdev is None:
        raise _no_such_mdev(machine, uuid)
    file = mdev.path / "remove"  # it is not there while a removal is under way
    if file.exists() and not os.access(file, os.W_OK):
        raise HostError(f"no permission to remove mdev {uuid}", "run as root")
    return mdev


def _detaches(
    machine: Machine, mdev: Mdev, held: Holders, deadline: float | None
) -> list[Detach | DetachDomain]:
    """The steps that take an mdev out of the guests that hold it.

    :param deadline: Seconds for each; ``None`` if it may not be detached.
    :raise BusyError: Another process holds it, or it may not be detached.
    """
    holders = held.of(mdev.uuid)
    if not holders:
        return []
    running = {
        guest.record.pid: guest
        for guest in process.list_guests(machine)
        if guest.alive and guest.record is not None
    }
    of_libvirt = {domain.pid: domain for domain in domains(machine)}
    steps: list[Detach | DetachDomain] = []
    for holder in holders:
        guest, domain = running.get(holder.pid), of_libvirt.get(holder.pid)
        if domain is None and (guest is None or guest.record is None):
            raise BusyError(
                f"mdev {mdev.uuid} is held by {holder}",
                "end that process first"
                if holder.guest is None
                else "mdo did not start that guest: detach the device by what started it",
                subject=f"mdev {mdev.uuid}",
            )
        if deadline is None:
            raise BusyError(
                f"mdev {mdev.uuid} is held by {holder if domain is None else domain.label}",
                f"mdo remove --detach {mdev.uuid} takes it out of the guest first",
                subject=f"mdev {mdev.uuid}",
            )
        if domain is not None:
            steps.append(detach_domain(machine, domain, mdev.uuid, deadline))
        elif guest is not None and guest.record is not None:
            record = GuestRecord(name=guest.name, uuid=guest.record.uuid)
            steps.append(Detach(guest=record, uuid=mdev.uuid, deadline=deadline, named=True))
    return steps


def detach_domain(machine: Machine, domain: Domain, uuid: UUID, deadline: float) -> DetachDomain:
    """The step that takes a device which a user named out of a domain of libvirt."""
    mdev = sysfs.read_mdev(machine, uuid)
    return DetachDomain(
        domain=domain.name,
        domain_uuid=domain.uuid,
        uuid=uuid,
        device_api=(mdev and mdev.device_api) or "vfio-pci",
        deadline=deadline,
        named=True,
    )
