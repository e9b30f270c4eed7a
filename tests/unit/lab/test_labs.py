# SPDX-License-Identifier: GPL-2.0-or-later
"""Labs as they are on disk: found, removed, or refused with a reason."""

import json
import os
import shlex
import subprocess
from dataclasses import asdict
from pathlib import Path

import pytest

from mdev_lab import kernels, l1, labs
from mdev_orchestrator.errors import BusyError, HostError, RequestError, UnknownError
from mdev_orchestrator.system.processes import start_time


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MDO_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("MDO_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path


def record(name: str, pid: int, start_time: int) -> Path:
    lab = labs.Lab(name, pid, start_time, "6.12.1-amd64", "tcg", 0.0, {})
    lab.directory.mkdir(parents=True)
    (lab.directory / "lab.json").write_text(json.dumps(asdict(lab)))
    return lab.directory


def mine() -> int:
    began = start_time(os.getpid())
    assert began is not None
    return began


def test_no_labs_at_all() -> None:
    assert labs.find_all() == []


def test_a_running_lab_is_found_again() -> None:
    record("one", os.getpid(), mine())
    assert labs.find("one").pid == os.getpid()


def test_a_lab_whose_process_ended_is_removed() -> None:
    directory = record("gone", os.getpid(), mine() + 1)
    (directory / "exec-0.sock").touch()
    assert labs.find_all() == []
    assert not any(directory.parent.iterdir())


def test_what_a_killed_start_left_is_removed(places: Path) -> None:
    half = places / "state/labs/half"
    half.mkdir(parents=True)
    (half / labs.STARTER).write_text(f"{os.getpid()} {mine() + 1}\n")
    assert labs.find_all() == []
    assert not half.exists()


def test_a_lab_that_is_being_brought_up_is_left_alone(places: Path) -> None:
    directory = places / "state/labs/young"
    directory.parent.mkdir(parents=True)
    labs.claim(directory)
    assert labs.find_all() == []
    assert directory.exists()
    with pytest.raises(BusyError, match="young is being brought up"):
        labs.claim(directory)
    assert [path.name for path in directory.parent.iterdir()] == ["young"]


def test_a_lab_brought_up_while_one_of_the_same_name_is_removed_survives() -> None:
    directory = record("phoenix", os.getpid(), mine())
    labs.remove_directory(directory, inode=directory.stat().st_ino + 1)
    assert labs.find("phoenix").directory == directory


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", '{"name": 1', '{"name": "x", "odd": 2}'])
def test_a_damaged_record_is_named_and_kept(text: str) -> None:
    directory = record("odd", os.getpid(), mine())
    (directory / "lab.json").write_text(text)
    record("good", os.getpid(), mine())
    assert [lab.name for lab in labs.find_all()] == ["good"]
    with pytest.raises(HostError, match="record of lab odd is damaged"):
        labs.find("odd")
    assert directory.exists()


def test_a_lab_that_is_not_up_is_named_with_the_remedy() -> None:
    with pytest.raises(UnknownError) as caught:
        labs.find("nope")
    assert "mdo lab up --name nope" in caught.value.hint


@pytest.mark.parametrize("name", ["", "-x", "a/b", "..", "a b", "x" * 33, "a,b", "a\n"])
def test_a_name_that_could_reach_out_of_its_directory_is_refused(name: str) -> None:
    with pytest.raises(RequestError):
        labs.check_name(name)


def test_no_lab_in_a_lab(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MDO_LAB", "outer")
    with pytest.raises(RequestError, match="inside a lab already"):
        l1.up("inner")


def test_no_lab_without_qemu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MDO_LAB", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostError, match="qemu-system-x86_64 is not installed"):
        l1.up("any")


def test_paths_with_blanks_and_commas_survive_init_and_command_line() -> None:
    kernel = kernels.Kernel("6.12", "6.12.1-amd64", Path("/odd place/a,b"))
    script = l1.init_script(kernel, ["insmod", "/odd place/m.ko"])
    assert shlex.quote(str(kernel.modules)) in script
    argv = l1.machine_arguments("one", kernel, "tcg", "4G")
    assert str(kernel.image) in argv


def test_a_zombie_does_not_count_as_running() -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert start_time(pid) is None
    os.waitpid(pid, 0)


@pytest.mark.parametrize("bound", [False, True])
def test_a_program_waits_for_its_starter_and_does_not_begin_without(bound: bool) -> None:
    command = l1.gated(["echo", "begun"], bound=bound)
    told = subprocess.run(command, input=b"go\n", capture_output=True, check=False)
    assert (told.returncode, told.stdout) == (0, b"begun\n")
    untold = subprocess.run(command, input=b"", capture_output=True, check=False)
    assert (untold.returncode, untold.stdout) == (1, b"")
    stranger = ["sh", "-c", '"$@"; exit $?', "sh", *command]
    orphan = subprocess.run(stranger, input=b"go\n", capture_output=True, check=False)
    assert (orphan.returncode, orphan.stdout) == (1, b"")


def test_a_lab_whose_starter_was_killed_while_it_booted_is_ended() -> None:
    with subprocess.Popen(["sleep", "100"]) as process:
        began = start_time(process.pid)
        assert began is not None
        directory = record("orphan", process.pid, began)
        text = (directory / labs.RECORD).read_text().replace("true", "false")
        (directory / labs.RECORD).write_text(text)
        (directory / labs.STARTER).write_text(f"{os.getpid()} {mine() + 1}\n")
        assert labs.find_all() == []
        assert start_time(process.pid) is None
    assert not directory.exists()
