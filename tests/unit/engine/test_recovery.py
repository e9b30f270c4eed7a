# SPDX-License-Identifier: GPL-2.0-or-later
"""After a crash: a child process dies at any moment of a run, and what it left is put in order.

The child does what a command does, on a machine of files that it shares with us, and ends without
a word at the chosen moment: before or after any write to the journal, to ``create`` or ``remove``.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from mdev_orchestrator.engine import recovery
from mdev_orchestrator.engine.context import Context
from mdev_orchestrator.engine.executor import Planned, StepEvent, StepEventKind, execute
from mdev_orchestrator.engine.journal import Entry, Journal, Progress
from mdev_orchestrator.engine.journal_db import read_managed
from mdev_orchestrator.engine.records import Change, DeviceRecord, GuestRecord, Managed, SpecRecord
from mdev_orchestrator.engine.recovery import Recovered
from mdev_orchestrator.engine.steps import Create, Launch, Remove, encode
from mdev_orchestrator.errors import HostError
from mdev_orchestrator.system.writer import WriteBatch, WriteResult
from unit import fakesys
from unit.fakesys import FakeSystem

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
        self.journal = self.path / "state" / "journal.db"

    def make(self, ours: Sequence[int]) -> None:
        """One parent, somebody's device, and some that are ours by a spec."""
        self.system.parent("card0")
        self.system.type("card0", "t-1", 100)
        self.system.mdev("card0", "t-1", FOREIGN)
        for number in ours:
            self.system.mdev("card0", "t-1", str(UUIDS[number]))
        with Journal.open(self.journal) as journal:
            change = Change(devices={UUIDS[number]: device(number) for number in ours})
            asyncio.run(settle(journal, change))

    def context(self) -> Context:
        self.system.groups = 100 + len(list((self.path / "sys/kernel/iommu_groups").iterdir()))
        return Context(
            host=self.path,
            guests=self.path / "guests",
            deadline=5,
        )

    def owned(self) -> Managed:
        return read_managed(self.journal)

    @property
    def ours(self) -> set[int]:
        """What is there and ours; they are the same, and the foreign one is as it was."""
        here = self.system.uuids()
        assert FOREIGN in here, "a foreign device was touched"
        assert {str(uuid) for uuid in self.owned().devices} == here - {FOREIGN}
        return {UUIDS.index(uuid) for uuid in self.owned().devices}

    def recover(self) -> list[Recovered]:
        with Journal.open(self.journal) as journal:
            done = asyncio.run(recovery.recover(journal, context=self.context()))
            assert journal.open_runs() == []
        assert all(run.errors == () for run in done)
        return done

    def in_child(self, work: Callable[[Killer], None], at: int) -> bool:
        """Whether a child process died at its ``at``-th moment, before it came to its end."""
        pid = os.fork()
        if not pid:
            status = 1
            with contextlib.suppress(BaseException):
                killer = Killer(self, at)
                killer.patch_writer()
                work(killer)
                status = 0
            os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        fakesys.wait_for_orphans()  # what its writer has begun comes to an end
        assert status in {0, KILLED}
        return status == KILLED

    def sql(self, statement: str) -> None:
        with contextlib.closing(sqlite3.connect(self.journal)) as other, other:
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

    def patch_writer(self) -> None:
        """Before a batch of writes begins, and before a result is known, there is a moment too."""
        begin, result = WriteBatch.begin, WriteBatch.result

        def begin_later(batch: WriteBatch) -> None:
            self.moment()
            begin(batch)

        def result_later(batch: WriteBatch, index: int, known: WriteResult) -> None:
            self.moment()
            result(batch, index, known)

        WriteBatch.begin = begin_later  # type: ignore[method-assign]
        WriteBatch.result = result_later  # type: ignore[method-assign]

    def context(self) -> Context:
        return self.place.context()


def command(kind: str, plan: Sequence[Planned]) -> Callable[[Killer], None]:
    """A command as a child runs it."""

    def run(killer: Killer) -> None:
        specs = {"lab": None} if kind == "destroy" else {"lab": SPEC}
        with Journal.open(killer.place.journal) as journal:
            asyncio.run(
                execute(
                    journal,
                    kind,
                    "lab",
                    plan,
                    killer.context(),
                    observe=killer.moment,
                    specs=specs,
                )
            )
            killer.moment()

    return run


def recovering(killer: Killer) -> None:
    """``mdo recover`` as a child runs it."""
    with Journal.open(killer.place.journal) as journal:
        context = killer.context()
        asyncio.run(recovery.recover(journal, context=context, observe=killer.moment))


@st.composite
def plans(draw: st.DrawFn) -> tuple[str, list[int], list[Planned]]:
    """A command, what is ours before it, and its steps."""
    kind = draw(st.sampled_from(["apply", "destroy"]))
    ours = list(range(draw(st.integers(1 if kind == "destroy" else 0, 3))))
    going = ours if kind == "destroy" else [n for n in ours if draw(st.booleans())]
    coming = [] if kind == "destroy" else list(range(8, 8 + draw(st.integers(0, 3))))
    steps: list[Create | Remove] = [Create(device=device(number)) for number in coming]
    steps += [Remove(device=device(number)) for number in going]
    steps = draw(st.permutations(steps))
    needs = [
        tuple(sorted(draw(st.sets(st.integers(0, n - 1), max_size=2)))) if n else ()
        for n in range(len(steps))
    ]
    return kind, ours, [Planned(step, need) for step, need in zip(steps, needs, strict=True)]


@settings(max_examples=30)
@given(
    planned=plans(),
    fails=st.booleans(),
    at=st.integers(0, 24),
    again=st.none() | st.integers(0, 12),
)
def test_killed_at_any_moment_it_is_all_or_nothing(
    tmp_path_factory: pytest.TempPathFactory,
    planned: tuple[str, list[int], list[Planned]],
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
    have = place.ours
    assert have in (after, set(before)), "neither all nor nothing"
    if not killed:
        assert have == (set(before) if fails else after)
    if have == after != set(before):
        assert ("lab" in place.owned().specs) == (kind != "destroy")
    event(f"{kind}: {'all' if have == after else 'nothing'}")
    place.recover()
    assert place.ours == have, "a second recovery did something"
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
    place: Place, kind: str, plan: Sequence[Planned], moment: StepEventKind, number: int
) -> None:
    """Let a command die when a step of it comes to a certain moment."""

    def work(killer: Killer) -> None:
        def observe(seen: StepEvent) -> None:
            if (seen.kind, seen.number) == (moment, number):
                os._exit(KILLED)

        with Journal.open(place.journal) as journal:
            asyncio.run(execute(journal, kind, "lab", plan, place.context(), observe=observe))

    assert place.in_child(work, -1)


def creates(*numbers: int) -> list[Planned]:
    """One after the other."""
    return [
        Planned(Create(device=device(number)), (index - 1,) if index else ())
        for index, number in enumerate(numbers)
    ]


def removes(*numbers: int) -> list[Planned]:
    return [
        Planned(Remove(device=device(number)), (index - 1,) if index else ())
        for index, number in enumerate(numbers)
    ]


# ---- what it says and which way it goes ----


def test_an_apply_is_undone(place: Place) -> None:
    place.make([])
    crashed(place, "apply", creates(0, 1, 2), StepEventKind.ACTED, 1)
    with Journal.open(place.journal) as journal:
        (pending,) = recovery.pending(journal)
    assert (pending.way, pending.run.kind, pending.errors) == ("undo", "apply", ())
    assert list(pending.steps) == [
        f"create t-1 on card0: mdev {UUIDS[0]}",
        f"create t-1 on card0: mdev {UUIDS[1]}",
    ]
    (done,) = place.recover()
    assert done.steps == pending.steps
    assert place.ours == set()


def test_a_destroy_is_finished(place: Place) -> None:
    place.make([0, 1, 2])
    crashed(place, "destroy", removes(0, 1, 2), StepEventKind.DONE, 0)
    (done,) = place.recover()
    assert done.way == "finish"
    assert place.ours == set()
    assert place.owned().specs == {}


def test_a_destroy_that_was_undoing_itself_goes_on_doing_so(place: Place) -> None:
    place.make([0, 1, 2])
    place.system.refuse[f"{UUIDS[2]}/remove"] = 5
    crashed(place, "destroy", removes(0, 1, 2), StepEventKind.UNDONE, 1)
    place.system.refuse.clear()
    (done,) = place.recover()
    assert done.way == "undo"
    assert place.ours == {0, 1, 2}
    assert "lab" in place.owned().specs


def test_a_destroy_that_had_not_decided_anything_changes_nothing(place: Place) -> None:
    """It was killed when it had claimed the spec and not yet looked at the machine."""
    place.make([0, 1])

    def work(_: Killer) -> None:
        with Journal.open(place.journal) as journal:
            asyncio.run(journal.begin("destroy", "lab", [], ["spec:lab"]))
        os._exit(KILLED)

    assert place.in_child(work, -1)
    place.recover()
    assert place.ours == {0, 1}
    assert "lab" in place.owned().specs


def test_who_is_at_work_is_left_alone(place: Place) -> None:
    place.make([])
    with Journal.open(place.journal) as journal:
        asyncio.run(journal.begin("apply", "lab", [Entry(0, encode(creates(0)[0].step))], []))
        assert recovery.pending(journal) == []
        assert asyncio.run(recovery.recover(journal, context=place.context())) == []
        assert len(journal.open_runs()) == 1


def test_two_recoveries_at_once_undo_once(place: Place) -> None:
    place.make([])
    crashed(place, "apply", creates(0, 1), StepEventKind.ACTED, 1)

    async def both() -> tuple[list[Recovered], list[Recovered]]:
        with Journal.open(place.journal) as one, Journal.open(place.journal) as other:
            context = place.context()
            return await asyncio.gather(
                recovery.recover(one, context=context), recovery.recover(other, context=context)
            )

    assert sorted(len(done) for done in asyncio.run(both())) == [0, 1]
    assert [uuid for name, uuid in place.system.writes if name == "remove"] == [
        str(UUIDS[1]),
        str(UUIDS[0]),
    ]
    assert place.ours == set()


def test_the_newest_is_undone_first(place: Place) -> None:
    place.make([])
    crashed(place, "create", creates(0), StepEventKind.ACTED, 0)
    crashed(place, "apply", creates(1), StepEventKind.ACTED, 0)
    assert [done.run.kind for done in place.recover()] == ["apply", "create"]
    assert place.ours == set()


def test_a_device_of_somebody_else_under_our_uuid_stays(place: Place) -> None:
    """It died before it created; meanwhile another made one of that UUID, of another type."""
    place.make([])
    crashed(place, "apply", creates(0), StepEventKind.BEGIN, 0)
    place.system.type("card0", "t-2")
    place.system.mdev("card0", "t-2", str(UUIDS[0]))
    place.recover()
    assert place.system.uuids() == {FOREIGN, str(UUIDS[0])}
    assert place.owned().devices == {}


def test_what_cannot_be_undone_is_told_and_tried_again_when_asked(place: Place) -> None:
    place.make([])
    crashed(place, "apply", creates(0), StepEventKind.ACTED, 0)
    place.system.refuse[f"{UUIDS[0]}/remove"] = 1
    with Journal.open(place.journal) as journal:
        context = place.context()
        (done,) = asyncio.run(recovery.recover(journal, context=context))
        assert "Operation not permitted" in done.errors[0].message
        (run,) = journal.open_runs()
        assert [entry.progress for entry in journal.steps(run)] == [Progress.STUCK]
    place.system.refuse.clear()
    place.sql("UPDATE run SET start_time = 1 WHERE ended IS NULL")
    with Journal.open(place.journal) as journal:
        context = place.context()
        assert asyncio.run(recovery.recover(journal, context=context)) == []
        (done,) = asyncio.run(recovery.recover(journal, context=context, again=True))
    assert done.errors == ()
    assert place.ours == set()


def test_a_step_that_cannot_be_read_is_damage(place: Place) -> None:
    place.make([])
    crashed(place, "apply", creates(0), StepEventKind.ACTED, 0)
    place.sql("""UPDATE step SET data = '{"do": "dance"}'""")
    with Journal.open(place.journal) as journal, pytest.raises(HostError, match="is damaged"):
        asyncio.run(recovery.recover(journal, context=place.context()))
    assert str(UUIDS[0]) in place.system.uuids()


# ---- after a reboot ----


def rebooted(place: Place) -> list[Recovered]:
    """Devices do not outlive the machine; the journal does."""
    for uuid in place.system.uuids() - {FOREIGN}:
        asyncio.run(place.system.write(str(place.system.bus / uuid / "remove"), b"1"))
    place.system.writes.clear()
    place.sql("UPDATE run SET boot_id = 'an earlier one' WHERE ended IS NULL")
    done = place.recover()
    assert place.system.writes == [], "nothing was left to do"
    return done


@pytest.mark.parametrize("moment", [StepEventKind.BEGIN, StepEventKind.ACTED, StepEventKind.DONE])
def test_an_apply_of_an_earlier_boot_is_forgotten(place: Place, moment: StepEventKind) -> None:
    """What is ours is what it was before: the old devices, to be brought back."""
    place.make([0, 1])
    before = place.owned()
    removals = [Planned(Remove(device=device(0)), (1,)), Planned(Remove(device=device(1)), (2,))]
    crashed(place, "apply", [*creates(8, 9), *removals], moment, 2)
    (done,) = rebooted(place)
    assert (done.way, len(done.steps)) == ("forget", 3)
    assert place.owned() == before


def test_a_destroy_of_an_earlier_boot_is_forgotten_too(place: Place) -> None:
    place.make([0, 1])
    before = place.owned()
    crashed(place, "destroy", removes(0, 1), StepEventKind.DONE, 0)
    (done,) = rebooted(place)
    assert done.way == "forget"
    assert place.owned() == before


def test_a_guest_of_an_earlier_boot_is_ours_as_it_was(place: Place) -> None:
    place.make([])
    old = GuestRecord(name="g", uuid=UUIDS[5], spec="lab")

    async def story() -> None:
        with Journal.open(place.journal) as journal:
            await journal.put(Change(guests={"g": old}))
            fresh = GuestRecord(name="h", uuid=UUIDS[6], spec="lab")
            steps = [Launch(guest=old, kept=True), Launch(guest=fresh)]
            entries = [Entry(number, encode(step)) for number, step in enumerate(steps)]
            run = await journal.begin("apply", "lab", entries, [])
            for number, step in enumerate(steps):
                await journal.note(run, Progress.DONE, [number], change=step.intent)

    asyncio.run(story())
    place.sql("UPDATE run SET start_time = 1 WHERE ended IS NULL")
    rebooted(place)
    assert place.owned().guests == {"g": old}


async def test_what_no_spec_asks_for_and_is_gone_is_forgotten(tmp_path: Path) -> None:
    """A removal was killed before its note, or a driver was unloaded."""
    place = Place(tmp_path)
    place.system.parent("card0")
    place.system.type("card0", "t-1", 100)
    place.system.mdev("card0", "t-1", str(UUIDS[0]))
    bare = {UUIDS[n]: DeviceRecord(uuid=UUIDS[n], parent="card0", type="t-1") for n in (0, 1, 2)}
    with Journal.open(place.journal) as journal:
        await journal.put(Change(devices={**bare, UUIDS[3]: device(3)}))
        run = await journal.begin("create", "1 x t-1", (), [f"mdev:{UUIDS[2]}"])
        await recovery.recover(journal, context=place.context())
        # one is there, one may come yet, one will be made again
        assert set(journal.owned().devices) == {UUIDS[0], UUIDS[2], UUIDS[3]}
        await journal.end(run, "done")
        await recovery.recover(journal, context=place.context())
    assert set(place.owned().devices) == {UUIDS[0], UUIDS[3]}
