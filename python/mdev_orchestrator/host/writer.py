# SPDX-License-Identifier: GPL-2.0-or-later
"""Writes to sysfs that may block for ever, from processes that can be left behind.

``remove`` of an mdev that a guest holds blocks its writer in the kernel, uninterruptibly, until the
guest lets go; a vendor's ``create`` may take as long as it likes. A thread would not do: a process
does not end before its last thread does. So such writes are made by children that share nothing
with us but the file they write.

A child writes one thing after the other, as it is told. Only when it is not done within
:data:`PATIENCE` is the next write given to another one: a driver that answers at once costs one
fork, which in an emulated machine takes as long as making some devices, and one that takes seconds
is asked by up to :data:`CHILDREN` at a time.

A child outlives a parent that is killed, and who repairs things after that must not be overtaken by
its write. It first opens a descriptor that names the file (``O_PATH``, which opens nothing), then
looks whether its parent is there still, and only then writes. So whoever comes after the parent's
death sees in ``/proc`` all that may still be written.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary, finalize

if TYPE_CHECKING:
    import asyncio

Writer = Callable[[str, bytes], Awaitable[int]]
"""Takes a path and the data, gives 0 or the kernel's errno."""

CHILDREN = 16
"""Writes at the same time; a driver's own lock makes more of them pointless."""
PATIENCE = 0.05
"""Seconds until a write that waits for another one gets a child of its own."""

_MAX_FD = 1 << 20
_MAX_MESSAGE = 1 << 16
_UNKNOWN = 255  # no errno
_IDLE_SECONDS = 0.5
_KILL_SECONDS = 1.0  # for a killed child to end, so that what it did is known; a driver may hold it


async def write_apart(path: str, data: bytes) -> int:
    """Write ``data`` to the existing file ``path`` with one ``write`` of a child process.

    Cancelling leaves the child behind: it ends when the kernel lets it, with no descriptor of ours,
    in a session of its own.

    :return: 0, or the errno of the failed ``open`` or ``write``.
    """
    return await _write(path, data, kill=False)


async def write_or_kill(path: str, data: bytes) -> int:
    """Like :func:`write_apart`, but cancelling kills the child.

    For a write that may be given up halfway, such as a start: a driver that waits killably ends it
    then.
    """
    return await _write(path, data, kill=True)


async def _write(path: str, data: bytes, *, kill: bool) -> int:
    import asyncio  # here, because who only reads the host does without it

    loop = asyncio.get_running_loop()
    pool = _pools.get(loop)
    if pool is None:
        pool = _pools[loop] = _Pool(loop)
    job = _Job(os.fsencode(path) + b"\0" + data, loop.create_future())
    pool.give(job)
    try:
        return await asyncio.shield(job.outcome)
    except asyncio.CancelledError:
        if pool.take_back(job):
            raise
        if kill and not job.outcome.done():
            pool.kill(job)
            await asyncio.wait((job.outcome,), timeout=_KILL_SECONDS)
        raise


class _Job:
    """One write."""

    def __init__(self, message: bytes, outcome: asyncio.Future[int]) -> None:
        self.message = message
        self.outcome = outcome


class _Pool:
    """The children of one event loop, and what waits for them."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.call_later = loop.call_later
        self.add_reader = loop.add_reader
        self.remove_reader = loop.remove_reader
        self.waiting: deque[_Job] = deque()
        self.idle: list[int] = []
        self.working: dict[int, _Job] = {}
        self.pids: dict[int, int] = {}
        self.growing: asyncio.TimerHandle | None = None
        self.resting: asyncio.TimerHandle | None = None
        finalize(self, _close_all, self.pids)

    def give(self, job: _Job) -> None:
        """Have a job done: at once if a child is free, soon by a new one otherwise."""
        self.waiting.append(job)
        if not self.pids:
            self._fork()
        self._next()

    def take_back(self, job: _Job) -> bool:
        """Forget a job that no child has begun; whether that was possible."""
        try:
            self.waiting.remove(job)
        except ValueError:
            return False
        return True

    def kill(self, job: _Job) -> None:
        """Kill the child that does a job."""
        for child, done in self.working.items():
            if done is job:
                os.kill(self.pids[child], signal.SIGKILL)  # it is not reaped before its end of file

    def _next(self) -> None:
        while self.waiting and self.idle:
            child, job = self.idle.pop(), self.waiting.popleft()
            try:
                os.write(child, job.message)
            except OSError:  # it was killed from outside; its end of file says so too
                self.waiting.appendleft(job)
                continue
            self.working[child] = job
        if self.waiting and self.growing is None and len(self.pids) < CHILDREN:
            self.growing = self.call_later(PATIENCE, self._grow)
        if not self.waiting and not self.working and self.resting is None:
            self.resting = self.call_later(_IDLE_SECONDS, self._rest)

    def _grow(self) -> None:
        self.growing = None
        if self.waiting:
            self._fork()
            self._next()

    def _rest(self) -> None:
        self.resting = None
        if self.waiting or self.working:
            return
        for child in self.idle:
            self._close(child)
        self.idle.clear()
        self.call_later(_IDLE_SECONDS, _reap)

    def _fork(self) -> None:
        """Make a child: it has one end of a socket, and nothing else of ours."""
        _reap()
        ours, theirs = (
            end.detach() for end in socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        )
        parent = os.getpid()
        # fork and not exec: the child makes a handful of system calls and takes no lock, and
        # starting an interpreter costs a hundred times as much inside an emulated machine.
        pid = os.fork()
        if pid == 0:
            _child(theirs, parent)
        os.close(theirs)
        _children.add(pid)
        self.pids[ours] = pid
        self.idle.append(ours)
        self.add_reader(ours, self._told, ours)

    def _told(self, child: int) -> None:
        """A child has an answer, or has ended."""
        answer = os.read(child, _MAX_MESSAGE)
        job = self.working.pop(child, None)
        if answer:
            self.idle.append(child)
        else:
            if child in self.idle:
                self.idle.remove(child)
            pid = self.pids[child]
            self._close(child)
            os.waitpid(pid, 0)  # it has closed its files: nothing can keep it any more
            _children.discard(pid)
        if job is not None and not job.outcome.done():
            job.outcome.set_result(answer[0] if answer else _UNKNOWN)
        if self.waiting and not self.pids:
            self._fork()
        self._next()

    def _close(self, child: int) -> None:
        self.remove_reader(child)
        os.close(child)
        del self.pids[child]


_pools: WeakKeyDictionary[asyncio.AbstractEventLoop, _Pool] = WeakKeyDictionary()
_children: set[int] = set()


def _close_all(pids: dict[int, int]) -> None:
    """Of a loop that has gone: its children read end of file, and end."""
    for child in pids:
        with contextlib.suppress(OSError):
            os.close(child)
    _reap()


def _reap() -> None:
    """Collect the children that have ended."""
    for pid in [*_children]:
        try:
            ended, _ = os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:  # of the process that forked us
            ended = pid
        if ended:
            _children.discard(pid)


def _child(channel: int, parent: int) -> None:
    try:
        os.setsid()  # the terminal's ctrl-C is for the parent: it decides what to undo
        os.closerange(0, channel)
        os.closerange(channel + 1, _MAX_FD)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        while message := os.read(channel, _MAX_MESSAGE):
            os.write(channel, bytes([_perform(message, parent)]))
    finally:
        os._exit(0)


def _perform(message: bytes, parent: int) -> int:
    path, _, data = message.partition(b"\0")
    opened = []
    try:
        opened.append(os.open(path, os.O_PATH))
        if os.getppid() != parent:
            os._exit(0)
        opened.append(os.open(path, os.O_WRONLY))
        os.write(opened[-1], data)
    except OSError as error:
        return error.errno or _UNKNOWN
    else:
        return 0
    finally:
        for descriptor in opened:
            os.close(descriptor)
