# SPDX-License-Identifier: GPL-2.0-or-later
"""What is said of a QEMU that starts groups, and of one that does not."""

from __future__ import annotations

from pathlib import Path
from uuid import uuid4

import pytest

from mdev_orchestrator.model import Mdev
from mdev_orchestrator.qemu.doctor import examine, judge_start

SCRIPT = """#!/bin/sh
case "$*" in
-version) echo QEMU emulator version 10.0.13;;
*vfio-pci,help) printf '  sysfsdev=<str>\\n  {}=<enum>\\n';;
*) echo 'name "vfio-pci", bus PCI';;
esac
"""


def mdev(parent: str, *, online: bool | None = False) -> Mdev:
    uuid = uuid4()
    return Mdev(uuid, f"/sys/bus/mdev/devices/{uuid}", parent, "t", online=online)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mdev-start", "it has mdev-start: it starts groups by itself"),
        ("mdev", "it has no mdev-start, and no device here needs it"),
    ],
)
async def test_a_binary_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, words: str
) -> None:
    monkeypatch.setenv("MDO_CACHE_DIR", str(tmp_path / "cache"))
    qemu = tmp_path / "qemu"
    qemu.write_text(SCRIPT.format(name))
    qemu.chmod(0o755)
    *_, last = await examine(str(qemu))
    assert (last.level, last.message) == ("ok", words)


def test_devices_that_qemu_would_have_to_start_are_counted_by_parent() -> None:
    mdevs = [mdev("igd1"), mdev("igd0", online=True), mdev("igd1"), mdev("mtty", online=None)]
    found = judge_start(starts=False, mdevs=mdevs)
    assert found.level == "warning"
    assert "the devices of igd0 (1), igd1 (2) come online only for guests that mdo" in found.message
    assert found.remedy == "mdo qemu build makes one that has it"
    found = judge_start(starts=True, mdevs=mdevs)
    assert (found.level, found.remedy) == ("ok", "")
    assert found.message.endswith("here those of the devices of igd0 (1), igd1 (2)")


def test_a_driver_that_tells_nothing_needs_nothing() -> None:
    found = judge_start(starts=False, mdevs=[mdev("mtty", online=None)])
    assert (found.level, found.remedy) == ("ok", "")
