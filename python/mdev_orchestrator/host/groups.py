# SPDX-License-Identifier: GPL-2.0-or-later
"""Start and stop groups of mdevs: a 1 or a 0 in the file ``online`` of any member.

A start commits the resources of all members or of none, and may take as long as the hardware takes;
writing 1 to a group that is online does nothing. A stop is refused while any member is open. Both
are written from a process that is killed at the deadline: a driver that waits in a way that can be
killed then gives up.
"""

from __future__ import annotations

import asyncio
import errno
import os
from pathlib import Path
from uuid import UUID

from mdev_orchestrator.errors import (
    BusyError,
    CapacityError,
    DeadlineError,
    HostError,
    MdoError,
)
from mdev_orchestrator.host import sysfs
from mdev_orchestrator.host.sysfs import ROOT
from mdev_orchestrator.model import GROUP_FILE, Host, StartGroup
from mdev_orchestrator.system.writer import Writer, write_apart, write_or_kill

ONLINE = "online"
ERROR = "group_error"
"""Optional: why the driver refused the last start."""
OWNER = "group_owner"
"""Optional: the process that has the group, or 0."""

_GONE = frozenset((errno.ENOENT, errno.ENODEV))


def find(uuid: UUID, root: Path = ROOT) -> tuple[Host, StartGroup] | None:
    """The host, and the start group that an mdev is in now; ``None`` without such an mdev."""
    host = sysfs.scan(root, types=False)
    mdev = host.find(uuid)
    return None if mdev is None else (host, host.group_of(mdev))


async def start(
    group: StartGroup, deadline: float, root: Path = ROOT, *, write: Writer = write_or_kill
) -> None:
    """Bring a group online, all of it or nothing.

    :param deadline: Seconds.
    :raise CapacityError: The parent has not enough left; with what was asked and what is left.
    :raise BusyError: Somebody else starts or has it.
    :raise HostError: No permission to write the file.
    :raise DeadlineError: The driver did not answer.
    :raise MdoError: The driver refused for another reason.
    """
    path = _file(group.members[0], root)
    try:
        async with asyncio.timeout(deadline):
            number = await write(path, b"1")
    except TimeoutError:
        raise DeadlineError(
            f"{_named(group)} did not come online within {deadline:g} s: its driver is silent",
            "the kernel log (dmesg) may tell what it waits for",
        ) from None
    if number:
        raise _refused(group, number, root)
    lagging = [uuid for uuid in group.members if _offline(uuid, root)]
    if lagging:
        raise MdoError(
            f"{_named(group)} was started, and mdev {lagging[0]} of it is still offline",
            "a fault of its driver, or somebody stopped it; see the kernel log (dmesg)",
        )


async def stop(
    uuid: UUID, deadline: float, root: Path = ROOT, *, write: Writer = write_or_kill
) -> bool:
    """Take the group of an mdev offline, unless a member is open.

    :param deadline: Seconds.
    :return: Whether it is offline now; ``False`` when the driver says that it is in use. A device
        that is not there (any more) is offline.
    :raise DeadlineError: The driver did not answer.
    :raise MdoError: The driver refused for another reason.
    """
    try:
        async with asyncio.timeout(deadline):
            number = await write(_file(uuid, root), b"0")
    except TimeoutError:
        raise DeadlineError(
            f"mdev {uuid} did not go offline within {deadline:g} s: its driver is silent",
            "the kernel log (dmesg) may tell what it waits for",
        ) from None
    if number == errno.EBUSY:
        return False
    if number and number not in _GONE:
        message = f"mdev {uuid} does not go offline: {os.strerror(number)}"
        raise _with_owner(message, number, uuid, root)
    return True


async def join(
    uuid: UUID, group: UUID, parent: str, root: Path = ROOT, *, write: Writer = write_apart
) -> None:
    """Put an mdev into a start group.

    :raise HostError: The driver has no start groups.
    :raise BusyError: The group is online, and the driver lets nobody join it then.
    :raise MdoError: The driver refused for another reason.
    """
    number = await write(sysfs.file(uuid, GROUP_FILE, root), str(group).encode())
    what = f"mdev {uuid} cannot join start group {group}"
    match number:
        case 0:
            return
        case errno.ENOENT:
            raise HostError(
                f"the driver of {parent} has no start groups: its mdevs have no file {GROUP_FILE}",
                "create them without a group",
            )
        case errno.EBUSY:
            raise BusyError(
                f"{what}: it is online already, and its driver lets nobody join it then",
                "stop the guest that has it, or take another group",
            )
        case errno.EINVAL:
            raise MdoError(
                f"{what}: the driver does not accept it",
                "a group is on one parent; its other members may be elsewhere, see mdo host",
            )
        case errno.ENOSPC:
            raise CapacityError(
                f"{what}: {os.strerror(number)}", "the group, or the links of its parent, are full"
            )
    raise MdoError(f"{what}: {os.strerror(number)}", "see the kernel log (dmesg)")


def explain(group: StartGroup, root: Path = ROOT) -> str:
    """What the driver tells about a group that somebody could not have; may be empty."""
    uuid = group.members[0]
    words = []
    if text := _optional(uuid, ERROR, root):
        words.append(f"the driver says: {text}")
    owner = _optional(uuid, OWNER, root)
    if owner.isdecimal() and int(owner):
        words.append(f"it belongs to process {owner}")
    return f"{_named(group)}: {'; '.join(words)}" if words else ""


def file_and_owner(uuid: UUID, root: Path = ROOT) -> str:
    """The file ``online`` of an mdev, whose it is and who may write it, in words."""
    path = Path(_file(uuid, root))
    try:
        status = path.stat()
    except OSError:
        return str(path)
    return f"{path} (mode {status.st_mode & 0o777:04o}, of user {status.st_uid})"


def _file(uuid: UUID, root: Path) -> str:
    return str(root / "sys/bus/mdev/devices" / str(uuid) / ONLINE)


def _offline(uuid: UUID, root: Path) -> bool:
    mdev = sysfs.read_mdev(uuid, root)
    return mdev is not None and mdev.online is False


def _optional(uuid: UUID, name: str, root: Path) -> str:
    try:
        return sysfs.read_file(uuid, name, root) or ""
    except MdoError:
        return ""


def _named(group: StartGroup) -> str:
    return f"{group.label} on {group.parent}"


def _refused(group: StartGroup, number: int, root: Path) -> MdoError:
    reason = os.strerror(number)
    words = [f"{_named(group)} does not come online: {reason}"]
    if group.uuid is not None:
        words.append(f"its {len(group.members)} members are " + ", ".join(map(str, group.members)))
    told = _optional(group.members[0], ERROR, root)
    if told:
        words.append(f"the driver says: {told}")
    if number == errno.ENOSPC:
        if not told:
            words.extend(_links(group, root))
        return CapacityError(
            "; ".join(words),
            f"stop a guest that has a group on {group.parent}, or make this one smaller",
        )
    if number == errno.EBUSY:
        return BusyError("; ".join(words), "somebody else has or starts it; see mdo guest list")
    return _with_owner("; ".join(words), number, group.members[0], root)


def _links(group: StartGroup, root: Path) -> list[str]:
    """What was asked and what is left, from a parent that tells of links."""
    parent = next((p for p in sysfs.scan(root).parents if p.name == group.parent), None)
    if parent is None or parent.links_free is None:
        return []
    count = len(group.members)
    left = f"{parent.links_free} of {'?' if parent.links is None else parent.links} left"
    return [f"{count * (count - 1) // 2} links asked, {left}"]


def _with_owner(message: str, number: int, uuid: UUID, root: Path) -> MdoError:
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return HostError(f"{message}: {file_and_owner(uuid, root)}", "run as root")
    return MdoError(message, "the driver's own words are in the kernel log (dmesg)")
