# SPDX-License-Identifier: GPL-2.0-or-later
"""Kernels from the machine's own Debian mirror, unpacked and never installed.

The host would boot an installed kernel the next time. So ``apt-get download``, which needs no root
and knows the mirror, fetches the packages; they are unpacked below the cache directory and used
from there.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mdev_orchestrator.errors import MdoError, UnknownError
from mdev_orchestrator.state import cache_dir
from mdev_orchestrator.system.children import run
from mdev_orchestrator.system.files import locked
from mdev_orchestrator.system.progress import Progress

DEFAULT_SERIES = "6.12"

#: Suffix of the series of a kernel with checkers, see :mod:`.debug_kernel`.
DEBUG = "-debug"

#: Suffix of the series of a kernel with iommufd, see :mod:`.iommufd_kernel`.
IOMMUFD = "-iommufd"


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
        """Whether it has checkers, which make all that it does slow."""
        return self.series.endswith(DEBUG)

    @property
    def base(self) -> str:
        """The series of Debian's kernel that it was made from; its own for Debian's."""
        return self.series.partition("-")[0]

    @property
    def source(self) -> str:
        """Name of Debian's package with the source of its series."""
        return f"linux-source-{self.base}"

    @property
    def image(self) -> Path:
        """The bootable image."""
        return self.root / "boot" / f"vmlinuz-{self.release}"

    @property
    def modules(self) -> Path:
        """Its directory of modules: ``/lib/modules/RELEASE`` of an installed kernel."""
        return self.root / "lib/modules" / self.release

    @property
    def headers(self) -> Path:
        """Its headers: the directory for ``make -C`` when a module is built."""
        return self.root / "usr/src" / f"linux-headers-{self.release}"


def series_of(release: str) -> str:
    """Return the series of a kernel, given its release as ``uname -r`` prints it."""
    version = re.match(r"\d+\.\d+", release)
    base = version[0] if version else release
    return base + DEBUG if release.endswith(DEBUG) else base


def depends(package: str) -> list[str]:
    """Return the names of the packages that a package depends on, without alternatives."""
    text = run(["apt-cache", "depends", "--no-recommends", "--no-suggests", package])
    return re.findall(r"^  Depends: (\S+)$", text, re.MULTILINE)


def resolve(series: str) -> str:
    """Return the release of the newest kernel of a series that the mirror offers.

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


def unpack_source(
    package: str,
    target: Path,
    progress: Progress = lambda _: None,
    *,
    version: str = "",
    paths: Sequence[str] = (),
) -> None:
    """Download a package of kernel source and unpack it.

    :param target: The directory that becomes the root of the source; its parent is used meanwhile.
    :param version: The newest one without it.
    :param paths: What to unpack, by its place in the source; all of it without them.
    :raise MdoError: The mirror does not have it, or the download failed.
    """
    progress(f"downloading {package}{version and ' '}{version}")
    work = target.parent
    wanted = f"{package}={version}" if version else package
    run(["apt-get", "download", "-o", "APT::Sandbox::User=", wanted], cwd=work)
    (archive,) = work.glob("*.deb")
    progress(f"unpacking {package}")
    run(["dpkg-deb", "-x", archive, work / "package"])
    archive.unlink()
    members = [f"{package}/{path}" for path in paths]
    tar = work / f"package/usr/src/{package}.tar.xz"
    run(["nice", "-n", "19", "tar", "-xf", tar, *members], cwd=work)
    shutil.rmtree(work / "package")
    (work / package).rename(target)


def fetch_kernel(series: str = DEFAULT_SERIES, progress: Progress = lambda _: None) -> Kernel:
    """Return Debian's kernel of a series with its modules and headers; fetch it if needed.

    :param series: For instance ``6.12``; the newest release that the mirror has is taken.
    :raise MdoError: The mirror does not have it, or the download failed.
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
        if not (root / "lib").exists():  # packages of a release whose /lib is a link
            (root / "lib").symlink_to("usr/lib")
        # Debian's headers include each other by absolute path; here they are side by side.
        for makefile in root.glob("usr/src/linux-headers-*/Makefile"):
            text = makefile.read_text()
            makefile.write_text(
                text.replace("include /usr/src/", "include $(dir $(lastword $(MAKEFILE_LIST)))../")
            )
        progress("indexing modules")
        run(["depmod", "-b", root, release])
        (root / "release").write_text(release + "\n")
        root.rename(place)
