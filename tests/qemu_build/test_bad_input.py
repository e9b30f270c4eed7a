# SPDX-License-Identifier: GPL-2.0-or-later
"""What the patched QEMU says about mdevs that this machine cannot have: with a /sys of our own."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import time
from pathlib import Path
from uuid import uuid4

import pytest

from mdev_orchestrator.lab import qemubuild

#: In a mount namespace of its own, a directory in place of /sys.
WITH_SYS = ("unshare", "--map-root-user", "--mount", "sh", "-c")
MOUNT = 'mount --bind "$1" /sys && shift && exec "$@"'


class FakeMdev:
    """A /sys with one mediated device, as far as QEMU looks before it opens one."""

    def __init__(self, root: Path, api: str) -> None:
        self.root = root
        self.uuid = str(uuid4())
        parent = root / "devices/virtual/vendor/parent0"
        self.directory = parent / self.uuid
        kind = parent / "mdev_supported_types/vendor-1"
        kind.mkdir(parents=True)
        (kind / "device_api").write_text(f"{api}\n")
        self.directory.mkdir()
        (self.directory / "mdev_type").symlink_to("../mdev_supported_types/vendor-1")
        (self.directory / "subsystem").symlink_to("/sys/bus/mdev")
        devices = root / "bus/mdev/devices"
        devices.mkdir(parents=True)
        (devices / self.uuid).symlink_to(f"../../../devices/virtual/vendor/parent0/{self.uuid}")

    def start(self, built: qemubuild.Build, **options: str) -> subprocess.Popen[str]:
        """Start a QEMU with the device; what it says is in ``stderr``."""
        device = {"sysfsdev": f"/sys/bus/mdev/devices/{self.uuid}", **options}
        words = ",".join(f"{name}={value}" for name, value in device.items())
        machine = ("-machine", "q35,accel=tcg", "-nodefaults", "-display", "none", "-S")
        qemu = (built.binary, "-L", built.firmware, *machine, "-device", f"vfio-pci,{words}")
        return subprocess.Popen(
            [*WITH_SYS, MOUNT, "sh", self.root, *qemu],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )


@pytest.fixture(params=qemubuild.series_known())
def built(request: pytest.FixtureRequest) -> qemubuild.Build:
    return qemubuild.build(request.param, progress=print)


@pytest.mark.parametrize("api", ["vfio-ap", "vfio-ccw", "vfio-platform"])
def test_an_mdev_of_another_api(built: qemubuild.Build, tmp_path: Path, api: str) -> None:
    mdev = FakeMdev(tmp_path, api)
    _, said = mdev.start(built).communicate(timeout=30)
    assert said.endswith(
        f": vfio {mdev.uuid}: its device API is '{api}', not 'vfio-pci': this QEMU has no {api}\n"
    )
    assert said.count("\n") == 1


def test_a_slow_start_says_what_it_waits_for(built: qemubuild.Build, tmp_path: Path) -> None:
    mdev = FakeMdev(tmp_path, "vfio-pci")
    online = mdev.directory / "online"
    os.mkfifo(online)  # whoever writes to it waits until somebody reads
    with mdev.start(built) as qemu:
        try:
            answer(online, "0\n")
            begin = time.monotonic()
            assert qemu.stderr
            said = qemu.stderr.readline()
            assert said.endswith(
                "warning: still waiting after 5 s for the mdev driver to take '1' in "
                f"/sys/devices/virtual/vendor/parent0/{mdev.uuid}/online\n"
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
