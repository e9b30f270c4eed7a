# SPDX-License-Identifier: GPL-2.0-or-later
"""A place for guests that is checked afterwards, a QEMU, and a monitor that answers as scripted."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from mdev_orchestrator.machine import Machine

GREETING = b'{"QMP": {"version": {"qemu": {"major": 7}}, "capabilities": []}}\n'

Script = Callable[["Peer"], Awaitable[None]]
Serve = Callable[[Script], AbstractAsyncContextManager[Path]]


class Peer:
    """The server's end of a connection to a fake monitor."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.read = ""

    async def send(self, message: object) -> None:
        """Send an object as JSON, or bytes as they are."""
        data = message if isinstance(message, bytes) else json.dumps(message).encode() + b"\n"
        self.writer.write(data)
        await self.writer.drain()

    async def command(self) -> dict[str, Any]:
        """Wait for the next command. The client sends JSON objects with nothing between them."""
        while True:
            try:
                value, end = json.JSONDecoder().raw_decode(self.read)
            except ValueError:
                data = await self.reader.read(1 << 16)
                if not data:
                    raise ConnectionError from None
                self.read += data.decode()
            else:
                self.read = self.read[end:]
                result: dict[str, Any] = value
                return result

    async def answer(self, value: object) -> dict[str, Any]:
        """Wait for a command and return ``value`` to it."""
        command = await self.command()
        await self.send({"return": value, "id": command.get("id")})
        return command

    async def refuse(self, text: str, error_class: str = "GenericError") -> dict[str, Any]:
        """Wait for a command and refuse it."""
        command = await self.command()
        error = {"class": error_class, "desc": text}
        await self.send({"error": error, "id": command.get("id")})
        return command

    async def greet(self) -> None:
        """Greet and agree on capabilities."""
        await self.send(GREETING)
        await self.answer({})

    async def hang(self) -> None:
        """Say nothing until the client goes."""
        while await self.reader.read(1 << 16):
            pass


async def listen(
    script: Script, path: Path
) -> tuple[asyncio.AbstractServer, set[asyncio.Task[None]]]:
    """Run a script for each client of a socket; the server, and the tasks of its clients."""
    tasks: set[asyncio.Task[None]] = set()

    async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        tasks.add(task)
        try:
            await script(Peer(reader, writer))
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            tasks.discard(task)
            writer.close()

    return await asyncio.start_unix_server(client, path, limit=1 << 24), tasks


@pytest.fixture
def place() -> Iterator[Path]:
    """An empty directory with a short name: socket paths have little room."""
    directory = Path(tempfile.mkdtemp(prefix="mdo-"))
    yield directory
    left = processes_of(directory)
    shutil.rmtree(directory)
    assert not left, f"processes left behind: {left}"


def processes_of(directory: Path) -> dict[int, str]:
    """Processes with this directory on their command line."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal() or int(entry.name) == os.getpid():
            continue
        try:
            line = (entry / "cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if os.fsencode(directory) + b"/" in line:
            found[int(entry.name)] = line.replace(b"\0", b" ").decode(errors="replace")
    return found


@pytest.fixture
def machine(place: Path) -> Machine:
    """This machine, with its guests in an empty directory with a short name."""
    (place / "guests").mkdir(mode=0o700)
    return Machine(state=place)


@pytest.fixture
def serve(place: Path) -> Serve:
    """Start a fake monitor that runs a script for each client."""

    @asynccontextmanager
    async def serve(script: Script) -> AsyncIterator[Path]:
        path = place / "qmp.sock"
        server, tasks = await listen(script, path)
        try:
            yield path
        finally:
            server.close()
            if tasks:
                await asyncio.wait(tasks, timeout=5)
            path.unlink(missing_ok=True)  # Python 3.13 does it when the server closes

    return serve


@pytest.fixture(scope="session")
def qemu() -> str:
    """A QEMU; our setup installs one, so its absence is a failure unless it is wanted."""
    path = shutil.which("qemu-system-x86_64")
    if path is None:
        if os.environ.get("MDO_NO_QEMU"):
            pytest.skip("MDO_NO_QEMU is set")
        pytest.fail("qemu-system-x86_64 is not installed; set MDO_NO_QEMU to go without")
    return path


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Fail a test in which the exception of a task is not retrieved."""
    yield
    gc.collect()
    noise = [
        record.getMessage()
        for record in caplog.get_records("call")
        if record.name == "asyncio" and record.levelno >= logging.ERROR
    ]
    assert not noise
