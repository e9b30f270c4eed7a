# SPDX-License-Identifier: GPL-2.0-or-later
"""All steps or none: order, concurrency, the first error first, and whatever ends a run early.

The steps are real ones on a machine of files, so that what is undone can be seen. Where a step
must misbehave in a way that no machine does, the test brings a step of its own.
"""

from __future__ import annotations

import asyncio
import errno
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mdev_orchestrator.engine import executor, recovery
from mdev_orchestrator.engine.context import Context, UnsettledError
from mdev_orchestrator.engine.executor import Observer, Planned, StepEvent, StepEventKind, execute
from mdev_orchestrator.engine.journal import Entry, Journal, Progress, Run
from mdev_orchestrator.engine.records import Change, DeviceRecord
from mdev_orchestrator.engine.steps import Create, Remove, encode
from mdev_orchestrator.errors import BusyError, DeadlineError, HostError, MdoError, UuidError
from unit.fakesys import FakeSystem

UUIDS = [UUID(f"83b8f4f2-509f-382f-3c1e-e6bfe0fa1{n:03}") for n in range(64)]
TEXTS = [str(uuid) for uuid in UUIDS]


@dataclass
class Machine:
    """A machine of files, a journal, and what was seen to happen."""

    system: FakeSystem
    journal: Journal
    context: Context
    events: list[StepEvent] = field(default_factory=list)

    async def run(self, planned: Sequence[Planned], kind: str = "apply") -> None:
        await execute(
            self.journal, kind, "lab", planned, self.context, observe=self.events.append, wait=0
        )

    def moments(self, kind: StepEventKind) -> list[int]:
        return [event.number for event in self.events if event.kind is kind]

    @property
    def owned(self) -> set[str]:
        return {str(uuid) for uuid in self.journal.owned().devices}

    def progress(self) -> list[Progress]:
        """Of the steps of the run that stands open."""
        (run,) = self.journal.open_runs()
        return [entry.progress for entry in self.journal.steps(run)]

    async def recover(self) -> None:
        """What the next command does when this process has gone."""
        with Journal.open(self.journal.path) as journal:
            journal._db.execute("UPDATE run SET start_time = 1 WHERE ended IS NULL")
            for run in await recovery.recover(journal, context=self.context, again=True):
                assert run.errors == ()

    def untouched(self) -> None:
        """Nothing is there, nothing is ours, nothing stands open."""
        assert self.system.uuids() == set()
        assert self.owned == set()
        assert self.journal.open_runs() == []


@pytest.fixture
def machine(system: FakeSystem, tmp_path: Path) -> Iterator[Machine]:
    system.parent("card0")
    system.type("card0", "t-1", 100)
    with Journal.open(tmp_path / "state" / "journal.db") as journal:
        context = Context(
            host=system.root, guests=tmp_path / "guests", deadline=5, write=system.write
        )
        yield Machine(system, journal, context)


async def seen(what: Callable[[], bool]) -> None:
    """Wait until something can be seen; a test that never sees it fails."""
    for _ in range(2000):
        if what():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not happen")


def device(number: int, parent: str = "card0") -> DeviceRecord:
    return DeviceRecord(uuid=UUIDS[number], parent=parent, type="t-1", spec="lab")


def create(number: int, *needs: int) -> Planned:
    return Planned(Create(device=device(number)), needs)


def remove(number: int, *needs: int) -> Planned:
    return Planned(Remove(device=device(number)), needs)


def node(machine: Machine, number: int) -> str:
    """The file in ``/dev`` that opens a device."""
    link = machine.system.bus / TEXTS[number] / "iommu_group"
    return f"/dev/vfio/{link.readlink().name}"


class Bad(Create, frozen=True, tag="bad"):
    """A step that ends as a test wants, after it has made its device."""

    async def make(self, context: Context) -> None:
        await super().make(context)
        raise ENDS[self.device.want]("it was to be so")


ENDS: dict[str, type[Exception]] = {"bug": TypeError, "unsettled": UnsettledError}


def bad(number: int, end: str, *needs: int) -> Planned:
    made = DeviceRecord(uuid=UUIDS[number], parent="card0", type="t-1", want=end)
    return Planned(Bad(device=made), needs)


class Broken(Create, frozen=True, tag="broken"):
    """A step that can be done, and whose undoing is a bug."""

    def inverse(self) -> Remove:
        return BrokenInverse(device=self.device)


class BrokenInverse(Remove, frozen=True, tag="broken inverse"):
    async def make(self, context: Context) -> None:
        raise ZeroDivisionError("no such number")


# ---- forward ----


async def test_all_is_done_and_ours(machine: Machine) -> None:
    await machine.run([create(0), create(1, 0)])
    assert machine.system.uuids() == set(TEXTS[:2])
    assert machine.owned == set(TEXTS[:2])
    assert machine.journal.open_runs() == []


async def test_nothing_to_do_is_done(machine: Machine) -> None:
    gone = Change(devices={UUIDS[0]: None})
    await machine.journal.put(Change(devices={UUIDS[0]: device(0)}))
    await execute(machine.journal, "apply", "lab", [], machine.context, change=gone)
    machine.untouched()


@st.composite
def graphs(draw: st.DrawFn) -> list[tuple[int, ...]]:
    """What each of some steps needs: any of the earlier ones."""
    count = draw(st.integers(1, 8))
    return [
        tuple(sorted(draw(st.sets(st.integers(0, number - 1), max_size=3)))) if number else ()
        for number in range(count)
    ]


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(graph=graphs(), data=st.data())
def test_each_step_comes_after_those_it_needs_and_is_undone_before_them(
    tmp_path_factory: pytest.TempPathFactory, graph: list[tuple[int, ...]], data: st.DataObject
) -> None:
    """A random plan of which a random step fails, or none."""
    fails = data.draw(st.none() | st.integers(0, len(graph) - 1))
    place = tmp_path_factory.mktemp("run")
    system = FakeSystem(place)
    system.parent("card0")
    system.type("card0", "t-1", 100)
    if fails is not None:
        system.refuse[TEXTS[fails]] = errno.EIO
    planned = [create(number, *needs) for number, needs in enumerate(graph)]

    async def story() -> None:
        with Journal.open(place / "state" / "journal.db") as journal:
            machine = Machine(system, journal, Context(host=place, write=system.write))
            if fails is None:
                await machine.run(planned)
                assert system.uuids() == set(TEXTS[: len(graph)])
            else:
                with pytest.raises(MdoError, match="Input/output error"):
                    await machine.run(planned)
                machine.untouched()
            in_order(machine.events, graph)

    asyncio.run(story())


def in_order(events: Sequence[StepEvent], graph: Sequence[tuple[int, ...]]) -> None:
    seen: dict[StepEventKind, set[int]] = {moment: set() for moment in StepEventKind}
    for event in events:
        needs = set(graph[event.number])
        if event.kind is StepEventKind.BEGIN:
            assert needs <= seen[StepEventKind.DONE]
            assert not seen[StepEventKind.UNDO], "a step began when others were being undone"
        if event.kind is StepEventKind.UNDONE:
            dependents = {n for n, of in enumerate(graph) if event.number in of}
            assert dependents & seen[StepEventKind.DONE] <= seen[StepEventKind.UNDONE]
        seen[event.kind].add(event.number)
    assert seen[StepEventKind.STUCK] == set()


async def test_what_is_not_needed_is_not_waited_for(machine: Machine) -> None:
    """Sixteen creations are under way before the first of them has come to its end."""
    gate = asyncio.Event()
    machine.system.block |= dict.fromkeys(TEXTS[:20], gate)
    work = asyncio.ensure_future(machine.run([create(number) for number in range(20)]))
    await seen(lambda: len(machine.system.writes) >= 16)
    await asyncio.sleep(0.05)
    assert len(machine.system.writes) == 16  # and no more: a driver has one lock
    assert machine.moments(StepEventKind.DONE) == []
    gate.set()
    await work
    assert machine.system.uuids() == set(TEXTS[:20])


async def test_devices_that_come_together_are_written_down_together(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushes: list[int] = []
    commit = machine.journal._commit

    def counted(changes: Sequence[Callable[[], object]]) -> list[object]:
        flushes.append(len(changes))
        return commit(changes)

    monkeypatch.setattr(machine.journal, "_commit", counted)
    await machine.run([create(number) for number in range(64)])
    assert len(flushes) < 16  # a moment's worth of devices on a slow machine, mostly all
    assert machine.journal._db.execute("SELECT DISTINCT progress FROM step").fetchall() == [
        (Progress.DONE,)
    ]
    assert machine.owned == machine.system.uuids() == set(TEXTS)


async def test_one_of_many_that_is_refused_leaves_none(machine: Machine) -> None:
    machine.system.refuse[TEXTS[40]] = errno.EIO
    with pytest.raises(MdoError, match="cannot create t-1 on card0: Input/output error") as caught:
        await machine.run([create(number) for number in range(64)])
    assert caught.value.__notes__ == ["all was undone"]
    assert len(machine.system.writes) < 2 * 64  # those behind it were not begun
    machine.untouched()


async def test_what_many_wait_for_keeps_nobody_from_the_others(machine: Machine) -> None:
    """Of devices that come together one takes its time: what needs another goes on."""
    gate = machine.system.block[TEXTS[1]] = asyncio.Event()
    work = asyncio.ensure_future(machine.run([create(0), create(1), create(2, 0)]))
    wanted = [Progress.DONE, Progress.ACTING, Progress.DONE]
    await seen(lambda: bool(machine.events) and machine.progress() == wanted)
    gate.set()
    await work


async def test_what_comes_while_others_are_written_down_is_written_down_too(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last device comes while the note of the first is on its way to the disk."""
    gate = machine.system.block[TEXTS[1]] = asyncio.Event()
    note = machine.journal.note

    async def slow(
        run: Run, progress: Progress, steps: Iterable[int], *, change: Change | None = None
    ) -> None:
        await note(run, progress, numbers := [*steps], change=change)
        if progress is Progress.DONE and numbers == [0]:
            gate.set()
            await seen(lambda: TEXTS[1] in machine.system.uuids())
            await asyncio.sleep(0.1)

    monkeypatch.setattr(machine.journal, "note", slow)
    async with asyncio.timeout(20):
        await machine.run([create(0), create(1), create(2, 1)])
    assert machine.owned == machine.system.uuids() == set(TEXTS[:3])


async def test_one_of_many_that_is_late_is_late_whatever_the_others_do(machine: Machine) -> None:
    """One takes longer than the deadline, while others come all the time."""
    machine.context.deadline = 2
    slow = machine.system.block[TEXTS[0]] = asyncio.Event()
    asyncio.get_running_loop().call_later(2.5, slow.set)
    for number in range(1, 32):
        gate = machine.system.block[TEXTS[number]] = asyncio.Event()
        asyncio.get_running_loop().call_later(0.02 * number, gate.set)
    with pytest.raises(DeadlineError, match="was not created within 2 s") as caught:
        await machine.run([create(number) for number in range(32)])
    assert caught.value.__notes__ == ["all was undone"]
    machine.untouched()


async def test_devices_that_go_together_stay_when_one_is_held(machine: Machine) -> None:
    plan = [create(number) for number in range(8)]
    await machine.run(plan)
    machine.system.process(41, "qemu-system-x86", ["qemu", "-name", "guest=g1"], [node(machine, 5)])
    machine.system.writes.clear()
    with pytest.raises(BusyError, match=f"mdev {UUIDS[5]} is held by"):
        await machine.run([remove(number) for number in range(8)], "destroy")
    assert machine.system.writes == []
    assert machine.system.uuids() == machine.owned == set(TEXTS[:8])


async def test_devices_that_go_together_are_all_gone(machine: Machine) -> None:
    await machine.run([create(number) for number in range(0, 8, 2)])
    await machine.run([remove(number) for number in range(8)], "destroy")
    machine.untouched()


async def test_one_of_many_that_stays_brings_the_others_back(machine: Machine) -> None:
    await machine.run([create(number) for number in range(8)])
    machine.system.refuse[f"{TEXTS[5]}/remove"] = errno.EIO
    with pytest.raises(MdoError, match=f"cannot remove mdev {UUIDS[5]}"):
        await machine.run([remove(number) for number in range(8)], "destroy")
    assert machine.system.uuids() == machine.owned == set(TEXTS[:8])


async def test_the_intent_is_on_the_disk_before_the_act(machine: Machine) -> None:
    def look(event: StepEvent) -> None:
        if event.kind is StepEventKind.BEGIN:
            assert machine.progress()[event.number] is Progress.ACTING
            assert TEXTS[event.number] in machine.owned
            assert TEXTS[event.number] not in machine.system.uuids()
            looked.append(event.number)

    looked: list[int] = []
    plan = [create(0), create(1, 0), create(2, 1)]
    await execute(machine.journal, "apply", "lab", plan, machine.context, observe=look)
    assert looked == [0, 1, 2]


async def test_objects_that_another_changes_are_refused_before_anything(machine: Machine) -> None:
    await machine.journal.begin("attach", "g t-1", [], [f"mdev:{UUIDS[1]}"])
    with pytest.raises(BusyError, match=f"mdev {UUIDS[1]} is being changed by mdo attach g t-1"):
        await machine.run([create(0), create(1)])
    assert machine.system.writes == []
    assert machine.owned == set()


# ---- a step that fails ----


async def test_the_first_error_is_raised_and_all_is_undone(machine: Machine) -> None:
    machine.system.refuse[TEXTS[2]] = errno.EIO
    with pytest.raises(MdoError, match=r"cannot create t-1 on card0: Input/output error") as caught:
        await machine.run([create(0), create(1, 0), create(2, 1), create(3, 2)])
    assert caught.value.__notes__ == ["all was undone"]
    assert machine.moments(StepEventKind.UNDONE) == [1, 0]
    assert ("create", TEXTS[3]) not in machine.system.writes
    machine.untouched()


async def test_a_first_step_that_fails_changed_nothing(machine: Machine) -> None:
    machine.system.refuse[TEXTS[0]] = errno.EIO
    with pytest.raises(MdoError) as caught:
        await machine.run([create(0), create(1, 0)])
    assert caught.value.__notes__ == ["nothing was changed"]
    machine.untouched()


async def test_what_failed_at_the_same_time_stands_beside_it(machine: Machine) -> None:
    gate = asyncio.Event()
    machine.system.block |= {TEXTS[0]: gate, TEXTS[1]: gate}
    machine.system.refuse |= {TEXTS[0]: errno.EIO, TEXTS[1]: errno.ENODEV}
    asyncio.get_running_loop().call_later(0.05, gate.set)
    with pytest.raises(MdoError, match="Input/output error") as caught:
        await machine.run([create(0), create(1)])
    assert caught.value.__notes__[0].startswith("also: cannot create t-1 on card0: the parent")
    machine.untouched()


async def test_a_race_lost_leaves_the_winners_device(machine: Machine) -> None:
    """Somebody else makes a device of the same UUID, parent and type a moment before us."""

    async def winner_first(path: str, data: bytes) -> int:
        if data.decode() == TEXTS[1]:
            machine.system.mdev("card0", "t-1", TEXTS[1])
        return await machine.system.write(path, data)

    machine.context.write = winner_first
    with pytest.raises(UuidError, match="exists already under parent card0"):
        await machine.run([create(0), create(1, 0)])
    assert machine.system.uuids() == {TEXTS[1]}
    assert machine.owned == set()
    assert machine.journal.open_runs() == []


async def test_a_race_lost_while_interrupted_leaves_it_too(machine: Machine) -> None:
    gate = machine.system.block[TEXTS[0]] = asyncio.Event()
    work = asyncio.ensure_future(machine.run([create(0)]))
    await begun(machine, 0)
    work.cancel()
    await asyncio.sleep(0.05)
    machine.system.mdev("card0", "t-1", TEXTS[0])
    gate.set()
    with pytest.raises(asyncio.CancelledError):
        await work
    assert machine.system.uuids() == {TEXTS[0]}
    assert machine.owned == set()


async def test_a_failed_undo_stands_beside_it_and_the_run_stays_open(machine: Machine) -> None:
    machine.system.refuse |= {TEXTS[2]: errno.EIO, f"{TEXTS[0]}/remove": errno.EPERM}
    with pytest.raises(MdoError, match="Input/output error") as caught:
        await machine.run([create(0), create(1, 0), create(2, 1)])
    first, last = caught.value.__notes__
    assert first.startswith(f"could not undo: create t-1 on card0: mdev {UUIDS[0]}: ")
    assert last == "mdo recover tries again to undo it"
    assert machine.system.uuids() == machine.owned == {TEXTS[0]}
    assert machine.progress() == [Progress.STUCK, Progress.UNDONE, Progress.FAILED]
    machine.system.refuse.clear()
    await machine.recover()
    machine.untouched()


async def test_a_bug_in_a_step_undoes_too(machine: Machine) -> None:
    with pytest.raises(TypeError, match="it was to be so") as caught:
        await machine.run([create(0), bad(1, "bug", 0)])
    assert caught.value.__notes__ == ["all was undone"]
    machine.untouched()


async def test_a_bug_in_an_undo_keeps_no_other_from_it(machine: Machine) -> None:
    machine.system.refuse[TEXTS[2]] = errno.EIO
    wrong = Planned(Broken(device=device(0)))
    with pytest.raises(MdoError, match="Input/output error") as caught:
        await machine.run([wrong, create(1), create(2, 0, 1)])
    assert caught.value.__notes__[0].endswith("internal error: ZeroDivisionError: no such number")
    assert machine.system.uuids() == {TEXTS[0]}
    assert machine.progress() == [Progress.STUCK, Progress.UNDONE, Progress.FAILED]


async def test_what_may_come_true_yet_is_undone_as_if_it_had(machine: Machine) -> None:
    with pytest.raises(UnsettledError):
        await machine.run([create(0), bad(1, "unsettled", 0)])
    assert machine.moments(StepEventKind.UNDONE) == [1, 0]
    machine.untouched()


async def test_a_driver_that_does_not_answer_leaves_the_run_to_recover(machine: Machine) -> None:
    """Its device appears when everything is over, and is found nevertheless."""
    machine.context.deadline = 0.1
    machine.system.block[TEXTS[0]] = asyncio.Event()
    create_file = (machine.system.types("card0") / "t-1" / "create").resolve()
    writer = machine.system.process(77, "mdo", ["mdo", "apply"], [str(create_file)])
    with pytest.raises(UnsettledError, match=r"has not answered for mdev .* still appear") as error:
        await machine.run([create(1), create(0, 0)])
    stuck, last = error.value.__notes__
    assert stuck == (
        f"could not undo: create t-1 on card0: mdev {UUIDS[0]}: mdev {UUIDS[0]} may still appear: "
        "the driver of card0 has not answered mdo (pid 77)"
    )
    assert last == "mdo recover tries again to undo it"
    assert machine.progress() == [Progress.UNDONE, Progress.STUCK]
    machine.context.deadline = 5

    def answer() -> None:
        shutil.rmtree(writer)
        machine.system.mdev("card0", "t-1", TEXTS[0])

    asyncio.get_running_loop().call_later(0.2, answer)
    await machine.recover()
    machine.untouched()


async def test_a_removal_that_fails_gives_back_what_was_removed(machine: Machine) -> None:
    await machine.run([create(0), create(1), create(2)])
    machine.system.refuse[f"{TEXTS[2]}/remove"] = errno.EIO
    with pytest.raises(MdoError, match="Input/output error"):
        await machine.run([remove(0), remove(1, 0), remove(2, 1)], "destroy")
    assert machine.system.uuids() == machine.owned == set(TEXTS[:3])
    assert machine.journal.open_runs() == []


async def test_a_removal_that_the_kernel_does_not_end_is_not_taken_for_undone(
    machine: Machine,
) -> None:
    await machine.run([create(0)])
    machine.context.deadline = 0.05
    (machine.system.bus / TEXTS[0]).unlink()  # off the bus, and its directory is still there
    gate = machine.system.block[f"{TEXTS[0]}/remove"] = asyncio.Event()
    with pytest.raises(UnsettledError, match=r"was not removed within 0.05 s") as caught:
        await machine.run([remove(0)], "destroy")
    assert "is still being removed after 0.05 s" in caught.value.__notes__[0]
    assert caught.value.__notes__[-1] == "mdo recover tries again to undo it"
    gate.set()


async def test_a_device_of_somebody_else_is_not_removed(machine: Machine) -> None:
    """Of the same UUID, and of another type than ours was."""
    machine.system.type("card0", "t-2")
    machine.system.mdev("card0", "t-2", TEXTS[0])
    await machine.run([remove(0)], "destroy")
    assert machine.system.uuids() == {TEXTS[0]}
    with pytest.raises(UuidError):
        await machine.run([create(0)])
    assert machine.system.uuids() == {TEXTS[0]}


async def test_a_device_that_is_held_stays(machine: Machine) -> None:
    await machine.run([create(0), create(1)])
    machine.system.process(41, "qemu-system-x86", ["qemu", "-name", "guest=g1"], ["/dev/vfio/2"])
    with pytest.raises(BusyError, match=r"held by guest 'g1' \(pid 41\)"):
        await machine.run([remove(0), remove(1, 0)], "destroy")
    assert machine.system.uuids() == machine.owned == set(TEXTS[:2])


# ---- a journal that fails ----


def breaks(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, kind: StepEventKind, number: int
) -> Observer:
    """An observer that lets the journal's disk get full at a step's moment."""

    def fail(_: object) -> list[object]:
        raise HostError("the journal cannot be written: the disk is full", "make room")

    def observe(event: StepEvent) -> None:
        if (event.kind, event.number) == (kind, number):
            monkeypatch.setattr(machine.journal, "_commit", fail)

    return observe


async def test_a_journal_that_can_no_more_be_written_undoes_all(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk gets full in the middle: its own error first, and nothing is left."""
    plan = [create(0), create(1, 0), create(2, 1)]
    full = breaks(machine, monkeypatch, StepEventKind.DONE, 1)
    with pytest.raises(HostError, match="the disk is full") as caught:
        await execute(machine.journal, "apply", "lab", plan, machine.context, observe=full)
    assert caught.value.__notes__ == ["mdo recover tries again to undo it"]
    assert machine.system.uuids() == set()
    await machine.recover()
    machine.untouched()


async def test_a_journal_that_fails_in_the_end_undoes_all(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = breaks(machine, monkeypatch, StepEventKind.ACTED, 0)
    with pytest.raises(HostError) as caught:
        await execute(machine.journal, "apply", "lab", [create(0)], machine.context, observe=full)
    assert caught.value.__notes__ == ["mdo recover tries again to undo it"]
    assert machine.system.uuids() == set()
    await machine.recover()
    machine.untouched()


async def test_a_process_that_lives_on_recovers_what_it_could_not_write(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A service whose disk was full: its next command closes what the last one left open."""
    full = breaks(machine, monkeypatch, StepEventKind.ACTED, 0)
    with Journal.open(machine.journal.path) as book, monkeypatch.context() as patch:
        patch.setattr(machine, "journal", book)
        with pytest.raises(HostError):
            await execute(book, "apply", "lab", [create(0)], machine.context, observe=full)
        with Journal.open(book.path) as other:  # who is at it is left alone
            assert await recovery.recover(other, context=machine.context) == []
    (done,) = await recovery.recover(machine.journal, context=machine.context)
    assert (done.way, done.errors) == ("undo", ())
    machine.untouched()


# ---- interrupted ----


async def begun(machine: Machine, number: int) -> None:
    """Wait until a step's write is under way."""
    await seen(lambda: any(uuid == TEXTS[number] for _, uuid in machine.system.writes))


@pytest.mark.parametrize("claimed", [False, True], ids=["at-once", "after-a-look"])
async def test_interrupted_while_it_is_written_down_nothing_is_ours(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, *, claimed: bool
) -> None:
    """The run and what its first steps make ours are on the disk, and nothing has acted."""
    run = await machine.journal.begin("apply", "lab", (), ()) if claimed else None
    writing, commit = threading.Event(), machine.journal._commit

    def slow(changes: Sequence[Callable[[], object]]) -> list[object]:
        results = commit(changes)
        writing.set()
        time.sleep(0.1)
        return results

    monkeypatch.setattr(machine.journal, "_commit", slow)
    plan = [create(0), create(1, 0)]
    work = asyncio.ensure_future(
        execute(machine.journal, "apply", "lab", plan, machine.context, run=run)
    )
    await seen(writing.is_set)
    work.cancel()
    with pytest.raises(asyncio.CancelledError) as caught:
        await work
    assert caught.value.__notes__ == ["nothing was changed"]
    assert machine.system.writes == []
    machine.untouched()


async def test_interrupted_once_it_takes_back_what_it_did(machine: Machine) -> None:
    gate = machine.system.block[TEXTS[1]] = asyncio.Event()
    work = asyncio.ensure_future(machine.run([create(0), create(1, 0), create(2, 1)]))
    await begun(machine, 1)
    work.cancel()
    await asyncio.sleep(0.05)
    assert not work.done()  # the kernel has not answered yet
    gate.set()
    with pytest.raises(asyncio.CancelledError) as caught:
        await work
    assert caught.value.__notes__ == ["all was undone"]
    assert ("create", TEXTS[2]) not in machine.system.writes
    machine.untouched()


@pytest.mark.parametrize("turns", [*range(12), 15, 20, 30])
async def test_interrupted_at_any_turn_it_is_all_or_nothing(machine: Machine, turns: int) -> None:
    work = asyncio.ensure_future(machine.run([create(0), create(1, 0), create(2)]))
    for _ in range(turns):
        await asyncio.sleep(0.001)
    work.cancel()
    try:
        await work
    except asyncio.CancelledError as error:
        if "all was done already" not in getattr(error, "__notes__", ()):
            machine.untouched()
            return
    assert machine.system.uuids() == machine.owned == set(TEXTS[:3])
    assert machine.journal.open_runs() == []


@pytest.mark.parametrize("turns", [0, 1, 2, 4, 8])
async def test_a_removal_interrupted_at_any_turn_is_all_or_nothing(
    machine: Machine, turns: int
) -> None:
    await machine.run([create(0), create(1)])
    work = asyncio.ensure_future(machine.run([remove(0), remove(1, 0)], "destroy"))
    for _ in range(turns):
        await asyncio.sleep(0.001)
    work.cancel()
    try:
        await work
    except asyncio.CancelledError as error:
        if "all was done already" not in getattr(error, "__notes__", ()):
            assert machine.system.uuids() == machine.owned == set(TEXTS[:2])
            assert machine.journal.open_runs() == []
            return
    machine.untouched()


async def test_interrupted_in_the_middle_of_a_removal_it_is_made_again(machine: Machine) -> None:
    await machine.run([create(0)])
    gate = machine.system.block[f"{TEXTS[0]}/remove"] = asyncio.Event()
    machine.system.writes.clear()
    work = asyncio.ensure_future(machine.run([remove(0)], "destroy"))
    await begun(machine, 0)
    work.cancel()
    await asyncio.sleep(0.05)
    assert not work.done()
    gate.set()
    with pytest.raises(asyncio.CancelledError):
        await work
    assert machine.system.uuids() == machine.owned == {TEXTS[0]}
    assert [name for name, _ in machine.system.writes] == ["remove", "create"]


@pytest.mark.parametrize("where", ["step", "undo"])
async def test_interrupted_twice_it_stops_at_once_and_recover_still_works(
    machine: Machine, where: str
) -> None:
    gate = asyncio.Event()
    if where == "step":
        machine.system.block[TEXTS[1]] = gate
    else:
        machine.system.block[f"{TEXTS[0]}/remove"] = gate
        machine.system.refuse[TEXTS[1]] = errno.EIO
    work = asyncio.ensure_future(machine.run([create(0), create(1, 0)]))
    await begun(machine, 1)
    if where == "step":
        work.cancel()
    await asyncio.sleep(0.05)
    assert not work.done()
    work.cancel()
    await asyncio.wait((work,), timeout=3)
    assert work.done()
    with pytest.raises(asyncio.CancelledError) as caught:
        await work
    assert caught.value.__notes__ == ["mdo recover undoes what was done"]
    assert TEXTS[0] in machine.system.uuids()
    assert len(machine.journal.open_runs()) == 1
    machine.system.block.clear()
    machine.system.refuse.clear()
    gate.set()
    await machine.recover()
    machine.untouched()


@pytest.mark.parametrize("where", ["step", "undo"])
def test_interrupted_twice_it_says_nothing_of_its_own(
    system: FakeSystem, tmp_path: Path, caplog: pytest.LogCaptureFixture, where: str
) -> None:
    """As the command line does it: the loop ends, and whatever still runs ends with it."""
    system.parent("card0")
    system.type("card0", "t-1", 100)
    if where == "undo":
        system.refuse[TEXTS[1]] = errno.EIO

    async def story() -> None:
        gate = asyncio.Event()
        system.block[TEXTS[1] if where == "step" else f"{TEXTS[0]}/remove"] = gate
        task = asyncio.current_task()
        assert task is not None
        loop = asyncio.get_running_loop()
        for seconds in (0.3, 0.6):
            loop.call_later(seconds, task.cancel)
        with Journal.open(tmp_path / "state" / "journal.db") as journal:
            context = Context(host=system.root, deadline=5, write=system.write)
            await execute(journal, "apply", "lab", [create(0), create(1, 0)], context)

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(story())
    assert [record for record in caplog.records if record.levelname != "DEBUG"] == []


async def test_interrupted_when_all_is_done_it_is_done(machine: Machine) -> None:
    def interrupt(event: StepEvent) -> None:
        if event.kind is StepEventKind.DONE:
            asyncio.get_running_loop().call_soon(work.cancel)

    work = asyncio.ensure_future(
        execute(machine.journal, "apply", "l", [create(0)], machine.context, observe=interrupt)
    )
    with pytest.raises(asyncio.CancelledError) as caught:
        await work
    if caught.value.__notes__ == ["all was done already"]:
        assert machine.system.uuids() == machine.owned == {TEXTS[0]}
        assert machine.journal.open_runs() == []
    else:
        machine.untouched()


# ---- resumed ----


async def test_a_run_that_is_finished_does_only_what_is_left(machine: Machine) -> None:
    await machine.run([create(0), create(1)])
    plan = [remove(0), remove(1, 0)]
    entries = [Entry(number, encode(one.step), one.needs) for number, one in enumerate(plan)]
    run = await machine.journal.begin("destroy", "lab", entries, [])
    await machine.journal.note(run, Progress.DONE, [0])
    machine.system.writes.clear()
    entries = machine.journal.steps(run)
    finished = await executor.finish(machine.journal, run, entries, machine.context)
    assert finished == (None, [])
    assert machine.system.writes == [("remove", TEXTS[1])]
    assert machine.journal.open_runs() == []


async def test_a_run_that_cannot_be_finished_is_undone(machine: Machine) -> None:
    await machine.run([create(0), create(1)])
    machine.system.refuse[f"{TEXTS[1]}/remove"] = errno.EPERM
    plan = [remove(0), remove(1, 0)]
    entries = [Entry(number, encode(one.step), one.needs) for number, one in enumerate(plan)]
    run = await machine.journal.begin("destroy", "lab", entries, [])
    error, stuck = await executor.finish(machine.journal, run, entries, machine.context)
    assert error is not None
    assert "cannot remove mdev" in error.message
    assert stuck == []
    assert machine.journal.open_runs() == []
    assert machine.system.uuids() == machine.owned == set(TEXTS[:2])


async def test_a_destroy_that_was_cut_short_before_it_had_steps_has_done_nothing(
    machine: Machine,
) -> None:
    await machine.run([create(0)])
    await machine.journal.begin("destroy", "lab", (), ["spec:lab"])
    await machine.recover()
    assert machine.journal.open_runs() == []
    assert machine.system.uuids() == machine.owned == {TEXTS[0]}


async def test_who_has_let_go_of_a_device_does_not_hold_it(machine: Machine) -> None:
    await machine.run([create(0)])
    machine.system.process(41, "qemu-system-x86", ["qemu", "-name", "g"], ["/dev/vfio/1"])
    assert len(machine.context.held(UUIDS[0])) == 1
    shutil.rmtree(machine.system.root / "proc" / "41")
    await machine.run([remove(0)], "destroy")
    machine.untouched()
