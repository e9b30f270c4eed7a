# SPDX-License-Identifier: GPL-2.0-or-later
"""The kernel's own sample drivers (``samples/vfio-mdev``), for tests with drivers not ours.

``python -m mdev_lab.sample_drivers [SERIES…]`` fetches and builds them on the host. A lab that is
brought up afterwards has their directory in ``MDO_LAB_SAMPLES``. Debian builds none of them, but
ships their source in ``linux-source-SERIES``: 140 MB, of which 100 KB are kept.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from mdev_lab import debug_kernel, kernel_modules
from mdev_lab.kernels import DEFAULT_SERIES, Kernel, apt_options, unpack_source
from mdev_orchestrator.errors import MdoError
from mdev_orchestrator.state import cache_dir
from mdev_orchestrator.system.files import locked
from mdev_orchestrator.system.progress import Progress

#: A pool of serial ports, one counter for the whole parent, and a pool of memory.
NAMES = ("mtty", "mdpy", "mbochs")

#: Their directory in the kernel's source.
PLACE = Path("samples/vfio-mdev")


def build(kernel: Kernel, progress: Progress = lambda _: None) -> Path:
    """Fetch and build the drivers once for a kernel; return the directory of the modules.

    :raise MdoError: The source cannot be fetched, or does not compile.
    """
    modules = kernel_modules.build_modules(_source(kernel, progress), kernel, progress)
    link = _link(kernel)
    with locked(link):
        link.unlink(missing_ok=True)
        link.symlink_to(modules)
    return modules


def built(kernel: Kernel) -> Path | None:
    """Return the directory of the modules if they were built before."""
    return _link(kernel).resolve() if _link(kernel).exists() else None


def _link(kernel: Kernel) -> Path:
    return cache_dir() / "samples" / kernel.series / kernel.release


def _source(kernel: Kernel, progress: Progress) -> Path:
    place = cache_dir() / "samples" / kernel.series / PLACE.name
    with locked(place):
        if not place.exists():
            with tempfile.TemporaryDirectory(dir=place.parent) as name:
                _unpack(kernel, Path(name), progress).rename(place)
    return place


def _unpack(kernel: Kernel, work: Path, progress: Progress) -> Path:
    """Download a kernel's source; return a kbuild directory with the three drivers."""
    target, apt = work / "source", apt_options(kernel.base)
    unpack_source(kernel.source, target, progress, paths=(str(PLACE),), apt=apt)
    source = target / PLACE
    (source / "Makefile").unlink()  # it asks for the kernel's own configuration
    (source / "Kbuild").write_text(f"obj-m := {' '.join(f'{name}.o' for name in NAMES)}\n")
    return source


def main() -> int:
    """Build for each series on the command line, or for the default one."""
    try:
        for series in sys.argv[1:] or [DEFAULT_SERIES]:
            kernel = debug_kernel.fetch(series, _say)
            sys.stdout.write(f"{build(kernel, _say)}\n")
    except MdoError as error:
        _say(str(error))
        return error.exit_code
    return 0


def _say(line: str) -> None:
    sys.stderr.write(f"samples: {line}\n")


if __name__ == "__main__":
    sys.exit(main())
