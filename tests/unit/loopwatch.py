# SPDX-License-Identifier: GPL-2.0-or-later
"""Finds callbacks that hold an event loop: nothing else of the program goes on meanwhile.

What counts is the time that a callback computes or is blocked in the kernel. The time that it could
run and another process has the processor is the machine's business, and is subtracted, as the
kernel counts it (the second number of ``/proc/thread-self/schedstat``). So is the time in which a
thread that it starts waits for a processor, and the time of Python's garbage collector, which
visits what all tests before have left.
"""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

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
    original, start = asyncio.Handle._run, threading.Thread.start

    def collect(phase: str, _info: object) -> None:
        if phase == "start":
            collecting[0] = time.perf_counter()
        else:
            collecting[1] += time.perf_counter() - collecting[0]

    def start_thread(thread: threading.Thread) -> None:
        began, queued = time.perf_counter(), _queued()
        start(thread)  # returns when the thread runs
        _local.starting = _starting() + time.perf_counter() - began - (_queued() - queued)

    def spared() -> float:
        return _queued() + _starting() + collecting[1]

    def run(handle: asyncio.Handle) -> None:
        before, began = spared(), time.perf_counter()
        original(handle)
        if time.perf_counter() - began > LIMIT:
            held = time.perf_counter() - began - (spared() - before)
            if held > LIMIT:
                holds.append(f"{held * 1000:.0f} ms in {_named(handle)}")

    asyncio.Handle._run = run  # type: ignore[method-assign]
    threading.Thread.start = start_thread  # type: ignore[method-assign]
    gc.callbacks.append(collect)
    try:
        yield holds
    finally:
        gc.callbacks.remove(collect)
        asyncio.Handle._run = original  # type: ignore[method-assign]
        threading.Thread.start = start  # type: ignore[method-assign]


def _starting() -> float:
    """Seconds that this thread has waited for threads to start."""
    return getattr(_local, "starting", 0.0)


def _named(handle: asyncio.Handle) -> str:
    task = getattr(handle._callback, "__self__", None)  # type: ignore[attr-defined]
    return repr(task if isinstance(task, asyncio.Task) else handle)


def _queued() -> float:
    """Seconds that this thread has waited for a processor."""
    if getattr(_local, "pid", None) != os.getpid():
        _local.pid = os.getpid()
        _local.file = os.open("/proc/thread-self/schedstat", os.O_RDONLY | os.O_CLOEXEC)
    return int(os.pread(_local.file, 100, 0).split()[1]) / 1e9
