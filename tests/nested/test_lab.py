# SPDX-License-Identifier: GPL-2.0-or-later
"""What a user does with a lab, from the host: a real L1, brought up once for this file."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MDO = [sys.executable, "-m", "mdev_orchestrator.cli.main"]
NAME = f"nested-{os.getpid()}"


def mdo(*words: str, data: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [*MDO, *words], cwd=ROOT, capture_output=True, timeout=300, input=data, check=False
    )


def inside(*command: str, data: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return mdo("lab", "exec", "--name", NAME, "--", *command, data=data)


def labs() -> list[str]:
    return [lab["name"] for lab in json.loads(mdo("lab", "status", "--json").stdout)["labs"]]


def processes_of(name: str) -> list[str]:
    """Command lines of every QEMU that is this lab's."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if f"guest=mdo-lab-{name} " in text:
            found.append(text)
    return found


def directory_of(name: str) -> Path:
    from mdev_lab import labs

    return labs.labs_dir() / name


@pytest.fixture(scope="module", autouse=True)
def lab() -> Iterator[None]:
    done = mdo("lab", "up", "--name", NAME)
    assert done.returncode == 0, done.stderr.decode()
    yield
    assert mdo("lab", "down", "--name", NAME).returncode == 0
    assert not processes_of(NAME)
    assert not directory_of(NAME).exists()


def test_a_second_up_finds_it() -> None:
    before = processes_of(NAME)
    done = mdo("lab", "up", "--name", NAME)
    assert done.returncode == 0
    assert b"is up" in done.stdout
    assert processes_of(NAME) == before
    assert len(before) == 1


def test_a_second_up_with_another_kernel_is_refused() -> None:
    done = mdo("lab", "up", "--name", NAME, "--kernel", "6.1")
    assert done.returncode == 2
    assert b"is up with kernel 6.12" in done.stderr


def test_status_streams_and_exit_code_pass_through() -> None:
    done = inside("sh", "-c", "cat; echo wrong >&2; exit 7", data=b"said\n")
    assert (done.returncode, done.stdout, done.stderr) == (7, b"said\n", b"wrong\n")


def test_a_million_bytes_come_back_as_they_went() -> None:
    sent = os.urandom(1_000_000)
    assert inside("cat", data=sent).stdout == sent


def test_a_command_that_is_not_there() -> None:
    done = inside("no-such-command")
    assert done.returncode == 127
    assert done.stderr == b"mdo: no-such-command: command not found\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_the_command(number: signal.Signals) -> None:
    word = f"mdo-test-{number}"
    script = f"echo ready; exec -a {word} sleep 100"
    with subprocess.Popen(
        [*MDO, "lab", "exec", "--name", NAME, "--", "bash", "-c", script],
        cwd=ROOT,
        stdout=subprocess.PIPE,
    ) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == b"ready\n"
        client.send_signal(number)
        assert client.wait(60) == 128 + number
    assert word.encode() not in inside("ps", "ax", "-o", "args").stdout


def test_a_client_that_is_killed_takes_its_command_with_it() -> None:
    with subprocess.Popen(
        [*MDO, "lab", "exec", "--name", NAME, "--", "bash", "-c", "echo $$; exec sleep 100"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
    ) as client:
        assert client.stdout is not None
        pid = client.stdout.readline().decode().strip()
        client.kill()
    done = inside(
        "sh", "-c", f"for i in $(seq 100); do [ -e /proc/{pid} ] || exit 0; sleep .1; done"
    )
    assert done.returncode == 0
    assert inside("test", "-e", f"/proc/{pid}").returncode == 1


def test_commands_run_side_by_side() -> None:
    clients = [
        subprocess.Popen(
            [*MDO, "lab", "exec", "--name", NAME, "--", "cat"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for _ in range(4)
    ]
    outputs = [client.communicate(b"%d" % n, timeout=60)[0] for n, client in enumerate(clients)]
    assert outputs == [b"0", b"1", b"2", b"3"]


def test_a_terminal_when_asked_for() -> None:
    import pty

    controller, terminal = pty.openpty()
    command = [*MDO, "lab", "exec", "--tty", "--name", NAME, "--", "sh", "-c", "tty && stty size"]
    with subprocess.Popen(command, cwd=ROOT, stdin=terminal, stdout=subprocess.PIPE) as client:
        assert client.stdout is not None
        said = client.stdout.read().decode().split()
        assert client.wait(60) == 0
    os.close(controller)
    os.close(terminal)
    assert said[0].startswith("/dev/pts/")


def test_results_are_found_outside_and_edits_inside(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    place = ROOT / "build" / NAME
    place.mkdir(parents=True)
    try:
        (place / "edit").write_text("first")
        assert inside("cat", str(place / "edit")).stdout == b"first"
        (place / "edit").write_text("second edit")
        assert inside("cat", str(place / "edit")).stdout == b"second edit"
        assert inside("sh", "-c", f"echo result > {place}/result").returncode == 0
        assert (place / "result").read_text() == "result\n"
    finally:
        for file in place.iterdir():
            file.unlink()
        place.rmdir()


def test_what_is_written_elsewhere_stays_inside(tmp_path: Path) -> None:
    probe = Path("/usr") / f"{NAME}.probe"
    assert inside("touch", str(probe)).returncode == 0
    assert inside("test", "-e", str(probe)).returncode == 0
    assert not probe.exists()


def test_temporary_files_are_not_among_the_hosts() -> None:
    done = inside("sh", "-c", 'ls -A "$TMPDIR" && mktemp')
    assert done.stdout.decode().startswith("/run/tmp/tmp.")


def test_the_seed_s_machine_is_there() -> None:
    done = inside("sh", "-c", "ls /sys/class/mdev_bus; ls /dev/vfio/vfio /dev/kvm; uname -r")
    words = done.stdout.decode().split()
    assert {"grid0", "igd0", "/dev/vfio/vfio", "/dev/kvm"} <= set(words)
    assert words[-1].startswith("6.12.")


def test_a_lab_whose_parents_are_pci_functions() -> None:
    done = mdo("lab", "run", "--name", f"{NAME}-p", "--pci", "2", "--", *MDO, "host", "--json")
    assert done.returncode == 0, done.stderr.decode()
    parents = {parent["name"]: parent for parent in json.loads(done.stdout)["parents"]}
    assert [*parents] == [f"0000:00:{number}.0" for number in (10, 11, 12, 13)]
    assert parents["0000:00:13.0"]["path"] == "/sys/devices/pci0000:00/0000:00:13.0"
    assert "mvgpu-128M" in {type_["id"] for type_ in parents["0000:00:13.0"]["types"]}


def test_a_lab_that_is_killed_is_removed() -> None:
    name = f"{NAME}-k"
    try:
        assert mdo("lab", "up", "--name", name).returncode == 0
        listed = json.loads(mdo("lab", "status", "--json").stdout)["labs"]
        (pid,) = (lab["pid"] for lab in listed if lab["name"] == name)
        os.kill(pid, signal.SIGKILL)
        leaves_nothing(name)
    finally:
        mdo("lab", "down", "--name", name)


def test_an_up_that_is_killed_leaves_nothing_after_the_next_command() -> None:
    name = f"{NAME}-u"
    assert interrupted(["lab", "up", "--name", name], "booting", signal.SIGKILL)[0] < 0
    assert name not in labs()
    leaves_nothing(name)


def test_a_kernel_that_cannot_boot_says_so_and_leaves_nothing() -> None:
    name = f"{NAME}-m"
    done = mdo("lab", "up", "--name", name, "--memory", "nonsense")
    assert done.returncode == 3
    assert b"nonsense" in done.stderr
    assert not directory_of(name).exists()


def leaves_nothing(name: str) -> None:
    """After SIGKILL the kernel ends the machine, and the next command removes its files."""
    deadline = time.monotonic() + 30
    while processes_of(name):
        assert time.monotonic() < deadline
    assert name not in labs()
    assert not directory_of(name).exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("moment", ["booting", "up after"])
def test_a_run_that_is_interrupted_leaves_nothing(number: signal.Signals, moment: str) -> None:
    command = ["lab", "run", "--name", f"{NAME}-i", "--", "sleep", "100"]
    assert interrupted(command, moment, number)[0] in {128 + number, -number}
    leaves_nothing(f"{NAME}-i")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_demo_that_is_interrupted_leaves_nothing(number: signal.Signals) -> None:
    status, pid = interrupted(["lab", "demo"], "boot the guest's Linux", number)
    assert status in {128 + number, -number}
    leaves_nothing(f"demo-{pid}")


def interrupted(command: list[str], moment: str, number: signal.Signals) -> tuple[int, int]:
    """Signal a command when it says a word; its exit status and process id."""
    with subprocess.Popen([*MDO, *command], cwd=ROOT, stderr=subprocess.PIPE) as client:
        assert client.stderr is not None
        said = b""
        while moment.encode() not in said:
            line = client.stderr.readline()
            assert line, said.decode()  # it ended by itself: what did it say?
            said += line
        client.send_signal(number)
        client.stderr.read()
        return client.wait(60), client.pid
