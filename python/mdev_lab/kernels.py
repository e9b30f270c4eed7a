# SPDX-License-Identifier: GPL-2.0-or-later
"""Kernels from the machine's own Debian mirror, unpacked and never installed.

The host would boot an installed kernel the next time. So ``apt-get download``, which needs no root
and knows the mirror, fetches the packages; they are unpacked below the cache directory and used
from there. Series of the release's backports are found with lists of their own, whether the machine
uses backports or not.
"""

from __future__ import annotations

import platform
import re
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mdev_orchestrator.errors import UnknownError
from mdev_orchestrator.state import cache_dir
from mdev_orchestrator.system.apt import private_apt
from mdev_orchestrator.system.children import run
from mdev_orchestrator.system.files import locked
from mdev_orchestrator.system.progress import Progress

DEFAULT_SERIES = "6.12"

#: For each Debian release that the project is tried on, its series of kernels, and what follows the
#: release's name in the name of the suite that has them.
RELEASES = {
    "bookworm": {"6.12": "", "6.1": ""},
    "trixie": {"6.12": "", "7.3": "-backports"},
}

#: The package of an image: no ``cloud`` or ``rt``, unsigned one, or debug symbols.
_IMAGE = re.compile(
    r"linux-image-(?P<release>(?P<series>\d+\.\d+)\.[\d.]+(-[\d.]+)?(\+[a-z\d.]+)?-amd64)"
)

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


def codename() -> str:
    """Return the codename of this machine's Debian; empty on another system."""
    try:
        words = platform.freedesktop_os_release()
    except OSError:
        return ""
    return words.get("VERSION_CODENAME", "") if words["ID"] == "debian" else ""


def lacks(series: str) -> str | None:
    """Return why this machine's release has no kernel of a series; ``None`` if it has or may have.

    The release decides, and not what its mirror answers: a mirror may be broken.

    :param series: With or without the suffix of a kernel with checkers, or with iommufd.
    """
    known = RELEASES.get(codename())
    if known is None or series.removesuffix(DEBUG).removesuffix(IOMMUFD) in known:
        return None
    return f"Debian {platform.freedesktop_os_release()['VERSION_ID']} has no kernel {series}"


def apt_options(series: str) -> list[str]:
    """Return options with which apt sees a series' packages: none where the machine's own does."""
    suffix = RELEASES.get(codename(), {}).get(series.removesuffix(DEBUG))
    if not suffix:
        return []
    place = cache_dir() / "kernels" / "apt"
    with locked(place):
        apt = private_apt(place, "deb", [codename() + suffix])
        run(["apt-get", "-q", *apt, "update"])
    return apt


def depends(package: str, apt: Sequence[str] = ()) -> list[str]:
    """Return the names of the packages that a package depends on, without alternatives.

    :param apt: Options, see :func:`apt_options`.
    """
    ask = ["apt-cache", *apt, "depends", "--no-recommends", "--no-suggests", package]
    return re.findall(r"^  Depends: (\S+)$", run(ask), re.MULTILINE)


def download(packages: Sequence[str], directory: Path, apt: Sequence[str] = ()) -> None:
    """Download packages into a directory.

    :param apt: Options, see :func:`apt_options`.
    :raise MdoError: The mirror does not have them, or the download failed.
    """
    run(["apt-get", *apt, "download", "-o", "APT::Sandbox::User=", *packages], cwd=directory)


def resolve(series: str, apt: Sequence[str] = ()) -> str:
    """Return the release of the newest kernel of a series that the mirror offers.

    :param apt: Options, see :func:`apt_options`.
    :raise UnknownError: It offers none.
    """
    if not re.fullmatch(r"\d+\.\d+", series):
        raise UnknownError(f"'{series}' is not a kernel series", "write it like 6.12")
    names = run(["apt-cache", *apt, "pkgnames", "linux-image-"]).split()
    found = [match for name in names if (match := _IMAGE.fullmatch(name))]
    releases = [match["release"] for match in found if match["series"] == series]
    if not releases:
        offered = sorted({match["series"] for match in found}, key=_numbers)
        hint = f"--kernel {' or '.join(offered)}" if offered else "run 'apt-get update'"
        raise UnknownError(lacks(series) or f"the Debian mirror offers no kernel {series}", hint)
    return max(releases, key=_numbers)


def _numbers(text: str) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", text)]


def unpack_source(
    package: str,
    target: Path,
    progress: Progress = lambda _: None,
    *,
    version: str = "",
    paths: Sequence[str] = (),
    apt: Sequence[str] = (),
) -> None:
    """Download a package of kernel source and unpack it.

    :param target: The directory that becomes the root of the source; its parent is used meanwhile.
    :param version: The newest one without it.
    :param paths: What to unpack, by its place in the source; all of it without them.
    :param apt: Options, see :func:`apt_options`.
    :raise MdoError: The mirror does not have it, or the download failed.
    """
    progress(f"downloading {package}{version and ' '}{version}")
    work = target.parent
    wanted = f"{package}={version}" if version else package
    download([wanted], work, apt)
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
            apt = apt_options(series)
            release = resolve(series, apt)
            progress(f"downloading kernel {release}")
            _unpack_kernel(series, release, place, apt, progress)
    return Kernel(series, (place / "release").read_text().strip(), place)


def _unpack_kernel(
    series: str, release: str, place: Path, apt: Sequence[str], progress: Progress
) -> None:
    image, headers = f"linux-image-{release}", f"linux-headers-{release}"
    # from 6.19 on the image's package is empty, and depends on these
    parts = tuple(f"linux-{part}-{release}" for part in ("binary", "modules", "base"))
    packages = [image, *(name for name in depends(image, apt) if name in parts), headers]
    packages += [
        name for name in depends(headers, apt) if name.startswith(("linux-h", "linux-kbuild"))
    ]
    if place.exists():
        shutil.rmtree(place)
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=f"{series}.") as name:
        work = Path(name)
        root = work / "root"
        root.mkdir()
        download(packages, work, apt)
        for package in sorted(work.glob("*.deb")):
            progress(f"unpacking {package.name.partition('_')[0]}")
            run(["dpkg-deb", "-x", package, root])
        if not (root / "lib").exists():  # packages of a release whose /lib is a link
            (root / "lib").symlink_to("usr/lib")
        bootable = Kernel(series, release, root).image
        if not bootable.exists():  # from 6.19 on it is beside the modules
            bootable.parent.mkdir(exist_ok=True)
            bootable.symlink_to(f"../lib/modules/{release}/vmlinuz")
        # Debian's headers name each other by absolute path; here they are side by side.
        beside = "$(dir $(realpath $(lastword $(MAKEFILE_LIST))))../"
        for makefile in root.glob("usr/src/linux-headers-*/Makefile"):
            text = makefile.read_text().replace("include /usr/src/", f"include {beside}")
            makefile.write_text(text.replace("=/usr/src/", f":={beside}"))
        progress("indexing modules")
        run(["depmod", "-b", root, release])
        (root / "release").write_text(release + "\n")
        root.rename(place)
