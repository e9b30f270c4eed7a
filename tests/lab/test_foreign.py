# SPDX-License-Identifier: GPL-2.0-or-later
"""The same on drivers that are not ours: the three samples of the kernel's own source.

``MDO_LAB_SAMPLES`` names a directory with ``mtty.ko``, ``mdpy.ko`` and ``mbochs.ko``, built for the
kernel that runs. Each counts in its own way: a pool of serial ports, one counter for the whole
parent, a pool of memory.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from mdev_orchestrator.engine.devices import create_devices, remove_devices
from mdev_orchestrator.errors import CapacityError
from mdev_orchestrator.host import sysfs
from mdev_orchestrator.host.readiness import missing

SAMPLES = os.environ.get("MDO_LAB_SAMPLES")
pytestmark = pytest.mark.skipif(SAMPLES is None, reason="needs MDO_LAB_SAMPLES")


@pytest.fixture(scope="module", params=["mtty", "mdpy", "mbochs"], autouse=True)
def driver(request: pytest.FixtureRequest) -> Iterator[str]:
    """One of the drivers, loaded."""
    name: str = request.param
    subprocess.run(["insmod", Path(SAMPLES or "") / f"{name}.ko"], check=True)
    yield name
    subprocess.run(["rmmod", name], check=True)


def free(parent: str) -> dict[str, int | None]:
    types = next(p.types for p in sysfs.scan().parents if p.name == parent)
    return {type_.id: type_.available_instances for type_ in types}


async def test_what_was_created_comes_back(driver: str) -> None:
    before = sysfs.scan()
    for type_, count in free(driver).items():
        assert count
        made = await create_devices(type_, 2)
        assert [(m.parent, m.type_id, missing(m.uuid)) for m in made] == [(driver, type_, None)] * 2
        assert free(driver)[type_] == count - 2
        await remove_devices([str(mdev.uuid) for mdev in made])
    assert sysfs.scan() == before


async def test_one_type_takes_from_the_others(driver: str) -> None:
    before = free(driver)
    first, *others = before
    (mdev,) = await create_devices(first)
    after = free(driver)
    assert all((after[type_] or 0) < (before[type_] or 0) for type_ in others)
    await remove_devices([str(mdev.uuid)])


async def test_one_more_than_fits_creates_nothing(driver: str) -> None:
    before = sysfs.scan()
    for type_, count in free(driver).items():
        with pytest.raises(CapacityError, match=rf"{count} would; nothing was created"):
            await create_devices(type_, (count or 0) + 1)
    assert sysfs.scan() == before


async def test_a_driver_without_our_files(driver: str) -> None:
    (mdev,) = await create_devices(next(iter(free(driver))))
    assert sysfs.read_file(mdev.uuid, "online") is None
    assert not await sysfs.write_file(mdev.uuid, "group_uuid", "")
    await remove_devices([str(mdev.uuid)])
