# SPDX-License-Identifier: GPL-2.0-or-later
"""The patched QEMUs: built from nothing if the cache has none, else only what has changed."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from mdev_orchestrator.qemu import features
from mdev_orchestrator.qemu_build import builds, patches


@pytest.fixture(scope="module", params=patches.series_known())
def built(request: pytest.FixtureRequest) -> builds.Build:
    return builds.build(request.param, progress=print)


def test_it_is_current(built: builds.Build) -> None:
    assert built.version.startswith(f"{built.series}.")
    assert built.digest == builds.digest(built.series)
    said = subprocess.run([built.binary, "--version"], stdout=subprocess.PIPE, check=True)
    assert f"version {built.series}." in said.stdout.decode()


def test_what_has_not_changed_is_not_built_again(built: builds.Build) -> None:
    before = built.binary.stat()
    assert builds.build(built.series) == built
    assert built.binary.stat() == before


async def test_it_starts_groups(built: builds.Build) -> None:
    assert features.START in await features.properties(str(built.binary), "vfio-pci")


def test_it_finds_its_firmware(built: builds.Build) -> None:
    names = {path.name for path in Path(built.firmware).iterdir()}
    assert {"bios-256k.bin", "linuxboot_dma.bin"} <= names
