# SPDX-License-Identifier: GPL-2.0-or-later
"""``mdo guest``, ``attach`` and ``detach`` as they are typed, on a real QEMU without mdevs."""

from __future__ import annotations

import json
import os
import pty
import signal
import socket
import subprocess
import sys
import threading
import time
import tty
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from mdev_orchestrator.cli import console
from mdev_orchestrator.cli.main import main
from mdev_orchestrator.machine import Machine
from mdev_orchestrator.qemu.process import RunningGuest, State, find
from unit.fakesys import FakeSystem

Mdo = Callable[..., tuple[int, str, str]]
ABSENT = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"


@pytest.fixture
def mdo(
    place: Path,
    system: FakeSystem,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> Iterator[Mdo]:
    """Run ``mdo`` in this process; gives exit status, output and errors."""
    monkeypatch.setenv("MDO_STATE_DIR", str(place))
    monkeypatch.setenv("MDO_ROOT", str(system.root))
    monkeypatch.setenv("MDO_ACCEL", "tcg")

    def mdo(*arguments: str) -> tuple[int, str, str]:
        try:
            code = main(arguments)
        except SystemExit as end:
            code = int(end.code or 0)
        out, err = capfd.readouterr()
        return code, out, err

    yield mdo
    for directory in (place / "guests").glob("*"):
        mdo("guest", "stop", directory.name, "--deadline", "0", "--force")


def test_start_list_stop(qemu: str, mdo: Mdo, place: Path) -> None:
    uuid = str(uuid4())
    code, out, err = mdo(
        "guest", "start", "g", "--arg=-S", "--uuid", uuid, "--memory", "64MB", "--json"
    )
    assert (code, err) == (0, "")
    shown = json.loads(out)
    assert shown | {"pid": 0, "created": ""} == {
        "name": "g",
        "manager": "mdo",
        "state": "paused",
        "status": "prelaunch",
        "uuid": uuid,
        "pid": 0,
        "memory": 64 << 20,
        "cpus": 1,
        "created": "",
        "mdevs": [],
        "directory": str(place / "guests" / "g"),
        "damage": "",
    }
    code, out, err = mdo("guest", "list", "--json")
    assert json.loads(out) == {"guests": [shown]}
    code, out, err = mdo("guest", "list")
    row = ["g", "mdo", "paused", "prelaunch", str(shown["pid"]), "64M", "1", "0"]
    assert out.split()[-8:] == row
    code, out, err = mdo("guest", "stop", "g", "--deadline", "0.2")
    assert (code, out) == (4, "")
    assert "did not power down within 0.2 s \u2014 it still runs" in err
    code, out, err = mdo("guest", "stop", "g", "--deadline", "0", "--force", "--json")
    assert (code, json.loads(out)) == (0, {"name": "g", "how": "quit"})
    assert mdo("guest", "list") == (0, "", "")
    assert mdo("guest", "list", "--json") == (0, '{"guests":[]}\n', "")


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("guest", "stop", "g"), 2, "no guest is called g"),
        (("guest", "stop", "../g"), 2, "cannot be the name of a guest"),
        (("guest", "console", "g"), 2, "no guest is called g"),
        (("guest", "start", "g", "--memory", "much"), 2, "no amount of memory"),
        # a size is read as in a spec, so that the next fault is the first
        (("guest", "start", "g", "--memory", "512MB", "--kernel", "/no"), 2, "/no does not exist"),
        (("guest", "start", "g", "--hotplug-window", "1 MiB", "--kernel", "/no"), 2, "/no does"),
        (("guest", "start", "g", "--accel", "warp"), 2, "no accelerator"),
        (("guest", "start", "g", "--uuid", "x"), 2, "not a UUID"),
        (("guest", "start", "g", "--mdev", "x"), 2, "not a UUID"),
        (("guest", "start", "g", "--mdev", ABSENT), 2, f"no mdev {ABSENT}"),
        (("guest", "start", "g", "--qemu", "no-such-qemu"), 5, "no program no-such-qemu"),
        (("guest", "start", "g", "--kernel", "/nowhere"), 2, "/nowhere does not exist"),
        (("guest", "start", "a,b"), 2, "cannot be the name of a guest"),
        (("guest", "start"), 2, "missing argument"),
        (("attach", "g", ABSENT), 2, "no guest is called g"),
        (("detach", "g", ABSENT), 2, "no guest is called g"),
        (("detach", "g", "x"), 2, "not a UUID"),
    ],
)
def test_what_cannot_be(
    mdo: Mdo, place: Path, arguments: tuple[str, ...], code: int, said: str
) -> None:
    result = mdo(*arguments)
    assert result[:2] == (code, "")
    assert said in result[2]
    assert result[2].count("\n") == 1
    assert not list(place.glob("guests/*"))


def test_a_failed_start_says_why_and_not_how(
    qemu: str, mdo: Mdo, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command line is long, and the reason drowns in it."""
    failing = ("guest", "start", "g", "--arg=-device", "--arg=nonsense")
    code, out, err = mdo(*failing)
    assert (code, out) == (3, "")
    assert err == (
        "mdo: guest g: QEMU ended with status 1: -device nonsense: 'nonsense' is not a valid "
        "device model name; nothing was changed \u2014 --debug shows how QEMU was run\n"
    )
    monkeypatch.setenv("MDO_DEBUG", "1")
    assert f"QEMU was run as: {qemu} -name guest=g" in mdo(*failing)[2]
    assert list(place.glob("guests/*")) == []


def test_qemu_warns(qemu: str, mdo: Mdo) -> None:
    code, out, err = mdo("guest", "start", "g", "--arg=-S", "--arg=-cpu", "--arg=qemu64,+vmx")
    assert code == 0
    assert out.startswith("g runs as process ")
    assert err.startswith("mdo: guest g: QEMU says: ")
    assert "vmx" in err


def test_attach_and_detach_of_what_is_not_there(qemu: str, mdo: Mdo, system: FakeSystem) -> None:
    system.parent("card0")
    system.type("card0", "t-1", 0)
    mdo("guest", "start", "g", "--arg=-S")
    code, _, err = mdo("attach", "g", ABSENT)
    assert (code, f"there is no mdev {ABSENT}" in err) == (2, True)
    code, _, err = mdo("attach", "g", ABSENT, "--parent", "card0")
    assert (code, "--parent goes with a type" in err) == (2, True)
    code, _, err = mdo("attach", "g", "t-2")
    assert (code, "t-2" in err) == (2, True)
    code, _, err = mdo("attach", "g", "t-1")
    assert (code, "t-1" in err) == (2, True)
    code, _, err = mdo("detach", "g", ABSENT)
    assert (code, f"guest g has no mdev {ABSENT}" in err) == (2, True)


def test_a_damaged_guest_is_shown(mdo: Mdo, place: Path) -> None:
    (place / "guests" / "g").mkdir(parents=True)
    (place / "guests" / "g" / "record.json").write_bytes(b"\xff")
    code, out, err = mdo("guest", "list")
    assert code == 0
    assert "damaged" in out
    assert "record.json is damaged" in err
    [shown] = json.loads(mdo("guest", "list", "--json")[1])["guests"]
    assert shown["state"] == "damaged"
    assert (shown["uuid"], shown["pid"], shown["mdevs"]) == (None, None, None)
    assert mdo("guest", "stop", "g")[0] == 2
    assert mdo("guest", "stop", "g", "--force")[:2] == (
        0,
        "g had ended already; its files are removed\n",
    )


@pytest.mark.parametrize("held", ["by another watcher", "by SIGSTOP"])
def test_a_watch_that_waits_for_its_turn_ends_quietly(
    qemu: str, mdo: Mdo, place: Path, system: FakeSystem, held: str
) -> None:
    """Fault 21: ctrl-C printed a hundred lines of traceback."""
    mdo("guest", "start", "g", "--arg=-S")
    found = find(Machine(state=place), "g")
    assert found.record
    first = socket.socket(socket.AF_UNIX)
    first.connect(str(found.watch_socket))
    if held == "by SIGSTOP":
        os.kill(found.record.pid, signal.SIGSTOP)
    watching = subprocess.Popen(
        [sys.executable, "-m", "mdev_orchestrator.cli.main", "watch"],
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    waiting = f"{found.watch_socket}\n"
    while Path("/proc/net/unix").read_text().count(waiting) < 3:  # QEMU's two, and the watcher's
        time.sleep(0.05)
    watching.send_signal(signal.SIGINT)
    _, err = watching.communicate()
    first.close()
    os.kill(found.record.pid, signal.SIGCONT)
    assert (watching.returncode, err) == (130, b"mdo: interrupted\n")


def test_the_log_and_a_console_without_a_terminal(qemu: str, mdo: Mdo, place: Path) -> None:
    mdo("guest", "start", "g", "--arg=-S")
    log = find(Machine(state=place), "g").console_log
    log.write_bytes(b"hello\xff\n")
    code, _, err = mdo("guest", "console", "g")
    assert (code, "needs a terminal" in err) == (2, True)
    assert mdo("guest", "console", "--log", "g")[0] == 0


def test_log_is_passed_on_as_it_is(place: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    (place / "console.log").write_bytes(b"hello\xff\n")
    console.print_log(RunningGuest("g", place, State.GONE))
    assert capfdbinary.readouterr().out == b"hello\xff\n"


def test_copying_ends_at_the_escape_key() -> None:
    """Keys arrive, output comes back, and what is typed after ctrl-] goes nowhere."""
    guest, ours = socket.socketpair()
    master, terminal = pty.openpty()
    os.set_blocking(guest.fileno(), True)
    heard: list[bytes] = []

    def play() -> None:
        guest.sendall(b"login: ")
        heard.append(guest.recv(100))
        os.write(master, b"\x1dignored")
        while chunk := guest.recv(100):
            heard.append(chunk)

    tty.setraw(terminal)
    player = threading.Thread(target=play)
    player.start()
    os.write(master, b"root")
    console.copy(ours, terminal, terminal)
    ours.close()
    player.join()
    assert heard == [b"root"]
    assert os.read(master, 100) == b"login: "
    for descriptor in (master, terminal):
        os.close(descriptor)
    guest.close()


def test_copying_ends_with_the_guest() -> None:
    guest, ours = socket.socketpair()
    keys, typed = os.pipe()
    shown, screen = os.pipe()
    guest.sendall(b"bye")
    guest.close()
    console.copy(ours, keys, screen)
    assert os.read(shown, 100) == b"bye"
    ours.close()
    for descriptor in (keys, typed, shown, screen):
        os.close(descriptor)
