# SPDX-License-Identifier: GPL-2.0-or-later
"""Our patches and files for QEMU: applied to a source tree, or exported for ``git am``."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from mdev_orchestrator.errors import MdoError, UnknownError
from mdev_orchestrator.system.children import succeeds

#: Our files, and their places in QEMU's tree.
NEW_FILES = {
    "hw/vfio/mdev.c": "hw/vfio/mdev.c",
    "hw/vfio/mdev.h": "hw/vfio/mdev.h",
    "hw/vfio/mdev-lifecycle.c": "hw/vfio/mdev-lifecycle.c",
    "hw/vfio/mdev-lifecycle.h": "hw/vfio/mdev-lifecycle.h",
    "hw/vfio/mdev-stub.c": "stubs/vfio-mdev.c",
    "hw/vfio/vfio-mdev.json": "qapi/vfio-mdev.json",
    "tests/c/test-mdev-lifecycle.c": "tests/unit/test-mdev-lifecycle.c",
    "tests/c/vfio-mdev-test.c": "tests/qtest/vfio-mdev-test.c",
}

_TOUCHED = re.compile(r"^diff --git a/(\S+) b/(\S+)$", re.MULTILINE)


def project_files() -> Path:
    """Return the directory that has ``hw/vfio``, ``qemu_patches`` and ``tests/c``.

    An installed package contains a copy of them; otherwise this is the root of the checkout.
    """
    installed = Path(__file__).with_name("files")
    return installed if installed.is_dir() else Path(__file__).resolve().parents[3]


def series_known() -> list[str]:
    """Return the series of QEMU that there are patches for."""
    return sorted(path.parent.name for path in project_files().glob("qemu_patches/*/series"))


def patches(series: str) -> list[Path]:
    """Return our patches for a series, in the order in which they apply.

    :raise UnknownError: There are none.
    """
    place = project_files() / "qemu_patches" / series
    if series not in series_known():
        raise UnknownError(
            f"there are no patches for QEMU {series}", f"give one of {', '.join(series_known())}"
        )
    return [place / line for line in (place / "series").read_text().split()]


def touched(patch: Path) -> list[str]:
    """Return the files that a patch changes, relative to the tree."""
    return [match[2] for match in _TOUCHED.finditer(patch.read_text())]


def sync(series: str, place: Path) -> int:
    """Bring our patches and files into ``place/source``; return how many files were written.

    :raise MdoError: A patch does not fit; names it and the file.
    """
    source, pristine = place / "source", place / "pristine"
    wanted = sorted({name for patch in patches(series) for name in touched(patch)})
    for name in wanted:
        keep(source, pristine, name)
    with tempfile.TemporaryDirectory(dir=place) as work:
        patched = Path(work)
        for name in files_below(pristine):
            target = patched / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(pristine / name, target)
        for patch in patches(series):
            apply(patch, patched, series)
        changed = [update(patched / name, source / name) for name in files_below(pristine)]
    changed += [
        update(project_files() / name, source / target) for name, target in NEW_FILES.items()
    ]
    return sum(changed)


def keep(source: Path, pristine: Path, name: str) -> None:
    """Copy a file to ``pristine`` before a patch changes it for the first time."""
    target = pristine / name
    if not target.exists() and (source / name).exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source / name, target)


def files_below(root: Path) -> list[str]:
    """Return the relative names of all files below a directory."""
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def apply(patch: Path, tree: Path, series: str) -> None:
    """Apply one patch without fuzz.

    :raise MdoError: It does not fit; names the patch and the first file.
    """
    command = ["patch", "--strip=1", "--fuzz=0", "--batch", "--forward", "--silent"]
    command += ["--reject-file=-", "--no-backup-if-mismatch"]
    for name, part in zip(touched(patch), split(patch.read_text()), strict=True):
        if not (tree / name).exists():
            cause = f"there is no {name}"
        elif not succeeds(command, cwd=tree, data=part):
            cause = f"{name} is not what it changes"
        else:
            continue
        raise MdoError(
            f"patch {patch.name} does not fit this QEMU {series}: {cause}",
            "is the tree patched already, or of another version?",
        )


def split(text: str) -> list[str]:
    """Split a patch into one part for each file, without its message."""
    starts = [match.start() for match in _TOUCHED.finditer(text)]
    return [text[a:b] for a, b in zip(starts, [*starts[1:], len(text)], strict=True)]


def update(origin: Path, target: Path) -> bool:
    """Copy a file unless the target has that content already; return whether it was copied.

    ninja compiles what was written.
    """
    content = origin.read_bytes()
    if target.exists() and target.read_bytes() == content:
        return False
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(content)
    return True


# --- as patches for git am ------------------------------------------------------------------------


def export(series: str, target: Path) -> list[Path]:
    """Write the complete series as patches for ``git am``, our new files first.

    :raise MdoError: The directory cannot be written.
    """
    hooks = patches(series)
    texts = [new_files_patch(), *(path.read_text() for path in hooks)]
    names = ["hw-vfio-add-the-mdev-lifecycle.patch", *(path.name[5:] for path in hooks)]
    written = []
    try:
        target.mkdir(parents=True, exist_ok=True)
        for number, (name, text) in enumerate(zip(names, texts, strict=True), 1):
            path = target / f"{number:04}-{name}"
            subject = f"Subject: [PATCH {number}/{len(names)}]"
            path.write_text(text.replace("Subject: [PATCH]", subject, 1))
            written.append(path)
        (target / "series").write_text("".join(f"{path.name}\n" for path in written))
    except OSError as error:
        raise MdoError(f"cannot write {target}: {error.strerror}") from error
    return written


def new_files_patch() -> str:
    """Return one patch that adds all of our files."""
    head = """\
From 0000000000000000000000000000000000000000 Mon Sep 17 00:00:00 2001
From: mdev-orchestrator developers <devel@mdev-orchestrator.invalid>
Date: Sun, 22 Nov 2026 12:00:00 +0000
Subject: [PATCH] hw/vfio: add the mdev lifecycle

Start groups of mediated devices are started before the first open of a
member and stopped after the last close. This adds the state machine, the
glue to VFIO, the QAPI schema, a stub and the tests; nothing builds or
calls them yet.

"""
    return head + "".join(_lines_of_new_file())


def _lines_of_new_file() -> Iterator[str]:
    for name, target in sorted(NEW_FILES.items(), key=lambda pair: pair[1]):
        lines = (project_files() / name).read_text().splitlines(keepends=True)
        yield f"diff --git a/{target} b/{target}\nnew file mode 100644\n"
        yield f"--- /dev/null\n+++ b/{target}\n@@ -0,0 +1,{len(lines)} @@\n"
        yield from _added(lines)


def _added(lines: Iterable[str]) -> Iterator[str]:
    return (f"+{line}" for line in lines)
