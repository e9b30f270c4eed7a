# SPDX-License-Identifier: GPL-2.0-or-later
"""``guest start`` is all or nothing; ``guest stop`` is not undone, and little keeps it from it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from uuid import UUID

import pytest

from mdev_orchestrator import errors
from mdev_orchestrator.engine import recovery
from mdev_orchestrator.engine.executor import StepEvent, StepEventKind
from mdev_orchestrator.engine.guests import show_guest, start_guest, stop_guest
from mdev_orchestrator.engine.journal import Entry, Progress, open_journal
from mdev_orchestrator.engine.journal_db import read_managed
from mdev_orchestrator.engine.operation import Operation
from mdev_orchestrator.engine.records import GuestRecord, Managed
from mdev_orchestrator.engine.steps import Launch, encode
from mdev_orchestrator.errors import Outcome
from mdev_orchestrator.machine import Machine
from mdev_orchestrator.qemu import process
from mdev_orchestrator.qemu.process import State
from mdev_orchestrator.qemu.stop import stop_qemu
from mdev_orchestrator.spec import GuestConfig
from unit.engine.broken_journals import Breaker, full_disk, locked
from unit.engine.killed import dies_at, killed
from unit.engine.scripted import ScriptedGuest
from unit.fakesys import FakeSystem

U1 = UUID("83b8f4f2-509f-382f-3c1e-e6bfe0fa1001")


@pytest.fixture
async def machine(system: FakeSystem, place: Path) -> AsyncIterator[Machine]:
    """With a place for guests that has a short name; it has none afterwards."""
    system.parent("card0")
    system.type("card0", "t-1")
    machine = Machine(system.root, state=place)
    yield machine
    for guest in process.list_guests(machine):
        await stop_qemu(machine, guest, deadline=0, force=True)


def config(qemu: str, *extra: str) -> GuestConfig:
    return GuestConfig(name="g", memory=64 << 20, accel="tcg", qemu=qemu, extra=("-S", *extra))


async def runs(machine: Machine) -> list[tuple[str, str, str | None]]:
    """Kind, title and outcome of all runs; no outcome for those that stand open."""
    async with open_journal(machine) as journal:
        found = journal._db.execute("SELECT kind, title, outcome FROM run ORDER BY id")
        return [tuple(row) for row in found]


# ---- start ----


async def test_a_guest_that_is_started_by_hand_is_not_managed(machine: Machine, qemu: str) -> None:
    started = await start_guest(machine, config(qemu), uuid=U1)
    assert (started.state, started.record and started.record.uuid) == (State.RUNNING, U1)
    assert (await show_guest(machine, "g")).guest.state is State.RUNNING
    assert read_managed(machine) == Managed()
    with pytest.raises(errors.BusyError, match="guest g runs already, as process"):
        await start_guest(machine, config(qemu))
    ended = await stop_guest(machine, "g", deadline=0, force=True)
    assert ended.how == "quit"
    assert await runs(machine) == [
        ("start", "g", "done"),
        ("start", "g", "undone"),
        ("stop", "g", "done"),
    ]


async def test_a_start_that_fails_leaves_nothing(machine: Machine, qemu: str) -> None:
    with pytest.raises(errors.QemuError, match="guest g") as caught:
        await start_guest(machine, config(qemu, "-device", "nonsense"))
    assert caught.value.outcome is Outcome.NO_EFFECT
    assert caught.value.__notes__ == ["nothing was changed"]
    assert process.list_guests(machine) == []
    assert await runs(machine) == [("start", "g", "undone")]


async def test_a_start_that_is_cancelled_leaves_nothing(machine: Machine, qemu: str) -> None:
    begun = asyncio.Event()

    def observe(event: StepEvent) -> None:
        if event.kind is StepEventKind.BEGIN:
            begun.set()

    work = asyncio.ensure_future(start_guest(machine, config(qemu), observe=observe))
    await begun.wait()
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work
    assert process.list_guests(machine) == []
    assert await runs(machine) == [("start", "g", "undone")]


@pytest.mark.parametrize("kind", [StepEventKind.BEGIN, StepEventKind.ACTED])
async def test_a_start_that_is_killed_is_undone(
    machine: Machine, qemu: str, kind: StepEventKind
) -> None:
    await killed(start_guest(machine, config(qemu), observe=dies_at(kind)))
    (done,) = await recovery.recover(machine)
    assert (done.way, done.steps, done.errors) == ("undo", ("start guest g",), ())
    assert process.list_guests(machine) == []


async def test_a_device_is_given_once(machine: Machine, qemu: str) -> None:
    with pytest.raises(errors.RequestError, match="the same mdev is given twice"):
        await start_guest(machine, config(qemu), [U1, U1])
    with pytest.raises(errors.UnknownError, match=f"there is no mdev {U1}"):
        await start_guest(machine, config(qemu), [U1])
    assert process.list_guests(machine) == []


# ---- stop ----


async def test_a_guest_that_does_not_power_down_runs_on(
    machine: Machine, guest: ScriptedGuest
) -> None:
    """It may do so yet, and is not started again for it: the run is over."""
    with pytest.raises(errors.DeadlineError, match="guest g did not power down") as caught:
        await stop_guest(machine, "g", deadline=0.2)
    assert caught.value.outcome is Outcome.UNKNOWN
    assert guest.asked == ["system_powerdown"]
    assert process.find(machine, "g").alive
    assert await runs(machine) == [("stop", "g", "failed")]
    assert await recovery.recover(machine) == []


async def test_a_guest_that_is_not_there(machine: Machine) -> None:
    with pytest.raises(errors.UnknownError, match="no guest is called g"):
        await stop_guest(machine, "g")


async def test_a_guest_that_has_ended_leaves_its_directory_only(
    machine: Machine, guest: ScriptedGuest
) -> None:
    await guest.end()
    ended = await stop_guest(machine, "g")
    assert ended.how == "gone"
    assert process.list_guests(machine) == []


async def test_a_damaged_guest_is_removed_by_force_only(machine: Machine) -> None:
    directory = machine.guests_dir / "g"
    directory.mkdir(parents=True, mode=0o700)
    machine.guests_dir.chmod(0o700)
    (directory / process.RECORD).write_text("{")
    with pytest.raises(errors.RequestError, match=r"record.json is damaged"):
        await stop_guest(machine, "g")
    assert directory.exists()
    await stop_guest(machine, "g", force=True)
    assert not directory.exists()


@pytest.mark.parametrize("broken", [full_disk, locked], ids=["full-disk", "locked"])
@pytest.mark.parametrize("force", [True, False], ids=["force", "kindly"])
async def test_a_journal_that_cannot_be_written_keeps_no_guest_running(
    machine: Machine,
    guest: ScriptedGuest,
    monkeypatch: pytest.MonkeyPatch,
    broken: Breaker,
    *,
    force: bool,
) -> None:
    assert await runs(machine) == []
    monkeypatch.setattr("mdev_orchestrator.engine.journal_db.LOCK_SECONDS", 0.2)
    guest.on_powerdown = "obeys"
    with broken(machine):
        ended = await stop_guest(machine, "g", deadline=0 if force else 5, force=force)
    assert ended.how == ("quit" if force else "powerdown")
    assert process.list_guests(machine) == []
    assert await runs(machine) == []


async def test_nor_does_a_damaged_journal(machine: Machine, guest: ScriptedGuest) -> None:
    machine.state_dir.mkdir(exist_ok=True)
    machine.journal_path.write_bytes(b"no database" * 1000)
    machine.journal_path.chmod(0o600)
    with pytest.raises(errors.HostError, match=r"is damaged|is no journal"):
        read_managed(machine)
    await stop_guest(machine, "g", deadline=0, force=True)
    assert process.list_guests(machine) == []


async def test_nor_does_a_step_that_cannot_be_read(machine: Machine, guest: ScriptedGuest) -> None:
    """Recovery comes first, and finds that it cannot recover."""
    async with open_journal(machine) as journal:
        run = await journal.begin("apply", "lab", [Entry(0, '{"do": "dance"}')])
        await journal.give_up(run)
    await stop_guest(machine, "g", deadline=0, force=True)
    assert process.list_guests(machine) == []
    assert guest.asked == ["quit"]


async def test_a_guest_that_another_command_changes_is_ended_by_force_only(
    machine: Machine, guest: ScriptedGuest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(Operation.__init__.__kwdefaults__, "wait", 0.3)
    async with open_journal(machine) as journal:
        run = await journal.begin("attach", "g t-1", (), ["guest:g"])
        with pytest.raises(errors.BusyError, match="guest g is being changed by mdo attach g t-1"):
            await stop_guest(machine, "g", deadline=0)
        assert guest.asked == []
        ended = await stop_guest(machine, "g", deadline=0, force=True)
        assert ended.how == "quit"
        assert journal.is_at_work(run)


async def test_a_guest_of_a_run_that_is_stuck_can_be_stopped(
    machine: Machine, guest: ScriptedGuest
) -> None:
    """A run that could not be undone keeps its claims, but not from this."""
    record = GuestRecord(name="g", uuid=guest.uuid, spec="lab")
    async with open_journal(machine) as journal:
        entry = Entry(0, encode(Launch(guest=record)), (), Progress.STUCK, "no")
        run = await journal.begin("apply", "lab", [entry], ["guest:g", "spec:lab"])
        await journal.give_up(run)
    guest.on_powerdown = "obeys"
    ended = await stop_guest(machine, "g", deadline=5)
    assert ended.how == "powerdown"
    (done,) = await recovery.recover(machine)
    assert (done.steps, done.stuck) == (("start guest g",), ())
