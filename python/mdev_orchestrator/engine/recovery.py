# SPDX-License-Identifier: GPL-2.0-or-later
"""After a crash: runs that stand open are undone or finished, so that it is all or nothing.

A run is abandoned when it is open and no process is at work at it. What becomes of it:

* a ``destroy``, ``detach`` or ``remove`` that had not begun to undo itself is *finished*: what was
  asked to go shall go. When that cannot be (a guest does not power down), it is undone;
* a ``stop`` is *closed*: the user sees whether the guest runs, and asks again;
* every other run is *undone*: all that it did, and all that it may have done;
* a run of an earlier boot has nothing left to undo: mdevs and guests do not outlive the machine.
  Only the records become again what they were before, so that it can be brought back.

And the record of a device that no spec asks for and that is gone is deleted.

Recovery can itself be killed: each undo is written down like each step, and can be done twice. Two
recoveries never take the same run: its lock belongs to one process.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from msgspec import Struct

from mdev_orchestrator.engine.context import Context
from mdev_orchestrator.engine.executor import Execution, Observer, ignore
from mdev_orchestrator.engine.journal import Entry, Journal, Progress, Run, open_journal
from mdev_orchestrator.engine.records import Change, Managed, SpecRecord
from mdev_orchestrator.engine.steps import AnyStep, decode
from mdev_orchestrator.errors import MdoError
from mdev_orchestrator.host import sysfs
from mdev_orchestrator.machine import Machine
from mdev_orchestrator.system.processes import boot_id

Way = Literal["undo", "finish", "close", "forget"]

FINISHED = frozenset(("destroy", "detach", "remove"))
"""Kinds of runs that are finished, not undone."""
CLOSED = frozenset(("stop",))
"""Kinds of runs that are only closed."""
_BEGUN = frozenset((Progress.ACTING, Progress.DONE, Progress.UNDOING, Progress.STUCK))
_TURNED = frozenset((Progress.NO_EFFECT, Progress.UNDOING, Progress.UNDONE, Progress.STUCK))


class Recovered(Struct, frozen=True):
    """What became of one abandoned run.

    :ivar way: ``undo``, ``finish``, ``close``, or ``forget`` for one of an earlier boot.
    :ivar steps: The steps that had begun and are undone or finished now, in words.
    :ivar stuck: Those that could not be.
    :ivar errors: Why it still stands open; empty when it is closed.
    :ivar why: What kept it from being finished, so that it was undone; empty otherwise.
    """

    run: Run
    way: Way
    steps: tuple[str, ...] = ()
    stuck: tuple[str, ...] = ()
    errors: tuple[MdoError, ...] = ()
    why: str = ""


async def pending(machine: Machine) -> list[Recovered]:
    """What :func:`recover` would do; runs that a process is at work at are left out."""
    if not machine.journal_path.exists():
        return []
    async with open_journal(machine) as journal:
        await journal.wait_for_killed()
        return [
            Recovered(run, _way(run, entries), tuple(map(str, _begun(entries))))
            for run, entries in await journal.read(journal.abandoned)
        ]


async def recover(
    machine: Machine, *, deadline: float | None = None, observe: Observer = ignore
) -> list[Recovered]:
    """Undo or finish all abandoned runs, also those that could not be undone before.

    Never raises for a step that cannot be undone: the answer says so, and the run stays open.

    :param deadline: Seconds for each device.
    :raise HostError: The journal is damaged or cannot be written.
    """
    context = Context(machine)
    if deadline is not None:
        context.deadline = deadline
    async with open_journal(machine) as journal:
        await journal.wait_for_killed()
        return await recover_abandoned(journal, context, observe, again=True)


async def recover_abandoned(
    journal: Journal,
    context: Context,
    observe: Observer = ignore,
    *,
    again: bool = False,
    only: int | None = None,
) -> list[Recovered]:
    """Undo or finish the abandoned runs of an open journal.

    :param again: Try again what could not be undone before. Other commands than ``recover`` do
        without the objects of such a run, or ask for it by its number.
    :param only: The number of the one run that is looked at, tried before or not.
    """
    done = []
    # the newest first: a later run may build on what an earlier one did
    for found, entries in await journal.read(journal.abandoned):
        if only not in {None, found.id}:
            continue
        way = _way(found, entries)
        was_stuck = any(entry.progress is Progress.STUCK for entry in entries)
        if was_stuck and not again and only is None and way != "forget":
            continue
        run = await journal.take_over(found)
        if run is None:
            continue
        fresh = Context(context.machine, context.deadline, repairing=True)
        done.append(await _recover_one(journal, run, entries, way, fresh, observe))
    machine = context.machine
    await journal.forget(lambda uuid: sysfs.directory(machine, uuid) is not None)
    return done


async def _recover_one(
    journal: Journal,
    run: Run,
    entries: Sequence[Entry],
    way: Way,
    context: Context,
    observe: Observer,
) -> Recovered:
    """Do what is to be done about a run that belongs to this process now."""
    why = ""
    execution = Execution.resumed(journal, run, entries, context, observe)
    if way == "forget":
        await _forget(journal, run, entries)
    elif way == "close":
        await journal.end(run, "closed")
    elif way == "finish":
        failure = await _finish(journal, run, execution)
        if failure is not None:
            way, why = "undo", failure.message
    else:
        await execution.undo_all(MdoError(f"{run} was cut short"))
    begun = [entry.number for entry in entries if entry.progress in _BEGUN]
    stuck = [n for n in begun if execution.progress[n] is Progress.STUCK]
    return Recovered(
        run,
        way,
        tuple(str(execution.planned[n].step) for n in begun if n not in stuck),
        tuple(str(execution.planned[n].step) for n in stuck),
        tuple(execution.stuck),
        why,
    )


def _way(run: Run, entries: Sequence[Entry]) -> Way:
    if run.process.boot_id != boot_id():
        return "forget"
    if run.kind in CLOSED:
        return "close"
    turned = any(entry.progress in _TURNED for entry in entries)
    # one without steps was cut short before it knew what to do
    return "finish" if run.kind in FINISHED and entries and not turned else "undo"


def _begun(entries: Sequence[Entry]) -> list[AnyStep]:
    return [decode(entry.data) for entry in entries if entry.progress in _BEGUN]


async def _finish(journal: Journal, run: Run, execution: Execution) -> MdoError | None:
    """Do the rest of a run, or undo all of it when a step fails; the error of that step."""
    try:
        await execution.do_all()
    except MdoError as error:
        await execution.undo_all(error)
        return error
    change: Change | None = None
    specs: dict[str, SpecRecord | None] = {}
    if run.kind == "destroy":
        change = _rest(await journal.read(journal.managed), run.title)
        specs[run.title] = None
    await execution.end(change, specs)
    return None


def _rest(managed: Managed, spec: str) -> Change:
    """The records that go when a spec is destroyed."""
    return Change(
        devices={uuid: None for uuid, device in managed.devices.items() if device.spec == spec},
        guests={name: None for name, guest in managed.guests.items() if guest.spec == spec},
    )


async def _forget(journal: Journal, run: Run, entries: Sequence[Entry]) -> None:
    for entry in reversed(entries):
        if entry.progress in _BEGUN:
            inverse = decode(entry.data).inverse()
            for change in (inverse.on_begin, inverse.on_done):
                await journal.note(run, Progress.UNDONE, [entry.number], change=change)
    await journal.end(run, "undone")
