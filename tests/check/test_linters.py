# SPDX-License-Identifier: GPL-2.0-or-later
"""Every checker is a test: ``make check`` runs this file, ``make test`` too."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mdev_lab import checkout, kernel_modules, kernels

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
PYTHON = ["python", "tests", "benches", "packaging", "tools/fresh", "tools/run-tests"]

LINTERS = {
    "ruff": ["ruff", "check", "--quiet", *PYTHON],
    "format": ["ruff", "format", "--check", "--quiet", *PYTHON],
    "mypy": ["mypy"],
    "layers": ["lint-imports"],
    "spelling": ["codespell", "README.md", "CHANGELOG.md", "docs", "kernel", "python", "tests"],
}


@pytest.mark.parametrize("name", LINTERS)
def test_linter_is_content(name: str) -> None:
    program, *arguments = LINTERS[name]
    present = [
        a
        for a in arguments
        if a.startswith("-") or a == "check" or (ROOT / a).exists() or a == "format"
    ]
    done = subprocess.run(
        [BIN / program, *present], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def kbuild(series: str, work: Path, *variables: str) -> str:
    """Build the driver in a copy with more warnings; what the compiler said."""
    kernel = kernels.fetch_kernel(series)
    shutil.copytree(ROOT / "kernel", work, dirs_exist_ok=True)
    done = subprocess.run(
        kernel_modules.kbuild(kernel, work, *variables),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "LC_ALL": "C"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


#: The kernels of this machine's release.
SERIES = kernels.RELEASES.get(kernels.codename(), {kernels.DEFAULT_SERIES: ""})


#: Of kbuild: what C=2 sets, since headers of 7.3 lack the script that C=2 finds sparse by. They use
#: two words that no sparse of Debian has, the second in each MODULE_*.
SPARSE = {
    "KBUILD_CHECKSRC": "2",
    "CF": "-Wbitwise -Wcontext -D__typeof_unqual__=__typeof__"
    " '-D__builtin_strlen(s)=(sizeof(s)-1)'",
}


@pytest.mark.parametrize("series", SERIES)
def test_driver_builds_without_a_warning_of_gcc_or_sparse(series: str, tmp_path: Path) -> None:
    said = kbuild(series, tmp_path, "W=1", *(f"{name}={value}" for name, value in SPARSE.items()))
    ours = [
        line for line in said.splitlines() if re.search(r"mvgpu\S*:\d+:.*(warning|error)", line)
    ]
    assert not ours, "\n".join(ours)


MARKDOWN_LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)(#[^)\s]*)?\)")


@pytest.mark.parametrize(
    "page", sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]), ids=lambda p: p.name
)
def test_links_of_a_page_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    targets = [m[1] for m in MARKDOWN_LINK.finditer(text) if not m[1].startswith("http")]
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert not missing, f"{page.name} links to {missing}"


NAMED_TEST = re.compile(r"`(tests/[\w/]+\.py)(?:::(\w+))?`")


def test_every_complaint_has_its_test() -> None:
    page = (ROOT / "docs/complaints.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 15
    for row in rows:
        named = NAMED_TEST.findall(row)
        assert named, row
        for file, test in named:
            assert re.search(rf"def {test or 'test_'}", (ROOT / file).read_text("utf-8")), test


def test_every_source_file_says_its_licence() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    files = [ROOT / name for name in listed.stdout.split("\0") if name]
    sources = [f for f in files if f.suffix in {".py", ".c", ".h", ".sh"} or f.name == "Kbuild"]
    bare = [
        str(f.relative_to(ROOT))
        for f in sources
        if f.exists() and f.stat().st_size and "SPDX-License-Identifier" not in f.read_text()[:1500]
    ]
    assert not bare


def test_driver_sources_are_found() -> None:
    assert (checkout.ROOT / "kernel/Kbuild").exists()
