# SPDX-License-Identifier: GPL-2.0-or-later
"""Kernels from the machine's own Debian mirror, unpacked and never installed.

An installed kernel would be the host's next boot. So packages are downloaded by ``apt-get
download`` (which needs no root and knows the mirror), unpacked below the cache directory, and used
from there.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mdev_orchestrator.errors import HostError, MdoError, UnknownError
from mdev_orchestrator.state import cache_dir

Progress = Callable[[str], None]

DEFAULT_SERIES = "6.12"

#: What the name of a series ends in when its kernel has checkers, see :mod:`.kernelbuild`.
DEBUG = "-debug"

#: What the first interesting line of a failed program looks like.
CAUSE = re.compile(r"\berror\b|not found|^E: ", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Kernel:
    """One unpacked kernel.

    :ivar release: As ``uname -r`` says it.
    :ivar root: Directory that its packages were unpacked into.
    """

    series: str
    release: str
    root: Path

    @property
    def checked(self) -> bool:
        """Whether it has checkers; everything takes its time then."""
        return self.series.endswith(DEBUG)

    @property
    def base(self) -> str:
        """Its series without the mark of one with checkers."""
        return self.series.removesuffix(DEBUG)

    @property
    def source(self) -> str:
        """Debian's package with the source of its series."""
        return f"linux-source-{self.base}"

    @property
    def image(self) -> Path:
        """The bootable image."""
        return self.root / "boot" / f"vmlinuz-{self.release}"

    @property
    def modules(self) -> Path:
        """The directory that ``/lib/modules/RELEASE`` would be."""
        return self.root / "lib/modules" / self.release

    @property
    def headers(self) -> Path:
        """What ``make -C`` takes to build a module against."""
        return self.root / "usr/src" / f"linux-headers-{self.release}"


def series_of(release: str) -> str:
    """The series that a kernel is of, by what ``uname -r`` says in it."""
    version = re.match(r"\d+\.\d+", release)
    base = version[0] if version else release
    return base + DEBUG if release.endswith(DEBUG) else base


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Only one process at a time makes ``path``; the others wait and then find it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(path.name + ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def run(argv: Sequence[str | Path], *, cwd: Path | None = None) -> str:
    """Run a program to its end and return what it printed.

    :raise HostError: It is not installed.
    :raise MdoError: It failed; with the first line that looks like the cause, or else the last.
    """
    path = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"  # depmod, for one, is there
    try:
        done = subprocess.run(
            argv,
            cwd=cwd,
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PATH": path, "LC_ALL": "C.UTF-8"},
        )
    except FileNotFoundError as error:
        raise HostError(f"{argv[0]} is not installed", "run 'make setup'") from error
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()
        causes = [line for line in lines if CAUSE.search(line)]
        raise MdoError(f"{' '.join(map(str, argv))} failed: {(causes or lines[-1:])[0]}")
    return done.stdout


def depends(package: str) -> list[str]:
    """Names of the packages that a package depends on, without alternatives."""
    text = run(["apt-cache", "depends", "--no-recommends", "--no-suggests", package])
    return re.findall(r"^  Depends: (\S+)$", text, re.MULTILINE)


def resolve(series: str) -> str:
    """Release of the newest kernel of a series that the mirror offers.

    :raise UnknownError: It offers none.
    """
    if not re.fullmatch(r"\d+\.\d+", series):
        raise UnknownError(f"'{series}' is not a kernel series", "write it like 6.12")
    for meta in (f"linux-image-{series}-amd64", "linux-image-amd64"):
        with contextlib.suppress(MdoError):
            for name in depends(meta):
                if re.fullmatch(rf"linux-image-{re.escape(series)}[.-].*-amd64", name):
                    return name.removeprefix("linux-image-")
    raise UnknownError(
        f"the Debian mirror offers no kernel {series}", "run 'apt-get update', or name another"
    )


def fetch_kernel(series: str = DEFAULT_SERIES, progress: Progress = lambda _: None) -> Kernel:
    """The kernel of a series with its modules and headers, from the cache when it is there.

    :param series: For instance ``6.12``; the newest release that the mirror has is taken.
    :raise MdoError: It cannot be had.
    """
    place = cache_dir() / "kernels" / series
    with locked(place):
        if not (place / "release").exists():
            release = resolve(series)
            progress(f"downloading kernel {release}")
            _unpack_kernel(series, release, place, progress)
    return Kernel(series, (place / "release").read_text().strip(), place)


def _unpack_kernel(series: str, release: str, place: Path, progress: Progress) -> None:
    headers = f"linux-headers-{release}"
    packages = [f"linux-image-{release}", headers]
    packages += [name for name in depends(headers) if name.startswith(("linux-h", "linux-kbuild"))]
    if place.exists():
        shutil.rmtree(place)
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=f"{series}.") as name:
        work = Path(name)
        root = work / "root"
        root.mkdir()
        run(["apt-get", "download", "-o", "APT::Sandbox::User=", *packages], cwd=work)
        for package in sorted(work.glob("*.deb")):
            progress(f"unpacking {package.name.partition('_')[0]}")
            run(["dpkg-deb", "-x", package, root])
        # Debian's headers name each other by absolute path; here they stand side by side.
        for makefile in root.glob("usr/src/linux-headers-*/Makefile"):
            text = makefile.read_text()
            makefile.write_text(
                text.replace("include /usr/src/", "include $(dir $(lastword $(MAKEFILE_LIST)))../")
            )
        progress("indexing modules")
        run(["depmod", "-b", root, release])
        (root / "release").write_text(release + "\n")
        root.rename(place)
