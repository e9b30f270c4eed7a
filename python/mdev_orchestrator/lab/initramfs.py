# SPDX-License-Identifier: GPL-2.0-or-later
"""What a kernel finds first: busybox, the modules it needs, and an init script.

The same few lines serve L1 and the L2 guests.
"""

from __future__ import annotations

import lzma
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from mdev_orchestrator.errors import HostError, MdoError
from mdev_orchestrator.lab.debian import Kernel, run


def module_files(kernel: Kernel, names: Sequence[str]) -> list[Path]:
    """Files of the named modules and of all they depend on, in the order to load them.

    What the kernel has built in needs no file.
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
    :param modules: Names of modules; their files stand in ``/modules``, uncompressed, and
        ``/modules/order`` lists them in the order to load them.
    :param files: More files, by their path inside.
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
        with archive.open("wb") as out:
            _pack(root, out.fileno())
        archive.rename(target)


def _pack(root: Path, out: int) -> None:
    names = "\n".join(str(path.relative_to(root)) for path in sorted(root.rglob("*")))
    done = subprocess.run(
        ["cpio", "--create", "--format=newc", "--owner=+0:+0", "--quiet"],
        cwd=root,
        input=names.encode(),
        stdout=out,
        stderr=subprocess.PIPE,
        check=False,
    )
    if done.returncode:
        raise MdoError(f"cpio failed: {done.stderr.decode(errors='replace').strip()}")
