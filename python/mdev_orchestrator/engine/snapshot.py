# SPDX-License-Identifier: GPL-2.0-or-later
"""What apply, plan and destroy see of the machine before they decide anything."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence
from uuid import UUID

from msgspec import Struct, field

from mdev_orchestrator.engine.records import Managed
from mdev_orchestrator.engine.start_groups import reclaim_groups
from mdev_orchestrator.errors import DeadlineError, MdoError, Outcome, QemuError
from mdev_orchestrator.host import sysfs
from mdev_orchestrator.interop import mdevctl
from mdev_orchestrator.interop.mdevctl import Definition
from mdev_orchestrator.machine import Machine
from mdev_orchestrator.model import Host
from mdev_orchestrator.qemu import hotplug, process
from mdev_orchestrator.qemu.process import ProcessRecord, RunningGuest

_ASK_SECONDS = 10.0
"""For one guest to say what it has; a QEMU that is stopped is known without asking."""
_AT_ONCE = 4
"""Guests that are asked at the same time: more only make every one of them late."""
_ENDING_SECONDS = 1.0
"""For a guest to end whose monitor has hung up: a process that ends closes its sockets first."""


class ObservedGuest(Struct, frozen=True):
    """A guest whose process is alive.

    :ivar mdevs: What it has now, as its QEMU says; what it was started with if it was not asked or
        does not answer.
    :ivar free_ports: Root ports without a device.
    :ivar silent: Why its QEMU does not answer; empty if it does.
    """

    uuid: UUID
    mdevs: tuple[UUID, ...] = ()
    free_ports: int = 0
    silent: str = ""


class ObservedState(Struct, frozen=True):
    """All that a diff depends on beside the spec.

    :ivar running: The guests of this state directory that run, by name.
    :ivar defined: mdevctl's definitions. They say what a device is of which the spec gives the UUID
        only, and a guest may be given such a device though it is not managed here.
    """

    host: Host
    managed: Managed = field(default_factory=Managed)
    running: Mapping[str, ObservedGuest] = field(default_factory=dict)
    defined: Mapping[UUID, Sequence[Definition]] = field(default_factory=dict)


async def take_snapshot(
    machine: Machine, managed: Managed, names: Collection[str], *, force: bool = False
) -> ObservedState:
    """Look at the devices of a machine, and ask the guests that matter.

    :param names: Guests that are asked what they have: those that a spec names or has brought. A
        QEMU that hangs is no reason to refuse a spec that does not name its guest.
    :param force: Take a guest that does not answer as it was started; otherwise it is an error.
    :raise DeadlineError: A guest that matters does not answer in time.
    :raise QemuError: It answers nonsense.
    """
    await reclaim_groups(machine)
    guests = await asyncio.to_thread(process.list_guests, machine)
    host = await sysfs.scan(machine)
    defined = await asyncio.to_thread(mdevctl.defined, machine)
    alive = [(guest, guest.record) for guest in guests if guest.alive and guest.record is not None]
    running = {
        guest.name: _as_started(record) for guest, record in alive if guest.name not in names
    }
    asked = [(guest, record) for guest, record in alive if guest.name in names]
    places = asyncio.Semaphore(_AT_ONCE)

    async def ask(guest: RunningGuest, record: ProcessRecord) -> ObservedGuest | MdoError | None:
        async with places:
            return await _ask(guest, record)

    # errors are values here: no task fails, so none is left running
    answers = await asyncio.gather(*(ask(guest, record) for guest, record in asked))
    for (guest, record), answer in zip(asked, answers, strict=True):
        if isinstance(answer, ObservedGuest):
            running[guest.name] = answer
        elif isinstance(answer, MdoError):
            if not force:
                raise answer
            running[guest.name] = _as_started(record, answer.message)
    return ObservedState(host, managed, running, defined)


async def _ask(guest: RunningGuest, record: ProcessRecord) -> ObservedGuest | MdoError | None:
    """Ask a guest what it has, by its monitor for questions.

    :return: ``None`` if it has ended meanwhile.
    """
    from mdev_orchestrator.qemu.monitor import connect

    if process.is_stopped(guest):
        return _silent(guest, "its QEMU is stopped (SIGSTOP)", f"kill -CONT {record.pid}", None)
    end = asyncio.get_running_loop().time() + _ASK_SECONDS
    try:
        async with connect(guest.query_socket, guest.label, deadline=None, end=end) as qmp:
            mdevs = await hotplug.mdevs(qmp)
            ports = await hotplug.ports(qmp)
    except MdoError as error:
        if await process.wait_ended(guest, _ENDING_SECONDS):
            return None
        why = error.message.removeprefix(f"{guest.label}: ")
        return _silent(guest, why, error.hint, error)
    uuids = tuple(plugged.uuid for plugged in mdevs)
    return ObservedGuest(record.uuid, uuids, sum(port.occupant is None for port in ports))


def _silent(guest: RunningGuest, why: str, remedy: str, cause: MdoError | None) -> MdoError:
    """Say that a guest does not answer, and what helps."""
    kind = DeadlineError if cause is None or isinstance(cause, DeadlineError) else QemuError
    error = kind(
        f"{guest.label} cannot be asked what it has: {why}",
        "; ".join(filter(None, (remedy, f"mdo guest stop --force {guest.name} ends it"))),
        outcome=Outcome.NO_EFFECT,
        subject=guest.label,
    )
    error.__cause__ = cause
    return error


def _as_started(record: ProcessRecord, why: str = "") -> ObservedGuest:
    """Return a guest as it was started.

    :param why: Why it does not answer; empty if it was not asked.
    """
    return ObservedGuest(record.uuid, tuple(record.mdevs), silent=why)
