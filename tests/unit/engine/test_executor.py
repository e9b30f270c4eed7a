# SPDX-License-Identifier: GPL-2.0-or-later
"""All steps or none: order, concurrency, the first error first, and whatever ends a run early.

The steps are real ones on a machine of files, so that what is undone can be seen. Where a step
must misbehave in a way that no machine does, the test brings a step of its own.
"""

from __future__ import annotations

import asyncio
import errno
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from uuid import UUID

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from mdev_orchestrator import errors
from mdev_orchestrator.engine import recovery
from mdev_orchestrator.engine.context import Context
from mdev_orchestrator.engine.executor import (
    Observer,
    PlannedStep,
    StepEvent,
    StepEventKind,
    ignore,
)
from mdev_orchestrator.engine.journal import Entry, Journal, Progress, Run
from mdev_orchestrator.engine.journal_db import read_managed
from mdev_orchestrator.engine.operation import Operation, Plan, perform
from mdev_orchestrator.engine.records import Change, DeviceRecord, Managed
from mdev_orchestrator.engine.steps import Create, Remove, encode
from mdev_orchestrator.errors import Outcome
from mdev_orchestrator.host import sysfs
from mdev_orchestrator.machine import Machine as Handle
from unit.fakesys import FakeSystem

UUIDS = [UUID(f"83b8f4f2-509f-382f-3c1e-e6bfe0fa1{n:03}") for n in range(64)]
TEXTS = [str(uuid) for uuid in UUIDS]


@dataclass
class Machine:
    """A machine of files, its journal, and what was seen to happen."""

    system: FakeSystem
    journal: Journal
    context: Context
    events: list[StepEvent] = field(default_factory=list)

    async def run(self, planned: Sequence[PlannedStep], kind: str = "apply") -> None:
        await execute(self.context, planned, kind, observe=self.events.append)

    def moments(self, kind: StepEventKind) -> list[int]:
        return [event.number for event in self.events if event.kind is kind]

    @property
    def managed(self) -> set[str]:
        return {str(uuid) for uuid in read_managed(self.context.machine).devices}

    def progress(self) -> list[Progress]:
        """Of the steps of the run that stands open."""
        (run,) = self.journal.open_runs()
        return [entry.progress for entry in self.journal.steps(run)]

    async def recover(self) -> None:
        """What the next command does when the first has ended."""
        for recovered in await recovery.recover(
            self.context.machine, deadline=self.context.deadline
        ):
            assert recovered.errors == ()

    def untouched(self) -> None:
        """Nothing is there, nothing is managed, nothing stands open."""
        assert self.system.uuids() == set()
        assert self.managed == set()
        assert self.journal.open_runs() == []


async def execute(
    context: Context,
    planned: Sequence[PlannedStep],
    kind: str = "apply",
    *,
    observe: Observer = ignore,
    change: Change | None = None,
    claims: Sequence[str] = (),
) -> None:
    """An operation that finds these steps."""

    async def look(_: Managed) -> Plan[None]:
        return Plan(None, planned, change or Change())

    operation = Operation(kind=kind, title="lab", look=look, claims=claims, wait=0)
    await perform(operation, context, observe=observe)


def handle(system: FakeSystem) -> Handle:
    return Handle(system.root, state=system.root / "state")


@pytest.fixture
def machine(system: FakeSystem) -> Iterator[Machine]:
    system.parent("card0")
    system.type("card0", "t-1", 100)
    context = Context(handle(system), 5)
    with Journal.open(context.machine.journal_path) as journal:
        yield Machine(system, journal, context)


async def seen(what: Callable[[], bool]) -> None:
    """Wait until something can be seen; a test that never sees it fails."""
    for _ in range(6000):
        if what():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not happen")


def device(number: int, parent: str = "card0") -> DeviceRecord:
    return DeviceRecord(uuid=UUIDS[number], parent=parent, type="t-1", spec="lab")


def create(number: int, *needs: int) -> PlannedStep:
    return PlannedStep(Create(device=device(number)), needs)


def remove(number: int, *needs: int) -> PlannedStep:
    return PlannedStep(Remove(device=device(number)), needs)


def node(machine: Machine, number: int) -> str:
    """The file in ``/dev`` that opens a device."""
    link = machine.system.bus / TEXTS[number] / "iommu_group"
    return f"/dev/vfio/{link.readlink().name}"


class Bad(Create, frozen=True, tag="bad"):
    """A step that ends as a test wants, after it has made its device."""

    async def act(self, context: Context) -> None:
        await super().act(context)
        raise ENDS[self.device.want]


ENDS: dict[str, Exception] = {
    "bug": TypeError("it was to be so"),
    "unknown": errors.DeadlineError("it was to be so", outcome=Outcome.UNKNOWN),
}


def bad(number: int, end: str, *needs: int) -> PlannedStep:
    made = DeviceRecord(uuid=UUIDS[number], parent="card0", type="t-1", want=end)
    return PlannedStep(Bad(device=made), needs)


class Broken(Create, frozen=True, tag="broken"):
    """A step that can be done, and whose undoing is a bug."""

    def inverse(self) -> Remove:
        return BrokenInverse(device=self.device)


class BrokenInverse(Remove, frozen=True, tag="broken inverse"):
    async def act(self, context: Context) -> None:
        raise ZeroDivisionError("no such number")


# ---- forward ----


async def test_all_is_done_and_ours(machine: Machine) -> None:
    await machine.run([create(0), create(1, 0)])
    assert machine.system.uuids() == set(TEXTS[:2])
    assert machine.managed == set(TEXTS[:2])
    assert machine.journal.open_runs() == []


async def test_nothing_to_do_is_done(machine: Machine) -> None:
    gone = Change(devices={UUIDS[0]: None})
    await machine.journal.put(Change(devices={UUIDS[0]: device(0)}))
    await execute(machine.context, [], change=gone)
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

    async def story(machine: Machine) -> None:
        if fails is None:
            await machine.run(planned)
            assert system.uuids() == set(TEXTS[: len(graph)])
        else:
            with pytest.raises(errors.MdoError, match="Input/output error"):
                await machine.run(planned)
            machine.untouched()
        in_order(machine.events, graph)

    context = Context(handle(system))
    with Journal.open(context.machine.journal_path) as journal:
        asyncio.run(story(Machine(system, journal, context)))


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
    commit = Journal._commit

    def counted(self: Journal, changes: Sequence[Callable[[], object]]) -> list[object]:
        flushes.append(len(changes))
        return commit(self, changes)

    monkeypatch.setattr(Journal, "_commit", counted)
    await machine.run([create(number) for number in range(64)])
    assert len(flushes) < 16  # a moment's worth of devices on a slow machine, mostly all
    assert machine.journal._db.execute("SELECT DISTINCT progress FROM step").fetchall() == [
        (Progress.DONE,)
    ]
    assert machine.managed == machine.system.uuids() == set(TEXTS)


async def test_one_of_many_that_is_refused_leaves_none(machine: Machine) -> None:
    machine.system.refuse[TEXTS[40]] = errno.EIO
    with pytest.raises(
        errors.MdoError, match="cannot create t-1 on card0: Input/output error"
    ) as caught:
        await machine.run([create(number) for number in range(64)])
    assert caught.value.__notes__ == ["all was undone"]
    assert len(machine.system.writes) < 2 * 64  # those behind it were not begun
    machine.untouched()


async def test_what_many_steps_need_holds_up_no_other_step(machine: Machine) -> None:
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
    note = Journal.note

    async def slow(
        self: Journal, run: Run, progress: Progress, steps: Iterable[int], **more: object
    ) -> None:
        await note(self, run, progress, numbers := [*steps], **more)  # type: ignore[arg-type]
        if progress is Progress.DONE and numbers == [0]:
            gate.set()
            await seen(lambda: TEXTS[1] in machine.system.uuids())
            await asyncio.sleep(0.1)

    monkeypatch.setattr(Journal, "note", slow)
    async with asyncio.timeout(20):
        await machine.run([create(0), create(1), create(2, 1)])
    assert machine.managed == machine.system.uuids() == set(TEXTS[:3])


async def test_one_of_many_that_is_late_is_late_whatever_the_others_do(machine: Machine) -> None:
    """One takes longer than the deadline, while others come all the time."""
    machine.context.deadline = 2
    slow = machine.system.block[TEXTS[0]] = asyncio.Event()
    asyncio.get_running_loop().call_later(2.5, slow.set)
    for number in range(1, 32):
        gate = machine.system.block[TEXTS[number]] = asyncio.Event()
        asyncio.get_running_loop().call_later(0.02 * number, gate.set)
    with pytest.raises(errors.DeadlineError, match="was not created within 2 s") as caught:
        await machine.run([create(number) for number in range(32)])
    assert caught.value.__notes__ == ["all was undone"]
    machine.untouched()


async def test_devices_that_go_together_stay_when_one_is_held(machine: Machine) -> None:
    plan = [create(number) for number in range(8)]
    await machine.run(plan)
    machine.system.process(41, "qemu-system-x86", ["qemu", "-name", "guest=g1"], [node(machine, 5)])
    machine.system.writes.clear()
    with pytest.raises(errors.BusyError, match=f"mdev {UUIDS[5]} is held by"):
        await machine.run([remove(number) for number in range(8)], "destroy")
    assert machine.system.writes == []
    assert machine.system.uuids() == machine.managed == set(TEXTS[:8])


async def test_devices_that_go_together_are_all_gone(machine: Machine) -> None:
    await machine.run([create(number) for number in range(0, 8, 2)])
    await machine.run([remove(number) for number in range(8)], "destroy")
    machine.untouched()


async def test_one_of_many_that_stays_brings_the_others_back(machine: Machine) -> None:
    await machine.run([create(number) for number in range(8)])
    machine.system.refuse[f"{TEXTS[5]}/remove"] = errno.EIO
    with pytest.raises(errors.MdoError, match=f"cannot remove mdev {UUIDS[5]}"):
        await machine.run([remove(number) for number in range(8)], "destroy")
    assert machine.system.uuids() == machine.managed == set(TEXTS[:8])


async def test_the_intent_is_on_the_disk_before_the_act(machine: Machine) -> None:
    def look(event: StepEvent) -> None:
        if event.kind is StepEventKind.BEGIN:
            assert machine.progress()[event.number] is Progress.ACTING
            assert TEXTS[event.number] in machine.managed
            assert TEXTS[event.number] not in machine.system.uuids()
            looked.append(event.number)

    looked: list[int] = []
    plan = [create(0), create(1, 0), create(2, 1)]
    await execute(machine.context, plan, observe=look)
    assert looked == [0, 1, 2]


async def test_objects_that_another_changes_are_refused_before_anything(machine: Machine) -> None:
    await machine.journal.begin("attach", "g t-1", [], [f"mdev:{UUIDS[1]}"])
    with pytest.raises(
        errors.BusyError, match=f"mdev {UUIDS[1]} is being changed by mdo attach g t-1"
    ):
        await machine.run([create(0), create(1)])
    assert machine.system.writes == []
    assert machine.managed == set()


# ---- a step that fails ----


async def test_the_first_error_is_raised_and_all_is_undone(machine: Machine) -> None:
    machine.system.refuse[TEXTS[2]] = errno.EIO
    with pytest.raises(
        errors.MdoError, match=r"cannot create t-1 on card0: Input/output error"
    ) as caught:
        await machine.run([create(0), create(1, 0), create(2, 1), create(3, 2)])
    assert caught.value.__notes__ == ["all was undone"]
    assert machine.moments(StepEventKind.UNDONE) == [1, 0]
    assert ("create", TEXTS[3]) not in machine.system.writes
    machine.untouched()


async def test_a_first_step_that_fails_changed_nothing(machine: Machine) -> None:
    machine.system.refuse[TEXTS[0]] = errno.EIO
    with pytest.raises(errors.MdoError) as caught:
        await machine.run([create(0), create(1, 0)])
    assert caught.value.__notes__ == ["nothing was changed"]
    machine.untouched()


async def test_what_failed_at_the_same_time_stands_beside_it(machine: Machine) -> None:
    gate = asyncio.Event()
    machine.system.block |= {TEXTS[0]: gate, TEXTS[1]: gate}
    machine.system.refuse |= {TEXTS[0]: errno.EIO, TEXTS[1]: errno.ENODEV}
    asyncio.get_running_loop().call_later(0.05, gate.set)
    one, other = (replace(device(number), params="x") for number in range(2))  # made by themselves
    plan = [PlannedStep(Create(device=one)), PlannedStep(Create(device=other))]
    with pytest.raises(errors.MdoError, match="Input/output error") as caught:
        await machine.run(plan)
    assert caught.value.__notes__[0].startswith("also: cannot create t-1 on card0: the parent")
    machine.untouched()


async def test_a_race_lost_leaves_the_winners_device(machine: Machine) -> None:
    """Another program makes a device of the same UUID, parent and type a moment before."""

    def winner_first(_: str, uuid: str) -> None:
        if uuid == TEXTS[1]:
            machine.system.mdev("card0", "t-1", TEXTS[1])

    machine.system.before = winner_first
    with pytest.raises(errors.UuidError, match="exists already under parent card0"):
        await machine.run([create(0), create(1, 0)])
    assert machine.system.uuids() == {TEXTS[1]}
    assert machine.managed == set()
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
    assert machine.managed == set()


async def test_a_failed_undo_stands_beside_it_and_the_run_stays_open(machine: Machine) -> None:
    machine.system.refuse |= {TEXTS[2]: errno.EIO, f"{TEXTS[0]}/remove": errno.EPERM}
    with pytest.raises(errors.MdoError, match="Input/output error") as caught:
        await machine.run([create(0), create(1, 0), create(2, 1)])
    first, last = caught.value.__notes__
    assert first.startswith(f"could not undo: create t-1 on card0: mdev {UUIDS[0]}: ")
    assert last == "mdo recover tries again to undo it"
    assert machine.system.uuids() == machine.managed == {TEXTS[0]}
    assert machine.progress() == [Progress.STUCK, Progress.UNDONE, Progress.NO_EFFECT]
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
    wrong = PlannedStep(Broken(device=device(0)))
    with pytest.raises(errors.MdoError, match="Input/output error") as caught:
        await machine.run([wrong, create(1), create(2, 0, 1)])
    assert caught.value.__notes__[0].endswith("internal error: ZeroDivisionError: no such number")
    assert machine.system.uuids() == {TEXTS[0]}
    assert machine.progress() == [Progress.STUCK, Progress.UNDONE, Progress.NO_EFFECT]


async def test_what_may_come_true_yet_is_undone_as_if_it_had(machine: Machine) -> None:
    with pytest.raises(errors.DeadlineError):
        await machine.run([create(0), bad(1, "unknown", 0)])
    assert machine.moments(StepEventKind.UNDONE) == [1, 0]
    machine.untouched()


async def test_a_driver_that_does_not_answer_leaves_the_run_to_recover(machine: Machine) -> None:
    """Its device appears when everything is over, and is found nevertheless."""
    machine.context.deadline = 0.3
    gate = machine.system.block[TEXTS[0]] = asyncio.Event()
    with pytest.raises(
        errors.DeadlineError, match=r"has not answered for mdev .* still appear"
    ) as error:
        await machine.run([create(1), create(0, 0)])
    stuck, last = error.value.__notes__
    assert re.fullmatch(
        f"could not undo: create t-1 on card0: mdev {UUIDS[0]}: mdev {UUIDS[0]} may still appear: "
        r"the driver of card0 has not answered mdo \(pid \d+\)",
        stuck,
    )
    assert last == "mdo recover tries again to undo it"
    assert machine.progress() == [Progress.UNDONE, Progress.STUCK]
    machine.context.deadline = 5
    asyncio.get_running_loop().call_later(0.2, gate.set)
    await machine.recover()
    assert machine.system.writes[-1] == ("remove", TEXTS[0])
    machine.untouched()


async def test_a_removal_that_fails_gives_back_what_was_removed(machine: Machine) -> None:
    await machine.run([create(0), create(1), create(2)])
    machine.system.refuse[f"{TEXTS[2]}/remove"] = errno.EIO
    with pytest.raises(errors.MdoError, match="Input/output error"):
        await machine.run([remove(0), remove(1, 0), remove(2, 1)], "destroy")
    assert machine.system.uuids() == machine.managed == set(TEXTS[:3])
    assert machine.journal.open_runs() == []


async def test_a_removal_that_the_kernel_does_not_end_is_not_taken_for_undone(
    machine: Machine,
) -> None:
    await machine.run([create(0)])
    machine.context.deadline = 0.05
    (machine.system.bus / TEXTS[0]).unlink()  # off the bus, and its directory is still there
    gate = machine.system.block[f"{TEXTS[0]}/remove"] = asyncio.Event()
    with pytest.raises(errors.DeadlineError, match=r"was not removed within 0.05 s") as caught:
        await machine.run([remove(0)], "destroy")
    assert "is still being removed after 0.05 s" in caught.value.__notes__[0]
    assert caught.value.__notes__[-1] == "mdo recover tries again to undo it"
    gate.set()


async def test_a_device_of_another_program_is_not_removed(machine: Machine) -> None:
    """Of the same UUID, and of another type than ours was."""
    machine.system.type("card0", "t-2")
    machine.system.mdev("card0", "t-2", TEXTS[0])
    await machine.run([remove(0)], "destroy")
    assert machine.system.uuids() == {TEXTS[0]}
    with pytest.raises(errors.UuidError):
        await machine.run([create(0)])
    assert machine.system.uuids() == {TEXTS[0]}


async def test_a_device_that_is_held_stays(machine: Machine) -> None:
    await machine.run([create(0), create(1)])
    machine.system.process(41, "qemu-system-x86", ["qemu", "-name", "guest=g1"], ["/dev/vfio/2"])
    with pytest.raises(errors.BusyError, match=r"held by guest 'g1' \(pid 41\)"):
        await machine.run([remove(0), remove(1, 0)], "destroy")
    assert machine.system.uuids() == machine.managed == set(TEXTS[:2])


# ---- a step of which nothing is known ----


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("count", [1, 12], ids=["alone", "with-others"])
async def test_a_writer_that_is_killed_leaves_no_device(
    machine: Machine, when: Literal["before", "after"], count: int
) -> None:
    """Its write may have created the device, and it cannot say so any more."""
    machine.system.kill[TEXTS[count // 2]] = when
    with pytest.raises(
        errors.MdoError, match="was killed: whether the device was created is not"
    ) as caught:
        await machine.run([create(number) for number in range(count)])
    assert caught.value.outcome is Outcome.UNKNOWN
    assert caught.value.__notes__[-1] == "all was undone"
    machine.untouched()


@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_writer_that_is_killed_in_a_removal_changes_nothing_of_its_end(
    machine: Machine, when: Literal["before", "after"]
) -> None:
    await machine.run([create(0), create(1)])
    machine.system.kill[f"{TEXTS[0]}/remove"] = when
    await machine.run([remove(0), remove(1)], "destroy")
    machine.untouched()


async def test_a_step_that_has_not_begun_is_not_one_without_effect(machine: Machine) -> None:
    machine.system.refuse[TEXTS[0]] = errno.EIO
    outcomes: dict[int, Outcome | None] = {}

    def observe(event: StepEvent) -> None:
        if event.kind is StepEventKind.FAILED:
            outcomes[event.number] = event.outcome

    with pytest.raises(errors.MdoError):
        await execute(machine.context, [create(0), create(1, 0)], observe=observe)
    assert outcomes == {0: Outcome.NO_EFFECT}
    assert machine.journal._db.execute("SELECT progress FROM step ORDER BY number").fetchall() == [
        (Progress.NO_EFFECT,),
        (Progress.PLANNED,),
    ]


# ---- counts that lag ----


def lagging(system: FakeSystem, tries: int) -> None:
    """After each removal the driver refuses some creations before it counts the instance."""
    left = 0

    def before(name: str, _: str) -> int | None:
        nonlocal left
        if name == "remove":
            left = tries
        if name == "create" and left:
            left -= 1
            return errno.EUSERS
        return None

    system.before = before


async def test_what_is_replaced_on_a_full_parent_waits_for_its_count(machine: Machine) -> None:
    await machine.run([create(0)])
    lagging(machine.system, 3)
    await machine.run([remove(0), create(1, 0)])
    assert machine.system.uuids() == {TEXTS[1]}


async def test_an_undo_on_a_full_parent_waits_for_its_count_too(machine: Machine) -> None:
    await machine.run([create(0), create(1)])
    lagging(machine.system, 3)
    machine.system.refuse[f"{TEXTS[1]}/remove"] = errno.EIO
    with pytest.raises(errors.MdoError, match="Input/output error") as caught:
        await machine.run([remove(0), remove(1, 0)], "destroy")
    assert caught.value.__notes__ == ["all was undone"]
    assert machine.system.uuids() == machine.managed == set(TEXTS[:2])


async def test_a_parent_that_was_full_before_is_not_waited_for(machine: Machine) -> None:
    machine.system.refuse[TEXTS[0]] = errno.EUSERS
    with pytest.raises(errors.CapacityError, match="no instance left"):
        await machine.run([create(0)])
    assert machine.system.writes == [("create", TEXTS[0])]


# ---- observers ----


@pytest.mark.parametrize("kind", StepEventKind)
async def test_an_observer_that_raises_changes_nothing(
    machine: Machine, kind: StepEventKind, caplog: pytest.LogCaptureFixture
) -> None:
    """It prints to a pipe whose reader has gone, for instance."""
    seen_kinds = []

    def observe(event: StepEvent) -> None:
        seen_kinds.append(event.kind)
        if event.kind is kind:
            raise BrokenPipeError

    await execute(machine.context, [create(0), create(1, 0)], observe=observe)
    assert machine.system.uuids() == machine.managed == set(TEXTS[:2])
    machine.system.refuse |= {TEXTS[3]: errno.EIO, f"{TEXTS[2]}/remove": errno.EPERM}
    with pytest.raises(errors.MdoError, match="Input/output error"):
        await execute(machine.context, [create(2), create(4), create(3, 0, 1)], observe=observe)
    assert kind in seen_kinds
    assert "an observer failed" in caplog.text
    machine.system.refuse.clear()
    await machine.recover()
    assert machine.system.uuids() == machine.managed == set(TEXTS[:2])
    assert machine.journal.open_runs() == []


# ---- other programs ----


async def test_a_device_that_another_program_removes_meanwhile_is_no_success(
    machine: Machine,
) -> None:
    def observe(event: StepEvent) -> None:
        if (event.kind, event.number) == (StepEventKind.DONE, 0):
            machine.system._remove(TEXTS[0])

    with pytest.raises(
        errors.MdoError, match=f"mdev {UUIDS[0]} was removed by another program"
    ) as caught:
        await execute(machine.context, [create(0), create(1, 0)], observe=observe)
    assert caught.value.__notes__ == ["all was undone"]
    machine.untouched()


async def test_a_journal_that_is_deleted_meanwhile_is_no_success(machine: Machine) -> None:
    def observe(event: StepEvent) -> None:
        if (event.kind, event.number) == (StepEventKind.DONE, 0):
            machine.journal.path.unlink()

    with pytest.raises(errors.HostError, match="was deleted or replaced while it was in use"):
        await execute(machine.context, [create(0), create(1, 0)], observe=observe)
    assert machine.system.uuids() == set()


async def test_two_that_create_on_one_parent_take_turns(machine: Machine) -> None:
    """Each looks when the other has ended: one gets its devices, the other knows what is left."""
    (machine.system.types("card0") / "t-1" / "available_instances").write_text("8\n")
    gate = machine.system.block[TEXTS[0]] = asyncio.Event()

    async def six(first: int) -> None:
        async def look(_: Managed) -> Plan[None]:
            left = sysfs.available_instances(machine.context.machine, "card0", "t-1")
            if left is not None and left < 6:
                raise errors.CapacityError(f"6 do not fit: {left} would")
            return Plan(None, [create(first + number) for number in range(6)])

        operation = Operation(kind="apply", title=f"from {first}", look=look, wait=20)
        await perform(operation, Context(machine.context.machine))

    first = asyncio.ensure_future(six(0))
    await begun(machine, 0)
    second = asyncio.ensure_future(six(6))
    await asyncio.sleep(0.2)
    assert not any(uuid == TEXTS[6] for _, uuid in machine.system.writes)
    gate.set()
    await first
    with pytest.raises(errors.CapacityError, match="6 do not fit: 2 would"):
        await second
    assert machine.system.uuids() == machine.managed == set(TEXTS[:6])


async def test_a_parent_is_free_for_others_when_all_devices_are_there(machine: Machine) -> None:
    """What comes after them may take long: a guest that starts, for instance."""
    last = PlannedStep(Remove(device=device(9, "card1")), (0, 1))
    claims: list[str] = []

    def observe(event: StepEvent) -> None:
        if (event.kind, event.number) == (StepEventKind.BEGIN, 2):
            rows = machine.journal._db.execute("SELECT object FROM claim ORDER BY object")
            claims.extend(object_ for (object_,) in rows)

    await execute(machine.context, [create(0), create(1), last], observe=observe)
    assert claims == [f"mdev:{UUIDS[number]}" for number in (0, 1, 9)]


# ---- a journal that fails ----


def breaks(monkeypatch: pytest.MonkeyPatch, kind: StepEventKind, number: int) -> Observer:
    """An observer that lets the journal's disk get full at a step's moment."""

    def fail(_: Journal, __: object) -> list[object]:
        raise errors.HostError("the journal cannot be written: the disk is full", "make room")

    def observe(event: StepEvent) -> None:
        if (event.kind, event.number) == (kind, number):
            monkeypatch.setattr(Journal, "_commit", fail)

    return observe


@pytest.mark.parametrize(
    ("plan", "kind", "number"),
    [
        ([create(0), create(1, 0), create(2, 1)], StepEventKind.DONE, 1),
        ([create(0)], StepEventKind.ACTED, 0),
    ],
    ids=["in the middle", "in the end"],
)
async def test_a_journal_that_can_no_more_be_written_undoes_all(
    machine: Machine,
    monkeypatch: pytest.MonkeyPatch,
    plan: list[PlannedStep],
    kind: StepEventKind,
    number: int,
) -> None:
    """The disk gets full: its own error first, and nothing is left."""
    with monkeypatch.context() as patch:
        full = breaks(patch, kind, number)
        with pytest.raises(errors.HostError, match="the disk is full") as caught:
            await execute(machine.context, plan, observe=full)
    assert caught.value.__notes__ == [
        "all was undone",
        "the journal does not say so yet: mdo recover closes it",
    ]
    assert machine.system.uuids() == set()
    await machine.recover()
    machine.untouched()


async def test_a_process_that_lives_on_recovers_what_it_could_not_write(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A service whose disk was full: its next command closes what the last one left open."""
    with monkeypatch.context() as patch:
        full = breaks(patch, StepEventKind.ACTED, 0)
        with pytest.raises(errors.HostError):
            await execute(machine.context, [create(0)], observe=full)
    (done,) = await recovery.recover_abandoned(machine.journal, machine.context)
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
    writing, commit = threading.Event(), Journal._commit

    def slow(self: Journal, changes: Sequence[Callable[[], object]]) -> list[object]:
        results = commit(self, changes)
        if self.managed().devices:
            writing.set()
        time.sleep(0.1)
        return results

    monkeypatch.setattr(Journal, "_commit", slow)
    plan = [create(0), create(1, 0)]
    claims = ["spec:lab"] if claimed else []
    work = asyncio.ensure_future(execute(machine.context, plan, claims=claims))
    await seen(writing.is_set)
    work.cancel()
    with pytest.raises(asyncio.CancelledError) as caught:
        await work
    assert caught.value.__notes__ == ["nothing was changed"]
    assert machine.system.writes == []
    machine.untouched()


async def test_interrupted_while_a_later_step_is_written_down_it_is_not_managed(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its record is on the disk, and it has not acted."""
    writing, commit = threading.Event(), Journal._commit

    def slow(self: Journal, changes: Sequence[Callable[[], object]]) -> list[object]:
        results = commit(self, changes)
        if UUIDS[1] in self.managed().devices:
            writing.set()
            time.sleep(0.1)
        return results

    monkeypatch.setattr(Journal, "_commit", slow)
    work = asyncio.ensure_future(execute(machine.context, [create(0), create(1, 0)]))
    await seen(writing.is_set)
    work.cancel()
    with pytest.raises(asyncio.CancelledError) as caught:
        await work
    assert caught.value.__notes__ == ["all was undone"]
    assert ("create", TEXTS[1]) not in machine.system.writes
    machine.untouched()


async def test_interrupted_while_the_journal_is_closed_all_was_done(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    closing, close = threading.Event(), Journal.close

    def slow(self: Journal) -> None:
        closing.set()
        time.sleep(0.1)
        close(self)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "close", slow)
        work = asyncio.ensure_future(execute(machine.context, [create(0)]))
        await seen(closing.is_set)
        work.cancel()
        with pytest.raises(asyncio.CancelledError) as caught:
            await work
    assert caught.value.__notes__ == ["all was done already"]
    assert machine.system.uuids() == machine.managed == {TEXTS[0]}
    assert machine.journal.open_runs() == []


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


async def is_undone_after(work: asyncio.Future[None], turns: int) -> bool:
    """Interrupt work that began some turns of the loop ago, and say whether it was undone."""
    for _ in range(turns):
        await asyncio.sleep(0.001)
    work.cancel()
    try:
        await work
    except asyncio.CancelledError as error:
        return "all was done already" not in getattr(error, "__notes__", ())
    return False


@pytest.mark.parametrize("turns", [*range(12), 15, 20, 30])
async def test_interrupted_at_any_turn_it_is_all_or_nothing(machine: Machine, turns: int) -> None:
    work = asyncio.ensure_future(machine.run([create(0), create(1, 0), create(2)]))
    if await is_undone_after(work, turns):
        machine.untouched()
        return
    assert machine.system.uuids() == machine.managed == set(TEXTS[:3])
    assert machine.journal.open_runs() == []


@pytest.mark.parametrize("turns", [0, 1, 2, 4, 8])
async def test_a_removal_interrupted_at_any_turn_is_all_or_nothing(
    machine: Machine, turns: int
) -> None:
    await machine.run([create(0), create(1)])
    work = asyncio.ensure_future(machine.run([remove(0), remove(1, 0)], "destroy"))
    if await is_undone_after(work, turns):
        assert machine.system.uuids() == machine.managed == set(TEXTS[:2])
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
    assert machine.system.uuids() == machine.managed == {TEXTS[0]}
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
        await execute(Context(handle(system), 5), [create(0), create(1, 0)])

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(story())
    assert [record for record in caplog.records if record.levelname != "DEBUG"] == []


async def test_interrupted_when_all_is_done_it_is_done(machine: Machine) -> None:
    def interrupt(event: StepEvent) -> None:
        if event.kind is StepEventKind.DONE:
            asyncio.get_running_loop().call_soon(work.cancel)

    work = asyncio.ensure_future(execute(machine.context, [create(0)], observe=interrupt))
    with pytest.raises(asyncio.CancelledError) as caught:
        await work
    if caught.value.__notes__ == ["all was done already"]:
        assert machine.system.uuids() == machine.managed == {TEXTS[0]}
        assert machine.journal.open_runs() == []
    else:
        machine.untouched()


# ---- resumed ----


async def left_open(machine: Machine, plan: Sequence[PlannedStep], *done: int) -> None:
    """A destroy that was cut short when some of its steps were done."""
    entries = [Entry(number, encode(one.step), one.needs) for number, one in enumerate(plan)]
    run = await machine.journal.begin("destroy", "lab", entries, [])
    await machine.journal.note(run, Progress.DONE, done)
    await machine.journal.give_up(run)


async def test_a_run_that_is_finished_does_only_what_is_left(machine: Machine) -> None:
    await machine.run([create(0), create(1)])
    await left_open(machine, [remove(0), remove(1, 0)], 0)
    machine.system.writes.clear()
    (done,) = await recovery.recover_abandoned(machine.journal, machine.context)
    assert (done.way, done.errors) == ("finish", ())
    assert machine.system.writes == [("remove", TEXTS[1])]
    assert machine.journal.open_runs() == []


async def test_a_run_that_cannot_be_finished_is_undone(machine: Machine) -> None:
    await machine.run([create(0), create(1)])
    machine.system.refuse[f"{TEXTS[1]}/remove"] = errno.EPERM
    await left_open(machine, [remove(0), remove(1, 0)])
    (done,) = await recovery.recover_abandoned(machine.journal, machine.context)
    assert (done.way, done.errors) == ("undo", ())
    assert "cannot remove mdev" in done.why
    assert machine.journal.open_runs() == []
    assert machine.system.uuids() == machine.managed == set(TEXTS[:2])


async def test_a_destroy_that_was_cut_short_before_it_had_steps_has_done_nothing(
    machine: Machine,
) -> None:
    await machine.run([create(0)])
    await machine.journal.give_up(await machine.journal.begin("destroy", "lab", (), ["spec:lab"]))
    await machine.recover()
    assert machine.journal.open_runs() == []
    assert machine.system.uuids() == machine.managed == {TEXTS[0]}


async def test_a_process_that_has_closed_a_device_does_not_hold_it(machine: Machine) -> None:
    await machine.run([create(0)])
    machine.system.process(41, "qemu-system-x86", ["qemu", "-name", "g"], ["/dev/vfio/1"])
    assert len(await machine.context.held(UUIDS[0])) == 1
    shutil.rmtree(machine.system.root / "proc" / "41")
    await machine.run([remove(0)], "destroy")
    machine.untouched()
