# SPDX-License-Identifier: GPL-2.0-or-later
"""Events from the kernel, lost events, and waiting for a device to be usable."""

from __future__ import annotations

import asyncio
import errno
import os
import pwd
import socket
from collections.abc import Iterator
from contextlib import aclosing, suppress
from pathlib import Path
from types import SimpleNamespace
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mdev_orchestrator.errors import DeadlineError, HostError
from mdev_orchestrator.host import readiness
from mdev_orchestrator.host.events import (
    MdevEvent,
    NodeEvent,
    ParentEvent,
    Rescan,
    events,
    interpret,
    wait_until,
)
from mdev_orchestrator.host.iommu import may_open
from mdev_orchestrator.host.readiness import missing, wait_ready
from mdev_orchestrator.machine import Machine
from unit.fakesys import FakeSystem

U1 = UUID("83b8f4f2-509f-382f-3c1e-e6bfe0fa1001")
PARENT = "/devices/virtual/mvgpu/grid0"
ADD = {"ACTION": "add", "SUBSYSTEM": "mdev", "DEVPATH": f"{PARENT}/{U1}"}


class FakeMonitor:
    """A udev monitor whose events a test sends."""

    def __init__(self) -> None:
        self.here, self.there = socket.socketpair()
        self.waiting: list[dict[str, str] | OSError] = []

    def send(self, *items: dict[str, str] | OSError) -> None:
        self.waiting.extend(items)
        self.there.send(b"x")

    def fileno(self) -> int:
        return self.here.fileno()

    def poll(self, timeout: float) -> SimpleNamespace | None:
        if not self.waiting:
            self.here.setblocking(False)
            with suppress(BlockingIOError):
                self.here.recv(100)
            return None
        item = self.waiting.pop(0)
        if isinstance(item, OSError):
            raise item
        return SimpleNamespace(properties=item)

    def close(self) -> None:
        self.here.close()
        self.there.close()


@pytest.fixture
def monitor() -> Iterator[FakeMonitor]:
    monitor = FakeMonitor()
    yield monitor
    monitor.close()


@pytest.mark.parametrize(
    ("properties", "event"),
    [
        (ADD, MdevEvent("add", U1, "grid0")),
        (
            {"ACTION": "add", "SUBSYSTEM": "vfio", "DEVPATH": "/d/vfio/7", "DEVNAME": "vfio/7"},
            NodeEvent("add", "/dev/vfio/7"),
        ),
        (
            {"ACTION": "add", "SUBSYSTEM": "vfio", "DEVPATH": "/d", "DEVNAME": "/dev/vfio/7"},
            NodeEvent("add", "/dev/vfio/7"),
        ),
        ({"ACTION": "add", "SUBSYSTEM": "vfio-dev", "DEVPATH": f"{PARENT}/vfio-dev/vfio0"}, None),
        (
            {"ACTION": "change", "SUBSYSTEM": "pci", "DEVPATH": PARENT, "MDEV_STATE": "registered"},
            ParentEvent("grid0", registered=True),
        ),
        (
            {"ACTION": "change", "DEVPATH": PARENT, "MDEV_STATE": "unregistered"},
            ParentEvent("grid0", registered=False),
        ),
        (
            {**ADD, "ACTION": "change", "MVGPU_STATE": "online"},
            MdevEvent("change", U1, "grid0", "online"),
        ),
        (
            {**ADD, "ACTION": "change", "OTHER_VENDOR_STATE": "offline"},
            MdevEvent("change", U1, "grid0", "offline"),
        ),
        ({**ADD, "ACTION": "change", "MVGPU_STATE": "odd"}, MdevEvent("change", U1, "grid0")),
        ({**ADD, "MVGPU_STATE": "online"}, MdevEvent("add", U1, "grid0")),
        ({"ACTION": "change", "SUBSYSTEM": "block", "DEVPATH": "/devices/sda"}, None),
        ({"ACTION": "add", "SUBSYSTEM": "mdev", "DEVPATH": "/devices/virtual/odd"}, None),
        ({}, None),
    ],
)
def test_what_a_uevent_tells(properties: dict[str, str], event: object) -> None:
    assert interpret(properties) == event


@given(
    st.dictionaries(
        st.sampled_from(["ACTION", "SUBSYSTEM", "DEVPATH", "DEVNAME", "MDEV_STATE"]),
        st.text() | st.sampled_from(["mdev", "vfio", "change", "registered"]),
    )
)
def test_no_uevent_is_too_odd(properties: dict[str, str]) -> None:
    interpret(properties)


async def test_events_arrive_in_order_after_a_first_rescan(monitor: FakeMonitor) -> None:
    async with aclosing(events(lambda: monitor)) as stream:
        assert await anext(stream) == Rescan("listening")
        monitor.send(ADD, {"SUBSYSTEM": "block"}, ADD | {"ACTION": "bind"})
        assert await anext(stream) == MdevEvent("add", U1, "grid0")
        assert await anext(stream) == MdevEvent("bind", U1, "grid0")


async def test_lost_events_are_a_rescan(monitor: FakeMonitor) -> None:
    made: list[FakeMonitor] = []

    def make() -> FakeMonitor:
        made.append(monitor)
        return monitor

    async with aclosing(events(make)) as stream:
        await anext(stream)
        monitor.send(OSError(errno.ENOBUFS, "overflow"), ADD)
        assert await anext(stream) == Rescan(f"events were lost: {os.strerror(errno.ENOBUFS)}")
        assert await anext(stream) == MdevEvent("add", U1, "grid0")
    assert len(made) == 2


async def test_a_cancelled_listener_leaves_nothing_behind(monitor: FakeMonitor) -> None:
    async def listen() -> None:
        async with aclosing(events(lambda: monitor)) as stream:
            async for _ in stream:
                pass

    task = asyncio.ensure_future(listen())
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not asyncio.get_running_loop().remove_reader(monitor.fileno())


@pytest.fixture
def heard(monitor: FakeMonitor, monkeypatch: pytest.MonkeyPatch) -> FakeMonitor:
    """What a wait listens to."""
    monkeypatch.setattr("mdev_orchestrator.host.events.udev_monitor", lambda _: monitor)
    return monitor


async def test_a_condition_is_checked_on_every_event(heard: FakeMonitor, machine: Machine) -> None:
    checks = 0

    def third() -> bool:
        nonlocal checks
        checks += 1
        return checks >= 4

    heard.send(ADD, ADD, ADD)
    async with asyncio.timeout(0.9):  # less than the timer
        await wait_until(machine, third)


async def test_a_condition_is_checked_without_events_too(
    heard: FakeMonitor, machine: Machine
) -> None:
    begin = asyncio.get_running_loop().time()
    async with asyncio.timeout(5):
        await wait_until(machine, lambda: asyncio.get_running_loop().time() > begin + 0.1)


# ---- readiness ----


@pytest.fixture
def made(system: FakeSystem) -> FakeSystem:
    system.parent("p")
    system.type("p", "t")
    system.mdev("p", "t", str(U1))
    return system


async def test_a_complete_device_is_ready_at_once(made: FakeSystem, machine: Machine) -> None:
    await wait_ready(machine, U1, 0.01)


def test_what_is_missing_is_named(made: FakeSystem, machine: Machine) -> None:
    device, node = made.bus / str(U1), made.root / "dev/vfio/1"
    node.chmod(0o600)
    other = pwd.getpwuid(65534).pw_name
    lack = missing(machine, U1, other)
    assert lack is not None
    assert lack[0].startswith(f"{other} may not read and write")
    assert "udev rule" in lack[1]
    node.chmod(0o666)
    assert missing(machine, U1, other) is None
    for path, words in (
        (node, "is not there"),
        (device / "iommu_group", "no IOMMU group"),
        (device / "mdev_type", "not linked its type"),
        (made.bus / str(U1), "not on the mdev bus"),
    ):
        path.unlink()
        lack = missing(machine, U1)
        assert lack is not None
        assert words in lack[0]


def test_an_unknown_user(made: FakeSystem) -> None:
    with pytest.raises(HostError, match="there is no user 'no-such-user'"):
        may_open(made.root, "no-such-user")


async def test_a_node_that_never_comes(made: FakeSystem, machine: Machine) -> None:
    (made.root / "dev/vfio/1").unlink()
    with pytest.raises(DeadlineError, match=r"not usable after 0.05 s: .*vfio/1 is not there"):
        await wait_ready(machine, U1, 0.05)


# ---- readiness, where devices have nodes of their own ----


@pytest.fixture
def cdev(system: FakeSystem) -> Path:
    """A device's own node."""
    system.load_iommufd().parent("p")
    system.type("p", "t")
    system.mdev("p", "t", str(U1))
    return system.root / "dev/vfio/devices/vfio1"


async def test_both_nodes_are_waited_for(cdev: Path, machine: Machine) -> None:
    await wait_ready(machine, U1, 0.01)
    cdev.unlink()
    asyncio.get_running_loop().call_later(0.1, cdev.touch)
    await wait_ready(machine, U1, 5)
    assert cdev.exists()


async def test_one_node_is_enough_after_a_while(
    cdev: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readiness, "EVERY_SECONDS", 0.1)
    cdev.unlink()
    await wait_ready(machine, U1, 5)
    await wait_ready(machine, U1, 0.05, choice="container")
    with pytest.raises(DeadlineError, match=r"devices/vfio1 is not there \(.*udevadm trigger"):
        await wait_ready(machine, U1, 0.05, choice="iommufd")
    (machine.root / "dev/vfio/1").unlink()
    with pytest.raises(DeadlineError, match=r"devices/vfio1 is not there"):
        await wait_ready(machine, U1, 0.05)


def test_a_permission_for_one_kind(cdev: Path, machine: Machine) -> None:
    other = pwd.getpwuid(65534).pw_name
    for node in (cdev, machine.root / "dev/vfio/1"):
        node.chmod(0o600)
    lack = missing(machine, U1, other)  # it may not open /dev/iommu either
    assert lack is not None
    assert 'SUBSYSTEM=="vfio"' in lack[1]
    (machine.root / "dev/iommu").chmod(0o666)
    lack = missing(machine, U1, other)
    assert lack is not None
    assert lack[0].startswith(f"{other} may not read and write {cdev}")
    assert 'SUBSYSTEM=="vfio-dev"' in lack[1]
    cdev.chmod(0o666)
    assert missing(machine, U1, other) is not None
    assert missing(machine, U1, other, every=False) is None
    assert missing(machine, U1, other, choice="iommufd") is None


async def test_a_node_that_comes_late(made: FakeSystem, machine: Machine) -> None:
    node = made.root / "dev/vfio/1"
    node.unlink()
    asyncio.get_running_loop().call_later(0.1, node.touch)
    await wait_ready(machine, U1, 5)
