# SPDX-License-Identifier: GPL-2.0-or-later
"""Kernel and udev events about mdevs, as one typed async iterator.

An event is a hint, and only a scan is the truth: the kernel drops events when a listener is slow,
and the ``add`` of an mdev comes before its ``mdev_type`` link. So a stream begins with
:class:`Rescan`, and has another wherever events were lost; a caller that gets one reads the host
again.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from typing import Any, Protocol
from uuid import UUID

from msgspec import Struct

from mdev_orchestrator.errors import HostError, UuidError
from mdev_orchestrator.machine import Machine
from mdev_orchestrator.model import parse_uuid

RECHECK = 1.0
"""Seconds after which a condition is checked again though no event came: some drivers send none,
and a change of permissions has no event at all."""


class Rescan(Struct, frozen=True):
    """Listening began, or events were lost: read the host again."""

    reason: str


class ParentEvent(Struct, frozen=True):
    """A parent registered with the mdev core, or left it."""

    parent: str
    registered: bool


class MdevEvent(Struct, frozen=True):
    """Something happened to an mdev.

    :ivar action: The kernel's word: ``add``, ``bind``, ``change``, ``unbind``, ``remove``.
    :ivar state: Of a ``change``, when its driver says that it came ``online`` or went ``offline``.
    """

    action: str
    uuid: UUID
    parent: str
    state: str | None = None


class NodeEvent(Struct, frozen=True):
    """A VFIO device node came or went; from udev, its rules have run.

    :ivar node: For instance ``/dev/vfio/7``.
    """

    action: str
    node: str


Event = Rescan | ParentEvent | MdevEvent | NodeEvent


class UdevMonitor(Protocol):
    """What is used of :class:`pyudev.Monitor`."""

    def fileno(self) -> int:
        """Descriptor that is readable when events wait."""

    def poll(self, timeout: float) -> Any:  # noqa: ANN401 - pyudev has no types
        """Next device, ``None`` when none waits."""


def udev_monitor(machine: Machine) -> UdevMonitor:
    """A started monitor of udev's events, or the kernel's where no udev runs.

    It has no filter: a parent announces itself in its own subsystem, which may be any. The first
    call takes longer than a coroutine may; :func:`events` makes it in a thread.

    :raise HostError: The kernel gives no event socket.
    """
    import pyudev  # slow to import, and most commands never wait

    source = "udev" if os.path.exists(machine.path("run/udev/control")) else "kernel"
    try:
        monitor: UdevMonitor = pyudev.Monitor.from_netlink(pyudev.Context(), source=source)
        monitor.start()  # type: ignore[attr-defined]  # not part of the protocol
    except OSError as error:
        raise HostError(f"cannot listen to {source} events: {error}") from error
    return monitor


def interpret(properties: Mapping[str, str]) -> Event | None:
    """The event that a uevent's properties describe; ``None`` if it is of another subsystem.

    ``ACTION``, ``DEVPATH``, ``SUBSYSTEM`` and ``DEVNAME`` are in every uevent; ``MDEV_STATE`` is
    what the mdev core adds to the ``change`` of a parent (drivers/vfio/mdev/mdev_core.c).
    """
    try:
        action = properties.get("ACTION") or ""
        path = properties.get("DEVPATH") or ""
        match properties.get("SUBSYSTEM"):
            case "mdev":
                where, _, name = path.rpartition("/")
                state = _state(properties) if action == "change" else None
                return MdevEvent(action, parse_uuid(name), where.rpartition("/")[2], state)
            case "vfio" | "vfio-dev":
                # "vfio0" in vfio-dev has a node only on kernels with that interface
                if node := properties.get("DEVNAME"):
                    return NodeEvent(action, node if node.startswith("/dev/") else f"/dev/{node}")
        state = properties.get("MDEV_STATE")
    except (UuidError, UnicodeDecodeError):
        return None
    if action == "change" and state in ("registered", "unregistered"):
        return ParentEvent(path.rpartition("/")[2], registered=state == "registered")
    return None


def _state(properties: Mapping[str, str]) -> str | None:
    """The new state of an mdev, from ``MVGPU_STATE`` or the variable of another vendor's driver."""
    for name in properties:
        if name.endswith("_STATE") and properties[name] in ("online", "offline"):
            return properties[name]
    return None


async def events(make_monitor: Callable[[], UdevMonitor]) -> AsyncGenerator[Event, None]:
    """Give every event about parents, mdevs and VFIO nodes, without end.

    :param make_monitor: Gives a started monitor, such as :func:`udev_monitor`; called in a thread,
        once at first and again whenever events were lost.
    :raise HostError: The kernel gives no event socket.
    """
    reason = "listening"
    while True:
        monitor = await asyncio.to_thread(make_monitor)
        yield Rescan(reason)
        try:
            while True:
                while (device := monitor.poll(0)) is not None:
                    if (event := interpret(device.properties)) is not None:
                        yield event
                await _readable(monitor.fileno())
        except OSError as error:  # ENOBUFS above all: the socket overflowed
            reason = f"events were lost: {os.strerror(error.errno or 0)}"


async def wait_until(machine: Machine, check: Callable[[], bool]) -> None:
    """Return as soon as ``check`` is true; put a deadline around it.

    :param check: Called on the event loop, on every event and every :data:`RECHECK` seconds: it
        must be quick.
    """
    if check():
        return
    stream = events(lambda: udev_monitor(machine))
    async with aclosing(stream):
        ahead = asyncio.ensure_future(anext(stream))
        try:
            while True:
                await asyncio.wait((ahead,), timeout=RECHECK)
                if ahead.done():
                    ahead.result()
                    ahead = asyncio.ensure_future(anext(stream))
                if check():
                    return
        finally:
            ahead.cancel()
            await asyncio.wait((ahead,))


async def _readable(fd: int) -> None:
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    # a reader only while something waits for it: else an unread event would keep the loop spinning
    loop.add_reader(fd, _settle, ready)
    try:
        await ready
    finally:
        loop.remove_reader(fd)


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
