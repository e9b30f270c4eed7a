# SPDX-License-Identifier: GPL-2.0-or-later
"""Gives devices to guests that run, and takes them back: what ``mdo attach`` and ``detach`` do.

Both are journalled like everything else: an attach that is cut short is undone, with the device
that was made for it; a detach that is cut short is finished.
"""

from __future__ import annotations

from pathlib import Path
from uuid import UUID

from msgspec import Struct

from mdev_orchestrator.engine.context import Context
from mdev_orchestrator.engine.devices import find_place
from mdev_orchestrator.engine.executor import Observer, Planned, execute, ignore
from mdev_orchestrator.engine.journal import Journal
from mdev_orchestrator.engine.journal_db import DeviceRecord, GuestRecord
from mdev_orchestrator.engine.lifecycle import machine_of, usable_mdev
from mdev_orchestrator.engine.recovery import recover
from mdev_orchestrator.engine.steps import Attach, Create, Detach, Remove
from mdev_orchestrator.errors import RequestError, UnknownError
from mdev_orchestrator.host import sysfs
from mdev_orchestrator.host.sysfs import ROOT
from mdev_orchestrator.model import is_uuid, parse_uuid
from mdev_orchestrator.qemu import hotplug, process
from mdev_orchestrator.qemu.command import device_id


class Attached(Struct, frozen=True):
    """A device that a guest has got.

    :ivar port: The root port that it sits in; ``None`` for one that is no PCI device.
    :ivar created: Whether it was made for it.
    """

    uuid: UUID
    device_id: str
    port: str | None
    created: bool


async def attach(
    guest: str,
    what: str,
    *,
    parent: str | None = None,
    wait_guest: bool = False,
    deadline: float = hotplug.ATTACH_SECONDS,
    host: Path = ROOT,
    guests: Path | None = None,
    journal: Path | None = None,
    observe: Observer = ignore,
) -> Attached:
    """Plug a device into a running guest.

    :param what: A device by its UUID, or a type to make one of.
    :param parent: For a type that several parents offer.
    :param wait_guest: Return when the guest has taken it.
    :param deadline: Seconds to make the device, to plug it in, and for the guest to take it.
    :raise BusyError: Somebody has the device.
    :raise DeadlineError: The guest has not taken it; it stays plugged.
    :raise MdoError: It cannot be; all was undone.
    """
    found = process.find_running(machine_of(guests), guest)
    context = Context(host=host, guests=guests, deadline=deadline)
    creating = not is_uuid(what)
    if not creating and parent is not None:
        raise RequestError("--parent goes with a type, not with a UUID")
    with Journal.open(journal) as book:
        await recover(book, context=context, observe=observe)
        if creating:
            placement = await find_place(what, 1, parent, (), host)
            type_, uuid = placement.type_, placement.uuids[0]
            device = DeviceRecord(uuid=uuid, parent=type_.parent, type=type_.id)
            plan = [Planned(Create(device=device))]
        else:
            uuid, plan = parse_uuid(what), []
            await usable_mdev(uuid, deadline, host)
        step = Attach(guest=_own(found), uuid=uuid, deadline=deadline)
        plan.append(Planned(step, tuple(range(len(plan)))))
        await execute(book, "attach", f"{guest} {what}", plan, context, observe=observe)
    if wait_guest:
        await hotplug.wait_taken(found, uuid, deadline)
    return Attached(uuid, device_id(uuid), context.ports[uuid], creating)


async def detach(
    guest: str,
    uuid: UUID,
    *,
    remove: bool = False,
    deadline: float = hotplug.DETACH_SECONDS,
    host: Path = ROOT,
    guests: Path | None = None,
    journal: Path | None = None,
    observe: Observer = ignore,
) -> None:
    """Unplug a device from a running guest; returns when QEMU has closed it.

    :param remove: Whether the device is removed from the host then.
    :param deadline: Seconds for the guest to let go.
    :raise UnknownError: The guest does not have it.
    :raise MdoError: It cannot be; it is as before.
    """
    found = process.find_running(machine_of(guests), guest)
    context = Context(host=host, guests=guests)
    with Journal.open(journal) as book:
        await recover(book, context=context, observe=observe)
        step = Detach(guest=_own(found), uuid=uuid, deadline=deadline, named=True)
        plan = [Planned(step)]
        if remove:
            plan.append(Planned(Remove(device=_known(book, uuid, host)), (0,)))
        await execute(book, "detach", f"{guest} {uuid}", plan, context, observe=observe)


def _own(guest: process.RunningGuest) -> GuestRecord:
    if guest.record is None:
        raise AssertionError("a guest that runs has a record")
    return GuestRecord(name=guest.name, uuid=guest.record.uuid)


def _known(book: Journal, uuid: UUID, host: Path) -> DeviceRecord:
    """A device as the journal has it, or as it is: who names one may remove it, ours or not."""
    mdev = sysfs.read_mdev(uuid, host)
    if mdev is None or mdev.type_id is None:
        raise UnknownError(f"there is no mdev {uuid}", "mdo host lists them")
    as_is = DeviceRecord(uuid=uuid, parent=mdev.parent, type=mdev.type_id, group=mdev.group_uuid)
    return book.owned().devices.get(uuid, as_is)
