# SPDX-License-Identifier: GPL-2.0-or-later
"""Writes to sysfs that may block for ever, by child processes that can be left behind.

``remove`` of an mdev that a guest holds blocks the process that writes it, uninterruptibly, until
the guest closes the device; a driver's ``create`` may take any time. A thread would not do, because
a process does not end before its last thread does. So the writes are made by children that share
nothing with this process but the file that they write to.

The writes of one *lane* (a parent device, whose driver usually has one lock) share a few children:
:data:`CHILDREN`, and one more, up to :data:`MOST_CHILDREN`, every :data:`LATE_SECONDS` while an
answer is late and another write waits. A child has up to :data:`DEPTH` writes in the queue of its
socket, makes them in order, and answers each. This process has both ends of the socket, and takes
back from the queue what the child has not begun: when the child is late, when it has died, and when
a batch is stopped. So it is known of each write whether a child has begun it, and a child that dies
leaves the outcome of one write unknown and no more.

**Crash safety.** A child outlives a parent that is killed, and what a recovery decides must not be
changed by a late write of that child. The child first opens a descriptor that names the file
(``O_PATH``, which does not call the driver), then checks that its parent is alive, and only then
writes. After the parent's death each write is therefore in one of two states: the descriptor is
visible in ``/proc/PID/fd`` until the write ends, or the check is still to come and the child ends
without writing.

**Process ids.** A child is signalled and reaped by its pidfd alone. If other code of the process
reaps it, its id may name another process; a pidfd never does, and still reports the child's end.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import select
import signal
import socket
import struct
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

from msgspec import Struct

from mdev_orchestrator.errors import Outcome

CHILDREN = 2
"""Children of a lane as long as none is late; a driver's lock makes more of them pointless."""
MOST_CHILDREN = 16
"""Children of a lane."""
DEPTH = 8
"""Writes that are given to one child at a time."""
LATE_SECONDS = 0.1
"""After which the answer to a write is late."""
IDLE_SECONDS = 10.0
"""Without a write, until a child ends."""
KILL_SECONDS = 1.0
"""For a killed child to end; a driver may hold it longer."""
CLOSE_SECONDS = 1.0
"""For idle children to end when the writer is closed."""

_MAX_FD = 1 << 20
_MAX_MESSAGE = 1 << 16
_SERIAL = struct.Struct("=Q")
"""What a message to a child begins with; the path, a null byte and the data follow."""
_ANSWER = struct.Struct("=Qi")
"""A child's answer: the serial number of the write, and 0 or its errno."""


class WriteResult(Struct, frozen=True):
    """What is known of one write that has ended.

    :ivar outcome: ``DONE``; ``NO_EFFECT`` with the errno; ``UNKNOWN`` if the child ended without an
        answer.
    :ivar errno: The error number of the failed ``open`` or ``write``, 0 without one.
    """

    outcome: Outcome
    errno: int = 0


_DONE = WriteResult(Outcome.DONE)
_UNKNOWN = WriteResult(Outcome.UNKNOWN)

ResultCallback = Callable[[int, WriteResult], None]
"""Takes a write's index in its batch, and its result."""


def _ignore(_index: int, _result: WriteResult) -> None:
    pass


class SysfsWriter:
    """Makes writes through children, which it starts when they are needed.

    It can be used from one event loop after another, and from several at once; each loop has
    children of its own.
    """

    def __init__(self) -> None:
        self._lanes: dict[asyncio.AbstractEventLoop, dict[str, _Lane]] = {}

    async def write(
        self, path: str, data: bytes, *, lane: str, kill_if_cancelled: bool = False
    ) -> WriteResult:
        """Write ``data`` to the existing file ``path`` with one ``write`` of a child.

        When this is cancelled, a write that has not begun never begins. One that has begun is left
        to its child, which ends when the kernel lets it.

        :param lane: Name of the parent device.
        :param kill_if_cancelled: Kill the child instead, for a write that may be given up halfway,
            such as a start: a driver that waits killably ends it then.
        """
        batch = self.batch([(path, data)], _ignore, lane=lane)
        batch.begin()
        try:
            await asyncio.shield(batch.ended)
        except asyncio.CancelledError:
            batch.stop()
            try:
                if kill_if_cancelled:
                    batch.kill()
                    await asyncio.wait((batch.ended,), timeout=KILL_SECONDS)
            finally:
                batch.leave()
            raise
        return batch.results[0] or WriteResult(Outcome.NO_EFFECT, errno.ECANCELED)

    def batch(
        self,
        lines: Sequence[tuple[str, bytes]],
        on_result: ResultCallback,
        *,
        lane: str,
        accepted: frozenset[int] = frozenset((0,)),
    ) -> WriteBatch:
        """Prepare writes that do not depend on each other; see :class:`WriteBatch`.

        :param lines: Path and data of each.
        :param on_result: Called on the event loop with each result as it becomes known.
        :param lane: Name of the parent device.
        :param accepted: Error numbers that are no refusal.
        :raise ValueError: A path has a null byte, or path and data together are too long.
        """
        loop = asyncio.get_running_loop()
        for other in [other for other in self._lanes if other.is_closed()]:
            for old in self._lanes.pop(other).values():
                old.abandon()
        lanes = self._lanes.setdefault(loop, {})
        if lane not in lanes:
            lanes[lane] = _Lane(loop)
        return WriteBatch(lanes[lane], lines, on_result, accepted)

    async def close(self) -> None:
        """End the children of this event loop, and those of loops that are closed.

        Writes that wait never begin; those that a child is at are left behind, with an unknown
        outcome. The writer can be used again.
        """
        loop = asyncio.get_running_loop()
        ends: list[int] = []
        for other in [other for other in self._lanes if other is loop or other.is_closed()]:
            for lane in self._lanes.pop(other).values():
                ends += lane.close() if other is loop else lane.abandon()
        await _wait_ended(ends, CLOSE_SECONDS)
        _reap()


class WriteBatch:
    """Several writes that do not depend on each other; after one is refused, no more begin.

    Those that have begun by then come to their end too.

    :ivar results: The result of each that has ended. ``None`` for one that has not, or never began.
    :ivar ended: Done when no write of it is under way and none will begin.
    :ivar callback_error: The first exception that ``on_result`` has raised.
    """

    def __init__(
        self,
        lane: _Lane,
        lines: Sequence[tuple[str, bytes]],
        on_result: ResultCallback,
        accepted: frozenset[int],
    ) -> None:
        self.messages = [_message(path, data) for path, data in lines]
        self.results: list[WriteResult | None] = [None] * len(lines)
        self.ended: asyncio.Future[None] = lane.loop.create_future()
        self.callback_error: Exception | None = None
        self.waiting = deque(range(len(lines)))
        self._lane = lane
        self._on_result = on_result
        self._accepted = accepted
        self._stopped = False
        self._heard = time.monotonic()

    def begin(self) -> None:
        """Give the writes to the children of the lane."""
        self._heard = time.monotonic()
        self._lane.add(self)
        self.settle()

    def stop(self) -> bool:
        """Let no more writes begin; return whether none is under way.

        Afterwards every write without a result either has begun, and is in :attr:`unknown`, or
        never will.
        """
        self.halt()
        self._lane.take_back(self)
        self.settle()
        return not self.unknown

    def halt(self) -> None:
        """Let none begin of those that no child was given."""
        self._stopped = True
        self.waiting.clear()

    def kill(self) -> None:
        """Kill the children that are at a write of this batch."""
        self._lane.kill(self)

    def leave(self) -> None:
        """Leave the children that are at a write of this batch to themselves.

        The outcome of these writes is unknown then. The lane forgets the children, and starts
        others when it needs them.
        """
        self._lane.leave(self)

    @property
    def unknown(self) -> frozenset[int]:
        """Indices of the writes that were given to a child and are not answered.

        A child may not have begun all of them; after :meth:`stop` it has.
        """
        return frozenset(index for child in self._lane.children for index in child.given_of(self))

    @property
    def longest(self) -> float:
        """Seconds that the oldest unanswered write has taken.

        If no child is at a write of this batch: seconds since the last answer to it.
        """
        since = (child.since for child in self._lane.children if child.batch is self)
        return time.monotonic() - min(since, default=self._heard)

    def put_back(self, index: int) -> None:
        """Have a write wait again that no child has begun."""
        if not self._stopped:
            self.waiting.appendleft(index)

    def result(self, index: int, result: WriteResult) -> None:
        """Take the result of a write."""
        self._heard = time.monotonic()
        self.results[index] = result
        refused = result.outcome is Outcome.NO_EFFECT and result.errno not in self._accepted
        if refused and not self._stopped:
            self.stop()
        try:
            self._on_result(index, result)
        except Exception as error:  # noqa: BLE001 - an observer's bug must not stop the others
            self.callback_error = self.callback_error or error
        finally:
            self.settle()

    def settle(self) -> None:
        """Note the end if no write is under way and none will begin."""
        if not self.waiting and not self.unknown and not self.ended.done():
            self.ended.set_result(None)


def _message(path: str, data: bytes) -> bytes:
    name = os.fsencode(path)
    message = name + b"\0" + data
    if b"\0" in name or len(message) > _MAX_MESSAGE - _SERIAL.size:
        raise ValueError(f"no file of sysfs has such a path or value: {path[:80]!r}")
    return message


class _Lane:
    """The children of one parent device on one event loop, and the batches that wait for them."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.children: list[_Child] = []
        self._left: list[_Child] = []
        self._batches: deque[WriteBatch] = deque()
        self._serial = 0
        self._timer: asyncio.TimerHandle | None = None

    # ---- for batches ----

    def add(self, batch: WriteBatch) -> None:
        """Have a batch done after those that wait already."""
        if batch.waiting:
            self._batches.append(batch)
            self._hand_out()

    def take_back(self, batch: WriteBatch) -> None:
        """Take from the children what they have not begun, because of a batch that is stopped."""
        for child in [child for child in self.children if child.given_of(batch)]:
            self._take_back(child)
        self._hand_out()

    def kill(self, batch: WriteBatch) -> None:
        """Kill the children that are at a write of a batch."""
        for child in self.children:
            if child.given_of(batch) and self._is_at(child, batch):
                child.kill()
            child.reserved = False

    def leave(self, batch: WriteBatch) -> None:
        """Forget the children that are at a write of a batch; each ends when it has made that."""
        for child in [child for child in self.children if child.given_of(batch)]:
            if self._is_at(child, batch):
                _, (_, index) = child.given.popitem()
                self.children.remove(child)
                self._left.append(child)
                self.loop.remove_reader(child.ours)
                child.hang_up()
                batch.result(index, _UNKNOWN)
            child.reserved = False
        self._hand_out()

    def close(self) -> list[int]:
        """Let all children end; give the pidfds of those that have no write under way."""
        if self._timer is not None:
            self._timer.cancel()
        given = [batch for child in self.children for batch, _ in child.given.values()]
        batches = {*self._batches, *given}
        for batch in batches:
            batch.halt()
        ends, lost = [], []
        for child in [*self.children]:
            self._is_at(child, None)
            if not child.given:
                ends.append(child.pidfd)
            lost += [*child.given.values()]
            self._forget(child)
        for child in [*self._left]:
            self._forget(child)
        for batch, index in lost:
            batch.result(index, _UNKNOWN)
        for batch in batches:
            batch.settle()
        return ends

    def _is_at(self, child: _Child, batch: WriteBatch | None) -> bool:
        """Whether a child is at a write of a batch; it has nothing else to do then.

        It is reserved: nothing more is given to it.
        """
        child.reserved = True
        self._take_back(child)
        self._take_answers(child)  # after that it has one write at most
        return child.batch is batch

    def abandon(self) -> list[int]:
        """Let all children end after the event loop was closed; give their pidfds."""
        ends = [child.pidfd for child in self.children if not child.given]
        for child in [*self.children, *self._left]:
            child.close()
        self.children.clear()
        self._left.clear()
        return ends

    # ---- the work ----

    def _hand_out(self) -> None:
        """Give waiting writes to children that have room, and start children if there are few."""
        while (batch := self._next()) is not None:
            try:
                child = self._with_room()
            except OSError as error:  # no process, descriptor or memory is left
                if self.children:
                    break
                batch.result(
                    batch.waiting.popleft(),
                    WriteResult(Outcome.NO_EFFECT, error.errno or errno.EAGAIN),
                )
                continue
            if child is None:
                break
            self._give(child, batch)
        self._watch()

    def _next(self) -> WriteBatch | None:
        while self._batches and not self._batches[0].waiting:
            self._batches.popleft()
        return self._batches[0] if self._batches else None

    def _with_room(self) -> _Child | None:
        room = [child for child in self.children if child.has_room]
        if room:
            return min(room, key=lambda child: len(child.given))
        return self._start() if len(self.children) < CHILDREN else None

    def _give(self, child: _Child, batch: WriteBatch) -> None:
        index = batch.waiting.popleft()
        self._serial += 1
        try:
            os.write(child.ours, _SERIAL.pack(self._serial) + batch.messages[index])
        except OSError as error:
            if isinstance(error, BlockingIOError) and child.given:
                child.full = True  # the socket's buffer is
                batch.waiting.appendleft(index)
            else:
                batch.result(index, WriteResult(Outcome.NO_EFFECT, error.errno or errno.EIO))
            return
        if not child.given:
            child.since = time.monotonic()
        child.given[self._serial] = batch, index

    def _watch(self) -> None:
        """Have the timer run while a write waits that one more child, or another, could make."""
        waits = bool(self._batches) and len(self.children) < MOST_CHILDREN
        queued = any(len(child.given) > 1 for child in self.children)
        if self._timer is None and (waits or queued):
            self._timer = self.loop.call_later(LATE_SECONDS, self._look)

    def _look(self) -> None:
        """Start one more child if an answer is late and a write waits."""
        self._timer = None
        now = time.monotonic()
        late = [c for c in self.children if c.given and now - c.since >= LATE_SECONDS]
        for child in late:
            self._take_back(child)
            child.full = bool(child.given)
        if late and self._next() is not None and len(self.children) < MOST_CHILDREN:
            with contextlib.suppress(OSError):  # then those that there are must do
                self._start()
        self._hand_out()

    def _take_back(self, child: _Child) -> None:
        """Have the writes wait again that a child has not begun."""
        batches: list[WriteBatch] = []
        for batch, index in reversed(child.take_back()):
            batch.put_back(index)
            if batch.waiting and batch not in batches and batch not in self._batches:
                batches.append(batch)
        self._batches.extendleft(batches)

    def _start(self) -> _Child:
        child = _Child()
        self.children.append(child)
        self.loop.add_reader(child.ours, self._answered, child)
        self.loop.add_reader(child.pidfd, self._ended, child)
        return child

    def _answered(self, child: _Child) -> None:
        """Take the answers of a child, and give it more to do."""
        try:
            self._take_answers(child)
        finally:
            self._hand_out()

    def _take_answers(self, child: _Child) -> None:
        for (batch, index), number in child.answers():
            result = WriteResult(Outcome.NO_EFFECT, number) if number else _DONE
            batch.result(index, result)

    def _ended(self, child: _Child) -> None:
        """Take what a child has answered, and note that its last write has no answer."""
        if child in self.children:
            self._answered(child)
        if child in self.children:  # no callback has left it
            self._take_back(child)
        lost = [*child.given.values()]
        self._forget(child)
        _reap()
        for batch, index in lost:
            batch.result(index, _UNKNOWN)
        self._hand_out()

    def _forget(self, child: _Child) -> None:
        if child in self.children:
            self.children.remove(child)
            self.loop.remove_reader(child.ours)
        if child in self._left:
            self._left.remove(child)
        if child.pidfd >= 0:
            self.loop.remove_reader(child.pidfd)
        child.close()


class _Child:
    """A process that writes what it is given, one write after the other.

    :ivar pidfd: Readable when it has ended.
    :ivar ours: Our end of its socket; messages go in, answers come out.
    :ivar given: What it was given and has not answered, by serial number, in order.
    :ivar since: When it came to the first of these, of :func:`time.monotonic`.
    :ivar full: Whether it is given nothing more before it has answered.
    :ivar reserved: Whether it is given nothing more, whatever it answers.
    """

    def __init__(self) -> None:
        """Start it.

        :raise OSError: There is no process, descriptor or memory left.
        """
        _reap()
        self.given: dict[int, tuple[WriteBatch, int]] = {}
        self.since = 0.0
        self.full = False
        self.reserved = False
        self.ours = self.theirs = self.pidfd = -1
        self.ours, self.theirs = (
            end.detach() for end in socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        )
        try:
            os.set_blocking(self.ours, False)
            os.set_blocking(self.theirs, False)
            self.pidfd = os.pidfd_open(_fork(self.theirs))
        except OSError:
            self.close()
            raise

    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        """Let it end if its lane has gone with a closed event loop."""
        if not is_finalizing():  # else this process ends, which hangs up
            self.close()

    @property
    def batch(self) -> WriteBatch | None:
        """The batch of the write that it is at."""
        return next((batch for batch, _ in self.given.values()), None)

    @property
    def has_room(self) -> bool:
        """Whether it may be given one more write."""
        return not (self.full or self.reserved) and len(self.given) < DEPTH

    def given_of(self, batch: WriteBatch) -> list[int]:
        """Indices of a batch's writes that it was given and has not answered."""
        return [index for of, index in self.given.values() if of is batch]

    def take_back(self) -> list[tuple[WriteBatch, int]]:
        """Take what it has not begun out of its queue, in order."""
        taken = []
        with contextlib.suppress(BlockingIOError):
            while message := os.read(self.theirs, _MAX_MESSAGE):
                taken.append(self.given.pop(_SERIAL.unpack_from(message)[0]))
        return taken

    def answers(self) -> Iterator[tuple[tuple[WriteBatch, int], int]]:
        """Give what it has answered, each time one write and 0 or the errno."""
        with contextlib.suppress(BlockingIOError):
            while self.ours >= 0:
                serial, number = _ANSWER.unpack(os.read(self.ours, _ANSWER.size))
                self.since = time.monotonic()
                self.full = False
                yield self.given.pop(serial), number

    def kill(self) -> None:
        """Kill it, if it has not ended."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def hang_up(self) -> None:
        """Close the socket: it ends when it is at no write (any more)."""
        if self.theirs >= 0:
            self.take_back()  # else it would read this before it sees that we have hung up
        for end in (self.ours, self.theirs):
            if end >= 0:
                os.close(end)
        self.ours = self.theirs = -1

    def close(self) -> None:
        """Hang up, and have it reaped when it has ended."""
        self.hang_up()
        if self.pidfd >= 0:
            _unreaped.append(self.pidfd)
        self.pidfd = -1


_unreaped: list[int] = []
"""Pidfds of children that may not have ended, and that no event loop waits for."""


def _reap() -> None:
    """Reap those of these children that have ended."""
    for pidfd in [*_unreaped]:
        try:
            ended = os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG) is not None
        except ChildProcessError:  # other code has reaped it, or this process is a fork
            ended = True
        if ended and pidfd in _unreaped:
            _unreaped.remove(pidfd)
            os.close(pidfd)


async def _wait_ended(pidfds: Sequence[int], seconds: float) -> None:
    """Wait until processes have ended, or the time is up."""
    loop = asyncio.get_running_loop()
    ends = {pidfd: loop.create_future() for pidfd in pidfds}
    for pidfd, end in ends.items():
        loop.add_reader(pidfd, _set, end)
    try:
        if ends:
            await asyncio.wait(ends.values(), timeout=seconds)
    finally:
        for pidfd in ends:
            loop.remove_reader(pidfd)


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


# ---- in the child -------------------------------------------------------------------------------


def _fork(channel: int) -> int:
    """Start a child that serves a socket; give its process id.

    It is forked and does not run a program: it makes a handful of system calls, and the start of an
    interpreter costs a hundred times as much inside an emulated machine.
    """
    parent = os.getpid()
    # A signal that the child got before it has put back the handlers would wake the parent's loop.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        with warnings.catch_warnings():
            # Since 3.12 Python warns of a fork beside other threads: a lock that one of them holds
            # stays locked in the child. The child takes no lock, it makes system calls only.
            warnings.filterwarnings("ignore", r".*use of fork\(\)", DeprecationWarning)
            pid = os.fork()
            if pid == 0:
                _serve(channel, parent, mask)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return pid


def _serve(channel: int, parent: int, mask: set[signal.Signals | int]) -> NoReturn:
    """Make the writes that come through a socket, until it is closed or quiet for long."""
    try:
        os.setsid()  # the terminal's ctrl-C is for the parent, which decides what to undo
        os.closerange(0, channel)
        os.closerange(channel + 1, _MAX_FD)
        signal.set_wakeup_fd(-1)
        for number in signal.valid_signals():
            if callable(signal.getsignal(number)):
                signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        arrives = select.poll()
        arrives.register(channel, select.POLLIN)
        while arrives.poll(IDLE_SECONDS * 1000):
            with contextlib.suppress(BlockingIOError):  # the parent took the message back
                message = os.read(channel, _MAX_MESSAGE)
                if not message:
                    break
                (serial,) = _SERIAL.unpack_from(message)
                path, _, data = message[_SERIAL.size :].partition(b"\0")
                os.write(channel, _ANSWER.pack(serial, _perform(path, data, parent)))
    finally:
        os._exit(0)


def _perform(path: bytes, data: bytes, parent: int) -> int:
    """Write a file if the parent is alive after the file was named; give 0 or the errno."""
    try:
        name = os.open(path, os.O_PATH)
    except OSError as error:
        return error.errno or errno.EIO
    try:
        if os.getppid() != parent:
            os._exit(0)
        return _write_file(os.fsdecode(path), data)
    finally:
        os.close(name)


def _write_file(path: str, data: bytes) -> int:
    """Open a file and write it with one ``write``; give 0 or the errno."""
    try:
        file = os.open(path, os.O_WRONLY)
        try:
            os.write(file, data)
        finally:
            os.close(file)
    except OSError as error:
        return error.errno or errno.EIO
    return 0
