# SPDX-License-Identifier: GPL-2.0-or-later
"""The journal: a damaged file, and rows that this program would not write."""

import contextlib
import sqlite3

from fuzz import harness
from mdev_orchestrator.engine import guest_ops, journal_db, recovery, steps
from mdev_orchestrator.engine.journal import Journal
from mdev_orchestrator.engine.records import Managed
from mdev_orchestrator.errors import MdoError
from mdev_orchestrator.machine import Machine
from mdev_orchestrator.system.processes import boot_id

PLACE = harness.scratch()
DAMAGED = Machine(state=PLACE / "damaged")
DAMAGED.state_dir.mkdir(mode=0o700)
ROW = {
    "device": "INSERT INTO device VALUES (?, CAST(? AS TEXT))",
    "guest": "INSERT INTO guest VALUES (?, CAST(? AS TEXT))",
    "spec": "INSERT INTO spec VALUES (?, CAST(? AS TEXT))",
}
_JOURNAL: list[Journal] = []


def one(data: bytes) -> None:
    """The input: an SQLite file, or records ``device KEY``, ``step PROGRESS NEEDS``…"""
    try:
        if data.startswith(b"SQLite"):
            _file(data)
        else:
            _rows(data)
    except MdoError as error:
        harness.check_message(error)


def _file(data: bytes) -> None:
    path = DAMAGED.journal_path
    try:
        path.write_bytes(data)
        _use(journal_db.read_managed(DAMAGED))
        with Journal.open(path) as journal:
            _use(journal.managed())
            _recover(journal)
    finally:
        for file in path.parent.iterdir():
            file.unlink()


def _rows(data: bytes) -> None:
    if not _JOURNAL:
        _JOURNAL.append(Journal.open(PLACE / "journal.db"))
    journal = _JOURNAL[0]
    db = journal._db
    db.execute("BEGIN")
    try:
        _insert(db, data)
        _use(journal.managed())
        _recover(journal)
        for run in journal.open_runs():
            for entry in journal.steps(run):
                _step(entry.data)
    finally:
        db.execute("ROLLBACK")


def _insert(db: sqlite3.Connection, data: bytes) -> None:
    """Bytes become text as they are, in UTF-8 or not."""
    run = "INSERT INTO run VALUES (1, ?, 'title', 4194304, 1, ?, 0, NULL, NULL, ?)"
    locked = int(data.endswith(b"?"))  # by a lock that its process has given back
    db.execute(run, ("destroy" if data.endswith(b"!") else "apply", boot_id(), locked))
    for number, (what, text) in enumerate(harness.records(data)):
        table, _, key = what.partition(" ")
        with contextlib.suppress(sqlite3.Error, UnicodeEncodeError):
            if table == "step":
                progress, _, needs = key.partition(" ")
                row = (number, needs, text, progress)
                db.execute("INSERT INTO step VALUES (1, ?, ?, CAST(? AS TEXT), ?, '')", row)
            elif table in ROW:
                db.execute(ROW[table], (key, text))


def _recover(journal: Journal) -> None:
    """What recovery finds out before it does anything."""
    for run, entries in journal.abandoned():
        recovery._way(run, entries)
        recovery._begun(entries)


def _use(managed: Managed) -> None:
    for guest in managed.guests.values():
        with contextlib.suppress(MdoError):
            guest_ops.guest_spec(guest, [])


def _step(text: str) -> None:
    step = steps.decode(text)
    assert steps.decode(steps.encode(step)) == step
    str(step).encode()
    assert all(isinstance(claim, str) for claim in step.claims)
    with contextlib.suppress(MdoError):
        step.inverse()
