# SPDX-License-Identifier: GPL-2.0-or-later
"""Runs steps: all of them, or none.

Steps that do not need each other run at the same time, as many as the kind of step allows. When one
fails, or the user interrupts, no further step begins; those that are under way come to their end or
are cancelled, which takes back what they did; then those that are done are undone, in reverse and
again concurrently. The first error is what the caller gets. An undo that fails stands beside it as
a note and leaves the run open in the journal.

Each step is written to the journal before it acts and after, so that whoever finds an open run of a
process that has gone (:mod:`.recovery`) knows all that may have happened.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Self

from mdev_orchestrator.engine import steps as step_module
from mdev_orchestrator.engine.journal import CLAIM_SECONDS, Entry, Journal, Progress, Run
from mdev_orchestrator.engine.steps import AnyStep, Context, Launch, UnsettledError
from mdev_orchestrator.engine.store import Change, OwnSpec
from mdev_orchestrator.errors import MdoError


class Moment(StrEnum):
    """What an observer is told of."""

    BEGIN = "begin"
    """Its intent is on the disk, and it is about to act."""
    ACTED = "acted"
    """It has acted; this is not on the disk yet."""
    DONE = "done"
    FAILED = "failed"
    UNDO = "undo"
    UNDONE = "undone"
    STUCK = "stuck"


@dataclass(frozen=True, slots=True)
class Event:
    """What happens to one step of a run.

    :ivar number: Its place among the ``total`` steps.
    """

    moment: Moment
    step: AnyStep
    number: int
    total: int


Observer = Callable[[Event], None]
"""Told of every step's moments, on the event loop; must return quickly."""


@dataclass(frozen=True, slots=True)
class Planned:
    """A step and the numbers of those that must be done before it."""

    step: AnyStep
    needs: tuple[int, ...] = ()


_AT_ONCE: dict[type, int] = {Launch: 4}
"""A QEMU that starts wants a processor; more at once only make every one of them late."""
_DEVICES_AT_ONCE = 16
"""A driver's own lock makes more of them pointless."""


def ignore(_: Event) -> None:
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
    specs: Mapping[str, OwnSpec | None] | None = None,
    observe: Observer = ignore,
    wait: float = CLAIM_SECONDS,
) -> None:
    """Do all steps, or undo what was done and raise the first error.

    :param kind: What the journal calls the command.
    :param title: What it is about.
    :param claims: Objects that are claimed beside those of the steps.
    :param change: What becomes ours, or is not any more, when all is done.
    :param specs: What becomes of the specs then.
    :param wait: Seconds to wait for another command that changes the same objects.
    :raise BusyError: Another command changes one of the objects; nothing was done.
    :raise HostError: The journal cannot be written.
    :raise MdoError: A step failed; its notes tell what could not be undone.
    """
    wanted = {claim for entry in planned for claim in entry.step.claims}.union(claims)
    run = await journal.begin(
        kind,
        title,
        [
            Entry(number, step_module.encode(entry.step), entry.needs)
            for number, entry in enumerate(planned)
        ],
        wanted,
        wait=wait,
    )
    work = _Work(journal, run, planned, context, observe)
    try:
        await work.do_all()
    except (Exception, asyncio.CancelledError) as error:
        # a second interruption cancels this too, and leaves the run to whoever recovers it
        if await asyncio.shield(asyncio.ensure_future(work.undo_all(error))):
            await journal.end(run, "undone")
            error.add_note("nothing was changed" if work.untouched else "all was undone")
        else:
            error.add_note("mdo recover tries again to undo it")
        raise
    await journal.end(run, "done", change=change, specs=specs)


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
    cause = MdoError(f"{run} was cut short")
    if await work.undo_all(cause):
        await journal.end(run, "undone")
    return work.stuck


async def finish(
    journal: Journal,
    run: Run,
    entries: Sequence[Entry],
    context: Context,
    *,
    change: Change | None = None,
    specs: Mapping[str, OwnSpec | None] | None = None,
    observe: Observer = ignore,
) -> list[MdoError]:
    """Do the rest of a run that somebody else left open, and close it unless a step fails.

    :return: Why it is not finished; then it stays open.
    """
    work = _Work.resumed(journal, run, entries, context, observe)
    try:
        await work.do_all()
    except MdoError as error:
        return [error]
    await journal.end(run, "done", change=change, specs=specs)
    return []


@dataclass
class _Work:
    """A run under way: what is known of each step."""

    journal: Journal
    run: Run
    planned: Sequence[Planned]
    context: Context
    observe: Observer
    progress: list[Progress] = field(default_factory=list)
    stuck: list[MdoError] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.progress:
            self.progress = [Progress.PLANNED] * len(self.planned)
        self.limits: dict[type, asyncio.Semaphore] = {}

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

    def tell(self, moment: Moment, number: int) -> None:
        self.observe(Event(moment, self.planned[number].step, number, len(self.planned)))

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
                else:
                    tasks.start(self._do(number, ready))

    async def _do(self, number: int, ready: Sequence[asyncio.Event]) -> None:
        step, needs = self.planned[number].step, self.planned[number].needs
        for need in needs:
            await ready[need].wait()
        async with self.limit(step):
            self.progress[number] = Progress.ACTING
            try:
                await self.journal.note(self.run, Progress.ACTING, [number], change=step.intent)
                self.tell(Moment.BEGIN, number)
                await step.make(self.context)
            except UnsettledError:
                self.tell(Moment.FAILED, number)
                raise  # what it did may show later: it stays acting, and is undone like that
            except (MdoError, asyncio.CancelledError):
                self.progress[number] = Progress.FAILED
                self.tell(Moment.FAILED, number)
                raise
            self.progress[number] = Progress.DONE
            self.tell(Moment.ACTED, number)
            await self.journal.note(self.run, Progress.DONE, [number], change=step.outcome)
            self.tell(Moment.DONE, number)
            ready[number].set()

    # ---- backward -------------------------------------------------------------------------------

    async def undo_all(self, cause: BaseException) -> bool:
        """Undo what was done, or may have been; failures become notes of ``cause``.

        :return: Whether nothing is stuck.
        """
        self.context.repairing = True
        undone = [asyncio.Event() for _ in self.planned]
        dependents: list[list[int]] = [[] for _ in self.planned]
        for number, entry in enumerate(self.planned):
            for need in entry.needs:
                dependents[need].append(number)
        try:
            failed = [n for n, p in enumerate(self.progress) if p is Progress.FAILED]
            for number in failed:
                refused = self.planned[number].step.refused
                await self.journal.note(self.run, Progress.FAILED, [number], change=refused)
            async with asyncio.TaskGroup() as tasks:
                for number in range(len(self.planned)):
                    tasks.create_task(self._undo(number, dependents[number], undone, cause))
        finally:
            self.context.repairing = False
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
            step = self.planned[number].step
            inverse = step.inverse()
            async with self.limit(inverse):
                try:
                    await self.journal.note(
                        self.run, Progress.UNDOING, [number], change=inverse.intent
                    )
                    self.tell(Moment.UNDO, number)
                    await inverse.make(self.context)
                    await self.journal.note(
                        self.run, Progress.UNDONE, [number], change=inverse.outcome
                    )
                    self.progress[number] = Progress.UNDONE
                    self.tell(Moment.UNDONE, number)
                except MdoError as error:
                    await self._stuck(number, error, cause)
        undone[number].set()

    async def _stuck(self, number: int, error: MdoError, cause: BaseException) -> None:
        words = f"could not undo: {self.planned[number].step}: {error.message}"
        cause.add_note(words)
        self.stuck.append(error)
        self.progress[number] = Progress.STUCK
        self.tell(Moment.STUCK, number)
        try:
            await self.journal.note(self.run, Progress.STUCK, [number], error=words)
        except MdoError as failure:
            cause.add_note(failure.message)


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
            for task in self.tasks:
                if task is not asyncio.current_task():
                    task.cancel()

    async def __aexit__(self, *_: object) -> None:
        if not self.tasks:
            return
        try:
            await asyncio.wait(self.tasks)
        except asyncio.CancelledError:
            for task in self.tasks:
                task.cancel()
            await asyncio.wait(self.tasks)
            raise
        if self.errors:
            first, *others = self.errors
            for other in others:
                first.add_note(f"also: {other}")
            raise first
