# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMU for s390x, which alone has vfio-ap and vfio-ccw: our source, our options."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from mdev_orchestrator.qemu_build import builds, source
from mdev_orchestrator.system.files import remove

PROGRAM = "qemu-system-s390x"


def configured(series: str) -> Path:
    """A build directory; it stays beside that of x86, so that the next build is short."""
    builds.build(series, progress=print)
    place = source.place_of(series)
    work, mark = place / "build-s390x", place / "build-s390x/.configured"
    options = (*builds.CONFIGURE, "--target-list=s390x-softmmu")  # the last one counts
    command = (str(place / "source/configure"), f"--python={sys.executable}", *options)
    if not mark.exists() or mark.read_text() != "\n".join(command):
        remove(work)
        work.mkdir()
        run(work, *command)
        mark.write_text("\n".join(command))
    return work


def run(place: Path, *command: str | Path) -> str:
    """Run a command and return what it said."""
    done = subprocess.run(
        command, cwd=place, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    assert not done.returncode, done.stdout[-2000:]
    return done.stdout
