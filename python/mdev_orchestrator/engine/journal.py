# SPDX-License-Identifier: GPL-2.0-or-later
"""What is managed here, and what was intended: an SQLite file that survives any crash.

sysfs and QMP are the truth about what *is*. The journal says which of it is managed here, and what
a command that did not come to its end had in mind::

    run      one command that changes things: its process, when, how it ended (none: open)
    step     its steps in their order, and how far each came (see Progress)
    claim    the objects that an open run changes: no other run changes them meanwhile
    device   the managed mdevs          guest    the managed guests
    spec     the specs that were applied

The rule is *intent before action*. A run is written with all its steps before the first of them
acts; a step that needs others once more right before it acts, and each when it has acted, the last
of them together with the end of the run. Every one of these writes is on the disk (WAL,
``synchronous=FULL``) when it returns. Concurrent writes share one transaction, so sixty-four
devices that are created at once cost a handful of flushes.

A run belongs to the process that began it for as long as that process holds the run's lock: one
byte of ``journal.lock``, at the run's number. The kernel gives the lock back when the process ends,
in whatever way and in whatever PID namespace. An open run without a lock is :mod:`.recovery`'s.

All of SQLite's work is done in a thread of the journal's own. The file is checked when it is read:
it may be damaged, of a newer version, or of another user.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import sqlite3
import struct
import time
from collections.abc import (
    AsyncIterator,
    Callable,
    Collection,
    Iterable,
    Mapping,
    Sequence,
)
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Self, TypeVar
from uuid import UUID

import msgspec

from mdev_orchestrator.engine.journal_db import (
    VERSION,
    JournalError,
    check_file,
    connect,
    explained,
    prepare,
    read_rows,
    transaction,
)
from mdev_orchestrator.engine.records import Change, Managed, SpecRecord
from mdev_orchestrator.errors import BusyError, HostError, MdoError, Outcome
from mdev_orchestrator.machine import Machine
from mdev_orchestrator.state import private_dir
from mdev_orchestrator.system.processes import boot_id, start_time
from mdev_orchestrator.system.waiting import run_to_completion

T = TypeVar("T")

CLAIM_SECONDS = 30.0
"""To wait for another command that changes the same objects: it may be starting a guest."""
KILLED_SECONDS = 1.0
"""For the kernel to give back the locks of a process that was killed."""
KEPT = 200
"""Closed runs that are kept, for a user who wants to know what happened."""
_LOOK_SECONDS = 0.1
"""Between two looks at a claim of another process; no event tells when it is free."""
_FLOCK = "hhqqi"
"""``struct flock`` of fcntl(2): type, whence, start, length, pid."""


class Progress(StrEnum):
    """How far a step has come."""

    PLANNED = "planned"
    """It has not begun."""
    ACTING = "acting"
    """It has begun, and its outcome is not known."""
    DONE = "done"
    NO_EFFECT = "no effect"
    """It has ended, and all is as before it."""
    UNDOING = "undoing"
    UNDONE = "undone"
    STUCK = "stuck"
    """It could not be undone; the run stays open."""

    @classmethod
    def after(cls, outcome: Outcome) -> Progress:
        """How far a step is that has ended with this outcome."""
        return {
            Outcome.DONE: cls.DONE,
            Outcome.NO_EFFECT: cls.NO_EFFECT,
            Outcome.UNKNOWN: cls.ACTING,
        }[outcome]


@dataclass(frozen=True, slots=True)
class Entry:
    """A step as it was written: JSON, the earlier steps that it needs, how far it came."""

    number: int
    data: str
    needs: tuple[int, ...] = ()
    progress: Progress = Progress.PLANNED
    error: str = ""


@dataclass(frozen=True, slots=True)
class Process:
    """A process that cannot be taken for another one."""

    pid: int
    start_time: int
    boot_id: str

    @classmethod
    def this(cls) -> Self:
        """The calling process."""
        pid = os.getpid()
        return cls(pid, start_time(pid) or 0, boot_id())

    @property
    def alive(self) -> bool:
        """Whether it is still there, as seen from this PID namespace."""
        return self.boot_id == boot_id() and start_time(self.pid) == self.start_time


@dataclass(frozen=True, slots=True)
class Run:
    """One command that changes or changed things.

    :ivar kind: ``apply``, ``destroy``, ``create``, ``detach``…
    :ivar title: What it was about: the spec, the guest, the devices.
    :ivar began: Seconds since the epoch.
    :ivar locked: Its process holds a lock while it is at work; runs of version 1 have none.
    """

    id: int
    kind: str
    title: str
    process: Process
    began: float
    locked: bool = True

    def __str__(self) -> str:
        """How messages name it."""
        return f"mdo {self.kind} {self.title}".rstrip() + f" (process {self.process.pid})"


class ClaimedError(BusyError):
    """Another run has claimed an object.

    :ivar object: The claim, such as ``guest:NAME``.
    :ivar run: The run that has it.
    """

    def __init__(self, object_: str, run: Run) -> None:
        named = object_.replace(":", " ", 1)
        super().__init__(
            f"{named} is being changed by {run}",
            "wait until it ends; if it has ended, mdo recover",
            outcome=Outcome.NO_EFFECT,
            subject=named,
        )
        self.object = object_
        self.run = run


class _RunLocks:
    """Locks on single bytes of a file, each of which says that a process is at work at a run.

    They are open file description locks: another open of the file, by this process or any other,
    conflicts with them, and the kernel gives them back when the last descriptor is closed.
    """

    def __init__(self, path: Path) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._descriptor = os.open(path, flags, 0o600)
        self._mine: set[int] = set()

    def take(self, run: int) -> bool:
        """Take the lock of a run; whether no other open journal has it."""
        try:
            self._control(fcntl.F_OFD_SETLK, fcntl.F_WRLCK, run)
        except (BlockingIOError, PermissionError):
            return False
        self._mine.add(run)
        return True

    def release(self, run: int) -> None:
        """Give a lock back."""
        self._control(fcntl.F_OFD_SETLK, fcntl.F_UNLCK, run)
        self._mine.discard(run)

    def is_taken(self, run: int) -> bool:
        """Whether any open journal, this one included, has the lock of a run."""
        if run in self._mine:
            return True
        answer = self._control(fcntl.F_OFD_GETLK, fcntl.F_WRLCK, run)
        kind: int = struct.unpack(_FLOCK, answer[: struct.calcsize(_FLOCK)])[0]
        return kind != fcntl.F_UNLCK

    def close(self) -> None:
        """Give all locks back."""
        os.close(self._descriptor)

    def _control(self, command: int, kind: int, run: int) -> bytes:
        request = struct.pack(_FLOCK, kind, os.SEEK_SET, run, 1, 0)
        padded = request.ljust(-(-len(request) // 8) * 8, b"\0")
        return fcntl.fcntl(self._descriptor, command, padded)


@asynccontextmanager
async def open_journal(machine: Machine) -> AsyncIterator[Journal]:
    """Open the journal of a machine for a command that changes things; close it afterwards.

    :raise HostError: What :meth:`Journal.open` raises.
    """
    opening = asyncio.ensure_future(asyncio.to_thread(Journal.open, machine.journal_path))
    try:
        journal = await run_to_completion(opening)
    except asyncio.CancelledError:
        if not opening.cancelled() and opening.exception() is None:
            opening.result().close()
        raise
    try:
        yield journal
    finally:
        await run_to_completion(asyncio.to_thread(journal.close))


class Journal:
    """An open journal; also a context manager that closes it.

    Methods that write are coroutines. Methods that read return at once; on an event loop call them
    through :meth:`read`.
    """

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self.path = path
        self._db = connection
        self._file = _identity(path)
        self._locks = _RunLocks(path.with_suffix(".lock"))
        self._thread = ThreadPoolExecutor(1, "journal")
        self._waiting: list[tuple[Callable[[], Any], asyncio.Future[Any]]] = []
        self._writing: asyncio.Task[None] | None = None
        self._taken: list[int] = []
        self._closed = False

    # ---- opening --------------------------------------------------------------------------------

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open the journal for a command that changes things; create it if it is not there.

        It may block for as long as another process writes: see :func:`open_journal`.

        :raise HostError: It is damaged, of a newer version, of another user, locked, or cannot be
            written.
        """
        private_dir(path.parent)
        check_file(path)
        with explained(path):
            connection = connect(path, "rwc")
            try:
                prepare(connection, path)
                # a read-only directory or a full disk is found before anything is done
                with transaction(connection):
                    connection.execute("PRAGMA user_version = 0")
                    connection.execute(f"PRAGMA user_version = {VERSION}")
                return cls(connection, path)
            except BaseException:
                connection.close()
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Wait for what is being written, close the file, and give the locks of all runs back."""
        self._closed = True
        self._thread.shutdown()
        self._db.close()
        self._locks.close()

    # ---- reading --------------------------------------------------------------------------------

    async def read(self, query: Callable[[], T]) -> T:
        """Call a method that reads, in the journal's thread."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, query)

    def managed(self) -> Managed:
        """All records, at this moment."""
        with explained(self.path):
            return read_rows(self._db)

    def open_runs(self) -> list[Run]:
        """Runs that have not come to their end, the oldest first; some may be at work just now."""
        with explained(self.path):
            return [
                _run(row) for row in self._db.execute(f"{_RUNS} WHERE ended IS NULL ORDER BY id")
            ]

    def is_at_work(self, run: Run) -> bool:
        """Whether a process is at work at an open run."""
        return self._locks.is_taken(run.id) if run.locked else run.process.alive

    def abandoned(self) -> list[tuple[Run, list[Entry]]]:
        """The open runs that no process is at work at, with their steps, the newest first."""
        return [
            (run, self.steps(run)) for run in reversed(self.open_runs()) if not self.is_at_work(run)
        ]

    async def wait_for_killed(self) -> None:
        """Wait until processes that have just been killed have given their locks back.

        A child of the writer that such a process was starting shares them until it has closed what
        it does not need. A process of another PID namespace looks killed too, so this takes
        :data:`KILLED_SECONDS` at most.
        """

        def any_left() -> bool:
            return any(
                run.locked and not run.process.alive and self.is_at_work(run)
                for run in self.open_runs()
            )

        loop = asyncio.get_running_loop()
        end = loop.time() + KILLED_SECONDS
        while await self.read(any_left):
            if loop.time() >= end:
                return
            await asyncio.sleep(_LOOK_SECONDS)

    def steps(self, run: Run) -> list[Entry]:
        """The steps of a run as they were written, in their order."""
        with explained(self.path):
            entries = [
                Entry(number, data, _needs(needs), Progress(progress), error)
                for number, needs, data, progress, error in self._db.execute(
                    "SELECT number, needs, data, progress, error FROM step WHERE run = ?"
                    " ORDER BY number",
                    (run.id,),
                )
            ]
            for place, entry in enumerate(entries):
                if entry.number != place or not all(0 <= need < place for need in entry.needs):
                    raise ValueError(f"step {entry.number} of run {run.id} has no place in it")
        return entries

    def claimant(self, claims: Collection[str], run: Run | None = None) -> ClaimedError | None:
        """The first of some objects that another run has claimed, as an error; ``None`` if none."""
        with explained(self.path):
            found = self._db.execute(
                "SELECT claim.object, run.id, run.kind, run.title, run.pid, run.start_time,"
                " run.boot_id, run.began, run.locked FROM claim JOIN run ON run.id = claim.run"
                " WHERE claim.object IN (SELECT value FROM json_each(?)) AND run.id IS NOT ?"
                " ORDER BY claim.object LIMIT 1",
                (_json(sorted(claims)), None if run is None else run.id),
            ).fetchone()
        return None if found is None else ClaimedError(found[0], _run(found[1:]))

    # ---- writing --------------------------------------------------------------------------------

    async def begin(
        self,
        kind: str,
        title: str,
        steps: Sequence[Entry] = (),
        claims: Collection[str] = (),
        *,
        change: Change | None = None,
        on_cancel: Change | None = None,
        wait: float = CLAIM_SECONDS,
        seize: bool = False,
    ) -> Run:
        """Write down a run with all its steps, and claim the objects that it changes.

        :param claims: ``guest:NAME``, ``mdev:UUID``, ``parent:NAME``, ``spec:NAME``.
        :param change: Records that are valid as soon as the first steps may have begun.
        :param on_cancel: Records that are valid if the caller is cancelled before that.
        :param wait: Seconds to wait for another run that has claimed one of them.
        :param seize: Take claims away from runs that no process is at work at.
        :raise ClaimedError: Another run has claimed one of them.
        :raise HostError: The journal cannot be written; nothing was done.
        """
        process = Process.this()

        def write() -> Run:
            self._refuse_claimed(claims, None, seize=seize)
            began = round(time.time(), 3)
            cursor = self._db.execute(
                "INSERT INTO run (kind, title, pid, start_time, boot_id, began, locked)"
                " VALUES (?, ?, ?, ?, ?, ?, 1)",
                (kind, title, process.pid, process.start_time, process.boot_id, began),
            )
            run = Run(cursor.lastrowid or 0, kind, title, process, began)
            if not self._take(run):
                raise HostError(f"the journal {self.path}: run {run.id} is locked", "try again")
            self._insert(run, steps, claims, change)
            written.append(run)
            return run

        written: list[Run] = []
        try:
            return await self._claiming(write, wait)
        except asyncio.CancelledError:
            for run in written:  # the caller cannot know of it
                await self.end(run, "undone", change=on_cancel)
            raise

    async def plan(
        self,
        run: Run,
        steps: Sequence[Entry],
        claims: Collection[str],
        *,
        change: Change | None = None,
        wait: float = CLAIM_SECONDS,
        seize: bool = False,
    ) -> None:
        """Write down the steps of a run that was begun without any, and claim their objects.

        Such a run has claimed an object before the machine is looked at.

        :param change: Records that are valid as soon as the first steps may have begun.
        :raise ClaimedError: Another run has claimed one of them.
        """

        def write() -> None:
            self._refuse_claimed(claims, run, seize=seize)
            self._insert(run, steps, claims, change)

        await self._claiming(write, wait)

    async def wait_unclaimed(
        self, claims: Collection[str], run: Run | None, seconds: float
    ) -> ClaimedError | None:
        """Wait until no other run that is at work has claimed any of some objects.

        :return: The claim that is still there when ``seconds`` have passed, or whose run no process
            is at work at; ``None`` if there is none.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        while (claimed := await self.read(lambda: self.claimant(claims, run))) is not None:
            if loop.time() >= end or not self.is_at_work(claimed.run):
                return claimed
            await asyncio.sleep(_LOOK_SECONDS)
        return None

    def _insert(
        self, run: Run, steps: Sequence[Entry], claims: Collection[str], change: Change | None
    ) -> None:
        self._db.executemany(
            "INSERT INTO step VALUES (?, ?, ?, ?, ?, ?)",
            [(run.id, s.number, _json(s.needs), s.data, str(s.progress), s.error) for s in steps],
        )
        self._db.executemany(
            "INSERT OR IGNORE INTO claim VALUES (?, ?)",
            [(claim, run.id) for claim in sorted(claims)],
        )
        self._change(change)

    def _take(self, run: Run) -> bool:
        """Take a run's lock; it is given back if the transaction fails."""
        if not self._locks.take(run.id):
            return False
        self._taken.append(run.id)
        return True

    async def _claiming(self, write: Callable[[], T], wait: float) -> T:
        """Write what claims objects, as soon as no other run has them."""
        loop = asyncio.get_running_loop()
        end = loop.time() + wait
        while True:
            try:
                # a caller that is cancelled must know whether it was written
                return await run_to_completion(self._write(write))
            except BusyError:
                if loop.time() >= end:
                    raise
            await asyncio.sleep(_LOOK_SECONDS)

    def _refuse_claimed(self, claims: Collection[str], run: Run | None, *, seize: bool) -> None:
        while (claimed := self.claimant(claims, run)) is not None:
            if not seize or self.is_at_work(claimed.run):
                raise claimed
            self._db.execute("DELETE FROM claim WHERE object = ?", (claimed.object,))

    async def note(
        self,
        run: Run,
        progress: Progress,
        steps: Iterable[int],
        *,
        change: Change | None = None,
        error: str = "",
        release: Collection[str] = (),
    ) -> None:
        """Write down how far steps have come, and the records that change by it.

        :param release: Claims of the run that it does not need any more.
        """
        numbers = tuple(steps)

        def write() -> None:
            self._mark(run, progress, numbers, error)
            self._change(change)
            self._db.executemany(
                "DELETE FROM claim WHERE object = ? AND run = ?",
                [(claim, run.id) for claim in release],
            )

        await self._write(write)

    async def end(
        self,
        run: Run,
        outcome: str,
        *,
        done: Sequence[int] = (),
        change: Change | None = None,
        specs: Mapping[str, SpecRecord | None] | None = None,
    ) -> None:
        """Close a run and give its claims back.

        :param done: Steps of which it was not yet written that they are done.
        """

        def write() -> None:
            self._mark(run, Progress.DONE, done)
            self._change(change)
            self._put("spec", "name", specs or {})
            self._db.execute("DELETE FROM claim WHERE run = ?", (run.id,))
            self._db.execute(
                "UPDATE run SET ended = ?, outcome = ? WHERE id = ?",
                (round(time.time(), 3), outcome, run.id),
            )
            self._db.execute(
                "DELETE FROM run WHERE ended IS NOT NULL AND id <= (SELECT max(id) FROM run) - ?",
                (KEPT,),
            )

        await self._write(write)

    async def put(self, change: Change) -> None:
        """Change records outside of a run: what is adopted or forgotten."""
        await self._write(lambda: self._change(change))

    async def forget(self, is_there: Callable[[UUID], bool]) -> list[UUID]:
        """Delete the records of devices that no spec asks for and that are gone.

        Their driver was unloaded, or a removal was killed before its note. One that an open run has
        claimed may come yet and is left alone.

        :return: Which these are.
        """

        def gone() -> list[UUID]:
            rows = self._db.execute(
                "SELECT uuid FROM device WHERE json_extract(data, '$.spec') IS NULL"
                " AND 'mdev:' || uuid NOT IN (SELECT object FROM claim)"
            ).fetchall()
            return [uuid for (text,) in rows if not is_there(uuid := UUID(text))]

        def write() -> list[UUID]:
            found = gone()  # a creation claims its device first, and cannot while this writes
            self._put("device", "uuid", dict.fromkeys(found))
            return found

        with explained(self.path):
            if not await self.read(gone):
                return []
        return await self._write(write)

    async def take_over(self, run: Run) -> Run | None:
        """Make an open run that no process is at work at this process's; ``None`` if it is lost."""
        process = Process.this()

        def write() -> bool:
            if (not run.locked and run.process.alive) or not self._take(run):
                return False
            cursor = self._db.execute(
                "UPDATE run SET pid = ?, start_time = ?, boot_id = ?, locked = 1 WHERE id = ?"
                " AND pid = ? AND start_time = ? AND boot_id = ? AND ended IS NULL",
                (
                    process.pid,
                    process.start_time,
                    process.boot_id,
                    run.id,
                    run.process.pid,
                    run.process.start_time,
                    run.process.boot_id,
                ),
            )
            if cursor.rowcount != 1:
                self._locks.release(run.id)
            return cursor.rowcount == 1

        if not await self._write(write):
            return None
        return Run(run.id, run.kind, run.title, process, run.began)

    async def give_up(self, run: Run) -> None:
        """Leave a run open for recovery, by this process or another one."""
        await self.read(lambda: self._locks.release(run.id))

    def _mark(self, run: Run, progress: Progress, numbers: Sequence[int], error: str = "") -> None:
        self._db.executemany(
            "UPDATE step SET progress = ?, error = ? WHERE run = ? AND number = ?",
            [(str(progress), error, run.id, number) for number in numbers],
        )

    def _change(self, change: Change | None) -> None:
        if change is not None:
            self._put("device", "uuid", change.devices)
            self._put("guest", "name", change.guests)

    def _put(self, table: str, key: str, rows: Mapping[Any, msgspec.Struct | None]) -> None:
        # table and key are words of this module
        gone = [(str(name),) for name, value in rows.items() if value is None]
        kept = [(str(name), _json(value)) for name, value in rows.items() if value is not None]
        self._db.executemany(f"DELETE FROM {table} WHERE {key} = ?", gone)  # noqa: S608
        self._db.executemany(f"INSERT OR REPLACE INTO {table} VALUES (?, ?)", kept)  # noqa: S608

    async def _write(self, change: Callable[[], T]) -> T:
        """Run ``change`` in a transaction that it may share with others; durable on return."""
        if self._closed:  # a second interruption closes it under an undo
            raise HostError(f"the journal {self.path} is closed")
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._waiting.append((change, future))
        if self._writing is None or self._writing.done():
            self._writing = asyncio.create_task(self._write_all())
        # the write goes on when the caller is cancelled
        return await asyncio.shield(future)

    async def _write_all(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting:
            batch, self._waiting = self._waiting, []
            changes = [change for change, _ in batch]
            try:
                results = await loop.run_in_executor(self._thread, self._commit, changes)
            except Exception as error:  # noqa: BLE001 - each of the writers gets it
                results = [error] * len(batch)
            for (_, future), result in zip(batch, results, strict=True):
                if future.done():
                    continue
                if isinstance(result, Exception):
                    future.set_exception(result)
                    future.exception()  # its writer may have gone
                else:
                    future.set_result(result)

    def _commit(self, changes: Sequence[Callable[[], Any]]) -> list[Any]:
        if _identity(self.path) != self._file:
            raise JournalError(
                f"the journal {self.path} was deleted or replaced while it was in use",
                "mdo adopt --all makes a new one from what runs",
            )
        results: list[Any] = []
        self._taken.clear()
        try:
            with explained(self.path), transaction(self._db):
                for change in changes:
                    self._db.execute("SAVEPOINT one")
                    try:
                        results.append(change())
                    except MdoError as error:
                        self._db.execute("ROLLBACK TO one")
                        results.append(error)
                    self._db.execute("RELEASE one")
        except BaseException:
            for run in self._taken:
                with contextlib.suppress(OSError):
                    self._locks.release(run)
            raise
        return results


_RUNS = "SELECT id, kind, title, pid, start_time, boot_id, began, locked FROM run"


def _run(row: Sequence[Any]) -> Run:
    id_, kind, title, pid, start, boot, began, locked = row
    return Run(id_, kind, title, Process(pid, start, boot), began, bool(locked))


def _identity(path: Path) -> tuple[int, int] | None:
    """Which file a path names now."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()


def _needs(text: str) -> tuple[int, ...]:
    return msgspec.json.decode(text, type=tuple[int, ...])
