# SPDX-License-Identifier: GPL-2.0-or-later
"""vfio-ccw in a QEMU for s390x, with a /sys of our own: what happens up to the open, which fails.

vfio-ap cannot be tried so: its bus exists only where the processor has the instructions for it.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from mdev_orchestrator.qemu_build import patches, source
from qemu_build import s390x
from qemu_build.fakemdev import FakeMdev

SUBCHANNEL = "0.0.0313"
DEVICE = "vfio-ccw,devno=fe.0.0001"


@pytest.fixture(scope="module", params=patches.series_known())
def machine(request: pytest.FixtureRequest) -> tuple[str | Path, ...]:
    """Program and options of a patched QEMU for s390x."""
    work = s390x.configured(request.param)
    s390x.run(work, "ninja", s390x.PROGRAM)
    firmware = source.place_of(request.param) / "firmware"
    return work / s390x.PROGRAM, "-L", firmware, "-machine", "s390-ccw-virtio,accel=tcg"


def fake(root: Path, api: str) -> FakeMdev:
    """An mdev of a subchannel with one channel path."""
    mdev = FakeMdev(root, api, SUBCHANNEL)
    for name, text in {
        f"bus/css/devices/{SUBCHANNEL}/pimpampom": "80 80 80\n",
        f"bus/css/devices/{SUBCHANNEL}/chpids": "00 00 00 00 00 00 00 00\n",
        "devices/css0/chp0.00/type": "1b\n",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (mdev.directory / "online").write_text("0\n")
    return mdev


def test_it_is_started_before_the_open_and_stopped_when_that_fails(
    machine: tuple[str | Path, ...], tmp_path: Path
) -> None:
    mdev = fake(tmp_path, "vfio-ccw")
    _, said = mdev.start(*machine, device=DEVICE).communicate(timeout=60)
    started, stopped, failed, _ = said.splitlines()
    assert f"{mdev.path}/online '1' ret 0" in started
    assert f"{mdev.path}/online '0' ret 0" in stopped
    assert "no iommu_group found" in failed
    assert (mdev.directory / "online").read_text()[0] == "0"


def test_another_api(machine: tuple[str | Path, ...], tmp_path: Path) -> None:
    mdev = fake(tmp_path, "vfio-pci")
    _, said = mdev.start(*machine, device=DEVICE).communicate(timeout=60)
    assert said.endswith(
        f": vfio {mdev.uuid}: its device API is 'vfio-pci', not 'vfio-ccw': use -device vfio-pci\n"
    )
    assert (mdev.directory / "online").read_text() == "0\n"
