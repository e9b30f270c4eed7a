# SPDX-License-Identifier: GPL-2.0-or-later
"""The SQLite file of the journal: its tables, its versions, and how it can fail.

:mod:`.journal` writes it. A command that only reads calls :func:`read_managed`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sqlite3
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import msgspec

from mdev_orchestrator.engine.records import DeviceRecord, GuestRecord, Managed, SpecRecord
from mdev_orchestrator.errors import HostError
from mdev_orchestrator.machine import Machine

S = TypeVar("S", bound=msgspec.Struct)

APPLICATION_ID = 0x6D646F6A
"""``mdoj``: what file(1) and we know the file by."""
VERSION = 2
"""1: runs had no lock, and a step without effect was called ``failed``."""
LOCK_SECONDS = 5.0
"""To wait for another process that writes at this moment."""
_LOOK_SECONDS = 0.01  # between two tries where SQLite itself does not wait
_ROOM = 1 << 16
"""Bytes: on a disk with less room the log of a transaction does not fit."""

_SCHEMA = """
CREATE TABLE run (
    id INTEGER PRIMARY KEY, kind TEXT NOT NULL, title TEXT NOT NULL,
    pid INTEGER NOT NULL, start_time INTEGER NOT NULL, boot_id TEXT NOT NULL,
    began REAL NOT NULL, ended REAL, outcome TEXT, locked INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE TABLE step (
    run INTEGER NOT NULL REFERENCES run(id) ON DELETE CASCADE, number INTEGER NOT NULL,
    needs TEXT NOT NULL, data TEXT NOT NULL, progress TEXT NOT NULL, error TEXT NOT NULL,
    PRIMARY KEY (run, number)
) STRICT, WITHOUT ROWID;
CREATE TABLE claim (
    object TEXT PRIMARY KEY, run INTEGER NOT NULL REFERENCES run(id) ON DELETE CASCADE
) STRICT, WITHOUT ROWID;
CREATE TABLE device (uuid TEXT PRIMARY KEY, data TEXT NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE guest (name TEXT PRIMARY KEY, data TEXT NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE spec (name TEXT PRIMARY KEY, data TEXT NOT NULL) STRICT, WITHOUT ROWID;
"""


class JournalError(HostError):
    """The journal cannot be read or written."""


def read_managed(machine: Machine) -> Managed:
    """Read what is managed here, for a command that only looks; nothing where there is no journal.

    :raise HostError: The journal is damaged, of a newer version, or of another user.
    """
    path = machine.journal_path
    check_file(path)
    if not path.exists():
        return Managed()
    with explained(path):
        connection = connect(path, "ro" if os.access(path.parent, os.W_OK) else "immutable")
        try:
            if _is_new(connection, path):
                return Managed()
            _check_version(connection, path)
            _check_sound(connection)
            return read_rows(connection)
        finally:
            connection.close()


# ---------------------------------------------------------------- the file


def connect(path: Path, mode: str) -> sqlite3.Connection:
    """Open the file to read it (``ro``, ``immutable``) or to write it (``rwc``)."""
    how = "mode=ro&immutable=1" if mode == "immutable" else f"mode={mode}"
    if mode == "rwc":
        # SQLite would make it readable to all; what is wrong it says better than this could
        with contextlib.suppress(OSError):
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    name = str(path.absolute()).replace("%", "%25").replace("?", "%3f").replace("#", "%23")
    connection = sqlite3.connect(
        f"file:{name}?{how}",
        uri=True,
        timeout=LOCK_SECONDS,
        isolation_level=None,
        check_same_thread=False,
    )
    connection.execute("PRAGMA foreign_keys = ON")
    return connection


def prepare(connection: sqlite3.Connection, path: Path) -> None:
    """Check a file, or make an empty one a journal."""
    if _is_new(connection, path):
        with transaction(connection):
            if _is_new(connection, path):  # no other process was faster
                for statement in _SCHEMA.split(";\n"):
                    connection.execute(statement)
                connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                connection.execute(f"PRAGMA user_version = {VERSION}")
    _check_version(connection, path)
    path.chmod(0o600)
    _use_wal(connection)
    if _number(connection, "user_version") < VERSION:
        with transaction(connection):
            _update(connection)
    connection.execute("PRAGMA synchronous = FULL")
    _check_sound(connection)


def _update(connection: sqlite3.Connection) -> None:
    """Make a journal of version 1 one of today's, open runs included."""
    if _number(connection, "user_version") != 1:
        return  # another process was faster
    connection.execute("ALTER TABLE run ADD COLUMN locked INTEGER NOT NULL DEFAULT 0")
    connection.execute("UPDATE step SET progress = 'no effect' WHERE progress = 'failed'")
    connection.execute(f"PRAGMA user_version = {VERSION}")


def _use_wal(connection: sqlite3.Connection) -> None:
    """Switch to a write-ahead log; SQLite itself does not wait for other processes here."""
    end = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() >= end:
                raise
            time.sleep(_LOOK_SECONDS)
        else:
            return


def check_file(path: Path) -> None:
    """Check that it is a regular file of this user that no other user can write."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return
    except OSError as error:
        raise HostError(f"cannot look at {path}: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
        raise HostError(f"{path} is no file of yours", "remove it, or set MDO_STATE_DIR")
    if status.st_mode & 0o022:
        raise HostError(f"{path} can be written by others", f"look at it, then chmod 0600 {path}")


def _is_new(connection: sqlite3.Connection, path: Path) -> bool:
    """Whether the file has no tables yet."""
    size = path.stat().st_size
    if size and not _number(connection, "page_count"):  # SQLite would take it for a new one
        raise sqlite3.DatabaseError("it is too short")
    tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    return not tables and not _number(connection, "application_id")


def _check_version(connection: sqlite3.Connection, path: Path) -> None:
    version = _number(connection, "user_version")
    if _number(connection, "application_id") != APPLICATION_ID:
        raise HostError(f"{path} is no journal of mdo", "move it away, or set MDO_STATE_DIR")
    if version > VERSION:
        raise HostError(
            f"{path} was written by a newer mdo: version {version}, this one knows {VERSION}",
            "use the newer mdo",
        )


def _check_sound(connection: sqlite3.Connection) -> None:
    found = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
    if found != "ok":
        raise sqlite3.DatabaseError(found)


def _number(connection: sqlite3.Connection, pragma: str) -> int:
    return int(connection.execute(f"PRAGMA {pragma}").fetchone()[0])


@contextlib.contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """All of the block, or nothing."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        with contextlib.suppress(sqlite3.Error):
            connection.execute("ROLLBACK")
        raise


_MOUNT = "mount it for writing, or name another directory with MDO_STATE_DIR"
_REMEDIES = (
    ("locked", "is locked by another process", "wait until it ends; fuser shows which it is"),
    ("readonly", "cannot be written", "see its permissions and those of its directory"),
    ("unable to open", "cannot be opened", "see its permissions and those of its directory"),
    ("full", "cannot be written: the disk is full", "make room, then try again"),
    ("mounted", "cannot be written: its file system is mounted read-only", _MOUNT),
    ("disk i/o", "cannot be written: input/output error", "see the kernel log (dmesg)"),
)
_OS_REMEDIES = {
    errno.EROFS: _MOUNT,
    errno.ENOSPC: "make room, then try again",
    errno.EDQUOT: "make room, then try again",
    errno.EACCES: "see its permissions and those of its directory",
    errno.EPERM: "see its permissions and those of its directory",
}


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Say what is wrong with a journal, and what to do."""
    try:
        yield
    except sqlite3.Error as error:
        text = str(error)
        if isinstance(error, sqlite3.OperationalError):
            if _is_full(error, path):
                text = "full"  # SQLite calls some of these an input/output error
            elif _is_mounted_read_only(path):
                text = "mounted"
            for word, what, hint in _REMEDIES:
                if word in text.lower():
                    raise JournalError(f"the journal {path} {what}", hint) from error
        raise _damaged(path, text) from error
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise _damaged(path, str(error)) from error
    except MemoryError as error:
        raise _damaged(path, "SQLite wants more memory for it than there is") from error
    except OSError as error:
        hint = _OS_REMEDIES.get(error.errno or 0, "")
        raise JournalError(f"the journal {path} cannot be used: {error.strerror}", hint) from error


def _is_mounted_read_only(path: Path) -> bool:
    try:
        return bool(os.statvfs(path.parent).f_flag & os.ST_RDONLY)
    except OSError:
        return False


def _is_full(error: sqlite3.OperationalError, path: Path) -> bool:
    """Whether an input/output error comes from a disk without room."""
    # an error of Python's own module has no code
    if getattr(error, "sqlite_errorcode", 0) & 0xFF != sqlite3.SQLITE_IOERR:
        return False
    try:
        disk = os.statvfs(path.parent)
    except OSError:
        return False
    return disk.f_bavail * disk.f_frsize < _ROOM


def _damaged(path: Path, what: str) -> JournalError:
    return JournalError(
        f"the journal {path} is damaged: {' '.join(what.split())}",
        "move it away; mdo adopt --all then makes a new one from what runs",
    )


def read_rows(connection: sqlite3.Connection) -> Managed:
    """Read all records."""
    devices = _rows(connection, "device", "uuid", DeviceRecord)
    guests = _rows(connection, "guest", "name", GuestRecord)
    specs = _rows(connection, "spec", "name", SpecRecord)
    return Managed(
        {d.uuid: d for d in devices}, {g.name: g for g in guests}, {s.name: s for s in specs}
    )


def _rows(connection: sqlite3.Connection, table: str, key: str, type_: type[S]) -> list[S]:
    found = []
    query = f"SELECT {key}, data FROM {table} ORDER BY {key}"  # noqa: S608 - words of this module
    for name, data in connection.execute(query):
        row = msgspec.json.decode(data, type=type_)
        if str(getattr(row, key)) != name:
            raise ValueError(f"a row of {table} {name} is about {getattr(row, key)}")
        found.append(row)
    return found
