# SPDX-License-Identifier: GPL-2.0-or-later
"""Finds the processes that have an mdev open, and so block its removal.

The kernel does not tell. ``/proc/PID/fd`` does: a process that uses an mdev has one of its VFIO
nodes open. To read it takes long on a host with many processes, so coroutines have it done in a
thread.

A device that is being removed has no name of its own node any more, so a process that has it open
by that node is not found.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from itertools import pairwise
from uuid import UUID

from msgspec import Struct, field

from mdev_orchestrator.host.tree import CLASS, TYPES
from mdev_orchestrator.machine import Machine
from mdev_orchestrator.model import GROUP_NODES, Mdev, as_uuid

_CMDLINE_LIMIT = 1 << 20  # bytes; QEMU's command lines are long, but not that long


class Holder(Struct, frozen=True):
    """A process that has an mdev open.

    :ivar comm: Its short name, for instance ``qemu-system-x86``.
    :ivar guest: The guest's name, when it is a QEMU that was given one.
    """

    pid: int
    comm: str
    guest: str | None = None

    def __str__(self) -> str:
        if self.guest is not None:
            return f"guest {self.guest!r} (pid {self.pid})"
        return f"{self.comm} (pid {self.pid})"


class Holders(Struct, frozen=True):
    """Processes by the mdev that they have open.

    :ivar unseen: How many processes this user may not look into. If there are any, an mdev
        without a holder here may have one.
    """

    by_mdev: Mapping[UUID, tuple[Holder, ...]] = field(default_factory=dict)
    unseen: int = 0

    def of(self, uuid: UUID) -> tuple[Holder, ...]:
        """The holders of one mdev."""
        return self.by_mdev.get(uuid, ())


async def find_holders(machine: Machine, mdevs: Iterable[Mdev]) -> Holders:
    """Find the processes that have any of ``mdevs`` open, in a thread."""
    import asyncio  # here: a command that only reads the host does not load it

    return await asyncio.to_thread(read_holders, machine, tuple(mdevs))


async def find_creators(machine: Machine, parent: str, type_id: str) -> tuple[Holder, ...]:
    """Find the processes that are creating an mdev of a type, in a thread.

    The driver has not answered them yet.
    """
    import asyncio  # likewise

    return await asyncio.to_thread(_read_creators, machine, parent, type_id)


def read_holders(machine: Machine, mdevs: Iterable[Mdev]) -> Holders:
    """Find the processes that have any of ``mdevs`` open; takes longer than a coroutine may."""
    mdevs = tuple(mdevs)
    if not mdevs:
        return Holders()
    by_node, unseen = _open_files(machine.path("proc"), f"/{GROUP_NODES}/", opened=True)
    if not by_node:
        return Holders(unseen=unseen)
    found: dict[UUID, tuple[Holder, ...]] = {}
    for mdev in mdevs:
        pids = set[int]().union(*(by_node.get(node, set()) for node in mdev.nodes.values()))
        if pids:
            found[mdev.uuid] = tuple(_holder(machine, pid) for pid in sorted(pids))
    return Holders(found, unseen)


def _read_creators(machine: Machine, parent: str, type_id: str) -> tuple[Holder, ...]:
    directory = os.path.realpath(machine.path(CLASS, parent))
    create = os.path.join(directory, TYPES, type_id, "create")
    pids, _ = _open_files(machine.path("proc"), create)
    return tuple(_holder(machine, pid) for pid in sorted(pids.get(create, ())))


def guest_of(machine: Machine, pid: int) -> tuple[str | None, UUID | None]:
    """The name and the UUID that a QEMU was given; ``None`` for what is not there."""
    arguments = _arguments(machine, pid)
    uuids = [value for option, value in pairwise(arguments) if option in ("-uuid", "--uuid")]
    return guest_name(arguments), as_uuid(uuids[-1]) if uuids else None


def guest_name(arguments: list[str]) -> str | None:
    """The name that a QEMU was given: ``-name NAME``, ``-name guest=NAME,…``; the last one counts.

    QEMU writes a comma inside a value as two (docs/system/invocation, ``-name``).
    """
    name = None
    for option, value in pairwise(arguments):
        if option not in ("-name", "--name"):
            continue
        for number, part in enumerate(value.replace(",,", "\0").split(",")):
            key, equals, text = part.partition("=")
            if (key == "guest" and equals) or (number == 0 and not equals):
                name = (text if equals else key).replace("\0", ",")
    return name or None


def _open_files(proc: str, prefix: str, *, opened: bool = False) -> tuple[dict[str, set[int]], int]:
    """Pids by file that begins with ``prefix``, and how many processes this user may not look into.

    :param opened: Leave out descriptors that only name a file (``O_PATH``), as udev has them of
        every new device.
    """
    nodes: dict[str, set[int]] = {}
    unseen = 0
    try:
        pids = [name for name in os.listdir(proc) if name.isdecimal()]
    except OSError:
        return nodes, unseen
    for pid in pids:
        directory = f"{proc}/{pid}/fd"
        try:
            descriptors = os.listdir(directory)
        except PermissionError:
            unseen += 1
            continue
        except OSError:
            continue  # it has ended
        for descriptor in descriptors:
            try:
                target = os.readlink(f"{directory}/{descriptor}")
            except OSError:
                continue  # closed meanwhile
            if target.startswith(prefix) and not (opened and _only_names(proc, pid, descriptor)):
                nodes.setdefault(target, set()).add(int(pid))
    return nodes, unseen


def _only_names(proc: str, pid: str, descriptor: str) -> bool:
    try:
        with open(f"{proc}/{pid}/fdinfo/{descriptor}", encoding="ascii") as file:
            flags = next(line.split()[1] for line in file if line.startswith("flags:"))
        return bool(int(flags, 8) & os.O_PATH)
    except (OSError, ValueError, StopIteration):
        return False  # it is not known: it may be open


def _holder(machine: Machine, pid: int) -> Holder:
    comm = _read(machine.path("proc", str(pid), "comm")).strip()
    return Holder(pid, comm or "?", guest_name(_arguments(machine, pid)))


def _arguments(machine: Machine, pid: int) -> list[str]:
    return _read(machine.path("proc", str(pid), "cmdline")).split("\0")


def _read(path: str) -> str:
    try:
        with open(path, "rb") as file:
            text = file.read(_CMDLINE_LIMIT).decode(errors="replace")
    except OSError:
        return ""  # it has ended
    return "".join(c if c.isprintable() or c == "\0" else "\ufffd" for c in text.rstrip("\n"))
