# SPDX-License-Identifier: GPL-2.0-or-later
"""vfio-ap and vfio-ccw exist for s390x only: here they are compiled, tests/qemu_own runs one."""

from __future__ import annotations

import re

import pytest

from mdev_orchestrator.qemu_build import patches
from qemu_build import s390x

OBJECT = re.compile(
    r"^(lib\S+/hw_vfio_(ap|ccw|mdev|mdev-lifecycle)\.c\.o): c_COMPILER", re.MULTILINE
)


@pytest.mark.parametrize("series", patches.series_known())
def test_ap_and_ccw_compile_without_a_warning(series: str) -> None:
    work = s390x.configured(series)
    objects = dict(OBJECT.findall(s390x.run(work, "ninja", "-t", "targets", "all")))
    assert sorted(objects.values()) == ["ap", "ccw", "mdev", "mdev-lifecycle"]
    for name in objects:
        (work / name).unlink(missing_ok=True)
    assert "warning:" not in s390x.run(work, "ninja", *objects)
    for name, what in objects.items():
        property_is_there = b"mdev-start\0" in (work / name).read_bytes()
        assert property_is_there or what not in ("ap", "ccw"), name
