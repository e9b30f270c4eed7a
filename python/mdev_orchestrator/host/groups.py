# SPDX-License-Identifier: GPL-2.0-or-later
"""Start and stop groups of mdevs: a 1 or a 0 in the file ``online`` of any member.

A start commits the resources of all members or of none, and may take as long as the hardware takes;
writing 1 to a group that is online does nothing. A stop is refused while any member is open. The
process that writes either is killed at the deadline: a driver that waits killably gives up then.
"""

from __future__ import annotations

import asyncio
import errno
import os
from pathlib import Path
from uuid import UUID

from mdev_orchestrator import errors
from mdev_orchestrator.errors import Outcome
from mdev_orchestrator.host import sysfs
from mdev_orchestrator.machine import Machine
from mdev_orchestrator.model import GROUP_FILE, Host, StartGroup

ERROR = "group_error"
"""Optional file: why the driver refused the last start."""
OWNER = "group_owner"
"""Optional file: the process that has the group, or 0."""
_DENIED = frozenset((errno.EACCES, errno.EPERM, errno.EROFS))


async def find(machine: Machine, uuid: UUID) -> tuple[Host, StartGroup] | None:
    """The host, and the start group that an mdev is in now; ``None`` without such an mdev."""
    host = await sysfs.scan(machine, types=False)
    mdev = host.find(uuid)
    return None if mdev is None else (host, host.group_of(mdev))


async def start(machine: Machine, group: StartGroup, deadline: float) -> None:
    """Bring a group online, all of it or nothing.

    :param deadline: Seconds.
    :raise CapacityError: The parent has not enough left; with what was asked and what is left.
    :raise BusyError: Another process starts or has it.
    :raise HostError: No permission to write the file.
    :raise DeadlineError: The driver did not answer; the outcome is unknown.
    :raise MdoError: The driver refused for another reason, or the process that wrote was killed.
    """
    path = sysfs.file(machine, group.members[0], sysfs.ONLINE_FILE)
    try:
        async with asyncio.timeout(deadline):
            result = await machine.writer.write(
                path, b"1", lane=group.parent, kill_if_cancelled=True
            )
    except TimeoutError:
        raise errors.DeadlineError(
            f"{_named(group)} did not come online within {deadline:g} s: its driver is silent",
            "the kernel log (dmesg) may tell what it waits for",
            outcome=Outcome.UNKNOWN,
            subject=group.label,
        ) from None
    if result.outcome is Outcome.UNKNOWN:
        raise sysfs.writer_killed(path, f"{_named(group)} is online", group.label)
    if result.errno:
        raise _refused(machine, group, result.errno)
    lagging = [uuid for uuid in group.members if _offline(machine, uuid)]
    if lagging:
        raise errors.MdoError(
            f"{_named(group)} was started, and mdev {lagging[0]} of it is still offline",
            "a fault of its driver, or another program stopped it; see the kernel log (dmesg)",
            outcome=Outcome.UNKNOWN,
            subject=group.label,
        )


async def stop(machine: Machine, uuid: UUID, deadline: float) -> bool:
    """Take the group of an mdev offline, unless a member is open.

    :param deadline: Seconds.
    :return: Whether it is offline now; ``False`` when the driver says that it is in use. A device
        that is not there (any more) is offline.
    :raise HostError: No permission to write the file.
    :raise DeadlineError: The driver did not answer; the outcome is unknown.
    :raise MdoError: The driver refused for another reason, or the process that wrote was killed.
    """
    path = sysfs.file(machine, uuid, sysfs.ONLINE_FILE)
    lane = sysfs.parent_of(machine, uuid)
    try:
        async with asyncio.timeout(deadline):
            result = await machine.writer.write(path, b"0", lane=lane, kill_if_cancelled=True)
    except TimeoutError:
        raise errors.DeadlineError(
            f"mdev {uuid} did not go offline within {deadline:g} s: its driver is silent",
            "the kernel log (dmesg) may tell what it waits for",
            outcome=Outcome.UNKNOWN,
            subject=f"mdev {uuid}",
        ) from None
    if result.outcome is Outcome.UNKNOWN:
        raise sysfs.writer_killed(path, f"mdev {uuid} is offline", f"mdev {uuid}")
    if result.errno == errno.EBUSY:
        return False
    if result.errno in _DENIED and _offline(machine, uuid):
        return True  # its driver, or QEMU, has stopped it
    if result.errno and result.errno not in sysfs.GONE:
        message = f"mdev {uuid} does not go offline: {os.strerror(result.errno)}"
        raise _with_owner(machine, message, result.errno, uuid)
    return True


async def join(machine: Machine, uuid: UUID, group: UUID, parent: str) -> None:
    """Put an mdev into a start group.

    :param parent: Name of its parent device.
    :raise HostError: The driver has no start groups.
    :raise BusyError: The group is online, and the driver lets no device join it then.
    :raise MdoError: The driver refused for another reason, or the process that wrote was killed.
    """
    path = sysfs.file(machine, uuid, GROUP_FILE)
    result = await machine.writer.write(path, str(group).encode(), lane=parent)
    what = f"mdev {uuid} cannot join start group {group}"
    if result.outcome is Outcome.UNKNOWN:
        raise sysfs.writer_killed(path, f"mdev {uuid} is in start group {group}", f"mdev {uuid}")
    kind: type[errors.MdoError] = errors.MdoError
    reason = os.strerror(result.errno)
    match result.errno:
        case 0:
            return
        case errno.ENOENT:
            kind = errors.HostError
            what = f"the driver of {parent} has no start groups"
            reason = f"its mdevs have no file {GROUP_FILE}"
            hint = "create them without a group"
        case errno.EBUSY:
            kind = errors.BusyError
            reason = "it is online already, and its driver lets no device join it then"
            hint = "stop the guest that has it, or take another group"
        case errno.EINVAL:
            reason = "the driver does not accept it"
            hint = "a group is on one parent; its other members may be elsewhere, see mdo host"
        case errno.ENOSPC:
            kind = errors.CapacityError
            hint = "the group, or the links of its parent, are full"
        case _:
            hint = "see the kernel log (dmesg)"
    raise kind(
        f"{what}: {reason}",
        hint,
        outcome=Outcome.NO_EFFECT,
        subject=f"mdev {uuid}",
        errno=result.errno,
    )


def explain(machine: Machine, group: StartGroup) -> str:
    """What the driver says of a group that a process could not have; may be empty."""
    uuid = group.members[0]
    words = []
    if text := _optional(machine, uuid, ERROR):
        words.append(f"the driver says: {text}")
    owner = _optional(machine, uuid, OWNER)
    if owner.isdecimal() and int(owner):
        words.append(f"it belongs to process {owner}")
    return f"{_named(group)}: {'; '.join(words)}" if words else ""


def file_and_owner(machine: Machine, uuid: UUID) -> str:
    """The file ``online`` of an mdev, its owner and its mode, in words."""
    path = Path(sysfs.file(machine, uuid, sysfs.ONLINE_FILE))
    try:
        status = path.stat()
    except OSError:
        return str(path)
    return f"{path} (mode {status.st_mode & 0o777:04o}, of user {status.st_uid})"


def _offline(machine: Machine, uuid: UUID) -> bool:
    mdev = sysfs.read_mdev(machine, uuid)
    return mdev is not None and mdev.online is False


def _optional(machine: Machine, uuid: UUID, name: str) -> str:
    try:
        return sysfs.read_file(machine, uuid, name) or ""
    except errors.MdoError:
        return ""


def _named(group: StartGroup) -> str:
    return f"{group.label} on {group.parent}"


def _refused(machine: Machine, group: StartGroup, number: int) -> errors.MdoError:
    words = [f"{_named(group)} does not come online: {os.strerror(number)}"]
    if group.uuid is not None:
        words.append(f"its {len(group.members)} members are " + ", ".join(map(str, group.members)))
    reason = _optional(machine, group.members[0], ERROR)
    if reason:
        words.append(f"the driver says: {reason}")
    kind: type[errors.MdoError]
    match number:
        case errno.ENOSPC:
            kind = errors.CapacityError
            if not reason:
                words.extend(_links(machine, group))
            hint = f"stop a guest that has a group on {group.parent}, or make this one smaller"
        case errno.EBUSY:
            kind = errors.BusyError
            hint = "another process has or starts it; see mdo guest list"
        case _:
            return _with_owner(machine, "; ".join(words), number, group.members[0], group.label)
    return kind(
        "; ".join(words), hint, outcome=Outcome.NO_EFFECT, subject=group.label, errno=number
    )


def _links(machine: Machine, group: StartGroup) -> list[str]:
    """What was asked and what is left, if the driver counts links."""
    links, free = sysfs.parent_links(machine, group.parent)
    if free is None:
        return []
    count = len(group.members)
    left = f"{free} of {'?' if links is None else links} left"
    return [f"{count * (count - 1) // 2} links asked, {left}"]


def _with_owner(
    machine: Machine, message: str, number: int, uuid: UUID, subject: str = ""
) -> errors.MdoError:
    kind: type[errors.MdoError] = errors.MdoError
    hint = "the driver's own words are in the kernel log (dmesg)"
    if number in _DENIED:
        kind = errors.HostError
        message, hint = f"{message}: {file_and_owner(machine, uuid)}", "run as root"
    return kind(
        message,
        hint,
        outcome=Outcome.NO_EFFECT,
        subject=subject or f"mdev {uuid}",
        errno=number,
    )
