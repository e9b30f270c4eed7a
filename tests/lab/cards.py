# SPDX-License-Identifier: GPL-2.0-or-later
"""The PCI functions that mvgpu can take as parents.

Every lab has them, and ``driver_override`` keeps mvgpu from them until a test asks.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lab import vfio
from mdev_lab.l1 import functions

GRID, IGD, SECOND_GRID, SECOND_IGD = functions()
PCI = Path("/sys/bus/pci")
DRIVER = PCI / "drivers/mvgpu"


def bound(function: str) -> bool:
    return (DRIVER / function).exists()


def bind(function: str) -> None:
    """Let mvgpu have a function."""
    vfio.poke(PCI / "devices" / function / "driver_override", "\n")
    if not bound(function):
        vfio.poke(PCI / "drivers_probe", function)
    assert bound(function)


def unbind(function: str) -> subprocess.Popen[bytes]:
    """Unbind a function; the kernel may make the process that does it wait."""
    process = subprocess.Popen(
        ["tee", DRIVER / "unbind"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    assert process.stdin is not None
    process.stdin.write(function.encode())
    process.stdin.close()
    return process


@contextmanager
def claimed(*names: str) -> Iterator[None]:
    """mvgpu has these functions while the block lasts."""
    before = [name for name in names if bound(name)]
    for name in names:
        bind(name)
    try:
        yield
    finally:
        for name in (name for name in names if name not in before):
            if bound(name):
                assert unbind(name).wait(30) == 0
            if (PCI / "devices" / name).exists():
                vfio.poke(PCI / "devices" / name / "driver_override", "none\n")
