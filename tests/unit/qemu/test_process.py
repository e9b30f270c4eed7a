# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest as a process: started, found again by what is on disk, stopped."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from uuid import UUID, uuid4

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from mdev_orchestrator import errors
from mdev_orchestrator.errors import Outcome
from mdev_orchestrator.machine import Machine
from mdev_orchestrator.qemu import process, start, stop
from mdev_orchestrator.qemu.command import GuestMdev, GuestSpec
from mdev_orchestrator.qemu.monitor import connect
from mdev_orchestrator.qemu.pending import ASKED
from mdev_orchestrator.qemu.process import RunningGuest, State, find, find_running, list_guests
from mdev_orchestrator.qemu.start import _spawn, start_qemu
from mdev_orchestrator.qemu.status import GuestState, check_console_free, look, look_all
from mdev_orchestrator.qemu.stop import await_pending_shutdown, stop_qemu
from mdev_orchestrator.spec.sizes import Size
from mdev_orchestrator.system.directory_lock import opened
from mdev_orchestrator.system.processes import has_ended, start_time
from mdev_orchestrator.system.waiting import poll_until
from unit.qemu.conftest import processes_of

UUID1 = UUID("c0ffee00-0000-4000-8000-000000000001")


def spec(qemu: str, name: str = "g", *extra: str) -> GuestSpec:
    """A guest that never runs an instruction."""
    return GuestSpec(
        name=name,
        uuid=uuid4(),
        memory=Size(64 << 20),
        accel="tcg",
        qemu=qemu,
        hotplug_ports=1,
        extra=("-S", *extra),
    )


@asynccontextmanager
async def started(machine: Machine, what: GuestSpec) -> AsyncIterator[RunningGuest]:
    guest = await start_qemu(machine, what)
    try:
        yield guest
    finally:
        left = [one for one in list_guests(machine) if one.name == what.name]
        for one in left:
            await stop_qemu(machine, one, deadline=0, force=True)


def fake_qemu(machine: Machine, body: str) -> str:
    """A program that is started as if it were QEMU, and does not answer what it can do."""
    path = machine.state_dir / "fake-qemu"
    path.write_text(f'#!/bin/sh\n[ "$1" != -object ] || exit 1\n{body}\n')
    path.chmod(0o755)
    return str(path)


async def test_start_find_stop(qemu: str, machine: Machine) -> None:
    what = spec(qemu)
    guest = await start_qemu(machine, what)
    assert guest.state is State.RUNNING
    assert find(machine, "g") == find_running(machine, "g") == guest
    assert list_guests(machine) == [guest]
    assert guest.record
    assert guest.record.uuid == what.uuid
    assert guest.record.pid in processes_of(machine.state_dir)
    report = await look(guest)
    assert (report.status, report.mdevs, report.damage) == ("prelaunch", (), "")
    ended = await stop_qemu(machine, guest, deadline=0, force=True)
    assert ended.how == "quit"
    assert list_guests(machine) == []
    assert list(machine.guests_dir.iterdir()) == []


async def test_its_files_are_private(qemu: str, machine: Machine) -> None:
    async with started(machine, spec(qemu)) as guest:
        assert stat.S_IMODE(guest.directory.stat().st_mode) == 0o700
        for name in (process.QMP, process.QUERY, process.WATCH, process.CONSOLE):
            assert stat.S_IMODE((guest.directory / name).stat().st_mode) == 0o600


async def test_it_is_of_a_session_of_its_own_and_holds_no_directory(
    qemu: str, machine: Machine
) -> None:
    async with started(machine, spec(qemu)) as guest:
        assert guest.record
        pid = guest.record.pid
        assert os.getsid(pid) == pid
        assert Path(f"/proc/{pid}/cwd").readlink() == Path("/")
        assert Path(f"/proc/{pid}/fd/0").readlink() == Path("/dev/null")
        assert Path(f"/proc/{pid}/fd/1").readlink() == guest.qemu_log
        sockets = [f for f in Path(f"/proc/{pid}/fd").iterdir() if "socket" in str(f.readlink())]
        assert len(sockets) == 4


async def test_it_outlives_its_starter_and_another_process_stops_it(
    qemu: str, machine: Machine
) -> None:
    environment = {**os.environ, "MDO_STATE_DIR": str(machine.state_dir), "MDO_ACCEL": "tcg"}
    mdo = [sys.executable, "-m", "mdev_orchestrator.cli.main"]
    run = partial(asyncio.to_thread, subprocess.run)
    await run([*mdo, "guest", "start", "g", "--arg", "-S"], env=environment, check=True)
    guest = find(machine, "g")
    assert guest.state is State.RUNNING
    out = await run(
        [*mdo, "guest", "list", "--json"], env=environment, check=True, capture_output=True
    )
    [shown] = msgspec.json.decode(out.stdout)["guests"]
    assert shown["state"] == "paused"
    assert shown["status"] == "prelaunch"
    assert shown["mdevs"] == []
    again = await run(
        [*mdo, "guest", "start", "g"], env=environment, check=False, capture_output=True, text=True
    )
    assert again.returncode == 2
    assert "guest g runs already" in again.stderr
    assert (await stop_qemu(machine, guest, deadline=0, force=True)).how == "quit"
    out = await run(
        [*mdo, "guest", "list", "--json"], env=environment, check=True, capture_output=True
    )
    assert msgspec.json.decode(out.stdout) == {"guests": []}


async def test_the_monitor_can_be_connected_to_again(qemu: str, machine: Machine) -> None:
    async with started(machine, spec(qemu)) as guest:
        for _ in range(3):
            async with connect(guest.qmp_socket, guest.label) as qmp:
                await qmp.execute("query-status", object)


async def test_a_busy_monitor(qemu: str, machine: Machine) -> None:
    async with started(machine, spec(qemu)) as guest, connect(guest.qmp_socket, guest.label):
        with pytest.raises(errors.DeadlineError, match="another program may hold"):
            async with connect(guest.qmp_socket, guest.label, deadline=0.3):
                pass
        assert (await look(guest)).status == "prelaunch"  # by the other monitor


async def test_a_console_takes_one(qemu: str, machine: Machine) -> None:
    async with started(machine, spec(qemu)) as guest:
        await check_console_free(guest)
        _, writer = await asyncio.open_unix_connection(guest.console_socket)
        with pytest.raises(errors.BusyError, match="console"):
            await check_console_free(guest)
        writer.close()
        await writer.wait_closed()


async def test_a_second_start_of_a_running_guest(qemu: str, machine: Machine) -> None:
    async with started(machine, spec(qemu)) as guest:
        with pytest.raises(errors.BusyError, match="guest g runs already, as process"):
            await start_qemu(machine, spec(qemu))
        assert find(machine, "g") == guest


async def test_many_starts_at_once(qemu: str, machine: Machine) -> None:
    results = await asyncio.gather(
        *(start_qemu(machine, spec(qemu)) for _ in range(5)), return_exceptions=True
    )
    won = [result for result in results if isinstance(result, RunningGuest)]
    assert len(won) == 1
    assert all(isinstance(result, RunningGuest | errors.BusyError) for result in results)
    assert find(machine, "g") == won[0]
    assert len(processes_of(machine.state_dir)) == 1
    await stop_qemu(machine, won[0], deadline=0, force=True)


async def test_two_guests(qemu: str, machine: Machine) -> None:
    async with started(machine, spec(qemu, "a")) as a, started(machine, spec(qemu, "b")) as b:
        reports = await look_all(list_guests(machine))
        assert [(one.guest, one.status) for one in reports] == [(a, "prelaunch"), (b, "prelaunch")]


# ---------------------------------------------------------------- what goes wrong at the start


async def test_qemu_says_no(qemu: str, machine: Machine) -> None:
    with pytest.raises(errors.QemuError, match="'nonsense' is not a valid device") as caught:
        await start_qemu(machine, spec(qemu, "g", "-device", "nonsense"))
    assert caught.value.exit_code == 3
    assert "ended with status 1" in caught.value.message
    assert "-device nonsense" in caught.value.details
    assert list(machine.guests_dir.iterdir()) == []


async def test_an_mdev_that_is_not_there(qemu: str, machine: Machine) -> None:
    mdev = GuestMdev(UUID1, Path("/sys/bus/mdev/devices") / str(UUID1))
    with pytest.raises(errors.QemuError, match="no such host device") as caught:
        await start_qemu(machine, replace(spec(qemu), mdevs=(mdev,)))
    assert "mdo host" in caught.value.hint
    assert list(machine.guests_dir.iterdir()) == []


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("exit 0", "ended with status 0: it said nothing"),
        ("echo oh dear >&2; exit 7", "ended with status 7: oh dear"),
        ("kill -SEGV $$", "was killed by signal 11"),
        ("printf 'a\\033[2Jb\\377\\n'; exit 1", "ended with status 1: a"),
    ],
)
async def test_something_that_is_no_qemu(machine: Machine, body: str, said: str) -> None:
    with pytest.raises(errors.QemuError, match=said) as caught:
        await start_qemu(machine, spec(fake_qemu(machine, body)))
    assert caught.value.message.isprintable()
    assert list(machine.guests_dir.iterdir()) == []


async def test_a_qemu_that_never_answers(machine: Machine) -> None:
    qemu = fake_qemu(machine, "echo thinking; exec sleep 1000")
    with pytest.raises(errors.DeadlineError, match=r"did not answer within 0\.5 s: thinking"):
        await start_qemu(machine, spec(qemu), deadline=0.5)
    assert list(machine.guests_dir.iterdir()) == []


async def test_no_qemu(machine: Machine) -> None:
    with pytest.raises(errors.HostError, match="no program no-such-qemu"):
        await start_qemu(machine, spec("no-such-qemu"))
    assert list(machine.guests_dir.iterdir()) == []


async def test_no_kernel(qemu: str, machine: Machine) -> None:
    with pytest.raises(errors.RequestError, match=r"its kernel .*nowhere does not exist"):
        await start_qemu(machine, replace(spec(qemu), kernel=Path("nowhere")))


async def test_a_path_too_long_for_a_socket(qemu: str, machine: Machine) -> None:
    deep = Machine(state=machine.state_dir / ("x" * 100))
    with pytest.raises(errors.HostError, match="more than 107 bytes") as caught:
        await start_qemu(deep, spec(qemu))
    assert "MDO_STATE_DIR" in caught.value.hint
    assert list(deep.guests_dir.iterdir()) == []


@pytest.mark.parametrize("word", ["-daemonize", "--daemonize", "-uuid", "-chroot"])
async def test_arguments_that_break_the_contract_are_refused(
    qemu: str, machine: Machine, word: str
) -> None:
    """Fault 22: with -daemonize "nothing was changed", and an unknown QEMU lived on."""
    with pytest.raises(errors.RequestError, match=f"argument {word} cannot be used") as caught:
        await start_qemu(machine, spec(qemu, "g", word))
    assert caught.value.outcome is Outcome.NO_EFFECT


async def test_a_qemu_that_its_program_leaves_behind_is_ended(qemu: str, machine: Machine) -> None:
    """Fault 22: the process that was started ends, and a QEMU would live on."""
    program = fake_qemu(machine, f'{qemu} "$@" &\nexit 0')
    with pytest.raises(errors.QemuError, match="ended with status 0") as caught:
        await start_qemu(machine, spec(program))
    assert caught.value.outcome is Outcome.NO_EFFECT
    assert "not start QEMU beside itself" in caught.value.hint
    assert list(machine.guests_dir.iterdir()) == []
    assert set(processes_of(machine.state_dir)) == set()


async def test_a_qemu_that_outlives_its_program_is_reported(qemu: str, machine: Machine) -> None:
    told = machine.state_dir / "told"
    body = f'{qemu} "$@" &\nwhile [ ! -e {told} ]; do sleep 0.05; done'
    guest = await start_qemu(machine, spec(fake_qemu(machine, body)))
    told.touch()
    assert await process.wait_ended(guest)
    [gone] = list_guests(machine)
    assert gone.state is State.GONE
    [pid] = await process.find_strays(machine, gone)
    with pytest.raises(errors.BusyError, match=f"a QEMU of it runs on as process {pid}"):
        await start_qemu(machine, spec(qemu))
    with pytest.raises(errors.BusyError, match=f"a QEMU of it runs on as process {pid}") as caught:
        await stop_qemu(machine, gone)
    assert caught.value.outcome is Outcome.NO_EFFECT
    assert "--force" in caught.value.hint
    assert (await stop_qemu(machine, gone, force=True)).how == "killed"
    assert has_ended(pid)
    assert list_guests(machine) == []


# ---------------------------------------------------------------- interrupted


@pytest.mark.parametrize("steps", range(0, 40, 3))
async def test_cancelled_after_some_steps(qemu: str, machine: Machine, steps: int) -> None:
    task = asyncio.ensure_future(start_qemu(machine, spec(qemu)))
    for _ in range(steps):
        await asyncio.sleep(0)
    if task.cancel():
        with pytest.raises(asyncio.CancelledError):
            await task
    assert list(machine.guests_dir.iterdir()) == []
    assert processes_of(machine.state_dir) == {}


async def test_the_event_loop_runs_while_a_process_is_killed(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 10: a poll of up to 15 s held it. Here only the loop lets the process end."""
    send = signal.pidfd_send_signal

    def later(descriptor: int, number: signal.Signals) -> None:
        asyncio.get_running_loop().call_later(0.1, send, descriptor, number)

    monkeypatch.setattr(signal, "pidfd_send_signal", later)
    with pytest.raises(errors.DeadlineError):
        await start_qemu(machine, spec(fake_qemu(machine, "exec sleep 1000")), deadline=0.5)
    assert list(machine.guests_dir.iterdir()) == []


async def test_the_event_loop_runs_while_a_directory_is_locked(
    qemu: str, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 10: flock held it. Here only the loop gives the lock back."""

    @contextlib.contextmanager
    def locked(directory: Path) -> Iterator[int]:
        other = os.open(directory, os.O_RDONLY)
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        asyncio.get_running_loop().call_later(0.1, os.close, other)
        monkeypatch.undo()
        with opened(directory) as descriptor:
            yield descriptor

    monkeypatch.setattr(start, "opened", locked)
    async with started(machine, spec(qemu)) as guest:
        assert guest.alive


async def mdo_start(machine: Machine) -> tuple[asyncio.subprocess.Process, int]:
    """An ``mdo guest start`` whose QEMU has begun and will never answer, and that QEMU's pid."""
    told = machine.state_dir / "told"
    os.mkfifo(told)
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "mdev_orchestrator.cli.main",
        "guest",
        "start",
        "g",
        "--qemu",
        fake_qemu(machine, f"echo $$ > {told}; read -r _ < {told}"),
        env={**os.environ, "MDO_STATE_DIR": str(machine.state_dir)},
        stderr=subprocess.PIPE,
    )
    pid = int(await asyncio.to_thread(told.read_text))
    return process, pid


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
async def test_interrupted_while_qemu_starts(machine: Machine, number: signal.Signals) -> None:
    command, pid = await mdo_start(machine)
    command.send_signal(number)
    _, complaints = await command.communicate()
    assert b"Traceback" not in complaints
    assert command.returncode == 128 + number
    assert not Path(f"/proc/{pid}").exists()
    assert list(machine.guests_dir.iterdir()) == []


async def test_killed_while_qemu_starts(machine: Machine) -> None:
    command, pid = await mdo_start(machine)
    command.kill()
    await command.communicate()
    [guest] = list_guests(machine)
    assert guest.state is State.STARTING
    assert guest.record
    assert guest.record.pid == pid
    with pytest.raises(errors.BusyError, match="runs already"):
        await start_qemu(machine, spec("/bin/true"))
    assert (await stop_qemu(machine, guest, deadline=0, force=True)).how == "terminated"
    assert list(machine.guests_dir.iterdir()) == []


async def test_a_guest_that_ends_by_itself_leaves_its_starter_no_zombie(
    qemu: str, machine: Machine
) -> None:
    """Found by the soak: a service that lives long had one for each QEMU that died."""
    async with started(machine, spec(qemu)) as guest:
        assert guest.record
        os.kill(guest.record.pid, signal.SIGKILL)
        while not has_ended(guest.record.pid):
            await asyncio.sleep(0.01)
        assert Path(f"/proc/{guest.record.pid}").exists()
        assert [one.state for one in list_guests(machine)] == [State.GONE]
        assert not Path(f"/proc/{guest.record.pid}").exists()


async def test_the_gate_never_opens_for_a_starter_that_died(machine: Machine) -> None:
    witness = machine.state_dir / "witness"
    pid, opener = _spawn(["/bin/touch", str(witness)], [], machine.state_dir / "log")
    os.close(opener)  # as the kernel does for a process that was killed
    os.waitpid(pid, 0)
    assert not witness.exists()


async def test_a_start_that_was_cut_short_before_the_record(qemu: str, machine: Machine) -> None:
    (machine.guests_dir / "g").mkdir()
    [guest] = list_guests(machine)
    assert guest.state is State.DAMAGED
    with pytest.raises(errors.RequestError, match="cut short"):
        await start_qemu(machine, spec(qemu))
    with pytest.raises(errors.RequestError, match="cut short"):
        await stop_qemu(machine, guest)
    assert (await stop_qemu(machine, guest, force=True)).how == "gone"
    assert list(machine.guests_dir.iterdir()) == []


# ---------------------------------------------------------------- ended without us


async def test_qemu_killed_in_the_middle(qemu: str, machine: Machine) -> None:
    guest = await start_qemu(machine, spec(qemu))
    assert guest.record
    os.kill(guest.record.pid, signal.SIGKILL)
    assert await process.wait_ended(guest)
    gone = find(machine, "g")
    assert gone.state is State.GONE
    assert (await look(gone)).status is None
    with pytest.raises(errors.RequestError, match="its process has ended"):
        find_running(machine, "g")
    assert (await stop_qemu(machine, gone)).how == "gone"
    with pytest.raises(errors.UnknownError, match="no guest is called g"):
        find(machine, "g")


async def test_a_start_takes_the_place_of_one_that_is_gone(qemu: str, machine: Machine) -> None:
    first = await start_qemu(machine, spec(qemu))
    assert first.record
    os.kill(first.record.pid, signal.SIGKILL)
    await process.wait_ended(first)
    async with started(machine, spec(qemu)) as second:
        assert second.record
        assert second.record.pid != first.record.pid


async def test_a_stop_beside_a_stop(qemu: str, machine: Machine) -> None:
    guest = await start_qemu(machine, spec(qemu))
    ended = await asyncio.gather(
        *(stop_qemu(machine, guest, deadline=0, force=True) for _ in range(3))
    )
    assert {one.name for one in ended} == {"g"}
    assert list(machine.guests_dir.iterdir()) == []


async def test_without_force_it_goes_on(qemu: str, machine: Machine) -> None:
    async with started(machine, spec(qemu)) as guest:
        with pytest.raises(errors.DeadlineError, match="did not power down") as caught:
            await stop_qemu(machine, guest, deadline=0.3)
        assert "--force" in caught.value.hint
        assert find(machine, "g") == guest


async def test_the_power_button_is_pressed_again(
    qemu: str, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A guest that boots feels nothing of the first time."""
    monkeypatch.setattr(stop, "PRESS_AGAIN_SECONDS", 0.1)
    async with started(machine, spec(qemu)) as guest:
        async with connect(guest.watch_socket, guest.label) as qmp:
            with qmp.events(("POWERDOWN",), lambda _: True) as events:
                stopping = asyncio.ensure_future(stop_qemu(machine, guest, deadline=5))
                for _ in range(3):
                    assert await events.next(10)
                await stop_qemu(machine, guest, deadline=0, force=True)
        with contextlib.suppress(errors.MdoError):
            await stopping


async def test_whether_a_guest_obeys_is_waited_for(
    qemu: str, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command that asked it was interrupted."""
    monkeypatch.setattr(stop, "OBEY_SECONDS", 0.5)
    async with started(machine, spec(qemu)) as guest:
        assert not await await_pending_shutdown(guest)  # it was not asked
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await stop_qemu(machine, guest)
        assert (guest.directory / ASKED).exists()
        assert not await await_pending_shutdown(guest)
        assert not (guest.directory / ASKED).exists()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await stop_qemu(machine, guest)
        assert guest.record
        os.kill(guest.record.pid, signal.SIGTERM)
        assert await await_pending_shutdown(guest)


async def test_a_guest_may_power_down_after_the_deadline(qemu: str, machine: Machine) -> None:
    async with started(machine, spec(qemu)) as guest:
        with pytest.raises(errors.DeadlineError, match="did not power down") as caught:
            await stop_qemu(machine, guest, deadline=0.3)
        assert caught.value.outcome is Outcome.UNKNOWN
        assert (guest.directory / ASKED).exists()


async def test_a_guest_that_was_not_asked_runs_on(qemu: str, machine: Machine) -> None:
    async with started(machine, spec(qemu)) as guest, connect(guest.qmp_socket, guest.label):
        with pytest.raises(errors.DeadlineError, match="another program may hold") as caught:
            await stop_qemu(machine, guest, deadline=0.3)
        assert caught.value.outcome is Outcome.NO_EFFECT
        assert not (guest.directory / ASKED).exists()


@pytest.mark.parametrize("held", ["SIGSTOP", "by another client"])
async def test_force_does_not_wait_for_a_qemu_that_does_not_answer(
    qemu: str, machine: Machine, held: str
) -> None:
    """Fault 23: 2 seconds were given, and 43 were taken."""
    async with started(machine, spec(qemu)) as guest:
        assert guest.record
        async with connect(guest.qmp_socket, guest.label), asyncio.timeout(30):
            if held == "SIGSTOP":
                os.kill(guest.record.pid, signal.SIGSTOP)
                assert await poll_until(lambda: process.is_stopped(guest), 10)
            given = 3600 if held == "SIGSTOP" else 0.2
            ended = await stop_qemu(machine, guest, deadline=given, force=True)
            assert ended.how == ("killed" if held == "SIGSTOP" else "terminated")


async def test_what_a_guest_does_is_told_apart(qemu: str, machine: Machine) -> None:
    """Fault 26: a guest whose QEMU is stopped was shown as running."""
    async with started(machine, spec(qemu)) as guest:
        assert (await look(guest)).state is GuestState.PAUSED
        async with connect(guest.query_socket, guest.label) as qmp:
            assert (await look(guest, deadline=0.2)).state is GuestState.SILENT
            await qmp.execute("cont", object)
        assert (await look(guest)).state is GuestState.RUNNING
        assert guest.record
        os.kill(guest.record.pid, signal.SIGSTOP)
        assert await poll_until(lambda: process.is_stopped(guest), 10)
        assert (await look(guest)).state is GuestState.STOPPED
        os.kill(guest.record.pid, signal.SIGKILL)
        assert await process.wait_ended(guest)
        assert (await look(find(machine, "g"))).state is GuestState.GONE


async def test_how_long_a_guest_is_waited_for_is_the_callers(qemu: str, machine: Machine) -> None:
    """Fault 23: 30 seconds were waited for, whatever the deadline was."""
    async with started(machine, spec(qemu)) as guest:
        (guest.directory / ASKED).touch()
        with pytest.raises(errors.DeadlineError, match="may do so yet") as caught:
            await await_pending_shutdown(guest, deadline=0.1)
        assert caught.value.outcome is Outcome.UNKNOWN
        assert (guest.directory / ASKED).exists()


async def test_a_qemu_that_is_stopped(qemu: str, machine: Machine) -> None:
    """SIGSTOP is the worst a monitor can meet: it accepts and never answers."""
    async with started(machine, spec(qemu)) as guest:
        assert guest.record
        os.kill(guest.record.pid, signal.SIGSTOP)
        assert await poll_until(lambda: process.is_stopped(guest), 10)
        report = await look(guest)
        assert (report.status, report.mdevs, report.state) == (None, None, "stopped")
        assert f"kill -CONT {guest.record.pid}" in report.damage
        with pytest.raises(errors.DeadlineError, match=r"did not power down.*is stopped") as caught:
            await stop_qemu(machine, guest, deadline=0.3)
        assert caught.value.outcome is Outcome.NO_EFFECT
        assert f"kill -CONT {guest.record.pid}" in caught.value.message
        assert (await stop_qemu(machine, guest, deadline=60, force=True)).how == "killed"


# ---------------------------------------------------------------- what is believed


def rewrite(guest: RunningGuest, **changes: object) -> RunningGuest:
    path = guest.directory / "record.json"
    data = msgspec.json.decode(path.read_bytes())
    path.write_bytes(msgspec.json.encode({**data, **changes}))
    return find(Machine(state=guest.directory.parent.parent), guest.name)


@pytest.fixture
async def sleeper() -> AsyncIterator[int]:
    """A process that is none of our guests."""
    other = await asyncio.create_subprocess_exec("sleep", "1000")
    yield other.pid
    assert other.returncode is None, "a process that is no guest was ended"
    other.kill()
    await other.wait()


async def test_another_process_with_the_same_pid(qemu: str, machine: Machine, sleeper: int) -> None:
    guest = await start_qemu(machine, spec(qemu))
    copy = shutil.copytree(
        guest.directory, machine.state_dir / "copy", ignore=shutil.ignore_patterns("*.sock")
    )
    await stop_qemu(machine, guest, deadline=0, force=True)
    shutil.move(copy, guest.directory)
    assert find(machine, "g").state is State.GONE
    assert rewrite(guest, pid=sleeper).state is State.GONE
    born = start_time(sleeper)
    again = rewrite(guest, pid=sleeper, start_time=born)
    assert again.state is State.GONE  # no -uuid on its command line
    assert (await stop_qemu(machine, again, deadline=0, force=True)).how == "gone"


# Its first thread ends at once, and another one when its standard input does. Seen from outside it
# is as a process that is being killed: a zombie without a command line that still has its files.
DYING = """
import ctypes, os, sys, threading
threading.Thread(target=lambda: os._exit(len(sys.stdin.read()))).start()
print(flush=True)
ctypes.CDLL(None).syscall(60, 0)  # SYS_exit of x86-64: of one thread
"""


async def test_a_process_that_is_ending_has_not_ended(qemu: str, machine: Machine) -> None:
    guest = await start_qemu(machine, spec(qemu))
    copy = shutil.copytree(
        guest.directory, machine.state_dir / "copy", ignore=shutil.ignore_patterns("*.sock")
    )
    await stop_qemu(machine, guest, deadline=0, force=True)
    shutil.move(copy, guest.directory)
    dying = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", DYING, "-uuid", str(UUID1)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert dying.stdin
    assert dying.stdout
    began = start_time(dying.pid)
    await dying.stdout.readline()
    cmdline = Path(f"/proc/{dying.pid}/cmdline")
    while cmdline.read_bytes():
        await asyncio.sleep(0.01)
    found = rewrite(guest, pid=dying.pid, start_time=began, uuid=str(UUID1))
    assert found.alive
    assert not await process.wait_ended(found, 0.1)
    dying.stdin.close()
    assert await process.wait_ended(found, 10)
    assert find(machine, "g").state is State.GONE
    assert (await stop_qemu(machine, find(machine, "g"))).how == "gone"
    await dying.wait()


@pytest.mark.parametrize(
    "changes", [{"start_time": 1}, {"boot_id": "other"}, {"uuid": str(UUID1)}, {"pid": 1 << 22}]
)
async def test_one_wrong_fact_and_it_is_not_believed(
    qemu: str, machine: Machine, changes: dict[str, object]
) -> None:
    guest = await start_qemu(machine, spec(qemu))
    good = (guest.directory / "record.json").read_bytes()
    assert rewrite(guest, **changes).state is State.GONE
    (guest.directory / "record.json").write_bytes(good)
    assert (await stop_qemu(machine, find(machine, "g"), deadline=0, force=True)).how == "quit"


async def test_a_damaged_record_of_a_living_guest(qemu: str, machine: Machine) -> None:
    guest = await start_qemu(machine, spec(qemu))
    (guest.directory / "record.json").write_bytes(b"{")
    damaged = find(machine, "g")
    assert damaged.state is State.DAMAGED
    assert "record.json is damaged" in damaged.damage
    with pytest.raises(errors.RequestError, match="damaged"):
        await start_qemu(machine, spec(qemu))
    with pytest.raises(errors.RequestError, match="damaged") as caught:
        await stop_qemu(machine, damaged)
    assert "--force" in caught.value.hint
    assert (await stop_qemu(machine, damaged, force=True)).how == "quit"
    assert await process.wait_ended(guest)
    assert list(machine.guests_dir.iterdir()) == []


RECORD = {
    "name": "g",
    "uuid": str(UUID1),
    "pid": 4194304,
    "start_time": 1,
    "boot_id": "b",
    "created": 1.0,
    "argv": ["qemu"],
    "mdevs": [],
    "memory": 1,
    "cpus": 1,
}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def check_shown(machine: Machine, data: bytes) -> None:
    (machine.guests_dir / "g").mkdir(exist_ok=True)
    (machine.guests_dir / "g" / "record.json").write_bytes(data)
    [guest] = list_guests(machine)
    assert guest.state in {State.DAMAGED, State.GONE}
    assert bool(guest.damage) == (guest.state is State.DAMAGED)
    if guest.record:
        process.created(guest.record)
    [report] = asyncio.run(look_all([guest]))
    assert report.status is None


@given(st.binary())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_as_a_record(machine: Machine, data: bytes) -> None:
    check_shown(machine, data)


@given(st.sampled_from(sorted(RECORD)), JSON)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_value_in_a_record(machine: Machine, key: str, value: object) -> None:
    check_shown(machine, msgspec.json.encode({**RECORD, key: value}))


def test_a_record_as_it_should_be(machine: Machine) -> None:
    check_shown(machine, msgspec.json.encode(RECORD))
    assert find(machine, "g").state is State.GONE


def test_what_else_may_lie_there(machine: Machine) -> None:
    (machine.guests_dir / "file").touch()
    (machine.guests_dir / "link").symlink_to("/")
    (machine.guests_dir / ".hidden").mkdir()
    (machine.guests_dir / "bad,name").mkdir()
    (machine.guests_dir / "deep").mkdir()
    (machine.guests_dir / "deep" / "record.json").mkdir()
    (machine.guests_dir / "nested").mkdir()
    (machine.guests_dir / "nested" / "record.json").write_text("[" * 100_000)
    assert [(guest.name, guest.state) for guest in list_guests(machine)] == [
        ("deep", State.DAMAGED),
        ("nested", State.DAMAGED),
    ]
    with pytest.raises(errors.UnknownError, match=r"no guest is called x.*there are: deep, nested"):
        find(machine, "x")


def test_no_guests_at_all(machine: Machine) -> None:
    nowhere = Machine(state=machine.state_dir / "nowhere")
    assert list_guests(nowhere) == []
    with pytest.raises(errors.UnknownError):
        find(nowhere, "g")
