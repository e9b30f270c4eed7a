# SPDX-License-Identifier: GPL-2.0-or-later
"""Plugs devices into guests that run, and unplugs them: ``mdo attach`` and ``mdo detach``.

An attach that is cut short is undone, with the device that was created for it; a detach that is cut
short is finished.
"""

from __future__ import annotations

import asyncio
from uuid import UUID

from msgspec import Struct

from mdev_orchestrator.engine import domain_ops, guest_iommu
from mdev_orchestrator.engine.context import Context
from mdev_orchestrator.engine.devices import detach_domain, place, removal_of
from mdev_orchestrator.engine.executor import Observer, PlannedStep, ignore
from mdev_orchestrator.engine.foreign import find_domain
from mdev_orchestrator.engine.guest_ops import usable_mdev
from mdev_orchestrator.engine.operation import Operation, Plan, perform
from mdev_orchestrator.engine.records import DeviceRecord, GuestRecord, Managed
from mdev_orchestrator.engine.steps import (
    AnyStep,
    Attach,
    AttachDomain,
    Create,
    Detach,
    Remove,
)
from mdev_orchestrator.errors import RequestError, UnknownError
from mdev_orchestrator.host import sysfs
from mdev_orchestrator.interop.libvirt import Domain
from mdev_orchestrator.machine import Machine
from mdev_orchestrator.model import IommuChoice, is_uuid, parse_uuid
from mdev_orchestrator.qemu import hotplug, process
from mdev_orchestrator.qemu.command import device_id


class Attached(Struct, frozen=True):
    """A device that a guest has got.

    :ivar port: The root port that it is in; ``None`` for one that is no PCI device, and in a domain
        of libvirt, which chose it.
    :ivar created: Whether it was created for the guest.
    """

    uuid: UUID
    device_id: str
    port: str | None
    created: bool


async def attach(
    machine: Machine,
    guest: str,
    what: UUID | str,
    *,
    parent: str | None = None,
    iommu: IommuChoice = "auto",
    wait_guest: bool = False,
    deadline: float = hotplug.ATTACH_SECONDS,
    observe: Observer = ignore,
) -> Attached:
    """Plug a device into a running guest.

    :param guest: Its name; or that of a domain of libvirt, if no guest here is called so.
    :param what: A device by its UUID, or a type to create one of.
    :param parent: For a type that several parents offer.
    :param iommu: How it is opened; ``auto`` is as the guest's other devices are.
    :param wait_guest: Return when the guest has taken it.
    :param deadline: Seconds for the whole: to create the device, to plug it in, and for the guest
        to take it. An undo has its own time.
    :raise BusyError: Another process has the device.
    :raise HostError: It shall be opened by iommufd, and that cannot be.
    :raise DeadlineError: The guest has not taken it: then it stays plugged, and the message says
        so; or it was not plugged in time, and all was undone.
    :raise MdoError: It cannot be; all was undone.
    """
    loop = asyncio.get_running_loop()
    end = loop.time() + deadline
    name = str(what)
    creating = not is_uuid(name)
    if not creating and parent is not None:
        raise RequestError("--parent goes with a type, not with a UUID")
    context = Context(machine, deadline, end)

    async def look(_: Managed) -> Plan[tuple[process.RunningGuest | Domain, UUID]]:
        found = await _find(machine, guest)
        if isinstance(found, Domain) and iommu == "iommufd":
            raise RequestError(
                f"domain {found.name} is libvirt's, which opens devices by their group",
                "--iommu container, or without it",
                subject=f"guest {guest}",
            )
        guest_iommu.check_host(machine, iommu)
        plan = []
        if creating:
            host = await sysfs.scan(machine)
            type_, (uuid,) = place(machine, host, name, 1, parent=parent)
            device = DeviceRecord(uuid=uuid, parent=type_.parent, type=type_.id)
            plan.append(PlannedStep(Create(device=device)))
            device_api = type_.device_api
        else:
            uuid = parse_uuid(name)
            # libvirt opens a device as root, or gives its QEMU the permission
            if isinstance(found, Domain):
                mdev = await usable_mdev(machine, uuid, deadline, "container", user="root")
            else:
                mdev = await usable_mdev(machine, uuid, deadline, iommu)
            device_api = mdev.device_api
        context.deadline = context.seconds(deadline)
        step: AnyStep
        if isinstance(found, Domain):
            step = AttachDomain(
                domain=found.name,
                domain_uuid=found.uuid,
                uuid=uuid,
                device_api=device_api or "vfio-pci",
                deadline=deadline,
            )
        else:
            step = Attach(guest=_record(found), uuid=uuid, deadline=deadline, iommu=iommu)
        plan.append(PlannedStep(step, tuple(range(len(plan)))))
        return Plan((found, uuid), plan)

    operation = Operation(kind="attach", title=f"{guest} {what}", look=look)
    found, uuid = await perform(operation, context, observe=observe)
    left = max(end - loop.time(), 0.1)
    if isinstance(found, Domain):
        if wait_guest:
            await domain_ops.wait_taken(machine, found, context.names[uuid], left)
        return Attached(uuid, context.names[uuid], None, creating)
    if wait_guest:
        await hotplug.wait_taken(found, uuid, left)
    return Attached(uuid, device_id(uuid), context.ports[uuid], creating)


async def detach(
    machine: Machine,
    guest: str,
    uuid: UUID,
    *,
    remove: bool = False,
    deadline: float = hotplug.DETACH_SECONDS,
    observe: Observer = ignore,
) -> None:
    """Unplug a device from a running guest; returns when QEMU has closed it.

    :param guest: As of :func:`attach`.
    :param remove: Remove the device from the host then.
    :param deadline: Seconds for the guest to let go.
    :raise UnknownError: The guest does not have it.
    :raise MdoError: It cannot be; it is as before.
    """

    async def look(managed: Managed) -> Plan[None]:
        found = await _find(machine, guest)
        step: AnyStep
        if isinstance(found, Domain):
            step = detach_domain(machine, found, uuid, deadline)
        else:
            step = Detach(guest=_record(found), uuid=uuid, deadline=deadline, named=True)
        plan = [PlannedStep(step)]
        if remove:
            plan.append(PlannedStep(_removal(machine, uuid, managed), (0,)))
        return Plan(None, plan)

    operation = Operation(kind="detach", title=f"{guest} {uuid}", look=look, ends_things=True)
    await perform(operation, Context(machine), observe=observe)


async def _find(machine: Machine, name: str) -> process.RunningGuest | Domain:
    """The guest of a name that runs, ours or libvirt's.

    :raise UnknownError: There is none.
    :raise RequestError: It does not run.
    """
    domain = await find_domain(machine, name)
    return process.find_running(machine, name) if domain is None else domain


def _record(guest: process.RunningGuest) -> GuestRecord:
    if guest.record is None:
        raise AssertionError("a guest that runs has a record")
    return GuestRecord(name=guest.name, uuid=guest.record.uuid)


def _removal(machine: Machine, uuid: UUID, managed: Managed) -> Remove:
    """The step that removes a device; a user who names one may remove it, managed here or not."""
    mdev = sysfs.read_mdev(machine, uuid)
    if mdev is None or mdev.type_id is None:
        raise UnknownError(
            f"there is no mdev {uuid}", "mdo host lists them", subject=f"mdev {uuid}"
        )
    return removal_of(mdev, managed)
