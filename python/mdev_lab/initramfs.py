# SPDX-License-Identifier: GPL-2.0-or-later
"""The initramfs of L1 and of the L2 guests: busybox, modules, and an init script."""

from __future__ import annotations

import lzma
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from mdev_lab.kernels import Kernel
from mdev_orchestrator.errors import HostError
from mdev_orchestrator.system.children import run


def module_files(kernel: Kernel, names: Sequence[str]) -> list[Path]:
    """Return the files of modules and of all that they depend on, in the order to load them.

    A module that is built into the kernel has no file.
    """
    files: dict[Path, None] = {}
    for name in names:
        text = run(["modprobe", "-d", kernel.root, "-S", kernel.release, "--show-depends", name])
        for line in text.splitlines():
            verb, _, rest = line.partition(" ")
            if verb == "insmod":
                files[Path(rest.strip())] = None
    return list(files)


def build(
    target: Path,
    *,
    init: str,
    kernel: Kernel,
    modules: Sequence[str] = (),
    files: Mapping[str, Path] | None = None,
) -> None:
    """Write an initramfs.

    :param init: Text of ``/init``, a script for busybox.
    :param modules: Names of modules. Their files are put into ``/modules``, uncompressed, and
        ``/modules/order`` lists them in the order to load them.
    :param files: More files, by their path in the initramfs.
    :raise MdoError: A program that is needed is missing or failed.
    """
    busybox = shutil.which("busybox")
    if busybox is None:
        raise HostError("busybox is not installed", "apt-get install busybox-static")
    with tempfile.TemporaryDirectory(dir=target.parent) as name:
        root = Path(name) / "root"
        for directory in ("bin", "dev", "proc", "sys", "tmp", "modules"):
            (root / directory).mkdir(parents=True)
        shutil.copy(busybox, root / "bin/busybox")
        (root / "bin/sh").symlink_to("busybox")
        for path, source in (files or {}).items():
            inside = root / path.lstrip("/")
            inside.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, inside)
        order = []
        for source in module_files(kernel, modules):
            data = source.read_bytes()
            plain = root / "modules" / source.name.removesuffix(".xz")
            plain.write_bytes(lzma.decompress(data) if source.suffix == ".xz" else data)
            order.append(plain.name)
        (root / "modules/order").write_text("".join(f"{entry}\n" for entry in order))
        (root / "init").write_text(init)
        (root / "init").chmod(0o755)
        archive = Path(name) / "archive"
        names = "\n".join(str(path.relative_to(root)) for path in sorted(root.rglob("*")))
        options = ["--create", "--format=newc", "--owner=+0:+0", "--quiet"]
        run(["cpio", *options, "-O", archive], cwd=root, data=names)
        archive.rename(target)
