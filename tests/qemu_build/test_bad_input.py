# SPDX-License-Identifier: GPL-2.0-or-later
"""What the patched QEMU says about mdevs that this machine cannot have: with a /sys of our own."""

from __future__ import annotations

import errno
import os
import signal
import time
from pathlib import Path

import pytest

from mdev_orchestrator.qemu_build import builds, patches
from qemu_build.fakemdev import FakeMdev

Machine = tuple[str | Path, ...]


@pytest.fixture(params=patches.series_known())
def machine(request: pytest.FixtureRequest) -> Machine:
    """Program and options of a patched QEMU."""
    built = builds.build(request.param, progress=print)
    return built.binary, "-L", built.firmware, "-machine", "q35,accel=tcg"


@pytest.mark.parametrize("api", ["vfio-ap", "vfio-ccw", "vfio-platform"])
def test_an_mdev_of_another_api(machine: Machine, tmp_path: Path, api: str) -> None:
    mdev = FakeMdev(tmp_path, api)
    _, said = mdev.start(*machine).communicate(timeout=30)
    assert said.endswith(
        f": vfio {mdev.uuid}: its device API is '{api}', not 'vfio-pci': this QEMU has no {api}\n"
    )
    assert said.count("\n") == 1


def test_a_slow_start_says_what_it_waits_for(machine: Machine, tmp_path: Path) -> None:
    mdev = FakeMdev(tmp_path, "vfio-pci")
    online = mdev.directory / "online"
    os.mkfifo(online)  # a write blocks until there is a reader
    with mdev.start(*machine) as qemu:
        try:
            answer(online, "0\n")
            begin = time.monotonic()
            assert qemu.stderr
            said = qemu.stderr.readline()
            assert said.endswith(
                "warning: still waiting after 5 s for the mdev driver to take '1' in "
                f"{mdev.path}/online\n"
            )
            assert 4.9 < time.monotonic() - begin < 8
            qemu.terminate()
            assert qemu.wait(2) == -signal.SIGTERM
        finally:
            qemu.kill()


def answer(fifo: Path, text: str) -> None:
    """Give a text to the next reader."""
    end = time.monotonic() + 10
    while True:
        try:
            file = os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
        except OSError as error:  # there is no reader yet
            if error.errno != errno.ENXIO or time.monotonic() > end:
                raise
            time.sleep(0.01)
            continue
        os.write(file, text.encode())
        os.close(file)
        return
