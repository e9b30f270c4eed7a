# SPDX-License-Identifier: GPL-2.0-or-later
"""What a command does not need, it does not load: each module costs a start, and most run often."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from unit.cli.test_main import U1, command
from unit.fakesys import FakeSystem

#: Nothing needs it: rich draws tables on a terminal only, and pydantic is what newer typers load.
NEEDLESS = {"pydantic", "argparse", "optparse", "rich", "typer.rich_utils"}
#: Only to talk to a guest.
GUESTS = {"qemu.qmp", "json", "mdev_orchestrator.qemu.monitor"}
#: Only to place devices.
CAPACITY = {"mdev_orchestrator.capacity.planner", "mdev_orchestrator.interop.mdevctl"}
#: Only to find commands of other distributions, draw a table on a terminal, build a QEMU, bring up
#: a lab, receive events.
OTHERS = {
    "importlib.metadata",
    "rich",
    "mdev_orchestrator.qemu_build",
    "mdev_lab",
    "pyudev",
    "email",
    "secrets",
}
#: What Python itself loads to find commands of other distributions: from 3.13 on json is among it.
FINDER = {
    *subprocess.run(
        [sys.executable, "-c", "import importlib.metadata, sys; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
}
#: Only to change something.
ENGINE = {"asyncio", "mdev_orchestrator.engine.steps", *CAPACITY}

POOL = """\
[[pool]]
name = "p"
type = "grid-12"
uuid = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"
"""

PROGRAM = """\
import sys
from mdev_orchestrator.cli.main import main
try:
    code = main()
finally:
    sys.stderr.write("\\nloaded: " + " ".join(sys.modules) + "\\n")
raise SystemExit(code)
"""


def needless(spared: set[str], system: FakeSystem, *arguments: str, code: int = 0) -> set[str]:
    """Which of these modules a command has loaded nevertheless when it ends, with ``code``."""
    argv, environment = command(system, *arguments)
    argv[argv.index("-c") + 1] = PROGRAM
    done = subprocess.run(
        argv, env=environment, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == code, done.stderr
    modules = set(done.stderr.rpartition("loaded: ")[2].split())
    assert "mdev_orchestrator.cli.main" in modules
    return (spared | NEEDLESS) & modules


@pytest.fixture
def card(system: FakeSystem) -> FakeSystem:
    system.parent("card1")
    system.type("card1", "grid-12", 8)
    return system


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_what_is_said_without_a_command(system: FakeSystem, option: str) -> None:
    assert not needless({"msgspec", "rich", *GUESTS, *ENGINE} - FINDER, system, option)


@pytest.mark.parametrize("words", [["host", "--help"], ["guest", "--help"]])
def test_the_help_of_a_command(system: FakeSystem, words: list[str]) -> None:
    assert not needless({*OTHERS, "asyncio", *GUESTS}, system, *words)


def test_the_help_of_a_command_of_another_distribution(system: FakeSystem) -> None:
    assert not needless({"rich", "asyncio", *GUESTS} - FINDER, system, "lab", "up", "--help")


def test_a_word_that_is_wrong(system: FakeSystem) -> None:
    assert not needless({*GUESTS, *OTHERS, "asyncio"}, system, "host", "--jsno", code=2)


def test_host(card: FakeSystem) -> None:
    card.mdev("card1", "grid-12", U1)
    spared = {*GUESTS, *OTHERS, *ENGINE, "dataclasses", "mdev_orchestrator.spec"}
    assert not needless(spared, card, "host", "--json")


def test_create_and_remove(card: FakeSystem) -> None:
    spared = {*GUESTS, *OTHERS, "tomllib", "mdev_orchestrator.interop.mdevctl"}
    assert not needless(spared, card, "create", "grid-13", code=2)
    assert not needless(spared, card, "remove", U1, code=2)


def test_attach_to_a_guest_that_is_not_there(card: FakeSystem) -> None:
    spared = {*GUESTS, *OTHERS, "tomllib"}
    assert not needless(spared, card, "attach", "no-guest", "grid-12", code=2)


def test_guests_where_there_are_none(card: FakeSystem) -> None:
    assert not needless({*GUESTS, *OTHERS, *CAPACITY, "tomllib"}, card, "guest", "list")


@pytest.mark.parametrize("name", ["plan", "diff"])
def test_a_spec_without_guests(card: FakeSystem, tmp_path: Path, name: str) -> None:
    spec = tmp_path / "pool.toml"
    spec.write_text(POOL)
    assert not needless({*GUESTS, *OTHERS}, card, name, str(spec))


@pytest.mark.parametrize(
    ("program", "spared"),
    [
        (
            "import mdev_orchestrator as mdo; mdo.open, mdo.load, mdo.MdoError",
            {"qemu.qmp", "json", "typer", "rich", "tomllib"},
        ),
        (
            "import mdev_orchestrator.cli.guest, mdev_orchestrator.cli.hotplug",
            {"asyncio", "qemu.qmp", "msgspec"},
        ),
    ],
    ids=["library", "commands"],
)
def test_what_is_imported_before_anything_is_asked(program: str, spared: set[str]) -> None:
    program += "; import sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert not spared & set(done.stdout.decode().split())
