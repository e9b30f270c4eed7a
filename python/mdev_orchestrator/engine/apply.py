# SPDX-License-Identifier: GPL-2.0-or-later
"""Makes specs true, and takes them back: what ``mdo apply``, ``diff`` and ``destroy`` do.

>>> import asyncio
>>> from mdev_orchestrator.engine.apply import apply
>>> from mdev_orchestrator.spec import load
>>> asyncio.run(apply(load("lab.toml")))  # doctest: +SKIP

Every function here that changes something first recovers what an earlier command left open.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec

from mdev_orchestrator.capacity.planner import Policy
from mdev_orchestrator.engine import diff as differ
from mdev_orchestrator.engine import lifecycle, model_cache
from mdev_orchestrator.engine.context import Context
from mdev_orchestrator.engine.diff import Changes, ObservedState, Running
from mdev_orchestrator.engine.executor import Observer, execute, ignore
from mdev_orchestrator.engine.journal import CLAIM_SECONDS, Journal, Run
from mdev_orchestrator.engine.journal_db import Managed, SpecRecord, read_managed
from mdev_orchestrator.engine.recovery import recover
from mdev_orchestrator.engine.steps import Create
from mdev_orchestrator.errors import (
    CapacityError,
    MdoError,
    RequestError,
    UnknownError,
    UuidError,
)
from mdev_orchestrator.host import sysfs
from mdev_orchestrator.host.holders import holders
from mdev_orchestrator.host.sysfs import ROOT
from mdev_orchestrator.interop import mdevctl
from mdev_orchestrator.machine import Machine
from mdev_orchestrator.model import Host
from mdev_orchestrator.qemu import hotplug, process
from mdev_orchestrator.qemu.process import RunningGuest
from mdev_orchestrator.spec import Document, to_json

_LISTED = 4  # names in one message


async def diff(
    document: Document,
    *,
    policy: Policy = "pack",
    host: Path = ROOT,
    guests: Path | None = None,
    journal: Path | None = None,
) -> Changes:
    """Find what :func:`apply` would do; changes nothing.

    :param host: Directory in which ``sys``, ``dev`` and ``proc`` stand.
    :param guests: Where guests live; the state directory's without it.
    :param journal: The journal's file; the state directory's without it.
    :raise RequestError: With file and line: it cannot be had.
    """
    seen = await look(read_managed(journal), host=host, guests=guests)
    return differ.diff(document, seen, policy=policy, capacity=model_cache.capacities)


async def apply(
    document: Document,
    *,
    policy: Policy = "pack",
    restart: bool = False,
    force: bool = False,
    host: Path = ROOT,
    guests: Path | None = None,
    journal: Path | None = None,
    deadline: float | None = None,
    wait: float = CLAIM_SECONDS,
    booting: bool = False,
    observe: Observer = ignore,
) -> Changes:
    """Make a spec true, all of it or nothing; where it is true already, do nothing.

    :param restart: Whether guests may be restarted.
    :param force: End guests that do not power down in time.
    :param deadline: Seconds for each device to be made or removed.
    :param wait: Seconds to wait for another command that changes the same spec.
    :param booting: Leave pools alone that do not come back after a reboot by themselves.
    :return: What was done.
    :raise RequestError: With file and line: it cannot be had; or a guest must be restarted.
    :raise BusyError: Another command changes something of it.
    :raise HostError: The journal cannot be used; nothing was done.
    :raise MdoError: A step failed, and all was undone; what could not be is in its notes.
    """
    context = _context(host, guests, deadline)
    name = document.name
    with Journal.open(journal) as book:
        await recover(book, context=context, observe=observe)
        async with _alone(book, "apply", name, wait) as run:
            seen = await look(book.owned(), host=host, guests=guests)
            asked, seen = _at_boot(document, seen) if booting else (document, seen)
            changes = differ.diff(
                asked, seen, policy=policy, force=force, capacity=model_cache.capacities
            )
            if changes.restarts and not restart:
                words = "; ".join(
                    f"guest {guest}: {why}" for guest, why in changes.restarts.items()
                )
                raise RequestError(
                    f"{document.source}: needs a restart: {words}",
                    "--restart restarts what must be",
                )
            own = SpecRecord(
                name=name,
                text=to_json(document.spec),
                source=_absolute(document.source),
                applied=round(time.time(), 3),
                policy=policy,
            )
            old = seen.owned.specs.get(name)
            if changes.nothing and old is not None and _same(old, own):
                return changes
            with _winners(seen.host, changes, host):
                await execute(
                    book,
                    "apply",
                    name,
                    changes.steps,
                    context,
                    run=run,
                    change=changes.change,
                    specs={name: own},
                    observe=observe,
                )
    model_cache.learn_from(seen.host, host, plan=changes.plan)
    return changes


def _at_boot(document: Document, seen: ObservedState) -> tuple[Document, ObservedState]:
    """A spec without the pools that are made by hand, and what is seen without their devices."""
    manual = manual_pools(document)
    pools = tuple(p for p in document.spec.pools if f"pool:{p.name}" not in manual)
    devices = {
        uuid: device
        for uuid, device in seen.owned.devices.items()
        if device.spec != document.name or device.owner not in manual
    }
    spec = msgspec.structs.replace(document.spec, pools=pools)
    owned = msgspec.structs.replace(seen.owned, devices=devices)
    return Document(spec, document.source), msgspec.structs.replace(seen, owned=owned)


def manual_pools(document: Document) -> frozenset[str]:
    """The owners whose devices do not come back after a reboot by themselves."""
    return frozenset(f"pool:{p.name}" for p in document.spec.pools if p.start == "manual")


@contextlib.asynccontextmanager
async def _alone(
    book: Journal, kind: str, name: str, wait: float = CLAIM_SECONDS
) -> AsyncIterator[Run]:
    """A run that has its spec to itself, from before the machine is looked at."""
    run = await book.begin(kind, name, (), [f"spec:{name}"], wait=wait)
    try:
        yield run
    except asyncio.CancelledError as error:
        if not book.has_steps(run):
            error.add_note("nothing was changed")
        raise
    finally:
        # one that has steps has come to its end, or stays open for recovery
        if not book.has_steps(run):
            await book.end(run, "done")


@contextlib.contextmanager
def _winners(before: Host, changes: Changes, root: Path) -> Iterator[None]:
    """Say who was quicker, when what fitted does not fit any more."""
    try:
        yield
    except (CapacityError, UuidError) as error:
        made = {p.step.device.uuid for p in changes.steps if isinstance(p.step, Create)}
        now = sysfs.scan(root).mdevs
        held = holders(now, root)
        known = {mdev.uuid for mdev in before.mdevs}
        for mdev in [m for m in now if m.uuid not in known and m.uuid not in made][:_LISTED]:
            who = ", ".join(map(str, held.of(mdev.uuid)))
            error.add_note(
                f"meanwhile somebody else created mdev {mdev.uuid} ({mdev.type_id} on "
                f"{mdev.parent})" + (f", which is held by {who}" if who else "")
            )
        raise


async def destroy(
    name: str,
    *,
    force: bool = False,
    host: Path = ROOT,
    guests: Path | None = None,
    journal: Path | None = None,
    deadline: float = process.STOP_SECONDS,
    observe: Observer = ignore,
) -> Changes:
    """Remove all that a spec has brought: its guests and devices. All of it, or nothing.

    :param force: End guests that do not power down in time.
    :param deadline: Seconds for a guest to power down.
    :raise UnknownError: No spec of this name was applied.
    :raise MdoError: A step failed, and all was undone; what could not be is in its notes.
    """
    context = _context(host, guests, None)
    with Journal.open(journal) as book:
        await recover(book, context=context, observe=observe)
        async with _alone(book, "destroy", name) as run:
            seen = await look(book.owned(), host=host, guests=guests)
            if name not in seen.owned.specs:
                known = ", ".join(seen.owned.specs)
                raise UnknownError(
                    f"no spec {name} was applied", f"there are: {known}" if known else ""
                )
            changes = differ.without(name, seen, force=force, deadline=deadline)
            await execute(
                book,
                "destroy",
                name,
                changes.steps,
                context,
                run=run,
                change=changes.change,
                specs={name: None},
                observe=observe,
            )
    return changes


async def look(owned: Managed, *, host: Path = ROOT, guests: Path | None = None) -> ObservedState:
    """Look at the machine: devices, and the guests that run."""
    await lifecycle.reclaim_groups(root=guests, host=host)
    alive = [guest for guest in process.list_guests(guests) if guest.alive]
    found = await asyncio.gather(*(_running(guest) for guest in alive))
    running = {guest.name: one for guest, one in zip(alive, found, strict=True) if one}
    return ObservedState(sysfs.scan(host), owned, running, mdevctl.defined(Machine(host)))


async def _running(guest: RunningGuest) -> Running | None:
    """What a guest has, by its own monitor for questions."""
    from mdev_orchestrator.qemu.monitor import connect

    if guest.record is None:
        return None
    try:
        async with connect(guest.query_socket, guest.label, deadline=hotplug.QUERY_SECONDS) as qmp:
            mdevs = await hotplug.mdevs(qmp)
            ports = await hotplug.ports(qmp)
    except MdoError as error:
        if not process.find(guest.name, guest.directory.parent).alive:
            return None  # it ended while it was asked
        raise MdoError(
            f"{guest.label} cannot be asked what it has: {error.message}", error.hint
        ) from error
    uuids = tuple(plugged.uuid for plugged in mdevs)
    return Running(guest.record.uuid, uuids, sum(port.occupant is None for port in ports))


def stored(own: SpecRecord) -> Document:
    """A spec as it was applied.

    :raise RequestError: The journal is damaged.
    """
    from mdev_orchestrator.spec import parse

    document = parse(own.text, own.source, kind="json")
    named = msgspec.structs.replace(document.spec, name=own.name)
    return Document(named, own.source)


def _context(host: Path, guests: Path | None, deadline: float | None) -> Context:
    context = Context(host=host, guests=guests)
    if deadline is not None:
        context.deadline = deadline
    return context


def _absolute(source: str) -> str:
    return str(Path(source).absolute()) if Path(source).exists() else source


def _same(old: SpecRecord, new: SpecRecord) -> bool:
    return (old.text, old.source, old.policy) == (new.text, new.source, new.policy)
