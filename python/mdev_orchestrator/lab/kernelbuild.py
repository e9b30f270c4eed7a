# SPDX-License-Identifier: GPL-2.0-or-later
"""A kernel with checkers, built from Debian's source of a series and cached.

Its series is named like Debian's own kernels with ``-debug`` behind: ``6.12-debug``. It has KASAN,
UBSAN, lockdep, kmemleak and fault injection, and of everything else only what L1 needs
(``kernel-debug.config``), so that two processors build it in a quarter of an hour. What is kept is
as of an unpacked Debian kernel: the image, the modules, and the headers that ``mvgpu`` is built
against. The source and the objects, 3 GB, are kept only until it is built, so that a build that
was interrupted goes on.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

from mdev_orchestrator.errors import HostError, MdoError, UnknownError
from mdev_orchestrator.lab import debian
from mdev_orchestrator.lab.building import run_build
from mdev_orchestrator.lab.debian import DEBUG, Kernel, Progress, locked, run
from mdev_orchestrator.lab.driver import digest
from mdev_orchestrator.state import cache_dir

#: All that is on in it, and what that selects.
CONFIG = Path(__file__).with_name("kernel-debug.config")

#: A module with one fault for each checker, which shows that it is awake.
FAULTS = Path(__file__).with_name("faults")

#: Series that there is a configuration for.
SERIES = (f"6.12{DEBUG}",)

#: Program or pkg-config module: Debian's package that has it.
NEEDED_PROGRAMS = {name: name for name in ("bc", "bison", "flex", "gcc", "make")}
NEEDED_LIBRARIES = {"libelf": "libelf-dev"}

RECORD = "build.json"
"""What was built, beside it: the version of the source, and a digest of the configuration."""
_OPTION = re.compile(r"^(CONFIG_\w+)=(.+)$", re.MULTILINE)


def fetch(series: str = debian.DEFAULT_SERIES, progress: Progress = lambda _: None) -> Kernel:
    """The kernel of a series, whichever kind it is: Debian's own, or one with checkers.

    :raise MdoError: It cannot be had.
    """
    if not series.endswith(DEBUG):
        return debian.fetch_kernel(series, progress)
    if series not in SERIES:
        raise UnknownError(f"there is no kernel {series}", f"with checkers: {', '.join(SERIES)}")
    return build(series, progress)


def build(series: str, progress: Progress = lambda _: None) -> Kernel:
    """Build a kernel with checkers, unless this source and configuration were built before.

    :param series: One of :data:`SERIES`.
    :raise MdoError: The source cannot be had, or does not compile.
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
    """Whether there is a build of this; where apt knows of no version, of what it was."""
    try:
        built = json.loads((place / RECORD).read_text())
    except FileNotFoundError:
        return False
    return built["config"] == config and version in {"", built["version"]}


def version_of(package: str) -> str:
    """Version of a package that apt would take; empty when it knows none."""
    text = run(["apt-cache", "policy", package])
    found = re.search(r"^  Candidate: (\S+)$", text, re.MULTILINE)
    return "" if found is None or found[1] == "(none)" else found[1]


def check_host() -> None:
    """Check that all that a kernel's build wants is there.

    :raise HostError: Names what is not, and the packages that have it.
    """
    missing = [package for name, package in NEEDED_PROGRAMS.items() if not shutil.which(name)]
    missing += [
        package
        for name, package in NEEDED_LIBRARIES.items()
        if subprocess.run(["pkg-config", "--exists", name], check=False).returncode
    ]
    if missing:
        names = " ".join(missing)
        raise HostError(f"building a kernel needs {names}", f"apt-get install {names}")


def _make(package: str, version: str, work: Path, progress: Progress) -> Path:
    """Build in ``work``; a directory there with what there is to keep."""
    check_host()
    if not version:
        raise UnknownError(f"the Debian mirror offers no {package}", "run 'apt-get update'")
    source, objects, root = work / "source", work / "objects", work / "root"
    mark = work / "source.version"
    if not mark.exists() or mark.read_text() != version:
        if work.exists():
            shutil.rmtree(work)
        work.mkdir()
        _unpack(package, version, source, progress)
        mark.write_text(version)
    if root.exists():
        shutil.rmtree(root)
    # Everything below is slow and in nobody's way.
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


def _unpack(package: str, version: str, source: Path, progress: Progress) -> None:
    progress(f"downloading {package} {version}")
    work = source.parent
    run(["apt-get", "download", "-o", "APT::Sandbox::User=", f"{package}={version}"], cwd=work)
    (archive,) = work.glob("*.deb")
    progress(f"unpacking {package}")
    run(["dpkg-deb", "-x", archive, work / "package"])
    archive.unlink()
    run(["nice", "-n", "19", "tar", "-xf", work / f"package/usr/src/{package}.tar.xz"], cwd=work)
    shutil.rmtree(work / "package")
    (work / package).rename(source)


def check_taken(wanted: str, taken: str) -> None:
    """Check that a configuration has all that was asked for.

    Kconfig drops in silence what it does not know and what depends on something that is off; a
    checker that is not there would never report anything.

    :param wanted: Text of the configuration that was asked for.
    :param taken: Text of the one that Kconfig made of it.
    :raise MdoError: Names the options that are missing.
    """
    have = dict(_OPTION.findall(taken))
    missing = [name for name, value in _OPTION.findall(wanted) if have.get(name) != value]
    if missing:
        raise MdoError(f"this kernel does not take {', '.join(missing)} as {CONFIG.name} wants it")


def _compile(make: list[str], log: Path, progress: Progress) -> None:
    jobs = os.cpu_count() or 1
    files = 0

    def how_far(line: bytes) -> str:
        nonlocal files
        files += line.startswith(b"  CC")
        return f"compiling the kernel, {files} files so far"

    progress(f"compiling the kernel with {jobs} jobs, a quarter of an hour or more")
    verbose = [word for word in make if word != "-s"]  # a line a file shows how far it is
    log.unlink(missing_ok=True)
    run_build("the kernel", [*verbose, f"-j{jobs}", "bzImage", "modules"], log, progress, how_far)
