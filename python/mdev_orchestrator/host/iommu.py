# SPDX-License-Identifier: GPL-2.0-or-later
"""What this host has of the two ways to open a device by VFIO.

=============  ====================================  =====================
kind           the device's node                     the host's node
=============  ====================================  =====================
``iommufd``    ``/dev/vfio/devices/vfioN``, its own  ``/dev/iommu``
``container``  ``/dev/vfio/GROUP``, of its group     ``/dev/vfio/vfio``
=============  ====================================  =====================

A kernel may have either or both. A device is open in one way at a time: the kernel refuses the
other with EBUSY.
"""

from __future__ import annotations

import grp
import os
import pwd
from pathlib import Path
from uuid import UUID

from mdev_orchestrator.errors import HostError
from mdev_orchestrator.host import sysfs
from mdev_orchestrator.machine import Machine
from mdev_orchestrator.model import IommuKind

HOST_NODES: dict[IommuKind, str] = {"iommufd": "dev/iommu", "container": "dev/vfio/vfio"}
"""By kind, the node that a process opens beside the device's, below the root."""

Lack = tuple[str, str]
"""What is missing, and the remedy."""

_SUBSYSTEMS: dict[IommuKind, str] = {"iommufd": "vfio-dev", "container": "vfio"}
_UNNAMED: dict[IommuKind, Lack] = {
    "iommufd": ("the kernel gives it no node of its own", "see the kernel log"),
    "container": ("it has no IOMMU group", "modprobe vfio_iommu_type1, then see the kernel log"),
}
_READ_WRITE = 0o6


def has_iommufd(machine: Machine) -> bool:
    """Whether the kernel has ``/dev/iommu``, for whichever user."""
    return os.path.exists(machine.path(HOST_NODES["iommufd"]))


def kinds(machine: Machine, user: str | None = None) -> tuple[IommuKind, ...]:
    """The kinds that this host offers a user, the preferred one first; at least one.

    :param user: This process without one.
    :raise HostError: There is no such user.
    """
    if not may_open(machine.path(HOST_NODES["iommufd"]), user):
        return ("container",)
    has_container = os.path.exists(machine.path(HOST_NODES["container"]))
    return ("iommufd", "container") if has_container else ("iommufd",)


def lack_of_iommufd(machine: Machine) -> Lack | None:
    """Say why this process cannot use ``/dev/iommu``; ``None`` if it can."""
    node = machine.path(HOST_NODES["iommufd"])
    if may_open(node):
        return None
    if os.path.exists(node):
        return f"no permission to open {node}", _rule('KERNEL=="iommu"')
    if module_is_known(machine, "iommufd"):
        return f"{node} is not there", "modprobe iommufd"
    return (
        f"kernel {os.uname().release} has no iommufd: {node} is not there",
        "boot a kernel with CONFIG_IOMMUFD and CONFIG_VFIO_DEVICE_CDEV",
    )


def lack_of_node(
    machine: Machine, uuid: UUID, kind: IommuKind, user: str | None = None
) -> Lack | None:
    """Say why a user cannot open an mdev's node; ``None`` if it can be opened.

    :param user: This process without one.
    :raise HostError: There is no such user.
    """
    node = sysfs.vfio_nodes(machine, uuid).get(kind)
    if node is None:
        return _UNNAMED[kind]
    if may_open(node, user):
        return None
    if not os.path.exists(node):
        trigger = f"udevadm trigger -s {_SUBSYSTEMS[kind]}"
        return f"{node} is not there", f"is udev running, or /dev a devtmpfs? {trigger}"
    return (
        f"{user or 'this user'} may not read and write {node} (group {_group_name(node)})",
        _rule(f'SUBSYSTEM=="{_SUBSYSTEMS[kind]}"'),
    )


def _rule(match: str) -> str:
    return (
        f'udev rule: {match}, OWNER="root", GROUP="kvm", MODE="0660" in '
        "/etc/udev/rules.d/10-vfio.rules, and the user in group kvm"
    )


def may_open(path: str | Path, user: str | None = None) -> bool:
    """Whether ``user`` may read and write a node; this process without one.

    For another user only the permission bits count, not access control lists.

    :raise HostError: There is no such user.
    """
    if user is None:
        return os.access(path, os.R_OK | os.W_OK, effective_ids=True)
    try:
        account = pwd.getpwnam(user)
    except KeyError:
        raise HostError(f"there is no user {user!r}") from None
    try:
        status = os.stat(path)
    except OSError:
        return False
    groups = os.getgrouplist(user, account.pw_gid)
    shift = 6 if status.st_uid == account.pw_uid else 3 if status.st_gid in groups else 0
    return account.pw_uid == 0 or (status.st_mode >> shift) & _READ_WRITE == _READ_WRITE


def module_is_known(machine: Machine, name: str) -> bool:
    """Whether the running kernel has a module, as far as can be told."""
    directory = machine.root / "lib/modules" / os.uname().release
    try:
        return f"/{name}.ko" in (directory / "modules.dep").read_text(errors="replace")
    except OSError:
        return directory.exists()  # no list: let modprobe say it


def _group_name(path: str | Path) -> str:
    """Name or number of the group that a node belongs to."""
    number = os.stat(path).st_gid
    try:
        return grp.getgrgid(number).gr_name
    except KeyError:
        return str(number)
