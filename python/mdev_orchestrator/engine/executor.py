# SPDX-License-Identifier: GPL-2.0-or-later
"""Runs steps: all of them, or none.

Steps that do not need each other run at the same time, as many as the kind of step allows. When one
fails, or the user interrupts, no further step begins and those that are under way are cancelled;
then those that are done, or may have been, are undone, in reverse and again concurrently. The first
error is what the caller gets. An undo that fails stands beside it as a note and leaves the run open
in the journal. A second interruption waits for nothing and leaves it open too.

A journal that cannot be written any more ends a run like any other error, and does not keep it from
being undone: what its steps did stands there, so that it can be undone again.

Each step is written to the journal before it acts and after, so that whoever finds an open run of a
process that has gone (:mod:`.recovery`) knows all that may have happened. Every write is a flush of
the disk, so the steps that need no other are written as begun together with the run, and the last
to come to their end together with its end.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Self

from mdev_orchestrator.engine import steps as step_module
from mdev_orchestrator.engine.context import Context, UnsettledError
from mdev_orchestrator.engine.journal import CLAIM_SECONDS, Entry, Journal, Progress, Run
from mdev_orchestrator.engine.journal_db import Change, SpecRecord
from mdev_orchestrator.engine.steps import AnyStep, Launch, make_all
from mdev_orchestrator.errors import MdoError


class StepEventKind(StrEnum):
    """What an observer is told of."""

    BEGIN = "begin"
    """Its intent is on the disk, and it is about to act."""
    ACTED = "acted"
    """It has acted, or was undone; this is not on the disk yet."""
    DONE = "done"
    FAILED = "failed"
    UNDO = "undo"
    UNDONE = "undone"
    STUCK = "stuck"


@dataclass(frozen=True, slots=True)
class StepEvent:
    """What happens to one step of a run.

    :ivar number: Its place among the ``total`` steps.
    """

    kind: StepEventKind
    step: AnyStep
    number: int
    total: int


Observer = Callable[[StepEvent], None]
"""ResultCallback of every step's moments, on the event loop; must return quickly."""


@dataclass(frozen=True, slots=True)
class Planned:
    """A step and the numbers of those that must be done before it."""

    step: AnyStep
    needs: tuple[int, ...] = ()


_AT_ONCE: dict[type, int] = {Launch: 4}
"""A QEMU that starts wants a processor; more at once only make every one of them late."""
_DEVICES_AT_ONCE = 16
"""A driver's own lock makes more of them pointless."""
_NOTE_SECONDS = 0.2
"""Between two notes of how many of the devices that come together are there, if a step waits."""
_PROGRESS_SECONDS = 1.0
"""Between two such notes if only the user does."""
_GOODBYE_SECONDS = 1.0
"""For what is under way to take notice of a second interruption."""
_OPEN = "mdo recover undoes what was done"


def ignore(_: StepEvent) -> None:
    """An observer that does nothing."""


async def execute(
    journal: Journal,
    kind: str,
    title: str,
    planned: Sequence[Planned],
    context: Context,
    *,
    claims: Sequence[str] = (),
    change: Change | None = None,
    specs: Mapping[str, SpecRecord | None] | None = None,
    observe: Observer = ignore,
    wait: float = CLAIM_SECONDS,
    run: Run | None = None,
) -> None:
    """Do all steps, or undo what was done and raise the first error.

    :param kind: What the journal calls the command.
    :param title: What it is about.
    :param claims: Objects that are claimed beside those of the steps.
    :param change: What becomes ours, or is not any more, when all is done.
    :param specs: What becomes of the specs then.
    :param wait: Seconds to wait for another command that changes the same objects.
    :param run: One that was begun without steps, for its claims.
    :raise BusyError: Another command changes one of the objects; nothing was done.
    :raise HostError: The journal cannot be written.
    :raise MdoError: A step failed; its notes tell what could not be undone.
    """
    wanted = {claim for entry in planned for claim in entry.step.claims}.union(claims)
    first = [entry.step for entry in planned if not entry.needs]
    intent = _all_of([step.intent for step in first])
    refused = _all_of([step.refused for step in first])
    entries = [
        Entry(
            number,
            step_module.encode(entry.step),
            entry.needs,
            Progress.PLANNED if entry.needs else Progress.ACTING,
        )
        for number, entry in enumerate(planned)
    ]
    # those that are about to act have done nothing yet
    progress = [Progress.PLANNED if entry.needs else Progress.FAILED for entry in planned]
    begun = run or await journal.begin(
        kind, title, entries, wanted, change=intent, refused=refused, wait=wait
    )
    work = _Work(journal, begun, planned, context, observe, progress)
    if run is not None:
        try:
            await journal.plan(run, entries, wanted, change=intent, wait=wait)
        except asyncio.CancelledError as error:
            if journal.has_steps(run):
                await _take_back(work, error)
            raise
    try:
        await work.do_all()
    except _TwiceError as error:
        error.add_note(_OPEN)
        raise
    except (Exception, asyncio.CancelledError) as error:
        await _take_back(work, error)
        raise
    try:
        await _close(work.end(change, specs))
    except MdoError as error:  # nobody would know of what was done
        await _take_back(work, error)
        raise


async def _take_back(work: _Work, error: BaseException) -> None:
    """Undo what a run did, and say so beside its error."""
    undoing = asyncio.ensure_future(work.undo_all(error))
    try:
        clean = await asyncio.shield(undoing)
    except asyncio.CancelledError as second:
        undoing.cancel()
        await asyncio.wait((undoing,), timeout=_GOODBYE_SECONDS)
        second.add_note(_OPEN)
        raise
    if clean:
        error.add_note("nothing was changed" if work.untouched else "all was undone")
    else:
        error.add_note("mdo recover tries again to undo it")


async def _close(end: Awaitable[None]) -> None:
    """Close a run of which everything is done: interrupted or not, it is."""
    closing = asyncio.ensure_future(end)
    try:
        await asyncio.shield(closing)
    except asyncio.CancelledError as error:
        await closing
        error.add_note("all was done already")
        raise


async def undo(
    journal: Journal,
    run: Run,
    entries: Sequence[Entry],
    context: Context,
    observe: Observer = ignore,
) -> list[MdoError]:
    """Undo a run that somebody else left open, and close it unless something is stuck.

    :return: What could not be undone.
    """
    work = _Work.resumed(journal, run, entries, context, observe)
    await work.undo_all(MdoError(f"{run} was cut short"))
    return work.stuck


async def finish(
    journal: Journal,
    run: Run,
    entries: Sequence[Entry],
    context: Context,
    *,
    change: Change | None = None,
    specs: Mapping[str, SpecRecord | None] | None = None,
    observe: Observer = ignore,
) -> tuple[MdoError | None, list[MdoError]]:
    """Do the rest of a run that somebody else left open, or undo all of it when a step fails.

    It is closed then, unless something is stuck.

    :return: Why it was not finished, and what could not be undone.
    """
    work = _Work.resumed(journal, run, entries, context, observe)
    try:
        await work.do_all()
    except MdoError as error:
        await work.undo_all(error)
        return error, work.stuck
    await work.end(change, specs)
    return None, []


@dataclass
class _Work:
    """A run under way: what is known of each step.

    :ivar last: Steps that are done, which the run's end writes down.
    """

    journal: Journal
    run: Run
    planned: Sequence[Planned]
    context: Context
    observe: Observer
    progress: list[Progress]
    last: list[int] = field(default_factory=list)
    stuck: list[MdoError] = field(default_factory=list)
    limits: dict[type, asyncio.Semaphore] = field(default_factory=dict)

    @classmethod
    def resumed(
        cls,
        journal: Journal,
        run: Run,
        entries: Sequence[Entry],
        context: Context,
        observe: Observer,
    ) -> _Work:
        planned = [Planned(step_module.decode(entry.data), entry.needs) for entry in entries]
        return cls(journal, run, planned, context, observe, [entry.progress for entry in entries])

    @property
    def untouched(self) -> bool:
        """Whether no step had come to its end."""
        return Progress.UNDONE not in self.progress

    def emit(self, kind: StepEventKind, number: int) -> None:
        self.observe(StepEvent(kind, self.planned[number].step, number, len(self.planned)))

    def limit(self, step: AnyStep) -> asyncio.Semaphore:
        kind = type(step)
        if kind not in self.limits:
            self.limits[kind] = asyncio.Semaphore(_AT_ONCE.get(kind, _DEVICES_AT_ONCE))
        return self.limits[kind]

    # ---- forward --------------------------------------------------------------------------------

    async def do_all(self) -> None:
        """Do all steps that are not done.

        :raise MdoError: The first that failed.
        """
        ready = [asyncio.Event() for _ in self.planned]
        async with _Failing() as tasks:
            for number, done in enumerate(self.progress):
                if done is Progress.DONE:
                    ready[number].set()
            for numbers in self._bundles():
                tasks.start(self._do(numbers, ready))

    def _bundles(self) -> list[list[int]]:
        """The steps that are not done; devices that come or go at the same time stand together."""
        bundles: list[list[int]] = []
        joined: dict[tuple[type, tuple[int, ...]], list[int]] = {}
        for number, (planned, done) in enumerate(zip(self.planned, self.progress, strict=True)):
            if done is Progress.DONE:
                continue
            step = planned.step
            if step.joins_others and not self.context.repairing:
                key = type(step), planned.needs
                if key not in joined:
                    joined[key] = []
                    bundles.append(joined[key])
                joined[key].append(number)
            else:
                bundles.append([number])
        return bundles

    async def _do(self, numbers: Sequence[int], ready: Sequence[asyncio.Event]) -> None:
        """Do one step, or several that have the same needs."""
        steps = [self.planned[number].step for number in numbers]
        for need in self.planned[numbers[0]].needs:
            await ready[need].wait()
        async with self.limit(steps[0]):
            try:
                if self.progress[numbers[0]] is not Progress.FAILED:
                    self._are(numbers, Progress.FAILED)  # unless their intent gets written
                    intent = _all_of([step.intent for step in steps])
                    await self.journal.note(self.run, Progress.ACTING, numbers, change=intent)
                self._are(numbers, Progress.ACTING)
                for number in numbers:
                    self.emit(StepEventKind.BEGIN, number)
                await self._make(numbers, ready)
            except BaseException:
                for number in numbers:
                    if not ready[number].is_set():
                        self.emit(StepEventKind.FAILED, number)
                raise

    async def _make(self, numbers: Sequence[int], ready: Sequence[asyncio.Event]) -> None:
        if len(numbers) > 1:
            await self._make_all(numbers, ready)
            return
        (number,) = numbers
        try:
            await self.planned[number].step.make(self.context)
        except MdoError as error:
            # only who refuses has done nothing; anything else may have, or may show it later
            if not isinstance(error, UnsettledError):
                self.progress[number] = Progress.FAILED
            raise
        self._has_acted(number)
        await self._done(numbers, ready)

    async def _make_all(self, numbers: Sequence[int], ready: Sequence[asyncio.Event]) -> None:
        """Make devices together; those that take their time are done as they come."""
        made: list[int] = []

        def told(index: int, is_made: bool) -> None:
            if is_made:
                self._has_acted(numbers[index])
                made.append(numbers[index])
            else:
                self.progress[numbers[index]] = Progress.FAILED

        steps = [self.planned[number].step for number in numbers]
        needed = {need for planned in self.planned for need in planned.needs}
        pause = _PROGRESS_SECONDS if needed.isdisjoint(numbers) else _NOTE_SECONDS
        making = asyncio.ensure_future(make_all(steps, self.context, told))
        try:
            while made or not making.done():  # more may come while some are written down
                await asyncio.wait((making,), timeout=pause)
                done, made[:] = [*made], []
                await self._done(done, ready)
        except BaseException:
            making.cancel()
            await asyncio.wait((making,))
            raise
        finally:
            if making.done() and not making.cancelled():
                making.result()  # its error tells more than that of who waited

    def _has_acted(self, number: int) -> None:
        self.progress[number] = Progress.DONE
        self.emit(StepEventKind.ACTED, number)

    async def _done(self, numbers: Sequence[int], ready: Sequence[asyncio.Event]) -> None:
        """Write down what was done, and let those go on who wait for it."""
        if not numbers:
            return
        if all(progress is Progress.DONE for progress in self.progress):
            self.last += numbers
            return
        await self.journal.note(self.run, Progress.DONE, numbers, change=self._outcome(numbers))
        for number in numbers:
            self.emit(StepEventKind.DONE, number)
            ready[number].set()

    async def end(
        self, change: Change | None, specs: Mapping[str, SpecRecord | None] | None
    ) -> None:
        """Close the run: all is done.

        :param change: What becomes ours, or is not any more, beside what the steps change.
        """
        outcome = _all_of([self._outcome(self.last), change or Change()])
        await self.journal.end(self.run, "done", done=self.last, change=outcome, specs=specs)
        for number in self.last:
            self.emit(StepEventKind.DONE, number)

    def _outcome(self, numbers: Sequence[int]) -> Change:
        return _all_of([self.planned[number].step.outcome for number in numbers])

    def _are(self, numbers: Sequence[int], progress: Progress) -> None:
        for number in numbers:
            self.progress[number] = progress

    # ---- backward -------------------------------------------------------------------------------

    async def undo_all(self, cause: BaseException) -> bool:
        """Undo what was done, or may have been, and close the run.

        What cannot be undone becomes a note of ``cause`` and leaves it open.

        :return: Whether it is closed.
        """
        self.context.repairing = True
        undone = [asyncio.Event() for _ in self.planned]
        dependents: list[list[int]] = [[] for _ in self.planned]
        for number, entry in enumerate(self.planned):
            for need in entry.needs:
                dependents[need].append(number)
        try:
            failed = [n for n, progress in enumerate(self.progress) if progress is Progress.FAILED]
            if failed:
                refused = _all_of([self.planned[number].step.refused for number in failed])
                await self._write(Progress.FAILED, failed, refused, cause)
            async with asyncio.TaskGroup() as tasks:
                for number in range(len(self.planned)):
                    tasks.create_task(self._undo(number, dependents[number], undone, cause))
        finally:
            self.context.repairing = False
        if not self.stuck:
            try:
                await self.journal.end(self.run, "undone")
            except MdoError as failure:
                self._unwritten(failure, cause)
        return not self.stuck

    async def _undo(
        self,
        number: int,
        dependents: Sequence[int],
        undone: Sequence[asyncio.Event],
        cause: BaseException,
    ) -> None:
        for later in dependents:
            await undone[later].wait()
        touched = {Progress.ACTING, Progress.DONE, Progress.UNDOING, Progress.STUCK}
        if self.progress[number] in touched:
            inverse = self.planned[number].step.inverse()
            async with self.limit(inverse):
                await self._write(Progress.UNDOING, [number], inverse.intent, cause)
                self.emit(StepEventKind.UNDO, number)
                try:
                    await inverse.make(self.context)
                    self.emit(StepEventKind.ACTED, number)
                except MdoError as error:
                    await self._stuck(number, error, cause)
                except Exception as error:  # noqa: BLE001 - a bug must not keep the others from it
                    words = f"internal error: {type(error).__name__}: {error}"
                    await self._stuck(number, MdoError(words), cause)
                else:
                    await self._write(Progress.UNDONE, [number], inverse.outcome, cause)
                    self.progress[number] = Progress.UNDONE
                    self.emit(StepEventKind.UNDONE, number)
        undone[number].set()

    async def _stuck(self, number: int, error: MdoError, cause: BaseException) -> None:
        words = f"could not undo: {self.planned[number].step}: {error.message}"
        cause.add_note(words)
        self.stuck.append(error)
        self.progress[number] = Progress.STUCK
        self.emit(StepEventKind.STUCK, number)
        await self._write(Progress.STUCK, [number], Change(), cause, words)

    async def _write(
        self,
        progress: Progress,
        numbers: Sequence[int],
        change: Change,
        cause: BaseException,
        error: str = "",
    ) -> None:
        """Write down what an undo comes to; it goes on without the journal."""
        try:
            await self.journal.note(self.run, progress, numbers, change=change, error=error)
        except MdoError as failure:
            self._unwritten(failure, cause)

    def _unwritten(self, failure: MdoError, cause: BaseException) -> None:
        if failure.message in {error.message for error in self.stuck}:
            return
        self.stuck.append(failure)
        if failure.message != getattr(cause, "message", None):
            cause.add_note(failure.message)


def _all_of(changes: Sequence[Change]) -> Change:
    """What several steps change."""
    if len(changes) == 1:
        return changes[0]
    return Change(
        devices={uuid: device for change in changes for uuid, device in change.devices.items()},
        guests={name: guest for change in changes for name, guest in change.guests.items()},
    )


class _TwiceError(asyncio.CancelledError):
    """Interrupted once more while what was under way came to its end."""


class _Failing:
    """Tasks of which the first that fails ends the others, and is what is raised.

    A TaskGroup raises a group of errors in no certain order; who reads one line wants the first.
    """

    def __init__(self) -> None:
        self.tasks: set[asyncio.Task[None]] = set()
        self.errors: list[BaseException] = []

    async def __aenter__(self) -> Self:
        return self

    def start(self, work: object) -> None:
        task = asyncio.ensure_future(self._watched(work))
        self.tasks.add(task)

    async def _watched(self, work: object) -> None:
        try:
            await work  # type: ignore[misc]
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # noqa: BLE001 - raised when all have ended
            self.errors.append(error)
            self._cancel()

    def _cancel(self) -> None:
        for task in self.tasks:
            if task is not asyncio.current_task():
                task.cancel()

    async def __aexit__(self, *_: object) -> None:
        if not self.tasks:
            return
        try:
            await asyncio.wait(self.tasks)
        except asyncio.CancelledError:
            self._cancel()
            try:
                await asyncio.wait(self.tasks)
            except asyncio.CancelledError as second:
                self._cancel()
                await asyncio.wait(self.tasks, timeout=_GOODBYE_SECONDS)
                raise _TwiceError from second
            raise
        if self.errors:
            first, *others = self.errors
            for other in others:
                first.add_note(f"also: {other}")
            raise first
