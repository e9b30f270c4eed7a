# SPDX-License-Identifier: GPL-2.0-or-later
"""tools/fresh: its command line, and what it takes from this machine's apt and pip."""

import subprocess

import pytest

from programs import TOOLS, load

PROGRAM = TOOLS / "fresh"


fresh = load("fresh")


def test_what_follows_the_suite_is_the_command() -> None:
    found = fresh.parse(["--sudo", "trixie", "make", "--jobs", "2"])
    assert (found.sudo, found.suite) == (True, "trixie")
    assert found.command == ["make", "--jobs", "2"]
    assert fresh.parse(["trixie", "ls", "--sudo"]).sudo is False


@pytest.mark.parametrize("argv", [[], ["--fast", "trixie"], ["../root"], ["", "ls"], ["13"]])
def test_a_command_line_that_is_none(argv: list[str]) -> None:
    done = subprocess.run([PROGRAM, *argv], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "usage: fresh" in done.stderr


TARGETS = """\
Debian http://mirror.example/debian/
Debian http://mirror.example/debian/
Debian-Security http://mirror.example/security/
Node Source http://other.example/
"""


def test_repositories_are_those_of_this_machine() -> None:
    assert fresh.sources("trixie", TARGETS) == [
        "deb http://mirror.example/debian/ trixie main",
        "deb http://mirror.example/debian/ trixie-updates main",
        "deb http://mirror.example/security/ trixie-security main",
    ]


def test_a_machine_without_a_mirror_is_told_so() -> None:
    with pytest.raises(SystemExit, match="no mirror of Debian"):
        fresh.sources("trixie", "Node Source http://other.example/\n")


def test_apt_reaches_the_mirror_as_here() -> None:
    dump = """\
Acquire::http::Proxy "http://proxy.example:3128";
Acquire::https::CAInfo "";
Acquire::Check-Valid-Until "false";
APT::Update::Post-Invoke:: "rm -f /etc/motd";
"""
    assert fresh.apt_settings(dump) == [
        'Acquire::http::Proxy "http://proxy.example:3128";',
        'Acquire::Check-Valid-Until "false";',
    ]


def test_pip_reaches_its_index_as_here() -> None:
    listed = """\
:env:.cert='/etc/env.crt'
global.cert='/etc/file.crt'
global.index-url='https://pypi.example/simple'
global.find-links='/opt/wheels'
"""
    assert fresh.pip_settings(listed) == {
        "PIP_CERT": "/etc/env.crt",
        "PIP_INDEX_URL": "https://pypi.example/simple",
    }
