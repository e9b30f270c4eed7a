# SPDX-License-Identifier: GPL-2.0-or-later
"""What the host consists of: parents, types, mdevs, start groups. Frozen values, no I/O.

The names are the kernel's (Documentation/driver-api/vfio-mediated-device.rst). A value that cannot
be read is ``None``, and the reason stands in ``damage``: one bad file never hides the objects
beside it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Literal
from uuid import UUID, uuid5

from msgspec import Struct, convert

from mdev_orchestrator.errors import RequestError, UuidError

GROUP_FILE = "group_uuid"
"""The file of an mdev that holds its start group."""
GROUP_NAMESPACE = UUID("5a52f6d2-30f3-4c0e-9d8b-2f6f5b7b3c11")
"""Start groups may be given a name: its UUID is version 5 (RFC 4122) of the name in here."""

_UUID_LENGTH = 36
_GROUP_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_DIGITS = re.compile(r"([0-9]+)")
_SHOWN = 60  # characters of a name in a message
_VALUE_LIMIT = 4095  # bytes: sysfs takes one page, less the zero at its end
_NOT_SET = {
    "online": "a device comes online when its guest starts",
    "remove": "mdo remove removes a device",
    "uevent": "it is the kernel's own",
}


def as_uuid(text: str) -> UUID | None:
    """Read a UUID in the form that :func:`parse_uuid` takes; ``None`` if it is something else."""
    return as_uuids((text,)).get(text)


def as_uuids(texts: Iterable[str]) -> dict[str, UUID]:
    """Read those texts that :func:`parse_uuid` takes."""
    right = [text for text in texts if len(text) == _UUID_LENGTH]
    try:
        # many times as fast as UUID(text), and at this length as strict as the kernel
        return dict(zip(right, convert(right, list[UUID]), strict=True))
    except ValueError:
        return {
            text: uuid for text in right if len(right) > 1 for uuid in as_uuids((text,)).values()
        }


def is_uuid(text: str) -> bool:
    """Whether a text is what :func:`parse_uuid` takes."""
    return as_uuid(text) is not None


def parse_uuid(text: str) -> UUID:
    """Read a UUID in the one form that the kernel's ``create`` file takes: 8-4-4-4-12 digits.

    :raise UuidError: It is something else.
    """
    uuid = as_uuid(text)
    if uuid is None:
        shown = _short(text)
        raise UuidError(f"{shown!r} is not a UUID", "write it as 8-4-4-4-12 hexadecimal digits")
    return uuid


def group_uuid(text: str) -> UUID:
    """Read a start group, given by its UUID or by a name, and return its UUID.

    The same name gives the same UUID on every host, see :data:`GROUP_NAMESPACE`.

    :raise RequestError: It is neither.
    """
    uuid = as_uuid(text)
    if uuid is not None:
        if not uuid.int:
            raise UuidError("the UUID of all zeroes is no start group", "choose another, or a name")
        return uuid
    if not _GROUP_NAME.fullmatch(text):
        shown = _short(text)
        raise RequestError(
            f"{shown!r} is neither a UUID nor the name of a start group",
            "a name has up to 64 letters, digits, '_', '.' and '-', a letter or digit first",
        )
    return uuid5(GROUP_NAMESPACE, text)


def group_names(groups: Iterable[tuple[UUID | None, str | None]]) -> dict[UUID, str]:
    """Map start groups to the names that they were given, for listings.

    A group that was given by its UUID has no name.

    :param groups: The group and its name of each managed device, as the journal has them
        (``DeviceRecord.group`` and ``.label``).
    """
    named: dict[UUID, str] = {}
    for group, name in groups:
        if group is not None and name and not is_uuid(name):
            named[group] = min(name, named.get(group, name))
    return named


def check_attribute(name: str, value: str) -> None:
    """Check that a file's name stays in the mdev's directory, and that sysfs can take the value.

    :raise RequestError: It does not, or the file is one that is not written so.
    """
    shown = repr(_short(name))
    if any(part in ("", ".", "..") for part in name.split("/")) or not name.isprintable():
        raise RequestError(
            f"{shown} does not name a file of an mdev",
            "a path below its directory, such as vgpu_params or nvidia/vgpu_params",
        )
    if name in _NOT_SET:
        raise RequestError(f"{shown} cannot be set", _NOT_SET[name])
    if name == GROUP_FILE:
        group_uuid(str(parse_uuid(value)))
    try:
        size = len(value.encode())
    except UnicodeEncodeError:
        size = -1
    if not 0 <= size <= _VALUE_LIMIT or "\0" in value:
        raise RequestError(f"the value for {shown} is not text of at most {_VALUE_LIMIT} bytes")


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def natural_key(text: str) -> list[tuple[int, int, str]]:
    """Sort key that puts ``nvidia-9`` before ``nvidia-10``."""
    return [
        (0, int(part), part) if part.isdecimal() and part.isascii() else (1, 0, part)
        for part in _DIGITS.split(text)
    ]


class MdevType(Struct, frozen=True):
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
    attributes: dict[str, str] = {}
    damage: tuple[str, ...] = ()


class Parent(Struct, frozen=True):
    """A device that mdevs can be created on: an entry of ``/sys/class/mdev_bus``.

    :ivar name: Kernel name of the device.
    :ivar path: Its real directory in sysfs.
    :ivar types: Its types, in natural order of their ids.
    :ivar links: Peer-to-peer links that it has for start groups, as its driver's ``p2p_links``
        says; ``None`` where the driver says nothing.
    :ivar links_free: How many of them no group has now (``p2p_links_free``).
    :ivar numa_node: The NUMA node that it belongs to, ``None`` for none: hosts with one node, and
        parents that are not on a bus.
    """

    name: str
    path: Path
    types: tuple[MdevType, ...] = ()
    links: int | None = None
    links_free: int | None = None
    damage: tuple[str, ...] = ()
    numa_node: int | None = None


IommuKind = Literal["iommufd", "container"]
"""How VFIO gives a device memory of the process that opens it: by ``/dev/iommu`` and the device's
own node, or by a container and the node of its IOMMU group."""

IommuChoice = Literal["auto", "iommufd", "container"]
"""What a user asks for: ``auto`` is ``iommufd`` where that can be used."""

GROUP_NODES = "dev/vfio"
"""Directory of the nodes of IOMMU groups, below the root."""
CDEV_NODES = "dev/vfio/devices"
"""Directory of the devices' own nodes, below the root."""


class Mdev(Struct, frozen=True):
    """One mediated device: an entry of ``/sys/bus/mdev/devices``.

    :ivar directory: ``/sys/bus/mdev/devices/UUID``, what QEMU takes as ``sysfsdev``; the device's
        own directory when it is being removed. A text, since a host has thousands.
    :ivar parent: Name of the parent device.
    :ivar type_id: Id of its type, ``None`` while the kernel has not linked it yet.
    :ivar device_api: As its type says.
    :ivar iommu_group: Number of its VFIO group, ``None`` without one.
    :ivar cdev: Name of its own VFIO node, for instance ``vfio3``; ``None`` on kernels without such
        nodes.
    :ivar group_uuid: The start group that it was put into, ``None`` for none.
    :ivar online: Whether its resources are committed; ``None`` when its driver does not say.
    :ivar params: The vendor's parameters as they are, ``None`` when its driver has none.
    """

    uuid: UUID
    directory: str
    parent: str
    type_id: str | None
    device_api: str | None = None
    iommu_group: int | None = None
    cdev: str | None = None
    group_uuid: UUID | None = None
    online: bool | None = None
    params: str | None = None
    damage: tuple[str, ...] = ()

    @property
    def path(self) -> Path:
        """Its ``directory``."""
        return Path(self.directory)

    @property
    def nodes(self) -> dict[IommuKind, str]:
        """The nodes by which a process can open it."""
        found: dict[IommuKind, str] = {}
        if self.cdev is not None:
            found["iommufd"] = f"/{CDEV_NODES}/{self.cdev}"
        if self.iommu_group is not None:
            found["container"] = f"/{GROUP_NODES}/{self.iommu_group}"
        return found


class StartGroup(Struct, frozen=True):
    """The mdevs of one parent that come online together, all or none.

    :ivar parent: Name of the parent device.
    :ivar uuid: What their ``group_uuid`` says; ``None`` for a single mdev that was put into none,
        which is a group of its own.
    :ivar members: In order of their UUIDs.
    :ivar online: Whether all are online; ``None`` when the driver does not say.
    """

    parent: str
    uuid: UUID | None
    members: tuple[UUID, ...]
    online: bool | None = None

    @property
    def label(self) -> str:
        """How messages name it."""
        if self.uuid is None:
            return f"mdev {self.members[0]}"
        return f"start group {self.uuid}"


class Host(Struct, frozen=True):
    """One scan of the machine.

    :ivar parents: In natural order of their names.
    :ivar mdevs: In order of parent and UUID.
    :ivar mdev_bus: Whether the kernel has an mdev bus at all; without one both are empty.
    :ivar damage: What belongs to none of them, for instance a device with a name that is no UUID.
    """

    parents: tuple[Parent, ...] = ()
    mdevs: tuple[Mdev, ...] = ()
    mdev_bus: bool = True
    damage: tuple[str, ...] = ()

    def find(self, uuid: UUID) -> Mdev | None:
        """The mdev with that UUID, if there is one."""
        return next((mdev for mdev in self.mdevs if mdev.uuid == uuid), None)

    @property
    def groups(self) -> tuple[StartGroup, ...]:
        """The start groups that have a UUID, in order of parent and UUID."""
        members: dict[tuple[str, UUID], list[Mdev]] = {}
        for mdev in self.mdevs:
            if mdev.group_uuid is not None:
                members.setdefault((mdev.parent, mdev.group_uuid), []).append(mdev)
        return tuple(_group(members[key]) for key in sorted(members, key=_group_key))

    def group_of(self, mdev: Mdev) -> StartGroup:
        """The start group of an mdev; its own when it was put into none."""
        if mdev.group_uuid is None:
            return _group([mdev])
        key = mdev.parent, mdev.group_uuid
        return _group([other for other in self.mdevs if (other.parent, other.group_uuid) == key])


def _group_key(key: tuple[str, UUID]) -> tuple[list[tuple[int, int, str]], UUID]:
    return natural_key(key[0]), key[1]


def _group(mdevs: list[Mdev]) -> StartGroup:
    states = {mdev.online for mdev in mdevs}
    return StartGroup(
        parent=mdevs[0].parent,
        uuid=mdevs[0].group_uuid,
        members=tuple(sorted(mdev.uuid for mdev in mdevs)),
        online=None if None in states else states == {True},
    )
