# SPDX-License-Identifier: GPL-2.0-or-later
"""Writes to sysfs that may block for ever, from processes that can be left behind.

``remove`` of an mdev that a guest holds blocks its writer in the kernel, uninterruptibly, until the
guest lets go; a vendor's ``create`` may take as long as it likes. A thread would not do: a process
does not end before its last thread does. So such writes are made by children that share nothing
with us but the file they write.

A child writes one thing after the other, as it is told, and says how long it slept meanwhile,
waiting for the driver. There are more of them, up to :data:`CHILDREN`, only when that saves more
time than a child costs, which in an emulated machine is that of several devices; or when no answer
has come within :data:`PATIENCE`. Who sleeps while every processor is at work may not wait for the
driver but for others, such as udev in the kernel's locks, where more children only make it worse;
only a part of that counts. For the same reason a child is told several writes at once as long as
they go fast, and gives back what it has not begun when one was slow.

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
import struct
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, finalize, ref

from mdev_orchestrator.system.processes import idle_seconds, reap

if TYPE_CHECKING:
    import asyncio

Writer = Callable[[str, bytes], Awaitable[int]]
"""Takes a path and the data, gives 0 or the kernel's errno."""

CHILDREN = 16
"""Writes at the same time; a driver's own lock makes more of them pointless."""
FINE = frozenset((0,))
"""The result of a write that was not refused."""
AT_ONCE = 16
"""Writes that a child is told in one message."""
PATIENCE = 0.1
"""Seconds without an answer until there are twice as many children for what waits."""
BUSY_PATIENCE = 1.0
"""The same while every processor is at work: they may just be the reason."""

_AT_ONCE_BYTES = 1 << 15
_MAX_FD = 1 << 20
_MAX_MESSAGE = 1 << 16
_UNKNOWN = 255  # no errno
_SLEPT = struct.Struct("=d")
"""What an answer begins with: the seconds that a child slept; results follow."""
_DEARER = 2  # than its fork is a child in all: it copies the pages that it touches, and its answers
_DOUBT = 4.0
"""One part in so many of the sleep while every processor is at work is taken for the driver's."""
_IDLE_SECONDS = 0.5
"""Without work until only one child stays."""
_LAST_SECONDS = 60.0
"""Until that one goes too: to have it is worth more than half of what else an unplugging takes."""
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

    batch = Batch([(path, data)])
    batch.begin()
    try:
        await asyncio.shield(batch.ended)
    except asyncio.CancelledError:
        if not batch.stop() and kill and not batch.ended.done():
            batch.kill()
            await asyncio.wait((batch.ended,), timeout=_KILL_SECONDS)
        raise
    number = batch.results[0]
    return _UNKNOWN if number is None else number


class Writes:
    """Several writes that do not need each other; the first that is refused is the last.

    Those that have begun by then come to their end too.

    :ivar results: 0 or an errno for each that has ended; ``None`` for one that has not, or never
        begun.
    :ivar ended: Done when nothing of it is under way, and nothing more will begin.
    """

    ended: asyncio.Future[Any]

    def __init__(
        self,
        lines: Sequence[tuple[str, bytes]],
        told: Callable[[int, int], None] = lambda _index, _number: None,
        fine: frozenset[int] = FINE,
    ) -> None:
        """Prepare writes.

        :param lines: Path and data of each; no data has a null byte.
        :param told: Called on the event loop with a write's index and result, as it becomes known.
        :param fine: Results that are no refusal.
        """
        self.results: list[int | None] = [None] * len(lines)
        self._told = told
        self._fine = fine
        self._waiting = deque(range(len(lines)))
        self._under_way: dict[int, float] = {}

    def begin(self) -> None:
        """Have it done."""
        raise NotImplementedError

    def stop(self) -> bool:
        """Let nothing more begin; whether nothing of it is under way."""
        self._waiting.clear()
        return not self._under_way

    @property
    def unknown(self) -> frozenset[int]:
        """Those that were begun, and of which no result is known."""
        return frozenset(self._under_way)

    @property
    def longest(self) -> float:
        """For how many seconds something of it waits for an answer."""
        raise NotImplementedError

    def _result(self, index: int, number: int) -> None:
        self.results[index] = number
        self._told(index, number)


class Batch(Writes):
    """Writes by children that are told several at once."""

    def __init__(
        self,
        lines: Sequence[tuple[str, bytes]],
        told: Callable[[int, int], None] = lambda _index, _number: None,
        fine: frozenset[int] = FINE,
    ) -> None:
        import asyncio

        super().__init__(lines, told, fine)
        if any(b"\0" in data for _, data in lines):
            raise ValueError("data with a null byte")
        loop = asyncio.get_running_loop()
        self.lines = [os.fsencode(path) + b"\0" + data for path, data in lines]
        self.ended: asyncio.Future[None] = loop.create_future()
        self._since = time.monotonic()
        self._slept = 0.0  # all children together, in seconds
        self._answers = 0
        self._idle = idle_seconds()
        self._stopped = False
        self._size = 1
        self._pool = _pool_of(loop)

    def begin(self) -> None:
        """Have it done: at once if a child is free, soon by a new one otherwise."""
        if self.lines:
            self._pool.give(self)
        else:
            self._end()

    def stop(self) -> bool:
        """Let nothing more begin; whether nothing of it is under way."""
        self._let_no_more_begin()
        self._end()
        return not self._under_way

    def kill(self) -> None:
        """Kill the children that are at it."""
        self._pool.kill(self)

    @property
    def longest(self) -> float:
        """For how many seconds a write is under way, or waits for a child and none has a moment."""
        return time.monotonic() - min(self._under_way.values(), default=self._since)

    @property
    def has_more(self) -> bool:
        """Whether something is left for a child to do."""
        return bool(self._waiting)

    def gain(self, children: int) -> float:
        """How many seconds sooner it would be done if there were one more child."""
        if not self._answers or not self._waiting:
            return 0.0
        idle = min(self._slept, children * (idle_seconds() - self._idle))
        sure = self._slept / _DOUBT if self._answers > 1 else 0.0
        each = max(idle, sure) / self._answers
        return len(self._waiting) * each / (children * (children + 1))

    def take(self, children: int) -> tuple[int, ...]:
        """What one of so many children is to do next; few at first, more when that goes fast."""
        taken: list[int] = []
        size = 0
        most = min(self._size, -(-len(self._waiting) // children))
        while len(taken) < most:
            size += len(self.lines[self._waiting[0]])
            if taken and size > _AT_ONCE_BYTES:
                break
            taken.append(self._waiting.popleft())
        self._under_way.update(dict.fromkeys(taken, time.monotonic()))
        return tuple(taken)

    def give_back(self, taken: Sequence[int]) -> None:
        """What a child has not begun."""
        self._forget(taken)
        if not self._stopped:
            self._waiting.extendleft(reversed(taken))

    def answered(self, taken: Sequence[int], answer: bytes) -> None:
        """Note what a child says of each that it has written; nothing when it died."""
        self._since = time.monotonic()
        results = answer[_SLEPT.size :] or bytes([_UNKNOWN]) * len(taken)
        if answer:
            self._slept += _SLEPT.unpack_from(answer)[0]
            self._answers += len(results)
        done, rest = taken[: len(results)], taken[len(results) :]
        self._size = max(len(done), 1) if rest else min(4 * self._size, AT_ONCE)
        self._forget(done)
        if not self._fine.issuperset(results):
            self._let_no_more_begin()
        self.give_back(rest)
        for index, number in zip(done, results, strict=False):
            self._result(index, number)
        self._end()

    def _forget(self, indices: Sequence[int]) -> None:
        for index in indices:
            del self._under_way[index]

    def _let_no_more_begin(self) -> None:
        self._stopped = True
        self._waiting.clear()

    def _end(self) -> None:
        if not self._waiting and not self._under_way and not self.ended.done():
            self.ended.set_result(None)


class Separately(Writes):
    """Writes by a writer that makes one at a time."""

    def __init__(
        self,
        write: Writer,
        lines: Sequence[tuple[str, bytes]],
        told: Callable[[int, int], None],
        fine: frozenset[int] = FINE,
    ) -> None:
        super().__init__(lines, told, fine)
        self.lines = lines
        self._write = write

    def begin(self) -> None:
        """Have it done, so many at a time as there would be children."""
        import asyncio

        self.ended = asyncio.gather(*(self._work() for _ in range(CHILDREN)))

    @property
    def longest(self) -> float:
        """For how many seconds a write is under way; none ever waits for long."""
        now = time.monotonic()
        return now - min(self._under_way.values(), default=now)

    async def _work(self) -> None:
        while self._waiting:
            index = self._waiting.popleft()
            self._under_way[index] = time.monotonic()
            number = await self._write(*self.lines[index])
            del self._under_way[index]
            if number not in self._fine:
                self._waiting.clear()
            self._result(index, number)


class _Pool:
    """The children of one event loop, and what waits for them.

    :ivar close: Lets the children go; nothing can be given to it any more.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.call_later = loop.call_later
        self.add_reader = loop.add_reader
        self.remove_reader = loop.remove_reader
        self.waiting: deque[Batch] = deque()
        self.idle: list[int] = []
        self.working: dict[int, _Task] = {}
        self.pids: dict[int, int] = {}
        self.cost = 0.0  # of a child, in seconds
        self.growing: asyncio.TimerHandle | None = None
        self.resting: asyncio.TimerHandle | None = None
        self.close = finalize(self, _close_all, self.pids)

    def give(self, batch: Batch) -> None:
        """Have a batch done."""
        self.waiting.append(batch)
        if not self.pids:
            self._fork()
        self._next()

    def kill(self, batch: Batch) -> None:
        """Kill the children that are at a batch."""
        for child, task in self.working.items():
            if task.batch is batch:
                os.kill(self.pids[child], signal.SIGKILL)  # it is not reaped before its end of file

    def _next(self) -> None:
        while self.waiting and self.idle:
            batch = self.waiting[0]
            if not batch.has_more:
                self.waiting.popleft()
                continue
            child, taken = self.idle.pop(), batch.take(len(self.pids))
            try:
                os.write(child, b"\0".join([batch.lines[index] for index in taken]))
            except OSError:  # it was killed from outside; its end of file says so too
                batch.give_back(taken)
                continue
            self.working[child] = _Task(batch, taken)
        while self.waiting and not self.waiting[0].has_more:
            self.waiting.popleft()
        if self.waiting and self.growing is None and len(self.pids) < CHILDREN:
            self.growing = self.call_later(PATIENCE, self._grow)
        if self.resting is not None:
            self.resting.cancel()
        busy = self.waiting or self.working
        self.resting = None if busy else self.call_later(_IDLE_SECONDS, self._rest, 1)

    def _grow(self) -> None:
        self.growing = None
        if not self.waiting:
            return
        if all(task.is_late for task in self.working.values()):
            for _ in range(min(len(self.pids) or 1, CHILDREN - len(self.pids))):
                self._fork()
        self._next()

    def _rest(self, stay: int) -> None:
        """Let all children go but so many."""
        while len(self.idle) > stay:
            self._close(self.idle.pop())
        self.resting = self.call_later(_LAST_SECONDS, self._rest, 0) if stay else None
        self.call_later(_IDLE_SECONDS, reap, _children)

    def _fork(self) -> None:
        """Make a child: it has one end of a socket, and nothing else of ours."""
        reap(_children)
        ours, theirs = (
            end.detach() for end in socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        )
        parent, began = os.getpid(), time.monotonic()
        # fork and not exec: the child makes a handful of system calls and takes no lock, and
        # starting an interpreter costs a hundred times as much inside an emulated machine.
        pid = os.fork()
        if pid == 0:
            _child(theirs, parent)
        self.cost = _DEARER * (time.monotonic() - began)
        os.close(theirs)
        _children.add(pid)
        self.pids[ours] = pid
        self.idle.append(ours)
        self.add_reader(ours, self._told, ours)

    def _told(self, child: int) -> None:
        """A child has an answer, or has ended."""
        answer = os.read(child, _MAX_MESSAGE)
        task = self.working.pop(child, None)
        if answer:
            self.idle.append(child)
        else:
            if child in self.idle:
                self.idle.remove(child)
            pid = self.pids[child]
            self._close(child)
            os.waitpid(pid, 0)  # it has closed its files: nothing can keep it any more
            _children.discard(pid)
        if task is not None:
            task.batch.answered(task.taken, answer)
            while 0 < len(self.pids) < CHILDREN and task.batch.gain(len(self.pids)) > self.cost:
                self._fork()
            if task.batch.has_more and task.batch not in self.waiting:
                self.waiting.appendleft(task.batch)
        if self.waiting and not self.pids:
            self._fork()
        self._next()

    def _close(self, child: int) -> None:
        self.remove_reader(child)
        os.close(child)
        del self.pids[child]


class _Task:
    """What a child is at."""

    def __init__(self, batch: Batch, taken: tuple[int, ...]) -> None:
        self.batch = batch
        self.taken = taken
        self.since = time.monotonic()
        self.idle = idle_seconds()

    @property
    def is_late(self) -> bool:
        waited = time.monotonic() - self.since
        idle = idle_seconds() - self.idle
        return waited >= (PATIENCE if idle >= PATIENCE / 2 else BUSY_PATIENCE)


_pools: WeakKeyDictionary[asyncio.AbstractEventLoop, ref[_Pool]] = WeakKeyDictionary()
"""A pool lives as long as its loop listens to a child of it, or a batch waits."""
_children: set[int] = set()


def _pool_of(loop: asyncio.AbstractEventLoop) -> _Pool:
    """The pool of an event loop; those of loops that were closed go."""
    for other, its in [*_pools.items()]:
        if (pool := its()) is None:
            del _pools[other]
        elif other is loop:
            return pool
        elif other.is_closed():
            pool.close()
    pool = _Pool(loop)
    _pools[loop] = ref(pool)
    return pool


def _close_all(pids: dict[int, int]) -> None:
    """Of a loop that has gone: its children read end of file, and end."""
    for child in pids:
        with contextlib.suppress(OSError):
            os.close(child)
    reap(_children)


def _child(channel: int, parent: int) -> None:
    try:
        os.setsid()  # the terminal's ctrl-C is for the parent: it decides what to undo
        os.closerange(0, channel)
        os.closerange(channel + 1, _MAX_FD)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        sleep = _Sleep()
        while message := os.read(channel, _MAX_MESSAGE):
            os.write(channel, _perform(message, parent, sleep))
    finally:
        os._exit(0)


class _Sleep:
    """For how long this process has slept; what it ran, or waited for a processor, is no sleep."""

    def __init__(self) -> None:
        self._file = -1
        with contextlib.suppress(OSError):  # a kernel without it: then all that is no work is sleep
            self._file = os.open("/proc/self/schedstat", os.O_RDONLY)

    def seconds(self) -> float:
        """Since some moment."""
        # schedstat's own time of work is as old as the last tick, and a tick is many writes long
        waiting = os.pread(self._file, 100, 0).split()[1] if self._file >= 0 else 0
        return time.monotonic() - time.process_time() - int(waiting) / 1e9


def _perform(message: bytes, parent: int, sleep: _Sleep) -> bytes:
    """Write one thing after the other, up to the first that is refused, or was slow."""
    results = bytearray()
    began, before = time.monotonic(), sleep.seconds()
    words = message.split(b"\0")
    for path, data in zip(words[::2], words[1::2], strict=True):
        results.append(_perform_one(path, data, parent))
        if results[-1] or time.monotonic() - began > PATIENCE / 2:
            break
    return _SLEPT.pack(max(sleep.seconds() - before, 0.0)) + results


def _perform_one(path: bytes, data: bytes, parent: int) -> int:
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
