# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest as a process: started, found again by what is on disk, stopped."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from uuid import UUID, uuid4

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from mdev_orchestrator.errors import (
    BusyError,
    DeadlineError,
    HostError,
    MdoError,
    QemuError,
    RequestError,
    UnknownError,
)
from mdev_orchestrator.qemu import process
from mdev_orchestrator.qemu.command import GuestMdev, GuestSpec
from mdev_orchestrator.qemu.monitor import connect
from mdev_orchestrator.qemu.process import (
    RunningGuest,
    State,
    find,
    find_running,
    list_guests,
    start,
    stop,
)
from mdev_orchestrator.qemu.status import check_console_free, look, look_all
from mdev_orchestrator.system.processes import has_ended, start_time
from unit.qemu.conftest import processes_of

UUID1 = UUID("c0ffee00-0000-4000-8000-000000000001")


def spec(qemu: str, name: str = "g", *extra: str) -> GuestSpec:
    """A guest that never runs an instruction."""
    return GuestSpec(
        name,
        uuid4(),
        memory=64 << 20,
        accel="tcg",
        qemu=qemu,
        hotplug_ports=1,
        extra=("-S", *extra),
    )


@asynccontextmanager
async def started(place: Path, what: GuestSpec) -> AsyncIterator[RunningGuest]:
    guest = await start(what, root=place)
    try:
        yield guest
    finally:
        left = [one for one in list_guests(place) if one.name == what.name]
        for one in left:
            await stop(one, deadline=0, force=True)


def fake_qemu(place: Path, body: str) -> str:
    """A program that is started as if it were QEMU."""
    path = place / "fake-qemu"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


async def test_start_find_stop(qemu: str, place: Path) -> None:
    what = spec(qemu)
    guest = await start(what, root=place)
    assert guest.state is State.RUNNING
    assert find("g", place) == find_running("g", place) == guest
    assert list_guests(place) == [guest]
    assert guest.record
    assert guest.record.uuid == what.uuid
    assert guest.record.pid in processes_of(place)
    report = await look(guest)
    assert (report.status, report.mdevs, report.damage) == ("prelaunch", (), "")
    ended = await stop(guest, deadline=0, force=True)
    assert ended.how == "quit"
    assert list_guests(place) == []
    assert list(place.iterdir()) == []


async def test_its_files_are_private(qemu: str, place: Path) -> None:
    async with started(place, spec(qemu)) as guest:
        assert stat.S_IMODE(guest.directory.stat().st_mode) == 0o700
        for name in (process.QMP, process.QUERY, process.WATCH, process.CONSOLE):
            assert stat.S_IMODE((guest.directory / name).stat().st_mode) == 0o600


async def test_it_is_of_a_session_of_its_own_and_holds_no_directory(qemu: str, place: Path) -> None:
    async with started(place, spec(qemu)) as guest:
        assert guest.record
        pid = guest.record.pid
        assert os.getsid(pid) == pid
        assert Path(f"/proc/{pid}/cwd").readlink() == Path("/")
        assert Path(f"/proc/{pid}/fd/0").readlink() == Path("/dev/null")
        assert Path(f"/proc/{pid}/fd/1").readlink() == guest.qemu_log
        sockets = [f for f in Path(f"/proc/{pid}/fd").iterdir() if "socket" in str(f.readlink())]
        assert len(sockets) == 4


async def test_it_outlives_who_started_it_and_another_process_stops_it(
    qemu: str, place: Path
) -> None:
    environment = {**os.environ, "MDO_STATE_DIR": str(place), "MDO_ACCEL": "tcg"}
    mdo = [sys.executable, "-m", "mdev_orchestrator.cli.main"]
    run = partial(asyncio.to_thread, subprocess.run)
    await run([*mdo, "guest", "start", "g", "--arg", "-S"], env=environment, check=True)
    guest = find("g", place / "guests")
    assert guest.state is State.RUNNING
    out = await run(
        [*mdo, "guest", "list", "--json"], env=environment, check=True, capture_output=True
    )
    [shown] = msgspec.json.decode(out.stdout)["guests"]
    assert shown["state"] == "running"
    assert shown["status"] == "prelaunch"
    assert shown["mdevs"] == []
    again = await run(
        [*mdo, "guest", "start", "g"], env=environment, check=False, capture_output=True, text=True
    )
    assert again.returncode == 2
    assert "guest g runs already" in again.stderr
    assert (await stop(guest, deadline=0, force=True)).how == "quit"
    out = await run(
        [*mdo, "guest", "list", "--json"], env=environment, check=True, capture_output=True
    )
    assert msgspec.json.decode(out.stdout) == {"guests": []}


async def test_the_monitor_can_be_connected_to_again(qemu: str, place: Path) -> None:
    async with started(place, spec(qemu)) as guest:
        for _ in range(3):
            async with connect(guest.qmp_socket, guest.label) as qmp:
                await qmp.execute("query-status", object)


async def test_a_busy_monitor(qemu: str, place: Path) -> None:
    async with started(place, spec(qemu)) as guest, connect(guest.qmp_socket, guest.label):
        with pytest.raises(DeadlineError, match="another program may hold"):
            async with connect(guest.qmp_socket, guest.label, deadline=0.3):
                pass
        assert (await look(guest)).status == "prelaunch"  # by the other monitor


async def test_a_console_takes_one(qemu: str, place: Path) -> None:
    async with started(place, spec(qemu)) as guest:
        await check_console_free(guest)
        _, writer = await asyncio.open_unix_connection(guest.console_socket)
        with pytest.raises(BusyError, match="console"):
            await check_console_free(guest)
        writer.close()
        await writer.wait_closed()


async def test_a_second_start_of_a_running_guest(qemu: str, place: Path) -> None:
    async with started(place, spec(qemu)) as guest:
        with pytest.raises(BusyError, match="guest g runs already, as process"):
            await start(spec(qemu), root=place)
        assert find("g", place) == guest


async def test_many_starts_at_once(qemu: str, place: Path) -> None:
    results = await asyncio.gather(
        *(start(spec(qemu), root=place) for _ in range(5)), return_exceptions=True
    )
    won = [result for result in results if isinstance(result, RunningGuest)]
    assert len(won) == 1
    assert all(isinstance(result, RunningGuest | BusyError) for result in results)
    assert find("g", place) == won[0]
    assert len(processes_of(place)) == 1
    await stop(won[0], deadline=0, force=True)


async def test_two_guests(qemu: str, place: Path) -> None:
    async with started(place, spec(qemu, "a")) as a, started(place, spec(qemu, "b")) as b:
        reports = await look_all(list_guests(place))
        assert [(one.guest, one.status) for one in reports] == [(a, "prelaunch"), (b, "prelaunch")]


# ---------------------------------------------------------------- what goes wrong at the start


async def test_qemu_says_no(qemu: str, place: Path) -> None:
    with pytest.raises(QemuError, match="'nonsense' is not a valid device") as caught:
        await start(spec(qemu, "g", "-device", "nonsense"), root=place)
    assert caught.value.exit_code == 3
    assert "ended with status 1" in caught.value.message
    assert "-device nonsense" in caught.value.hint
    assert list(place.iterdir()) == []


async def test_an_mdev_that_is_not_there(qemu: str, place: Path) -> None:
    mdev = GuestMdev(UUID1, Path("/sys/bus/mdev/devices") / str(UUID1))
    with pytest.raises(QemuError, match="no such host device") as caught:
        await start(replace(spec(qemu), mdevs=(mdev,)), root=place)
    assert "mdo host" in caught.value.hint
    assert list(place.iterdir()) == []


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("exit 0", "ended with status 0: it said nothing"),
        ("echo oh dear >&2; exit 7", "ended with status 7: oh dear"),
        ("kill -SEGV $$", "was killed by signal 11"),
        ("printf 'a\\033[2Jb\\377\\n'; exit 1", "ended with status 1: a"),
    ],
)
async def test_something_that_is_no_qemu(place: Path, body: str, said: str) -> None:
    with pytest.raises(QemuError, match=said) as caught:
        await start(spec(fake_qemu(place, body)), root=place / "guests")
    assert caught.value.message.isprintable()
    assert list((place / "guests").iterdir()) == []


async def test_a_qemu_that_never_answers(place: Path) -> None:
    qemu = fake_qemu(place, "echo thinking; exec sleep 1000")
    with pytest.raises(DeadlineError, match=r"did not answer within 0\.5 s: thinking"):
        await start(spec(qemu), root=place / "guests", deadline=0.5)
    assert list((place / "guests").iterdir()) == []


async def test_no_qemu(place: Path) -> None:
    with pytest.raises(HostError, match="no program no-such-qemu"):
        await start(spec("no-such-qemu"), root=place)
    assert list(place.iterdir()) == []


async def test_no_kernel(qemu: str, place: Path) -> None:
    with pytest.raises(RequestError, match=r"its kernel .*nowhere does not exist"):
        await start(replace(spec(qemu), kernel=Path("nowhere")), root=place)


async def test_a_path_too_long_for_a_socket(qemu: str, place: Path) -> None:
    with pytest.raises(HostError, match="more than 107 bytes") as caught:
        await start(spec(qemu), root=place / ("x" * 100))
    assert "MDO_STATE_DIR" in caught.value.hint
    assert list((place / ("x" * 100)).iterdir()) == []


# ---------------------------------------------------------------- interrupted


@pytest.mark.parametrize("steps", range(0, 40, 3))
async def test_cancelled_after_some_steps(qemu: str, place: Path, steps: int) -> None:
    task = asyncio.ensure_future(start(spec(qemu), root=place))
    for _ in range(steps):
        await asyncio.sleep(0)
    if task.cancel():
        with pytest.raises(asyncio.CancelledError):
            await task
    assert list(place.iterdir()) == []
    assert processes_of(place) == {}


async def mdo_start(place: Path) -> tuple[asyncio.subprocess.Process, int]:
    """An ``mdo guest start`` whose QEMU has begun and will never answer, and that QEMU's pid."""
    told = place / "told"
    os.mkfifo(told)
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "mdev_orchestrator.cli.main",
        "guest",
        "start",
        "g",
        "--qemu",
        fake_qemu(place, f"echo $$ > {told}; read -r _ < {told}"),
        env={**os.environ, "MDO_STATE_DIR": str(place)},
        stderr=subprocess.PIPE,
    )
    pid = int(await asyncio.to_thread(told.read_text))
    return process, pid


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
async def test_interrupted_while_qemu_starts(place: Path, number: signal.Signals) -> None:
    command, pid = await mdo_start(place)
    command.send_signal(number)
    _, errors = await command.communicate()
    assert b"Traceback" not in errors
    assert command.returncode == 128 + number
    assert not Path(f"/proc/{pid}").exists()
    assert list((place / "guests").iterdir()) == []


async def test_killed_while_qemu_starts(place: Path) -> None:
    command, pid = await mdo_start(place)
    command.kill()
    await command.communicate()
    [guest] = list_guests(place / "guests")
    assert guest.state is State.STARTING
    assert guest.record
    assert guest.record.pid == pid
    with pytest.raises(BusyError, match="runs already"):
        await start(spec("/bin/true"), root=place / "guests")
    assert (await stop(guest, deadline=0, force=True)).how == "terminated"
    assert list((place / "guests").iterdir()) == []


async def test_a_guest_that_ends_by_itself_leaves_its_starter_no_zombie(
    qemu: str, place: Path
) -> None:
    """Found by the soak: a service that lives long had one for each QEMU that died."""
    async with started(place, spec(qemu)) as guest:
        assert guest.record
        os.kill(guest.record.pid, signal.SIGKILL)
        while not has_ended(guest.record.pid):
            await asyncio.sleep(0.01)
        assert Path(f"/proc/{guest.record.pid}").exists()
        assert [one.state for one in list_guests(place)] == [State.GONE]
        assert not Path(f"/proc/{guest.record.pid}").exists()


async def test_the_gate_never_opens_for_a_starter_that_died(place: Path) -> None:
    witness = place / "witness"
    pid, opener = process._spawn(["/bin/touch", str(witness)], [], place / "log")
    os.close(opener)  # as the kernel does for a process that was killed
    os.waitpid(pid, 0)
    assert not witness.exists()


async def test_a_start_that_was_cut_short_before_the_record(qemu: str, place: Path) -> None:
    (place / "g").mkdir()
    [guest] = list_guests(place)
    assert guest.state is State.DAMAGED
    with pytest.raises(RequestError, match="cut short"):
        await start(spec(qemu), root=place)
    with pytest.raises(RequestError, match="cut short"):
        await stop(guest)
    assert (await stop(guest, force=True)).how == "gone"
    assert list(place.iterdir()) == []


# ---------------------------------------------------------------- ended without us


async def test_qemu_killed_in_the_middle(qemu: str, place: Path) -> None:
    guest = await start(spec(qemu), root=place)
    assert guest.record
    os.kill(guest.record.pid, signal.SIGKILL)
    assert await process.wait_ended(guest)
    gone = find("g", place)
    assert gone.state is State.GONE
    assert (await look(gone)).status is None
    with pytest.raises(RequestError, match="its process has ended"):
        find_running("g", place)
    assert (await stop(gone)).how == "gone"
    with pytest.raises(UnknownError, match="no guest is called g"):
        find("g", place)


async def test_a_start_takes_the_place_of_one_that_is_gone(qemu: str, place: Path) -> None:
    first = await start(spec(qemu), root=place)
    assert first.record
    os.kill(first.record.pid, signal.SIGKILL)
    await process.wait_ended(first)
    async with started(place, spec(qemu)) as second:
        assert second.record
        assert second.record.pid != first.record.pid


async def test_a_stop_beside_a_stop(qemu: str, place: Path) -> None:
    guest = await start(spec(qemu), root=place)
    ended = await asyncio.gather(*(stop(guest, deadline=0, force=True) for _ in range(3)))
    assert {one.name for one in ended} == {"g"}
    assert list(place.iterdir()) == []


async def test_without_force_it_goes_on(qemu: str, place: Path) -> None:
    async with started(place, spec(qemu)) as guest:
        with pytest.raises(DeadlineError, match="did not power down") as caught:
            await stop(guest, deadline=0.3)
        assert "--force" in caught.value.hint
        assert find("g", place) == guest


async def test_the_power_button_is_pressed_again(
    qemu: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A guest that boots feels nothing of the first time."""
    monkeypatch.setattr(process, "PRESS_AGAIN_SECONDS", 0.1)
    async with started(place, spec(qemu)) as guest:
        async with connect(guest.watch_socket, guest.label) as qmp:
            with qmp.events(("POWERDOWN",), lambda _: True) as events:
                stopping = asyncio.ensure_future(stop(guest, deadline=5))
                for _ in range(3):
                    assert await events.next(10)
                await stop(guest, deadline=0, force=True)
        with contextlib.suppress(MdoError):
            await stopping


async def test_whether_a_guest_obeys_is_waited_for(
    qemu: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever asked it was interrupted."""
    monkeypatch.setattr(process, "OBEY_SECONDS", 0.5)
    async with started(place, spec(qemu)) as guest:
        assert not await process.await_pending_shutdown(guest)  # nobody has asked it
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await stop(guest)
        assert (guest.directory / process.ASKED).exists()
        assert not await process.await_pending_shutdown(guest)
        assert not (guest.directory / process.ASKED).exists()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await stop(guest)
        assert guest.record
        os.kill(guest.record.pid, signal.SIGTERM)
        assert await process.await_pending_shutdown(guest)


async def test_who_gives_up_waiting_has_asked_nothing(qemu: str, place: Path) -> None:
    async with started(place, spec(qemu)) as guest:
        with pytest.raises(DeadlineError, match="did not power down"):
            await stop(guest, deadline=0.3)
        assert not (guest.directory / process.ASKED).exists()


async def test_a_qemu_that_is_stopped(qemu: str, place: Path) -> None:
    """SIGSTOP is the worst a monitor can meet: it accepts and never answers."""
    async with started(place, spec(qemu)) as guest:
        assert guest.record
        os.kill(guest.record.pid, signal.SIGSTOP)
        report = await look(guest, deadline=0.3)
        assert (report.status, report.mdevs) == (None, None)
        assert "did not answer" in report.damage
        with pytest.raises(DeadlineError, match="did not power down"):
            await stop(guest, deadline=0.3)
        assert (await stop(guest, deadline=0, force=True)).how == "killed"


# ---------------------------------------------------------------- what is believed


def rewrite(guest: RunningGuest, **changes: object) -> RunningGuest:
    path = guest.directory / "record.json"
    data = msgspec.json.decode(path.read_bytes())
    path.write_bytes(msgspec.json.encode({**data, **changes}))
    return find(guest.name, guest.directory.parent)


@pytest.fixture
async def sleeper() -> AsyncIterator[int]:
    """A process that is none of our guests."""
    other = await asyncio.create_subprocess_exec("sleep", "1000")
    yield other.pid
    assert other.returncode is None, "somebody ended a process that is no guest"
    other.kill()
    await other.wait()


async def test_another_process_with_the_same_pid(qemu: str, place: Path, sleeper: int) -> None:
    guest = await start(spec(qemu), root=place)
    copy = shutil.copytree(guest.directory, place / "copy", ignore=shutil.ignore_patterns("*.sock"))
    await stop(guest, deadline=0, force=True)
    shutil.move(copy, guest.directory)
    assert find("g", place).state is State.GONE
    assert rewrite(guest, pid=sleeper).state is State.GONE
    born = start_time(sleeper)
    again = rewrite(guest, pid=sleeper, start_time=born)
    assert again.state is State.GONE  # no -uuid on its command line
    assert (await stop(again, deadline=0, force=True)).how == "gone"


# Its first thread ends at once, and another one when its standard input does. Seen from outside it
# is as a process that is being killed: a zombie without a command line that still has its files.
DYING = """
import ctypes, os, sys, threading
threading.Thread(target=lambda: os._exit(len(sys.stdin.read()))).start()
print(flush=True)
ctypes.CDLL(None).syscall(60, 0)  # SYS_exit of x86-64: of one thread
"""


async def test_a_process_that_is_ending_has_not_ended(qemu: str, place: Path) -> None:
    guest = await start(spec(qemu), root=place)
    copy = shutil.copytree(guest.directory, place / "copy", ignore=shutil.ignore_patterns("*.sock"))
    await stop(guest, deadline=0, force=True)
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
    assert find("g", place).state is State.GONE
    assert (await stop(find("g", place))).how == "gone"
    await dying.wait()


@pytest.mark.parametrize(
    "changes", [{"start_time": 1}, {"boot_id": "other"}, {"uuid": str(UUID1)}, {"pid": 1 << 22}]
)
async def test_one_wrong_fact_and_it_is_not_believed(
    qemu: str, place: Path, changes: dict[str, object]
) -> None:
    guest = await start(spec(qemu), root=place)
    good = (guest.directory / "record.json").read_bytes()
    assert rewrite(guest, **changes).state is State.GONE
    (guest.directory / "record.json").write_bytes(good)
    assert (await stop(find("g", place), deadline=0, force=True)).how == "quit"


async def test_a_damaged_record_of_a_living_guest(qemu: str, place: Path) -> None:
    guest = await start(spec(qemu), root=place)
    (guest.directory / "record.json").write_bytes(b"{")
    damaged = find("g", place)
    assert damaged.state is State.DAMAGED
    assert "record.json is damaged" in damaged.damage
    with pytest.raises(RequestError, match="damaged"):
        await start(spec(qemu), root=place)
    with pytest.raises(RequestError, match="damaged") as caught:
        await stop(damaged)
    assert "--force" in caught.value.hint
    assert (await stop(damaged, force=True)).how == "quit"
    assert await process.wait_ended(guest)
    assert list(place.iterdir()) == []


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


def check_shown(place: Path, data: bytes) -> None:
    (place / "g").mkdir(exist_ok=True)
    (place / "g" / "record.json").write_bytes(data)
    [guest] = list_guests(place)
    assert guest.state in {State.DAMAGED, State.GONE}
    assert bool(guest.damage) == (guest.state is State.DAMAGED)
    if guest.record:
        process.created(guest.record)
    [report] = asyncio.run(look_all([guest]))
    assert report.status is None


@given(st.binary())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_as_a_record(place: Path, data: bytes) -> None:
    check_shown(place, data)


@given(st.sampled_from(sorted(RECORD)), JSON)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_value_in_a_record(place: Path, key: str, value: object) -> None:
    check_shown(place, msgspec.json.encode({**RECORD, key: value}))


def test_a_record_as_it_should_be(place: Path) -> None:
    check_shown(place, msgspec.json.encode(RECORD))
    assert find("g", place).state is State.GONE


def test_what_else_may_lie_there(place: Path) -> None:
    (place / "file").touch()
    (place / "link").symlink_to("/")
    (place / ".hidden").mkdir()
    (place / "bad,name").mkdir()
    (place / "deep").mkdir()
    (place / "deep" / "record.json").mkdir()
    (place / "nested").mkdir()
    (place / "nested" / "record.json").write_text("[" * 100_000)
    assert [(guest.name, guest.state) for guest in list_guests(place)] == [
        ("deep", State.DAMAGED),
        ("nested", State.DAMAGED),
    ]
    with pytest.raises(UnknownError, match=r"no guest is called x.*there are: deep, nested"):
        find("x", place)


def test_no_guests_at_all(place: Path) -> None:
    assert list_guests(place / "nowhere") == []
    with pytest.raises(UnknownError):
        find("g", place / "nowhere")
