# SPDX-License-Identifier: GPL-2.0-or-later
"""In which of VFIO's two ways a guest's devices are opened: by iommufd, or by a container.

``auto`` is iommufd if the host, each of the devices and QEMU have it, and the container if not. A
guest has one kind for all of its devices: each kind maps all of the guest's memory once more. So a
device that is attached is opened as those are that the guest has.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from typing import TYPE_CHECKING
from uuid import UUID

from mdev_orchestrator.errors import HostError, RequestError
from mdev_orchestrator.host import iommu
from mdev_orchestrator.host.iommu import Lack
from mdev_orchestrator.machine import Machine
from mdev_orchestrator.model import IommuChoice, IommuKind
from mdev_orchestrator.qemu import features, hotplug
from mdev_orchestrator.qemu.command import GuestMdev, GuestSpec
from mdev_orchestrator.qemu.process import RunningGuest

if TYPE_CHECKING:
    from mdev_orchestrator.qemu.monitor import QmpMonitor

_NO_QEMU = "Debian 13's QEMU has it, and so has one that mdo qemu build makes"


def check_host(machine: Machine, choice: IommuChoice) -> None:
    """Check that the host has what was asked for by name.

    :raise HostError: It has no iommufd.
    """
    if choice == "iommufd" and (lack := iommu.lack_of_iommufd(machine)) is not None:
        raise _refusal("this host", lack)


async def for_launch(machine: Machine, spec: GuestSpec) -> IommuChoice:
    """Decide for a guest that is about to start; ``auto`` stays for one without mdevs.

    :raise HostError: ``iommufd`` was asked for, and the host, a device or QEMU does not have it.
    """
    if spec.iommu == "container" or (spec.iommu == "auto" and not spec.mdevs):
        return spec.iommu
    program = shutil.which(spec.qemu)
    if program is None:
        return spec.iommu  # its start will say so
    lack = _lack(machine, (mdev.uuid for mdev in spec.mdevs))
    drivers = {mdev.device_api for mdev in spec.mdevs} or {"vfio-pci"}
    for driver in sorted(drivers if lack is None else ()):
        if features.IOMMUFD not in await features.properties(program, driver):
            lack = f"the device {driver} of {program} has no property iommufd", _NO_QEMU
    return _decide(f"guest {spec.name}", spec.iommu, lack)


async def for_attach(
    machine: Machine, guest: RunningGuest, qmp: QmpMonitor, mdev: GuestMdev, choice: IommuChoice
) -> IommuKind:
    """Decide for a device that is about to be attached.

    :raise RequestError: The guest's devices are opened in another way than was asked for.
    :raise HostError: It has to be iommufd, and the host, the device or QEMU does not have it.
    """
    wanted = guest.record.iommu if choice == "auto" and guest.record is not None else choice
    if wanted != "iommufd" and not iommu.has_iommufd(machine):
        return "container"
    used = {plugged.iommu for plugged in await hotplug.mdevs(qmp)}
    if used:
        kind: IommuKind = "iommufd" if "iommufd" in used else "container"
        if choice not in {"auto", kind}:
            raise RequestError(
                f"{guest.label} has its devices by {kind}, and all devices of a guest are opened "
                "in one way",
                f"give --iommu {kind}, or detach them first",
                subject=guest.label,
            )
        wanted = kind
    if wanted == "container":
        return "container"
    lack = _lack(machine, (mdev.uuid,))
    if lack is None and not await features.has_property(qmp, mdev.device_api, features.IOMMUFD):
        lack = f"the device {mdev.device_api} of its QEMU has no property iommufd", _NO_QEMU
    return _decide(guest.label, wanted, lack)


def _lack(machine: Machine, devices: Iterable[UUID]) -> Lack | None:
    """Say why this process cannot open devices by iommufd."""
    lack = iommu.lack_of_iommufd(machine)
    for uuid in devices if lack is None else ():
        of_node = iommu.lack_of_node(machine, uuid, "iommufd")
        if of_node is not None:
            return f"mdev {uuid}: {of_node[0]}", of_node[1]
    return lack


def _decide(label: str, choice: IommuChoice, lack: Lack | None) -> IommuKind:
    if lack is None:
        return "iommufd"
    if choice == "iommufd":
        raise _refusal(label, lack)
    return "container"


def _refusal(label: str, lack: Lack) -> HostError:
    return HostError(
        f"{label} cannot use iommufd: {lack[0]}", f"{lack[1]}; or --iommu container", subject=label
    )
