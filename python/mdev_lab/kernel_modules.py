# SPDX-License-Identifier: GPL-2.0-or-later
"""Kernel modules, built for a kernel and cached."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from mdev_lab.kernels import Kernel
from mdev_orchestrator.state import cache_dir
from mdev_orchestrator.system.children import run
from mdev_orchestrator.system.files import locked
from mdev_orchestrator.system.progress import Progress


def build_modules(source: Path, kernel: Kernel, progress: Progress = lambda _: None) -> Path:
    """Build a kbuild directory once for each kernel and source; return the modules' directory.

    The build runs on a copy, so that the source tree stays as it is. Two kernels of one release may
    export other symbols, see :mod:`.iommufd_kernel`.

    :raise MdoError: It does not compile; quotes the compiler.
    """
    files = sorted(path for path in source.iterdir() if path.suffix in {".c", ".h", ""})
    inputs = digest([*files, kernel.headers / "Module.symvers"])
    place = cache_dir() / "modules" / f"{source.name}-{kernel.release}-{inputs}"
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
    """Return the command that builds a directory's modules, without BTF, which needs pahole."""
    command = ["make", "-s", "-C", str(kernel.headers), f"M={directory}"]
    return [*command, "CONFIG_DEBUG_INFO_BTF_MODULES=", *variables, "modules"]


def digest(files: Iterable[Path], *more: str) -> str:
    """Return 16 hexadecimal digits that change with the files' names and contents.

    :param more: Texts that they change with, too.
    """
    total = hashlib.sha256("\0".join(more).encode())
    for path in files:
        total.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest()[:16]
