# SPDX-License-Identifier: GPL-2.0-or-later
"""Specs made true and taken back, by the library, on a machine of files."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import shutil
import signal
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from uuid import UUID

import pytest

from mdev_orchestrator import errors
from mdev_orchestrator.engine import apply as module
from mdev_orchestrator.engine.adopt import Adopted, adopt
from mdev_orchestrator.engine.executor import StepEvent, StepEventKind
from mdev_orchestrator.engine.journal import Journal
from mdev_orchestrator.engine.journal_db import read_managed
from mdev_orchestrator.engine.records import Managed
from mdev_orchestrator.engine.restore import restore
from mdev_orchestrator.engine.snapshot import ObservedState
from mdev_orchestrator.engine.steps import Create
from mdev_orchestrator.errors import Outcome
from mdev_orchestrator.machine import Machine
from mdev_orchestrator.qemu import hotplug, process
from mdev_orchestrator.qemu.monitor import QmpMonitor
from mdev_orchestrator.qemu.pending import ASKED
from mdev_orchestrator.qemu.stop import stop_qemu
from mdev_orchestrator.spec import Document, parse
from mdev_orchestrator.system.waiting import poll_until
from unit.fakesys import FakeSystem

U1 = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"
U2 = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1002"
POOL = f"""\
name = "lab"
[[pool]]
name = "p"
type = "t-1"
count = 3
[[pool]]
name = "named"
type = "t-1"
uuid = "{U1}"
params = "x=1"
"""


@pytest.fixture
def system(system: FakeSystem) -> FakeSystem:
    """Two cards."""
    for name in ("card0", "card1"):
        system.parent(name)
        system.type(name, "t-1", 8)
        system.groups_of(name, 3)
    return system


def document(text: str = POOL) -> Document:
    return parse(text, "lab.toml")


async def apply(machine: Machine, text: str = POOL, *, restart: bool = False) -> list[str]:
    """The steps that were done, in words."""
    changes = await module.apply(machine, document(text), restart=restart, wait=0)
    return [str(planned.step) for planned in changes.steps]


async def destroy(machine: Machine, name: str = "lab") -> list[str]:
    changes = await module.destroy(machine, name, force=True, deadline=0)
    return [str(planned.step) for planned in changes.steps]


async def test_a_spec_is_applied_kept_and_destroyed(machine: Machine, system: FakeSystem) -> None:
    assert len(await apply(machine)) == 4
    assert len(system.uuids()) == 4
    assert (system.bus / U1 / "vgpu_params").read_text() == "x=1"
    managed = read_managed(machine)
    assert {str(uuid) for uuid in managed.devices} == system.uuids()
    assert managed.specs["lab"].source == "lab.toml"
    system.writes.clear()
    assert await apply(machine) == []
    assert system.writes == []
    assert len(await destroy(machine)) == 4
    assert system.uuids() == set()
    assert read_managed(machine) == Managed()


async def test_a_stored_spec_can_be_applied_again(machine: Machine, system: FakeSystem) -> None:
    await apply(machine)
    again = module.stored(read_managed(machine).specs["lab"])
    assert again.name == "lab"
    assert (await module.apply(machine, again)).steps == ()


async def test_a_diff_changes_nothing(machine: Machine, system: FakeSystem) -> None:
    changes = await module.diff(machine, document())
    assert len(changes.steps) == 4
    assert system.writes == []
    assert not machine.state_dir.exists()


async def test_a_changed_spec_does_only_the_change(machine: Machine, system: FakeSystem) -> None:
    await apply(machine)
    before = system.uuids()
    system.writes.clear()
    assert len(await apply(machine, POOL.replace("count = 3", "count = 5"))) == 2
    assert before < system.uuids()
    assert {name for name, _ in system.writes} == {"create"}


async def test_words_that_change_nothing_are_remembered(
    machine: Machine, system: FakeSystem
) -> None:
    """The spec's text is what it comes back with after a reboot."""
    await apply(machine)
    assert await apply(machine, POOL + 'start = "manual"\n') == []
    assert '"manual"' in read_managed(machine).specs["lab"].text


async def test_a_refusal_in_the_middle_leaves_what_was_before(
    machine: Machine, system: FakeSystem
) -> None:
    await apply(machine)
    before, managed = system.uuids(), read_managed(machine)
    more = POOL.replace("count = 3", "count = 1") + (
        f'[[pool]]\nname = "q"\ntype = "t-1"\nuuid = "{U2}"\n'
    )
    system.refuse[U2] = errno.EIO
    with pytest.raises(errors.MdoError, match="Input/output error"):
        await apply(machine, more)
    assert system.uuids() == before
    assert read_managed(machine) == managed


async def test_a_program_that_was_quicker_is_named(machine: Machine, system: FakeSystem) -> None:
    def quicker(name: str, uuid: str) -> int | None:
        if (name, uuid) != ("create", U1):
            return None
        system.mdev("card0", "t-1", U2)
        return errno.EUSERS

    system.before = quicker
    with pytest.raises(errors.CapacityError) as caught:
        await apply(machine)
    assert f"meanwhile another program created mdev {U2} (t-1 on card0)" in caught.value.__notes__
    assert system.uuids() == {U2}
    assert read_managed(machine).devices == {}


async def test_the_same_spec_at_the_same_time(machine: Machine, system: FakeSystem) -> None:
    """One does it, the others find it done or are told which process does it; never twice."""
    done = await asyncio.gather(*(apply(machine) for _ in range(3)), return_exceptions=True)
    assert len(system.uuids()) == 4
    steps = sorted(len(one) for one in done if isinstance(one, list))
    assert steps[-1] == 4
    assert set(steps[:-1]) <= {0}
    for one in done:
        assert isinstance(one, list | errors.BusyError)


async def test_two_specs_and_one_name_of_a_device(machine: Machine, system: FakeSystem) -> None:
    await apply(machine)
    other = f'name = "other"\n[[pool]]\nname = "o"\ntype = "t-1"\nuuid = "{U1}"\n'
    with pytest.raises(
        errors.RequestError, match=f"lab.toml:5: .*{U1} belongs to pool named of spec lab"
    ):
        await apply(machine, other)
    assert len(system.uuids()) == 4


async def test_what_was_never_applied_cannot_be_destroyed(
    machine: Machine, system: FakeSystem
) -> None:
    with pytest.raises(errors.UnknownError, match="no spec lab was applied"):
        await destroy(machine)
    await apply(machine)
    with pytest.raises(errors.UnknownError, match=r"no spec web was applied \(there are: lab\)"):
        await destroy(machine, "web")
    assert len(system.uuids()) == 4


async def test_a_destroy_that_is_refused_gives_all_back(
    machine: Machine, system: FakeSystem
) -> None:
    await apply(machine)
    before, managed = system.uuids(), read_managed(machine)
    system.refuse[f"{U1}/remove"] = errno.EIO
    with pytest.raises(errors.MdoError, match="Input/output error"):
        await destroy(machine)
    assert (system.uuids(), read_managed(machine)) == (before, managed)


async def test_a_device_that_is_held_keeps_the_spec_whole(
    machine: Machine, system: FakeSystem
) -> None:
    await apply(machine)
    group = (system.bus / U1 / "iommu_group").resolve().name
    system.process(41, "qemu-system-x86", ["qemu", "-name", "guest=x"], [f"/dev/vfio/{group}"])
    before = system.uuids()
    with pytest.raises(errors.BusyError, match=rf"mdev {U1} is held by guest 'x' \(pid 41\)"):
        await destroy(machine)
    assert system.uuids() == before


async def test_a_group_is_made_on_one_parent(machine: Machine, system: FakeSystem) -> None:
    """Half of a card is taken: the group goes whole to the other one."""
    for number in range(6):
        system.mdev("card0", "t-1", f"99999999-509f-382f-3c1e-e6bfe0fa100{number}")
    system.types("card0").joinpath("t-1", "available_instances").write_text("2\n")
    text = (
        'name = "lab"\n[[guest]]\nname = "g"\nqemu = "no-such-qemu"\n'
        'mdev = [{type = "t-1", count = 3, group = "peers"}]\n'
    )
    changes = await module.diff(machine, document(text))
    assert {placement.parent for placement in changes.plan.placements} == {"card1"}


async def test_a_qemu_that_will_not_start_leaves_no_device(
    machine: Machine, system: FakeSystem
) -> None:
    text = (
        'name = "lab"\n[[guest]]\nname = "g"\nqemu = "no-such-qemu"\n'
        'mdev = [{type = "t-1", count = 2, group = "peers"}]\n'
    )
    with pytest.raises(errors.MdoError, match="no-such-qemu"):
        await apply(machine, text)
    assert system.uuids() == set()
    assert read_managed(machine) == Managed()


async def test_a_journal_that_cannot_be_used_is_known_before_anything(
    machine: Machine, system: FakeSystem
) -> None:
    machine.state_dir.mkdir(mode=0o700)
    machine.journal_path.write_bytes(b"\xff" * 5000)
    with pytest.raises(errors.HostError, match="is damaged"):
        await apply(machine)
    assert system.writes == []


async def test_what_another_command_left_open_is_recovered_first(
    machine: Machine, system: FakeSystem
) -> None:
    await apply(machine)
    with Journal.open(machine.journal_path) as journal:
        await journal.begin("apply", "lab", [], ["spec:lab"])
    assert await apply(machine) == []
    with Journal.open(machine.journal_path) as journal:
        assert journal.open_runs() == []


async def devices_without_a_journal(machine: Machine, system: FakeSystem) -> set[str]:
    """Apply the spec and lose the journal; the devices that run on."""
    await apply(machine)
    shutil.rmtree(machine.state_dir)
    return system.uuids()


async def test_a_device_that_runs_on_after_the_journal_is_gone(
    machine: Machine, system: FakeSystem
) -> None:
    """It is not managed then, until it is adopted."""
    before = await devices_without_a_journal(machine, system)
    with pytest.raises(errors.RequestError, match=f"{U1} exists and is not ours.*mdo adopt {U1}"):
        await apply(machine)
    assert system.uuids() == before
    done = await adopt(machine, [U1])
    assert done.devices == (UUID(U1),)
    assert await adopt(machine, [U1]) == Adopted()
    await apply(machine)
    assert read_managed(machine).devices[UUID(U1)].spec == "lab"
    with pytest.raises(errors.UnknownError, match=f"there is no mdev {U2}"):
        await adopt(machine, [U2])


async def test_after_a_loss_of_the_journal_no_device_is_made_twice(
    machine: Machine, system: FakeSystem
) -> None:
    """Fault 27: the devices of pools stayed foreign, and an apply made them again."""
    before = await devices_without_a_journal(machine, system)
    assert len((await adopt(machine, [], everything=True)).devices) == 4
    assert await apply(machine) == []
    assert await apply(machine) == []
    assert system.uuids() == before
    owners = {device.owner for device in read_managed(machine).devices.values()}
    assert owners == {"pool:p", "pool:named"}


async def test_a_device_that_another_program_removes_meanwhile_is_not_applied(
    machine: Machine, system: FakeSystem
) -> None:
    """Fault 25: it was counted as applied."""
    acted: list[UUID] = []

    def remove_the_first(event: StepEvent) -> None:
        if event.kind is StepEventKind.ACTED and isinstance(event.step, Create):
            acted.append(event.step.device.uuid)
            if len(acted) == event.total:
                system.perform(str(system.bus / str(acted[0]) / "remove"), b"1")

    with pytest.raises(errors.MdoError, match="was removed by another program") as caught:
        await module.apply(machine, document(), observe=remove_the_first)
    assert caught.value.subject == f"mdev {acted[0]}"
    assert caught.value.__notes__ == ["all was undone"]
    assert system.uuids() == set()
    assert read_managed(machine) == Managed()


async def test_of_two_applies_that_fit_one_by_one_exactly_one_succeeds(
    machine: Machine, system: FakeSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 25: six devices each where eight fit; both created some, and both failed."""
    system.type("card0", "t-2", 8)
    both_have_looked = threading.Event()
    looks: list[ObservedState] = []
    take_snapshot = module.take_snapshot

    async def counted(
        machine: Machine, managed: Managed, names: set[str], *, force: bool
    ) -> ObservedState:
        looks.append(await take_snapshot(machine, managed, names, force=force))
        if len(looks) == 2:
            both_have_looked.set()
        return looks[-1]

    def wait(name: str, _: str) -> None:
        if name == "create":
            both_have_looked.wait(20)

    monkeypatch.setattr(module, "take_snapshot", counted)
    system.before = wait
    pool = '[[pool]]\nname = "p"\ntype = "t-2"\ncount = 6\n'
    done = await asyncio.gather(
        *(module.apply(machine, document(f'name = "{name}"\n{pool}')) for name in "ab"),
        return_exceptions=True,
    )
    (failed,) = [one for one in done if isinstance(one, BaseException)]
    assert isinstance(failed, errors.CapacityError)
    assert "6 asked for, 2 fit" in failed.message
    assert failed.outcome is Outcome.NO_EFFECT
    assert len(system.uuids()) == len(read_managed(machine).devices) == 6
    assert len(read_managed(machine).specs) == 1


# ---- guests: a real QEMU, stopped before its first instruction ----

GUEST = """\
name = "lab"
[[guest]]
name = "g"
memory = "64M"
accel = "tcg"
extra = ["-S"]
"""


@pytest.fixture
async def guests(system: FakeSystem, place: Path, qemu: str) -> AsyncIterator[Machine]:
    """The machine of files, with its state where sockets have room; no guest is left."""
    assert qemu
    machine = Machine(system.root, state=place)
    yield machine
    for guest in process.list_guests(machine):
        await stop_qemu(machine, guest, deadline=0, force=True)


def record_of(machine: Machine) -> process.ProcessRecord:
    record = process.find_running(machine, "g").record
    assert record is not None
    return record


async def test_a_guest_is_started_kept_changed_adopted_and_stopped(guests: Machine) -> None:
    machine = guests
    assert await apply(machine, GUEST) == ["start guest g"]
    first = record_of(machine)
    assert await apply(machine, GUEST) == []

    more = GUEST.replace("64M", "96M")
    with pytest.raises(
        errors.RequestError, match="guest g: memory changes from 64M to 96M"
    ) as caught:
        await apply(machine, more)
    assert "--restart" in caught.value.hint
    assert record_of(machine) == first
    await stop_qemu(machine, process.find_running(machine, "g"), deadline=0, force=True)
    assert await apply(machine, more) == ["start guest g"]
    second = record_of(machine)
    assert (second.uuid, second.pid == first.pid) == (first.uuid, False)

    for file in machine.state_dir.glob("journal*"):
        file.unlink()
    with pytest.raises(
        errors.RequestError, match="guest g runs already, and was not started by a spec"
    ):
        await apply(machine, more)
    assert (await adopt(machine, [], everything=True)).guests == ("g",)
    assert await apply(machine, more) == []
    assert record_of(machine) == second

    assert await destroy(machine) == ["stop guest g"]
    assert process.list_guests(machine) == []
    assert read_managed(machine).guests == {}


async def test_of_two_guests_one_that_fails_stops_the_other(guests: Machine) -> None:
    bad = GUEST + '[[guest]]\nname = "h"\nextra = ["-no-such-option"]\nmemory = "64M"\n'
    with pytest.raises(errors.MdoError, match="no-such-option"):
        await apply(guests, bad)
    assert process.list_guests(guests) == []
    assert read_managed(guests).guests == {}


async def test_a_guest_that_powers_down_late_is_started_again(guests: Machine) -> None:
    """Its button was pressed and cannot be taken back: a destroy was interrupted meanwhile."""
    await apply(guests, GUEST)
    first, guest = record_of(guests), process.find_running(guests, "g")
    destroying = asyncio.ensure_future(module.destroy(guests, "lab"))
    assert await poll_until((guest.directory / ASKED).exists, 20)
    destroying.cancel()
    await asyncio.sleep(0.1)
    os.kill(first.pid, signal.SIGTERM)
    with pytest.raises(asyncio.CancelledError) as caught:
        await destroying
    assert caught.value.__notes__ == ["all was undone"]
    second = record_of(guests)
    assert (second.uuid, second.pid == first.pid) == (first.uuid, False)
    assert not (guest.directory / ASKED).exists()


async def test_a_guest_that_ends_while_it_is_asked_is_started_again(
    guests: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 9: no guest is called g."""
    await apply(guests, GUEST)
    first = record_of(guests)
    ask = hotplug.mdevs

    async def kill_and_ask(qmp: QmpMonitor) -> tuple[hotplug.Plugged, ...]:
        monkeypatch.setattr(hotplug, "mdevs", ask)
        os.kill(first.pid, signal.SIGKILL)
        return await ask(qmp)

    monkeypatch.setattr(hotplug, "mdevs", kill_and_ask)
    assert await apply(guests, GUEST) == ["start guest g"]
    assert record_of(guests).pid != first.pid


@contextlib.contextmanager
def silenced(machine: Machine, how: str) -> Iterator[None]:
    """Keep the guest's QEMU from answering: it is stopped, or it serves another client."""
    if how == "stopped":
        os.kill(record_of(machine).pid, signal.SIGSTOP)
        yield
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.connect(str(process.find_running(machine, "g").query_socket))
        yield


@pytest.mark.parametrize("how", ["stopped", "asked by another client"])
async def test_a_qemu_that_does_not_answer_concerns_its_own_spec_alone(
    guests: Machine, system: FakeSystem, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 18: every plan and apply failed, and destroy --force of its own spec."""
    monkeypatch.setattr(hotplug, "QUERY_SECONDS", 0.5)
    hung = GUEST.replace('"lab"', '"hung"')
    await apply(guests, hung)
    with silenced(guests, how):
        assert (await module.preview(guests, document(hung))).plan.fits
        assert len((await module.diff(guests, document())).steps) == 4
        assert len(await apply(guests)) == 4
        (restored,) = await restore(guests, ["lab"])
        assert restored.error is None
        assert len(await destroy(guests)) == 4
        assert system.uuids() == set()

        for refused in (
            module.diff(guests, document(hung)),
            module.apply(guests, document(hung)),
            module.destroy(guests, "hung"),
        ):
            with pytest.raises(errors.DeadlineError, match="guest g cannot be asked") as caught:
                await refused
            assert "mdo guest stop --force g ends it" in caught.value.hint
            assert ("kill -CONT" in caught.value.hint) == (how == "stopped")
            assert caught.value.outcome is Outcome.NO_EFFECT
            assert caught.value.subject == "guest g"
        assert await destroy(guests, "hung") == ["stop guest g"]
    assert process.list_guests(guests) == []
    assert read_managed(guests) == Managed()
