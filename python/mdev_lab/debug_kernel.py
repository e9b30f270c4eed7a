# SPDX-License-Identifier: GPL-2.0-or-later
"""A kernel with checkers, built from Debian's source of a series and cached.

Its series is that of Debian's own kernel with the suffix ``-debug``: ``6.12-debug``. It has KASAN,
UBSAN, lockdep, kmemleak and fault injection, and otherwise only what L1 needs
(``kernel-debug.config``), so that two processors build it in a quarter of an hour. The cache keeps
the same of it as of a Debian kernel: the image, the modules, and the headers for ``mvgpu``. It
keeps the source and the objects, 3 GB, only until the build is complete, so that an interrupted
build goes on.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from mdev_lab import kernels
from mdev_lab.kernel_modules import digest
from mdev_lab.kernels import DEBUG, Kernel
from mdev_orchestrator.errors import HostError, MdoError, UnknownError
from mdev_orchestrator.state import cache_dir
from mdev_orchestrator.system.children import run, run_logged
from mdev_orchestrator.system.files import locked
from mdev_orchestrator.system.packages import missing_packages
from mdev_orchestrator.system.progress import Progress, throttled

#: All options that are on in it; Kconfig adds what they select.
CONFIG = Path(__file__).with_name("kernel-debug.config")

#: A module with one fault for each checker: it shows that the checkers work.
FAULTS = Path(__file__).with_name("faults")

#: Series that the configuration is for.
SERIES = (f"6.12{DEBUG}",)

#: For a program or a module of pkg-config: the Debian package that has it.
NEEDED_PROGRAMS = {name: name for name in ("bc", "bison", "flex", "gcc", "make")} | {
    "pkg-config": "pkgconf"
}
NEEDED_LIBRARIES = {"libelf": "libelf-dev"}

RECORD = "build.json"
"""File with the version of the source that was built, and a digest of the configuration."""
_OPTION = re.compile(r"^(CONFIG_\w+)=(.+)$", re.MULTILINE)


def fetch(series: str = kernels.DEFAULT_SERIES, progress: Progress = lambda _: None) -> Kernel:
    """Return the kernel of a series, Debian's or one with checkers; fetch or build it if needed.

    :raise MdoError: There is none, or it cannot be fetched or built.
    """
    if not series.endswith(DEBUG):
        return kernels.fetch_kernel(series, progress)
    if series not in SERIES:
        raise UnknownError(f"there is no kernel {series}", f"with checkers: {', '.join(SERIES)}")
    return build(series, progress)


def build(series: str, progress: Progress = lambda _: None) -> Kernel:
    """Build a kernel with checkers, unless this source and configuration were built before.

    :param series: One of :data:`SERIES`.
    :raise MdoError: The source cannot be fetched, or does not compile.
    """
    place = cache_dir() / "kernels" / series
    package = Kernel(series, "", place).source
    version, config = version_of(package), digest([CONFIG])
    with locked(place):
        if not _is_current(place, version, config):
            work = place.with_name(f"{series}.build")
            root = _make(package, version, work, progress)
            (root / RECORD).write_text(json.dumps({"version": version, "config": config}) + "\n")
            if place.exists():
                shutil.rmtree(place)
            root.rename(place)
            shutil.rmtree(work)
    return Kernel(series, (place / "release").read_text().strip(), place)


def _is_current(place: Path, version: str, config: str) -> bool:
    """Whether this version and configuration are built; any version if apt knows none."""
    try:
        built = json.loads((place / RECORD).read_text())
    except FileNotFoundError:
        return False
    return built["config"] == config and version in {"", built["version"]}


def version_of(package: str, apt: Sequence[str] = ()) -> str:
    """Return the version of a package that apt would download; empty if it knows none.

    :param apt: Options, see :func:`.kernels.apt_options`.
    """
    text = run(["apt-cache", *apt, "policy", package])
    found = re.search(r"^  Candidate: (\S+)$", text, re.MULTILINE)
    return "" if found is None or found[1] == "(none)" else found[1]


def check_host() -> None:
    """Check that the host has what a kernel's build needs.

    :raise HostError: Names the packages that are missing.
    """
    missing = missing_packages(NEEDED_PROGRAMS, NEEDED_LIBRARIES)
    if missing:
        names = " ".join(missing)
        raise HostError(f"building a kernel needs {names}", f"apt-get install {names}")


def _make(package: str, version: str, work: Path, progress: Progress) -> Path:
    """Build in ``work``; return a directory below it with what the cache keeps."""
    check_host()
    if not version:
        raise UnknownError(f"the Debian mirror offers no {package}", "run 'apt-get update'")
    source, objects, root = work / "source", work / "objects", work / "root"
    mark = work / "source.version"
    if not mark.exists() or mark.read_text() != version:
        if work.exists():
            shutil.rmtree(work)
        work.mkdir()
        kernels.unpack_source(package, source, progress, version=version)
        mark.write_text(version)
    if root.exists():
        shutil.rmtree(root)
    # The rest is slow: at the lowest priority.
    make = ["nice", "-n", "19", "make", "-s", "-C", str(source), f"O={objects}"]
    objects.mkdir(exist_ok=True)
    progress("configuring the kernel")
    run([*make, f"KCONFIG_ALLCONFIG={CONFIG}", "allnoconfig"])
    check_taken(CONFIG.read_text(), (objects / ".config").read_text())
    _compile(make, work / "build.log", progress)
    progress("keeping the image, the modules and the headers")
    release = (objects / "include/config/kernel.release").read_text().strip()
    kernel = Kernel("", release, root)
    kernel.image.parent.mkdir(parents=True)
    shutil.copy(objects / "arch/x86/boot/bzImage", kernel.image)
    run([*make, f"INSTALL_MOD_PATH={root}", "modules_install"])
    install = f"KBUILD_RUN_COMMAND={source}/scripts/package/install-extmod-build {kernel.headers}"
    run([*make, "run-command", install])
    (root / "release").write_text(release + "\n")
    return root


def check_taken(wanted: str, taken: str) -> None:
    """Check that Kconfig has dropped no option.

    It drops silently an option that it does not know or whose dependency is off. A checker that is
    off would never report anything.

    :param wanted: Text of the configuration that Kconfig was given.
    :param taken: Text of the configuration that it wrote.
    :raise MdoError: Names the options that are missing.
    """
    have = dict(_OPTION.findall(taken))
    missing = [name for name, value in _OPTION.findall(wanted) if have.get(name) != value]
    if missing:
        raise MdoError(f"this kernel does not take {', '.join(missing)} as {CONFIG.name} wants it")


def _compile(make: list[str], log: Path, progress: Progress) -> None:
    jobs = os.cpu_count() or 1
    files = 0
    report = throttled(progress)

    def on_line(line: bytes) -> None:
        nonlocal files
        files += line.startswith(b"  CC")
        report(f"compiling the kernel, {files} files so far")

    progress(f"compiling the kernel with {jobs} jobs, a quarter of an hour or more")
    verbose = [word for word in make if word != "-s"]  # one line for each file shows how far it is
    log.unlink(missing_ok=True)
    command = [*verbose, f"-j{jobs}", "bzImage", "modules"]
    run_logged("building the kernel", command, log, speaker="the compiler", on_line=on_line)
