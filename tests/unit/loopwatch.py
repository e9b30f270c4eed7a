# SPDX-License-Identifier: GPL-2.0-or-later
"""Finds callbacks that hold an event loop: nothing else of the program goes on meanwhile.

What counts is the time that a callback computes or is blocked in the kernel. On a busy machine it
also waits for a processor, or for another thread of the process that does (to start it, or for the
interpreter's lock). That is no fault of the callback: the time that threads have waited is
subtracted, as the kernel counts it (the second number of ``/proc/PID/task/TID/schedstat``). So is
the time of Python's garbage collector, which visits what all tests before have left.
"""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LIMIT = 0.1
"""Seconds that a callback may take."""

_local = threading.local()


@contextmanager
def watch() -> Iterator[list[str]]:
    """Note callbacks of all event loops that take longer than :data:`LIMIT` while the block runs.

    :return: What is noted, one sentence each.
    """
    holds: list[str] = []
    collecting = [0.0, 0.0]  # when it began, and seconds in all
    original = asyncio.Handle._run
    threads = _OtherThreads()

    def collect(phase: str, _info: object) -> None:
        if phase == "start":
            collecting[0] = time.perf_counter()
        else:
            collecting[1] += time.perf_counter() - collecting[0]

    def run(handle: asyncio.Handle) -> None:
        threads.renew()
        spared, began = _queued() + collecting[1], time.perf_counter()
        original(handle)
        if time.perf_counter() - began > LIMIT:
            held = time.perf_counter() - began - (_queued() + collecting[1] - spared)
            if held > LIMIT and (held := held - threads.queued()) > LIMIT:
                holds.append(f"{held * 1000:.0f} ms in {_named(handle)}")

    asyncio.Handle._run = run  # type: ignore[method-assign]
    gc.callbacks.append(collect)
    try:
        yield holds
    finally:
        gc.callbacks.remove(collect)
        asyncio.Handle._run = original  # type: ignore[method-assign]


def _named(handle: asyncio.Handle) -> str:
    task = getattr(handle._callback, "__self__", None)  # type: ignore[attr-defined]
    return repr(task if isinstance(task, asyncio.Task) else handle)


class _OtherThreads:
    """How long the other threads of this process have waited for a processor."""

    def __init__(self) -> None:
        self._since = 0.0
        self._before: dict[str, float] = {}

    def renew(self) -> None:
        """Count from now on, unless that was said a moment ago: it takes long."""
        now = time.perf_counter()
        if now - self._since > LIMIT / 2:
            self._since = now
            self._before = self._read()

    def queued(self) -> float:
        """Seconds, all threads together; from :data:`LIMIT` / 2 before the last callback began."""
        return sum(delay - self._before.get(name, 0.0) for name, delay in self._read().items())

    @staticmethod
    def _read() -> dict[str, float]:
        delays = {}
        own = str(threading.get_native_id())
        for task in Path("/proc/self/task").iterdir():
            with suppress(OSError):  # it has ended
                if task.name != own:
                    delays[task.name] = _delay((task / "schedstat").read_bytes())
        return delays


def _queued() -> float:
    """Seconds that this thread has waited for a processor."""
    if getattr(_local, "pid", None) != os.getpid():
        _local.pid = os.getpid()
        _local.file = os.open("/proc/thread-self/schedstat", os.O_RDONLY | os.O_CLOEXEC)
    return _delay(os.pread(_local.file, 100, 0))


def _delay(schedstat: bytes) -> float:
    return int(schedstat.split()[1]) / 1e9
