# SPDX-License-Identifier: GPL-2.0-or-later
"""Building QEMU, without QEMU: a tree of three files, and a configure that takes no time."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest

from mdev_lab import qemus
from mdev_lab.checkout import ROOT
from mdev_orchestrator.errors import HostError, MdoError, UnknownError
from mdev_orchestrator.qemu_build import builds, patches, source
from mdev_orchestrator.system import apt
from mdev_orchestrator.system.files import remove

HUNK = re.compile(r"^@@ -[\d,]+ \+[\d,]+ @@", re.MULTILINE)

SHOWSRC = """\
Package: qemu
Version: 1:10.0.9+ds-1
Package: qemu
Version: 1:10.0.13+ds-0+deb13u1
Package: qemu
Version: 1:10.2.2+ds-1
Package: qemu
Version: 11.1.2+ds-3
"""

PATCH = """\
From: an author <author@example.invalid>
Subject: [PATCH] call it

diff --git a/hw/vfio/common.c b/hw/vfio/common.c
--- a/hw/vfio/common.c
+++ b/hw/vfio/common.c
@@ -1,3 +1,4 @@
 one
+two
 three
 four
diff --git a/VERSION b/VERSION
--- a/VERSION
+++ b/VERSION
@@ -1 +1 @@
-9.9.1
+9.9.1-mdo
"""

CONFIGURE = """\
#!/bin/sh
tree=$(dirname "$0")
echo configured >> "$tree/../configured"
files=$(ls "$tree/hw/vfio/common.c" "$tree/hw/vfio/mdev.c" 2>/dev/null | tr '\\n' ' ')
cat > build.ninja <<END
rule make
  command = echo making; cat $files > \\$out
build qemu-system-x86_64: make $files
END
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with one patch for a QEMU 9.9, and a cache of its own."""
    root = tmp_path / "project"
    place = root / "qemu_patches/9.9"
    place.mkdir(parents=True)
    (place / "0001-call-it.patch").write_text(PATCH)
    (place / "series").write_text("0001-call-it.patch\n")
    for name in patches.NEW_FILES:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{name}\n")
    for module in (builds, patches):
        monkeypatch.setattr(module, "project_files", lambda: root)
    monkeypatch.setenv("MDO_CACHE_DIR", str(tmp_path / "cache"))
    return root


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """What passes for QEMU's source."""
    root = tmp_path / "qemu"
    (root / "hw/vfio").mkdir(parents=True)
    (root / "hw/vfio/common.c").write_text("one\nthree\nfour\n")
    (root / "VERSION").write_text("9.9.1\n")
    (root / "configure").write_text(CONFIGURE)
    (root / "configure").chmod(0o755)
    return root


@pytest.fixture
def place(project: Path, tree: Path) -> Path:
    """The cache's directory with a source tree in it."""
    root = source.place_of("9.9")
    remove(root)
    root.mkdir(parents=True)
    tree.rename(root / "source")
    return root


@pytest.mark.parametrize("series", patches.series_known())
def test_patches_are_hooks_with_three_lines_of_context(series: str) -> None:
    for patch in patches.patches(series):
        text = patch.read_text()
        assert re.search(r"^Subject: \[PATCH\] \S.+$", text, re.MULTILINE)
        assert "new file mode" not in text
        message = text.partition("\n\n")[2].partition("\ndiff --git")[0]
        assert message
        assert all(len(line) <= 76 for line in message.splitlines())
        for hunk in HUNK.split(text)[1:]:
            lines = hunk.partition("\ndiff --git")[0].partition("\n")[2].splitlines()
            context = "".join(line[:1] or " " for line in lines)
            assert len(context) - len(context.lstrip(" ")) <= 3
            assert len(context) - len(context.rstrip(" ")) <= 3


FAULTS = {"10.2": ["0009-vfio-iommufd-a-device-opens-though-live-update-canno.patch"]}
"""Patches for a fault that only one series has, the last ones of that."""


def test_both_series_hook_the_same_way() -> None:
    names = {
        series: [path.name for path in patches.patches(series)] for series in patches.series_known()
    }
    for series, faults in FAULTS.items():
        assert [names[series].pop() for _ in faults] == faults[::-1]
    assert names["10.0"] == names["10.2"]


def test_meson_knows_every_suite() -> None:
    runner = (ROOT / "tools/run-tests").read_text()
    suites = re.findall(r'^    "([\w.-]+)": \[', runner, re.MULTILINE)
    text = (ROOT / "meson.build").read_text()
    assert suites
    assert [suite for suite in suites if f"'{suite}'" not in text] == []


def test_versions_of_a_series_newest_first() -> None:
    assert source.versions(SHOWSRC, "10.0") == ["10.0.13+ds-0+deb13u1", "10.0.9+ds-1"]
    assert source.versions(SHOWSRC, "11.1") == ["11.1.2+ds-3"]
    assert source.versions(SHOWSRC, "9.2") == []
    assert source.full_version(SHOWSRC, "10.2.2+ds-1") == "1:10.2.2+ds-1"
    assert source.full_version(SHOWSRC, "11.1.2+ds-3") == "11.1.2+ds-3"


@pytest.mark.parametrize(
    "targets",
    [
        "uri-s|old-security|Debian|Debian-Security\nuri-u|old-updates|Debian|Debian\nuri|old|Debian|D",
        "other|stable|Another|Origin\nuri|old|$(ORIGIN)|$(LABEL)",
    ],
)
def test_mirror_is_the_machines_own(
    targets: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "apt-get"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{targets}\nEND\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert apt.mirror() == "uri"
    options = apt.private_apt(tmp_path / "private", "deb-src", ["trixie"])
    sources = (tmp_path / "private/sources.list").read_text()
    assert re.search(r"^deb-src (\[signed-by=\S+\] )?uri trixie main$", sources, re.MULTILINE)
    assert f"Dir::State::lists={tmp_path}/private/lists" in options


def test_unknown_series() -> None:
    with pytest.raises(UnknownError, match=r"no patches for QEMU 1\.0 .*10\.0"):
        patches.patches("1.0")


def test_tree_of_another_series(tree: Path, tmp_path: Path) -> None:
    assert source.tree_version(tree, "9.9") == "9.9.1"
    with pytest.raises(UnknownError, match=r"is QEMU 9\.9\.1, not 9\.1"):
        source.tree_version(tree, "9.1")
    with pytest.raises(UnknownError, match="no source tree"):
        source.tree_version(tmp_path, "9.9")


def test_only_what_changed_is_written(place: Path, project: Path) -> None:
    assert patches.sync("9.9", place) == len(patches.NEW_FILES) + 2
    common = place / "source/hw/vfio/common.c"
    assert common.read_text() == "one\ntwo\nthree\nfour\n"
    assert patches.sync("9.9", place) == 0
    (project / "hw/vfio/mdev.c").write_text("new\n")
    assert patches.sync("9.9", place) == 1


def test_a_changed_patch_touches_only_what_it_changes(place: Path, project: Path) -> None:
    patches.sync("9.9", place)
    patch = project / "qemu_patches/9.9/0001-call-it.patch"
    patch.write_text(PATCH.replace("+two", "+zwei"))
    assert patches.sync("9.9", place) == 1
    assert "zwei" in (place / "source/hw/vfio/common.c").read_text()
    patch.write_text(PATCH.partition("diff --git a/VERSION")[0])
    assert patches.sync("9.9", place) == 2
    assert (place / "source/VERSION").read_text() == "9.9.1\n"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("hw/vfio/common.c", "one\nthree\nfive\n"),  # would fit with fuzz
        ("hw/vfio/common.c", "one\ntwo\nthree\nfour\n"),  # is patched already
        ("hw/vfio/common.c", None),
        ("VERSION", "9.9.2\n"),
    ],
)
def test_a_tree_that_does_not_fit(place: Path, name: str, content: str | None) -> None:
    if content is None:
        (place / "source" / name).unlink()
    else:
        (place / "source" / name).write_text(content)
    before = {path: path.read_bytes() for path in (place / "source").rglob("*") if path.is_file()}
    with pytest.raises(MdoError, match=rf"0001-call-it\.patch does not fit .*{re.escape(name)}"):
        patches.sync("9.9", place)
    after = {path: path.read_bytes() for path in (place / "source").rglob("*") if path.is_file()}
    assert after == before


def test_build_from_a_tree(project: Path, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builds, "check_host", lambda: None)
    monkeypatch.setattr(builds, "FIRMWARE", {str(tree): "package"})
    monkeypatch.setattr(builds, "NEEDED_FIRMWARE", ("VERSION",))
    said: list[str] = []
    done = builds.build("9.9", source=tree, progress=said.append)
    assert done.binary.read_text() == "one\ntwo\nthree\nfour\nhw/vfio/mdev.c\n"
    assert (done.firmware / "VERSION").read_text() == "9.9.1\n"
    assert (tree / "hw/vfio/common.c").read_text() == "one\nthree\nfour\n"
    assert builds.find("9.9") == done
    assert "configuring" in said

    said.clear()
    assert builds.build("9.9", progress=said.append) == done
    assert said == []

    (project / "hw/vfio/mdev.c").write_text("mine\n")
    again = builds.build("9.9", progress=said.append)
    assert again.digest != done.digest
    assert done.binary.read_text().endswith("mine\n")
    assert (source.place_of("9.9") / "configured").read_text() == "configured\n"

    ninja = source.place_of("9.9") / "build/build.ninja"
    ninja.write_text(ninja.read_text().replace("echo making", "echo mdev.c:1: error: no; exit 1"))
    (project / "hw/vfio/mdev.c").write_text("worse\n")
    with pytest.raises(MdoError, match=r"mdev\.c:1: error: no"):
        builds.build("9.9")
    assert done.binary.read_text().endswith("mine\n")

    # nor does a tree that our patches do not fit
    with pytest.raises(MdoError, match=r"common\.c is not what it changes"):
        builds.build("9.9", source=copy_of(tree, "five"))
    assert builds.find("9.9") == again
    assert (source.place_of("9.9") / "source/hw/vfio/common.c").exists()


def test_a_stock_build_has_nothing_of_ours(
    project: Path, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builds, "check_host", lambda: None)
    monkeypatch.setattr(builds, "FIRMWARE", {str(tree): "package"})
    monkeypatch.setattr(builds, "NEEDED_FIRMWARE", ("VERSION",))
    patched = builds.build("9.9", source=tree)
    stock = qemus.build_stock("9.9")
    assert stock.binary.read_text() == "one\nthree\nfour\n"
    assert stock.version == patched.version
    assert builds.find("9.9") == patched
    copied = source.place_of("9.9-stock") / "source"
    assert set(patches.files_below(copied)) == set(patches.files_below(tree))

    said: list[str] = []
    (project / "hw/vfio/mdev.c").write_text("mine\n")
    assert qemus.build_stock("9.9", progress=said.append) == stock
    assert "copying the source without our patches" not in said

    other = tree.with_name("other")
    shutil.copytree(tree, other)
    (other / "README").touch()
    builds.build("9.9", source=other)
    qemus.build_stock("9.9")
    assert (copied / "README").exists()


def copy_of(tree: Path, words: str) -> Path:
    """Another tree, in which a patched file says something else."""
    other = tree.with_name("other")
    shutil.copytree(tree, other)
    (other / "hw/vfio/common.c").write_text(f"{words}\n")
    return other


def test_configure_that_fails(project: Path, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builds, "check_host", lambda: None)
    (tree / "configure").write_text("#!/bin/sh\necho 'ERROR: glib-2.0 not found'\nexit 1\n")
    with pytest.raises(MdoError, match=r"configure said: ERROR: glib-2\.0 not found"):
        builds.build("9.9", source=tree)


def test_exported_series_says_what_it_is(project: Path, tmp_path: Path) -> None:
    written = patches.export("9.9", tmp_path / "out")
    assert [path.name for path in written] == [
        "0001-hw-vfio-add-the-mdev-lifecycle.patch",
        "0002-call-it.patch",
    ]
    assert "Subject: [PATCH 2/2] call it" in written[1].read_text()
    assert (tmp_path / "out/series").read_text().splitlines() == [path.name for path in written]


def test_exported_files_are_ours(tmp_path: Path) -> None:
    first, *_ = patches.export("10.0", tmp_path / "out")
    target = tmp_path / "tree"
    target.mkdir()
    subprocess.run(["git", "init", "-q"], cwd=target, check=True)
    subprocess.run(["git", "apply", "--whitespace=error-all", first], cwd=target, check=True)
    for name, inside in patches.NEW_FILES.items():
        assert (target / inside).read_bytes() == (ROOT / name).read_bytes()


@pytest.mark.parametrize(
    ("version", "managed", "message", "remedy"),
    [
        ("1.5.0", True, "", ""),
        ("1.0.1", True, "which has 1.0", "pipx inject mdev-orchestrator"),
        (None, True, "meson 1.5 or newer", "apt-get install meson where"),
        (None, False, "meson 1.5 or newer", "-m pip install 'meson>=1.5'"),
    ],
)
def test_a_meson_that_is_too_old_has_a_remedy_that_this_python_allows(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    version: str | None,
    managed: bool,
    message: str,
    remedy: str,
) -> None:
    monkeypatch.setattr(builds, "missing_packages", lambda *_: [])
    monkeypatch.setattr(builds, "FIRMWARE", {})
    if managed:
        (tmp_path / "EXTERNALLY-MANAGED").touch()
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: version)
    coredata = SimpleNamespace(version=version)
    monkeypatch.setattr(importlib, "import_module", lambda _: coredata)
    if not message:
        builds.check_host()
        return
    with pytest.raises(HostError, match=message) as caught:
        builds.check_host()
    assert remedy in caught.value.hint
