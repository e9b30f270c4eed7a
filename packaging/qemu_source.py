# SPDX-License-Identifier: GPL-2.0-or-later
"""Makes a Debian source package of the patched QEMU: Debian's own, and our patches after theirs.

usage: qemu_source.py DIRECTORY     where the .dsc and what belongs to it goes

``dpkg-buildpackage`` builds it in the release that Debian's source is of, with what its
debian/control asks for. Its version is Debian's with ``+mdo1``, so that it replaces Debian's
packages and the next update of Debian's replaces it.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from mdev_orchestrator.qemu_build import builds, patches, source
from mdev_orchestrator.system.children import run

ENTRY = """\
qemu ({version}+mdo1) UNRELEASED; urgency=medium

  * Start groups of mediated devices: the patches of mdev-orchestrator.

 -- mdev-orchestrator developers <devel@mdev-orchestrator.invalid>  {date}

"""


def main(target: Path, series: str = builds.DEFAULT_SERIES) -> None:
    """Make the source package of a series in ``target``."""
    with tempfile.TemporaryDirectory(dir=target) as name:
        work = Path(name)
        tree = work / f"qemu-{series}"
        source.fetch_source(series, work, tree, say)
        add_patches(series, tree / "debian/patches")
        add_entry(tree / "debian/changelog")
        made = set(work.iterdir())
        run(["dpkg-source", "-b", tree], cwd=work)
        made = set(work.iterdir()) - made
        upstream = {path for path in work.iterdir() if ".orig" in path.name}
        for path in made | upstream:
            shutil.move(path, target / path.name)


def say(what: str) -> None:
    """Tell what takes its time."""
    sys.stderr.write(f"dist: {what}\n")


def add_patches(series: str, place: Path) -> None:
    """Append our patches, the new files first, to Debian's series."""
    ours = patches.export(series, place / "mdo")
    (place / "mdo/series").unlink()
    with (place / "series").open("a") as listed:
        listed.writelines(f"mdo/{path.name}\n" for path in ours)


def add_entry(changelog: Path) -> None:
    """Write an entry of our own above Debian's, with the date of the last one."""
    text = changelog.read_text()
    version = text[text.index("(") + 1 : text.index(")")]
    date = next(line for line in text.splitlines() if line.startswith(" -- ")).rpartition("  ")[2]
    changelog.write_text(ENTRY.format(version=version, date=date) + text)


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
