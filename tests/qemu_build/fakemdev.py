# SPDX-License-Identifier: GPL-2.0-or-later
"""A /sys with one mediated device, as far as QEMU looks before it opens one."""

from __future__ import annotations

import subprocess
from pathlib import Path
from uuid import uuid4

#: In a mount namespace of its own, a directory in place of /sys.
WITH_SYS = ("unshare", "--map-root-user", "--mount", "sh", "-c")
MOUNT = 'mount --bind "$0" /sys && exec "$@"'


class FakeMdev:
    """The device, its type and its parent, in a directory that takes the place of /sys."""

    def __init__(self, root: Path, api: str, parent: str = "parent0") -> None:
        self.root = root
        self.uuid = str(uuid4())
        self.path = f"/sys/devices/virtual/vendor/{parent}/{self.uuid}"
        self.directory = root / f"devices/virtual/vendor/{parent}/{self.uuid}"
        kind = self.directory.parent / "mdev_supported_types/vendor-1"
        kind.mkdir(parents=True)
        (kind / "device_api").write_text(f"{api}\n")
        self.directory.mkdir()
        (self.directory / "mdev_type").symlink_to("../mdev_supported_types/vendor-1")
        (self.directory / "subsystem").symlink_to("/sys/bus/mdev")
        devices = root / "bus/mdev/devices"
        devices.mkdir(parents=True)
        (devices / self.uuid).symlink_to(self.path)

    def start(self, *qemu: str | Path, device: str = "vfio-pci") -> subprocess.Popen[str]:
        """Start a halted QEMU with the device; what it says is in ``stderr``.

        :param qemu: Program and options, with the machine.
        :param device: Driver, and what it needs beside the path.
        """
        halted = ("-nodefaults", "-display", "none", "-S", "-trace", "vfio_mdev_write")
        options = ("-device", f"{device},sysfsdev=/sys/bus/mdev/devices/{self.uuid}")
        return subprocess.Popen(
            [*WITH_SYS, MOUNT, self.root, *qemu, *halted, *options],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
