# SPDX-License-Identifier: GPL-2.0-or-later
"""Taking guests and devices under management that the journal does not know, or not any more."""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

from msgspec import Struct

from mdev_orchestrator.engine.journal import open_journal
from mdev_orchestrator.engine.records import Change, DeviceRecord, GuestRecord, Managed
from mdev_orchestrator.errors import RequestError, UnknownError
from mdev_orchestrator.host import sysfs
from mdev_orchestrator.host.holders import find_holders
from mdev_orchestrator.interop import mdevctl
from mdev_orchestrator.machine import Machine
from mdev_orchestrator.model import Host, is_uuid, parse_uuid
from mdev_orchestrator.qemu import hotplug, process
from mdev_orchestrator.qemu.process import RunningGuest


class Adopted(Struct, frozen=True):
    """What is managed here now."""

    guests: tuple[str, ...] = ()
    devices: tuple[UUID, ...] = ()


async def adopt(
    machine: Machine, names: Sequence[str] = (), *, everything: bool = False
) -> Adopted:
    """Manage guests and devices that the journal does not know (any more).

    A guest is adopted with the devices that it has. What its spec says of it is not known then: the
    next ``apply`` of a spec that names it takes it to be as that spec says, and takes adopted
    devices that are as it asks for.

    :param names: Names of guests and UUIDs of devices.
    :param everything: All guests of the state directory that run, and all devices that no other
        process has open and that mdevctl does not define.
    :raise UnknownError: There is no such guest or device.
    :raise RequestError: A guest does not run.
    """
    uuids = [parse_uuid(name) for name in names if is_uuid(name)]
    wanted = [process.find_running(machine, name) for name in names if not is_uuid(name)]
    if everything:
        wanted = [guest for guest in process.list_guests(machine) if guest.alive]
    found = await sysfs.scan(machine)
    async with open_journal(machine) as journal:
        managed = await journal.read(journal.managed)
        devices: dict[UUID, DeviceRecord | None] = {}
        guests: dict[str, GuestRecord | None] = {}
        for guest in wanted:
            if (record := _guest_record(guest, managed)) is not None:
                guests[guest.name] = record
            for plugged in await hotplug.mdevs_of(guest):
                if plugged.uuid not in managed.devices:
                    owner = f"guest:{guest.name}"
                    devices[plugged.uuid] = _as_found(plugged.uuid, found, owner)
        if everything:
            uuids += [uuid for uuid in await _free_devices(machine, found) if uuid not in devices]
        for uuid in uuids:
            if uuid not in managed.devices:
                devices.setdefault(uuid, _as_found(uuid, found, ""))
        await journal.put(Change(devices=devices, guests=guests))
    return Adopted(tuple(guests), tuple(devices))


def _guest_record(guest: RunningGuest, managed: Managed) -> GuestRecord | None:
    """The record of a guest that runs; ``None`` if it is there already.

    A record of the same name with another UUID is of a guest that runs no more.
    """
    if guest.record is None:
        return None
    known = managed.guests.get(guest.name)
    if known is not None and known.uuid == guest.record.uuid:
        return None
    return GuestRecord(name=guest.name, uuid=guest.record.uuid, definition="")


async def _free_devices(machine: Machine, found: Host) -> list[UUID]:
    """The devices that no process has open, that stay, and that mdevctl does not define."""
    held = await find_holders(machine, found.mdevs)
    defined = mdevctl.defined(machine)
    return [
        mdev.uuid
        for mdev in found.mdevs
        if mdev.type_id is not None and not held.of(mdev.uuid) and mdev.uuid not in defined
    ]


def _as_found(uuid: UUID, found: Host, owner: str) -> DeviceRecord:
    mdev = found.find(uuid)
    if mdev is None:
        raise UnknownError(
            f"there is no mdev {uuid}", "mdo host lists them", subject=f"mdev {uuid}"
        )
    if mdev.type_id is None:
        raise RequestError(f"mdev {uuid} is being removed", "wait until it is gone")
    return DeviceRecord(
        uuid=uuid,
        parent=mdev.parent,
        type=mdev.type_id,
        owner=owner,
        group=mdev.group_uuid,
        params=mdev.params or "",
        adopted=True,
    )
