# SPDX-License-Identifier: GPL-2.0-or-later
"""After a crash: what stands open is undone or finished, so that it is all or nothing.

A run is open when its process has gone before its end. Which way it goes:

* a ``destroy`` or ``detach`` that had not begun to undo itself is *finished*: what was asked to go
  shall go. When that cannot be (a guest does not power down), it is undone like the others;
* every other run is *undone*: all that it did, and all that it may have done;
* a run of an earlier boot has nothing left to undo: mdevs and guests do not outlive the machine.
  Only what is ours becomes again what it was before, so that it can be brought back.

And a device that no spec asks for and that is gone is forgotten: nobody will bring it back.

Recovering is itself a crash away from being recovered: each undo is written down like each deed,
and can be done twice. Two recoveries never take the same run: the journal gives it to one of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal
from uuid import UUID

from msgspec import Struct

from mdev_orchestrator.engine import executor
from mdev_orchestrator.engine.context import Context
from mdev_orchestrator.engine.executor import Observer, ignore
from mdev_orchestrator.engine.journal import Entry, Journal, Progress, Run
from mdev_orchestrator.engine.journal_db import Change, DeviceRecord, GuestRecord, Managed
from mdev_orchestrator.engine.lifecycle import machine_of
from mdev_orchestrator.engine.steps import AnyStep, decode
from mdev_orchestrator.errors import MdoError, RequestError, UnknownError
from mdev_orchestrator.host import sysfs
from mdev_orchestrator.host.sysfs import ROOT
from mdev_orchestrator.model import Host, is_uuid, parse_uuid
from mdev_orchestrator.qemu import hotplug, process
from mdev_orchestrator.system.processes import boot_id

FORWARD = frozenset(("destroy", "detach"))
"""Kinds of runs that are finished, not undone."""
_BEGUN = frozenset((Progress.ACTING, Progress.DONE, Progress.UNDOING, Progress.STUCK))
_TURNED = frozenset((Progress.FAILED, Progress.UNDOING, Progress.UNDONE, Progress.STUCK))


class Recovered(Struct, frozen=True):
    """What became of one open run.

    :ivar way: ``undo``, ``finish``, or ``forget`` for one of an earlier boot.
    :ivar steps: What had been begun, in words.
    :ivar errors: Why it still stands open; empty when it is closed.
    :ivar why: What kept it from being finished, so that it was undone; empty otherwise.
    """

    run: Run
    way: Literal["undo", "finish", "forget"]
    steps: tuple[str, ...] = ()
    errors: tuple[MdoError, ...] = ()
    why: str = ""


def pending(journal: Journal) -> list[Recovered]:
    """What :func:`recover` would do; runs that are at work just now are left out."""
    return [
        Recovered(run, _way(run, entries), tuple(str(step) for step in _begun(entries)))
        for run in journal.open_runs()
        if not journal.is_at_work(run)
        for entries in [journal.steps(run)]
    ]


async def recover(
    journal: Journal, *, context: Context, observe: Observer = ignore, again: bool = False
) -> list[Recovered]:
    """Undo or finish all that stands open and is nobody's any more.

    Never raises for a step that cannot be undone: it is told in the answer, and stays open.

    :param again: Whether to try again what could not be undone before. Only who asks for it should
        wait for that; other commands can do without the objects of such a run.
    :raise HostError: The journal is damaged or cannot be written.
    """
    done = []
    # the newest first: a later run may rest upon what an earlier one did
    for found in reversed(journal.open_runs()):
        if journal.is_at_work(found):
            continue
        entries = journal.steps(found)
        way = _way(found, entries)
        if way != "forget" and not again and any(e.progress is Progress.STUCK for e in entries):
            continue
        run = await journal.take_over(found)
        if run is None:
            continue
        errors: Sequence[MdoError] = ()
        why = ""
        if way == "forget":
            await _forget(journal, run, entries)
        elif way == "finish":
            failure, errors = await _finish(journal, run, entries, context, observe)
            if failure is not None:
                way, why = "undo", failure.message
        else:
            errors = await executor.undo(journal, run, entries, context, observe)
        words = tuple(str(step) for step in _begun(entries))
        done.append(Recovered(found, way, words, tuple(errors), why))
    await journal.forget(lambda uuid: sysfs.directory(uuid, context.host) is not None)
    return done


def _way(run: Run, entries: Sequence[Entry]) -> Literal["undo", "finish", "forget"]:
    if run.process.boot_id != boot_id():
        return "forget"
    turned = any(entry.progress in _TURNED for entry in entries)
    # one without steps was cut short before it knew what to do
    return "finish" if run.kind in FORWARD and entries and not turned else "undo"


def _begun(entries: Sequence[Entry]) -> list[AnyStep]:
    return [decode(entry.data) for entry in entries if entry.progress in _BEGUN]


async def _finish(
    journal: Journal, run: Run, entries: Sequence[Entry], context: Context, observe: Observer
) -> tuple[MdoError | None, list[MdoError]]:
    if run.kind != "destroy":
        return await executor.finish(journal, run, entries, context, observe=observe)
    rest = _rest(journal.owned(), run.title)
    return await executor.finish(
        journal, run, entries, context, change=rest, specs={run.title: None}, observe=observe
    )


def _rest(owned: Managed, spec: str) -> Change:
    """What is not ours any more when a spec is destroyed."""
    return Change(
        devices={uuid: None for uuid, device in owned.devices.items() if device.spec == spec},
        guests={name: None for name, guest in owned.guests.items() if guest.spec == spec},
    )


async def _forget(journal: Journal, run: Run, entries: Sequence[Entry]) -> None:
    for entry in reversed(entries):
        if entry.progress in _BEGUN:
            inverse = decode(entry.data).inverse()
            for change in (inverse.intent, inverse.outcome):
                await journal.note(run, Progress.UNDONE, [entry.number], change=change)
    await journal.end(run, "undone")


# ---------------------------------------------------------------- adopting


class Adopted(Struct, frozen=True):
    """What has become ours."""

    guests: tuple[str, ...] = ()
    devices: tuple[UUID, ...] = ()


async def adopt(
    names: Sequence[str],
    *,
    everything: bool = False,
    host: Path = ROOT,
    guests: Path | None = None,
    journal: Path | None = None,
) -> Adopted:
    """Make guests and devices ours that the journal does not know (any more).

    A guest is adopted with the devices that it has. What its spec says of it is not known then: the
    next ``apply`` of one that names it takes it to be as the spec says.

    :param names: Names of guests and UUIDs of devices.
    :param everything: All guests that run.
    :raise UnknownError: There is no such guest or device.
    :raise RequestError: A guest does not run.
    """
    uuids = [parse_uuid(name) for name in names if is_uuid(name)]
    wanted = [process.find_running(machine_of(guests), name) for name in names if not is_uuid(name)]
    if everything:
        wanted = [guest for guest in process.list_guests(machine_of(guests)) if guest.alive]
    found = sysfs.scan(host)
    with Journal.open(journal) as book:
        owned = book.owned()
        devices: dict[UUID, DeviceRecord | None] = {}
        rows: dict[str, GuestRecord | None] = {}
        for guest in wanted:
            if guest.record is None or guest.name in owned.guests:
                continue
            rows[guest.name] = GuestRecord(name=guest.name, uuid=guest.record.uuid, definition="")
            for plugged in await hotplug.mdevs_of(guest):
                if plugged.uuid not in owned.devices:
                    owner = f"guest:{guest.name}"
                    devices[plugged.uuid] = _as_found(plugged.uuid, found, owner)
        for uuid in uuids:
            if uuid not in owned.devices:
                devices.setdefault(uuid, _as_found(uuid, found, ""))
        await book.put(Change(devices=devices, guests=rows))
    return Adopted(tuple(rows), tuple(devices))


def _as_found(uuid: UUID, found: Host, owner: str) -> DeviceRecord:
    mdev = found.find(uuid)
    if mdev is None:
        raise UnknownError(f"there is no mdev {uuid}", "mdo host lists them")
    if mdev.type_id is None:
        raise RequestError(f"mdev {uuid} is being removed", "wait until it is gone")
    return DeviceRecord(
        uuid=uuid,
        parent=mdev.parent,
        type=mdev.type_id,
        owner=owner,
        group=mdev.group_uuid,
        params=mdev.params or "",
    )
