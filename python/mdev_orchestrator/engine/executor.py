# SPDX-License-Identifier: GPL-2.0-or-later
"""Runs the steps of one operation: all of them, or none.

Steps that do not need each other run at the same time, as many as the kind of step allows. When one
fails, or the user interrupts, no further step begins and those that are under way are cancelled;
then those that are done, or whose outcome is unknown, are undone, in reverse and again
concurrently. The first error is raised. An undo that fails is a note of it and leaves the run open
in the journal. A second interruption waits for nothing and leaves it open too.

A journal that cannot be written any more ends a run like any other error, and does not keep it from
being undone: the steps' outcomes are known in memory, and the undo can be done again.

Each step is written to the journal before it acts and after, so that another process that finds the
run open (:mod:`.recovery`) knows all that may have happened. Every write is a flush of the disk, so
the steps that need no other are written as begun together with the run, and the last ones to come
to their end together with its end.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Self

from mdev_orchestrator.engine import steps as step_module
from mdev_orchestrator.engine.context import Context
from mdev_orchestrator.engine.guest_ops import is_alive
from mdev_orchestrator.engine.journal import Entry, Journal, Progress, Run
from mdev_orchestrator.engine.records import Change, DeviceRecord, SpecRecord
from mdev_orchestrator.engine.steps import AnyStep, Create, Launch, Remove, act_together
from mdev_orchestrator.errors import MdoError, Outcome
from mdev_orchestrator.host import sysfs
from mdev_orchestrator.system.waiting import run_to_completion

_LOG = logging.getLogger(__name__)


class StepEventKind(StrEnum):
    """What happens to a step."""

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

    :ivar number: Its place among the ``total`` steps, from 0.
    :ivar outcome: What is known of it when it has failed; ``None`` for other kinds of events.
    """

    kind: StepEventKind
    step: AnyStep
    number: int
    total: int
    outcome: Outcome | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """How a step ended.

    :ivar error: Why it is not done; ``None`` if it is.
    """

    outcome: Outcome
    error: MdoError | None = None


async def attempt(step: AnyStep, context: Context) -> Result:
    """Make a step so, and say what is known of it."""
    try:
        await step.act(context)
    except MdoError as error:
        return Result(error.outcome or Outcome.UNKNOWN, error)
    return Result(Outcome.DONE)


Observer = Callable[[StepEvent], None]
"""Called for every event of every step, on the event loop; must return quickly. What it raises is
logged and changes nothing."""


def ignore(_: StepEvent) -> None:
    """Do nothing with an event."""


@dataclass(frozen=True, slots=True)
class PlannedStep:
    """A step and the numbers of those that must be done before it."""

    step: AnyStep
    needs: tuple[int, ...] = ()


_AT_ONCE: dict[type, int] = {Launch: 4}
"""A QEMU that starts wants a processor; more at once only make every one of them late."""
_DEVICES_AT_ONCE = 16
_NOTE_SECONDS = 0.2
"""Between two notes of how many devices of a batch are there, if another step waits for them."""
_PROGRESS_SECONDS = 1.0
"""Between two such notes otherwise."""
_GOODBYE_SECONDS = 1.0
"""For what is under way to take notice of a second interruption."""
ALL_DONE = "all was done already"
LEFT_OPEN = "mdo recover undoes what was done"


def claims_of(planned: Sequence[PlannedStep]) -> set[str]:
    """The objects that steps change, and the parents on which they create devices."""
    claims = {claim for entry in planned for claim in entry.step.claims}
    return claims | {f"parent:{device.parent}" for device in _created(planned)}


def _created(planned: Sequence[PlannedStep]) -> list[DeviceRecord]:
    return [entry.step.device for entry in planned if isinstance(entry.step, Create)]


def entries_of(planned: Sequence[PlannedStep]) -> list[Entry]:
    """Steps as they are written with their run: those that need no other are about to act."""
    return [
        Entry(
            number,
            step_module.encode(entry.step),
            entry.needs,
            Progress.PLANNED if entry.needs else Progress.ACTING,
        )
        for number, entry in enumerate(planned)
    ]


def first_changes(planned: Sequence[PlannedStep]) -> tuple[Change, Change]:
    """The records of the steps that need no other: when they begin, and if they do not act."""
    first = [entry.step for entry in planned if not entry.needs]
    return (
        Change.merged(step.on_begin for step in first),
        Change.merged(step.on_no_effect for step in first),
    )


class Execution:
    """The steps of one run, and what is known of each.

    :ivar progress: How far each step is. In the journal a step that is about to act is ``ACTING``
        already; here it is ``PLANNED`` until it acts.
    :ivar stuck: Why the run stays open.
    """

    def __init__(
        self,
        journal: Journal,
        run: Run,
        planned: Sequence[PlannedStep],
        context: Context,
        observe: Observer = ignore,
        progress: Sequence[Progress] | None = None,
    ) -> None:
        """Take up the steps of a run that is written down.

        :param progress: How far each is; none has begun without it.
        """
        self.journal = journal
        self.run = run
        self.planned = planned
        self.context = context
        self.observe = observe
        self.progress = list(progress or [Progress.PLANNED] * len(planned))
        self.stuck: list[MdoError] = []
        self._last: list[int] = []
        # numbers of the steps that are written as about to act, or are being written so
        self._announced = {n for n, entry in enumerate(planned) if not entry.needs}
        self._limits: dict[type, asyncio.Semaphore] = {}
        self._held_parents = self._parents_in_use()

    @classmethod
    def resumed(
        cls,
        journal: Journal,
        run: Run,
        entries: Sequence[Entry],
        context: Context,
        observe: Observer,
    ) -> Self:
        """Take up a run that another process left open."""
        planned = [PlannedStep(step_module.decode(entry.data), entry.needs) for entry in entries]
        progress = [entry.progress for entry in entries]
        return cls(journal, run, planned, context, observe, progress)

    async def perform(
        self,
        change: Change | None = None,
        specs: Mapping[str, SpecRecord | None] | None = None,
        *,
        undo: bool = True,
    ) -> None:
        """Do all steps and close the run, or undo what was done and raise the first error.

        :param change: Records that change when all is done.
        :param specs: Records of specs that change then.
        :param undo: Without it a run that fails is closed as it is.
        :raise MdoError: A step failed; its notes tell what could not be undone.
        """
        try:
            await self.do_all()
            self._check_still_there()
        except _TwiceError as error:
            error.add_note(LEFT_OPEN)
            raise
        except (Exception, asyncio.CancelledError) as error:
            if undo:
                await self.take_back(error)
            else:
                await run_to_completion(self.journal.end(self.run, "failed"))
            raise
        try:
            await self._close(change, specs)
        except MdoError as error:  # no record would tell of what was done
            await self.take_back(error)
            raise

    async def take_back(self, error: BaseException) -> None:
        """Undo what the run did, and note on its error what is known now."""
        undoing = asyncio.ensure_future(self.undo_all(error))
        try:
            closed = await asyncio.shield(undoing)
        except asyncio.CancelledError as second:
            undoing.cancel()
            await asyncio.wait((undoing,), timeout=_GOODBYE_SECONDS)
            second.add_note(LEFT_OPEN)
            raise
        if Progress.STUCK in self.progress:
            error.add_note("mdo recover tries again to undo it")
            return
        untouched = all(p in {Progress.PLANNED, Progress.NO_EFFECT} for p in self.progress)
        error.add_note("nothing was changed" if untouched else "all was undone")
        if not closed:
            error.add_note("the journal does not say so yet: mdo recover closes it")

    async def _close(
        self, change: Change | None, specs: Mapping[str, SpecRecord | None] | None
    ) -> None:
        """Close a run of which everything is done, also when interrupted."""
        try:
            await run_to_completion(self.end(change, specs))
        except asyncio.CancelledError as error:
            error.add_note(ALL_DONE)
            raise

    def _check_still_there(self) -> None:
        """Check that what was made was not taken away by another program meanwhile.

        :raise MdoError: It was.
        """
        machine = self.context.machine
        gone = {e.step.device.uuid for e in self.planned if isinstance(e.step, Remove)}
        for uuid in [device.uuid for device in _created(self.planned)]:
            if sysfs.directory(machine, uuid) is None and uuid not in gone:
                raise MdoError(
                    f"mdev {uuid} was removed by another program while {self.run} was at work",
                    "see which program it was, then try again",
                    outcome=Outcome.UNKNOWN,
                    subject=f"mdev {uuid}",
                )
        for entry in self.planned:
            step = entry.step
            if isinstance(step, Launch) and not is_alive(machine, step.guest.name):
                raise MdoError(
                    f"guest {step.guest.name} has ended while {self.run} was at work",
                    f"mdo guest console --log {step.guest.name} shows what it printed",
                    outcome=Outcome.UNKNOWN,
                    subject=f"guest {step.guest.name}",
                )

    def emit(self, kind: StepEventKind, number: int, outcome: Outcome | None = None) -> None:
        """Pass an event to the observer."""
        event = StepEvent(kind, self.planned[number].step, number, len(self.planned), outcome)
        try:
            self.observe(event)
        except Exception:  # noqa: BLE001 - whatever it is, the steps go on
            _LOG.exception("an observer failed at %s of step %d", kind, number)

    def _limit(self, step: AnyStep) -> asyncio.Semaphore:
        kind = type(step)
        if kind not in self._limits:
            self._limits[kind] = asyncio.Semaphore(_AT_ONCE.get(kind, _DEVICES_AT_ONCE))
        return self._limits[kind]

    # ---- forward --------------------------------------------------------------------------------

    async def do_all(self) -> None:
        """Do all steps that are not done.

        :raise MdoError: The first that failed.
        """
        ready = [asyncio.Event() for _ in self.planned]
        async with _FirstError() as tasks:
            for number, progress in enumerate(self.progress):
                if progress is Progress.DONE:
                    ready[number].set()
            for numbers in self._batches():
                tasks.start(self._do(numbers, ready))

    async def do_one(self, number: int) -> None:
        """Do one step now.

        :raise MdoError: It failed.
        """
        ready = [asyncio.Event() for _ in self.planned]
        await self._announce([number])
        self.emit(StepEventKind.BEGIN, number)
        await self._attempt([number], ready, keep_open=True)

    def _batches(self) -> list[list[int]]:
        """The steps that are not done; devices that come or go at the same time are together."""
        batches: list[list[int]] = []
        joined: dict[tuple[type, str, tuple[int, ...]], list[int]] = {}
        for number, (planned, progress) in enumerate(zip(self.planned, self.progress, strict=True)):
            if progress is Progress.DONE:
                continue
            step = planned.step
            if step.batch is None or self.context.repairing:
                batches.append([number])
                continue
            key = type(step), step.batch, planned.needs
            if key not in joined:
                joined[key] = []
                batches.append(joined[key])
            joined[key].append(number)
        return batches

    async def _do(self, numbers: Sequence[int], ready: Sequence[asyncio.Event]) -> None:
        """Do one step, or several that have the same needs."""
        steps = [self.planned[number].step for number in numbers]
        needs = self.planned[numbers[0]].needs
        for need in needs:
            await ready[need].wait()
        async with self._limit(steps[0]):
            try:
                if needs or self.progress[numbers[0]] is not Progress.PLANNED:
                    await self._announce(numbers)
                for number in numbers:
                    self.emit(StepEventKind.BEGIN, number)
                await self._attempt(numbers, ready)
            except BaseException:
                for number in numbers:
                    if not ready[number].is_set():
                        self.emit(StepEventKind.FAILED, number, self._outcome(number))
                raise

    async def _announce(self, numbers: Sequence[int]) -> None:
        """Write down that steps are about to act; it is written even when this is cancelled."""
        self._announced.update(numbers)
        change = Change.merged(self.planned[number].step.on_begin for number in numbers)
        await self.journal.note(self.run, Progress.ACTING, numbers, change=change)

    def _outcome(self, number: int) -> Outcome:
        match self.progress[number]:
            case Progress.DONE:
                return Outcome.DONE
            case Progress.PLANNED | Progress.NO_EFFECT:
                return Outcome.NO_EFFECT
        return Outcome.UNKNOWN

    async def _attempt(
        self, numbers: Sequence[int], ready: Sequence[asyncio.Event], *, keep_open: bool = False
    ) -> None:
        self._set(numbers, Progress.ACTING)
        if len(numbers) > 1:
            await self._attempt_batch(numbers, ready)
            return
        (number,) = numbers
        result = await attempt(self.planned[number].step, self.context)
        self.progress[number] = Progress.after(result.outcome)
        if result.error is not None:
            raise result.error
        self.emit(StepEventKind.ACTED, number)
        await self._note_done(numbers, ready, keep_open=keep_open)

    async def _attempt_batch(self, numbers: Sequence[int], ready: Sequence[asyncio.Event]) -> None:
        """Make devices together; those that are made are noted as they come."""
        made: list[int] = []

        def on_result(index: int, outcome: Outcome) -> None:
            self.progress[numbers[index]] = Progress.after(outcome)
            if outcome is Outcome.DONE:
                self.emit(StepEventKind.ACTED, numbers[index])
                made.append(numbers[index])

        steps = [self.planned[number].step for number in numbers]
        needed = {need for planned in self.planned for need in planned.needs}
        pause = _PROGRESS_SECONDS if needed.isdisjoint(numbers) else _NOTE_SECONDS
        making = asyncio.ensure_future(act_together(steps, self.context, on_result))
        try:
            while made or not making.done():  # more may come while some are written down
                await asyncio.wait((making,), timeout=pause)
                done, made[:] = [*made], []
                await self._note_done(done, ready)
        except BaseException:
            making.cancel()
            await asyncio.wait((making,))
            raise
        finally:
            if making.done() and not making.cancelled() and (error := making.result()):
                raise error  # it tells more than the cancellation of this task

    async def _note_done(
        self, numbers: Sequence[int], ready: Sequence[asyncio.Event], *, keep_open: bool = False
    ) -> None:
        """Write down what was done, and let the steps begin that wait for it."""
        if not numbers:
            return
        if not keep_open and all(progress is Progress.DONE for progress in self.progress):
            self._last += numbers  # written together with the end of the run
            return
        await self.journal.note(
            self.run,
            Progress.DONE,
            numbers,
            change=self._on_done(numbers),
            release=self._free_parents(numbers),
        )
        for number in numbers:
            self.emit(StepEventKind.DONE, number)
            ready[number].set()

    def _parents_in_use(self) -> Counter[str]:
        """On how many devices of each parent the run holds a claim until they are created.

        A parent on which it also removes devices stays claimed to the end: an undo creates them.
        """
        removed = {e.step.device.parent for e in self.planned if isinstance(e.step, Remove)}
        parents = [device.parent for device in _created(self.planned)]
        return Counter(parent for parent in parents if parent not in removed)

    def _free_parents(self, numbers: Sequence[int]) -> list[str]:
        """The claims of parents on which nothing more is created."""
        steps = [self.planned[number].step for number in numbers]
        made = Counter(step.device.parent for step in steps if isinstance(step, Create))
        free = []
        for parent, count in made.items():
            if parent in self._held_parents:
                self._held_parents[parent] -= count
                if not self._held_parents[parent]:
                    free.append(f"parent:{parent}")
        return free

    async def end(
        self, change: Change | None, specs: Mapping[str, SpecRecord | None] | None
    ) -> None:
        """Close the run: all is done.

        :param change: Records that change beside those of the steps.
        """
        changes = Change.merged((self._on_done(self._last), change or Change()))
        await self.journal.end(self.run, "done", done=self._last, change=changes, specs=specs)
        for number in self._last:
            self.emit(StepEventKind.DONE, number)

    def _on_done(self, numbers: Sequence[int]) -> Change:
        return Change.merged(self.planned[number].step.on_done for number in numbers)

    def _set(self, numbers: Sequence[int], progress: Progress) -> None:
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
            await self._note_without_effect(cause)
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
        if self.stuck:
            await self.journal.give_up(self.run)
        return not self.stuck

    async def _note_without_effect(self, cause: BaseException) -> None:
        """Delete the records of steps that were written as about to act and have done nothing."""
        numbers = [
            number
            for number, progress in enumerate(self.progress)
            if progress is Progress.NO_EFFECT
            or (progress is Progress.PLANNED and number in self._announced)
        ]
        if numbers:
            change = Change.merged(self.planned[n].step.on_no_effect for n in numbers)
            await self._write(Progress.NO_EFFECT, numbers, change, cause)

    async def undo_one(self, number: int) -> None:
        """Undo one step now.

        :raise MdoError: It cannot be undone.
        """
        inverse = self.planned[number].step.inverse()
        await self.journal.note(self.run, Progress.UNDOING, [number], change=inverse.on_begin)
        self.progress[number] = Progress.UNDOING
        self.emit(StepEventKind.UNDO, number)
        result = await attempt(inverse, self.context)
        if result.error is not None:
            raise result.error
        self.emit(StepEventKind.ACTED, number)
        await self.journal.note(self.run, Progress.UNDONE, [number], change=inverse.on_done)
        self.progress[number] = Progress.UNDONE
        self.emit(StepEventKind.UNDONE, number)

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
            async with self._limit(inverse):
                await self._write(Progress.UNDOING, [number], inverse.on_begin, cause)
                self.emit(StepEventKind.UNDO, number)
                try:
                    error = (await attempt(inverse, self.context)).error
                except Exception as bug:  # noqa: BLE001 - the others are undone all the same
                    error = MdoError(f"internal error: {type(bug).__name__}: {bug}")
                if error is not None:
                    await self._stuck(number, error, cause)
                else:
                    self.emit(StepEventKind.ACTED, number)
                    await self._write(Progress.UNDONE, [number], inverse.on_done, cause)
                    self.progress[number] = Progress.UNDONE
                    self.emit(StepEventKind.UNDONE, number)
        undone[number].set()

    async def _stuck(self, number: int, error: MdoError, cause: BaseException) -> None:
        words = f"could not undo: {self.planned[number].step}: {error.message}"
        cause.add_note(words)
        self.stuck.append(error)
        self.progress[number] = Progress.STUCK
        self.emit(StepEventKind.STUCK, number, error.outcome)
        await self._write(Progress.STUCK, [number], Change(), cause, words)

    async def _write(
        self,
        progress: Progress,
        numbers: Sequence[int],
        change: Change,
        cause: BaseException,
        error: str = "",
    ) -> None:
        """Write down how far an undo is; it goes on without the journal."""
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


class _TwiceError(asyncio.CancelledError):
    """Interrupted once more while what was under way came to its end."""


@dataclass
class _FirstError:
    """Tasks of which the first that fails ends the others, and whose error is raised.

    A TaskGroup raises a group of errors in no certain order; a user reads one line, the first.
    """

    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    errors: list[BaseException] = field(default_factory=list)

    async def __aenter__(self) -> Self:
        return self

    def start(self, work: Awaitable[None]) -> None:
        self.tasks.add(asyncio.ensure_future(self._watched(work)))

    async def _watched(self, work: Awaitable[None]) -> None:
        try:
            await work
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
