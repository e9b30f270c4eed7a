# SPDX-License-Identifier: GPL-2.0-or-later
"""After a crash: a child process dies at any moment of a run, and what it left is put in order.

The child does what a command does, on a machine of files that it shares with us, and ends without
a word at the chosen moment: before or after any write to the journal, to ``create`` or ``remove``.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import shutil
import sqlite3
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from uuid import UUID

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from mdev_orchestrator.engine import recovery
from mdev_orchestrator.engine.context import Context
from mdev_orchestrator.engine.executor import Observer, PlannedStep, StepEvent, StepEventKind
from mdev_orchestrator.engine.journal import Entry, Journal, Progress, open_journal
from mdev_orchestrator.engine.journal_db import read_managed
from mdev_orchestrator.engine.operation import Operation, Plan, perform
from mdev_orchestrator.engine.records import Change, DeviceRecord, GuestRecord, Managed, SpecRecord
from mdev_orchestrator.engine.recovery import Recovered
from mdev_orchestrator.engine.steps import Create, Launch, Remove, Stop, encode
from mdev_orchestrator.errors import HostError
from mdev_orchestrator.machine import Machine
from mdev_orchestrator.system.writer import WriteBatch, WriteResult
from unit import fakesys
from unit.fakesys import FakeSystem

T = TypeVar("T")

UUIDS = [UUID(f"83b8f4f2-509f-382f-3c1e-e6bfe0fa1{n:03}") for n in range(16)]
FOREIGN = "99999999-509f-382f-3c1e-e6bfe0fa1001"
SPEC = SpecRecord(name="lab", text="{}", source="/lab.toml", applied=1.0)
KILLED = 9


def device(number: int) -> DeviceRecord:
    return DeviceRecord(uuid=UUIDS[number], parent="card0", type="t-1", spec="lab", owner="pool:p")


@dataclass
class Place:
    """A machine of files, and a journal beside it."""

    path: Path

    def __post_init__(self) -> None:
        self.system = FakeSystem(self.path)

    @property
    def machine(self) -> Machine:
        return Machine(self.path, state=self.path / "state")

    def run(self, work: Callable[[Machine], Awaitable[T]]) -> T:
        """Do something with the machine, as one process does."""

        async def whole() -> T:
            machine = self.machine
            try:
                return await work(machine)
            finally:
                await machine.close()

        return asyncio.run(whole())

    def journal(self) -> Journal:
        return Journal.open(self.machine.journal_path)

    def make(self, managed: Sequence[int]) -> None:
        """One parent, a device of another program, and some that are managed for a spec."""
        self.system.parent("card0")
        self.system.type("card0", "t-1", 100)
        self.system.mdev("card0", "t-1", FOREIGN)
        for number in managed:
            self.system.mdev("card0", "t-1", str(UUIDS[number]))
        change = Change(devices={UUIDS[number]: device(number) for number in managed})
        with self.journal() as journal:
            asyncio.run(settle(journal, change))

    def managed(self) -> Managed:
        return read_managed(self.machine)

    @property
    def numbers(self) -> set[int]:
        """What is there and managed; they are the same, and the foreign one is as it was."""
        here = self.system.uuids()
        assert FOREIGN in here, "a foreign device was touched"
        assert {str(uuid) for uuid in self.managed().devices} == here - {FOREIGN}
        return {UUIDS.index(uuid) for uuid in self.managed().devices}

    def open_runs(self) -> list[list[Progress]]:
        """How far the steps of each open run are."""
        with self.journal() as journal:
            return [[entry.progress for entry in journal.steps(run)] for run in journal.open_runs()]

    def recover(self) -> list[Recovered]:
        done = self.run(lambda machine: recovery.recover(machine, deadline=5))
        assert self.open_runs() == []
        assert all(run.errors == () for run in done)
        return done

    def in_child(self, work: Callable[[Killer], None], at: int, *, orphans: bool = False) -> bool:
        """Whether a child process died at its ``at``-th moment, before it came to its end.

        :param orphans: Do not wait for what it has forked.
        """
        pid = os.fork()
        if not pid:
            status = 1
            with contextlib.suppress(BaseException):
                killer = Killer(self, at)
                killer.patch()
                work(killer)
                status = 0
            os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if not orphans:
            fakesys.wait_for_orphans()  # what its writer has begun comes to an end
        assert status in {0, KILLED}
        return status == KILLED

    def sql(self, statement: str) -> None:
        with contextlib.closing(sqlite3.connect(self.machine.journal_path)) as other, other:
            other.execute(statement)


async def settle(journal: Journal, change: Change) -> None:
    run = await journal.begin("apply", "lab", [], [])
    await journal.end(run, "done", change=change, specs={"lab": SPEC})


@dataclass
class Killer:
    """Ends the process at a chosen moment."""

    place: Place
    at: int

    def moment(self, _: StepEvent | None = None) -> None:
        if self.at == 0:
            os._exit(KILLED)
        self.at -= 1

    def patch(self) -> None:
        """There are moments around each flush of the journal, each batch of writes and result."""
        begin, result, commit = WriteBatch.begin, WriteBatch.result, Journal._commit

        def begin_later(batch: WriteBatch) -> None:
            self.moment()
            begin(batch)

        def result_later(batch: WriteBatch, index: int, known: WriteResult) -> None:
            self.moment()
            result(batch, index, known)

        def commit_later(journal: Journal, changes: Sequence[Callable[[], object]]) -> list[object]:
            self.moment()
            results = commit(journal, changes)
            self.moment()
            return results

        WriteBatch.begin = begin_later  # type: ignore[method-assign]
        WriteBatch.result = result_later  # type: ignore[method-assign]
        Journal._commit = commit_later  # type: ignore[method-assign]

    def command(self, kind: str, plan: Sequence[PlannedStep], observe: Observer) -> None:
        """A command as a process runs it."""
        specs = {"lab": None if kind == "destroy" else SPEC} if kind in {"apply", "destroy"} else {}

        async def look(_: Managed) -> Plan[None]:
            return Plan(None, plan, specs=specs)

        operation = Operation(kind=kind, title="lab", look=look, claims=["spec:lab"])
        self.place.run(lambda machine: perform(operation, Context(machine, 5), observe=observe))


def command(kind: str, plan: Sequence[PlannedStep]) -> Callable[[Killer], None]:
    def run(killer: Killer) -> None:
        killer.command(kind, plan, killer.moment)
        killer.moment()

    return run


def recovering(killer: Killer) -> None:
    """``mdo recover`` as a child runs it."""
    killer.place.run(lambda machine: recovery.recover(machine, deadline=5, observe=killer.moment))


@st.composite
def plans(draw: st.DrawFn) -> tuple[str, list[int], list[PlannedStep]]:
    """A command, what is managed before it, and its steps."""
    kind = draw(st.sampled_from(["apply", "destroy"]))
    before = list(range(draw(st.integers(1 if kind == "destroy" else 0, 3))))
    going = before if kind == "destroy" else [n for n in before if draw(st.booleans())]
    coming = [] if kind == "destroy" else list(range(8, 8 + draw(st.integers(0, 3))))
    steps: list[Create | Remove] = [Create(device=device(number)) for number in coming]
    steps += [Remove(device=device(number)) for number in going]
    steps = draw(st.permutations(steps))
    needs = [
        tuple(sorted(draw(st.sets(st.integers(0, n - 1), max_size=2)))) if n else ()
        for n in range(len(steps))
    ]
    return kind, before, [PlannedStep(step, need) for step, need in zip(steps, needs, strict=True)]


@settings(max_examples=30)
@given(
    planned=plans(),
    fails=st.booleans(),
    at=st.integers(0, 48),
    again=st.none() | st.integers(0, 24),
)
def test_killed_at_any_moment_it_is_all_or_nothing(
    tmp_path_factory: pytest.TempPathFactory,
    planned: tuple[str, list[int], list[PlannedStep]],
    fails: bool,
    at: int,
    again: int | None,
) -> None:
    """Also when a step fails, and it dies while it undoes; also when ``recover`` is killed."""
    kind, before, plan = planned
    place = Place(tmp_path_factory.mktemp("crash"))
    place.make(before)
    after = {UUIDS.index(p.step.device.uuid) for p in plan if isinstance(p.step, Create)}
    after |= set(before) - {
        UUIDS.index(p.step.device.uuid) for p in plan if isinstance(p.step, Remove)
    }
    last = plan[-1].step if plan else None
    if fails and isinstance(last, Create | Remove):
        kind_of = "" if isinstance(last, Create) else "/remove"
        place.system.refuse[f"{last.device.uuid}{kind_of}"] = 5
        work = suppressing(command(kind, plan))
    else:
        fails, work = False, command(kind, plan)
    killed = place.in_child(work, at)
    place.system.refuse.clear()
    if again is not None and killed:
        event("recover was killed too" if place.in_child(recovering, again) else "recovered")
    place.recover()
    have = place.numbers
    assert have in (after, set(before)), "neither all nor nothing"
    if not killed:
        assert have == (set(before) if fails else after)
    if have == after != set(before):
        assert ("lab" in place.managed().specs) == (kind != "destroy")
    event(f"{kind}: {'all' if have == after else 'nothing'}")
    place.recover()
    assert place.numbers == have, "a second recovery did something"
    shutil.rmtree(place.path)


def suppressing(work: Callable[[Killer], None]) -> Callable[[Killer], None]:
    def run(killer: Killer) -> None:
        with contextlib.suppress(Exception):
            work(killer)

    return run


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def crashed(
    place: Place, kind: str, plan: Sequence[PlannedStep], moment: StepEventKind, number: int
) -> None:
    """Let a command die when a step of it comes to a certain moment."""

    def work(killer: Killer) -> None:
        def observe(seen: StepEvent) -> None:
            if (seen.kind, seen.number) == (moment, number):
                os._exit(KILLED)

        killer.command(kind, plan, observe)

    assert place.in_child(work, -1)


def creates(*numbers: int) -> list[PlannedStep]:
    """One after the other."""
    return [
        PlannedStep(Create(device=device(number)), (index - 1,) if index else ())
        for index, number in enumerate(numbers)
    ]


def removes(*numbers: int) -> list[PlannedStep]:
    return [
        PlannedStep(Remove(device=device(number)), (index - 1,) if index else ())
        for index, number in enumerate(numbers)
    ]


# ---- what it says and which way it goes ----


def test_an_apply_is_undone(place: Place) -> None:
    place.make([])
    crashed(place, "apply", creates(0, 1, 2), StepEventKind.ACTED, 1)
    (pending,) = place.run(recovery.pending)
    assert (pending.way, pending.run.kind, pending.errors) == ("undo", "apply", ())
    assert list(pending.steps) == [
        f"create t-1 on card0: mdev {UUIDS[0]}",
        f"create t-1 on card0: mdev {UUIDS[1]}",
    ]
    (done,) = place.recover()
    assert done.steps == pending.steps
    assert place.numbers == set()


def test_a_destroy_is_finished(place: Place) -> None:
    place.make([0, 1, 2])
    crashed(place, "destroy", removes(0, 1, 2), StepEventKind.DONE, 0)
    (done,) = place.recover()
    assert done.way == "finish"
    assert place.numbers == set()
    assert place.managed().specs == {}


def test_a_destroy_that_was_undoing_itself_goes_on_doing_so(place: Place) -> None:
    place.make([0, 1, 2])
    place.system.refuse[f"{UUIDS[2]}/remove"] = 5
    crashed(place, "destroy", removes(0, 1, 2), StepEventKind.UNDONE, 1)
    place.system.refuse.clear()
    (done,) = place.recover()
    assert done.way == "undo"
    assert place.numbers == {0, 1, 2}
    assert "lab" in place.managed().specs


def test_a_destroy_that_had_not_decided_anything_changes_nothing(place: Place) -> None:
    """It was killed when it had claimed the spec and not yet looked at the machine."""
    place.make([0, 1])

    def work(_: Killer) -> None:
        with place.journal() as journal:
            asyncio.run(journal.begin("destroy", "lab", [], ["spec:lab"]))
            os._exit(KILLED)

    assert place.in_child(work, -1)
    place.recover()
    assert place.numbers == {0, 1}
    assert "lab" in place.managed().specs


def test_a_run_that_a_process_is_at_work_at_is_left_alone(place: Place) -> None:
    place.make([])
    with place.journal() as journal:
        asyncio.run(journal.begin("apply", "lab", [Entry(0, encode(creates(0)[0].step))], []))
        assert place.run(recovery.pending) == []
        assert place.run(recovery.recover) == []
        assert len(journal.open_runs()) == 1
    assert len(place.recover()) == 1


def test_a_process_that_was_just_killed_is_waited_for(place: Place) -> None:
    """A child that it had just forked has the lock of its run for a moment yet."""
    place.make([])

    def work(_: Killer) -> None:
        with place.journal() as journal:
            asyncio.run(journal.begin("apply", "lab", [Entry(0, encode(creates(0)[0].step))], []))
            if not os.fork():
                time.sleep(0.3)
            os._exit(KILLED)

    assert place.in_child(work, -1, orphans=True)
    assert len(place.recover()) == 1


def test_two_recoveries_at_once_undo_once(place: Place) -> None:
    place.make([])
    crashed(place, "apply", creates(0, 1), StepEventKind.ACTED, 1)

    async def both(machine: Machine) -> tuple[list[Recovered], list[Recovered]]:
        return await asyncio.gather(recovery.recover(machine), recovery.recover(machine))

    assert sorted(len(done) for done in place.run(both)) == [0, 1]
    assert [uuid for name, uuid in place.system.writes if name == "remove"] == [
        str(UUIDS[1]),
        str(UUIDS[0]),
    ]
    assert place.numbers == set()


def test_the_newest_is_undone_first(place: Place) -> None:
    """Two commands were at work at the same time when their terminal was closed."""
    place.make([])

    async def story(machine: Machine) -> None:
        async with open_journal(machine) as journal:
            for number, kind in enumerate(("create", "apply")):
                (planned,) = creates(number)
                entry = Entry(0, encode(planned.step), (), Progress.ACTING)
                await journal.begin(kind, "lab", [entry], change=planned.step.on_begin)
                place.system.mdev("card0", "t-1", str(UUIDS[number]))

    place.run(story)
    assert [done.run.kind for done in place.recover()] == ["apply", "create"]
    assert place.numbers == set()


def test_a_device_of_another_program_under_the_same_uuid_stays(place: Place) -> None:
    """It died before it created; meanwhile another program created one, of another type."""
    place.make([])
    crashed(place, "apply", creates(0), StepEventKind.BEGIN, 0)
    place.system.type("card0", "t-2")
    place.system.mdev("card0", "t-2", str(UUIDS[0]))
    place.recover()
    assert place.system.uuids() == {FOREIGN, str(UUIDS[0])}
    assert place.managed().devices == {}


def test_what_cannot_be_undone_is_told_and_tried_again_when_asked(place: Place) -> None:
    """What could not be undone is not counted among what was."""
    place.make([])
    crashed(place, "apply", creates(0, 1), StepEventKind.ACTED, 1)
    place.system.refuse[f"{UUIDS[0]}/remove"] = errno.EPERM
    (done,) = place.run(recovery.recover)
    assert (done.way, list(done.steps), list(done.stuck)) == (
        "undo",
        [f"create t-1 on card0: mdev {UUIDS[1]}"],
        [f"create t-1 on card0: mdev {UUIDS[0]}"],
    )
    (error,) = done.errors
    assert "Operation not permitted" in error.message
    assert error.subject == f"mdev {UUIDS[0]}"
    assert place.open_runs() == [[Progress.STUCK, Progress.UNDONE]]
    place.system.refuse.clear()

    async def as_other_commands(machine: Machine) -> list[Recovered]:
        async with open_journal(machine) as journal:
            return await recovery.recover_abandoned(journal, Context(machine))

    assert place.run(as_other_commands) == []
    (again,) = place.recover()
    assert (again.steps, again.stuck) == (done.stuck, ())
    assert place.numbers == set()


def test_a_step_that_cannot_be_read_is_damage(place: Place) -> None:
    place.make([])
    crashed(place, "apply", creates(0), StepEventKind.ACTED, 0)
    place.sql("""UPDATE step SET data = '{"do": "dance"}'""")
    with pytest.raises(HostError, match="is damaged"):
        place.run(recovery.recover)
    assert str(UUIDS[0]) in place.system.uuids()


def test_a_stop_is_closed_and_starts_nothing(place: Place) -> None:
    """Whether the guest still runs is for the user to see."""
    place.make([])
    step = Stop(guest=GuestRecord(name="g", uuid=UUIDS[5]), unrecorded=True)
    crashed(place, "stop", [PlannedStep(step)], StepEventKind.BEGIN, 0)
    (done,) = place.recover()
    assert (done.way, done.steps, done.stuck) == ("close", ("stop guest g",), ())


# ---- after a reboot ----


def rebooted(place: Place) -> list[Recovered]:
    """Devices do not outlive the machine; the journal does."""
    for uuid in place.system.uuids() - {FOREIGN}:
        place.system.perform(str(place.system.bus / uuid / "remove"), b"1")
    place.system.writes.clear()
    place.sql("UPDATE run SET boot_id = 'an earlier one' WHERE ended IS NULL")
    done = place.recover()
    assert place.system.writes == [], "nothing was left to do"
    return done


@pytest.mark.parametrize("moment", [StepEventKind.BEGIN, StepEventKind.ACTED, StepEventKind.DONE])
def test_an_apply_of_an_earlier_boot_is_forgotten(place: Place, moment: StepEventKind) -> None:
    """What is managed is what it was before: the old devices, to be brought back."""
    place.make([0, 1])
    before = place.managed()
    removals = [
        PlannedStep(Remove(device=device(0)), (1,)),
        PlannedStep(Remove(device=device(1)), (2,)),
    ]
    crashed(place, "apply", [*creates(8, 9), *removals], moment, 2)
    (done,) = rebooted(place)
    assert (done.way, len(done.steps)) == ("forget", 3)
    assert place.managed() == before


def test_a_destroy_of_an_earlier_boot_is_forgotten_too(place: Place) -> None:
    place.make([0, 1])
    before = place.managed()
    crashed(place, "destroy", removes(0, 1), StepEventKind.DONE, 0)
    (done,) = rebooted(place)
    assert done.way == "forget"
    assert place.managed() == before


def test_a_guest_of_an_earlier_boot_is_managed_as_it_was(place: Place) -> None:
    place.make([])
    old = GuestRecord(name="g", uuid=UUIDS[5], spec="lab")

    fresh = GuestRecord(name="h", uuid=UUIDS[6], spec="lab")
    steps = [Launch(guest=old, kept=True), Launch(guest=fresh)]

    async def story(machine: Machine) -> None:
        async with open_journal(machine) as journal:
            await journal.put(Change(guests={"g": old}))
            entries = [Entry(number, encode(step)) for number, step in enumerate(steps)]
            run = await journal.begin("apply", "lab", entries, [])
            for number, step in enumerate(steps):
                await journal.note(run, Progress.DONE, [number], change=step.on_begin)

    place.run(story)
    rebooted(place)
    assert place.managed().guests == {"g": old}


async def test_what_no_spec_asks_for_and_is_gone_is_forgotten(tmp_path: Path) -> None:
    """A removal was killed before its note, or a driver was unloaded."""
    place = Place(tmp_path)
    place.system.parent("card0")
    place.system.type("card0", "t-1", 100)
    place.system.mdev("card0", "t-1", str(UUIDS[0]))
    bare = {UUIDS[n]: DeviceRecord(uuid=UUIDS[n], parent="card0", type="t-1") for n in (0, 1, 2)}
    async with open_journal(place.machine) as journal:
        await journal.put(Change(devices={**bare, UUIDS[3]: device(3)}))
        run = await journal.begin("create", "1 x t-1", (), [f"mdev:{UUIDS[2]}"])
        await recovery.recover(place.machine)
        # one is there, one may come yet, one will be made again
        assert set(place.managed().devices) == {UUIDS[0], UUIDS[2], UUIDS[3]}
        await journal.end(run, "done")
        await recovery.recover(place.machine)
    assert set(place.managed().devices) == {UUIDS[0], UUIDS[3]}
