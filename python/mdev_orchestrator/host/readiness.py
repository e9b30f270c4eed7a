# SPDX-License-Identifier: GPL-2.0-or-later
"""Waits until an mdev that was just created can be opened by a guest.

That is when the kernel has linked its type and its IOMMU group, its node in ``/dev/vfio`` is there,
and the user that will open the node may do so. The last is done by udev's rules, some time later.
"""

from __future__ import annotations

import asyncio
import grp
import os
import pwd
from pathlib import Path
from uuid import UUID

from mdev_orchestrator.errors import DeadlineError, HostError
from mdev_orchestrator.host import sysfs
from mdev_orchestrator.host.events import wait_until
from mdev_orchestrator.machine import Machine

PERMISSION_REMEDY = (
    'udev rule: SUBSYSTEM=="vfio", OWNER="root", GROUP="kvm", MODE="0660" in '
    "/etc/udev/rules.d/10-vfio.rules, and the user in group kvm"
)


_READ_WRITE = 0o6


def missing(machine: Machine, uuid: UUID, user: str | None = None) -> tuple[str, str] | None:
    """Say what an mdev lacks to be opened by ``user``, and the remedy.

    :param user: This process without one.

    :return: ``None`` when it is ready.
    :raise HostError: There is no such user.
    """
    if not os.path.lexists(sysfs.file(machine, uuid, "mdev_type")):
        if not os.path.exists(sysfs.file(machine, uuid, "")):
            remedy = "see the kernel log: its driver may have taken it back"
            return "it is not on the mdev bus", remedy
        return "the kernel has not linked its type", "see the kernel log"
    node = sysfs.vfio_node(machine, uuid)
    if node is None:
        return "it has no IOMMU group", "modprobe vfio_iommu_type1, then see the kernel log"
    if may_open(node, user):
        return None
    if not os.path.exists(node):
        return f"{node} is not there", "is udev running, or /dev a devtmpfs?"
    return f"{user or 'this user'} may not read and write {node}", PERMISSION_REMEDY


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


async def wait_ready(
    machine: Machine, uuid: UUID, deadline: float, *, user: str | None = None
) -> None:
    """Return when the mdev can be opened by ``user``, or by this process without one.

    :param deadline: Seconds.
    :raise DeadlineError: Something is still missing; says what, and how to mend it.
    :raise HostError: There is no such user.
    """
    if missing(machine, uuid, user) is None:
        return
    try:
        async with asyncio.timeout(deadline):
            await wait_until(machine, lambda: missing(machine, uuid, user) is None)
    except TimeoutError:
        lack = missing(machine, uuid, user)
        if lack is None:
            return
        raise DeadlineError(
            f"mdev {uuid} is not usable after {deadline:g} s: {lack[0]}",
            lack[1],
            subject=f"mdev {uuid}",
        ) from None


def group_name(path: str | Path) -> str:
    """Name or number of the group that a node belongs to."""
    number = os.stat(path).st_gid
    try:
        return grp.getgrgid(number).gr_name
    except KeyError:
        return str(number)
