# SPDX-License-Identifier: GPL-2.0-or-later
"""Mdevs in ``/sys``: their files, their creation and their removal.

This package is all of the program that reads or writes ``/sys``. Reading the whole tree is in
:mod:`.tree`, reading content that is not trusted in :mod:`.values`; what others need of them can be
imported from here.

What a write has done is decided where the kernel answers. A known errno means that it had no
effect. A writer that is killed, or given up at a deadline, leaves the outcome unknown.
"""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import UUID

from mdev_orchestrator import errors
from mdev_orchestrator.errors import Outcome
from mdev_orchestrator.host.tree import (
    BUS,
    CLASS,
    ONLINE_FILE,
    PARAMS_FILES,
    TYPES,
    cdev_name,
    directory,
    parent_links,
    read_host,
    read_mdev,
    scan,
)
from mdev_orchestrator.host.values import (
    GONE,
    last_part,
    link_target,
    list_names,
    parse_count,
    read_text,
    shown,
)
from mdev_orchestrator.machine import Machine
from mdev_orchestrator.model import CDEV_NODES, GROUP_FILE, GROUP_NODES, IommuKind

if TYPE_CHECKING:
    from mdev_orchestrator.system.writer import WriteResult

__all__ = [
    "GONE",
    "ONLINE_FILE",
    "PARAMS_FILES",
    "REMOVING",
    "available_instances",
    "create",
    "creation",
    "directory",
    "file",
    "leads_out",
    "not_removed",
    "parent_links",
    "parent_of",
    "read_file",
    "read_host",
    "read_mdev",
    "refusal",
    "removal",
    "remove",
    "scan",
    "taken",
    "vfio_nodes",
    "writable_files",
    "write_file",
    "writer_killed",
]

REMOVING = GONE | {0}
"""What writing to ``remove`` gives when the device goes: a removal takes the file away first and
the device later, and a second writer gets success, ENOENT or ENODEV."""

_CORE_MDEV_FILES = frozenset(("remove", "uevent", "power", GROUP_FILE, ONLINE_FILE))


# ---- files of an mdev ---------------------------------------------------------------------------


def file(machine: Machine, uuid: UUID, name: str) -> str:
    """Path of a file in an mdev's directory."""
    return machine.path(BUS, str(uuid), name)


def parent_of(machine: Machine, uuid: UUID) -> str:
    """Name of the parent of an mdev; empty if there is no such device."""
    path = directory(machine, uuid)
    return "" if path is None else os.path.basename(os.path.dirname(os.path.realpath(path)))


def vfio_nodes(machine: Machine, uuid: UUID) -> dict[IommuKind, str]:
    """The nodes by which a process can open this mdev, by the kind of IOMMU that it uses then.

    A node need not be there yet. A kind is left out until the kernel has named its node.
    """
    found: dict[IommuKind, str] = {}
    cdev = cdev_name(file(machine, uuid, ""))
    if cdev is not None:
        found["iommufd"] = machine.path(CDEV_NODES, cdev)
    with contextlib.suppress(OSError):
        group = last_part(link_target(file(machine, uuid, "iommu_group")))
        found["container"] = machine.path(GROUP_NODES, group)
    return found


def read_file(machine: Machine, uuid: UUID, name: str) -> str | None:
    """Read an optional file of an mdev's directory: ``online``, ``nvidia/vgpu_params``…

    :return: Its text without trailing white space; ``None`` when this driver has no such file.
    :raise MdoError: It is there and cannot be read.
    """
    damage: list[str] = []
    text = read_text(file(machine, uuid, name), damage, optional=True, empty=True)
    if damage:
        raise errors.MdoError(f"mdev {uuid}: {damage[0]}", subject=_subject(uuid))
    return text


async def write_file(machine: Machine, uuid: UUID, name: str, value: str) -> bool:
    """Write an optional file of an mdev's directory.

    :return: Whether this driver has that file.
    :raise HostError: No permission.
    :raise MdoError: The driver refused the value, or the process that wrote it was killed.
    """
    path = file(machine, uuid, name)
    lane = parent_of(machine, uuid)
    result = await machine.writer.write(path, value.encode(), lane=lane)
    _check_answered(result, path, f"mdev {uuid} has {value!r} for {name} now", uuid)
    if result.errno == errno.ENOENT:
        return False
    if result.errno:
        raise _refused(f"mdev {uuid} refused {value!r} for {name}", result.errno, uuid)
    return True


def leads_out(machine: Machine, uuid: UUID, name: str) -> bool:
    """Whether a file's name goes through a link to somewhere outside the mdev's directory."""
    base = os.path.realpath(file(machine, uuid, ""))
    return os.path.commonpath((base, os.path.realpath(file(machine, uuid, name)))) != base


def writable_files(machine: Machine, uuid: UUID) -> tuple[str, ...]:
    """The vendor's files of an mdev that can be written, in its directory and one below."""
    base = file(machine, uuid, "")
    found = []
    for name in list_names(base) or ():
        inner = list_names(base + name) if not os.path.islink(base + name) else None
        names = [name] if inner is None else [f"{name}/{entry}" for entry in inner]
        found += [
            path
            for path in names
            if path.partition("/")[0] not in _CORE_MDEV_FILES
            and not os.path.islink(base + path)
            and os.path.isfile(base + path)
            and os.stat(base + path).st_mode & 0o200
        ]
    return tuple(sorted(found))


# ---- creating -----------------------------------------------------------------------------------


async def create(machine: Machine, parent: str, type_id: str, uuid: UUID) -> None:
    """Create one mdev; returns when the kernel has made it.

    Cancelling does not take back a write that has begun: the device may still appear.

    :raise UuidError: The UUID is taken, under any parent.
    :raise CapacityError: The driver has no instance of that type left.
    :raise UnknownError: Parent or type is not there, or is going away.
    :raise HostError: No permission.
    :raise MdoError: The driver refused for another reason, or the process that wrote was killed.
    """
    path, data = creation(machine, parent, type_id, uuid)
    result = await machine.writer.write(path, data, lane=parent)
    _check_answered(result, path, f"mdev {uuid} was created", uuid)
    if result.errno:
        raise refusal(machine, parent, type_id, uuid, result.errno)


def creation(machine: Machine, parent: str, type_id: str, uuid: UUID) -> tuple[str, bytes]:
    """The file that is written to create an mdev, and the data.

    :raise UnknownError: Parent or type can be no name in sysfs.
    """
    return f"{_type_directory(machine, parent, type_id)}/create", str(uuid).encode()


def refusal(
    machine: Machine, parent: str, type_id: str, uuid: UUID, number: int
) -> errors.MdoError:
    """The error for an errno of a write to ``create``; see :func:`create`."""
    what = f"cannot create {type_id} on {parent}"
    match number:
        case errno.EEXIST:
            return taken(machine, uuid)
        case errno.EUSERS | errno.ENOSPC:
            damage: list[str] = []
            path = _type_directory(machine, parent, type_id)
            left = read_text(f"{path}/available_instances", damage)
            return errors.CapacityError(
                f"{what}: the driver has no instance left",
                f"available_instances reads {left if left is not None else damage[0]}",
                outcome=Outcome.NO_EFFECT,
                subject=_subject(uuid),
                errno=number,
            )
        case errno.ENOENT:
            message = f"{what}: no such type or parent", "mdo host lists them"
        case errno.ENODEV:
            message = f"{what}: the parent is going away", "mdo host lists what remains"
        case _:
            return _refused(what, number, uuid)
    return errors.UnknownError(
        *message, outcome=Outcome.NO_EFFECT, subject=_subject(uuid), errno=number
    )


def taken(machine: Machine, uuid: UUID) -> errors.UuidError:
    """The error that says under which parent a UUID exists already."""
    mdev = read_mdev(machine, uuid)
    where = f" under parent {mdev.parent}" if mdev is not None and mdev.parent else ""
    kind = f" as {mdev.type_id}" if mdev is not None and mdev.type_id else ""
    return errors.UuidError(
        f"mdev {uuid} exists already{where}{kind}",
        "choose another UUID",
        outcome=Outcome.NO_EFFECT,
        subject=_subject(uuid),
        errno=errno.EEXIST,
    )


def available_instances(machine: Machine, parent: str, type_id: str) -> int | None:
    """How many more of a type can be created now, as the kernel says; ``None`` if it does not."""
    path = _type_directory(machine, parent, type_id)
    text = read_text(f"{path}/available_instances", [])
    try:
        return None if text is None else parse_count(text)
    except ValueError:
        return None


def _type_directory(machine: Machine, parent: str, type_id: str) -> str:
    for name in (parent, type_id):
        if "/" in name or "\0" in name or name in ("", ".", ".."):
            raise errors.UnknownError(
                f"{shown(name)} is not a name in sysfs", outcome=Outcome.NO_EFFECT
            )
    return machine.path(CLASS, parent, TYPES, type_id)


# ---- removing -----------------------------------------------------------------------------------


async def remove(machine: Machine, uuid: UUID, deadline: float) -> None:
    """Remove one mdev; returns when it is gone.

    The kernel waits without end for the process that has the device open, so see
    :func:`mdev_orchestrator.host.holders.find_holders` first.

    A device that is still being created is waited for: it has ``remove`` already and its type not
    yet, and a write would be refused (EAGAIN) *and* take the file away for good
    (``remove_store`` and ``mdev_device_remove`` in drivers/vfio/mdev).

    :param deadline: Seconds.
    :raise DeadlineError: It is still there. If the write has begun the outcome is unknown: the
        kernel goes on, and ends the removal when the device is released.
    :raise UnknownError: There is no such mdev.
    :raise HostError: No permission.
    :raise MdoError: The kernel refused for another reason, or the process that wrote was killed.
    """
    import asyncio  # here: a command that only reads the host does not load it

    from mdev_orchestrator.host.events import wait_until

    path = _own_directory(machine, uuid)
    parent = os.path.dirname(path)

    def gone() -> bool:
        return not os.path.exists(path)

    def created() -> bool:
        return os.path.lexists(f"{path}/mdev_type") or not os.path.exists(f"{path}/remove")

    complete = created()
    try:
        async with asyncio.timeout(deadline):
            await wait_until(machine, created)
            complete = True
            lane = os.path.basename(parent)
            target = removal(Path(parent), uuid)
            result = await machine.writer.write(target, b"1", lane=lane)
            _check_answered(result, target, f"mdev {uuid} was removed", uuid)
            if result.errno in REMOVING:
                await wait_until(machine, gone)
                return
    except TimeoutError:
        if not complete:
            raise errors.DeadlineError(
                f"mdev {uuid} was not removed within {deadline:g} s: it is still being created",
                "its driver has not answered yet; try again when it has",
                outcome=Outcome.NO_EFFECT,
                subject=_subject(uuid),
            ) from None
        raise errors.DeadlineError(
            f"mdev {uuid} was not removed within {deadline:g} s: a process has it open",
            "the kernel ends the removal by itself when the device is released",
            outcome=Outcome.UNKNOWN,
            subject=_subject(uuid),
        ) from None
    raise not_removed(uuid, result.errno)


def removal(parent: Path, uuid: UUID) -> str:
    """The file that is written to remove an mdev: in its own directory, which outlives the links.

    :param parent: Its parent's own directory.
    """
    return f"{parent}/{uuid}/remove"


def not_removed(uuid: UUID, number: int) -> errors.MdoError:
    """The error for an errno of a write to ``remove``; see :func:`remove`."""
    return _refused(f"cannot remove mdev {uuid}", number, uuid)


def _own_directory(machine: Machine, uuid: UUID) -> str:
    """The device's directory itself: the link on the bus goes long before it may."""
    path = directory(machine, uuid)
    if path is None:
        raise errors.UnknownError(
            f"there is no mdev {uuid}",
            "mdo host lists them",
            outcome=Outcome.NO_EFFECT,
            subject=_subject(uuid),
        )
    return os.path.realpath(path)


# ---- what a write has done ----------------------------------------------------------------------


def writer_killed(path: str, whether: str, subject: str) -> errors.MdoError:
    """The error for a write whose child ended without an answer.

    :param path: The file.
    :param whether: What is not known, as a statement.
    :param subject: The object.
    """
    return errors.MdoError(
        f"the process that wrote {path} was killed; whether {whether} is not known",
        "mdo recover finds out, and finishes or undoes it",
        outcome=Outcome.UNKNOWN,
        subject=subject,
    )


def _check_answered(result: WriteResult, path: str, whether: str, uuid: UUID) -> None:
    if result.outcome is Outcome.UNKNOWN:
        raise writer_killed(path, whether, _subject(uuid))


def _subject(uuid: UUID) -> str:
    return f"mdev {uuid}"


def _refused(what: str, number: int, uuid: UUID) -> errors.MdoError:
    kind: type[errors.MdoError] = errors.MdoError
    reason = os.strerror(number)
    message = f"{what}: {reason}"
    match number:
        case errno.EACCES | errno.EPERM:
            kind, hint = errors.HostError, "run as root"
        case errno.EROFS:
            kind, hint = errors.HostError, "/sys is mounted read-only: mount -o remount,rw /sys"
        case errno.EBUSY:
            hint = "a process has it open or another type is in use"
        case errno.EINVAL:
            message, hint = (
                f"{what}: the driver does not accept it ({reason})",
                "see the kernel log",
            )
        case _:
            hint = "the driver's own words are in the kernel log (dmesg)"
    return kind(message, hint, outcome=Outcome.NO_EFFECT, subject=_subject(uuid), errno=number)
