# SPDX-License-Identifier: GPL-2.0-or-later
"""docs/library.md: its examples run, its types are right, and its table has every name.

The machine is one of files. Guests are real QEMUs without the devices, which a wrapper takes off
their command lines; so what is marked as ``needs a guest`` is run by tests/lab/test_library.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import mdev_orchestrator as mdo
from mdev_orchestrator import library
from unit import library_page
from unit.fakesys import FakeSystem
from unit.library_page import Example
from unit.qemu import conftest as guests

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = library_page.examples()

place, qemu = guests.place, guests.qemu

WRAPPER = """\
#!/bin/bash
arguments=()
while [ $# -gt 0 ]; do
    case "$2" in vfio-pci,id=*) shift 2;; *) arguments+=("$1"); shift;; esac
done
exec {qemu} "${{arguments[@]}}"
"""


@pytest.fixture
def host(system: FakeSystem) -> FakeSystem:
    """The parents that the page's examples use, as mvgpu has them."""
    system.parent("grid0")
    system.type("grid0", "mvgpu-12", 16)
    system.groups_of("grid0", 8)
    system.parent("igd0")
    system.type("igd0", "mvgpu-128M", 8)
    system.type("igd0", "mvgpu-512M", 2)
    return system


@pytest.fixture
def machine(
    host: FakeSystem, place: Path, qemu: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> mdo.OpenMachine:
    """What ``mdo.open()`` gives in a test."""
    (tmp_path / "bin").mkdir()
    wrapper = tmp_path / "bin/qemu-system-x86_64"
    wrapper.write_text(WRAPPER.format(qemu=qemu))
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{wrapper.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("MDO_CACHE_DIR", str(tmp_path / "cache"))
    opened = library.open_machine(host.root, state=place)
    monkeypatch.setattr(library, "open_machine", lambda: opened)
    return opened


@pytest.mark.parametrize("example", [e for e in EXAMPLES if e.is_program], ids=str)
def test_a_program_of_the_page_runs(
    example: Example, machine: mdo.OpenMachine, host: FakeSystem
) -> None:
    assert machine.root == host.root
    example.run_program()
    assert host.uuids() == set()
    assert [name for name, _ in host.writes] == ["create", "remove"]


@pytest.mark.parametrize(
    "example", [e for e in EXAMPLES if not (e.is_program or e.needs_guest)], ids=str
)
async def test_an_example_of_the_page_runs_and_leaves_nothing(
    example: Example, machine: mdo.OpenMachine, host: FakeSystem
) -> None:
    async with mdo.open() as opened:
        assert opened is machine
        await example.run(opened)
        assert host.uuids() == set()
        assert await opened.managed() == mdo.Managed()
        assert await opened.guests() == []
        assert await opened.pending() == []


@pytest.mark.parametrize("example", [e for e in EXAMPLES if e.needs_guest], ids=str)
def test_an_example_that_needs_a_guest_is_valid(example: Example) -> None:
    example.compile()


def test_the_page_has_examples_of_all_kinds() -> None:
    kinds = Counter((example.is_program, example.needs_guest) for example in EXAMPLES)
    assert kinds[True, False] == 1
    assert kinds[False, False] > 10
    assert kinds[False, True] == 2


def test_the_examples_are_typed(tmp_path: Path) -> None:
    program = tmp_path / "page.py"
    program.write_text(library_page.as_module())
    mypy = Path(sys.executable).parent / "mypy"
    options = ["--config-file", ROOT / "pyproject.toml", "--cache-dir", ROOT / ".mypy_cache/page"]
    done = subprocess.run(
        [mypy, *options, program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "Success: no issues found in 1 source file\n", done.stdout + done.stderr


def test_the_table_lists_every_exported_name_once() -> None:
    assert sorted(library_page.listed_names()) == sorted(mdo.__all__)


@pytest.mark.parametrize("name", mdo.__all__)
def test_an_exported_name_is_there(name: str) -> None:
    assert getattr(mdo, name) is not None


def test_a_name_that_is_not_exported_is_no_attribute() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        mdo.nonsense  # noqa: B018
