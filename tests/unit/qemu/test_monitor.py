# SPDX-License-Identifier: GPL-2.0-or-later
"""A monitor that answers nonsense, late, or never."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import socket
import weakref
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from qemu.qmp import QMPClient

from mdev_orchestrator.errors import CommandError, DeadlineError, MdoError, Outcome, QemuError
from mdev_orchestrator.qemu import monitor
from mdev_orchestrator.qemu.monitor import MAX_EVENTS, QmpMonitor, connect
from unit.qemu.conftest import GREETING, Peer, Script, Serve

SOON = 0.2
LONG = 30.0


async def ask(path: Path, greeting: float = LONG, reply: float = LONG) -> dict[str, int]:
    async with connect(path, "guest g", deadline=greeting) as qmp:
        return await qmp.execute("query-x", dict[str, int], deadline=reply)


def after_greeting(reply: object) -> Script:
    async def script(peer: Peer) -> None:
        await peer.greet()
        command = await peer.command()
        if isinstance(reply, dict):
            await peer.send({"id": command["id"], **reply})
        else:
            await peer.send(reply)
        await peer.hang()

    return script


async def test_an_answer(serve: Serve) -> None:
    async with serve(after_greeting({"return": {"a": 1}})) as path:
        assert await ask(path) == {"a": 1}


async def test_no_process_listens(place: Path) -> None:
    with pytest.raises(
        QemuError, match="guest g: cannot reach its monitor: No such file"
    ) as caught:
        await ask(place / "qmp.sock")
    assert (caught.value.outcome, caught.value.subject) == (Outcome.NO_EFFECT, "guest g")


async def test_a_socket_that_no_process_holds(place: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(place / "qmp.sock"))
    with pytest.raises(QemuError, match="refused"):
        await ask(place / "qmp.sock")


async def test_too_many_wait(place: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(place / "qmp.sock"))
        sock.listen(0)
        with socket.socket(socket.AF_UNIX) as first:
            first.connect(str(place / "qmp.sock"))
            with pytest.raises(DeadlineError, match="another program may hold"):
                await ask(place / "qmp.sock", SOON)


async def test_no_greeting(serve: Serve) -> None:
    async with serve(Peer.hang) as path:
        with pytest.raises(
            DeadlineError, match=r"did not answer within 0\.2 s.*another program"
        ) as caught:
            await ask(path, SOON)
    assert caught.value.outcome is Outcome.NO_EFFECT  # no command was sent


NONSENSE = [
    b"SSH-2.0-OpenSSH_9.2\n",
    b"\n",
    b"[]\n",
    b"{}\n",
    b"null\n",
    b'{"QMP": 1}\n',
    b'{"QMP": {"version": 1}}\n',
    b'{"QMP": {"version": {}, "capabilities": 3}}\n',
    b"\xff\xfe\n",
    b"[" * 100_000 + b"\n",
    b'"' + b"x" * (11 << 20) + b'"\n',
    b'{"event": ["a"]}\n',
    b'{"return": {}, "id": {}}\n',
    b'{"error": 1}\n',
]


@pytest.mark.parametrize("nonsense", NONSENSE, ids=lambda data: repr(data[:20]))
async def test_no_qmp_at_all(serve: Serve, nonsense: bytes) -> None:
    async def script(peer: Peer) -> None:
        await peer.send(nonsense)
        await peer.hang()

    async with serve(script) as path:
        with pytest.raises(QemuError, match="the answer is no QMP"):
            await ask(path)


@pytest.mark.parametrize("nonsense", NONSENSE, ids=lambda data: repr(data[:20]))
async def test_nonsense_instead_of_a_reply(serve: Serve, nonsense: bytes) -> None:
    async with serve(after_greeting(nonsense)) as path:
        with pytest.raises(
            MdoError, match=r"guest g: (query-x: the answer is no|no reply)"
        ) as caught:
            await ask(path, reply=SOON)
    assert caught.value.outcome is Outcome.UNKNOWN


async def test_capabilities_refused(serve: Serve) -> None:
    async def script(peer: Peer) -> None:
        await peer.send(GREETING)
        await peer.refuse("no")
        await peer.hang()

    async with serve(script) as path:
        with pytest.raises(QemuError, match="guest g") as caught:
            await ask(path)
    assert caught.value.outcome is Outcome.NO_EFFECT


@pytest.mark.parametrize(
    "early",
    [
        b"",
        GREETING[:20],
        GREETING,
        GREETING + b'{"return": {}}\n',
        GREETING + b'{"return": {}}\n{"ret',
    ],
)
async def test_it_hangs_up(serve: Serve, early: bytes) -> None:
    async def script(peer: Peer) -> None:
        await peer.send(early)

    async with serve(script) as path:
        with pytest.raises(QemuError, match=r"hung up|no QMP|Broken pipe|reset"):
            await ask(path)


async def says_nothing(peer: Peer) -> None:
    """Serve another client, or be stopped."""
    await peer.hang()


async def only_greets(peer: Peer) -> None:
    await peer.send(GREETING)
    await peer.hang()


@pytest.mark.parametrize("script", [says_nothing, only_greets])
async def test_a_cancelled_connect_is_quiet(
    serve: Serve, caplog: pytest.LogCaptureFixture, script: Script
) -> None:
    """Fault 21: "_GatheringFuture exception was never retrieved", and a hundred lines."""
    async with serve(script) as path:
        task = asyncio.ensure_future(ask(path))
        await asyncio.sleep(SOON)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    gc.collect()
    assert [record for record in caplog.records if record.name == "asyncio"] == []


def test_a_program_that_ends_while_it_waits_for_a_greeting_is_quiet(
    place: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Fault 21: asyncio.run() cancels every task, those of qemu.qmp too."""
    path = place / "qmp.sock"

    async def main() -> None:
        cancelled = asyncio.ensure_future(ask(path))
        left = asyncio.ensure_future(ask(path))
        await asyncio.sleep(SOON)
        cancelled.cancel()
        del left

    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        sock.listen(8)
        asyncio.run(main())
    gc.collect()
    assert caplog.records == []
    assert capfd.readouterr().err == ""


async def ends(qmp: QmpMonitor) -> None:
    """QEMU is killed while no command is under way."""
    with contextlib.suppress(QemuError):
        await listen(qmp, 1)


async def asks(qmp: QmpMonitor) -> None:
    with contextlib.suppress(QemuError):
        await qmp.execute("query-x", object)


async def leaves(qmp: QmpMonitor) -> None:
    """All is well."""


@pytest.mark.parametrize("use", [ends, asks, leaves])
async def test_a_connection_leaves_no_circles(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, use: Callable[[QmpMonitor], Awaitable[None]]
) -> None:
    """They would stay until Python looks for such, in a process that has one for each guest."""
    made: list[weakref.ref[QMPClient]] = []

    class Client(monitor._Client):
        def __init__(self) -> None:
            super().__init__()
            made.append(weakref.ref(self))

    async def script(peer: Peer) -> None:
        await peer.greet()
        if use is ends:
            await peer.answer({})
        elif use is asks:
            await peer.command()
        else:
            await peer.hang()

    monkeypatch.setattr(monitor, "_Client", Client)
    monkeypatch.setattr(logging.getLogger("qemu.qmp"), "propagate", False)  # pytest keeps it all
    gc.disable()
    try:
        async with serve(script) as path:
            async with connect(path, "guest g") as qmp:
                await use(qmp)
            del qmp
            async with asyncio.timeout(LONG):
                while made[0]() is not None:  # its transport goes a few turns of the loop later
                    await asyncio.sleep(0.01)
            assert len(made) == 1
    finally:
        gc.enable()


async def test_it_hangs_up_on_a_command(serve: Serve) -> None:
    async def script(peer: Peer) -> None:
        await peer.greet()
        await peer.command()

    async with serve(script) as path:
        with pytest.raises(QemuError, match="query-x: the monitor hung up") as caught:
            await ask(path)
    assert caught.value.outcome is Outcome.UNKNOWN


async def test_a_command_on_a_connection_that_has_ended_was_not_sent(serve: Serve) -> None:
    connected = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.greet()
        await connected.wait()

    async with serve(script) as path, connect(path, "guest g") as qmp:
        connected.set()
        await qmp.ended()
        with pytest.raises(QemuError, match="query-x") as caught:
            await qmp.execute("query-x", object)
        assert caught.value.outcome is Outcome.NO_EFFECT


async def test_it_never_replies(serve: Serve) -> None:
    async def script(peer: Peer) -> None:
        await peer.greet()
        await peer.hang()

    async with serve(script) as path, connect(path, "guest g") as qmp:
        with pytest.raises(DeadlineError, match=r"no reply to query-x within 0\.2 s") as caught:
            await qmp.execute("query-x", object, deadline=SOON)
        assert caught.value.outcome is Outcome.UNKNOWN


async def test_it_stops_reading(serve: Serve) -> None:
    stop = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.greet()
        await stop.wait()

    async with serve(script) as path:
        with pytest.raises(DeadlineError):
            async with connect(path, "guest g") as qmp:
                await qmp.execute("x", object, {"data": "x" * (8 << 20)}, deadline=SOON)
        stop.set()


async def test_a_late_reply_is_not_taken_for_the_next(serve: Serve) -> None:
    async def script(peer: Peer) -> None:
        await peer.greet()
        late = await peer.command()
        second = await peer.command()
        await peer.send({"return": {"late": 1}, "id": late["id"]})
        await peer.send({"return": {"second": 2}, "id": second["id"]})
        await peer.hang()

    async with serve(script) as path, connect(path, "guest g") as qmp:
        with pytest.raises(DeadlineError):
            await qmp.execute("query-x", object, deadline=SOON)
        assert await qmp.execute("query-y", dict[str, int]) == {"second": 2}


async def test_qemu_refuses(serve: Serve) -> None:
    error = {"class": "DeviceNotFound", "desc": "Device 'x' not found"}
    async with serve(after_greeting({"error": error})) as path:
        with pytest.raises(CommandError, match="guest g: query-x: Device 'x' not found") as caught:
            await ask(path)
    assert caught.value.qmp_class == "DeviceNotFound"
    assert caught.value.outcome is Outcome.NO_EFFECT


@pytest.mark.parametrize("value", [None, [], "x", {"a": "b"}, {"a": {"b": [1] * 1000}}])
async def test_an_answer_of_another_shape(serve: Serve, value: object) -> None:
    async with serve(after_greeting({"return": value})) as path:
        with pytest.raises(QemuError, match="query-x answered something odd") as caught:
            await ask(path)
    assert caught.value.outcome is Outcome.UNKNOWN
    assert len(caught.value.message) < 300


@pytest.mark.parametrize("reply", [{}, {"error": {}}, {"error": {"class": 1, "desc": 2}}])
async def test_a_reply_that_is_none(serve: Serve, reply: object) -> None:
    async with serve(after_greeting(reply)) as path:
        with pytest.raises(QemuError, match="query-x") as caught:
            await ask(path)
    assert caught.value.outcome is Outcome.UNKNOWN


async def test_a_cancelled_command_leaves_nothing(serve: Serve) -> None:
    asked = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.greet()
        await peer.command()
        asked.set()
        await peer.hang()

    async with serve(script) as path:
        task = asyncio.ensure_future(ask(path))
        await asked.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_quit(serve: Serve) -> None:
    async def hangs_up(peer: Peer) -> None:
        await peer.greet()
        await peer.command()

    async with serve(hangs_up) as path, connect(path, "guest g") as qmp:
        await qmp.quit()
    async with serve(after_greeting({"return": {}})) as path, connect(path, "guest g") as qmp:
        await qmp.quit()
    async with serve(after_greeting({"error": {"class": "x", "desc": "no"}})) as path:
        with pytest.raises(CommandError, match="quit: no"):
            async with connect(path, "guest g") as qmp:
                await qmp.quit()


def event(number: int, device: object = "d") -> dict[str, object]:
    return {"event": "DEVICE_DELETED", "data": {"device": device, "n": number}, "timestamp": {}}


async def listen(qmp: QmpMonitor, wanted: int, deadline: float = LONG) -> list[int]:
    with qmp.events(("DEVICE_DELETED",), lambda data: data.get("device") == "d") as events:
        await qmp.execute("go", object)
        found: list[int] = []
        while len(found) < wanted and (one := await events.next(deadline)):
            found.append(one.data["n"])
        return found


async def test_events_are_filtered(serve: Serve) -> None:
    async def script(peer: Peer) -> None:
        await peer.greet()
        await peer.send(event(0))  # before the listener is there
        await peer.answer({})
        await peer.send({"event": "STOP", "timestamp": {}})
        await peer.send({"event": "DEVICE_DELETED", "data": 3})
        await peer.send(event(1, "other"))
        await peer.send(event(2, ["d"]))
        await peer.send(event(3))
        await peer.send(event(4))
        await peer.hang()

    async with serve(script) as path, connect(path, "guest g") as qmp:
        assert await listen(qmp, 2) == [3, 4]


async def test_no_event_in_time(serve: Serve) -> None:
    async with serve(after_greeting({"return": {}})) as path, connect(path, "guest g") as qmp:
        assert await listen(qmp, 1, SOON) == []


async def test_a_flood_of_other_events_hides_nothing(serve: Serve) -> None:
    async def script(peer: Peer) -> None:
        await peer.greet()
        await peer.answer({})
        for number in range(5000):
            await peer.send(event(number, "other"))
        await peer.send(event(7))
        await peer.answer({"a": 1})

    async with serve(script) as path, connect(path, "guest g") as qmp:
        assert await listen(qmp, 1) == [7]
        assert await qmp.execute("query-x", dict[str, int]) == {"a": 1}


async def test_a_flood_of_ours_is_an_error(serve: Serve) -> None:
    async def script(peer: Peer) -> None:
        await peer.greet()
        command = await peer.command()
        for number in range(MAX_EVENTS + 1):
            await peer.send(event(number))
        await peer.send({"return": {}, "id": command["id"]})
        await peer.hang()

    async with serve(script) as path, connect(path, "guest g") as qmp:
        with pytest.raises(QemuError, match="events at once"):
            await listen(qmp, 1)


async def test_an_endless_flood_does_not_stop_the_clock(serve: Serve) -> None:
    async def script(peer: Peer) -> None:
        await peer.greet()
        await peer.command()
        while True:
            await peer.send(event(1, "other"))

    async with serve(script) as path:
        with pytest.raises(DeadlineError):
            async with connect(path, "guest g") as qmp:
                await qmp.execute("x", object, deadline=SOON)


async def test_it_ends_while_an_event_is_waited_for(serve: Serve) -> None:
    async def script(peer: Peer) -> None:
        await peer.greet()
        await peer.answer({})

    async with serve(script) as path, connect(path, "guest g") as qmp:
        with pytest.raises(QemuError, match="hung up while waiting for an event"):
            await listen(qmp, 1)


@given(st.binary(max_size=80), st.integers(0, 2))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_it_sends_only_our_errors_come_out(serve: Serve, data: bytes, when: int) -> None:
    async def script(peer: Peer) -> None:
        if when > 0:
            await peer.send(GREETING)
            await peer.command()
        if when > 1:
            await peer.send({"return": {}})
            await peer.command()
        await peer.send(data)

    async def main() -> None:
        async with serve(script) as path:
            with pytest.raises(MdoError):
                await ask(path)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("fault", "said"),
    [(EOFError(), "the monitor hung up"), (ConnectionResetError(104, "Reset"), "Reset")],
)
async def test_a_hang_up_at_the_moment_of_the_deadline_is_no_exception_of_python(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, fault: Exception, said: str
) -> None:
    async def connect_(client: QMPClient, address: object) -> None:
        raise fault  # as the fuzzer saw it once in some thousand times (tests/fuzz/parse_qmp.py)

    monkeypatch.setattr(QMPClient, "connect", connect_)
    async with serve(Peer.greet) as path:
        with pytest.raises(QemuError, match=f"guest g: {said}"):
            async with connect(path, "guest g"):
                pass
