# SPDX-License-Identifier: GPL-2.0-or-later
"""What is ours, and what was intended: an SQLite file that survives whatever kills us.

sysfs and QMP are the truth about what *is*. The journal says which of it is ours, and what a
command that did not come to its end had in mind::

    run      one command that changes things: its process, when, how it ended (none: open)
    step     its steps in their order, and how far each came (see Progress)
    claim    the objects that an open run changes: nobody else changes them meanwhile
    device   the mdevs that are ours        guest    the guests that are ours
    spec     the specs that were applied

The rule is *intent before action*. A run is written with all its steps before the first of them
acts; a step that waits for others once more right before it acts, and each when it has acted, the
last of them together with the end of the run. Every one of these writes is on the disk (WAL,
``synchronous=FULL``) when it returns. Concurrent writes share one transaction, so sixty-four
devices that are created at once cost a handful of flushes.

A run belongs to the process that began it, as long as it has the journal open that it began it by.
When that process has gone, or goes on without it, and the run is open, it is :mod:`.recovery`'s.

What the file holds is checked when it is read: it may be damaged, of a newer version, or not ours.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Self, TypeVar
from uuid import UUID

import msgspec

from mdev_orchestrator.engine.journal_db import (
    VERSION,
    Change,
    Managed,
    SpecRecord,
    check_file,
    connect,
    explained,
    prepare,
    read_rows,
    transaction,
)
from mdev_orchestrator.errors import BusyError, HostError, MdoError
from mdev_orchestrator.state import journal_path, private_dir
from mdev_orchestrator.system.processes import boot_id, start_time

T = TypeVar("T")

CLAIM_SECONDS = 10.0
"""To wait for another command that changes the same objects."""
KEPT = 200
"""Closed runs that are kept for whoever wants to know what happened."""


class Progress(StrEnum):
    """How far a step has come."""

    PLANNED = "planned"
    ACTING = "acting"
    """Its intent is written; what it has done is not known."""
    DONE = "done"
    FAILED = "failed"
    """It did nothing, or has taken back what it did."""
    UNDOING = "undoing"
    UNDONE = "undone"
    STUCK = "stuck"
    """It could not be undone; the run stays open."""


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
        """The one that asks."""
        pid = os.getpid()
        return cls(pid, start_time(pid) or 0, boot_id())

    @property
    def alive(self) -> bool:
        """Whether it is still there."""
        return self.boot_id == boot_id() and start_time(self.pid) == self.start_time


@dataclass(frozen=True, slots=True)
class Run:
    """One command that changes or changed things.

    :ivar kind: ``apply``, ``destroy``, ``create``, ``detach``…
    :ivar title: What it was about: the spec, the guest, the devices.
    :ivar began: Seconds since the epoch.
    """

    id: int
    kind: str
    title: str
    process: Process
    began: float

    def __str__(self) -> str:
        """How messages name it."""
        return f"mdo {self.kind} {self.title}".rstrip() + f" (process {self.process.pid})"


_at_work: set[tuple[Path, int]] = set()
"""The runs that this process began, by a journal that it still has open."""


class Journal:
    """An open journal; also a context manager that closes it.

    Its methods that write are coroutines: flushes happen in a thread of its own.
    """

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self.path = path
        self._db = connection
        self._thread = ThreadPoolExecutor(1, "journal")
        self._waiting: list[tuple[Callable[[], Any], asyncio.Future[Any]]] = []
        self._writing: asyncio.Task[None] | None = None
        self._begun: set[tuple[Path, int]] = set()
        self._closed = False

    # ---- opening --------------------------------------------------------------------------------

    @classmethod
    def open(cls, path: Path | None = None) -> Self:
        """Open the journal for a command that changes things; create it if it is not there.

        :raise HostError: It is damaged, of a newer version, not ours, locked, or cannot be written.
        """
        path = path or journal_path()
        private_dir(path.parent)
        check_file(path)
        with explained(path):
            connection = connect(path, "rwc")
            try:
                prepare(connection, path)
                # read-only directories and full disks shall be known before anything is done
                with transaction(connection):
                    connection.execute("PRAGMA user_version = 0")
                    connection.execute(f"PRAGMA user_version = {VERSION}")
            except BaseException:
                connection.close()
                raise
        return cls(connection, path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Wait for what is being written, and close the file."""
        self._closed = True
        self._thread.shutdown()
        self._db.close()
        _at_work.difference_update(self._begun)

    # ---- reading --------------------------------------------------------------------------------

    def owned(self) -> Managed:
        """All that is ours, at this moment."""
        with explained(self.path):
            return read_rows(self._db)

    def open_runs(self) -> list[Run]:
        """Runs that have not come to their end, the oldest first; some may be at work just now."""
        with explained(self.path):
            return [
                Run(id_, kind, title, Process(pid, start, boot), began)
                for id_, kind, title, pid, start, boot, began in self._db.execute(
                    "SELECT id, kind, title, pid, start_time, boot_id, began FROM run"
                    " WHERE ended IS NULL ORDER BY id"
                )
            ]

    def is_at_work(self, run: Run) -> bool:
        """Whether somebody is at an open run: another process that lives, or this one.

        One that lives long may have given up a run that it could not close, when the disk was full.
        """
        if run.process != Process.this():
            return run.process.alive
        return (self.path.absolute(), run.id) in _at_work

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

    def has_steps(self, run: Run) -> bool:
        """Whether a run knows what to do, or knew it."""
        with explained(self.path):
            query = "SELECT EXISTS (SELECT 1 FROM step WHERE run = ?)"
            return bool(self._db.execute(query, (run.id,)).fetchone()[0])

    # ---- writing --------------------------------------------------------------------------------

    async def begin(
        self,
        kind: str,
        title: str,
        steps: Sequence[Entry],
        claims: Collection[str],
        *,
        change: Change | None = None,
        refused: Change | None = None,
        wait: float = CLAIM_SECONDS,
    ) -> Run:
        """Write down a run with all its steps, and claim the objects that it changes.

        :param claims: ``guest:NAME``, ``mdev:UUID``, ``spec:NAME``.
        :param change: What is ours as soon as its first steps may have begun.
        :param refused: What is ours, or not any more, when it is interrupted before that.
        :param wait: Seconds to wait for another command that has claimed one of them.
        :raise BusyError: Another command changes one of them.
        :raise HostError: The journal cannot be written; nothing was done.
        """
        process = Process.this()

        def write() -> Run:
            self._refuse_claimed(claims)
            began = round(time.time(), 3)
            cursor = self._db.execute(
                "INSERT INTO run (kind, title, pid, start_time, boot_id, began)"
                " VALUES (?, ?, ?, ?, ?, ?)",
                (kind, title, process.pid, process.start_time, process.boot_id, began),
            )
            run = Run(cursor.lastrowid or 0, kind, title, process, began)
            self._is_ours(run)
            self._insert(run, steps, claims, change)
            written.append(run)
            return run

        written: list[Run] = []
        try:
            return await self._claiming(write, wait)
        except asyncio.CancelledError as error:
            for run in written:  # nobody else knows of it
                await self.end(run, "undone", change=refused)
            error.add_note("nothing was changed")
            raise

    async def plan(
        self,
        run: Run,
        steps: Sequence[Entry],
        claims: Collection[str],
        *,
        change: Change | None = None,
        wait: float = CLAIM_SECONDS,
    ) -> None:
        """Write down the steps of a run that was begun without any, and claim their objects.

        For who must know that nobody else is at something before it looks what is to be done.

        :param change: What is ours as soon as its first steps may have begun.
        """

        def write() -> None:
            self._refuse_claimed(claims, run)
            self._insert(run, steps, claims, change)

        await self._claiming(write, wait)

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

    def _is_ours(self, run: Run) -> None:
        self._begun.add((self.path.absolute(), run.id))
        _at_work.update(self._begun)

    async def _claiming(self, write: Callable[[], T], wait: float) -> T:
        """Write what claims objects, as soon as nobody else has them."""
        loop = asyncio.get_running_loop()
        end = loop.time() + wait
        while True:
            writing = asyncio.ensure_future(self._write(write))
            try:
                return await asyncio.shield(writing)
            except asyncio.CancelledError:
                await asyncio.wait((writing,))  # who asked must know whether it was
                raise
            except BusyError:
                if loop.time() >= end:
                    raise
            await asyncio.sleep(0.1)  # a lock of another process; nothing tells when it is free

    def _refuse_claimed(self, claims: Collection[str], run: Run | None = None) -> None:
        taken = self._db.execute(
            "SELECT claim.object, run.kind, run.title, run.pid FROM claim JOIN run"
            " ON run.id = claim.run WHERE claim.object IN"
            " (SELECT value FROM json_each(?)) AND run.id IS NOT ? ORDER BY claim.object LIMIT 1",
            (_json(sorted(claims)), None if run is None else run.id),
        ).fetchone()
        if taken is not None:
            object_, kind, title, pid = taken
            raise BusyError(
                f"{object_.replace(':', ' ', 1)} is being changed by mdo {kind} {title}".rstrip()
                + f" (process {pid})",
                "wait until it ends; if it has ended, mdo recover",
            )

    async def note(
        self,
        run: Run,
        progress: Progress,
        steps: Iterable[int],
        *,
        change: Change | None = None,
        error: str = "",
    ) -> None:
        """Write down how far steps have come, and what has become ours or not ours by it."""
        numbers = tuple(steps)

        def write() -> None:
            self._mark(run, progress, numbers, error)
            self._change(change)

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
        """Change what is ours outside of a run: what is adopted or forgotten."""
        await self._write(lambda: self._change(change))

    async def forget(self, is_there: Callable[[UUID], bool]) -> list[UUID]:
        """Note that devices which no spec asks for, and which are gone, are not ours any more.

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
            found = gone()  # who makes a device claims it first, and cannot while we write
            self._put("device", "uuid", dict.fromkeys(found))
            return found

        with explained(self.path):
            if not gone():
                return []
        return await self._write(write)

    async def take_over(self, run: Run) -> Run | None:
        """Make an open run of a process that has gone ours; ``None`` if somebody was quicker."""
        process = Process.this()

        def write() -> bool:
            cursor = self._db.execute(
                "UPDATE run SET pid = ?, start_time = ?, boot_id = ? WHERE id = ?"
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
            if cursor.rowcount == 1:
                self._is_ours(run)
            return cursor.rowcount == 1

        if not await self._write(write):
            return None
        return Run(run.id, run.kind, run.title, process, run.began)

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
        if self._closed:  # by who was interrupted, under somebody who still undoes
            raise HostError(f"the journal {self.path} is closed")
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._waiting.append((change, future))
        if self._writing is None or self._writing.done():
            self._writing = asyncio.create_task(self._write_all())
        # whoever is cancelled meanwhile must still know what was written: it will be
        return await asyncio.shield(future)

    async def _write_all(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting:
            batch, self._waiting = self._waiting, []
            changes = [change for change, _ in batch]
            try:
                results = await loop.run_in_executor(self._thread, self._commit, changes)
            except Exception as error:  # noqa: BLE001 - each of the writers is told
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
        results: list[Any] = []
        with explained(self.path), transaction(self._db):
            for change in changes:
                self._db.execute("SAVEPOINT one")
                try:
                    results.append(change())
                except MdoError as error:
                    self._db.execute("ROLLBACK TO one")
                    results.append(error)
                self._db.execute("RELEASE one")
        return results


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()


def _needs(text: str) -> tuple[int, ...]:
    return msgspec.json.decode(text, type=tuple[int, ...])
