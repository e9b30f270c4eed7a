# SPDX-License-Identifier: GPL-2.0-or-later
"""What a QEMU answers: greeting, replies, events, in any order and any shape."""

import asyncio
import json
from pathlib import Path
from uuid import UUID

from fuzz import harness
from mdev_orchestrator.errors import MdoError
from mdev_orchestrator.qemu import events, features, hotplug, monitor, process, status
from mdev_orchestrator.qemu.command import GuestMdev

PLACE = harness.scratch()
DEV = UUID("0f0f9c0e-6f2c-4a5e-8d5b-0a5a1d3a9a11")
MDEV = GuestMdev(DEV, Path(f"/sys/bus/mdev/devices/{DEV}"))
RECORD = process.ProcessRecord(
    name="a", uuid=DEV, pid=2, start_time=0, boot_id="", created=0, argv=[], mdevs=[], memory=0,
    cpus=1, ready=True,
)  # fmt: skip
GUEST = process.RunningGuest("a", PLACE, process.State.RUNNING, RECORD)
GREETING = b'{"QMP": {"version": {}, "capabilities": []}}\n'
SECONDS = 0.2
LOOP = asyncio.new_event_loop()
COMPLAINTS: list[object] = []
LOOP.set_exception_handler(lambda _, context: COMPLAINTS.append(context))


async def _watch() -> None:
    """What ``mdo watch`` does with one guest."""

    async def put(event: events.GuestEvent) -> None:
        str(event).encode()

    async with asyncio.timeout(SECONDS):
        await events._listen(GUEST, put)


async def _look() -> None:
    report = await status.look(GUEST, deadline=SECONDS)
    str(report.mdevs).encode()


async def _properties() -> None:
    async with monitor.connect(GUEST.qmp_socket, GUEST.label, deadline=SECONDS) as qmp:
        await features.has_property(qmp, "vfio-pci", "mdev-start")


async def _ports() -> None:
    async with monitor.connect(GUEST.qmp_socket, GUEST.label, deadline=SECONDS) as qmp:
        await hotplug.ports(qmp)


async def _plug() -> None:
    end = LOOP.time() + SECONDS
    async with monitor.connect(GUEST.qmp_socket, GUEST.label, end=end) as qmp:
        await hotplug.plug_by(qmp, hotplug.device_for(MDEV), end, wait_guest=True)


async def _unplug() -> None:
    """What ``mdo detach`` does when it has found the guest."""
    end = LOOP.time() + SECONDS
    async with monitor.connect(GUEST.qmp_socket, GUEST.label, end=end) as qmp:
        await hotplug._unplug(qmp, MDEV.device_id, end, SECONDS)


TASKS = {
    b"watch": _watch,
    b"look": _look,
    b"properties": _properties,
    b"ports": _ports,
    b"plug": _plug,
    b"mdevs": lambda: hotplug.mdevs_of(GUEST, deadline=SECONDS),
    b"taken": lambda: hotplug.wait_taken(GUEST, DEV, SECONDS),
    b"unplug": _unplug,
    b"pending": lambda: hotplug.await_pending_unplug(GUEST, DEV, deadline=SECONDS),
    b"console": lambda: status.check_console_free(GUEST, deadline=SECONDS),
}


def one(data: bytes) -> None:
    """The input: a line that names a task, then lines that QEMU says.

    A line with ``return`` or ``error`` waits for a command, and gets that one's id if it has none.
    When there is nothing left to say, QEMU hangs up.
    """
    name, _, script = data.partition(b"\n")
    task = TASKS.get(name, _look)
    try:
        LOOP.run_until_complete(_between(script, task))
    except MdoError as error:
        harness.check_message(error)
    except TimeoutError:
        assert task is _watch  # the others have deadlines of their own
    assert not COMPLAINTS, COMPLAINTS  # such as an exception that was never retrieved


async def _between(script: bytes, task) -> None:  # type: ignore[no-untyped-def] # noqa: ANN001
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await _say(script, reader, writer)
        except OSError:
            pass  # the client has gone
        finally:
            writer.close()

    servers = []
    for path in (GUEST.qmp_socket, GUEST.query_socket, GUEST.watch_socket):
        path.unlink(missing_ok=True)
        servers.append(await asyncio.start_unix_server(serve, path))
    try:
        async with asyncio.timeout(8):
            await task()
    finally:
        for server in servers:
            server.close()
        if others := asyncio.all_tasks() - {asyncio.current_task()}:
            _, left = await asyncio.wait(others, timeout=2)
            assert not left, left  # nothing else would ever end them


async def _say(script: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    lines = script.splitlines(keepends=True)
    if not (lines and b"QMP" in lines[0]):
        lines = [GREETING, b'{"return": {}}', *lines]
    for line in lines:
        if b'"return"' in line or b'"error"' in line:
            asked = await reader.read(1 << 16)
            if not asked:
                return
            writer.write(_with_id(line, asked))
        else:
            writer.write(line)
        await writer.drain()


def _with_id(line: bytes, asked: bytes) -> bytes:
    try:
        message, command = json.loads(line), json.loads(asked)
    except (ValueError, RecursionError):
        return line
    if isinstance(message, dict) and isinstance(command, dict):
        message.setdefault("id", command.get("id"))
        return json.dumps(message).encode() + b"\n"
    return line
