# SPDX-License-Identifier: GPL-2.0-or-later
"""Configures and compiles a patched QEMU, and finds what was built before."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shutil
import sys
import sysconfig
from dataclasses import asdict, dataclass
from pathlib import Path

from mdev_orchestrator.errors import HostError
from mdev_orchestrator.qemu_build.patches import NEW_FILES, patches, project_files, sync
from mdev_orchestrator.qemu_build.source import place_of, prepare_source
from mdev_orchestrator.system.children import run_logged
from mdev_orchestrator.system.files import locked, remove
from mdev_orchestrator.system.packages import missing_packages
from mdev_orchestrator.system.progress import Progress, throttled

DEFAULT_SERIES = "10.0"
PROGRAM = "qemu-system-x86_64"

#: Only what a guest with mdevs needs; a warning is an error. Part of the digest.
CONFIGURE = (
    "--target-list=x86_64-softmmu",
    "--without-default-features",
    "--enable-kvm",
    "--enable-tcg",
    "--enable-pixman",
    "--enable-werror",
    "--disable-debug-info",
    "--disable-docs",
    "--disable-download",
    "--disable-install-blobs",
)

#: For a program, a module of pkg-config or a directory: the Debian package that has it.
NEEDED_PROGRAMS = {
    "dpkg-source": "dpkg-dev",
    "gcc": "gcc",
    "ninja": "ninja-build",
    "patch": "patch",
    "pkg-config": "pkgconf",
}
NEEDED_LIBRARIES = {"glib-2.0": "libglib2.0-dev", "pixman-1": "libpixman-1-dev"}
FIRMWARE = {
    "/usr/share/seabios": "seabios",
    "/usr/share/qemu": "qemu-system-data",
}
NEEDED_FIRMWARE = ("bios-256k.bin", "linuxboot_dma.bin")
MESON = (1, 5)
"""The least version that configures QEMU."""

_STEP = re.compile(rb"^\[(\d+)/(\d+)\] ")


@dataclass(frozen=True, slots=True)
class Build:
    """A QEMU that was built from our tree.

    :ivar version: Of the source: Debian's, or what its file VERSION says.
    :ivar digest: Of our patches and files that went into it.
    :ivar firmware: Directory for ``-L`` (``firmware`` of a guest).
    """

    series: str
    version: str
    digest: str
    binary: Path
    firmware: Path


def digest(series: str) -> str:
    """Return 16 hexadecimal digits that change with our patches and files, and the options."""
    total = hashlib.sha256(" ".join(CONFIGURE).encode())
    for path in [*patches(series), *(project_files() / name for name in NEW_FILES)]:
        total.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest()[:16]


def find(series: str = DEFAULT_SERIES) -> Build | None:
    """Return the build of a series that is in the cache, current or not."""
    try:
        record = json.loads((place_of(series) / "build.json").read_text())
        found = Build(
            series=record["series"],
            version=record["version"],
            digest=record["digest"],
            binary=Path(record["binary"]),
            firmware=Path(record["firmware"]),
        )
    except (OSError, ValueError, KeyError):
        return None
    return found if found.binary.exists() else None


def build(
    series: str = DEFAULT_SERIES,
    *,
    source: Path | None = None,
    jobs: int = 0,
    progress: Progress = lambda _: None,
) -> Build:
    """Build a series, or what has changed since the last time; return at once if nothing has.

    :param source: A source tree to take instead of Debian's; it is copied and stays as it is.
    :param jobs: Compilers at a time; 0 for one a processor.
    :raise MdoError: Something does not fit or does not compile.
    """
    place = place_of(series)
    ours = digest(series)
    with locked(place):
        done = find(series)
        if done and done.digest == ours and source is None:
            return done
        check_host()
        place.mkdir(parents=True, exist_ok=True)
        version = prepare_source(series, place, source, progress)
        changed = sync(series, place)
        if changed:
            progress(f"{changed} files of ours have changed")
        return make(place, series, version, ours, jobs, progress)


def make(place: Path, series: str, version: str, ours: str, jobs: int, progress: Progress) -> Build:
    """Configure and compile ``place/source``, and record the build for :func:`find`.

    :param series: Name of the build, and of its directory in the cache.
    :param ours: Digest to record.
    :raise MdoError: It does not compile.
    """
    configure(place, progress)
    compile_program(place, jobs or os.cpu_count() or 1, progress)
    firmware = link_firmware(place)
    binary = place / "bin" / PROGRAM
    binary.parent.mkdir(exist_ok=True)
    shutil.copy2(place / "build" / PROGRAM, binary.with_suffix(".new"))
    binary.with_suffix(".new").replace(binary)
    done = Build(series, version, ours, binary, firmware)
    (place / "build.json").write_text(json.dumps(asdict(done), default=str) + "\n")
    return done


def check_host() -> None:
    """Check that the host has what QEMU's build needs.

    :raise HostError: Names what is missing, and the packages that have it.
    """
    missing = missing_packages(NEEDED_PROGRAMS, NEEDED_LIBRARIES)
    missing += [package for path, package in FIRMWARE.items() if not Path(path).is_dir()]
    if missing:
        raise HostError(
            f"building QEMU needs {', '.join(missing)}", f"apt-get install {' '.join(missing)}"
        )
    version = _meson_version()
    if version < MESON:
        found = f", which has {'.'.join(map(str, version))}" if version else ""
        raise HostError(
            f"building QEMU needs meson 1.5 or newer beside {sys.executable}{found}", _meson_hint()
        )


def _meson_version() -> tuple[int, ...]:
    """Version of the meson that this Python has; empty without one."""
    if not importlib.util.find_spec("mesonbuild"):
        return ()
    coredata = importlib.import_module("mesonbuild.coredata")
    return tuple(int(part) for part in re.findall(r"\d+", coredata.version)[:2])


def _meson_hint() -> str:
    pip = "'meson>=1.5'"
    managed = Path(sysconfig.get_path("stdlib"), "EXTERNALLY-MANAGED").exists()
    if managed and sys.prefix == sys.base_prefix:  # pip refuses to install there
        return (
            "apt-get install meson where that is 1.5 or newer, as on Debian 13; elsewhere install "
            f"mdo by pipx, and then: pipx inject mdev-orchestrator {pip}"
        )
    return f"{sys.executable} -m pip install {pip}"


def configure(place: Path, progress: Progress) -> None:
    """Run QEMU's configure, unless it ran with the same options before.

    :raise MdoError: It failed; quotes it.
    """
    work = place / "build"
    mark = work / ".configured"
    command = [str(place / "source/configure"), f"--python={sys.executable}", *CONFIGURE]
    if mark.exists() and mark.read_text() == "\n".join(command):
        return
    remove(work)
    work.mkdir()
    progress("configuring")
    log = place / "build.log"
    log.unlink(missing_ok=True)
    run_logged("building QEMU", command, log, speaker="configure", cwd=work)
    mark.write_text("\n".join(command))


def compile_program(place: Path, jobs: int, progress: Progress) -> None:
    """Run ninja, and report how far it is.

    :raise MdoError: It does not compile; quotes the compiler.
    """
    progress(f"compiling with {jobs} jobs")
    report = throttled(progress)

    def on_line(line: bytes) -> None:
        if step := _STEP.match(line):
            report(f"compiling, step {int(step[1])} of {int(step[2])}")

    command = ["ninja", "-C", str(place / "build"), "-j", str(jobs), PROGRAM]
    log = place / "build.log"
    run_logged("building QEMU", command, log, speaker="the compiler", on_line=on_line)


def link_firmware(place: Path) -> Path:
    """Link the firmware of Debian's packages into one directory, for ``-L``.

    :raise HostError: A file that every guest needs is missing.
    """
    target = place / "firmware"
    target.mkdir(exist_ok=True)
    for directory in map(Path, FIRMWARE):
        for path in directory.iterdir():
            link = target / path.name
            if not link.is_symlink():
                link.symlink_to(path)
    for name in NEEDED_FIRMWARE:
        if not (target / name).exists():
            packages = " ".join(FIRMWARE.values())
            raise HostError(f"QEMU's firmware {name} is not there", f"apt-get install {packages}")
    return target
