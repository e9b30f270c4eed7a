# SPDX-License-Identifier: GPL-2.0-or-later
"""Finds callbacks that hold an event loop: nothing else of the program goes on meanwhile.

What counts is the time that a callback computes or is blocked in the kernel. What a busy machine
adds is subtracted:

* the time that the callback could run and another process has the processor, as the kernel counts
  it (the second number of ``/proc/thread-self/schedstat``);
* the time that a thread waits for a processor that the callback starts;
* the time that no thread of this process gets on, because the one that has Python's lock waits for
  a processor, or a child that was forked does: a thread that does nothing but sleep is late then;
* the time of Python's garbage collector, which visits what all tests before have left.

The time that the callback itself computes always counts.
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
_NAP = 0.02
"""Seconds that the thread sleeps which finds out whether threads get on."""

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
        return _queued() + _starting() + _sleeper.late() + collecting[1]

    def run(handle: asyncio.Handle) -> None:
        before, began, computed = spared(), time.perf_counter(), time.thread_time() - collecting[1]
        original(handle)
        if time.perf_counter() - began > LIMIT:
            computed = time.thread_time() - collecting[1] - computed
            held = max(time.perf_counter() - began - (spared() - before), computed)
            if held > LIMIT:
                holds.append(f"{held * 1000:.0f} ms in {handle!r}")

    _sleeper.begin()
    asyncio.Handle._run = run  # type: ignore[method-assign]
    threading.Thread.start = start_thread  # type: ignore[method-assign]
    gc.callbacks.append(collect)
    try:
        yield holds
    finally:
        gc.callbacks.remove(collect)
        asyncio.Handle._run = original  # type: ignore[method-assign]
        threading.Thread.start = start  # type: ignore[method-assign]


class _Sleeper:
    """A thread that sleeps, again and again, and notes how much too late it wakes up."""

    def __init__(self) -> None:
        self._pid = 0
        self._slept = 0.0
        self._late = 0.0

    def begin(self) -> None:
        """Start the thread, once in each process."""
        if self._pid != os.getpid():
            self._pid = os.getpid()
            self._slept = time.perf_counter()
            threading.Thread(target=self._sleep, daemon=True, name="sleeper").start()

    def late(self) -> float:
        """Seconds in all, the present sleep included."""
        if self._pid != os.getpid():
            return 0.0
        return self._late + max(time.perf_counter() - self._slept - _NAP, 0)

    def _sleep(self) -> None:
        while True:
            self._slept = time.perf_counter()
            time.sleep(_NAP)
            self._late += max(time.perf_counter() - self._slept - _NAP, 0)


_sleeper = _Sleeper()


def _starting() -> float:
    """Seconds that this thread has waited for threads to start."""
    return getattr(_local, "starting", 0.0)


def _queued() -> float:
    """Seconds that this thread has waited for a processor."""
    if getattr(_local, "pid", None) != os.getpid():
        _local.pid = os.getpid()
        _local.file = os.open("/proc/thread-self/schedstat", os.O_RDONLY | os.O_CLOEXEC)
    return int(os.pread(_local.file, 100, 0).split()[1]) / 1e9
