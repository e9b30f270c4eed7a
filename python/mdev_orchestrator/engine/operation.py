# SPDX-License-Identifier: GPL-2.0-or-later
"""Every change of the machine is an operation: what it claims, and how its steps are found.

:func:`perform` is the one way to run it, for every verb::

    recover   what an earlier command left open is undone or finished
    claim     the objects that must not change while the machine is looked at
    look      the operation looks at the machine and gives its steps
    claim     the objects that the steps change; if another command has one, wait and look again
    run       all steps, or none (executor.py)
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from mdev_orchestrator.engine import executor, recovery
from mdev_orchestrator.engine.context import Context
from mdev_orchestrator.engine.executor import (
    ALL_DONE,
    Execution,
    Observer,
    PlannedStep,
    ignore,
)
from mdev_orchestrator.engine.journal import (
    CLAIM_SECONDS,
    ClaimedError,
    Entry,
    Journal,
    Progress,
    Run,
    open_journal,
)
from mdev_orchestrator.engine.records import Change, Managed, SpecRecord
from mdev_orchestrator.engine.steps import decode
from mdev_orchestrator.errors import BusyError, CapacityError, Outcome, before_acting

T = TypeVar("T")

GRACE_SECONDS = 0.5
"""For a driver to count instances as free that were removed right before. No event tells."""
_LOOK_SECONDS = 0.1


@dataclass(frozen=True)
class Plan(Generic[T]):
    """What an operation found out by looking at the machine.

    :ivar result: What the caller gets when all is done.
    :ivar steps: In an order in which they could be done one by one.
    :ivar change: Records that change when all is done, beside those of the steps.
    :ivar specs: Records of specs that change then.
    """

    result: T
    steps: Sequence[PlannedStep] = ()
    change: Change = field(default_factory=Change)
    specs: Mapping[str, SpecRecord | None] = field(default_factory=dict)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to do, and nothing to write down."""
        return not (self.steps or self.change.devices or self.change.guests or self.specs)


@dataclass(frozen=True, kw_only=True)
class Operation(Generic[T]):
    """One command that changes the machine.

    :ivar kind: What the journal calls it: ``create``, ``attach``, ``apply``…
    :ivar title: What it is about.
    :ivar look: Looks at the machine, given the records, and returns the plan. It may be called
        again when another command was at work meanwhile.
    :ivar claims: Objects that are claimed before the machine is looked at.
    :ivar wait: Seconds to wait for another command that changes the same objects.
    :ivar ends_things: It ends or gives back what it names, so it may take objects away from a run
        that could not be undone.
    :ivar is_undone: Whether steps are undone when one fails.
    """

    kind: str
    title: str
    look: Callable[[Managed], Awaitable[Plan[T]]]
    claims: Collection[str] = ()
    wait: float = CLAIM_SECONDS
    ends_things: bool = False
    is_undone: bool = True


async def perform(operation: Operation[T], context: Context, *, observe: Observer = ignore) -> T:
    """Do all of an operation, or nothing.

    :raise BusyError: Another command changes one of its objects; nothing was done.
    :raise HostError: The journal cannot be written; nothing was done.
    :raise MdoError: A step failed, and all was undone; what could not be is in the error's notes.
    """
    is_done = False
    try:
        async with open_journal(context.machine) as journal:
            with before_acting():
                await recovery.recover_abandoned(journal, context, observe)
            result = await _Performance(operation, context, observe, journal).perform()
            is_done = True
    except asyncio.CancelledError as error:
        if is_done:  # while the journal was closed
            error.add_note(ALL_DONE)
        raise
    return result


class _Performance(Generic[T]):
    """One operation under way."""

    def __init__(
        self, operation: Operation[T], context: Context, observe: Observer, journal: Journal
    ) -> None:
        self.operation = operation
        self.context = context
        self.observe = observe
        self.journal = journal
        self.run: Run | None = None
        self.retried: set[int] = set()
        self.end = asyncio.get_running_loop().time() + operation.wait

    async def perform(self) -> T:
        operation = self.operation
        try:
            if operation.claims:
                await self._claim(operation.claims, ())
            plan = await self._plan()
        except BaseException as error:
            if isinstance(error, asyncio.CancelledError):
                error.add_note("nothing was changed")
            if self.run is not None:  # it has no steps: nothing was begun
                await self.journal.end(self.run, "undone")
            raise
        if self.run is None:
            return plan.result
        execution = Execution(self.journal, self.run, plan.steps, self.context, self.observe)
        await execution.perform(plan.change, plan.specs, undo=operation.is_undone)
        return plan.result

    async def _plan(self) -> Plan[T]:
        """Look at the machine until the steps that were found are written and claimed."""
        loop = asyncio.get_running_loop()
        grace = loop.time() + GRACE_SECONDS
        while True:
            try:
                with before_acting():
                    managed = await self.journal.read(self.journal.managed)
                    plan = await self.operation.look(managed)
            except CapacityError:
                if loop.time() >= grace:
                    raise
                await asyncio.sleep(_LOOK_SECONDS)
                continue
            if plan.is_empty and self.run is None:
                return plan
            if await self._claim(executor.claims_of(plan.steps), plan.steps):
                return plan

    async def _claim(self, claims: Collection[str], steps: Sequence[PlannedStep]) -> bool:
        """Claim objects, and write steps down with them.

        :return: Whether they were free; if not, they are now and the machine may have changed.
        :raise BusyError: They are not free in time.
        """
        loop = asyncio.get_running_loop()
        on_begin, on_cancel = executor.first_changes(steps)
        entries = executor.entries_of(steps)
        seize = self.operation.ends_things
        try:
            if self.run is None:
                self.run = await self.journal.begin(
                    self.operation.kind,
                    self.operation.title,
                    entries,
                    claims,
                    change=on_begin,
                    on_cancel=on_cancel,
                    wait=0,
                    seize=seize,
                )
            else:
                await self._write_plan(self.run, steps, claims, seize=seize)
        except ClaimedError as error:
            claimed: ClaimedError | None = error
        else:
            return True
        while claimed is not None:
            if loop.time() >= self.end:
                raise claimed
            left = max(self.end - loop.time(), 0)
            claimed = await self.journal.wait_unclaimed(claims, self.run, left)
            if claimed is not None and not self.journal.is_at_work(claimed.run):
                await self._retry_recovery(claimed)
        if not steps and claims:
            return await self._claim(claims, steps)
        return False

    async def _write_plan(
        self, run: Run, steps: Sequence[PlannedStep], claims: Collection[str], *, seize: bool
    ) -> None:
        on_begin, on_cancel = executor.first_changes(steps)
        try:
            await self.journal.plan(
                run, executor.entries_of(steps), claims, change=on_begin, wait=0, seize=seize
            )
        except asyncio.CancelledError:
            if await self.journal.read(lambda: bool(self.journal.steps(run))):
                await self.journal.end(run, "undone", change=on_cancel)
                self.run = None
            raise

    async def _retry_recovery(self, claimed: ClaimedError) -> None:
        """Undo once more a run that could not be undone, because its objects are needed now.

        :raise BusyError: It still cannot be; says why, and which command helps.
        """
        run = claimed.run
        if run.id not in self.retried:
            self.retried.add(run.id)
            done = await recovery.recover_abandoned(
                self.journal, self.context, self.observe, only=run.id
            )
            if not any(recovered.errors for recovered in done):
                return
        stuck = await self.journal.read(lambda: _stuck_steps(self.journal, run))
        why = next((f": {entry.error}" for entry in stuck if entry.error), "")
        guest = _guest_of(claimed, stuck)
        raise BusyError(
            f"{claimed.subject}: an earlier {run} could not be undone{why}",
            f"mdo guest stop --force {guest} ends the guest, then mdo recover"
            if guest
            else "mdo recover tells what stands in the way",
            outcome=Outcome.NO_EFFECT,
            subject=claimed.subject,
        )


def _stuck_steps(journal: Journal, run: Run) -> list[Entry]:
    return [entry for entry in journal.steps(run) if entry.progress is Progress.STUCK]


def _guest_of(claimed: ClaimedError, stuck: Sequence[Entry]) -> str:
    """The guest whose end would let a run be undone; empty if there is none."""
    steps = [decode(entry.data) for entry in stuck]
    for claim in (claimed.object, *(claim for step in steps for claim in step.claims)):
        kind, _, name = claim.partition(":")
        if kind == "guest":
            return name
    return ""
