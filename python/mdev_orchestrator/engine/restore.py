# SPDX-License-Identifier: GPL-2.0-or-later
"""Brings back what was applied, after a reboot, and powers guests down before one.

mdevs and guests do not outlive the machine; the journal and the specs in it do. So nothing is
written before a shutdown, and to bring a spec back is to apply it again (:mod:`.apply`): managed
devices that are absent are created again as they were, with their UUIDs, and guests that do not run
are started.

At boot, drivers load at any time. A spec waits for what its own devices need and for nothing else:
for the parents that they were on, with their types, and for the devices that mdevctl starts by
itself. The kernel's events tell when to look; the scan is what counts.

udev runs one ``mdo restore`` for each parent, at the same time. All but one find the spec claimed,
wait, and then find nothing to do.
"""

from __future__ import annotations

import asyncio
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Mapping,
    Sequence,
)
from contextlib import aclosing, asynccontextmanager
from uuid import UUID

from msgspec import Struct, field

from mdev_orchestrator.engine import guest_ops
from mdev_orchestrator.engine.apply import apply, manual_pools, stored, unknown_spec
from mdev_orchestrator.engine.context import Context
from mdev_orchestrator.engine.diff import Changes
from mdev_orchestrator.engine.executor import Observer, ignore
from mdev_orchestrator.engine.journal import open_journal
from mdev_orchestrator.engine.journal_db import read_managed
from mdev_orchestrator.engine.records import Managed, SpecRecord
from mdev_orchestrator.engine.recovery import recover_abandoned
from mdev_orchestrator.errors import DeadlineError, HostError, MdoError
from mdev_orchestrator.host import sysfs
from mdev_orchestrator.host.events import (
    Event,
    MdevEvent,
    ParentEvent,
    Rescan,
    UdevMonitor,
    events,
    udev_monitor,
)
from mdev_orchestrator.host.readiness import wait_ready
from mdev_orchestrator.interop import mdevctl
from mdev_orchestrator.interop.mdevctl import Definition
from mdev_orchestrator.machine import Machine
from mdev_orchestrator.model import Host
from mdev_orchestrator.qemu import process
from mdev_orchestrator.qemu.process import RunningGuest
from mdev_orchestrator.qemu.stop import STOP_SECONDS

WAIT_SECONDS = 60.0
"""For parents to appear. A graphics card whose firmware is loaded takes half of it."""
CLAIM_SECONDS = 300.0
"""For another command that brings the same spec back and may have many guests to start."""
_AT_ONCE = 4
"""Specs; the steps of each are concurrent already."""


class Need(Struct, frozen=True, order=True):
    """What must be present before a spec can be brought back.

    :ivar parent: Name of a parent device.
    :ivar type: Id of a type that it must have.
    :ivar uuid: Of a device that mdevctl starts there; ``None`` for the type alone.
    """

    parent: str
    type: str
    uuid: UUID | None = None

    def lacks(self, host: Host) -> str:
        """Say what is missing; empty when it is present."""
        found = next((parent for parent in host.parents if parent.name == self.parent), None)
        if found is None:
            return f"parent {self.parent} has not appeared"
        if self.uuid is not None:
            if host.find(self.uuid) is None:
                return f"mdevctl has not started mdev {self.uuid} on {self.parent}"
        elif all(type_.id != self.type for type_ in found.types):
            return f"parent {self.parent} has appeared without type {self.type}"
        return ""

    def may_come_with(self, event: Event) -> bool:
        """Whether an event is a reason to look again."""
        match event:
            case Rescan():
                return True
            case ParentEvent(parent, registered):
                return registered and parent == self.parent
            case MdevEvent(uuid=uuid):
                return uuid == self.uuid
        return False


class Restored(Struct, frozen=True):
    """How one spec was brought back.

    :ivar changes: What was done; ``None`` if it could not be brought back.
    :ivar error: Why not; ``None`` if it is back.
    """

    name: str
    changes: Changes | None = None
    error: MdoError | None = None


async def restore(
    machine: Machine,
    names: Sequence[str] = (),
    *,
    wait: float = WAIT_SECONDS,
    observe: Observer = ignore,
    make_monitor: Callable[[], UdevMonitor] | None = None,
) -> tuple[Restored, ...]:
    """Bring back what was applied: each spec whole or not at all, independent of the others.

    :param names: The specs; all of them if empty.
    :param wait: Seconds to wait for what is not present yet.
    :param make_monitor: Makes a monitor of events; :func:`..host.events.udev_monitor` if not given.
    :return: In the order of their names. The error of a spec is in its entry and is not raised.
    :raise UnknownError: No spec of this name was applied.
    :raise HostError: The journal cannot be used.
    """
    managed = await _recovered(machine, observe)
    specs = _chosen(names, managed)
    defined = await asyncio.to_thread(mdevctl.defined, machine)

    async def bring_back(record: SpecRecord, needed: frozenset[Need]) -> Changes:
        for need in needed:
            if need.uuid is not None:  # a device is on the bus before it can be opened
                await wait_ready(machine, need.uuid, wait)
        return await apply(
            machine,
            stored(record),
            policy=record.policy,
            observe=observe,
            wait=CLAIM_SECONDS,
            booting=True,
        )

    waiting: dict[str, frozenset[Need]] = {}
    work = _Work(specs, waiting, bring_back)
    for name, record in specs.items():
        try:
            waiting[name] = needs(record, managed, defined)
        except MdoError as error:
            work.done[name] = Restored(name, error=error)
    async with asyncio.TaskGroup() as tasks:
        try:
            async with asyncio.timeout(wait), _scans(machine, waiting, make_monitor) as scans:
                async for found in scans:
                    work.begin(tasks, found)
                    if not waiting:
                        break
        except TimeoutError:
            work.give_up(tasks, await sysfs.scan(machine), wait)
        except HostError as error:  # no events: the specs that lack nothing come back nevertheless
            work.done |= {name: Restored(name, error=error) for name in waiting}
    return tuple(work.done[name] for name in specs)


async def _recovered(machine: Machine, observe: Observer) -> Managed:
    """Recover abandoned runs, and read what is managed then; nothing if no spec was applied."""
    if not (await asyncio.to_thread(read_managed, machine)).specs:
        return Managed()  # abandoned runs are left to a command that changes something
    async with open_journal(machine) as journal:
        await recover_abandoned(journal, Context(machine), observe)
        return await journal.read(journal.managed)


def _chosen(names: Sequence[str], managed: Managed) -> dict[str, SpecRecord]:
    for name in names:
        if name not in managed.specs:
            raise unknown_spec(name, managed)
    return {name: managed.specs[name] for name in sorted(names or managed.specs)}


class _Work(Struct):
    """Specs that are brought back, each as soon as it can be.

    :ivar waiting: What each spec needs that was not begun with yet.
    """

    specs: Mapping[str, SpecRecord]
    waiting: dict[str, frozenset[Need]]
    bring_back: Callable[[SpecRecord, frozenset[Need]], Awaitable[Changes]]
    done: dict[str, Restored] = field(default_factory=dict)
    places: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_AT_ONCE))

    def begin(self, tasks: asyncio.TaskGroup, found: Host) -> None:
        """Begin with every spec that lacks nothing."""
        ready = [name for name, needed in self.waiting.items() if not _lacking(needed, found)]
        for name in ready:
            tasks.create_task(self._one(name, self.waiting.pop(name)))

    def give_up(self, tasks: asyncio.TaskGroup, found: Host, wait: float) -> None:
        """Begin with the specs that lack nothing now, and fail the others."""
        self.begin(tasks, found)
        for name, needed in self.waiting.items():
            error = DeadlineError(
                f"spec {name} is not back after {wait:g} s: {'; '.join(_lacking(needed, found))}",
                f"see the kernel log for its driver; then mdo restore {name}",
            )
            self.done[name] = Restored(name, error=error)

    async def _one(self, name: str, needed: frozenset[Need]) -> None:
        try:
            async with self.places:
                self.done[name] = Restored(name, await self.bring_back(self.specs[name], needed))
        except MdoError as error:
            self.done[name] = Restored(name, error=error)


def needs(
    record: SpecRecord, managed: Managed, defined: Mapping[UUID, Sequence[Definition]]
) -> frozenset[Need]:
    """Find what a spec must wait for: parents of its devices, and devices that mdevctl starts.

    :raise RequestError: The spec cannot be read: the journal is damaged, or of another version.
    """
    document = stored(record)
    manual = manual_pools(document)
    rows = [device for device in managed.devices.values() if device.spec == record.name]
    created = {device.uuid for device in rows}
    by_mdevctl = (
        definition
        for _, _, asked in document.spec.devices()
        if asked.uuid is not None and asked.uuid not in created
        for definition in defined.get(asked.uuid, ())[:1]
        if definition.start == "auto"
    )
    where = (Need(device.parent, device.type) for device in rows if device.owner not in manual)
    return frozenset(where).union(
        Need(definition.parent, definition.type, definition.uuid) for definition in by_mdevctl
    )


def _lacking(needed: Collection[Need], host: Host) -> list[str]:
    words = (need.lacks(host) for need in sorted(needed, key=str))
    return list(dict.fromkeys(filter(None, words)))


@asynccontextmanager
async def _scans(
    machine: Machine,
    waiting: Mapping[str, Collection[Need]],
    make_monitor: Callable[[], UdevMonitor] | None,
) -> AsyncIterator[AsyncIterator[Host]]:
    """Give scans of the machine: one at once, then one after each event of something awaited.

    :param waiting: What is awaited; it is read at each event.
    """

    async def scans(stream: AsyncIterator[Event]) -> AsyncGenerator[Host, None]:
        yield await sysfs.scan(machine)
        async for event in stream:  # begins with a Rescan: nothing is missed in between
            if any(need.may_come_with(event) for needed in waiting.values() for need in needed):
                yield await sysfs.scan(machine)

    stream = events(make_monitor or (lambda: udev_monitor(machine)))
    async with aclosing(stream), aclosing(scans(stream)) as found:
        yield found


# ---------------------------------------------------------------- before a shutdown


class PoweredDown(Struct, frozen=True):
    """How one guest was powered down.

    :ivar how: As :class:`mdev_orchestrator.qemu.stop.Ended` has it; empty if it still runs.
    """

    name: str
    how: str = ""
    error: MdoError | None = None


async def power_down(
    machine: Machine,
    *,
    deadline: float = STOP_SECONDS,
    force: bool = False,
) -> tuple[PoweredDown, ...]:
    """Power down every guest of the state directory that runs, all at the same time.

    Their records and those of their devices stay, so :func:`restore` starts them again. Nothing is
    written to the journal: a shutdown must not wait for a disk that is full.

    :param deadline: Seconds for all of them.
    :param force: End those that do not power down in time.
    """

    async def one(guest: RunningGuest) -> PoweredDown:
        try:
            ended = await guest_ops.end(machine, guest, deadline=deadline, force=force)
        except MdoError as error:
            return PoweredDown(guest.name, error=error)
        return PoweredDown(guest.name, ended.how)

    guests = await asyncio.to_thread(process.list_guests, machine)
    return tuple(await asyncio.gather(*(one(guest) for guest in guests if guest.alive)))
