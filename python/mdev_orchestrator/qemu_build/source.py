# SPDX-License-Identifier: GPL-2.0-or-later
"""The source that is patched: Debian's newest of a series, or a tree that the user names.

Debian's comes from the machine's own mirror. The mirror's suites need not be the machine's: apt is
given lists and sources of its own, below the cache, and those of the host stay as they are.
"""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path

from mdev_orchestrator.errors import HostError, MdoError, UnknownError
from mdev_orchestrator.qemu_build.patches import sync
from mdev_orchestrator.state import cache_dir
from mdev_orchestrator.system.apt import private_apt
from mdev_orchestrator.system.children import run
from mdev_orchestrator.system.files import remove
from mdev_orchestrator.system.progress import Progress

#: Debian suites that a series is looked for in.
SUITES = ("trixie", "sid")

_VERSION = re.compile(r"^Version: (?:\d+:)?((\d+\.\d+)\S*)$", re.MULTILINE)


def place_of(series: str) -> Path:
    """Return the directory of a series in the cache."""
    return cache_dir() / "qemu" / series


def prepare_source(series: str, place: Path, given: Path | None, progress: Progress) -> str:
    """Make ``place/source`` a patched tree of the series, and return its version.

    A tree that exists stays, unless ``given`` is not where it came from. It is replaced only by a
    tree that our patches fit.

    :param given: A source tree that the user named; Debian's source if ``None``.
    :raise MdoError: There is no such source, or our patches do not fit it.
    """
    mark = place / "source.json"
    origin = str(given.absolute()) if given else "debian"
    if mark.exists():
        record = json.loads(mark.read_text())
        if given is None or record["origin"] == origin:
            return str(record["version"])
    with tempfile.TemporaryDirectory(dir=place) as name:
        work = Path(name)
        if given:
            version = tree_version(given, series)
            progress(f"copying QEMU {version} from {given}")
            run(["cp", "-a", "--reflink=auto", given, work / "source"])
        else:
            version = fetch_source(series, work, work / "source", progress)
        progress("patching")
        sync(series, work)
        mark.unlink(missing_ok=True)
        for part in ("source", "pristine", "build"):
            remove(place / part)
        for part in ("source", "pristine"):
            (work / part).rename(place / part)
    mark.write_text(json.dumps({"origin": origin, "version": version}) + "\n")
    return version


def tree_version(tree: Path, series: str) -> str:
    """Return the version of a source tree.

    :raise UnknownError: It is not QEMU's, or is of another series.
    """
    try:
        version = (tree / "VERSION").read_text().strip()
    except OSError:
        version = ""
    if not (tree / "hw/vfio").is_dir() or not version:
        raise UnknownError(f"{tree} is no source tree of QEMU", "name the directory with VERSION")
    if not f"{version}.".startswith(f"{series}."):
        raise UnknownError(f"{tree} is QEMU {version}, not {series}", "see mdo qemu build --series")
    return version


def fetch_source(series: str, work: Path, tree: Path, progress: Progress) -> str:
    """Unpack Debian's newest source package of a series into ``tree``; return its version.

    :param work: Directory for the download.
    :raise UnknownError: The mirror has none.
    :raise MdoError: The download failed.
    """
    try:
        apt = private_apt(place_of("apt"), "deb-src", SUITES)
    except HostError as error:
        raise HostError(error.message, "name a source tree with --source") from error
    progress("reading the mirror's lists of source packages")
    run(["apt-get", "-q", *apt, "update"])
    text = run(["apt-cache", *apt, "showsrc", "qemu"])
    # a listed version may be gone from the mirror: then an older one is tried
    failure: MdoError | None = None
    for version in versions(text, series):
        progress(f"downloading QEMU {version}")
        try:
            package = f"qemu={full_version(text, version)}"
            run(["apt-get", "-q", *apt, "source", "--download-only", package], cwd=work)
        except MdoError as error:
            failure = error
            continue
        progress(f"unpacking QEMU {version}")
        # apt has checked the sums against the signed list
        dsc = next(work.glob("*.dsc"))
        run(["dpkg-source", "--no-check", "-x", dsc, tree])
        return version
    if failure:
        raise failure
    raise UnknownError(
        f"the Debian mirror has no source of QEMU {series}", "name a source tree with --source"
    )


def versions(showsrc: str, series: str) -> list[str]:
    """Return a series' versions that ``apt-cache showsrc`` lists, without epoch, newest first."""
    found = {match[1] for match in _VERSION.finditer(showsrc) if match[2] == series}
    return sorted(found, key=_numbers, reverse=True)


def _numbers(version: str) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", version)]


def full_version(showsrc: str, version: str) -> str:
    """Return the version as it is listed, with its epoch."""
    match = re.search(rf"^Version: ((?:\d+:)?{re.escape(version)})$", showsrc, re.MULTILINE)
    return match[1] if match else version
