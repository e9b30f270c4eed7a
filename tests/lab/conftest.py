# SPDX-License-Identifier: GPL-2.0-or-later
"""What the driver's own tests share; those of the host layer need none of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest

from lab import vfio


@pytest.fixture
def kernel_log() -> Iterator[vfio.KernelLog]:
    """The kernel's log from the beginning of the test; nothing in it may be a complaint."""
    log, watch = vfio.KernelLog(), vfio.KernelLog()
    yield log
    complaints = [line for line in watch.lines() if vfio.COMPLAINT.search(line)]
    log.close()
    watch.close()
    assert complaints == []


@pytest.fixture
def make(kernel_log: vfio.KernelLog) -> Iterator[Callable[..., list[str]]]:
    """Makes mdevs, in a start group if one is given; what is left of them goes at the end.

    Whatever the test did, every link is free again then.
    """
    made: list[str] = []

    def factory(count: int = 1, group: str = "", *, type_: str = "128M") -> list[str]:
        parent = "igd0" if type_.endswith("M") else "grid0"
        new = [vfio.create(parent, type_) for _ in range(count)]
        made.extend(new)
        if group:
            for uuid in new:
                vfio.put(uuid, "group_uuid", group)
        return new

    before = vfio.links("igd0"), vfio.links("grid0")
    yield factory
    for uuid in made:
        with contextlib.suppress(FileNotFoundError):
            vfio.remove(uuid)
    assert (vfio.links("igd0"), vfio.links("grid0")) == before
