# SPDX-License-Identifier: GPL-2.0-or-later
"""Events of guests' QEMUs: of those that are there, that come later, and that go."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from mdev_orchestrator.errors import HostError
from mdev_orchestrator.machine import Machine
from mdev_orchestrator.qemu import events
from mdev_orchestrator.qemu.events import StateChange, Unwatched, Watched, guest_events
from mdev_orchestrator.qemu.process import WATCH, ProcessRecord, RunningGuest, State
from unit.qemu.conftest import Peer, Serve

U1 = UUID("83b8f4f2-509f-382f-3c1e-e6bfe0fa1001")
GROUP = UUID("83b8f4f2-509f-382f-3c1e-e6bfe0fa10ff")
DATA: dict[str, Any] = {
    "qom-path": "/machine/peripheral/vgpu0",
    "uuid": str(U1),
    "parent": "igd0",
    "group": str(GROUP),
    "old-state": "offline",
    "new-state": "online",
}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "LOOK_SECONDS", 0.01)


def guest_at(path: Path, *, ready: bool = True) -> RunningGuest:
    """A guest whose monitor for events is the one that is served."""
    watch = path.parent / WATCH
    watch.unlink(missing_ok=True)
    watch.symlink_to(path)
    record = ProcessRecord(
        name="g",
        uuid=U1,
        pid=4242,
        start_time=1,
        boot_id="",
        created=0,
        argv=[],
        mdevs=[],
        memory=0,
        cpus=1,
        ready=ready,
    )
    return RunningGuest("g", path.parent, State.RUNNING if ready else State.STARTING, record)


async def collected(
    count: int, guests: list[RunningGuest], first: asyncio.Event | None = None
) -> list[events.GuestEvent]:
    """So many events; ``first`` is set when there is one."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(events, "list_guests", lambda _machine: guests)
        async with asyncio.timeout(10), aclosing(guest_events(Machine())) as stream:
            async for event in stream:
                found.append(event)
                if first:
                    first.set()
                if len(found) == count:
                    break
    return found


async def test_a_change_and_the_end(serve: Serve) -> None:
    watched = asyncio.Event()

    async def tell(peer: Peer) -> None:
        await peer.greet()
        await watched.wait()
        await peer.send({"event": "RESUME", "data": {}})
        await peer.send({"event": events.STATE_CHANGED, "data": DATA})
        refusal = DATA | {"new-state": "offline", "reason": "no link left"}
        del refusal["group"]
        await peer.send({"event": events.STATE_CHANGED, "data": refusal})

    async with serve(tell) as path:
        assert await collected(4, [guest_at(path)], watched) == [
            Watched("g"),
            StateChange("g", U1, "igd0", GROUP, "offline", "online"),
            StateChange("g", U1, "igd0", None, "offline", "offline", "no link left"),
            Unwatched("g"),
        ]


async def test_a_guest_that_is_there_later(serve: Serve) -> None:
    async def tell(peer: Peer) -> None:
        await peer.greet()
        await peer.hang()

    guests: list[RunningGuest] = []
    async with serve(tell) as path:
        waiting = asyncio.ensure_future(collected(1, guests))
        await asyncio.sleep(0.05)
        guests.append(guest_at(path, ready=False))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        guests[:] = [guest_at(path)]
        assert await waiting == [Watched("g")]


async def test_another_watcher_waits_for_its_turn(serve: Serve) -> None:
    turn = asyncio.Event()

    async def tell(peer: Peer) -> None:
        await turn.wait()
        await peer.greet()
        await peer.hang()

    async with serve(tell) as path:
        waiting = asyncio.ensure_future(collected(1, [guest_at(path)]))
        await asyncio.sleep(0.1)
        assert not waiting.done()
        turn.set()
        assert await waiting == [Watched("g")]


async def test_nonsense_ends_the_watch_of_that_guest(serve: Serve) -> None:
    watched = asyncio.Event()

    async def tell(peer: Peer) -> None:
        await peer.greet()
        await watched.wait()
        await peer.send({"event": events.STATE_CHANGED, "data": {"uuid": "none"}})
        await peer.hang()

    async with serve(tell) as path:
        told = await collected(2, [guest_at(path)], watched)
        assert told == [Watched("g"), Unwatched("g")]


async def test_a_guest_from_before_there_was_such_a_monitor_is_silent(place: Path) -> None:
    guest = guest_at(place / "none")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await collected(1, [guest])


async def test_an_error_of_the_look_ends_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 8: it was lost, and the command hung."""

    def fails(_machine: Machine) -> list[RunningGuest]:
        raise HostError("cannot read it")

    monkeypatch.setattr(events, "list_guests", fails)
    async with asyncio.timeout(10), aclosing(guest_events(Machine())) as stream:
        with pytest.raises(HostError, match="cannot read it"):
            await anext(stream)


async def test_a_fault_in_one_guest_ends_the_stream(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise ArithmeticError("a fault of ours")

    watched = asyncio.Event()

    async def tell(peer: Peer) -> None:
        await peer.greet()
        await watched.wait()
        await peer.send({"event": events.STATE_CHANGED, "data": DATA})
        await peer.hang()

    monkeypatch.setattr(events, "_change", fails)
    async with serve(tell) as path:
        with pytest.raises(ArithmeticError, match="of ours"):
            await collected(3, [guest_at(path)], watched)
