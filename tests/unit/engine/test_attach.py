# SPDX-License-Identifier: GPL-2.0-or-later
"""Attach and detach, all or nothing; and what can be done when an attach could not be undone.

The guest's QEMU answers as scripted. One that is stopped, or whose driver holds it, answers
nothing, and it is not known whether it has plugged a device in.
"""

from __future__ import annotations

import asyncio
import os
from functools import partial
from pathlib import Path
from uuid import UUID

import pytest

from mdev_orchestrator import errors
from mdev_orchestrator.engine import attach as operations
from mdev_orchestrator.engine import recovery
from mdev_orchestrator.engine.apply import apply, destroy
from mdev_orchestrator.engine.attach import attach, detach
from mdev_orchestrator.engine.devices import remove_devices
from mdev_orchestrator.engine.executor import StepEvent, StepEventKind
from mdev_orchestrator.engine.guests import stop_guest
from mdev_orchestrator.engine.journal import Progress, open_journal
from mdev_orchestrator.engine.journal_db import read_managed
from mdev_orchestrator.engine.records import Change, GuestRecord, Managed, SpecRecord
from mdev_orchestrator.engine.steps import Attach
from mdev_orchestrator.errors import Outcome
from mdev_orchestrator.machine import Machine
from mdev_orchestrator.qemu import process
from mdev_orchestrator.spec import parse
from unit.engine.killed import dies_at, killed
from unit.engine.scripted import ScriptedGuest
from unit.fakesys import FakeSystem

U1, U2 = UUIDS = [UUID(f"83b8f4f2-509f-382f-3c1e-e6bfe0fa100{n}") for n in "12"]
T1, T2 = TEXTS = [str(uuid) for uuid in UUIDS]


@pytest.fixture
def card(system: FakeSystem) -> FakeSystem:
    """A device of another program, and room for more."""
    system.parent("card0")
    system.type("card0", "t-1", 8)
    system.mdev("card0", "t-1", T1)
    return system


@pytest.fixture
def machine(card: FakeSystem, place: Path) -> Machine:
    return Machine(card.root, state=place)


async def progress(machine: Machine) -> list[list[Progress]]:
    """How far the steps of the open runs are."""
    async with open_journal(machine) as journal:
        return [[entry.progress for entry in journal.steps(run)] for run in journal.open_runs()]


# ---- attach ----


async def test_a_device_is_plugged_in(
    machine: Machine, card: FakeSystem, guest: ScriptedGuest
) -> None:
    done = await attach(machine, "g", T1)
    assert (done.uuid, done.device_id, done.port, done.created) == (
        U1,
        f"mdev-{U1}",
        "port0",
        False,
    )
    assert guest.has(U1)
    assert (card.writes, read_managed(machine).devices) == ([], {})


async def test_a_device_is_created_for_a_guest(
    machine: Machine, card: FakeSystem, guest: ScriptedGuest
) -> None:
    done = await attach(machine, "g", "t-1")
    assert done.created
    assert guest.has(done.uuid)
    assert card.uuids() == {T1, str(done.uuid)}
    assert set(read_managed(machine).devices) == {done.uuid}


async def test_a_device_that_qemu_refuses_is_not_left(
    machine: Machine, card: FakeSystem, guest: ScriptedGuest
) -> None:
    guest.refuses = "no such device"
    with pytest.raises(errors.CommandError, match="no such device") as caught:
        await attach(machine, "g", "t-1")
    assert caught.value.__notes__ == ["all was undone"]
    with pytest.raises(errors.CommandError) as caught:
        await attach(machine, "g", T1)
    assert caught.value.__notes__ == ["nothing was changed"]
    assert (card.uuids(), read_managed(machine).devices) == ({T1}, {})
    assert await progress(machine) == []


async def test_a_device_that_another_guest_has(
    machine: Machine, card: FakeSystem, guest: ScriptedGuest
) -> None:
    card.process(41, "qemu-system-x86", ["qemu", "-name", "guest=g1"], ["/dev/vfio/1"])
    with pytest.raises(errors.BusyError, match=r"held by guest 'g1' \(pid 41\)"):
        await attach(machine, "g", T1)
    assert guest.asked == []


async def test_what_cannot_be_attached(machine: Machine, guest: ScriptedGuest) -> None:
    with pytest.raises(errors.UnknownError, match=f"there is no mdev {U2}"):
        await attach(machine, "g", T2)
    with pytest.raises(errors.UnknownError, match="no parent offers a type 't-2'"):
        await attach(machine, "g", "t-2")
    with pytest.raises(errors.UnknownError, match="no guest is called h"):
        await attach(machine, "h", T1)
    with pytest.raises(errors.RequestError, match="--parent goes with a type"):
        await attach(machine, "g", T1, parent="card0")
    await guest.end()
    with pytest.raises(errors.RequestError, match="guest g does not run"):
        await attach(machine, "g", T1)


async def test_the_deadline_is_for_the_whole(
    machine: Machine, card: FakeSystem, guest: ScriptedGuest
) -> None:
    """The seconds of the creation are missing for the plug."""
    loop = asyncio.get_running_loop()

    def before(name: str, uuid: str) -> None:
        if name == "create":
            gate = card.block[uuid] = asyncio.Event()
            loop.call_soon_threadsafe(loop.call_later, 0.7, gate.set)

    def observe(event: StepEvent) -> None:
        if (event.kind, event.number) == (StepEventKind.BEGIN, 1):
            guest.stops_at = "device_add"
            loop.call_later(0.7, guest.goes_on.set)

    card.before = before
    with pytest.raises(errors.DeadlineError) as caught:
        await attach(machine, "g", "t-1", deadline=1.2, observe=observe)
    assert caught.value.__notes__ == ["all was undone"]
    assert card.uuids() == {T1}


# ---- detach ----


async def test_a_device_is_unplugged_and_removed(
    machine: Machine, card: FakeSystem, guest: ScriptedGuest
) -> None:
    await attach(machine, "g", T1)
    await detach(machine, "g", U1)
    assert not guest.has(U1)
    await attach(machine, "g", T1)
    await detach(machine, "g", U1, remove=True)
    assert card.uuids() == set()
    with pytest.raises(errors.UnknownError, match=f"guest g has no mdev {U1}"):
        await detach(machine, "g", U1)


async def test_a_guest_that_refuses_keeps_its_device(
    machine: Machine, card: FakeSystem, guest: ScriptedGuest
) -> None:
    await attach(machine, "g", T1)
    guest.on_detach = "refuses"
    with pytest.raises(errors.BusyError, match="refuses to let go") as caught:
        await detach(machine, "g", U1, remove=True)
    assert caught.value.outcome is Outcome.NO_EFFECT
    assert caught.value.__notes__ == ["nothing was changed"]
    assert guest.has(U1)
    assert card.uuids() == {T1}


async def test_a_detach_that_is_killed_is_finished(
    machine: Machine, card: FakeSystem, guest: ScriptedGuest
) -> None:
    await attach(machine, "g", T1)

    dies = dies_at(StepEventKind.ACTED)
    await killed(detach(machine, "g", U1, remove=True, observe=dies))
    assert not guest.has(U1)
    assert card.uuids() == {T1}
    (done,) = await recovery.recover(machine)
    assert (done.way, done.errors) == ("finish", ())
    assert card.uuids() == set()


async def test_an_attach_that_is_killed_is_undone(
    machine: Machine, card: FakeSystem, guest: ScriptedGuest
) -> None:
    await killed(attach(machine, "g", "t-1", observe=dies_at(StepEventKind.ACTED, 1)))
    assert guest.asked == ["device_add"]
    (done,) = await recovery.recover(machine)
    assert (done.way, len(done.steps), done.errors) == ("undo", 2, ())
    assert guest.asked == ["device_add", "device_del"]
    assert (card.uuids(), read_managed(machine).devices) == ({T1}, {})


# ---- an attach that could not be undone ----


@pytest.fixture
async def stuck(
    machine: Machine, card: FakeSystem, guest: ScriptedGuest, monkeypatch: pytest.MonkeyPatch
) -> ScriptedGuest:
    """A guest whose QEMU was sent ``device_add`` and does not answer."""
    monkeypatch.setattr(operations, "Attach", partial(Attach, undo_deadline=0.3))
    guest.stops_at = "device_add"
    with pytest.raises(errors.DeadlineError) as caught:
        await attach(machine, "g", T1, deadline=1.5)
    assert caught.value.outcome is Outcome.UNKNOWN
    could_not, last = caught.value.__notes__
    assert could_not.startswith(f"could not undo: attach mdev {U1} to guest g: ")
    assert last == "mdo recover tries again to undo it"
    assert await progress(machine) == [[Progress.STUCK]]
    return guest


async def goes_on(guest: ScriptedGuest) -> None:
    """QEMU does what it was sent, and has the device."""
    guest.goes_on.set()
    async with asyncio.timeout(20):
        while not guest.has(U1):
            await asyncio.sleep(0.01)


async def test_what_cannot_be_undone_is_no_success(machine: Machine, stuck: ScriptedGuest) -> None:
    (done,) = await recovery.recover(machine)
    assert (done.way, done.steps) == ("undo", ())
    assert done.stuck == (f"attach mdev {U1} to guest g",)
    (error,) = done.errors
    assert error.subject == "guest g"
    assert await progress(machine) == [[Progress.STUCK]]


async def test_when_qemu_goes_on_it_is_undone(machine: Machine, stuck: ScriptedGuest) -> None:
    await goes_on(stuck)
    (done,) = await recovery.recover(machine)
    assert (done.stuck, done.errors) == ((), ())
    assert not stuck.has(U1)
    assert await progress(machine) == []


async def test_a_detach_takes_back_what_recover_cannot(
    machine: Machine, card: FakeSystem, stuck: ScriptedGuest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing tells that the guest is being changed, and to run recover first."""
    with pytest.raises(errors.DeadlineError, match="guest g: its monitor did not answer"):
        await detach(machine, "g", U1, deadline=0.3)
    await goes_on(stuck)
    await detach(machine, "g", U1)
    assert not stuck.has(U1)
    await recovery.recover(machine)
    assert await progress(machine) == []
    assert await remove_devices(machine, [U1]) == (U1,)


async def test_a_device_of_it_can_be_removed(
    machine: Machine, card: FakeSystem, stuck: ScriptedGuest
) -> None:
    """QEMU has not opened it: then it cannot plug it in any more."""
    assert await remove_devices(machine, [U1]) == (U1,)
    assert card.uuids() == set()
    stuck.goes_on.set()
    (done,) = await recovery.recover(machine)
    assert (done.stuck, done.errors) == ((), ())
    assert await progress(machine) == []


async def test_its_guest_can_be_ended(machine: Machine, stuck: ScriptedGuest) -> None:
    ended = await stop_guest(machine, "g", deadline=0, force=True)
    assert ended.how in {"terminated", "killed"}
    (done,) = await recovery.recover(machine)
    assert (done.stuck, done.errors) == ((), ())
    assert await progress(machine) == []


async def test_what_needs_its_objects_says_why_and_what_helps(
    machine: Machine, card: FakeSystem, stuck: ScriptedGuest
) -> None:
    card.mdev("card0", "t-1", T2)
    with pytest.raises(errors.BusyError) as caught:
        await attach(machine, "g", T2)
    assert caught.value.message.startswith(
        f"guest g: an earlier mdo attach g {U1} (process {os.getpid()}) could not be undone: "
        f"could not undo: attach mdev {U1} to guest g: guest g: its monitor did not answer"
    )
    assert caught.value.hint == "mdo guest stop --force g ends the guest, then mdo recover"
    assert caught.value.subject == "guest g"
    assert not stuck.has(T2)


async def test_what_needs_its_objects_undoes_it_first(
    machine: Machine, card: FakeSystem, stuck: ScriptedGuest
) -> None:
    """As soon as that is possible, no ``recover`` must be run by hand."""
    await goes_on(stuck)
    card.mdev("card0", "t-1", T2)
    await attach(machine, "g", T2)
    assert (stuck.has(U1), stuck.has(U2)) == (False, True)
    assert await progress(machine) == []


async def test_its_spec_can_be_destroyed_by_force(
    machine: Machine, card: FakeSystem, stuck: ScriptedGuest
) -> None:
    record = GuestRecord(name="g", uuid=stuck.uuid, spec="lab", definition='{"name": "g"}')
    spec = SpecRecord(name="lab", text="{}", source="/lab.toml", applied=1.0)
    async with open_journal(machine) as journal:
        run = await journal.begin("apply", "lab")
        await journal.end(run, "done", change=Change(guests={"g": record}), specs={"lab": spec})
    await destroy(machine, "lab", force=True, deadline=0)
    assert read_managed(machine) == Managed()
    assert process.list_guests(machine) == []
    (done,) = await recovery.recover(machine)
    assert (done.stuck, done.errors) == ((), ())


async def test_other_objects_are_free(
    machine: Machine, card: FakeSystem, stuck: ScriptedGuest
) -> None:
    """A spec that has nothing to do with the guest is applied."""
    text = 'name = "lab"\n[[pool]]\nname = "p"\ntype = "t-1"\ncount = 2\n'
    await apply(machine, parse(text, "lab.toml"))
    assert len(card.uuids()) == 3
    assert await progress(machine) == [[Progress.STUCK]]


async def test_an_apply_names_the_reason(
    machine: Machine, card: FakeSystem, stuck: ScriptedGuest
) -> None:
    """A device of the spec is the one that the attach could not give back."""
    text = f'name = "lab"\n[[pool]]\nname = "p"\ntype = "t-1"\nuuid = "{U1}"\n'
    card._remove(T1)
    with pytest.raises(errors.BusyError) as caught:
        await apply(machine, parse(text, "lab.toml"))
    assert caught.value.message.startswith(f"mdev {U1}: an earlier mdo attach g {U1} ")
    assert caught.value.hint == "mdo guest stop --force g ends the guest, then mdo recover"
    stuck.goes_on.set()
    await apply(machine, parse(text, "lab.toml"))
    assert card.uuids() == {T1}
    assert await progress(machine) == []
