# SPDX-License-Identifier: GPL-2.0-or-later
"""Kernel modules built for a kernel, and where the sources of the project are."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Iterable
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


def build_modules(source: Path, kernel: Kernel, progress: Progress = lambda _: None) -> Path:
    """Directory with the modules of a kbuild directory, built once for each kernel and source.

    The build happens on a copy, so that the source tree stays as it is.

    :raise MdoError: It does not compile; with the compiler's last line.
    """
    files = sorted(path for path in source.iterdir() if path.suffix in {".c", ".h", ""})
    place = cache_dir() / "modules" / f"{source.name}-{kernel.release}-{digest(files)}"
    with locked(place):
        if not place.exists():
            progress(f"building {source.name}/ for {kernel.release}")
            with tempfile.TemporaryDirectory(dir=place.parent) as name:
                work, done = Path(name) / "work", Path(name) / "done"
                work.mkdir()
                done.mkdir()
                for path in files:
                    shutil.copy(path, work)
                run(kbuild(kernel, work))
                for module in work.glob("*.ko"):
                    run(["strip", "--strip-debug", module])
                    module.rename(done / module.name)
                done.rename(place)
    return place


def kbuild(kernel: Kernel, directory: Path, *variables: str) -> list[str]:
    """The command that builds a directory's modules; without BTF, which would need pahole."""
    command = ["make", "-s", "-C", str(kernel.headers), f"M={directory}"]
    return [*command, "CONFIG_DEBUG_INFO_BTF_MODULES=", *variables, "modules"]


def digest(files: Iterable[Path], *more: str) -> str:
    """Sixteen hexadecimal digits that change with the names and contents of some files."""
    total = hashlib.sha256("\0".join(more).encode())
    for path in files:
        total.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest()[:16]
