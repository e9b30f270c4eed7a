# SPDX-License-Identifier: GPL-2.0-or-later
"""Specs made true and taken back, by the library, on a machine of files."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from uuid import UUID

import pytest

from mdev_orchestrator.engine import apply as module
from mdev_orchestrator.engine import recovery
from mdev_orchestrator.engine.context import Context
from mdev_orchestrator.engine.journal import Journal
from mdev_orchestrator.engine.journal_db import read_managed
from mdev_orchestrator.engine.records import Managed
from mdev_orchestrator.errors import (
    BusyError,
    CapacityError,
    HostError,
    MdoError,
    RequestError,
    UnknownError,
)
from mdev_orchestrator.qemu import process
from mdev_orchestrator.spec import Document, parse
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
def machine(system: FakeSystem, monkeypatch: pytest.MonkeyPatch) -> FakeSystem:
    """Two cards; what would go to a kernel goes to the machine of files."""
    for name in ("card0", "card1"):
        system.parent(name)
        system.type(name, "t-1", 8)
        system.groups_of(name, 3)
    context = Context
    monkeypatch.setattr(module, "Context", context)
    return system


def document(text: str = POOL) -> Document:
    return parse(text, "lab.toml")


async def apply(machine: FakeSystem, text: str = POOL) -> list[str]:
    """The steps that were done, in words."""
    changes = await module.apply(document(text), host=machine.root, wait=0)
    return [str(planned.step) for planned in changes.steps]


async def destroy(machine: FakeSystem, name: str = "lab") -> list[str]:
    changes = await module.destroy(name, host=machine.root, force=True, deadline=0)
    return [str(planned.step) for planned in changes.steps]


async def test_a_spec_is_applied_kept_and_destroyed(machine: FakeSystem) -> None:
    assert len(await apply(machine)) == 4
    assert len(machine.uuids()) == 4
    assert (machine.bus / U1 / "vgpu_params").read_text() == "x=1"
    owned = read_managed()
    assert {str(uuid) for uuid in owned.devices} == machine.uuids()
    assert owned.specs["lab"].source == "lab.toml"
    machine.writes.clear()
    assert await apply(machine) == []
    assert machine.writes == []
    assert len(await destroy(machine)) == 4
    assert machine.uuids() == set()
    assert read_managed() == Managed()


async def test_a_stored_spec_can_be_applied_again(machine: FakeSystem) -> None:
    await apply(machine)
    again = module.stored(read_managed().specs["lab"])
    assert again.name == "lab"
    assert (await module.apply(again, host=machine.root)).steps == ()


async def test_a_diff_changes_nothing(machine: FakeSystem, tmp_path: Path) -> None:
    changes = await module.diff(document(), host=machine.root)
    assert len(changes.steps) == 4
    assert machine.writes == []
    assert not (tmp_path / "state").exists()


async def test_a_changed_spec_does_only_the_change(machine: FakeSystem) -> None:
    await apply(machine)
    before = machine.uuids()
    machine.writes.clear()
    assert len(await apply(machine, POOL.replace("count = 3", "count = 5"))) == 2
    assert before < machine.uuids()
    assert {name for name, _ in machine.writes} == {"create"}


async def test_words_that_change_nothing_are_remembered(machine: FakeSystem) -> None:
    """The spec's text is what it comes back with after a reboot."""
    await apply(machine)
    assert await apply(machine, POOL + 'start = "manual"\n') == []
    assert '"manual"' in read_managed().specs["lab"].text


async def test_a_refusal_in_the_middle_leaves_what_was_before(machine: FakeSystem) -> None:
    await apply(machine)
    before, owned = machine.uuids(), read_managed()
    more = POOL.replace("count = 3", "count = 1") + (
        f'[[pool]]\nname = "q"\ntype = "t-1"\nuuid = "{U2}"\n'
    )
    machine.refuse[U2] = errno.EIO
    with pytest.raises(MdoError, match="Input/output error"):
        await apply(machine, more)
    assert machine.uuids() == before
    assert read_managed() == owned


async def test_who_was_quicker_is_named(machine: FakeSystem) -> None:
    def quicker(name: str, uuid: str) -> int | None:
        if (name, uuid) != ("create", U1):
            return None
        machine.mdev("card0", "t-1", U2)
        return errno.EUSERS

    machine.before = quicker
    with pytest.raises(CapacityError) as caught:
        await apply(machine)
    assert f"meanwhile somebody else created mdev {U2} (t-1 on card0)" in caught.value.__notes__
    assert machine.uuids() == {U2}
    assert read_managed().devices == {}


async def test_the_same_spec_at_the_same_time(machine: FakeSystem) -> None:
    """One does it, the other finds it done or is told who does it; never twice."""
    done = await asyncio.gather(*(apply(machine) for _ in range(3)), return_exceptions=True)
    assert len(machine.uuids()) == 4
    steps = sorted(len(one) for one in done if isinstance(one, list))
    assert steps[-1] == 4
    assert set(steps[:-1]) <= {0}
    for one in done:
        assert isinstance(one, list | BusyError)


async def test_two_specs_and_one_name_of_a_device(machine: FakeSystem) -> None:
    await apply(machine)
    other = f'name = "other"\n[[pool]]\nname = "o"\ntype = "t-1"\nuuid = "{U1}"\n'
    with pytest.raises(RequestError, match=f"lab.toml:5: .*{U1} belongs to pool named of spec lab"):
        await apply(machine, other)
    assert len(machine.uuids()) == 4


async def test_what_was_never_applied_cannot_be_destroyed(machine: FakeSystem) -> None:
    with pytest.raises(UnknownError, match="no spec lab was applied"):
        await destroy(machine)
    await apply(machine)
    with pytest.raises(UnknownError, match=r"no spec web was applied \(there are: lab\)"):
        await destroy(machine, "web")
    assert len(machine.uuids()) == 4


async def test_a_destroy_that_is_refused_gives_all_back(machine: FakeSystem) -> None:
    await apply(machine)
    before, owned = machine.uuids(), read_managed()
    machine.refuse[f"{U1}/remove"] = errno.EIO
    with pytest.raises(MdoError, match="Input/output error"):
        await destroy(machine)
    assert (machine.uuids(), read_managed()) == (before, owned)


async def test_a_device_that_is_held_keeps_the_spec_whole(machine: FakeSystem) -> None:
    await apply(machine)
    group = (machine.bus / U1 / "iommu_group").resolve().name
    machine.process(41, "qemu-system-x86", ["qemu", "-name", "guest=x"], [f"/dev/vfio/{group}"])
    before = machine.uuids()
    with pytest.raises(BusyError, match=rf"mdev {U1} is held by guest 'x' \(pid 41\)"):
        await destroy(machine)
    assert machine.uuids() == before


async def test_a_group_is_made_on_one_parent(machine: FakeSystem) -> None:
    """Half of a card is taken: the group goes whole to the other one."""
    for number in range(6):
        machine.mdev("card0", "t-1", f"99999999-509f-382f-3c1e-e6bfe0fa100{number}")
    machine.types("card0").joinpath("t-1", "available_instances").write_text("2\n")
    text = (
        'name = "lab"\n[[guest]]\nname = "g"\nqemu = "no-such-qemu"\n'
        'mdev = [{type = "t-1", count = 3, group = "peers"}]\n'
    )
    changes = await module.diff(document(text), host=machine.root)
    assert {placement.parent for placement in changes.plan.placements} == {"card1"}


async def test_a_qemu_that_will_not_start_leaves_no_device(machine: FakeSystem) -> None:
    text = (
        'name = "lab"\n[[guest]]\nname = "g"\nqemu = "no-such-qemu"\n'
        'mdev = [{type = "t-1", count = 2, group = "peers"}]\n'
    )
    with pytest.raises(MdoError, match="no-such-qemu"):
        await apply(machine, text)
    assert machine.uuids() == set()
    assert read_managed() == Managed()


async def test_a_journal_that_cannot_be_used_is_known_before_anything(
    machine: FakeSystem, tmp_path: Path
) -> None:
    (tmp_path / "state").mkdir(mode=0o700)
    (tmp_path / "state" / "journal.db").write_bytes(b"\xff" * 5000)
    with pytest.raises(HostError, match="is damaged"):
        await apply(machine)
    assert machine.writes == []


async def test_what_another_command_left_open_is_recovered_first(machine: FakeSystem) -> None:
    await apply(machine)
    with Journal.open() as journal:
        run = await journal.begin("apply", "lab", [], ["spec:lab"])
        journal._db.execute("UPDATE run SET start_time = 1 WHERE id = ?", (run.id,))
    assert await apply(machine) == []
    with Journal.open() as journal:
        assert journal.open_runs() == []


async def test_a_device_that_runs_on_after_the_journal_is_gone(
    machine: FakeSystem, tmp_path: Path
) -> None:
    """It is somebody else's then, until it is adopted."""
    await apply(machine)
    before = machine.uuids()
    shutil.rmtree(tmp_path / "state")
    with pytest.raises(RequestError, match=f"{U1} exists and is not ours.*mdo adopt {U1}"):
        await apply(machine)
    assert machine.uuids() == before
    done = await recovery.adopt([U1], host=machine.root)
    assert done.devices == (UUID(U1),)
    assert await recovery.adopt([U1], host=machine.root) == recovery.Adopted()
    await apply(machine)
    assert read_managed().devices[UUID(U1)].spec == "lab"
    with pytest.raises(UnknownError, match=f"there is no mdev {U2}"):
        await recovery.adopt([U2], host=machine.root)


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
async def real(machine: FakeSystem, place: Path, qemu: str) -> AsyncIterator[Path]:
    """Where guests live; none is left."""
    assert qemu
    yield place / "guests"
    for guest in process.list_guests(place / "guests"):
        await process.stop(guest, deadline=0, force=True)


async def test_a_guest_is_started_kept_changed_adopted_and_stopped(
    machine: FakeSystem, real: Path, tmp_path: Path
) -> None:
    async def make(text: str) -> list[str]:
        changes = await module.apply(document(text), host=machine.root, guests=real)
        return [str(planned.step) for planned in changes.steps]

    assert await make(GUEST) == ["start guest g"]
    first = process.find_running("g", real).record
    assert first is not None
    assert await make(GUEST) == []

    more = GUEST.replace("64M", "96M")
    with pytest.raises(RequestError, match=r"needs a restart: guest g: memory changes") as caught:
        await make(more)
    assert "--restart" in caught.value.hint
    assert process.find_running("g", real).record == first
    await process.stop(process.find_running("g", real), deadline=0, force=True)
    assert await make(more) == ["start guest g"]
    second = process.find_running("g", real).record
    assert second is not None
    assert (second.uuid, second.pid == first.pid) == (first.uuid, False)

    shutil.rmtree(tmp_path / "state")
    with pytest.raises(RequestError, match="guest g runs already, and was not started by a spec"):
        await make(more)
    done = await recovery.adopt([], everything=True, host=machine.root, guests=real)
    assert done.guests == ("g",)
    assert await make(more) == []
    assert process.find_running("g", real).record == second

    changes = await module.destroy("lab", host=machine.root, guests=real, force=True, deadline=0)
    assert [str(planned.step) for planned in changes.steps] == ["stop guest g"]
    assert process.list_guests(real) == []
    assert read_managed().guests == {}


async def test_of_two_guests_one_that_fails_stops_the_other(
    machine: FakeSystem, real: Path
) -> None:
    bad = GUEST + '[[guest]]\nname = "h"\nextra = ["-no-such-option"]\nmemory = "64M"\n'
    with pytest.raises(MdoError, match="no-such-option"):
        await module.apply(document(bad), host=machine.root, guests=real)
    assert process.list_guests(real) == []
    assert read_managed().guests == {}


async def test_a_guest_that_obeys_after_all_is_started_again(
    machine: FakeSystem, real: Path
) -> None:
    """Its button was pressed and cannot be taken back: a destroy was interrupted meanwhile."""
    await module.apply(document(GUEST), host=machine.root, guests=real)
    first = process.find_running("g", real)
    destroying = asyncio.ensure_future(module.destroy("lab", host=machine.root, guests=real))
    while not (first.directory / process.ASKED).exists():
        await asyncio.sleep(0.01)
    destroying.cancel()
    await asyncio.sleep(0.1)
    assert first.record is not None
    os.kill(first.record.pid, signal.SIGTERM)
    with pytest.raises(asyncio.CancelledError) as caught:
        await destroying
    assert caught.value.__notes__ == ["all was undone"]
    second = process.find_running("g", real)
    assert second.record is not None
    assert (second.record.uuid, second.record.pid == first.record.pid) == (first.record.uuid, False)
    assert not (second.directory / process.ASKED).exists()
