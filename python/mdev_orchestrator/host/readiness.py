# SPDX-License-Identifier: GPL-2.0-or-later
"""When is an mdev that was just created usable by a guest?

When the kernel has linked its type and its IOMMU group, when its node in ``/dev/vfio`` is there,
and when the one who will open it may. The last is udev's work and comes when it comes: people who
do not wait for it sleep two seconds, or fail.
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
from mdev_orchestrator.host.events import until
from mdev_orchestrator.host.sysfs import ROOT

PERMISSION_REMEDY = (
    'udev rule: SUBSYSTEM=="vfio", OWNER="root", GROUP="kvm", MODE="0660" in '
    "/etc/udev/rules.d/10-vfio.rules, and the user in group kvm"
)


_READ_WRITE = 0o6


def missing(uuid: UUID, root: Path = ROOT, user: str | None = None) -> tuple[str, str] | None:
    """What an mdev lacks to be opened by ``user`` (this process without one), and the remedy.

    :return: ``None`` when it is ready.
    :raise HostError: There is no such user.
    """
    if not os.path.lexists(sysfs.file(uuid, "mdev_type", root)):
        if not os.path.exists(sysfs.file(uuid, "", root)):
            remedy = "see the kernel log: its driver may have taken it back"
            return "it is not on the mdev bus", remedy
        return "the kernel has not linked its type", "see the kernel log"
    node = sysfs.vfio_node(uuid, root)
    if node is None:
        return "it has no IOMMU group", "modprobe vfio_iommu_type1, then see the kernel log"
    if may_open(node, user):
        return None
    if not os.path.exists(node):
        return f"{node} is not there", "is udev running, or /dev a devtmpfs?"
    return f"{user or 'this user'} may not read and write {node}", PERMISSION_REMEDY


def may_open(path: str | Path, user: str | None = None) -> bool:
    """Whether ``user`` may read and write a node; this process without one.

    For another user only the permission bits are looked at, not access control lists.

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
    uuid: UUID, deadline: float, root: Path = ROOT, *, user: str | None = None
) -> None:
    """Return when the mdev can be opened by ``user``, or by this process without one.

    :param deadline: Seconds.
    :raise DeadlineError: Something is still missing; says what, and how to mend it.
    :raise HostError: There is no such user.
    """
    if missing(uuid, root, user) is None:
        return
    try:
        async with asyncio.timeout(deadline):
            await until(lambda: missing(uuid, root, user) is None, root)
    except TimeoutError:
        lack = missing(uuid, root, user)
        if lack is None:
            return
        raise DeadlineError(
            f"mdev {uuid} is not usable after {deadline:g} s: {lack[0]}", lack[1]
        ) from None


def group_name(path: str | Path) -> str:
    """Name or number of the group that a node belongs to."""
    number = os.stat(path).st_gid
    try:
        return grp.getgrgid(number).gr_name
    except KeyError:
        return str(number)
