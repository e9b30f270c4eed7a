# SPDX-License-Identifier: GPL-2.0-or-later
"""Which program starts and stops groups, with a QEMU that does neither: the driver's log proves it.

Runs inside the lab: ``mdo lab exec python3 -m pytest tests/lab/test_startstop.py``. QEMU runs with
``-S``, so that nothing boots.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from msgspec.structs import replace

from lab import vfio
from lab.kernel_log import KernelLog
from lab.machine import machine
from mdev_orchestrator import errors
from mdev_orchestrator.engine import guest_ops, start_groups
from mdev_orchestrator.engine.devices import create_devices, remove_devices
from mdev_orchestrator.host import sysfs
from mdev_orchestrator.host.events import wait_until
from mdev_orchestrator.model import Mdev
from mdev_orchestrator.qemu import features, process
from mdev_orchestrator.qemu.command import GuestMdev, GuestSpec
from mdev_orchestrator.qemu.monitor import connect
from mdev_orchestrator.qemu.process import RunningGuest, State
from mdev_orchestrator.spec.sizes import Size
from mdev_orchestrator.state import cache_dir

pytestmark = pytest.mark.skipif("MDO_LAB" not in os.environ, reason="needs the lab's kernel")

QEMU = "/usr/bin/qemu-system-x86_64"
LINKS = 3
DRIVERS = {
    "implicit": {"implicit_start": 1, "has_online": 1},
    "explicit": {"implicit_start": 0, "has_online": 1},
    "no online": {"implicit_start": 1, "has_online": 0},
}


@pytest.fixture(params=list(DRIVERS), scope="module")
def driver(request: pytest.FixtureRequest) -> Iterator[str]:
    """The driver in each of its ways to start."""
    with vfio.loaded(links=LINKS, **DRIVERS[request.param]):
        yield request.param


@pytest.fixture(scope="module")
def explicit() -> Iterator[None]:
    """A driver that starts nothing by itself."""
    with vfio.loaded(links=LINKS, **DRIVERS["explicit"]):
        yield


@pytest.fixture(autouse=True)
async def given_back(kernel_log: KernelLog) -> AsyncIterator[None]:
    """After each test there is no guest, no mdev, and every link is free."""
    yield
    for guest in process.list_guests(machine()):
        await guest_ops.end(machine(), guest, deadline=0, force=True)
    if left := [mdev.uuid for mdev in sysfs.read_host(machine()).mdevs]:
        await remove_devices(machine(), left)
    assert {parent.links_free for parent in sysfs.read_host(machine()).parents} == {LINKS}


@pytest.fixture(params=["10.0", "10.2"])
def patched(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Our own QEMU, where 'mdo qemu build' has made it."""
    place = cache_dir() / "qemu" / request.param
    if not (place / "bin/qemu-system-x86_64").exists():
        pytest.skip(f"mdo qemu build --series {request.param}")
    return {"qemu": str(place / "bin/qemu-system-x86_64"), "firmware": place / "firmware"}


def spec(*mdevs: Mdev, name: str = "g") -> GuestSpec:
    return GuestSpec(
        name=name,
        uuid=uuid4(),
        memory=Size(64 << 20),
        qemu=QEMU,
        accel="tcg",
        mdevs=tuple(map(guest_mdev, mdevs)),
        extra=("-S",),
    )


def guest_mdev(mdev: Mdev) -> GuestMdev:
    return GuestMdev(mdev.uuid, mdev.path, mdev.device_api or "vfio-pci")


async def make(count: int, group: str | None = "peers") -> tuple[Mdev, ...]:
    return await create_devices(machine(), "mvgpu-128M", count, group=group)


def states(*mdevs: Mdev) -> set[bool | None]:
    return {found.online for mdev in mdevs if (found := sysfs.read_mdev(machine(), mdev.uuid))}


def free() -> int | None:
    return next(p.links_free for p in sysfs.read_host(machine()).parents if p.name == "igd0")


def positions(uuid: UUID, since: int) -> dict[str, int]:
    """Where in the driver's log each event of a device stands first."""
    found: dict[str, int] = {}
    for event in vfio.events(since):
        if event.uuid == str(uuid):
            found.setdefault(event.event, event.sequence)
    return found


def starters(since: int) -> set[int]:
    return {event.pid for event in vfio.events(since) if event.event == "started"}


def in_order(mdevs: tuple[Mdev, ...], since: int) -> None:
    """Every member was online before any was open, and offline after all were closed."""
    found = [positions(mdev.uuid, since) for mdev in mdevs]
    assert max(p["started"] for p in found) < min(p["opened"] for p in found)
    for p in found:
        assert p["opened"] < p["accessed"] < p["closed"]
    assert max(p["closed"] for p in found) < min(p["stopped"] for p in found)


@pytest.mark.parametrize("plug", ["cold", "hot"])
@pytest.mark.parametrize("count", [1, 2, 3])
async def test_online_before_the_first_access_and_offline_after_the_last_release(
    driver: str, count: int, plug: str
) -> None:
    mdevs = await make(count, "peers" if count > 1 and driver != "no online" else None)
    since = vfio.now()
    guest = await guest_ops.launch(machine(), spec(*(mdevs if plug == "cold" else ())))
    assert guest.record is not None
    if plug == "hot":
        for mdev in mdevs:
            await guest_ops.attach(machine(), guest, guest_mdev(mdev))
    known = driver != "no online"
    assert states(*mdevs) == ({True} if known else {None})
    assert (guest.record.pid in starters(since)) is not known
    assert (await guest_ops.end(machine(), guest, deadline=0, force=True)).how == "quit"
    assert states(*mdevs) == ({False} if known else {None})
    if known:
        in_order(mdevs, since)
    else:
        for mdev in mdevs:
            in_order((mdev,), since)
    assert (free(), process.list_guests(machine())) == (LINKS, [])


async def quit_(guest: RunningGuest) -> None:
    async with connect(guest.qmp_socket, guest.label) as qmp:
        await qmp.quit()


def by(number: int) -> Callable[[RunningGuest], Awaitable[None]]:
    async def send(guest: RunningGuest) -> None:
        assert guest.record is not None
        os.kill(guest.record.pid, number)

    return send


ENDS: dict[str, Callable[[RunningGuest], Awaitable[None]]] = {
    "quit": quit_,
    "SIGTERM": by(signal.SIGTERM),
    "SIGKILL": by(signal.SIGKILL),
}
ENDS["SIGABRT"] = by(signal.SIGABRT)


@pytest.mark.parametrize("how", list(ENDS))
async def test_the_next_command_stops_what_a_guest_left_online(explicit: None, how: str) -> None:
    mdevs = await make(2)
    since = vfio.now()
    guest = await guest_ops.launch(machine(), spec(*mdevs))
    await ENDS[how](guest)
    assert await process.wait_ended(guest, 20)
    assert (states(*mdevs), free()) == ({True}, LINKS - 1)  # no command has looked yet
    [reclaimed] = await start_groups.reclaim_groups(machine())
    assert str(reclaimed).endswith("it is offline now")
    assert (states(*mdevs), free()) == ({False}, LINKS)
    in_order(mdevs, since)
    assert await start_groups.reclaim_groups(machine()) == ()
    # and the group is free for another guest, of the same name too
    again = await guest_ops.launch(machine(), spec(*mdevs))
    assert states(*mdevs) == {True}
    await guest_ops.end(machine(), again, deadline=0, force=True)


async def test_a_dead_guests_group_goes_offline_when_another_wants_it(explicit: None) -> None:
    mdevs = await make(2)
    guest = await guest_ops.launch(machine(), spec(*mdevs))
    assert guest.record is not None
    os.kill(guest.record.pid, signal.SIGKILL)
    assert await process.wait_ended(guest, 20)
    other = await guest_ops.launch(machine(), spec(*mdevs, name="other"))
    assert process.has_started(other)
    assert not process.has_started(guest)


async def test_the_last_detach_stops_and_the_first_does_not(explicit: None) -> None:
    mdevs = await make(2)
    guest = await guest_ops.launch(machine(), spec())
    for mdev in mdevs:
        await guest_ops.attach(machine(), guest, guest_mdev(mdev))
    for mdev in mdevs:
        assert states(*mdevs) == {True}
        await end_by_monitor(guest, mdev)
        await start_groups.reclaim_groups(machine())
    assert (states(*mdevs), free()) == ({False}, LINKS)
    assert process.find(machine(), "g").state is State.RUNNING


async def end_by_monitor(guest: RunningGuest, mdev: Mdev) -> None:
    """Unplug from a guest that has not booted: a device on its way in can be taken out."""
    name = f"mdev-{mdev.uuid}"
    async with connect(guest.qmp_socket, guest.label) as qmp:
        with qmp.events(("DEVICE_DELETED",), lambda data: data.get("device") == name) as events:
            await qmp.execute("device_del", object, {"id": name})
            await qmp.execute("system_reset", object)
            assert await events.next(30)


async def test_a_group_that_does_not_fit_is_refused_with_its_reason(driver: str) -> None:
    if driver == "no online":
        pytest.skip("it has no groups")
    mdevs = await make(4)
    since = vfio.now()
    with pytest.raises(errors.CapacityError) as refusal:
        await guest_ops.launch(machine(), spec(*mdevs))
    text = str(refusal.value)
    for word in ("start group", "on igd0", *(str(mdev.uuid) for mdev in mdevs)):
        assert word in text
    assert "6 links asked, 3 of 3 left" in text
    assert (states(*mdevs), free(), process.list_guests(machine())) == ({False}, LINKS, [])
    assert "opened" not in {event.event for event in vfio.events(since)}


async def test_a_refusal_by_the_hardware_is_told(driver: str) -> None:
    if driver == "no online":
        pytest.skip("its refusal is QEMU's to tell")
    mdevs = await make(2)
    with vfio.fault("start", "errno=5"), pytest.raises(errors.MdoError, match="Input/output error"):
        await guest_ops.launch(machine(), spec(*mdevs))
    assert (states(*mdevs), process.list_guests(machine())) == ({False}, [])


async def test_a_failed_open_gives_back_what_was_started(driver: str) -> None:
    mdevs = await make(2, None if driver == "no online" else "peers")
    with (
        vfio.fault("open", f"errno=5 uuid={mdevs[1].uuid}"),
        pytest.raises(errors.QemuError, match="Input/output error"),
    ):
        await guest_ops.launch(machine(), spec(*mdevs))
    assert states(*mdevs) <= {False, None}
    guest = await guest_ops.launch(machine(), spec())
    with vfio.fault("open", f"errno=5 uuid={mdevs[0].uuid}"), pytest.raises(errors.QemuError):
        await guest_ops.attach(machine(), guest, guest_mdev(mdevs[0]))
    assert states(*mdevs) <= {False, None}
    assert not process.has_started(guest)


async def test_a_start_that_hangs_ends_at_its_deadline(explicit: None) -> None:
    mdevs = await make(2)
    with (
        vfio.fault("start", "delay_ms=60000"),
        pytest.raises(errors.DeadlineError, match="did not come online within 1 s"),
    ):
        await guest_ops.launch(machine(), spec(*mdevs), deadline=1)
    assert (states(*mdevs), free(), process.list_guests(machine())) == ({False}, LINKS, [])


async def test_one_user_for_one_group(explicit: None) -> None:
    first, second = mdevs = await make(2)
    with pytest.raises(errors.RequestError, match=f"is not complete: it lacks mdev {second.uuid}"):
        await guest_ops.launch(machine(), spec(first))
    guest = await guest_ops.launch(machine(), spec())
    await guest_ops.attach(machine(), guest, guest_mdev(first))
    held = rf"has a user already: mdev {first.uuid} of it is held by guest 'g' \(pid"
    with pytest.raises(errors.BusyError, match=held):
        await guest_ops.launch(machine(), spec(second, name="other"))
    other = await guest_ops.launch(machine(), spec(name="other"))
    with pytest.raises(errors.BusyError, match=held):
        await guest_ops.attach(machine(), other, guest_mdev(second))
    assert states(*mdevs) == {True}
    await guest_ops.attach(machine(), guest, guest_mdev(second))


async def test_what_another_program_started_is_left_online(explicit: None) -> None:
    mdevs = await make(2)
    vfio.put(str(mdevs[0].uuid), "online", "1")
    guest = await guest_ops.launch(machine(), spec(*mdevs))
    await guest_ops.end(machine(), guest, deadline=0, force=True)
    assert states(*mdevs) == {True}
    vfio.put(str(mdevs[0].uuid), "online", "0")


async def test_a_driver_without_groups_says_so(driver: str) -> None:
    if driver != "no online":
        pytest.skip("it has groups")
    with pytest.raises(errors.HostError, match="the driver of igd0 has no start groups"):
        await make(1)
    assert sysfs.read_host(machine()).mdevs == ()


KILLED = """
import asyncio, os, signal, sys
from lab.machine import machine
from lab.test_startstop import spec
from mdev_orchestrator.engine import guest_ops
from mdev_orchestrator.host import sysfs
from mdev_orchestrator.system.writer import SysfsWriter
from uuid import UUID

write = SysfsWriter.write

async def struck(*arguments, **more):
    result = await write(*arguments, **more)
    if sys.argv[1] == "started":
        os.kill(os.getpid(), signal.SIGKILL)
    return result

SysfsWriter.write = struck
mdevs = [sysfs.read_mdev(machine(), UUID(text)) for text in sys.argv[2:]]
asyncio.run(guest_ops.launch(machine(), spec(*mdevs)))
"""
"""A command that starts a guest; it is killed when a group of it has come online."""


@pytest.mark.parametrize("moment", ["starting", "started"])
async def test_an_orchestrator_that_is_killed_leaves_nothing(explicit: None, moment: str) -> None:
    mdevs = await make(2)
    uuids = [str(mdev.uuid) for mdev in mdevs]
    with vfio.fault("start", "delay_ms=3000" if moment == "starting" else "delay_ms=0"):
        killed = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", KILLED, moment, *uuids),
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        if moment == "starting":
            async with asyncio.timeout(60):
                await wait_until(
                    machine(), lambda: any(map(process.has_started, process.list_guests(machine())))
                )
            killed.kill()
        assert await killed.wait() == -signal.SIGKILL
        async with asyncio.timeout(30):
            # the driver refuses to stop what it still starts
            while process.list_guests(machine()):
                await start_groups.reclaim_groups(machine())
                await asyncio.sleep(0.1)
    assert (states(*mdevs), free()) == ({False}, LINKS)


@pytest.mark.parametrize("plug", ["cold", "hot"])
async def test_a_qemu_that_starts_groups_is_left_to_it(
    explicit: None, patched: dict[str, Any], plug: str
) -> None:
    assert features.START in await features.properties(patched["qemu"], "vfio-pci")
    mdevs = await make(2)
    since = vfio.now()
    guest = await guest_ops.launch(
        machine(), replace(spec(*(mdevs if plug == "cold" else ())), **patched)
    )
    if plug == "hot":
        for mdev in mdevs:
            await guest_ops.attach(machine(), guest, guest_mdev(mdev))
    assert guest.record is not None
    assert starters(since) == {guest.record.pid}
    await quit_(guest)
    assert await process.wait_ended(guest, 20)
    assert (states(*mdevs), free()) == ({False}, LINKS)  # QEMU's doing
    assert await start_groups.reclaim_groups(machine()) == ()
    in_order(mdevs, since)


async def test_a_killed_qemu_that_starts_groups_is_tidied_up_after(
    explicit: None, patched: dict[str, Any]
) -> None:
    mdevs = await make(2)
    since = vfio.now()
    guest = await guest_ops.launch(machine(), replace(spec(*mdevs), **patched))
    await ENDS["SIGKILL"](guest)
    assert await process.wait_ended(guest, 20)
    assert states(*mdevs) == {True}
    assert len(await start_groups.reclaim_groups(machine())) == 1
    assert (states(*mdevs), free()) == ({False}, LINKS)
    in_order(mdevs, since)


async def test_a_binary_is_asked_what_it_can_do() -> None:
    found = await features.properties(QEMU, "vfio-pci")
    assert {"sysfsdev", "host"} <= found
    assert features.START not in found
    assert await features.properties(shutil.which("true") or "", "vfio-pci") == frozenset()
    assert await features.properties(str(Path("/nowhere")), "vfio-pci") == frozenset()
