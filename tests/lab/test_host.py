# SPDX-License-Identifier: GPL-2.0-or-later
"""The host layer and its commands on the real kernel, with mvgpu's ``grid0`` and ``igd0``.

Runs inside the lab: ``mdo lab exec python3 -m pytest tests/lab``.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from lab.machine import machine
from mdev_orchestrator.engine.devices import create_devices, remove_devices
from mdev_orchestrator.errors import (
    BusyError,
    CapacityError,
    DeadlineError,
    UnknownError,
    UuidError,
)
from mdev_orchestrator.host import sysfs
from mdev_orchestrator.host.events import (
    MdevEvent,
    NodeEvent,
    Rescan,
    events,
    udev_monitor,
    wait_until,
)
from mdev_orchestrator.host.holders import read_holders
from mdev_orchestrator.host.readiness import missing

pytestmark = pytest.mark.skipif("MDO_LAB" not in os.environ, reason="needs the lab's kernel")

CODE = "from mdev_orchestrator.cli.main import main; raise SystemExit(main())"
GRID = {"11": 16, "12": 16, "13": 8, "14": 8, "15": 4, "16": 4, "17": 2, "18": 1}

HOLDER = """
import array, fcntl, os, sys, time
SET_IOMMU, SET_CONTAINER, GET_DEVICE_FD, TYPE1 = 0x3B66, 0x3B68, 0x3B6A, 1
container = os.open("/dev/vfio/vfio", os.O_RDWR)
group = os.open(sys.argv[1], os.O_RDWR)
fcntl.ioctl(group, SET_CONTAINER, array.array("i", [container]))
fcntl.ioctl(container, SET_IOMMU, TYPE1)
device = fcntl.ioctl(group, GET_DEVICE_FD, sys.argv[2].encode() + b"\\0")
print(device, flush=True)
time.sleep(600)
"""
"""A program that opens a device as QEMU does, and lets go only when it is killed."""


def mdo(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", CODE, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def free(parent: str) -> dict[str, int | None]:
    """Free instances by type, without the driver's prefix."""
    types = next(p.types for p in sysfs.read_host(machine()).parents if p.name == parent)
    return {t.id.removeprefix("mvgpu-"): t.available_instances for t in types}


@asynccontextmanager
async def held(uuid: UUID) -> AsyncIterator[asyncio.subprocess.Process]:
    """A device in the hands of a process that does not let go."""
    node = sysfs.vfio_nodes(machine(), uuid)["container"]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-S", "-c", HOLDER, node, str(uuid)),
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        assert await process.stdout.readline()
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@pytest.fixture(autouse=True)
async def nothing_stays() -> AsyncIterator[None]:
    """Every test starts without devices and leaves the machine as it found it."""
    before = sysfs.read_host(machine())
    assert before.mdevs == ()
    yield
    if left := [mdev.uuid for mdev in sysfs.read_host(machine()).mdevs]:
        await remove_devices(machine(), left)
    assert sysfs.read_host(machine()) == before


async def test_the_seeds_example() -> None:
    assert free("igd0") == {"128M": 8, "256M": 4, "512M": 2}
    large = await create_devices(machine(), "mvgpu-512M")
    assert free("igd0") == {"128M": 4, "256M": 2, "512M": 1}
    small = await create_devices(machine(), "mvgpu-128M")
    assert free("igd0") == {"128M": 3, "256M": 1, "512M": 0}
    await remove_devices(machine(), [mdev.uuid for mdev in (*large, *small)])
    assert free("igd0") == {"128M": 8, "256M": 4, "512M": 2}


async def test_one_instance_of_a_grid_type_takes_the_card_for_it() -> None:
    assert free("grid0") == GRID
    (mdev,) = await create_devices(machine(), "mvgpu-12")
    assert free("grid0") == dict.fromkeys(GRID, 0) | {"12": 15}
    with pytest.raises(
        CapacityError, match=r"no instance of mvgpu-11 is left on grid0.*1 of mvgpu-12"
    ):
        await create_devices(machine(), "mvgpu-11")
    await remove_devices(machine(), [mdev.uuid])
    assert free("grid0") == GRID


async def test_a_type_is_described_by_separate_files_too() -> None:
    types = {t.id: t for p in sysfs.read_host(machine()).parents for t in p.types}
    type_ = types["mvgpu-12"]
    assert type_.damage == ()
    assert type_.description is not None
    assert "num_heads=" in type_.description
    assert type_.attributes


async def test_all_that_fit_at_once_are_usable_on_return() -> None:
    made = await create_devices(machine(), "mvgpu-11", 16)
    assert [missing(machine(), mdev.uuid) for mdev in made] == [None] * 16
    assert {mdev.type_id for mdev in made} == {"mvgpu-11"}
    await remove_devices(machine(), [mdev.uuid for mdev in made])


async def test_a_uuid_exists_once_on_the_machine() -> None:
    (mdev,) = await create_devices(machine(), "mvgpu-128M")
    with pytest.raises(UuidError, match="exists already under parent igd0 as mvgpu-128M"):
        await create_devices(machine(), "mvgpu-12", uuids=[mdev.uuid])
    # past our own check, as in a race: the kernel says so itself
    with pytest.raises(UuidError, match="exists already under parent igd0"):
        await sysfs.create(machine(), "grid0", "mvgpu-12", mdev.uuid)


async def test_the_kernel_has_the_last_word_on_what_fits() -> None:
    await create_devices(machine(), "mvgpu-512M", 2)
    with pytest.raises(CapacityError, match="the driver has no instance left"):
        await sysfs.create(machine(), "igd0", "mvgpu-128M", uuid4())


async def test_a_type_that_is_gone_when_it_is_written() -> None:
    with pytest.raises(UnknownError, match="no such type or parent"):
        await sysfs.create(machine(), "igd0", "mvgpu-64M", uuid4())


async def test_what_a_process_holds_is_refused_and_then_removed() -> None:
    (mdev,) = await create_devices(machine(), "mvgpu-128M")
    async with held(mdev.uuid) as process:
        (holder,) = read_holders(machine(), (mdev,)).of(mdev.uuid)
        assert (holder.pid, holder.guest) == (process.pid, None)
        with pytest.raises(BusyError, match=rf"is held by python.* \(pid {process.pid}\)"):
            await remove_devices(machine(), [mdev.uuid])
    await remove_devices(machine(), [mdev.uuid])


async def test_a_blocked_removal_ends_at_its_deadline_and_the_kernel_ends_it_later() -> None:
    (mdev,) = await create_devices(machine(), "mvgpu-128M")
    async with held(mdev.uuid):
        with pytest.raises(DeadlineError, match="ends the removal by itself"):
            await sysfs.remove(machine(), mdev.uuid, 1.0)
        # only its directory is left, and its instance is still in use
        assert not mdev.path.exists()
        left = sysfs.read_mdev(machine(), mdev.uuid)
        assert left is not None
        assert sysfs.read_host(machine()).mdevs == (left,)
        assert "is being removed" in left.damage[0]
        assert free("igd0")["128M"] == 7
        with pytest.raises(BusyError, match="is held by python"):
            await remove_devices(machine(), [mdev.uuid])
        with pytest.raises(DeadlineError):  # the second writer finds no file to write
            await sysfs.remove(machine(), mdev.uuid, 0.5)
    async with asyncio.timeout(30):
        await wait_until(machine(), lambda: sysfs.read_mdev(machine(), mdev.uuid) is None)


async def test_events_of_a_creation() -> None:
    uuid = uuid4()
    async with asyncio.timeout(60), aclosing(events(lambda: udev_monitor(machine()))) as stream:
        assert isinstance(await anext(stream), Rescan)
        await create_devices(machine(), "mvgpu-128M", uuids=[uuid])
        # udev works on unrelated devices at the same time, so either may come first
        wanted = {
            MdevEvent("add", uuid, "igd0"),
            *(NodeEvent("add", node) for node in sysfs.vfio_nodes(machine(), uuid).values()),
        }
        while wanted:
            wanted.discard(await anext(stream))


def test_the_command_line() -> None:
    done = mdo("create", "mvgpu-12", "-n", "2")
    assert (done.returncode, done.stderr) == (0, "")
    uuids = done.stdout.split()
    shape = json.loads(mdo("host", "--json").stdout)
    assert sorted(uuids) == [mdev["uuid"] for mdev in shape["mdevs"]]
    assert {mdev["type"] for mdev in shape["mdevs"]} == {"mvgpu-12"}
    assert all(Path(mdev["path"]).exists() for mdev in shape["mdevs"])
    done = mdo("remove", *uuids)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_more_than_fit_creates_nothing() -> None:
    done = mdo("create", "mvgpu-12", "-n", "17")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "mdo: 17 of mvgpu-12 do not fit on grid0: 16 would; nothing was created \u2014 -n 16\n"
    )


def test_the_doctor_finds_the_lab_in_good_health() -> None:
    done = mdo("doctor", "--json")
    levels = {finding["level"] for finding in json.loads(done.stdout)["findings"]}
    assert (done.returncode, levels) == (0, {"ok"})
