# SPDX-License-Identifier: GPL-2.0-or-later
"""What comes with the program: completion, man pages, and commands of other packages."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mdev_orchestrator.cli import manpages, tree
from unit.cli.test_main import U1, command, mdo, refused
from unit.fakesys import FakeSystem

# ---- completion ----


@pytest.fixture
def card(system: FakeSystem) -> FakeSystem:
    system.parent("card1")
    system.type("card1", "grid-12", 8)
    system.mdev("card1", "grid-12", U1)
    (system.root / "state/guests/render-1").mkdir(parents=True)
    return system


def complete(system: FakeSystem, line: str, shell: str = "bash") -> list[str]:
    """What a shell would offer for the last word of a line."""
    argv, environment = command(system)
    environment |= {
        "_MDO_COMPLETE": f"complete_{shell}",
        "COMP_WORDS": line,
        "COMP_CWORD": str(line.count(" ")),
        "_TYPER_COMPLETE_ARGS": line,
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split("\n")[:-1]


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("mdo cre", ["create"]),
        ("mdo de", ["destroy", "detach"]),
        ("mdo guest st", ["start", "stop"]),
        ("mdo attach --wait", ["--wait-guest"]),
        ("mdo --ver", ["--version"]),
        ("mdo create gr", ["grid-12"]),
        ("mdo create --parent ", ["card1"]),
        ("mdo remove 8", [U1]),
        ("mdo guest start g --mdev 83b8", [U1]),
        ("mdo attach ", ["render-1"]),
        ("mdo attach render-1 ", ["grid-12", U1]),
    ],
)
def test_bash_completes(card: FakeSystem, line: str, offered: list[str]) -> None:
    assert [word for word in complete(card, line) if word] == offered


def test_nothing_is_completed_where_there_is_nothing(system: FakeSystem) -> None:
    assert [word for word in complete(system, "mdo attach ") if word] == []


def test_zsh_and_fish_complete_with_descriptions(card: FakeSystem) -> None:
    assert any(
        "create" in line and "all or none" in line for line in complete(card, "mdo cr", "zsh")
    )
    assert "create\tCreate devices of one type, all or none" in complete(card, "mdo cr", "fish")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_there_is_a_script_for_each_shell(system: FakeSystem, shell: str) -> None:
    argv, environment = command(system)
    environment["_MDO_COMPLETE"] = f"source_{shell}"
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=True)
    assert f"_MDO_COMPLETE=complete_{shell}" in done.stdout


@pytest.mark.skipif(not shutil.which("bash"), reason="there is no bash")
def test_the_script_works_in_bash(card: FakeSystem, tmp_path: Path) -> None:
    argv, environment = command(card)
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "mdo").write_text(f"#!{sys.executable}\n{argv[2].replace('; ', chr(10))}\n")
    (programs / "mdo").chmod(0o755)
    environment["PATH"] = f"{programs}:{os.environ['PATH']}"
    script = """
        eval "$(_MDO_COMPLETE=source_bash mdo)"
        COMP_WORDS=(mdo guest st) COMP_CWORD=2
        _mdo_completion mdo
        echo "${COMPREPLY[@]}"
    """
    done = subprocess.run(
        ["bash", "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == ("start stop\n", "")


# ---- man pages ----


def test_there_is_a_man_page_for_each_command(tmp_path: Path) -> None:
    names = {path.name for path in manpages.write(tmp_path / "man")}
    assert names >= {"mdo.1", "mdo-create.1", "mdo-guest.1", "mdo-guest-start.1"}
    page = (tmp_path / "man/mdo-create.1").read_text()
    assert r"\fBmdo create\fR [OPTIONS] TYPE" in page
    assert "\\fB\\-n, \\-\\-count COUNT\\fR\nHow many devices." in page
    for name, text in tree.COMMANDS.items():
        assert f"\\fB{name}\\fR" in (tmp_path / "man/mdo.1").read_text(), text


@pytest.mark.skipif(not shutil.which("groff"), reason="there is no groff")
def test_groff_has_nothing_to_say_against_them() -> None:
    text = "".join(page for _, page in manpages.pages())
    done = subprocess.run(
        ["groff", "-ww", "-man", "-Tutf8"], input=text.encode(), capture_output=True, check=True
    )
    assert done.stderr == b""


# ---- commands of other packages ----

PLUGIN = '''\
import typer
from mdev_orchestrator.cli.tree import noun

app = noun("Grow things.")


@app.command("tomato")
def tomato(count: int = 1) -> int:
    """Grow tomatoes."""
    return count


def water() -> None:
    """Water what grows. And wait."""
    print("wet")
'''


@pytest.fixture
def install(
    system: FakeSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str], None]]:
    """Install a package whose entry points are given; it has PLUGIN as its module."""
    place = tmp_path / "site"

    def install(points: str) -> None:
        info = place / "garden-1.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: garden\nVersion: 1\n")
        (info / "entry_points.txt").write_text(f"[{tree.PLUGINS}]\n{points}\n")
        (place / "garden.py").write_text(PLUGIN)
        monkeypatch.setenv("PYTHONPATH", str(place))

    return install


def test_another_package_adds_a_group_and_a_command(
    system: FakeSystem, install: Callable[[str], None]
) -> None:
    install("garden = garden:app\nwater = garden:water")
    listed = mdo(system, "--help").stdout
    assert "\n  garden   Grow things\n  water    Water what grows\n" in listed
    assert mdo(system, "garden", "tomato", "--count", "3").returncode == 3
    assert mdo(system, "water").stdout == "wet\n"
    line = refused(mdo(system, "garden", "tomatto"), 2)
    assert line == "no such command: tomatto \u2014 did you mean tomato?"
    assert complete(system, "mdo gar") == ["garden"]


def test_a_package_replaces_no_command_and_a_broken_one_breaks_none(
    system: FakeSystem, install: Callable[[str], None]
) -> None:
    install("host = garden:water\nwither = garden:nothing")
    assert mdo(system, "host").stdout == ""
    done = mdo(system, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "\n  wither   the command wither of the package garden cannot be loaded" in done.stdout
    line = refused(mdo(system, "wither"), 5)
    assert line.startswith("the command wither of the package garden cannot be loaded: Attribute")


def test_packages_are_looked_for_only_when_that_is_needed(system: FakeSystem) -> None:
    program = (
        "import sys\nfrom mdev_orchestrator.cli import tree\n"
        "try: tree.run(['host'])\nfinally: print('importlib.metadata' in sys.modules)"
    )
    _, environment = command(system)
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"
