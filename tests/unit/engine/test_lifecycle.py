# SPDX-License-Identifier: GPL-2.0-or-later
"""Who starts and who stops, with a real QEMU that leaves the devices of our fake machine alone."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from mdev_orchestrator.engine import lifecycle
from mdev_orchestrator.errors import BusyError, CapacityError, MdoError, QemuError, RequestError
from mdev_orchestrator.host import sysfs
from mdev_orchestrator.host.events import wait_until
from mdev_orchestrator.host.holders import Holders, find_holders
from mdev_orchestrator.machine import Machine as handle  # noqa: N813
from mdev_orchestrator.model import Mdev
from mdev_orchestrator.qemu import process
from mdev_orchestrator.qemu.command import GuestMdev, GuestSpec
from mdev_orchestrator.qemu.process import RunningGuest, State
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


class Machine:
    """A fake host, a place for guests, and a QEMU; all that :mod:`lifecycle` is given."""

    def __init__(self, system: FakeSystem, place: Path, qemu: str) -> None:
        self.system = system
        self.place = place
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
            memory=64 << 20,
            qemu=qemu or self.qemu,
            accel="tcg",
            mdevs=tuple(map(self.mdev, uuids)),
            extra=("-S",),
        )

    async def launch(self, spec: GuestSpec, deadline: float = 60) -> RunningGuest:
        return await lifecycle.launch(
            spec,
            deadline=deadline,
            root=self.place,
            host=self.system.root,
        )

    async def end(self, guest: RunningGuest) -> str:
        ended = await lifecycle.end(guest, deadline=0, force=True, host=self.system.root)
        return ended.how

    async def sweep(self) -> tuple[lifecycle.ReclaimedGroup, ...]:
        return await lifecycle.reclaim_groups(root=self.place, host=self.system.root)

    def states(self) -> list[bool | None]:
        return [mdev.online for mdev in sysfs.read_host(handle(self.system.root)).mdevs]

    def writes(self) -> list[str]:
        """What was written to ``online``, by the device it was written to."""
        return [uuid for name, uuid in self.system.writes if name == "online"]

    def left(self) -> list[str]:
        return [guest.name for guest in process.list_guests(self.place)]

    def hold(self, *uuids: str, pid: int = 4711) -> None:
        """Let a process have devices open."""
        nodes = [f"/dev/vfio/{(self.system.bus / u / 'iommu_group').resolve().name}" for u in uuids]
        self.system.process(pid, "other", ["qemu", "-name", "theirs"], nodes)


@pytest.fixture
async def machine(
    system: FakeSystem,
    place: Path,
    qemu: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> AsyncIterator[Machine]:
    """Two devices of one group and one of none, on a parent with three links."""
    monkeypatch.setenv("MDO_CACHE_DIR", str(tmp_path / "cache"))
    system.parent("card0")
    system.type("card0", "t-1")
    system.groups_of("card0", 3)
    for uuid in (A, B, C):
        system.mdev("card0", "t-1", uuid)
    for uuid in (A, B):
        put(system.bus / uuid / "group_uuid", GROUP + "\n")
    machine = Machine(system, place, qemu)
    yield machine
    for guest in process.list_guests(place):
        for file in guest.started.glob("*"):
            file.unlink()
        await process.stop(guest, deadline=0, force=True)


async def kill(guest: RunningGuest) -> None:
    assert guest.record is not None
    os.kill(guest.record.pid, signal.SIGKILL)
    assert await process.wait_ended(guest, 20)


async def test_a_stock_qemu_gets_a_group_that_is_online(machine: Machine) -> None:
    guest = await machine.launch(machine.spec(A, B, C))
    assert machine.states() == [True, True, True]
    assert machine.writes() == [A, C]  # one write a group
    assert sorted(file.name for file in guest.started.iterdir()) == [f"{C}.json", f"{GROUP}.json"]
    assert await machine.end(guest) == "quit"
    assert machine.states() == [False, False, False]
    assert machine.left() == []


async def test_a_qemu_that_starts_by_itself_is_left_to_it(machine: Machine) -> None:
    qemu = machine.wrapper("patched", "mdev-start")
    guest = await machine.launch(machine.spec(A, B, qemu=qemu))
    assert machine.writes() == []
    # as it would have; and then it is killed
    await machine.system.write(str(machine.system.bus / A / "online"), b"1")
    assert machine.states() == [True, True, False]
    await kill(guest)
    [swept] = await machine.sweep()
    assert str(swept) == (f"guest g has no use for start group {GROUP} any more: it is offline now")
    assert machine.states() == [False, False, False]


async def test_a_driver_without_online_is_left_alone(machine: Machine) -> None:
    for uuid in (A, B, C):
        (machine.system.bus / uuid / "online").unlink()
    guest = await machine.launch(machine.spec(A, B, C))
    assert machine.writes() == []
    assert not process.has_started(guest)
    await machine.end(guest)
    assert machine.writes() == []


async def test_what_was_online_before_is_none_of_ours(machine: Machine) -> None:
    await machine.system.write(str(machine.system.bus / A / "online"), b"1")
    guest = await machine.launch(machine.spec(A, B))
    await machine.end(guest)
    assert machine.states() == [True, True, False]


async def test_a_group_has_one_user(machine: Machine) -> None:
    machine.hold(B)
    with pytest.raises(BusyError) as refusal:
        await machine.launch(machine.spec(A))
    assert refusal.value.message == (
        f"start group {GROUP} has a user already: mdev {B} of it is held by guest 'theirs' "
        "(pid 4711)"
    )
    assert machine.left() == []


async def test_a_device_in_no_group_has_one_user(machine: Machine) -> None:
    machine.hold(C)
    with pytest.raises(BusyError) as refusal:
        await machine.launch(machine.spec(C))
    assert refusal.value.message == f"mdev {C} is held by guest 'theirs' (pid 4711)"
    assert (machine.writes(), machine.left()) == ([], [])


async def test_a_group_must_be_complete(machine: Machine) -> None:
    with pytest.raises(RequestError) as refusal:
        await machine.launch(machine.spec(A))
    assert str(refusal.value) == (
        f"guest g: start group {GROUP} is not complete: it lacks mdev {B} "
        f"(give the guest all members, by --mdev {B})"
    )
    assert machine.writes() == []


async def test_a_second_group_that_is_refused_takes_the_first_offline(machine: Machine) -> None:
    machine.system.refuse[f"{C}/online"] = errno.ENOSPC
    with pytest.raises(CapacityError, match=f"mdev {C} on card0 does not come online"):
        await machine.launch(machine.spec(A, B, C))
    assert machine.states() == [False, False, False]
    assert machine.left() == []


async def test_a_qemu_that_fails_leaves_its_group_offline(machine: Machine) -> None:
    qemu = machine.wrapper("broken", "other", last="echo it is broken >&2; exit 1")
    put(machine.system.bus / A / "group_error", "the hardware said no\n")
    with pytest.raises(QemuError, match="it is broken") as failure:
        await machine.launch(machine.spec(A, B, qemu=qemu))
    assert failure.value.__notes__ == [
        f"start group {GROUP} on card0: the driver says: the hardware said no"
    ]
    assert (machine.states(), machine.left()) == ([False, False, False], [])


async def test_a_file_that_may_not_be_written_leaves_it_to_the_driver(machine: Machine) -> None:
    machine.system.refuse[f"{A}/online"] = errno.EACCES
    guest = await machine.launch(machine.spec(A, B))
    assert not process.has_started(guest)
    await machine.end(guest)
    qemu = machine.wrapper("broken", "other", last="exit 1")
    with pytest.raises(QemuError) as failure:
        await machine.launch(machine.spec(A, B, qemu=qemu))
    assert "and its driver did not start it by itself" in failure.value.__notes__[-1]
    assert "online (mode 0" in failure.value.__notes__[-1]


async def test_what_cannot_be_stopped_is_kept_and_tried_again(machine: Machine) -> None:
    guest = await machine.launch(machine.spec(A, B))
    machine.system.refuse[f"{A}/online"] = errno.EIO
    with pytest.raises(MdoError, match=f"has ended, but start group {GROUP} may still be online"):
        await machine.end(guest)
    assert process.find("g", machine.place).state is State.GONE
    [swept] = await machine.sweep()
    assert "Input/output error" in str(swept)
    with pytest.raises(RequestError, match="a start group of it may still be online"):
        await machine.launch(machine.spec())
    del machine.system.refuse[f"{A}/online"]
    assert await machine.end(process.find("g", machine.place)) == "gone"
    assert (machine.states(), machine.left()) == ([False, False, False], [])


async def test_a_sweep_leaves_alone_what_is_in_use(machine: Machine) -> None:
    guest = await machine.launch(machine.spec(A, B))
    machine.hold(B)
    assert await machine.sweep() == ()  # it runs, and somebody has a member: all is well
    await kill(guest)
    [swept] = await machine.sweep()
    assert "held by guest 'theirs' (pid 4711)" in swept.error
    assert machine.states() == [True, True, False]


async def test_a_sweep_looks_once_who_has_what_however_many_guests_there_are(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[int] = []

    async def look(machine: object, mdevs: Iterable[Mdev]) -> Holders:
        looks.append(1)
        return await find_holders(machine, mdevs)  # type: ignore[arg-type]

    await machine.launch(machine.spec(A, B, name="g1"))
    machine.hold(A)
    await machine.launch(machine.spec(C, name="g2"))
    machine.hold(C, pid=4712)
    monkeypatch.setattr(lifecycle, "find_holders", look)
    assert await machine.sweep() == ()
    assert looks == [1]
    assert machine.states() == [True, True, True]


async def test_a_sweep_stops_what_a_living_guest_has_let_go_of(machine: Machine) -> None:
    guest = await machine.launch(machine.spec(A, B))
    assert [swept.group for swept in await machine.sweep()] == [f"start group {GROUP}"]
    assert machine.states() == [False, False, False]
    assert process.find("g", machine.place).alive
    assert not process.has_started(guest)


async def test_a_sweep_forgets_what_was_cut_short_while_it_was_written(machine: Machine) -> None:
    guest = await machine.launch(machine.spec())
    guest.started.mkdir()
    draft = guest.started / f".{GROUP}.new"
    draft.write_text('{"parent": "card0", "gro')
    assert await machine.sweep() == ()
    assert not draft.exists()
    assert process.find("g", machine.place).alive


async def test_members_that_went_elsewhere_are_not_ours_any_more(machine: Machine) -> None:
    guest = await machine.launch(machine.spec(A, B))
    await kill(guest)
    for uuid in (A, B):
        put(machine.system.bus / uuid / "group_uuid", f"{C}\n")
    assert await machine.sweep() == ()
    assert machine.states() == [True, True, False]
    assert not process.has_started(guest)


async def test_members_that_were_removed_need_no_stop(machine: Machine) -> None:
    guest = await machine.launch(machine.spec(A, B))
    await kill(guest)
    for uuid in (A, B):
        await machine.system.write(str(machine.system.bus / uuid / "remove"), b"1")
    assert await machine.sweep() == ()
    assert await machine.end(guest) == "gone"


@pytest.mark.parametrize("text", [b"", b"{}", b"\xff", b'{"parent": 1}'])
async def test_a_damaged_note_is_told_and_kept(machine: Machine, text: bytes) -> None:
    guest = await machine.launch(machine.spec())
    guest.started.mkdir()
    file = guest.started / f"{GROUP}.json"
    file.write_bytes(text)
    [swept] = await machine.sweep()
    assert str(file) in swept.error
    assert file.exists()


async def test_cancelled_while_a_group_starts(machine: Machine) -> None:
    machine.system.block[f"{A}/online"] = gate = asyncio.Event()
    task = asyncio.ensure_future(machine.launch(machine.spec(A, B)))
    await wait_until(handle(machine.system.root), lambda: bool(machine.writes()))
    assert not task.done()
    # the note is there before the write is
    assert (machine.place / "g" / "started" / f"{GROUP}.json").exists()
    gate.set()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (machine.states(), machine.left()) == ([False, False, False], [])


async def test_a_start_that_was_cut_short_leaves_nothing(machine: Machine) -> None:
    directory = machine.place / "g"
    lifecycle._note(
        directory / "started", lifecycle.Started("card0", UUID(GROUP), [UUID(A), UUID(B)], "mdo")
    )
    await machine.system.write(str(machine.system.bus / A / "online"), b"1")
    assert len(await machine.sweep()) == 1
    assert (machine.states(), machine.left()) == ([False, False, False], [])


async def test_attach_and_its_failure(machine: Machine) -> None:
    guest = await machine.launch(machine.spec())
    with pytest.raises(MdoError):  # the real QEMU opens no device of a fake machine
        await lifecycle.attach(guest, machine.mdev(A), host=machine.system.root)
    assert machine.writes() == [A, A]
    assert machine.states() == [False, False, False]
    assert not process.has_started(guest)
    machine.hold(B)
    with pytest.raises(BusyError, match="has a user already"):
        await lifecycle.attach(guest, machine.mdev(A), host=machine.system.root)
