# SPDX-License-Identifier: GPL-2.0-or-later
"""The file behind the journal: its tables, what is ours, and how it can fail.

:mod:`.journal` writes it. Who only wants to know what is ours calls :func:`read_managed`.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import stat
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal, TypeVar
from uuid import UUID

import msgspec
from msgspec import Struct, field

from mdev_orchestrator.errors import HostError
from mdev_orchestrator.state import journal_path

S = TypeVar("S", bound=msgspec.Struct)

APPLICATION_ID = 0x6D646F6A
"""``mdoj``: what file(1) and we know the file by."""
VERSION = 1
LOCK_SECONDS = 5.0
"""To wait for another process that writes at this moment."""
_LOOK_SECONDS = 0.01  # between two tries where SQLite itself does not wait

_SCHEMA = """
CREATE TABLE run (
    id INTEGER PRIMARY KEY, kind TEXT NOT NULL, title TEXT NOT NULL,
    pid INTEGER NOT NULL, start_time INTEGER NOT NULL, boot_id TEXT NOT NULL,
    began REAL NOT NULL, ended REAL, outcome TEXT
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


class DeviceRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An mdev that is ours: all that is needed to make it again as it is.

    :ivar spec: Name of the spec that asked for it; ``None`` for one made by ``mdo create``.
    :ivar owner: ``guest:NAME`` or ``pool:NAME``; empty for neither.
    :ivar label: The group's name in the spec.
    :ivar group: The start group that it was put into.
    :ivar params: The vendor's parameters, written to whichever file the driver has for them.
    :ivar attributes: Further files of it and what was written there, in order; ``group_uuid`` may
        be among them and is then written in its turn, else last.
    :ivar want: The request as the spec had it, to know it again.
    """

    uuid: UUID
    parent: str
    type: str
    spec: str | None = None
    owner: str = ""
    label: str | None = None
    group: UUID | None = None
    params: str = ""
    attributes: tuple[tuple[str, str], ...] = ()
    want: str = ""


class GuestRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A guest that is ours.

    :ivar definition: The spec's ``guest`` without its devices, as JSON text.
    :ivar devices: The mdevs that it has from its spec.
    """

    name: str
    uuid: UUID
    spec: str | None = None
    definition: str = "{}"
    devices: tuple[UUID, ...] = ()


class SpecRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A spec that was applied.

    :ivar text: All of it, as JSON, with absolute paths.
    :ivar source: The file that it was read from.
    :ivar applied: Seconds since the epoch.
    """

    name: str
    text: str
    source: str
    applied: float
    policy: Literal["pack", "spread"] = "pack"


class Managed(Struct, frozen=True):
    """All that is ours, by its name."""

    devices: Mapping[UUID, DeviceRecord] = field(default_factory=dict)
    guests: Mapping[str, GuestRecord] = field(default_factory=dict)
    specs: Mapping[str, SpecRecord] = field(default_factory=dict)


class Change(Struct, frozen=True):
    """What a step's outcome changes in what is ours; ``None`` for what is not ours any more."""

    devices: Mapping[UUID, DeviceRecord | None] = field(default_factory=dict)
    guests: Mapping[str, GuestRecord | None] = field(default_factory=dict)


def read_managed(path: Path | None = None) -> Managed:
    """What is ours, for a command that only looks; nothing where there is no journal.

    :param path: The journal's file; the state directory's without it.
    :raise HostError: It is damaged, of a newer version, or not ours.
    """
    path = path or journal_path()
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
            if _is_new(connection, path):  # nobody was quicker
                for statement in _SCHEMA.split(";\n"):
                    connection.execute(statement)
                connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                connection.execute(f"PRAGMA user_version = {VERSION}")
    _check_version(connection, path)
    path.chmod(0o600)
    _use_wal(connection)
    connection.execute("PRAGMA synchronous = FULL")
    _check_sound(connection)


def _use_wal(connection: sqlite3.Connection) -> None:
    """Have a write-ahead log. For the first who wants one SQLite does not wait for others."""
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
    """See that it is a file of ours, that others cannot write, and no link to something else."""
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
    """Whether nothing was written to it yet, or somebody is about to."""
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


_REMEDIES = (
    ("locked", "is locked by another process", "wait until it ends; fuser shows which it is"),
    ("readonly", "cannot be written", "see its permissions and those of its directory"),
    ("unable to open", "cannot be opened", "see its permissions and those of its directory"),
    ("full", "cannot be written: the disk is full", "make room, then try again"),
    ("disk i/o", "cannot be written: input/output error", "see the kernel log (dmesg)"),
)


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Say what is wrong with a journal, and what to do."""
    try:
        yield
    except sqlite3.Error as error:
        text = str(error)
        if isinstance(error, sqlite3.OperationalError):
            for word, what, hint in _REMEDIES:
                if word in text.lower():
                    raise HostError(f"the journal {path} {what}", hint) from error
        raise _damaged(path, text) from error
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise _damaged(path, str(error)) from error
    except MemoryError as error:
        raise _damaged(path, "SQLite wants more memory for it than there is") from error
    except OSError as error:
        raise HostError(f"the journal {path} cannot be used: {error.strerror}") from error


def _damaged(path: Path, what: str) -> HostError:
    return HostError(
        f"the journal {path} is damaged: {' '.join(what.split())}",
        "move it away; mdo adopt --all then makes a new one from what runs",
    )


def read_rows(connection: sqlite3.Connection) -> Managed:
    """All that is ours."""
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
