# SPDX-License-Identifier: GPL-2.0-or-later
"""Makes specs true, removes what they brought, and previews it: apply, destroy, diff and plan."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec

from mdev_orchestrator.capacity.planner import Policy
from mdev_orchestrator.engine import diff as differ
from mdev_orchestrator.engine import model_cache
from mdev_orchestrator.engine.context import Context
from mdev_orchestrator.engine.diff import Changes, Preview
from mdev_orchestrator.engine.executor import Observer, ignore
from mdev_orchestrator.engine.journal import CLAIM_SECONDS
from mdev_orchestrator.engine.journal_db import read_managed
from mdev_orchestrator.engine.operation import Operation, Plan, perform
from mdev_orchestrator.engine.records import Managed, SpecRecord
from mdev_orchestrator.engine.snapshot import ObservedState, take_snapshot
from mdev_orchestrator.engine.step_order import StepOptions
from mdev_orchestrator.errors import CapacityError, RequestError, UnknownError, UuidError
from mdev_orchestrator.host import sysfs
from mdev_orchestrator.host.holders import find_holders
from mdev_orchestrator.machine import Machine
from mdev_orchestrator.model import Host
from mdev_orchestrator.qemu.stop import STOP_SECONDS
from mdev_orchestrator.spec import Document, parse, to_json

_LISTED = 4  # names in one message


async def preview(machine: Machine, document: Document, *, policy: Policy = "pack") -> Preview:
    """Find where the devices of a spec would go; changes nothing, and asks no guest.

    :raise RequestError: With file and line: it cannot be had.
    :raise MisfitError: The devices do not fit; it has the plan too.
    """
    managed = await asyncio.to_thread(read_managed, machine)
    observed = await take_snapshot(machine, managed, ())

    def find() -> Preview:
        capacity = model_cache.capacities(machine)
        return differ.preview(document, observed, policy=policy, capacity=capacity)

    return await asyncio.to_thread(find)  # the planner may search for a second


async def diff(machine: Machine, document: Document, *, policy: Policy = "pack") -> Changes:
    """Find what :func:`apply` would do; changes nothing.

    :raise RequestError: With file and line: it cannot be had.
    :raise MdoError: A guest of the spec does not answer.
    """
    managed = await asyncio.to_thread(read_managed, machine)
    observed = await take_snapshot(machine, managed, _guests_of(document, managed))
    return await _compare(machine, document, observed, policy=policy)


async def _compare(
    machine: Machine,
    document: Document,
    observed: ObservedState,
    *,
    policy: Policy,
    options: StepOptions | None = None,
) -> Changes:
    """Find the steps, in a thread as :func:`preview` does."""

    def compare() -> Changes:
        capacity = model_cache.capacities(machine)
        return differ.diff(document, observed, policy=policy, options=options, capacity=capacity)

    return await asyncio.to_thread(compare)


async def apply(
    machine: Machine,
    document: Document,
    *,
    policy: Policy = "pack",
    restart: bool = False,
    force: bool = False,
    deadline: float | None = None,
    wait: float = CLAIM_SECONDS,
    booting: bool = False,
    observe: Observer = ignore,
) -> Changes:
    """Make a spec true, all of it or nothing; where it is true already, do nothing.

    :param restart: Whether guests may be restarted.
    :param force: End guests that do not power down in time, or do not answer.
    :param deadline: Seconds for each step; each kind of step has a default.
    :param wait: Seconds to wait for another command that changes the same spec.
    :param booting: Leave pools alone that do not come back after a reboot by themselves.
    :return: What was done.
    :raise RequestError: With file and line: it cannot be had; or a guest must be restarted.
    :raise BusyError: Another command changes something of it.
    :raise HostError: The journal cannot be used; nothing was done.
    :raise MdoError: A step failed, and all was undone; what could not be is in its notes.
    """
    context = _context(machine, deadline)
    before: list[Host] = []

    async def look(managed: Managed) -> Plan[Changes]:
        names = _guests_of(document, managed)
        observed = await take_snapshot(machine, managed, names, force=force)
        before[:] = [observed.host]
        asked, observed = _at_boot(document, observed) if booting else (document, observed)
        options = StepOptions(force, deadline)
        changes = await _compare(machine, asked, observed, policy=policy, options=options)
        if changes.restarts and not restart:
            words = "; ".join(f"guest {guest}: {why}" for guest, why in changes.restarts.items())
            raise RequestError(
                f"{document.source}: needs a restart: {words}",
                "--restart restarts what must be",
            )
        record = SpecRecord(
            name=document.name,
            text=to_json(document.spec),
            source=_absolute(document.source),
            applied=round(time.time(), 3),
            policy=policy,
        )
        old = managed.specs.get(document.name)
        if changes.nothing and old is not None and _same(old, record):
            return Plan(changes)
        return Plan(changes, changes.steps, changes.change, {document.name: record})

    operation = Operation(
        kind="apply",
        title=document.name,
        look=look,
        claims=[f"spec:{document.name}"],
        wait=wait,
    )
    async with _other_programs(machine, before):
        changes = await perform(operation, context, observe=observe)
    if changes.steps:
        await model_cache.learn_from(machine, before[0], plan=changes.plan)
    return changes


def _guests_of(document: Document, managed: Managed) -> set[str]:
    """The guests that matter for a spec: those that it names, and those that it has brought."""
    named = {guest.name for guest in document.spec.guests}
    return named | {g.name for g in managed.guests.values() if g.spec == document.name}


def _at_boot(document: Document, observed: ObservedState) -> tuple[Document, ObservedState]:
    """Leave out the pools that a user brings back by hand, and what is known of their devices."""
    manual = manual_pools(document)
    pools = tuple(p for p in document.spec.pools if f"pool:{p.name}" not in manual)
    devices = {
        uuid: device
        for uuid, device in observed.managed.devices.items()
        if device.spec != document.name or device.owner not in manual
    }
    spec = msgspec.structs.replace(document.spec, pools=pools)
    managed = msgspec.structs.replace(observed.managed, devices=devices)
    return Document(spec, document.source), msgspec.structs.replace(observed, managed=managed)


def manual_pools(document: Document) -> frozenset[str]:
    """The owners of devices that a user brings back by hand after a reboot."""
    return frozenset(f"pool:{p.name}" for p in document.spec.pools if p.start == "manual")


@contextlib.asynccontextmanager
async def _other_programs(machine: Machine, before: list[Host]) -> AsyncIterator[None]:
    """Note on an error what other programs have created since the machine was looked at."""
    try:
        yield
    except (CapacityError, UuidError) as error:
        if not before:
            raise
        now = (await sysfs.scan(machine, types=False)).mdevs
        held = await find_holders(machine, now)
        managed = await asyncio.to_thread(read_managed, machine)
        known = {mdev.uuid for mdev in before[0].mdevs} | managed.devices.keys()
        for mdev in [m for m in now if m.uuid not in known][:_LISTED]:
            holders = ", ".join(map(str, held.of(mdev.uuid)))
            error.add_note(
                f"meanwhile another program created mdev {mdev.uuid} ({mdev.type_id} on "
                f"{mdev.parent})" + (f", which is held by {holders}" if holders else "")
            )
        raise


async def destroy(
    machine: Machine,
    name: str,
    *,
    force: bool = False,
    deadline: float = STOP_SECONDS,
    observe: Observer = ignore,
) -> Changes:
    """Remove all that a spec has brought: its guests and devices. All of it, or nothing.

    :param force: End guests that do not power down in time, or do not answer.
    :param deadline: Seconds for a guest to power down.
    :raise UnknownError: No spec of this name was applied.
    :raise MdoError: A step failed, and all was undone; what could not be is in its notes.
    """
    options = StepOptions(force, deadline)

    async def look(managed: Managed) -> Plan[Changes]:
        if name not in managed.specs:
            raise unknown_spec(name, managed)
        names = {guest.name for guest in managed.guests.values() if guest.spec == name}
        observed = await take_snapshot(machine, managed, names, force=force)
        changes = differ.without(name, observed, options)
        return Plan(changes, changes.steps, changes.change, {name: None})

    operation = Operation(
        kind="destroy",
        title=name,
        look=look,
        claims=[f"spec:{name}"],
        ends_things=force,
    )
    return await perform(operation, _context(machine, None), observe=observe)


def unknown_spec(name: str, managed: Managed) -> UnknownError:
    """Say that no spec of a name was applied, and which were."""
    known = ", ".join(managed.specs)
    return UnknownError(f"no spec {name} was applied", f"there are: {known}" if known else "")


def stored(record: SpecRecord) -> Document:
    """Return a spec as it was applied.

    :raise RequestError: The journal is damaged.
    """
    document = parse(record.text, record.source, kind="json")
    named = msgspec.structs.replace(document.spec, name=record.name)
    return Document(named, record.source)


def _context(machine: Machine, deadline: float | None) -> Context:
    return Context(machine) if deadline is None else Context(machine, deadline)


def _absolute(source: str) -> str:
    return str(Path(source).absolute()) if Path(source).exists() else source


def _same(old: SpecRecord, new: SpecRecord) -> bool:
    return (old.text, old.source, old.policy) == (new.text, new.source, new.policy)
