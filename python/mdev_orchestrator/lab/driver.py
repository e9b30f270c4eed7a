# SPDX-License-Identifier: GPL-2.0-or-later
"""mvgpu built for a kernel, and where the sources of the project are."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from pathlib import Path

from mdev_orchestrator.errors import HostError
from mdev_orchestrator.lab.debian import Kernel, Progress, locked, run
from mdev_orchestrator.state import cache_dir


def checkout() -> Path:
    """Root of the project's source tree, which the lab needs.

    :raise HostError: This is an installed package without one.
    """
    root = Path(__file__).resolve().parents[3]
    if not (root / "kernel" / "Kbuild").exists():
        raise HostError("the lab needs the project's source tree", "run it from a checkout")
    return root


def build_module(
    source: Path, name: str, kernel: Kernel, progress: Progress = lambda _: None
) -> Path:
    """``NAME.ko`` from a directory with a ``Kbuild`` file, built once for each kernel and source.

    The build happens on a copy, so that the source tree stays as it is.

    :raise MdoError: It does not compile; with the compiler's last line.
    """
    digest = hashlib.sha256()
    files = sorted(path for path in source.iterdir() if path.suffix in {".c", ".h", ""})
    for path in files:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    place = cache_dir() / "modules" / kernel.release / f"{name}-{digest.hexdigest()[:16]}"
    target = place / f"{name}.ko"
    with locked(place):
        if not target.exists():
            progress(f"building {name} for {kernel.release}")
            with tempfile.TemporaryDirectory(dir=place.parent) as work:
                for path in files:
                    shutil.copy(path, work)
                run(["make", "-s", "-C", kernel.headers, f"M={work}", "modules"])
                place.mkdir(exist_ok=True)
                (Path(work) / f"{name}.ko").rename(target)
    return target
