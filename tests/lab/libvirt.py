# SPDX-License-Identifier: GPL-2.0-or-later
"""libvirt in the lab: its daemon, and ``virsh``. ``tools/setup`` installs them."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mdev_lab import libvirtd

SECONDS = 120


def virsh(*arguments: object) -> str:
    """Run virsh; what it printed."""
    done = subprocess.run(
        ["virsh", "--connect", "qemu:///system", "--quiet", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def name_of(address: str) -> str:
    """What libvirt calls a PCI function."""
    return "pci_" + address.replace(":", "_").replace(".", "_")


@contextmanager
def running(place: Path) -> Iterator[None]:
    """``libvirtd`` while the block lasts.

    :param place: For what it prints.
    """
    daemon = libvirtd.start(place)
    try:
        yield
    finally:
        daemon.terminate()
        daemon.wait(SECONDS)
