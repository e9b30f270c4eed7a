# SPDX-License-Identifier: GPL-2.0-or-later
"""Standard output that cannot be written, signals that come twice, narrow terminals, and JSON."""

from __future__ import annotations

import asyncio
import io
import json
import os
import pty
import resource
import signal
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from mdev_orchestrator.cli import context, output
from mdev_orchestrator.cli.main import main
from mdev_orchestrator.errors import BusyError, CommandError, MdoError, Outcome
from mdev_orchestrator.machine import Machine
from unit.cli.test_apply_command import FOREIGN, U2, CommandLine
from unit.cli.test_apply_command import mdo as mdo_here
from unit.cli.test_main import GROUP, U1, cards, command, kernel, mdo
from unit.fakesys import FakeSystem

__all__ = ["cards", "kernel", "mdo_here"]

# ---- standard output and standard error that cannot be written (faults 13 and 24) ----


def run(
    system: FakeSystem, *arguments: str, shell: str = "", limit: tuple[Path, int] | None = None
) -> tuple[int, str]:
    """Exit status and standard error of a command.

    :param shell: Redirections.
    :param limit: A file for standard output, and the bytes that it can have.
    """
    argv, environment = command(system, *arguments)
    argv = ["sh", "-c", f'exec "$@" {shell}', "sh", *argv]
    out = os.open(limit[0], os.O_WRONLY) if limit else subprocess.PIPE

    def full() -> None:
        if limit:
            os.lseek(1, limit[1], os.SEEK_SET)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit[1], limit[1]))

    done = subprocess.run(
        argv, env=environment, stdout=out, stderr=subprocess.PIPE, preexec_fn=full, check=False
    )
    if limit:
        os.close(out)
    return done.returncode, done.stderr.decode()


@pytest.mark.parametrize("words", [("host",), ("create", "grid-12", "--uuid", U1), ("--help",)])
@pytest.mark.parametrize(
    ("shell", "reason"),
    [
        (">/dev/full", "standard output cannot be written: No space left on device"),
        (">&-", "standard output is closed"),
        ("</dev/null 1<&0", "standard output cannot be written: Bad file descriptor"),
    ],
)
def test_where_results_would_be_lost_nothing_is_done(
    cards: FakeSystem, words: tuple[str, ...], shell: str, reason: str
) -> None:
    code, err = run(cards, *words, shell=shell)
    assert (code, err.count("\n")) == (74, 1)
    assert err.startswith(f"mdo: {reason}; nothing was done")
    assert cards.uuids() == set()


def test_a_result_that_is_lost_is_named(kernel: FakeSystem, tmp_path: Path) -> None:
    """The disk is full when the device has been created."""
    out = tmp_path / "out"
    out.touch()
    code, err = run(kernel, "create", "grid-12", "--uuid", U1, limit=(out, 1 << 30))
    assert code == 74
    (line,) = err.splitlines()
    assert line.startswith(f"mdo: created mdev {U1}; standard output cannot be written: File too")
    assert kernel.uuids() == {U1}


def test_a_result_that_is_lost_is_named_in_json(kernel: FakeSystem, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.touch()
    code, err = run(kernel, "create", "grid-12", "--uuid", U1, "--json", limit=(out, 1 << 30))
    error = json.loads(err)["error"]
    assert (code, error["kind"], error["exit_code"]) == (74, "OutputError", 74)
    assert U1 in error["message"]


def test_a_help_that_is_lost_is_one_line(cards: FakeSystem, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.touch()
    code, err = run(cards, "--help", limit=(out, 1 << 30))
    assert (code, err.count("\n")) == (74, 1)


def test_the_reader_of_a_help_may_leave(cards: FakeSystem) -> None:
    argv, environment = command(cards, "--help")
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(argv, env=environment, stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize("shell", ["2>/dev/full", "2>&-", "<&- 2>&-"])
def test_without_standard_error_a_command_does_its_work(kernel: FakeSystem, shell: str) -> None:
    code, _ = run(kernel, "create", "grid-12", "--uuid", U1, shell=shell)
    assert (code, kernel.uuids()) == (0, {U1})
    code, err = run(kernel, "create", "no-such-type", shell=shell)
    assert (code, err) == (2, "")


@pytest.mark.parametrize("shell", [">&- 2>&-", ">/dev/full 2>&1"])
def test_without_either_there_is_the_exit_status(cards: FakeSystem, shell: str) -> None:
    assert run(cards, "host", shell=shell) == (74, "")


def test_a_full_disk_under_standard_error_undoes_no_apply(
    mdo_here: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step prints a line, and none can be written."""
    with Path("/dev/full").open("w") as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", full)
        assert main(["apply", mdo_here.spec()]) == 0
    assert mdo_here.system.uuids() == {U1, U2, FOREIGN}


# ---- a signal that comes twice (fault 19) ----


def test_two_signals_of_a_kind_at_once_are_one() -> None:
    interruptions = context.Interruptions()
    assert not interruptions.insists(signal.SIGTERM, 100.0)
    assert not interruptions.insists(signal.SIGTERM, 100.0)
    assert not interruptions.insists(signal.SIGTERM, 100.9)
    assert interruptions.insists(signal.SIGTERM, 101.0)


def test_another_signal_insists_at_once() -> None:
    interruptions = context.Interruptions()
    assert not interruptions.insists(signal.SIGHUP, 100.0)
    assert interruptions.insists(signal.SIGINT, 100.0)


def test_what_is_half_done_is_undone_although_the_signal_came_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(context, "SAME_SECONDS", 3600.0)
    done = []

    async def work(_: Machine) -> None:
        os.kill(os.getpid(), signal.SIGTERM)  # as timeout(1) does: to the process
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            os.kill(os.getpid(), signal.SIGTERM)  # and to its group
            for _turn in range(10):
                await asyncio.sleep(0)
            done.append("undone")
            raise

    with pytest.raises(context.InterruptionError) as caught:
        context.run(work)
    assert (done, caught.value.exit_code) == (["undone"], 143)


# ---- tables on narrow terminals (fault 28) ----

HEADERS = ("uuid", "parent", "type", "group", "remarks")
ROW = (U1, "card0", "grid-12", GROUP, "the driver says a lot of things about this device")


def drawn(width: int, headers: tuple[str, ...], row: tuple[str, ...]) -> list[str]:
    file = io.StringIO()
    console = Console(width=width, file=file)
    output.draw(console, "Devices", headers, [row], {"uuid", "group"})
    return file.getvalue().splitlines()


@pytest.mark.parametrize("width", [40, 80, 100, 120, 200])
def test_an_identifier_stays_in_one_piece(width: int) -> None:
    lines = drawn(width, HEADERS, ROW)
    for word in (U1, GROUP, "grid-12"):
        assert any(word in line for line in lines), width


def test_other_words_wrap_in_a_drawn_table() -> None:
    lines = drawn(80, ("uuid", "remarks"), (U1, ROW[-1]))
    assert max(map(len, lines)) <= 80
    assert any(U1 in line for line in lines)
    assert sum("\u2502" in line for line in lines) > 1  # the remarks take several lines


@pytest.mark.parametrize("width", [*range(60, 70), 100, 130, 160, 200])
def test_a_drawn_table_is_whole(width: int) -> None:
    """rich leaves out what does not fit, and shrinks identifiers before words."""
    headers = ("uuid", "parent", "owner", "remarks")
    lines = drawn(width, headers, (U1, "card0", "ours lab guest:a", ROW[-1]))
    if any("\u2502" in line for line in lines):
        assert max(map(len, lines)) <= width
        text = " ".join(lines)
        assert all(word in text for word in (*headers, U1, "card0", "device"))
    else:
        assert width < 70


def test_a_narrow_terminal_shows_lines_for_each_row() -> None:
    lines = drawn(80, HEADERS, (*ROW[:-1], ""))
    assert lines == [
        "Devices",
        f"\u2022 uuid     {U1}",
        "  parent   card0",
        "  type     grid-12",
        f"  group    {GROUP}",
    ]


def on_terminal(columns: int, argv: list[str], environment: dict[str, str]) -> str:
    """What a command prints on a terminal."""
    master, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, columns))
    environment = {k: v for k, v in environment.items() if k not in {"COLUMNS", "LINES"}}
    with subprocess.Popen(
        argv, env=environment | {"TERM": "dumb"}, stdin=terminal, stdout=terminal, stderr=terminal
    ) as process:
        os.close(terminal)
        text = b""
        while True:
            try:
                chunk = os.read(master, 1 << 16)
            except OSError:  # the other side is closed
                break
            if not chunk:
                break
            text += chunk
        os.close(master)
    assert process.returncode == 0
    return text.decode()


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_uuids_can_be_copied_from_host(cards: FakeSystem, columns: int) -> None:
    cards.groups_of("card1", 8)
    (cards.mdev("card1", "grid-12", U1) / "group_uuid").write_text(GROUP)
    shown = on_terminal(columns, *command(cards, "host"))
    assert U1 in shown
    assert GROUP in shown


# ---- errors and remarks as JSON (fault 29) ----


@pytest.fixture
def as_json() -> Callable[[], None]:
    output.speak_json(on=True)
    yield
    output.speak_json(on=False)


@pytest.mark.usefixtures("as_json")
def test_an_error_has_all_that_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    error = CommandError(
        "QEMU says no", "ask again", command="x", qmp_class="DeviceNotFound", description="no"
    )
    error.subject, error.errno = "guest g", 28
    error.add_note("could not undo: attach")
    output.report(error)
    assert json.loads(capsys.readouterr().err) == {
        "error": {
            "kind": "CommandError",
            "message": "QEMU says no",
            "hint": "ask again",
            "exit_code": 3,
            "subject": "guest g",
            "errno": 28,
            "qmp_class": "DeviceNotFound",
            "outcome": "no effect",
            "notes": ["could not undo: attach"],
            "details": None,
        }
    }


@pytest.mark.usefixtures("as_json")
def test_what_is_not_known_is_null(capsys: pytest.CaptureFixture[str]) -> None:
    output.report(MdoError("it failed"))
    error = json.loads(capsys.readouterr().err)["error"]
    assert {key for key, value in error.items() if value is None} == {
        "hint",
        "subject",
        "errno",
        "qmp_class",
        "outcome",
        "details",
    }


@pytest.mark.usefixtures("as_json")
def test_remarks_are_documents_too_and_progress_is_left_out(
    capsys: pytest.CaptureFixture[str],
) -> None:
    output.remark("by the way")
    output.report(BusyError("held", outcome=Outcome.NO_EFFECT))
    first, second = capsys.readouterr().err.splitlines()
    assert json.loads(first) == {"remark": "by the way"}
    assert json.loads(second)["error"]["outcome"] == "no effect"


def test_an_apply_that_fails_says_so_in_json(mdo_here: CommandLine) -> None:
    mdo_here.system.refuse[U2] = 5
    out, err = mdo_here("apply", mdo_here.spec(), "--json", code=1)
    assert out == ""
    error = json.loads(err)["error"]
    assert (error["exit_code"], error["errno"]) == (1, 5)
    assert error["message"].startswith("cannot create t-1 on card0")
    assert error["notes"] != []


def test_an_error_is_json_for_one_command_only(cards: FakeSystem) -> None:
    assert json.loads(mdo(cards, "create", "x", "--json").stderr)["error"]["exit_code"] == 2
    assert main(["host", "--json", "--x"]) == 2
    assert main(["remove", "x"]) == 2


# ---- messages (fault 26) ----


def test_all_and_names_exclude_each_other(mdo_here: CommandLine) -> None:
    line = mdo_here.refused("adopt", "a", "--all")
    assert line.startswith("--all and names exclude each other")


def test_what_is_lost_has_a_remedy(mdo_here: CommandLine) -> None:
    mdo_here("apply", mdo_here.spec())
    asyncio.run(mdo_here.system.write(str(mdo_here.system.bus / U2 / "remove"), b"1"))
    _, err = mdo_here("host")
    assert f"mdev {U2} of spec lab is lost" in err
    assert "\u2014 mdo apply brings it back" in err
    (lost,) = json.loads(mdo_here("host", "--json")[0])["lost"]
    assert lost["remedy"].startswith("mdo apply brings it back")


def test_a_group_is_shown_by_its_name(mdo_here: CommandLine) -> None:
    mdo_here("create", "t-1", "--parent", "card0", "--group", "peers", "--uuid", U1)
    found = json.loads(mdo_here("host", "--json")[0])
    names = {mdev["uuid"]: mdev["group"] for mdev in found["mdevs"]}
    assert names == {U1: "peers", FOREIGN: None}
    assert [group["name"] for group in found["groups"]] == ["peers"]
    assert "peers" in mdo_here("host")[0]
    assert found["groups"][0]["uuid"] not in mdo_here("host")[0]
