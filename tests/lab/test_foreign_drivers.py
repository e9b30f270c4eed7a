# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest with devices of a driver that is not ours: mtty, the kernel's sample of serial ports.

Creation and removal on all three samples is in ``test_foreign.py``; here is all that follows, up to
QEMU. The guest's processor is never started: what is tried is ours and QEMU's part.
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

from mdev_orchestrator.engine.devices import create_devices, remove_devices
from mdev_orchestrator.errors import BusyError, CapacityError, RequestError
from mdev_orchestrator.host import sysfs
from mdev_orchestrator.host.holders import holders
from mdev_orchestrator.model import Mdev
from mdev_orchestrator.qemu import hotplug, process
from mdev_orchestrator.qemu.command import GuestMdev, GuestSpec

SAMPLES = os.environ.get("MDO_LAB_SAMPLES")
pytestmark = pytest.mark.skipif(SAMPLES is None, reason="needs MDO_LAB_SAMPLES")

ONE_PORT, TWO_PORTS = "mtty-1", "mtty-2"
CODE = "from mdev_orchestrator.cli.main import main; raise SystemExit(main())"


@pytest.fixture(scope="module", autouse=True)
def driver() -> Iterator[None]:
    subprocess.run(["insmod", Path(SAMPLES or "") / "mtty.ko"], check=True)
    yield
    subprocess.run(["rmmod", "mtty"], check=True)


def free() -> dict[str, int | None]:
    types = next(p.types for p in sysfs.scan().parents if p.name == "mtty")
    return {type_.id: type_.available_instances for type_ in types}


def as_guest_mdev(mdev: Mdev) -> GuestMdev:
    return GuestMdev(mdev.uuid, mdev.path, mdev.device_api or "vfio-pci")


@asynccontextmanager
async def halted_guest(name: str, *mdevs: Mdev) -> AsyncIterator[process.Guest]:
    spec = GuestSpec(
        name=name,
        uuid=uuid4(),
        memory=64 << 20,
        mdevs=tuple(map(as_guest_mdev, mdevs)),
        extra=("-S",),
    )
    guest = await process.start(spec)
    try:
        yield guest
    finally:
        await process.stop(guest, deadline=0, force=True)


async def test_one_pool_of_24_ports() -> None:
    assert free() == {ONE_PORT: 24, TWO_PORTS: 12}
    (two,) = await create_devices(TWO_PORTS)
    assert free() == {ONE_PORT: 22, TWO_PORTS: 11}
    (one,) = await create_devices(ONE_PORT)
    assert free() == {ONE_PORT: 21, TWO_PORTS: 10}
    with pytest.raises(CapacityError, match="11 of mtty-2 do not fit on mtty: 10 would"):
        await create_devices(TWO_PORTS, 11)
    await remove_devices([str(two.uuid), str(one.uuid)])
    assert free() == {ONE_PORT: 24, TWO_PORTS: 12}


async def test_host_shows_it_like_any_other() -> None:
    (mdev,) = await create_devices(TWO_PORTS)
    done = subprocess.run(
        [sys.executable, "-c", CODE, "host", "--json"], capture_output=True, check=True
    )
    shape: dict[str, Any] = json.loads(done.stdout)
    (parent,) = [one for one in shape["parents"] if one["name"] == "mtty"]
    assert {t["id"]: t["available_instances"] for t in parent["types"]} == {
        ONE_PORT: 22,
        TWO_PORTS: 11,
    }
    assert {t["device_api"] for t in parent["types"]} == {"vfio-pci"}
    assert str(mdev.uuid) in done.stdout.decode()
    await remove_devices([str(mdev.uuid)])


async def test_guest_gets_one_cold_and_one_hot() -> None:
    cold, hot = await create_devices(ONE_PORT, 2)
    async with halted_guest("serial", cold) as guest:
        assert {one.uuid for one in await hotplug.mdevs_of(guest)} == {cold.uuid}
        assert await hotplug.attach("serial", as_guest_mdev(hot)) == "port1"
        plugged = {one.uuid: one.path for one in await hotplug.mdevs_of(guest)}
        assert plugged == {cold.uuid: str(cold.path), hot.uuid: str(hot.path)}
        for mdev in (cold, hot):
            (holder,) = holders((mdev,)).of(mdev.uuid)
            assert holder.guest == "serial"
        with pytest.raises(BusyError, match="held by guest 'serial'"):
            await remove_devices([str(hot.uuid), str(cold.uuid)])
        with pytest.raises(RequestError, match="already"):
            await hotplug.attach("serial", as_guest_mdev(hot))
    await remove_devices([str(cold.uuid), str(hot.uuid)])
    assert free() == {ONE_PORT: 24, TWO_PORTS: 12}
