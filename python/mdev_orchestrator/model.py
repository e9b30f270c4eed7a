# SPDX-License-Identifier: GPL-2.0-or-later
"""What the host consists of: parents, types, mdevs. Frozen values, no I/O.

The names are the kernel's (Documentation/driver-api/vfio-mediated-device.rst). A value that could
not be read as what it should be is ``None``, and the reason stands in ``damage``: one bad file
never hides the objects beside it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID

from mdev_orchestrator.errors import UuidError

_UUID = re.compile(r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
_DIGITS = re.compile(r"([0-9]+)")


def is_uuid(text: str) -> bool:
    """Whether a text is what :func:`parse_uuid` takes."""
    return _UUID.fullmatch(text) is not None


def parse_uuid(text: str) -> UUID:
    """Read a UUID in the one form that the kernel's ``create`` file takes: 8-4-4-4-12 digits.

    :raise UuidError: It is something else.
    """
    if not is_uuid(text):
        shown = text if len(text) <= 60 else text[:57] + "..."  # noqa: PLR2004 - fits one line
        raise UuidError(f"{shown!r} is not a UUID", "write it as 8-4-4-4-12 hexadecimal digits")
    return UUID(text)


def natural_key(text: str) -> list[tuple[int, int, str]]:
    """Sort key that puts ``nvidia-9`` before ``nvidia-10``."""
    return [
        (0, int(part), part) if part.isdecimal() and part.isascii() else (1, 0, part)
        for part in _DIGITS.split(text)
    ]


@dataclass(frozen=True, slots=True)
class MdevType:
    """One directory below ``mdev_supported_types`` of a parent.

    :ivar id: The directory's name, for instance ``nvidia-12``; unique within the parent.
    :ivar parent: Name of the parent device, for instance ``0000:86:00.0``.
    :ivar name: The human-readable name; the file is optional, so may be ``None``.
    :ivar available_instances: How many more can be created now, as the kernel says. Advice only.
    :ivar device_api: ``vfio-pci``, ``vfio-ccw``, ``vfio-ap``…
    :ivar description: Vendor's text as it is; optional.
    :ivar attributes: The vendor's machine-readable values, one a file, by file name.
    :ivar damage: What could not be read, one sentence each.
    """

    id: str
    parent: str
    name: str | None
    available_instances: int | None
    device_api: str | None
    description: str | None = None
    attributes: dict[str, str] = field(default_factory=dict)
    damage: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Parent:
    """A device that mdevs can be created on: an entry of ``/sys/class/mdev_bus``.

    :ivar name: Kernel name of the device.
    :ivar path: Its real directory in sysfs.
    :ivar types: Its types, in natural order of their ids.
    """

    name: str
    path: Path
    types: tuple[MdevType, ...] = ()
    damage: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Mdev:
    """One mediated device: an entry of ``/sys/bus/mdev/devices``.

    :ivar path: ``/sys/bus/mdev/devices/UUID``, what QEMU takes as ``sysfsdev``; the device's own
        directory when it is being removed.
    :ivar parent: Name of the parent device.
    :ivar type_id: Id of its type, ``None`` while the kernel has not linked it yet.
    :ivar device_api: As its type says.
    :ivar iommu_group: Number of its VFIO group, ``None`` without one.
    """

    uuid: UUID
    path: Path
    parent: str
    type_id: str | None
    device_api: str | None = None
    iommu_group: int | None = None
    damage: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Host:
    """One scan of the machine; nothing in it is younger than the others by more than the scan.

    :ivar parents: In natural order of their names.
    :ivar mdevs: In order of parent and UUID.
    :ivar mdev_bus: Whether the kernel has an mdev bus at all; without one both are empty.
    :ivar damage: What belongs to none of them, for instance a device whose name is no UUID.
    """

    parents: tuple[Parent, ...] = ()
    mdevs: tuple[Mdev, ...] = ()
    mdev_bus: bool = True
    damage: tuple[str, ...] = ()

    def find(self, uuid: UUID) -> Mdev | None:
        """The mdev with that UUID, if there is one."""
        return next((mdev for mdev in self.mdevs if mdev.uuid == uuid), None)
