# SPDX-License-Identifier: GPL-2.0-or-later
"""The same on drivers that are not ours: the three samples of the kernel's own source.

``MDO_LAB_SAMPLES`` names a directory with ``mtty.ko``, ``mdpy.ko`` and ``mbochs.ko``, built for the
kernel that runs. Each counts in its own way: a pool of serial ports, one counter for the whole
parent, a pool of memory.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from lab.machine import machine
from mdev_orchestrator.engine import guest_ops
from mdev_orchestrator.engine.devices import create_devices, remove_devices
from mdev_orchestrator.errors import BusyError, CapacityError, RequestError
from mdev_orchestrator.host import sysfs
from mdev_orchestrator.host.holders import read_holders
from mdev_orchestrator.host.readiness import missing
from mdev_orchestrator.model import Mdev
from mdev_orchestrator.qemu import hotplug
from mdev_orchestrator.qemu.command import GuestMdev, GuestSpec
from mdev_orchestrator.qemu.process import RunningGuest
from mdev_orchestrator.spec.sizes import Size

SAMPLES = os.environ.get("MDO_LAB_SAMPLES")
pytestmark = pytest.mark.skipif(SAMPLES is None, reason="needs MDO_LAB_SAMPLES")

ONE_PORT, TWO_PORTS = "mtty-1", "mtty-2"
CODE = "from mdev_orchestrator.cli.main import main; raise SystemExit(main())"


@pytest.fixture(scope="module", params=["mtty", "mdpy", "mbochs"], autouse=True)
def driver(request: pytest.FixtureRequest) -> Iterator[str]:
    """One of the drivers, loaded."""
    name: str = request.param
    subprocess.run(["insmod", Path(SAMPLES or "") / f"{name}.ko"], check=True)
    yield name
    subprocess.run(["rmmod", name], check=True)


def free(parent: str) -> dict[str, int | None]:
    types = next(p.types for p in sysfs.read_host(machine()).parents if p.name == parent)
    return {type_.id: type_.available_instances for type_ in types}


async def test_what_was_created_comes_back(driver: str) -> None:
    before = sysfs.read_host(machine())
    for type_, count in free(driver).items():
        assert count
        made = await create_devices(machine(), type_, 2)
        assert [(m.parent, m.type_id, missing(machine(), m.uuid)) for m in made] == [
            (driver, type_, None)
        ] * 2
        assert free(driver)[type_] == count - 2
        await remove_devices(machine(), [mdev.uuid for mdev in made])
    assert sysfs.read_host(machine()) == before


async def test_one_type_takes_from_the_others(driver: str) -> None:
    before = free(driver)
    first, *others = before
    (mdev,) = await create_devices(machine(), first)
    after = free(driver)
    assert all((after[type_] or 0) < (before[type_] or 0) for type_ in others)
    await remove_devices(machine(), [mdev.uuid])


async def test_one_more_than_fits_creates_nothing(driver: str) -> None:
    before = sysfs.read_host(machine())
    for type_, count in free(driver).items():
        with pytest.raises(CapacityError, match=rf"{count} would; nothing was created"):
            await create_devices(machine(), type_, (count or 0) + 1)
    assert sysfs.read_host(machine()) == before


async def test_a_driver_without_our_files(driver: str) -> None:
    (mdev,) = await create_devices(machine(), next(iter(free(driver))))
    assert sysfs.read_file(machine(), mdev.uuid, "online") is None
    assert not await sysfs.write_file(machine(), mdev.uuid, "group_uuid", "")
    await remove_devices(machine(), [mdev.uuid])


async def test_host_shows_it_like_any_other(driver: str) -> None:
    before = free(driver)
    first, *_ = before
    (mdev,) = await create_devices(machine(), first)
    done = subprocess.run(
        [sys.executable, "-c", CODE, "host", "--json"], capture_output=True, check=True
    )
    shape: dict[str, Any] = json.loads(done.stdout)
    (parent,) = [one for one in shape["parents"] if one["name"] == driver]
    shown = {t["id"]: t["available_instances"] for t in parent["types"]}
    assert shown == free(driver) != before
    assert {t["device_api"] for t in parent["types"]} == {"vfio-pci"}
    assert str(mdev.uuid) in done.stdout.decode()
    await remove_devices(machine(), [mdev.uuid])


# ---------------------------------------------------------------- up to QEMU


def as_guest_mdev(mdev: Mdev) -> GuestMdev:
    return GuestMdev(mdev.uuid, mdev.path, mdev.device_api or "vfio-pci")


@asynccontextmanager
async def halted_guest(*mdevs: Mdev) -> AsyncIterator[RunningGuest]:
    """A guest whose processor is never started: what is tried is our part, and QEMU's."""
    spec = GuestSpec(
        name="halted",
        uuid=uuid4(),
        memory=Size(64 << 20),
        mdevs=tuple(map(as_guest_mdev, mdevs)),
        extra=("-S",),
    )
    guest = await guest_ops.launch(machine(), spec)
    try:
        yield guest
    finally:
        await guest_ops.end(machine(), guest, deadline=0, force=True)


async def test_guest_gets_one_cold_and_one_hot(driver: str) -> None:
    before = free(driver)
    cold, hot = await create_devices(machine(), next(iter(before)), 2)
    async with halted_guest(cold) as guest:
        assert {one.uuid for one in await hotplug.mdevs_of(guest)} == {cold.uuid}
        assert await guest_ops.attach(machine(), guest, as_guest_mdev(hot)) == "port1"
        plugged = {one.uuid: one.path for one in await hotplug.mdevs_of(guest)}
        assert plugged == {cold.uuid: str(cold.path), hot.uuid: str(hot.path)}
        for mdev in (cold, hot):
            (holder,) = read_holders(machine(), (mdev,)).of(mdev.uuid)
            assert holder.guest == "halted"
        with pytest.raises(BusyError, match="held by guest 'halted'"):
            await remove_devices(machine(), [hot.uuid, cold.uuid])
        with pytest.raises(RequestError, match="already"):
            await guest_ops.attach(machine(), guest, as_guest_mdev(hot))
    await remove_devices(machine(), [cold.uuid, hot.uuid])
    assert free(driver) == before


# ---------------------------------------------------------------- mtty alone


async def test_one_pool_of_24_ports(driver: str) -> None:
    if driver != "mtty":
        pytest.skip("of mtty")
    assert free(driver) == {ONE_PORT: 24, TWO_PORTS: 12}
    (two,) = await create_devices(machine(), TWO_PORTS)
    assert free(driver) == {ONE_PORT: 22, TWO_PORTS: 11}
    (one,) = await create_devices(machine(), ONE_PORT)
    assert free(driver) == {ONE_PORT: 21, TWO_PORTS: 10}
    with pytest.raises(CapacityError, match="11 of mtty-2 do not fit on mtty: 10 would"):
        await create_devices(machine(), TWO_PORTS, 11)
    await remove_devices(machine(), [two.uuid, one.uuid])
    assert free(driver) == {ONE_PORT: 24, TWO_PORTS: 12}
