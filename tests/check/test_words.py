# SPDX-License-Identifier: GPL-2.0-or-later
"""Programs and devices are no persons: in names, docstrings, comments, messages and pages."""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SUFFIXES = {".py", ".md", ".rst", ".toml", ".c", ".h"}
PLACES = (
    "hw",
    "python",
    "docs",
    "tests",
    "benches",
    "tools",
    "kernel",
    "README.md",
    "CHANGELOG.md",
)

PERSONS = re.compile(
    r"(?<![a-z])(who|whom|whoever|nobody|somebody|someone|anybody)(?![a-z])", re.IGNORECASE
)
#: People are persons.
PEOPLE = re.compile(
    r"\b(users?|operators?|administrators?|people|readers?|developers?|maintainers?|authors?"
    r"|newcomers?)[ ,]+(who|whom)\b",
    re.IGNORECASE,
)
#: Names that others gave.
GIVEN = re.compile(r"\b(su|setpriv|runuser|user|uid|chown|getpwnam)\W{1,4}nobody\b|nobody:nogroup")
#: This page, whose list it is, and sources of others.
EXCEPTIONS = {"tests/check/test_words.py"}


def test_no_program_is_a_person() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--", *PLACES],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    found = []
    for name in filter(None, listed.stdout.split("\0")):
        path = ROOT / name
        if name in EXCEPTIONS or path.suffix not in SUFFIXES or "corpus" in path.parts:
            continue
        if not path.exists():  # deleted, and not committed yet
            continue
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
            if PERSONS.search(GIVEN.sub("", PEOPLE.sub("", line))):
                found.append(f"{name}:{number}: {line.strip()[:90]}")
    assert not found, "\n".join(found)
