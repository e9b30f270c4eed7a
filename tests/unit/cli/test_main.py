# SPDX-License-Identifier: GPL-2.0-or-later
"""The command line as a user meets it: a process of its own, on a machine of files."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mdev_orchestrator.cli import output
from mdev_orchestrator.cli.context import SAME_SECONDS
from mdev_orchestrator.errors import MdoError
from unit.fakesys import FakeSystem

U1 = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"
U2 = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1002"
GROUP = "aaaaaaaa-1111-4222-8333-444444444444"
CODE = "from mdev_orchestrator.cli.main import main; raise SystemExit(main())"


def command(system: FakeSystem, *arguments: str) -> tuple[list[str], dict[str, str]]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MDO_")}
    environment["MDO_ROOT"] = str(system.root)
    environment["MDO_STATE_DIR"] = str(system.root / "state")
    return [sys.executable, "-c", CODE, *arguments], environment


def mdo(system: FakeSystem, *arguments: str) -> subprocess.CompletedProcess[str]:
    argv, environment = command(system, *arguments)
    return subprocess.run(
        argv, env=environment, capture_output=True, text=True, check=False, timeout=60
    )


def shape_of_first(system: FakeSystem) -> dict[str, object]:
    """What is shown as JSON of a device with UUID U1 of type grid-12, the first of its host."""
    return {
        "uuid": U1,
        "path": str(system.bus / U1),
        "parent": "card1",
        "type": "grid-12",
        "device_api": "vfio-pci",
        "iommu_group": 1,
        "cdev": None,
        "group_uuid": None,
        "online": None,
        "params": None,
        "damage": [],
    }


def refused(done: subprocess.CompletedProcess[str], code: int) -> str:
    """Standard error of a command that failed as it should: one line, nothing else."""
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("mdo: ")
    return line.removeprefix("mdo: ")


@pytest.fixture
def cards(system: FakeSystem) -> FakeSystem:
    for name, free in (("card0", 16), ("card1", 9)):
        system.parent(name)
        system.type(name, "grid-11", free)
    system.type("card1", "grid-12", 8, description="num_heads=2\n")
    return system


@pytest.fixture
def kernel(cards: FakeSystem) -> Iterator[FakeSystem]:
    """The machine of files with something alive behind card1's ``grid-12/create``."""
    create = cards.types("card1") / "grid-12" / "create"
    create.unlink()
    os.mkfifo(create)
    fd = os.open(create, os.O_RDWR)

    def serve() -> None:
        while (uuid := os.read(fd, 36).decode()) != "stop":
            cards.mdev("card1", "grid-12", uuid)

    thread = threading.Thread(target=serve)
    thread.start()
    yield cards
    os.write(fd, b"stop")
    thread.join()
    os.close(fd)


# ---- the program ----


def test_help_names_every_command(system: FakeSystem) -> None:
    done = mdo(system, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    for name in ("host", "create", "remove", "guest", "attach", "detach", "watch", "doctor", "lab"):
        assert f"\n  {name} " in done.stdout


@pytest.mark.parametrize("name", ["host", "create", "remove", "watch", "doctor"])
def test_every_command_has_help(system: FakeSystem, name: str) -> None:
    done = mdo(system, name, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"mdo {name}" in done.stdout
    assert "--json" in done.stdout


def test_nothing_to_do_is_a_usage_error_with_help(system: FakeSystem) -> None:
    done = mdo(system)
    assert done.returncode == 2
    assert "Usage: mdo" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["creat"], "no such command: creat \u2014 did you mean create?"),
        (["--frob"], "no such option: --frob \u2014 mdo --help"),
        (["create"], "missing argument 'TYPE' \u2014 mdo create --help"),
        (["create", "t", "--xyzzy"], "no such option: --xyzzy \u2014 mdo create --help"),
        (["remove"], "missing argument 'UUID...' \u2014 mdo remove --help"),
    ],
)
def test_usage_errors_are_one_line(system: FakeSystem, arguments: list[str], line: str) -> None:
    assert refused(mdo(system, *arguments), 2) == line


def test_version(system: FakeSystem) -> None:
    assert mdo(system, "--version").stdout.startswith("mdo ")


def test_a_bug_is_one_line_and_a_traceback_only_on_request(cards: FakeSystem) -> None:
    argv, environment = command(cards, "host", "--json")
    # a msgspec that cannot be used stands for any bug
    broken = cards.root / "broken" / "msgspec"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ZeroDivisionError('why')\n")
    path = environment.get("PYTHONPATH", "")
    environment["PYTHONPATH"] = f"{broken.parent}{os.pathsep}{path}"

    def run(**extra: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            argv, env=environment | extra, capture_output=True, text=True, check=False
        )

    line = "internal error: ZeroDivisionError: why \u2014 run again with mdo --debug host"
    assert refused(run(), 70) == line
    assert "Traceback" in run(MDO_DEBUG="1").stderr


def test_a_reader_that_leaves_is_no_error(cards: FakeSystem) -> None:
    argv, environment = command(cards, "host")
    read, write = os.pipe()
    os.close(read)
    with subprocess.Popen(argv, env=environment, stdout=write, stderr=subprocess.PIPE) as process:
        os.close(write)
        assert process.communicate()[1] == b""
        assert process.returncode == 141


# ---- mdo host ----


def test_host_lists_parents_types_and_devices_with_holders(cards: FakeSystem) -> None:
    cards.mdev("card1", "grid-12", U1)
    cards.process(41, "qemu-system-x86", ["qemu", "-name", "guest=g1"], ["/dev/vfio/1"])
    done = mdo(cards, "host")
    assert (done.returncode, done.stderr) == (0, "")
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["card1", "grid-12", "Name", "of", "grid-12", "8", "1", "vfio-pci"] in lines
    assert [
        U1,
        "card1",
        "grid-12",
        "1",
        "-",
        "-",
        "foreign",
        "guest",
        "'g1'",
        "(pid",
        "41)",
    ] in lines


def test_host_as_json(cards: FakeSystem) -> None:
    cards.mdev("card1", "grid-12", U1)
    cards.process(41, "qemu-system-x86", ["qemu", "-name", "guest=g1"], ["/dev/vfio/1"])
    shape = json.loads(mdo(cards, "host", "--json").stdout)
    assert list(shape) == [
        "mdev_bus",
        "parents",
        "mdevs",
        "lost",
        "groups",
        "unseen_processes",
        "damage",
    ]
    assert shape["groups"] == []
    assert shape["parents"][1] == {
        "name": "card1",
        "path": str(cards.root / "sys/devices/virtual/fake/card1"),
        "types": [
            {
                "id": id_,
                "name": f"Name of {id_}",
                "available_instances": free,
                "used_instances": used,
                "device_api": "vfio-pci",
                "description": description,
                "attributes": {},
                "damage": [],
            }
            for id_, free, used, description in (
                ("grid-11", 9, 0, None),
                ("grid-12", 8, 1, "num_heads=2"),
            )
        ],
        "numa_node": None,
        "links": None,
        "links_free": None,
        "damage": [],
    }
    assert shape["mdevs"] == [
        shape_of_first(cards)
        | {
            "holders": [{"pid": 41, "comm": "qemu-system-x86", "guest": "g1"}],
            "owner": "foreign",
            "spec": None,
            "for": None,
            "group": None,
        }
    ]
    assert shape["lost"] == []


def test_host_shows_groups_states_and_links(cards: FakeSystem) -> None:
    cards.groups_of("card1", 8)
    for uuid in (U1, U2):
        (cards.mdev("card1", "grid-12", uuid) / "group_uuid").write_text(GROUP)
    lines = [line.split() for line in mdo(cards, "host").stdout.splitlines()]
    assert ["card1", "8", "8"] in lines
    assert [U1, "card1", "grid-12", "1", "offline", GROUP, "foreign"] in lines
    shape = json.loads(mdo(cards, "host", "--json").stdout)
    assert shape["groups"] == [
        {"uuid": GROUP, "name": None, "parent": "card1", "members": [U1, U2], "online": False}
    ]
    assert (shape["parents"][1]["links"], shape["parents"][1]["links_free"]) == (8, 8)
    assert [mdev["group_uuid"] for mdev in shape["mdevs"]] == [GROUP, GROUP]
    assert [(mdev["online"], mdev["params"]) for mdev in shape["mdevs"]] == [(False, "")] * 2


def test_host_shows_where_a_parent_is_if_that_matters(cards: FakeSystem) -> None:
    (cards.parents / "card0" / "numa_node").write_text("-1\n")
    assert "NUMA" not in mdo(cards, "host").stdout
    (cards.parents / "card1" / "numa_node").write_text("1\n")
    shown = mdo(cards, "host").stdout
    assert "NUMA NODE" in shown
    assert ["card1", "1"] in [line.split() for line in shown.splitlines()]
    parents = json.loads(mdo(cards, "host", "--json").stdout)["parents"]
    assert [parent["numa_node"] for parent in parents[:2]] == [None, 1]


def test_host_shows_damage_and_everything_else(cards: FakeSystem) -> None:
    (cards.types("card0") / "grid-11" / "available_instances").write_bytes(b"\xff")
    done = mdo(cards, "host")
    assert done.returncode == 0
    assert "available_instances is not UTF-8" in done.stdout
    assert "grid-12" in done.stdout


def test_host_without_mdev_says_what_is_missing(system: FakeSystem) -> None:
    done = mdo(system, "host")
    assert (done.returncode, done.stdout) == (0, "")
    assert (
        done.stderr == "mdo: this host has no mdev bus \u2014 modprobe mdev, and see mdo doctor\n"
    )
    assert json.loads(mdo(system, "host", "--json").stdout)["mdev_bus"] is False


# ---- mdo create, mdo remove ----


def test_create_prints_the_uuids(kernel: FakeSystem) -> None:
    done = mdo(kernel, "create", "grid-12", "-n", "3", "--uuid", U1)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0] == U1
    assert set(lines) == kernel.uuids()
    assert len(lines) == 3


def test_create_as_json(kernel: FakeSystem) -> None:
    shape = json.loads(mdo(kernel, "create", "grid-12", "--uuid", U1, "--json").stdout)
    assert shape == {"created": [shape_of_first(kernel)]}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["grid-12", "--uuid", "x"], "'x' is not a UUID"),
        (["grid-12", "--uuid", U1], "exists already under parent card0 as grid-11"),
        (["grid-12", "--uuid", U2, "--uuid", U2], "given 2 times"),
        (["grid-13"], "no parent offers a type 'grid-13' \u2014 did you mean"),
        (["grid-12", "--parent", "card9"], "there is no parent 'card9' \u2014 did you mean"),
        (["grid-11"], "several parents offer grid-11: card0 (16 free), card1 (9 free)"),
        (["grid-12", "-n", "17"], "8 would; nothing was created"),
        (["grid-12", "-n", "0"], "cannot create 0 devices"),
        (["grid-12", "--group", "no such thing"], "is neither a UUID nor the name of a start"),
        (["grid-12", "--set", "x"], "--set 'x' has no '='"),
        (["grid-12", "--set", "../x=1"], "'../x' does not name a file of an mdev"),
        (["grid-12", "-n", "many"], "invalid value for '-n' / '--count'"),
    ],
)
def test_bad_input_creates_nothing(cards: FakeSystem, arguments: list[str], words: str) -> None:
    cards.mdev("card0", "grid-11", U1)
    assert words in refused(mdo(cards, "create", *arguments), 2)
    assert cards.uuids() == {U1}


def test_create_without_mdev(system: FakeSystem) -> None:
    line = refused(mdo(system, "create", "grid-12"), 5)
    assert line.startswith("this host has no mdev bus \u2014 modprobe mdev")


@contextlib.contextmanager
def creating(cards: FakeSystem) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """``mdo create`` whose driver is silent until the file that it writes is read."""
    create = cards.types("card1") / "grid-12" / "create"
    create.unlink()
    os.mkfifo(create)
    argv, environment = command(cards, "create", "grid-12", "--uuid", U1)
    with subprocess.Popen(argv, env=environment, stderr=subprocess.PIPE) as process:
        try:
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
            while not children.read_text():  # the one that writes
                assert process.poll() is None
                time.sleep(0.02)
            time.sleep(0.1)
            yield process, create
        finally:
            process.kill()


def is_pending(pid: int, number: int) -> bool:
    """Whether a process has not yet taken notice of a signal."""
    status = Path(f"/proc/{pid}/status").read_text()
    pending = status.partition("ShdPnd:")[2].split()[0]
    return bool(int(pending, 16) >> (number - 1) & 1)


SIGNALS = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]


@pytest.mark.parametrize(("number", "status"), SIGNALS)
def test_interrupted_a_creation_is_undone(cards: FakeSystem, number: int, status: int) -> None:
    with creating(cards) as (process, create):
        process.send_signal(number)
        assert create.read_bytes() == U1.encode()
        assert process.stderr is not None
        assert process.stderr.read() == b"mdo: interrupted; all was undone\n"
        assert process.wait() == status


@pytest.mark.parametrize(("number", "status"), SIGNALS)
def test_interrupted_twice_it_stops_at_once(cards: FakeSystem, number: int, status: int) -> None:
    with creating(cards) as (process, create):
        process.send_signal(number)
        while is_pending(process.pid, number):
            time.sleep(0.01)
        time.sleep(SAME_SECONDS + 0.2)  # at once it would be the same interruption
        process.send_signal(number)
        assert process.wait(60) == status  # its driver would be silent for ever
        assert process.stderr is not None
        line = process.stderr.readline()
        assert line.startswith(b"mdo: interrupted again: stopped at once; mdo recover"), line
        assert create.read_bytes() == U1.encode()  # what had begun goes on by itself
        done = mdo(cards, "recover")
        assert (done.returncode, done.stderr.count("undone: create grid-12")) == (0, 1), done


@pytest.mark.parametrize(
    ("uuids", "words"),
    [
        (["x"], "'x' is not a UUID"),
        ([U2], f"there is no mdev {U2} \u2014 did you mean {U1}?"),
        ([U1], f"mdev {U1} is held by guest 'g1' (pid 41) \u2014 mdo did not start that guest"),
    ],
)
def test_bad_input_removes_nothing(cards: FakeSystem, uuids: list[str], words: str) -> None:
    cards.mdev("card0", "grid-11", U1)
    cards.process(41, "qemu-system-x86", ["qemu", "-name", "guest=g1"], ["/dev/vfio/1"])
    assert words in refused(mdo(cards, "remove", *uuids), 2)
    assert cards.uuids() == {U1}


def test_a_removal_that_the_kernel_does_not_end(cards: FakeSystem) -> None:
    cards.mdev("card0", "grid-11", U1)
    line = refused(mdo(cards, "remove", U1, "--deadline", "0.2"), 4)
    assert f"mdev {U1} was not removed within 0.2 s" in line


# ---- mdo doctor ----


def stand_in(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


QEMU = """case $1 in
-version) echo QEMU emulator version 7.2.22;;
*) echo 'name "vfio-pci", bus PCI';;
esac"""


def test_doctor_on_a_bare_host_names_every_remedy(system: FakeSystem) -> None:
    done = mdo(system, "doctor", "--qemu", "no-such-qemu")
    assert done.returncode == 5
    assert done.stderr == ""
    for words in ("modprobe", "vfio", "no program no-such-qemu", "apt-get install"):
        assert words in done.stdout


def test_doctor_on_a_complete_host(cards: FakeSystem) -> None:
    for node in ("kvm", "vfio/vfio"):
        (cards.root / "dev" / node).write_text("")
    for module in ("vfio", "vfio_iommu_type1"):
        (cards.root / "sys/module" / module).mkdir(parents=True)
    qemu = stand_in(cards.root / "qemu", QEMU)
    done = mdo(cards, "doctor", "--qemu", qemu, "--json")
    findings = json.loads(done.stdout)["findings"]
    assert {finding["level"] for finding in findings} == {"ok"}
    assert done.returncode == 0
    assert list(findings[0]) == ["level", "subject", "message", "remedy"]


@pytest.mark.parametrize(
    ("script", "words"),
    [("echo nonsense", "is no QEMU"), ("exit 1", "is no QEMU"), ("echo version 7.2", "vfio-pci")],
)
def test_doctor_and_a_qemu_that_is_none(cards: FakeSystem, script: str, words: str) -> None:
    qemu = stand_in(cards.root / "qemu", script)
    done = mdo(cards, "doctor", "--qemu", qemu)
    assert done.returncode == 5
    assert words in done.stdout


# ---- mdo watch ----


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_watch_ends_when_told(cards: FakeSystem, number: signal.Signals, code: int) -> None:
    argv, environment = command(cards, "watch", "--json")
    with subprocess.Popen(
        argv, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline()) == {"event": "rescan", "reason": "listening"}
        process.send_signal(number)
        error = json.loads(process.communicate()[1])["error"]
        assert (error["message"], error["exit_code"]) == ("interrupted", code)
        assert process.returncode == code


def test_nothing_that_others_wrote_reaches_the_terminal_as_a_command(
    capsys: pytest.CaptureFixture[str],
) -> None:
    error = MdoError("the driver says \x1b[2J", "see\u202e dmesg\r\n, \ud800 too")
    error.add_note("and \x07")
    output.report(error)
    said = capsys.readouterr().err
    expected = r"mdo: the driver says \x1b[2J; and \x07 — see\u202e dmesg , \ud800 too"
    assert said == expected + "\n"
