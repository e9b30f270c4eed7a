# SPDX-License-Identifier: GPL-2.0-or-later
"""Debian's kernel with iommufd: its VFIO modules, built once more with what Debian leaves out.

Debian's kernels have neither ``/dev/iommu`` nor ``/dev/vfio/devices/vfioN``. Both are in modules
only, so the kernel's image stays as it is: the modules of VFIO and mdev and ``iommufd`` are built
from Debian's source of the same version. All of VFIO's are built together, because
``struct vfio_device`` has more members then.

The cache keeps a directory as that of an unpacked kernel, with the series ``6.12-iommufd``. The
image in it and the other modules are the stock kernel's. The headers are a copy: the options are
added to their configuration, and ``Module.symvers`` has the symbols of the new modules, so that
``mvgpu`` is built for them as for any kernel.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from mdev_lab.debug_kernel import version_of
from mdev_lab.kernel_modules import digest, kbuild
from mdev_lab.kernels import IOMMUFD, Kernel, apt_options, fetch_kernel, unpack_source
from mdev_orchestrator.errors import MdoError, UnknownError
from mdev_orchestrator.state import cache_dir
from mdev_orchestrator.system.children import run
from mdev_orchestrator.system.files import locked
from mdev_orchestrator.system.progress import Progress

#: Series of Debian's kernels that this is for.
SERIES = ("6.12", "7.3")

#: What is added to the kernel's configuration.
OPTIONS = {
    "CONFIG_IOMMUFD": "m",
    "CONFIG_VFIO_DEVICE_CDEV": "y",
    "CONFIG_INTERVAL_TREE_SPAN_ITER": "y",
}

#: What is built, by its place in the kernel's source.
DIRECTORIES = ("drivers/iommu/iommufd", "drivers/vfio")

#: What else is needed of the source: an internal header, and functions that the stock kernel, which
#: has no user of them, was built without.
FILES = ("drivers/iommu/iommu-priv.h", "lib/interval_tree.c")

SPANS = re.compile(
    r"^#ifdef CONFIG_INTERVAL_TREE_SPAN_ITER\n(.*?)^#endif\n", re.MULTILINE | re.DOTALL
)
SPANS_HEAD = """\
// SPDX-License-Identifier: GPL-2.0
#include <linux/export.h>
#include <linux/interval_tree.h>
"""
SPANS_BUILD = "iommufd-y += interval_tree_spans.o\n"

RECORD = "build.json"
"""File with the stock kernel's release and a digest of what is built and how."""


def build(series: str, progress: Progress = lambda _: None) -> Kernel:
    """Return the kernel of a series with iommufd; build it if needed.

    :param series: One of :data:`SERIES`.
    :raise MdoError: The stock kernel or its source cannot be fetched, or does not compile.
    """
    if series not in SERIES:
        raise UnknownError(
            f"there is no kernel {series} with iommufd", f"there is one of {', '.join(SERIES)}"
        )
    stock = fetch_kernel(series, progress)
    place = cache_dir() / "kernels" / f"{series}{IOMMUFD}"
    inputs = json.dumps([OPTIONS, DIRECTORIES, FILES, SPANS_HEAD, SPANS_BUILD])
    record = {"release": stock.release, "inputs": digest([], inputs)}
    with locked(place):
        if not _is_current(place, record):
            with tempfile.TemporaryDirectory(dir=place.parent, prefix=f"{place.name}.") as name:
                root = _make(stock, Path(name), progress)
                (root / RECORD).write_text(json.dumps(record) + "\n")
                if place.exists():
                    shutil.rmtree(place)
                root.rename(place)
    return Kernel(place.name, stock.release, place)


def _is_current(place: Path, record: dict[str, str]) -> bool:
    try:
        built = json.loads((place / RECORD).read_text())
    except FileNotFoundError:
        return False
    return bool(built == record)


def _make(stock: Kernel, work: Path, progress: Progress) -> Path:
    """Build in ``work``; return a directory below it with what the cache keeps."""
    root = work / "root"
    kernel = Kernel(f"{stock.series}{IOMMUFD}", stock.release, root)
    _copy(stock, kernel)
    source = work / "source"
    apt = apt_options(stock.series)
    unpack_source(
        stock.source,
        source,
        progress,
        version=_version(stock, apt),
        paths=(*DIRECTORIES, *FILES),
        apt=apt,
    )
    _prepare(source)
    progress(f"building iommufd and VFIO for {stock.release}")
    run(["nice", "-n", "19", *kbuild(kernel, source)])
    updates = kernel.modules / "updates"
    updates.mkdir()
    for module in source.rglob("*.ko"):
        run(["strip", "--strip-debug", module])
        module.rename(updates / module.name)
    symbols = kernel.headers / "Module.symvers"
    symbols.write_text(merged(symbols.read_text(), (source / "Module.symvers").read_text()))
    run(["depmod", "-b", root, kernel.release])
    return root


def _version(stock: Kernel, apt: Sequence[str]) -> str:
    """The version of the source that the stock kernel was built from.

    :raise UnknownError: The mirror has another one.
    """
    version = version_of(stock.source, apt)
    upstream = re.match(r"[\d.]+", stock.release)
    if not version:
        raise UnknownError(f"the Debian mirror offers no {stock.source}", "run 'apt-get update'")
    if upstream is None or not version.startswith(f"{upstream[0]}-"):
        raise UnknownError(
            f"the Debian mirror has {stock.source} {version}, and the kernel is {stock.release}",
            f"delete {stock.root}, so that the kernel is fetched again",
        )
    return version


def _copy(stock: Kernel, kernel: Kernel) -> None:
    """Make the kernel's directory, with the stock kernel's image, modules and headers."""
    kernel.modules.parent.mkdir(parents=True)
    kernel.headers.parent.mkdir(parents=True)
    (kernel.root / "boot").symlink_to(stock.root / "boot")
    (kernel.root / "release").write_text(kernel.release + "\n")
    run(["cp", "-a", "--link", stock.modules, kernel.modules])
    for path in kernel.modules.glob("modules.*"):
        path.unlink()  # depmod writes some of them in place, into the stock kernel's
        shutil.copy(stock.modules / path.name, path)
    run(["cp", "-a", "--reflink=auto", stock.headers, kernel.headers])
    (kernel.headers / "vmlinux").unlink(missing_ok=True)
    for name in ("usr/src", "usr/lib"):
        (kernel.root / name).mkdir(exist_ok=True)
        for path in (stock.root / name).iterdir():
            if not (kernel.root / name / path.name).exists():
                (kernel.root / name / path.name).symlink_to(path)
    with (kernel.headers / "include/config/auto.conf").open("a") as file:
        file.writelines(f"{name}={value}\n" for name, value in OPTIONS.items())
    with (kernel.headers / "include/generated/autoconf.h").open("a") as file:
        file.writelines(
            f"#define {name}{'_MODULE' * (value == 'm')} 1\n" for name, value in OPTIONS.items()
        )


def _prepare(source: Path) -> None:
    """Make the unpacked part of the source a directory that kbuild takes."""
    (source / "Kbuild").write_text(f"obj-m := {' '.join(f'{name}/' for name in DIRECTORIES)}\n")
    text = (source / "lib/interval_tree.c").read_text()
    spans = SPANS.search(text)
    if spans is None:
        raise MdoError("lib/interval_tree.c of the kernel's source has no span iterator")
    iommufd = source / DIRECTORIES[0]
    (iommufd / "interval_tree_spans.c").write_text(SPANS_HEAD + spans[1])
    with (iommufd / "Makefile").open("a") as file:
        file.write(SPANS_BUILD)


def merged(stock: str, built: str) -> str:
    """Return a ``Module.symvers`` with the symbols of modules that were built again replaced.

    :param stock: Text of the stock kernel's.
    :param built: Text of that which kbuild wrote for the new modules.
    """
    names = {line.split("\t")[1] for line in built.splitlines()}
    kept = [line for line in stock.splitlines() if line.split("\t")[1] not in names]
    return "".join(f"{line}\n" for line in (*kept, *built.splitlines()))
