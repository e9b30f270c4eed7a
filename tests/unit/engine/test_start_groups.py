# SPDX-License-Identifier: GPL-2.0-or-later
"""Which program starts a group and which one stops it.

The QEMU is a real one, and leaves the devices of the machine of files alone.
"""

from __future__ import annotations

import asyncio
import errno
import os
import signal
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from mdev_orchestrator.engine import guest_ops, start_groups
from mdev_orchestrator.engine.start_groups import ReclaimedGroup, StartedRecord, reclaim_groups
from mdev_orchestrator.errors import BusyError, CapacityError, MdoError, QemuError, RequestError
from mdev_orchestrator.host import sysfs
from mdev_orchestrator.host.events import wait_until
from mdev_orchestrator.host.holders import Holders, find_holders
from mdev_orchestrator.machine import Machine
from mdev_orchestrator.model import Mdev
from mdev_orchestrator.qemu import process
from mdev_orchestrator.qemu.command import GuestMdev, GuestSpec
from mdev_orchestrator.qemu.process import RunningGuest, State
from mdev_orchestrator.qemu.stop import stop_qemu
from mdev_orchestrator.spec.sizes import Size
from unit.fakesys import FakeSystem, put

A, B, C = (f"0000000{n}-1111-4222-8333-444444444444" for n in "123")
GROUP = "aaaaaaaa-1111-4222-8333-444444444444"

WRAPPER = """\
#!/bin/bash
# a QEMU that has no use for vfio devices, but says what it could do with them
if [ "$2" = vfio-pci,help ]; then echo "  {property}=<OnOffAuto>"; exit; fi
arguments=()
while [ $# -gt 0 ]; do
    case "$2" in vfio-pci,*) shift 2;; *) arguments+=("$1"); shift;; esac
done
{last}
exec {qemu} "${{arguments[@]}}"
"""


class Lab:
    """A machine of files, with guests and a QEMU."""

    def __init__(self, machine: Machine, system: FakeSystem, qemu: str) -> None:
        self.machine = machine
        self.system = system
        self.real = qemu
        self.qemu = self.wrapper("stock", "other")

    def wrapper(self, name: str, property_: str, last: str = "") -> str:
        path = self.system.root / name
        path.write_text(WRAPPER.format(property=property_, qemu=self.real, last=last))
        path.chmod(0o755)
        return str(path)

    def mdev(self, uuid: str) -> GuestMdev:
        return GuestMdev(UUID(uuid), self.system.bus / uuid)

    def spec(self, *uuids: str, name: str = "g", qemu: str = "") -> GuestSpec:
        return GuestSpec(
            name=name,
            uuid=uuid4(),
            memory=Size(64 << 20),
            qemu=qemu or self.qemu,
            accel="tcg",
            mdevs=tuple(map(self.mdev, uuids)),
            extra=("-S",),
        )

    async def launch(self, spec: GuestSpec, deadline: float = 60) -> RunningGuest:
        return await guest_ops.launch(self.machine, spec, deadline=deadline)

    async def end(self, guest: RunningGuest) -> str:
        return (await guest_ops.end(self.machine, guest, deadline=0, force=True)).how

    async def reclaim(self) -> tuple[ReclaimedGroup, ...]:
        return await reclaim_groups(self.machine)

    def find(self) -> RunningGuest:
        return process.find(self.machine, "g")

    def states(self) -> list[bool | None]:
        return [mdev.online for mdev in sysfs.read_host(self.machine).mdevs]

    def writes(self) -> list[str]:
        """What was written to ``online``, by the device it was written to."""
        return [uuid for name, uuid in self.system.writes if name == "online"]

    def left(self) -> list[str]:
        return [guest.name for guest in process.list_guests(self.machine)]

    def hold(self, *uuids: str, pid: int = 4711) -> None:
        """Let a process have devices open."""
        nodes = [f"/dev/vfio/{(self.system.bus / u / 'iommu_group').resolve().name}" for u in uuids]
        self.system.process(pid, "other", ["qemu", "-name", "theirs"], nodes)


@pytest.fixture
async def lab(
    system: FakeSystem,
    place: Path,
    qemu: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> AsyncIterator[Lab]:
    """Two devices of one group and one of none, on a parent with three links."""
    monkeypatch.setenv("MDO_CACHE_DIR", str(tmp_path / "cache"))
    system.group_of_two(GROUP, A, B, C)
    machine = Machine(system.root, state=place)
    yield Lab(machine, system, qemu)
    for guest in process.list_guests(machine):
        for file in guest.started.glob("*"):
            file.unlink()
        await stop_qemu(machine, guest, deadline=0, force=True)


async def kill(guest: RunningGuest) -> None:
    assert guest.record is not None
    os.kill(guest.record.pid, signal.SIGKILL)
    assert await process.wait_ended(guest, 20)


async def test_a_stock_qemu_gets_a_group_that_is_online(lab: Lab) -> None:
    guest = await lab.launch(lab.spec(A, B, C))
    assert lab.states() == [True, True, True]
    assert lab.writes() == [A, C]  # one write a group
    assert sorted(file.name for file in guest.started.iterdir()) == [f"{C}.json", f"{GROUP}.json"]
    assert await lab.end(guest) == "quit"
    assert lab.states() == [False, False, False]
    assert lab.left() == []


async def test_a_qemu_that_starts_by_itself_is_left_to_it(lab: Lab) -> None:
    qemu = lab.wrapper("patched", "mdev-start")
    guest = await lab.launch(lab.spec(A, B, qemu=qemu))
    assert lab.writes() == []
    # as it would have; and then it is killed
    await lab.system.write(str(lab.system.bus / A / "online"), b"1")
    assert lab.states() == [True, True, False]
    await kill(guest)
    [reclaimed] = await lab.reclaim()
    assert str(reclaimed) == (
        f"guest g does not use start group {GROUP} any more: it is offline now"
    )
    assert lab.states() == [False, False, False]


async def test_a_driver_without_online_is_left_alone(lab: Lab) -> None:
    for uuid in (A, B, C):
        (lab.system.bus / uuid / "online").unlink()
    guest = await lab.launch(lab.spec(A, B, C))
    assert lab.writes() == []
    assert not process.has_started(guest)
    await lab.end(guest)
    assert lab.writes() == []


async def test_what_was_online_before_stays_online(lab: Lab) -> None:
    await lab.system.write(str(lab.system.bus / A / "online"), b"1")
    guest = await lab.launch(lab.spec(A, B))
    await lab.end(guest)
    assert lab.states() == [True, True, False]


async def test_a_group_has_one_user(lab: Lab) -> None:
    lab.hold(B)
    with pytest.raises(BusyError) as refusal:
        await lab.launch(lab.spec(A))
    assert refusal.value.message == (
        f"start group {GROUP} has a user already: mdev {B} of it is held by guest 'theirs' "
        "(pid 4711)"
    )
    assert lab.left() == []


async def test_a_device_in_no_group_has_one_user(lab: Lab) -> None:
    lab.hold(C)
    with pytest.raises(BusyError) as refusal:
        await lab.launch(lab.spec(C))
    assert refusal.value.message == f"mdev {C} is held by guest 'theirs' (pid 4711)"
    assert (lab.writes(), lab.left()) == ([], [])


async def test_a_group_must_be_complete(lab: Lab) -> None:
    with pytest.raises(RequestError) as refusal:
        await lab.launch(lab.spec(A))
    assert str(refusal.value) == (
        f"guest g: start group {GROUP} is not complete: it lacks mdev {B} "
        f"(give the guest all members, by --mdev {B})"
    )
    assert lab.writes() == []


async def test_a_second_group_that_is_refused_takes_the_first_offline(lab: Lab) -> None:
    lab.system.refuse[f"{C}/online"] = errno.ENOSPC
    with pytest.raises(CapacityError, match=f"mdev {C} on card0 does not come online"):
        await lab.launch(lab.spec(A, B, C))
    assert lab.states() == [False, False, False]
    assert lab.left() == []


async def test_a_qemu_that_fails_leaves_its_group_offline(lab: Lab) -> None:
    qemu = lab.wrapper("broken", "other", last="echo it is broken >&2; exit 1")
    put(lab.system.bus / A / "group_error", "the hardware said no\n")
    with pytest.raises(QemuError, match="it is broken") as failure:
        await lab.launch(lab.spec(A, B, qemu=qemu))
    assert failure.value.__notes__ == [
        f"start group {GROUP} on card0: the driver says: the hardware said no"
    ]
    assert (lab.states(), lab.left()) == ([False, False, False], [])


async def test_a_file_that_may_not_be_written_leaves_it_to_the_driver(lab: Lab) -> None:
    lab.system.refuse[f"{A}/online"] = errno.EACCES
    guest = await lab.launch(lab.spec(A, B))
    assert not process.has_started(guest)
    await lab.end(guest)
    qemu = lab.wrapper("broken", "other", last="exit 1")
    with pytest.raises(QemuError) as failure:
        await lab.launch(lab.spec(A, B, qemu=qemu))
    assert "and its driver did not start it by itself" in failure.value.__notes__[-1]
    assert "online (mode 0" in failure.value.__notes__[-1]


async def test_what_cannot_be_stopped_is_kept_and_tried_again(lab: Lab) -> None:
    guest = await lab.launch(lab.spec(A, B))
    lab.system.refuse[f"{A}/online"] = errno.EIO
    with pytest.raises(MdoError, match=f"has ended, but start group {GROUP} may still be online"):
        await lab.end(guest)
    assert lab.find().state is State.GONE
    [reclaimed] = await lab.reclaim()
    assert "Input/output error" in str(reclaimed)
    with pytest.raises(RequestError, match="a start group of it may still be online"):
        await lab.launch(lab.spec())
    del lab.system.refuse[f"{A}/online"]
    assert await lab.end(lab.find()) == "gone"
    assert (lab.states(), lab.left()) == ([False, False, False], [])


async def test_a_reclaim_leaves_alone_what_is_in_use(lab: Lab) -> None:
    guest = await lab.launch(lab.spec(A, B))
    lab.hold(B)
    assert await lab.reclaim() == ()  # it runs, and a process has a member open
    await kill(guest)
    [reclaimed] = await lab.reclaim()
    assert "held by guest 'theirs' (pid 4711)" in reclaimed.error
    assert lab.states() == [True, True, False]


async def test_a_reclaim_walks_proc_once_however_many_guests_there_are(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[int] = []

    async def look(machine: object, mdevs: Iterable[Mdev]) -> Holders:
        looks.append(1)
        return await find_holders(machine, mdevs)  # type: ignore[arg-type]

    await lab.launch(lab.spec(A, B, name="g1"))
    lab.hold(A)
    await lab.launch(lab.spec(C, name="g2"))
    lab.hold(C, pid=4712)
    monkeypatch.setattr(start_groups, "find_holders", look)
    assert await lab.reclaim() == ()
    assert looks == [1]
    assert lab.states() == [True, True, True]


async def test_a_reclaim_stops_what_a_living_guest_has_let_go_of(lab: Lab) -> None:
    guest = await lab.launch(lab.spec(A, B))
    assert [reclaimed.group for reclaimed in await lab.reclaim()] == [f"start group {GROUP}"]
    assert lab.states() == [False, False, False]
    assert lab.find().alive
    assert not process.has_started(guest)


async def test_a_reclaim_forgets_what_was_cut_short_while_it_was_written(lab: Lab) -> None:
    guest = await lab.launch(lab.spec())
    guest.started.mkdir()
    draft = guest.started / f".{GROUP}.new"
    draft.write_text('{"parent": "card0", "gro')
    assert await lab.reclaim() == ()
    assert not draft.exists()
    assert lab.find().alive


async def test_members_that_went_elsewhere_are_left_alone(lab: Lab) -> None:
    guest = await lab.launch(lab.spec(A, B))
    await kill(guest)
    for uuid in (A, B):
        put(lab.system.bus / uuid / "group_uuid", f"{C}\n")
    assert await lab.reclaim() == ()
    assert lab.states() == [True, True, False]
    assert not process.has_started(guest)


async def test_members_that_were_removed_need_no_stop(lab: Lab) -> None:
    guest = await lab.launch(lab.spec(A, B))
    await kill(guest)
    for uuid in (A, B):
        await lab.system.write(str(lab.system.bus / uuid / "remove"), b"1")
    assert await lab.reclaim() == ()
    assert await lab.end(guest) == "gone"


@pytest.mark.parametrize("text", [b"", b"{}", b"\xff", b'{"parent": 1}'])
async def test_a_damaged_note_is_told_and_kept(lab: Lab, text: bytes) -> None:
    guest = await lab.launch(lab.spec())
    guest.started.mkdir()
    file = guest.started / f"{GROUP}.json"
    file.write_bytes(text)
    [reclaimed] = await lab.reclaim()
    assert str(file) in reclaimed.error
    assert file.exists()


async def test_cancelled_while_a_group_starts(lab: Lab) -> None:
    lab.system.block[f"{A}/online"] = gate = asyncio.Event()
    task = asyncio.ensure_future(lab.launch(lab.spec(A, B)))
    await wait_until(lab.machine, lambda: bool(lab.writes()))
    assert not task.done()
    # the note is there before the write is
    assert (lab.machine.guests_dir / "g" / "started" / f"{GROUP}.json").exists()
    gate.set()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (lab.states(), lab.left()) == ([False, False, False], [])


async def test_a_start_that_was_cut_short_leaves_nothing(lab: Lab) -> None:
    directory = lab.machine.guests_dir / "g"
    start_groups._write(
        directory / "started", StartedRecord("card0", UUID(GROUP), [UUID(A), UUID(B)], "mdo")
    )
    await lab.system.write(str(lab.system.bus / A / "online"), b"1")
    assert len(await lab.reclaim()) == 1
    assert (lab.states(), lab.left()) == ([False, False, False], [])


async def test_attach_and_its_failure(lab: Lab) -> None:
    guest = await lab.launch(lab.spec())
    with pytest.raises(MdoError):  # the real QEMU opens no device of a fake machine
        await guest_ops.attach(lab.machine, guest, lab.mdev(A))
    assert lab.writes() == [A, A]
    assert lab.states() == [False, False, False]
    assert not process.has_started(guest)
    lab.hold(B)
    with pytest.raises(BusyError, match="has a user already"):
        await guest_ops.attach(lab.machine, guest, lab.mdev(A))
