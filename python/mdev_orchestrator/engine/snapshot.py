# SPDX-License-Identifier: GPL-2.0-or-later
"""What apply, plan and destroy see of the machine before they decide anything."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence
from uuid import UUID

from msgspec import Struct, field

from mdev_orchestrator.engine.guest_ops import is_alive
from mdev_orchestrator.engine.records import Managed
from mdev_orchestrator.engine.start_groups import reclaim_groups
from mdev_orchestrator.errors import MdoError
from mdev_orchestrator.host import sysfs
from mdev_orchestrator.interop import mdevctl
from mdev_orchestrator.interop.mdevctl import Definition
from mdev_orchestrator.machine import Machine
from mdev_orchestrator.model import Host
from mdev_orchestrator.qemu import hotplug, process
from mdev_orchestrator.qemu.process import RunningGuest


class ObservedGuest(Struct, frozen=True):
    """A guest whose process is alive.

    :ivar mdevs: What it has now, as its QEMU says; what it was started with if QEMU does not say.
    :ivar free_ports: Root ports without a device.
    :ivar silent: Why its QEMU does not say; empty if it does.
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

    :param names: Guests that a spec names, beside the managed ones of that spec. Other guests are
        not asked: one whose QEMU hangs is no reason to refuse a spec that does not name it.
    :param force: Take a guest that does not answer as it was started; otherwise it is an error.
    :raise MdoError: A guest that matters cannot be asked what it has.
    """
    await reclaim_groups(machine)
    alive = [guest for guest in process.list_guests(machine) if guest.alive]
    host = await sysfs.scan(machine)
    running: dict[str, ObservedGuest] = {}
    for guest in alive:
        if guest.name not in names and guest.record is not None:
            running[guest.name] = ObservedGuest(guest.record.uuid, tuple(guest.record.mdevs))
    asked = [guest for guest in alive if guest.name in names]
    # errors are values here: no task fails, so none is left running
    found = await asyncio.gather(*(_ask(machine, guest) for guest in asked))
    for guest, answer in zip(asked, found, strict=True):
        if not isinstance(answer, MdoError):
            observed = answer
        elif force:
            observed = _as_started(guest, answer.message)
        else:
            raise MdoError(
                f"{guest.label} cannot be asked what it has: {answer.message}",
                f"mdo guest stop --force {guest.name} ends it, if it does not come back",
                subject=guest.label,
            )
        if observed is not None:
            running[guest.name] = observed
    return ObservedState(host, managed, running, mdevctl.defined(machine))


async def _ask(machine: Machine, guest: RunningGuest) -> ObservedGuest | MdoError | None:
    """What a guest has, by its own monitor for questions; ``None`` if it has ended meanwhile."""
    from mdev_orchestrator.qemu.monitor import connect

    if guest.record is None:
        return None
    try:
        async with connect(guest.query_socket, guest.label, deadline=hotplug.QUERY_SECONDS) as qmp:
            mdevs = await hotplug.mdevs(qmp)
            ports = await hotplug.ports(qmp)
    except MdoError as error:
        return error if is_alive(machine, guest.name) else None
    uuids = tuple(plugged.uuid for plugged in mdevs)
    return ObservedGuest(guest.record.uuid, uuids, sum(port.occupant is None for port in ports))


def _as_started(guest: RunningGuest, why: str) -> ObservedGuest | None:
    if guest.record is None:
        return None
    return ObservedGuest(guest.record.uuid, tuple(guest.record.mdevs), silent=why)
