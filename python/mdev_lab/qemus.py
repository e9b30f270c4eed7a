# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMU with and without our patches, for tests and benches that compare the two.

``python -m mdev_lab.qemus [SERIES…]`` builds both of each series and prints the value of
``MDO_TEST_QEMU``. With ``--built`` it builds nothing, and prints what is built and current.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

from mdev_orchestrator.errors import MdoError
from mdev_orchestrator.qemu_build.builds import (
    CONFIGURE,
    DEFAULT_SERIES,
    Build,
    build,
    digest,
    find,
    make,
)
from mdev_orchestrator.qemu_build.patches import NEW_FILES, files_below, series_known, update
from mdev_orchestrator.qemu_build.source import place_of
from mdev_orchestrator.system.children import run
from mdev_orchestrator.system.files import locked, remove
from mdev_orchestrator.system.progress import Progress


def build_stock(
    series: str = DEFAULT_SERIES, *, jobs: int = 0, progress: Progress = lambda _: None
) -> Build:
    """Build a series without our patches, from the same source and with the same options.

    The patched one is built first. ``mdo qemu list`` does not show this one.

    :raise MdoError: It does not compile.
    """
    build(series, jobs=jobs, progress=progress)
    patched, place = place_of(series), place_of(f"{series}-stock")
    with locked(place):
        mark, origin = place / "source.json", (patched / "source.json").read_text()
        options = hashlib.sha256(" ".join(CONFIGURE).encode()).hexdigest()[:16]
        if not mark.exists() or mark.read_text() != origin:
            progress("copying the source without our patches")
            remove(place)
            place.mkdir(parents=True)
            with locked(patched):
                copy_unpatched(patched, place / "source")
            mark.write_text(origin)
        elif (done := find(place.name)) and done.digest == options:
            return done
        return make(place, place.name, json.loads(origin)["version"], options, jobs, progress)


def copy_unpatched(place: Path, tree: Path) -> None:
    """Copy ``place/source`` to ``tree`` as it was before our patches."""
    run(["cp", "-a", "--reflink=auto", place / "source", tree])
    for name in NEW_FILES.values():
        remove(tree / name)
    for name in files_below(place / "pristine"):
        update(place / "pristine" / name, tree / name)


def main() -> int:
    """Build each series with and without our patches; print where the programs are."""
    found: list[Build] = []
    if sys.argv[1:] == ["--built"]:
        built = [find(series) for series in series_known()]
        found += [done for done in built if done and done.digest == digest(done.series)]
        return _print(found)
    try:
        for series in sys.argv[1:] or series_known():
            found += [build(series, progress=_say), build_stock(series, progress=_say)]
    except MdoError as error:
        _say(str(error))
        return error.exit_code
    return _print(found)


def _print(found: list[Build]) -> int:
    sys.stdout.write(",".join(f"{qemu.series}={qemu.binary}:{qemu.firmware}" for qemu in found))
    return 0


def _say(line: str) -> None:
    sys.stderr.write(f"qemu: {line}\n")


if __name__ == "__main__":
    sys.exit(main())
