# SPDX-License-Identifier: GPL-2.0-or-later
"""What to do about QEMU's own words. Feature of the text, not of a version: no match, no advice."""

from __future__ import annotations

import re

_REMEDIES: tuple[tuple[str, str], ...] = (
    (
        r"error getting device from group.*(Input/output|Invalid|No space|Cannot allocate)",
        "the vendor driver refused to start the mdev; its reason is in the kernel log: dmesg",
    ),
    (
        r"(/dev/vfio/\d+|group \d+|to iommufd=\d+).*Device or resource busy",
        "another process holds the mdev; mdo guest list shows which guest",
    ),
    (
        r"(/dev/vfio/\d+|/dev/iommu).*Permission denied|Failed to open /dev/vfio/devices/",
        "you may not open the device's node; mdo doctor tells how to allow it",
    ),
    (
        r"/dev/vfio/vfio|failed to open .*vfio.*No such file",
        "VFIO is not there; mdo doctor tells which modules to load",
    ),
    (
        r"no iommu_group found|no such host device|vfio .*sysfsdev.*No such file",
        "the mdev is gone or not ready; see mdo host",
    ),
    (
        r"VFIO_MAP_DMA|vfio_dma_map.*(Cannot allocate|memory)",
        "the guest's memory must be lockable: raise ulimit -l above it",
    ),
    (
        r"(Could not access KVM kernel module|failed to initialize kvm).*",
        "KVM cannot be used here; take --accel auto or tcg",
    ),
    (r"Bus '.*' does not support hotplugging", "start the guest with --hotplug-ports"),
)


def remedy(words: str) -> str:
    """Return what a user can do about an error that QEMU printed or answered; may be empty."""
    return next(
        (advice for pattern, advice in _REMEDIES if re.search(pattern, words, re.IGNORECASE)), ""
    )
