# SPDX-License-Identifier: GPL-2.0-or-later
"""The exported series, as a user applies it by hand: 'git am' on Debian's source."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from mdev_lab import qemus
from mdev_orchestrator.qemu_build import builds, patches, source

IDENTITY = ("-c", "user.name=test", "-c", "user.email=test@example.invalid")


def git(tree: Path, *words: str | Path) -> str:
    """Run git in a tree; its output."""
    command = ["git", *IDENTITY, "-c", "gc.auto=0", *words]
    return subprocess.run(command, cwd=tree, stdout=subprocess.PIPE, text=True, check=True).stdout


@pytest.mark.parametrize("series", patches.series_known())
def test_git_am_makes_the_tree_that_is_built(series: str, tmp_path: Path) -> None:
    builds.build(series, progress=print)
    place, tree = source.place_of(series), tmp_path / "qemu"
    qemus.copy_unpatched(place, tree)
    git(tree, "init", "--quiet")
    git(tree, "add", "--all", "--force")
    git(tree, "commit", "--quiet", "--message=Debian's")

    exported = patches.export(series, tmp_path / "series")
    git(tree, "am", "--quiet", "--no-3way", "--whitespace=error-all", *exported)

    assert git(tree, "rev-list", "--count", "HEAD").strip() == str(len(exported) + 1)
    changed = git(tree, "diff", "--name-only", "HEAD~" + str(len(exported))).split()
    assert set(changed) == {
        *patches.NEW_FILES.values(),
        *(name for patch in patches.patches(series) for name in patches.touched(patch)),
    }
    for name in changed:
        assert (tree / name).read_bytes() == (place / "source" / name).read_bytes(), name
