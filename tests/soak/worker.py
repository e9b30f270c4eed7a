# SPDX-License-Identifier: GPL-2.0-or-later
"""A service that uses the library as any other would: one process, one event loop, for hours.

It is told what to do through a pipe, and follows events meanwhile. What the soak looks for in it is
what an hour leaves behind: memory, descriptors, children, exceptions that were never retrieved.
"""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Awaitable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from uuid import UUID, uuid5

import pyudev

import mdev_orchestrator as mdo
from campaign.specs import EXTRA
from mdev_orchestrator.engine import start_groups
from mdev_orchestrator.errors import MdoError
from mdev_orchestrator.host.events import Rescan, UdevMonitor, events
from mdev_orchestrator.spec import Size

TESTS = Path(__file__).resolve().parents[1]
LONGEST = 900.0
"""Seconds after which a move hangs; none takes a tenth of that, unless the machine is very busy."""
SLOW = 300.0
"""Seconds for a QEMU to start: on a busy machine it is late without any fault."""
BUFFER = 4096
"""Bytes of events that may wait for the service: a few."""
DONE = "done"
BARE = "bare exception"


@dataclass(frozen=True)
class Outcome:
    """How something ended.

    :ivar kind: :data:`DONE`, the name of an error's class, or :data:`BARE`.
    :ivar kinds: That, and the classes of :mod:`mdev_orchestrator.errors` that it is one of.
    :ivar words: The error's message; a bare exception's traceback.
    :ivar stray: What the event loop complained about since the last time, or finalizers did.
    """

    kind: str
    words: str = ""
    value: Any = None
    stray: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()

    @property
    def done(self) -> bool:
        return self.kind == DONE

    def __str__(self) -> str:
        return f"{self.kind}: {self.words}" if self.words else self.kind


class Worker:
    """The service, from outside.

    :ivar pid: Its process.
    """

    def __init__(self) -> None:
        self._pipe, theirs = multiprocessing.Pipe()
        number = theirs.fileno()
        # a Python of its own: what pytest keeps of warnings and logs is not the service's memory
        program = f"from soak.worker import serve; serve({number})"
        self._process = subprocess.Popen(
            [sys.executable, "-W", "error::ResourceWarning", "-c", program],
            pass_fds=[number],
            env=os.environ | {"PYTHONPATH": str(TESTS)},
        )
        self.pid = self._process.pid
        theirs.close()

    def call(self, name: str, *arguments: object) -> Outcome:
        """Have something done, and wait for its end."""
        self.tell(name, *arguments)
        return self.answer()

    def tell(self, name: str, *arguments: object) -> None:
        """Have something done, and do not wait."""
        self._pipe.send((name, arguments))

    def answer(self) -> Outcome:
        """The outcome of what it was told last."""
        if not self._pipe.poll(LONGEST):
            return Outcome(BARE, f"it has not ended within {LONGEST:g} s")
        try:
            outcome: Outcome = self._pipe.recv()
        except EOFError:
            return Outcome(BARE, "the service has ended")
        return outcome

    def end(self) -> None:
        self._pipe.close()
        self._process.kill()
        self._process.wait()


def serve(descriptor: int) -> None:
    """Be the service, for the process at the other end of this pipe."""
    asyncio.run(_Service(Connection(descriptor)).run())


class _Service:
    def __init__(self, pipe: Connection) -> None:
        self.pipe = pipe
        self.stray: list[str] = []
        self.lost = 0
        self.machine = mdo.open()

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: self.stray.append(str(context)))
        sys.unraisablehook = lambda unraisable: self.stray.append(str(unraisable.exc_value))
        requests: asyncio.Queue[tuple[str, tuple[Any, ...]] | None] = asyncio.Queue()

        def readable() -> None:
            try:
                requests.put_nowait(self.pipe.recv())
            except EOFError:
                loop.remove_reader(self.pipe.fileno())
                requests.put_nowait(None)

        loop.add_reader(self.pipe.fileno(), readable)
        follower = asyncio.create_task(self.follow())
        while (request := await requests.get()) is not None:
            name, arguments = request
            self.pipe.send(await self.outcome(getattr(self, name)(*arguments)))
        follower.cancel()

    async def outcome(self, doing: Awaitable[Any]) -> Outcome:
        kind, words, value = DONE, "", None
        kinds: tuple[str, ...] = ()
        try:
            value = await doing
        except MdoError as error:
            kind = type(error).__name__
            kinds = tuple(one.__name__ for one in type(error).__mro__)
            words = " / ".join((str(error), *getattr(error, "__notes__", ())))
        except Exception:  # noqa: BLE001 - that there is none is what is looked for
            kind, words = BARE, traceback.format_exc()
        stray, self.stray = tuple(self.stray), []
        return Outcome(kind, words, value, stray, kinds)

    async def follow(self) -> None:
        """Events, through a socket that holds few of them."""
        async for event in events(_narrow_monitor):
            if isinstance(event, Rescan) and "lost" in event.reason:
                self.lost += 1
                await self.machine.scan()  # as one does

    # ---- what it can be told --------------------------------------------------------------------

    async def create(self, type_: str, uuids: list[str], group: str | None = None) -> None:
        asked = [UUID(uuid) for uuid in uuids]
        await self.machine.create_many(type_, len(asked), uuids=asked, group=group)

    async def remove(self, uuids: list[str]) -> None:
        await self.machine.remove([*map(UUID, uuids)], detach=True)

    async def remove_idle(self, uuids: list[str]) -> None:
        await self.machine.remove([*map(UUID, uuids)])

    async def apply(self, path: str) -> bool:
        return (await self.machine.apply(mdo.load(path))).nothing

    async def diff(self, path: str) -> int:
        return len((await self.machine.diff(mdo.load(path))).steps)

    async def destroy(self, name: str) -> None:
        await self.machine.destroy(name, force=True, deadline=0)

    async def attach(self, guest: str, what: str) -> str:
        return str((await self.machine.attach(guest, what)).uuid)

    async def detach(self, guest: str, uuid: str, remove: bool) -> None:
        await self.machine.detach(guest, UUID(uuid), remove=remove)

    async def start(self, name: str, uuids: list[str]) -> None:
        config = mdo.GuestConfig(name=name, memory=Size(16 << 20), extra=tuple(EXTRA))
        asked = [UUID(uuid) for uuid in uuids]
        own = uuid5(UUID(int=5), name)
        await self.machine.start_guest(config, asked, uuid=own, deadline=SLOW)

    async def stop(self, name: str) -> str:
        ended = await self.machine.stop_guest(name, deadline=0, force=True)
        await self.reclaim()
        return ended.how

    async def reclaim(self) -> None:
        await start_groups.reclaim_groups(self.machine)

    async def recover(self) -> list[str]:
        done = await self.machine.recover()
        await self.reclaim()
        return [str(error) for run in done for error in run.errors]

    async def stall(self, seconds: float) -> None:
        """Look at nothing for a while: events overflow."""
        time.sleep(seconds)  # noqa: ASYNC251 - it is what is to happen

    async def objects(self) -> int:
        """Blocks that Python has allocated, all garbage collected."""
        gc.collect()
        return sys.getallocatedblocks()

    async def losses(self) -> int:
        """How often it was told that events were lost."""
        return self.lost


def _narrow_monitor() -> UdevMonitor:
    monitor: UdevMonitor = pyudev.Monitor.from_netlink(pyudev.Context(), source="kernel")
    monitor.set_receive_buffer_size(BUFFER)  # type: ignore[attr-defined]
    monitor.start()  # type: ignore[attr-defined]
    return monitor
