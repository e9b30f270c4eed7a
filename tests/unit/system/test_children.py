# SPDX-License-Identifier: GPL-2.0-or-later
"""Children that run to their end: what they printed, why they failed, and that none is left."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest

from mdev_orchestrator.errors import HostError, MdoError
from mdev_orchestrator.system import children
from mdev_orchestrator.system.processes import start_time


def test_the_output_of_a_program() -> None:
    assert children.run(["cat"], data="words") == "words"
    assert children.succeeds(["true"])
    assert not children.succeeds(["false"])


@pytest.mark.parametrize(
    ("script", "cause"),
    [
        ("echo first >&2; echo 'x.c: error: no' >&2; echo last >&2; exit 1", "x.c: error: no"),
        ("echo first; echo last; exit 1", "last"),
        ("exit 1", "no output"),
    ],
)
def test_a_failure_quotes_the_cause(script: str, cause: str) -> None:
    with pytest.raises(MdoError, match=f" failed: {cause}$"):
        children.run(["sh", "-c", script])


def test_a_program_that_is_missing_is_named() -> None:
    with pytest.raises(HostError, match="no-such-program is not installed"):
        children.run(["no-such-program"])


def test_a_program_in_sbin_is_found_by_a_plain_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert "kmod" in children.run(["depmod", "--version"])


def test_a_log_has_all_and_each_line_is_passed_on(tmp_path: Path) -> None:
    log, lines = tmp_path / "log", list[bytes]()
    log.write_text("before\n")
    script = ["sh", "-c", "echo one; echo two >&2; exit $1", "sh"]
    children.run_logged("work", [*script, "0"], log, speaker="sh", on_line=lines.append)
    assert lines == [b"one\n", b"two\n"]
    assert log.read_text() == "before\none\ntwo\n"
    with pytest.raises(MdoError, match=r"^work failed: sh said: two \(see /.*/log\)$"):
        children.run_logged("work", [*script, "1"], log, speaker="sh")


async def test_a_child_that_ends(tmp_path: Path) -> None:
    script = ["sh", "-c", "echo out; echo err >&2; exit 3"]
    assert await children.run_child(*script, deadline=60) == children.Ended(3, "out\n")
    both = await children.run_child(*script, deadline=60, with_errors=True)
    assert both == children.Ended(3, "out\nerr\n")
    killed = await children.run_child("sh", "-c", "kill -9 $$", deadline=60)
    assert killed == children.Ended(-signal.SIGKILL, "")
    with pytest.raises(FileNotFoundError):
        await children.run_child("no-such-program", deadline=60)


async def test_a_child_is_killed_at_its_deadline(tmp_path: Path) -> None:
    mark = tmp_path / "pid"
    program = f"import os, time; open({str(mark)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    assert await children.run_child(sys.executable, "-c", program, deadline=1) is None
    if mark.exists():  # on a busy machine it may have been killed before
        assert start_time(int(mark.read_text())) is None
