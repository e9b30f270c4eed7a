# SPDX-License-Identifier: GPL-2.0-or-later
"""libvirt in the lab: its daemon, and ``virsh``. ``tools/setup`` installs them."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
    # it wants the user of its Debian package, also where it uses another
    for file, line in (("passwd", "64055:64055::/:/bin/false"), ("group", "64055:")):
        if "libvirt-qemu" not in (path := Path("/etc", file)).read_text():
            path.write_text(f"{path.read_text()}libvirt-qemu:x:{line}\n")
    said = place / "libvirtd.log"
    with said.open("wb") as log:
        daemon = subprocess.Popen(["/usr/sbin/libvirtd", "--timeout", "0"], stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + SECONDS
        while subprocess.run(["virsh", "version"], check=False, capture_output=True).returncode:
            assert daemon.poll() is None, said.read_text()
            assert time.monotonic() < deadline, said.read_text()
            time.sleep(0.2)
        yield
    finally:
        daemon.terminate()
        daemon.wait(SECONDS)
