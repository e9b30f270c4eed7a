# SPDX-License-Identifier: GPL-2.0-or-later
"""The units and the rule; that they do what they say is tests/reboot's."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from mdev_orchestrator.errors import HostError
from mdev_orchestrator.host import service
from mdev_orchestrator.host.service import GUESTS, RESTORE, RULES, UNITS, WANTED
from mdev_orchestrator.machine import Machine

ENVIRONMENT = {"MDO_STATE_DIR": "/srv/100% ours/$HOME"}


def test_what_is_said_is_what_runs() -> None:
    contents = service.files(["/opt/odd place/mdo", "$x", "50%"], ENVIRONMENT)
    for unit, command in ((GUESTS, "ExecStop"), (RESTORE, "ExecStart")):
        text = contents[f"{UNITS}/{unit}"]
        assert f'\n{command}="/opt/odd place/mdo" "$$x" 50%% ' in text
        assert '\nEnvironment="MDO_STATE_DIR=/srv/100%% ours/$HOME"\n' in text
    assert f'+="{RESTORE}"' in contents[RULES]
    assert "{" not in contents[RULES].replace("ENV{", "")


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here")
def test_systemd_finds_no_fault(tmp_path: Path) -> None:
    contents = service.files(["/bin/true"], {"MDO_STATE_DIR": "/var/lib/x"})
    service.install(Machine(tmp_path), contents)
    units = [str(tmp_path / UNITS / name) for name in (GUESTS, RESTORE)]
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *units],
        capture_output=True,
        text=True,
        check=False,
    )
    assert [line for line in done.stderr.splitlines() if "mdo-" in line] == []


def test_install_and_remove(tmp_path: Path) -> None:
    contents = service.files(["mdo"], {})
    assert service.install(Machine(tmp_path), contents) is False
    assert service.install(Machine(tmp_path), contents) is False
    assert (tmp_path / WANTED).resolve() == tmp_path / UNITS / GUESTS
    assert {path: (tmp_path / path).read_text() for path in contents} == contents
    assert service.remove(Machine(tmp_path)) is True
    assert service.remove(Machine(tmp_path)) is False
    assert [path for path in tmp_path.rglob("*") if not path.is_dir()] == []


def test_what_is_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "etc").write_text("")
    with pytest.raises(HostError, match=r"cannot change .*/etc/systemd"):
        service.install(Machine(tmp_path), service.files(["mdo"], {}))
