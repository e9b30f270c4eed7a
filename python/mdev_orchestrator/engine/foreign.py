# SPDX-License-Identifier: GPL-2.0-or-later
"""Guests that mdo did not start: domains of libvirt, and other QEMUs that have an mdev open.

They are seen from outside only, in ``/proc`` and in what libvirt writes down: no monitor of theirs
is opened.
"""

from __future__ import annotations

import asyncio
from uuid import UUID

from msgspec import Struct

from mdev_orchestrator.host import sysfs
from mdev_orchestrator.host.doctor import Finding
from mdev_orchestrator.host.holders import Holder, guest_of, read_holders
from mdev_orchestrator.interop import libvirt
from mdev_orchestrator.interop.libvirt import Domain
from mdev_orchestrator.machine import Machine
from mdev_orchestrator.qemu import process

LIBVIRT = "libvirt"
_QEMU = "qemu"
"""How the short name of a QEMU begins, unless it was renamed."""


class ForeignGuest(Struct, frozen=True):
    """A QEMU that mdo did not start.

    :ivar name: What its QEMU was told; ``None`` if it was told nothing.
    :ivar manager: The program that runs it; ``None`` if that is not known.
    :ivar mdevs: Those that its process has open.
    :ivar stopped: Whether it is stopped by a signal or a debugger.
    """

    name: str | None
    uuid: UUID | None
    pid: int
    manager: str | None
    mdevs: tuple[UUID, ...] = ()
    stopped: bool = False


async def foreign_guests(machine: Machine) -> tuple[ForeignGuest, ...]:
    """Look for guests that mdo did not start, in a thread; by name."""
    return await asyncio.to_thread(_foreign_guests, machine)


def _foreign_guests(machine: Machine) -> tuple[ForeignGuest, ...]:
    mdevs: dict[int, list[UUID]] = {domain.pid: [] for domain in domains(machine)}
    managed = {*mdevs}
    held = read_holders(machine, sysfs.read_host(machine, types=False).mdevs)
    for uuid, holders in sorted(held.by_mdev.items()):
        for holder in filter(_is_qemu, holders):
            mdevs.setdefault(holder.pid, []).append(uuid)
    guests = process.list_guests(machine)
    known = {guest.record.pid for guest in guests if guest.record is not None}
    # the process of one that is just being started is not written down yet
    starting = {guest.name for guest in guests if guest.record is None}
    found = []
    for pid in mdevs.keys() - known:
        name, own = guest_of(machine, pid)
        if name in starting and pid not in managed:
            continue
        manager = LIBVIRT if pid in managed else None
        stopped = process.is_process_stopped(pid, machine.path("proc"))
        found.append(ForeignGuest(name, own, pid, manager, tuple(mdevs[pid]), stopped))
    return tuple(sorted(found, key=lambda guest: (guest.name or "", guest.pid)))


def _is_qemu(holder: Holder) -> bool:
    return holder.guest is not None or holder.comm.startswith(_QEMU)


def domains(machine: Machine) -> list[Domain]:
    """The domains of libvirt that run; reads the command line of each, so it is for a thread."""
    found = []
    for pid, name in libvirt.processes(machine).items():
        called, uuid = guest_of(machine, pid)
        if called == name and uuid is not None:  # or the number is another process's by now
            found.append(Domain(name, uuid, pid))
    return found


def examine(machine: Machine) -> tuple[Finding, ...]:
    """Say whether domains of libvirt can be given devices; nothing where there is no libvirt."""
    if not libvirt.is_there(machine):
        return ()
    if libvirt.is_installed():
        return (Finding("ok", LIBVIRT, "its Python binding is there: domains can get devices"),)
    words = "its Python binding is not there: domains cannot be given devices"
    return (Finding("warning", LIBVIRT, words, libvirt.INSTALL),)


async def find_domain(machine: Machine, name: str) -> Domain | None:
    """The domain of a name, if it runs and mdo has no guest of that name."""
    return await asyncio.to_thread(_find_domain, machine, name)


def _find_domain(machine: Machine, name: str) -> Domain | None:
    if name in {guest.name for guest in process.list_guests(machine)}:
        return None
    return next((domain for domain in domains(machine) if domain.name == name), None)


async def running_domain(machine: Machine, uuid: UUID) -> Domain | None:
    """The domain of a UUID, if it runs."""
    found = await asyncio.to_thread(domains, machine)
    return next((domain for domain in found if domain.uuid == uuid), None)
