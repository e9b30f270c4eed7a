# SPDX-License-Identifier: GPL-2.0-or-later
"""Reads the framebuffer of an mdev as the next user of it would: through VFIO, without a QEMU.

The numbers and structures are those of linux/vfio.h; ``_IO(';', 100 + n)`` is ``0x3b64 + n``.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
from collections.abc import Iterator

from mdev_orchestrator.host import sysfs
from mdev_orchestrator.lab import l2
from mdev_orchestrator.model import Mdev

SET_IOMMU = 0x3B66
GROUP_SET_CONTAINER = 0x3B68
GROUP_GET_DEVICE_FD = 0x3B6A
DEVICE_GET_REGION_INFO = 0x3B6C
TYPE1_IOMMU = 1
REGION_INFO = struct.Struct("=IIIIQQ")  # argsz, flags, index, cap_offset, size, offset


@contextlib.contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[int]:
    """A descriptor for the length of the block."""
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def read(mdev: Mdev, length: int) -> bytes:
    """The first ``length`` bytes of an mdev's framebuffer; the mdev must not be in use."""
    node = sysfs.vfio_node(mdev.uuid)
    assert node is not None, f"mdev {mdev.uuid} has no node"
    with opened("/dev/vfio/vfio") as container, opened(node) as group:
        fcntl.ioctl(group, GROUP_SET_CONTAINER, struct.pack("i", container))
        fcntl.ioctl(container, SET_IOMMU, TYPE1_IOMMU)
        name = bytearray(f"{mdev.uuid}\0".encode())  # mutable, or ioctl() returns it and no number
        device = fcntl.ioctl(group, GROUP_GET_DEVICE_FD, name)
        try:
            bar = l2.constants()["MVGPU_BAR_FB"]
            info = bytearray(REGION_INFO.pack(REGION_INFO.size, 0, bar, 0, 0, 0))
            fcntl.ioctl(device, DEVICE_GET_REGION_INFO, info)
            _, _, _, _, size, offset = REGION_INFO.unpack(info)
            assert length <= size, f"only {size} bytes of the framebuffer can be seen"
            return os.pread(device, length, offset)
        finally:
            os.close(device)
