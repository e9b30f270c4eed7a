# SPDX-License-Identifier: GPL-2.0-or-later
"""The journal: durable before it returns, one writer an object, and never trusted blindly."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import resource
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock
from uuid import UUID

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mdev_orchestrator.engine import journal_db, recovery
from mdev_orchestrator.engine.context import Context
from mdev_orchestrator.engine.journal import (
    KEPT,
    Entry,
    Journal,
    Process,
    Progress,
    Run,
    open_journal,
)
from mdev_orchestrator.engine.journal_db import read_managed
from mdev_orchestrator.engine.records import (
    Change,
    DeviceRecord,
    GuestRecord,
    Managed,
    SpecRecord,
)
from mdev_orchestrator.engine.steps import Create, Launch, decode, encode
from mdev_orchestrator.errors import BusyError, HostError
from mdev_orchestrator.machine import Machine

U1 = UUID("83b8f4f2-509f-382f-3c1e-e6bfe0fa1001")
U2 = UUID("83b8f4f2-509f-382f-3c1e-e6bfe0fa1002")
DEVICE = DeviceRecord(uuid=U1, parent="card0", type="t-1", spec="lab", owner="pool:p")
GUEST = GuestRecord(name="g", uuid=U2, spec="lab")
SPEC = SpecRecord(name="lab", text="{}", source="/lab.toml", applied=1.0)
STEPS = [
    Entry(0, encode(Create(device=DEVICE))),
    Entry(1, encode(Launch(guest=GUEST, devices=(U1,))), (0,)),
]
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs a second user")
DEAD = Process(2**22 + 1, 1, "an earlier boot")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "journal.db"


@pytest.fixture
def journal(path: Path) -> Iterator[Journal]:
    with Journal.open(path) as journal:
        yield journal


def rows(path: Path, query: str) -> list[Any]:
    """What another process would find, by a connection of its own."""
    with contextlib.closing(sqlite3.connect(path)) as other:
        return other.execute(query).fetchall()


async def begin(journal: Journal, *claims: str, wait: float = 0, title: str = "lab") -> Run:
    return await journal.begin("apply", title, STEPS, claims, wait=wait)


# ---- a run, from its beginning to its end ----


async def test_a_run_is_on_the_disk_before_its_first_step(journal: Journal, path: Path) -> None:
    run = await begin(journal, f"mdev:{U1}", "guest:g")
    assert rows(path, "SELECT id, kind, title, pid, outcome FROM run") == [
        (run.id, "apply", "lab", os.getpid(), None)
    ]
    assert rows(path, "SELECT number, needs, progress FROM step") == [
        (0, "[]", "planned"),
        (1, "[0]", "planned"),
    ]
    assert rows(path, "SELECT object FROM claim") == [("guest:g",), (f"mdev:{U1}",)]


async def test_what_is_noted_is_on_the_disk_and_ours_with_it(journal: Journal, path: Path) -> None:
    run = await begin(journal)
    await journal.note(run, Progress.ACTING, [0], change=Change(devices={U1: DEVICE}))
    assert read_managed(Machine(state=path.parent)).devices == {U1: DEVICE}
    assert rows(path, "SELECT progress FROM step ORDER BY number") == [("acting",), ("planned",)]
    await journal.note(run, Progress.STUCK, [0, 1], error="no", change=Change(devices={U1: None}))
    assert read_managed(Machine(state=path.parent)).devices == {}
    assert [(entry.progress, entry.error) for entry in journal.steps(run)] == [("stuck", "no")] * 2


async def test_each_flush_is_a_full_one(journal: Journal, path: Path) -> None:
    assert rows(path, "PRAGMA journal_mode") == [("wal",)]
    assert journal._db.execute("PRAGMA synchronous").fetchone() == (2,)


async def test_an_end_gives_back_the_claims_and_settles_what_is_ours(
    journal: Journal, path: Path
) -> None:
    run = await begin(journal, "guest:g")
    change = Change(devices={U1: DEVICE}, guests={"g": GUEST})
    await journal.end(run, "done", change=change, specs={"lab": SPEC})
    assert journal.open_runs() == []
    assert rows(path, "SELECT count(*) FROM claim") == [(0,)]
    managed = read_managed(Machine(state=path.parent))
    assert (managed.devices, managed.guests, managed.specs) == (
        {U1: DEVICE},
        {"g": GUEST},
        {"lab": SPEC},
    )


async def test_writes_at_the_same_time_share_a_flush(journal: Journal) -> None:
    run = await begin(journal)
    commits = 0

    def count(statement: str) -> None:
        nonlocal commits
        commits += statement == "COMMIT"

    journal._db.set_trace_callback(count)  # no other way to see a flush
    await asyncio.gather(*(journal.note(run, Progress.DONE, [0]) for _ in range(64)))
    assert 1 <= commits <= 3


async def test_old_runs_are_forgotten_and_open_ones_never(journal: Journal, path: Path) -> None:
    still_open = await begin(journal)
    for _ in range(3):
        await journal.end(await begin(journal), "done")
    with contextlib.closing(sqlite3.connect(path)) as other, other:
        other.execute("UPDATE run SET id = id + ? WHERE id = 4", (KEPT,))
        other.execute("UPDATE step SET run = run + ? WHERE run = 4", (KEPT,))
    await journal.end(await begin(journal), "done")
    kept = [id_ for (id_,) in rows(path, "SELECT id FROM run ORDER BY id")]
    assert kept == [still_open.id, KEPT + 4, KEPT + 5]
    assert rows(path, "SELECT DISTINCT run FROM step") == [(id_,) for id_ in kept]


async def test_a_writer_that_is_cancelled_has_written_nevertheless(
    journal: Journal, path: Path
) -> None:
    run = await begin(journal)
    writer = asyncio.ensure_future(journal.note(run, Progress.ACTING, [0]))
    await asyncio.sleep(0)
    writer.cancel()
    await asyncio.wait((writer,))
    await journal.note(run, Progress.ACTING, [1])
    assert rows(path, "SELECT DISTINCT progress FROM step") == [("acting",)]


def test_it_can_be_opened_again_and_again(path: Path) -> None:
    for _ in range(3):
        with Journal.open(path) as journal:
            assert journal.managed() == Managed()
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)


@pytest.mark.parametrize("_", range(20))  # another process is the first each time
def test_several_may_create_it_at_once(path: Path, _: int) -> None:
    children = []
    for _ in range(6):
        if not (pid := os.fork()):
            status = 1
            with contextlib.suppress(BaseException), Journal.open(path):
                status = 0
            os._exit(status)
        children.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0] * 6


def test_where_there_is_none_nothing_is_ours_and_none_is_made(path: Path) -> None:
    assert read_managed(Machine(state=path.parent)) == Managed()
    assert not path.parent.exists()


def test_one_that_is_just_being_made_holds_nothing_yet(path: Path) -> None:
    path.parent.mkdir()
    path.touch()
    assert read_managed(Machine(state=path.parent)) == Managed()


# ---- two at once ----


async def test_the_second_waits_and_gets_its_turn(journal: Journal, path: Path) -> None:
    first = await begin(journal, "guest:g", f"mdev:{U1}")
    with Journal.open(path) as other:
        second = asyncio.ensure_future(begin(other, "guest:g", wait=20))
        await asyncio.wait((second,), timeout=0.25)
        assert not second.done()
        await journal.end(first, "done")
        assert (await second).id == first.id + 1


async def test_the_second_is_told_which_command_has_it(journal: Journal, path: Path) -> None:
    await begin(journal, "guest:g", title="web")
    with Journal.open(path) as other, pytest.raises(BusyError) as caught:
        await begin(other, "guest:h", "guest:g")
    assert caught.value.message == (
        f"guest g is being changed by mdo apply web (process {os.getpid()})"
    )
    assert caught.value.hint == "wait until it ends; if it has ended, mdo recover"
    assert len(journal.open_runs()) == 1
    assert rows(path, "SELECT object FROM claim") == [("guest:g",)]


async def test_what_is_not_shared_needs_no_waiting(journal: Journal) -> None:
    await asyncio.gather(begin(journal, "guest:g"), begin(journal, "guest:h"))
    assert len(journal.open_runs()) == 2


async def test_of_two_that_begin_at_once_one_is_refused_and_the_other_not_harmed(
    journal: Journal,
) -> None:
    done = await asyncio.gather(
        begin(journal, "guest:g"), begin(journal, "guest:g"), return_exceptions=True
    )
    assert [isinstance(one, BusyError) for one in done].count(True) == 1
    assert len(journal.open_runs()) == 1


async def abandoned(journal: Journal, path: Path, *claims: str) -> Run:
    """An open run of a process that is not there any more."""
    run = await begin(journal, *claims)
    with contextlib.closing(sqlite3.connect(path)) as other, other:
        other.execute(
            "UPDATE run SET pid = ?, start_time = ?, boot_id = ?, locked = 0",
            (DEAD.pid, DEAD.start_time, DEAD.boot_id),
        )
    await journal.give_up(run)
    return replace(run, process=DEAD, locked=False)


async def test_a_claim_outlives_its_process_until_it_is_recovered(
    journal: Journal, path: Path
) -> None:
    run = await abandoned(journal, path, "guest:g")
    assert journal.open_runs() == [run]
    assert not run.process.alive
    with pytest.raises(BusyError, match="if it has ended, mdo recover"):
        await begin(journal, "guest:g")
    mine = await journal.take_over(run)
    assert mine is not None
    await journal.end(mine, "undone")
    await begin(journal, "guest:g")


async def test_of_two_recoveries_one_takes_a_run_over(journal: Journal, path: Path) -> None:
    run = await abandoned(journal, path)
    with Journal.open(path) as other:
        both = await asyncio.gather(journal.take_over(run), other.take_over(run))
    assert [one is None for one in both].count(True) == 1
    (now,) = journal.open_runs()
    assert now.process == Process.this()
    assert now.process.alive
    assert await journal.take_over(run) is None


async def test_a_process_id_that_was_used_again_is_another_process(journal: Journal) -> None:
    this = Process.this()
    assert this.alive
    assert not replace(this, start_time=this.start_time + 1).alive
    assert not replace(this, boot_id="another").alive


# ---- the process of a run ----

HOLDER = """\
import asyncio, sys
from pathlib import Path
from mdev_orchestrator.engine.journal import Journal

async def main():
    with Journal.open(Path(sys.argv[1])) as journal:
        await journal.begin("apply", "lab", (), ["guest:g"])
        print("begun", flush=True)
        sys.stdin.read()

asyncio.run(main())
"""


@needs_root
def test_a_run_of_another_pid_namespace_is_not_abandoned(path: Path) -> None:
    """Seen from here its process id is of another process, or of none."""
    Journal.open(path).close()
    command = [
        "unshare",
        "--pid",
        "--fork",
        "--mount-proc",
        sys.executable,
        "-c",
        HOLDER,
        str(path),
    ]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        if holder.stdout.readline() != b"begun\n":
            _, said = holder.communicate()
            assert b"unshare" in said, said
            pytest.skip("may not make a PID namespace here")
        with Journal.open(path) as journal:
            (run,) = journal.open_runs()
            assert not run.process.alive  # as far as its number tells
            assert journal.is_at_work(run)
            assert journal.abandoned() == []
            assert asyncio.run(journal.take_over(run)) is None
        holder.communicate()
    with Journal.open(path) as journal:
        assert [found for found, _ in journal.abandoned()] == [run]


async def test_a_run_that_was_given_up_is_abandoned_though_its_process_lives(
    journal: Journal,
) -> None:
    run = await begin(journal)
    assert journal.is_at_work(run)
    await journal.give_up(run)
    assert [found for found, _ in journal.abandoned()] == [run]


async def test_a_write_that_fails_locks_nothing(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = sqlite3.OperationalError("database or disk is full")
    with monkeypatch.context() as patch:
        patch.setattr(journal, "_insert", Mock(side_effect=full))
        with pytest.raises(HostError, match="the disk is full"):
            await begin(journal)
    with Journal.open(journal.path) as other:
        run = await begin(other)
    assert run.id == 1


async def test_a_file_that_goes_under_an_open_journal_is_noticed(journal: Journal) -> None:
    """SQLite would go on writing to a file that has no name any more."""
    run = await begin(journal)
    journal.path.unlink()
    with pytest.raises(HostError, match="was deleted or replaced while it was in use"):
        await journal.end(run, "done")


async def test_opening_it_does_not_hold_the_event_loop(path: Path) -> None:
    """Another process writes meanwhile: SQLite waits for that, and other tasks go on."""
    Journal.open(path).close()
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0.01)
            turns += 1

    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        working = asyncio.ensure_future(others())
        asyncio.get_running_loop().call_later(0.5, other.execute, "COMMIT")
        async with open_journal(Machine(state=path.parent)):
            assert turns > 10
        working.cancel()


# ---- a journal of version 1 ----

VERSION_1 = """\
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
INSERT INTO run VALUES (1, 'apply', 'lab', 4194305, 1, 'an earlier boot', 1.0, NULL, NULL);
INSERT INTO step VALUES (1, 0, '[]', '{step}', 'failed', '');
INSERT INTO claim VALUES ('spec:lab', 1);
INSERT INTO device VALUES ('{uuid}', '{device}');
PRAGMA application_id = {id};
PRAGMA user_version = 1;
"""


async def test_a_journal_of_version_1_is_read_and_updated(path: Path) -> None:
    path.parent.mkdir(mode=0o700)
    words = VERSION_1.format(
        step=STEPS[0].data,
        uuid=U1,
        device=msgspec.json.encode(DEVICE).decode().replace(',"adopted":false', ""),
        id=journal_db.APPLICATION_ID,
    )
    with contextlib.closing(sqlite3.connect(path)) as old:
        old.executescript(words)
    path.chmod(0o600)
    assert read_managed(Machine(state=path.parent)).devices == {U1: DEVICE}
    with Journal.open(path) as journal:
        ((run, (step,)),) = journal.abandoned()
        assert not run.locked
        assert step.progress is Progress.NO_EFFECT
        assert await journal.take_over(run) is not None
        assert journal.is_at_work(journal.open_runs()[0])
    assert rows(path, "PRAGMA user_version") == [(journal_db.VERSION,)]


# ---- files that are not as they should be ----


def refusal(path: Path, hint: str = "") -> str:
    """What commands that change and commands that only look say."""
    with pytest.raises(HostError) as changing:
        Journal.open(path).close()
    with pytest.raises(HostError) as looking:
        read_managed(Machine(state=path.parent))
    assert changing.value.message == looking.value.message
    assert hint in changing.value.hint
    assert "\n" not in str(changing.value)
    return changing.value.message


@pytest.mark.parametrize("content", [b"x", b"\0" * 4096, b"SQLite format 3\0" + b"\xff" * 5000])
def test_not_a_database(path: Path, content: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(content)
    words = refusal(path, "mdo adopt --all then makes a new one from what runs")
    assert words.startswith(f"the journal {path} is damaged: ")
    assert path.read_bytes() == content


def test_a_newer_version(path: Path) -> None:
    Journal.open(path).close()
    with contextlib.closing(sqlite3.connect(path)) as other:
        other.execute("PRAGMA user_version = 7")
    assert refusal(path, "use the newer mdo") == (
        f"{path} was written by a newer mdo: version 7, this one knows 2"
    )
    assert rows(path, "PRAGMA user_version") == [(7,)]


def test_a_database_of_another_program(path: Path) -> None:
    path.parent.mkdir()
    with contextlib.closing(sqlite3.connect(path)) as other:
        other.execute("CREATE TABLE bookmark (url TEXT)")
    path.chmod(0o644)
    before = path.read_bytes()
    assert refusal(path, "move it away, or set MDO_STATE_DIR") == f"{path} is no journal of mdo"
    assert (path.read_bytes(), path.stat().st_mode & 0o777) == (before, 0o644)


def test_a_link_is_not_followed(path: Path, tmp_path: Path) -> None:
    target = tmp_path / "precious"
    target.write_text("mine")
    path.parent.mkdir()
    path.symlink_to(target)
    assert refusal(path, "MDO_STATE_DIR") == f"{path} is no file of yours"
    assert target.read_text() == "mine"
    path.unlink()
    path.symlink_to(tmp_path / "not there")
    assert "is no file of yours" in refusal(path)
    assert not (tmp_path / "not there").exists()


def test_a_directory_in_its_place(path: Path) -> None:
    path.mkdir(parents=True)
    assert refusal(path) == f"{path} is no file of yours"


def test_a_fifo_in_its_place_blocks_nothing(path: Path) -> None:
    path.parent.mkdir()
    os.mkfifo(path)
    assert refusal(path) == f"{path} is no file of yours"


@needs_root
def test_a_file_of_another_user(path: Path) -> None:
    Journal.open(path).close()
    os.chown(path, 4711, 4711)
    assert refusal(path) == f"{path} is no file of yours"


@needs_root
def test_a_directory_of_another_user(path: Path) -> None:
    path.parent.mkdir()
    os.chown(path.parent, 4711, 4711)
    with pytest.raises(HostError, match="belongs to user 4711, not to you"):
        Journal.open(path)


def as_child(work: Callable[[], None]) -> str:
    """Run in a process of its own, and get what it said."""
    read, write = os.pipe()
    if not (pid := os.fork()):
        try:
            work()
            said = "nothing"
        except Exception as error:  # noqa: BLE001 - it is told
            said = f"{type(error).__name__}: {error}"
        os.write(write, said.encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    os.waitpid(pid, 0)
    return said


@needs_root
def test_a_directory_that_cannot_be_written(path: Path) -> None:
    def without_rights() -> None:
        for directory in (path.parent, *path.parents):
            with contextlib.suppress(PermissionError):
                directory.chmod(0o755)
        os.chown(path.parent, 65534, 65534)
        path.parent.chmod(0o500)
        os.seteuid(65534)
        Journal.open(path)

    path.parent.mkdir()
    said = as_child(without_rights)
    assert said == (
        f"JournalError: the journal {path} cannot be opened "
        "(see its permissions and those of its directory)"
    )


async def test_a_journal_on_a_read_only_directory_can_be_looked_at(path: Path) -> None:
    with Journal.open(path) as journal:
        await journal.put(Change(devices={U1: DEVICE}))
    if os.geteuid() == 0:  # root may write everywhere
        with contextlib.closing(journal_db.connect(path, "immutable")) as other:
            assert other.execute("SELECT uuid FROM device").fetchall()
    else:
        path.parent.chmod(0o500)
        assert read_managed(Machine(state=path.parent)).devices == {U1: DEVICE}
        path.parent.chmod(0o700)


HOLD = """\
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("PRAGMA locking_mode = EXCLUSIVE")
connection.execute("BEGIN EXCLUSIVE")
connection.execute("PRAGMA user_version = 1")
print("held", flush=True)
sys.stdin.read()
"""


def test_locked_by_another_process(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Journal.open(path).close()
    monkeypatch.setattr(journal_db, "LOCK_SECONDS", 0.1)
    with subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", HOLD, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert refusal(path, "wait until it ends; fuser shows which it is") == (
            f"the journal {path} is locked by another process"
        )
        process.communicate()
    Journal.open(path).close()


async def test_a_full_disk_is_known_before_anything_is_done(path: Path) -> None:
    """A limit on the size of files stands in for the disk's."""

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048))
        Journal.open(path)

    said = as_child(limited)
    assert said.startswith(f"JournalError: the journal {path} cannot be written: ")
    assert errno.errorcode[errno.EFBIG] not in said


FULL = """\
import sys
from pathlib import Path
from mdev_orchestrator.engine.journal import Journal
try:
    Journal.open(Path(sys.argv[1]))
except Exception as error:
    print(f"{type(error).__name__}: {error}")
"""


@needs_root
def test_a_really_full_disk(tmp_path: Path) -> None:
    """A small file system that only the child sees."""
    script = (
        f'mount -t tmpfs -o size=64k none "{tmp_path}" && '
        f'head -c 56k /dev/zero > "{tmp_path}/filler" && exec "$0" "$@"'
    )
    path = tmp_path / "state" / "journal.db"
    command = ["unshare", "--mount", "sh", "-c", script, sys.executable, "-c", FULL, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    if "unshare failed" in done.stderr:
        pytest.skip("may not make a mount namespace here")
    assert done.stdout == (
        f"JournalError: the journal {path} cannot be written: the disk is full "
        "(make room, then try again)\n"
    ), done.stderr


# ---- rows that are not as they should be ----


async def filled(path: Path) -> None:
    """A journal with one of everything, in one file."""
    with Journal.open(path) as journal:
        run = await begin(journal, "guest:g", f"mdev:{U1}", "spec:lab")
        change = Change(devices={U1: DEVICE, U2: replace_uuid(DEVICE, U2)}, guests={"g": GUEST})
        await journal.note(run, Progress.ACTING, [0], change=change)
        ended = await journal.begin("destroy", "old", STEPS, ())
        await journal.end(ended, "done", specs={"lab": SPEC})
    with contextlib.closing(sqlite3.connect(path)) as other:
        other.execute(
            "UPDATE run SET pid = ?, locked = 0, start_time = 1 WHERE ended IS NULL", (DEAD.pid,)
        )
        other.commit()
        other.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def replace_uuid(device: DeviceRecord, uuid: UUID) -> DeviceRecord:
    return msgspec.structs.replace(device, uuid=uuid)


@pytest.mark.parametrize(
    ("statement", "words"),
    [
        ("UPDATE device SET data = '{}'", "missing required field `uuid`"),
        ("UPDATE device SET data = rtrim(data, '}')", "truncated"),
        (
            "UPDATE device SET data = '{\"x\": ' || printf('%.*c', 99999, '[')",
            "unknown field `x`",
        ),
        ("UPDATE device SET data = json_set(data, '$.colour', 'red')", "unknown field `colour`"),
        ("UPDATE device SET data = json_set(data, '$.uuid', 'x')", "Invalid UUID"),
        (
            "UPDATE device SET data = (SELECT data FROM device ORDER BY uuid DESC)",
            f"a row of device {U1} is about {U2}",
        ),
        (
            "UPDATE guest SET data = json_set(data, '$.name', 'h')",
            "a row of guest g is about h",
        ),
        ("UPDATE guest SET data = 'null'", "got `null`"),
        ("UPDATE spec SET data = json_set(data, '$.applied', 'x')", "got `str`"),
        ("DROP TABLE guest", "no such table: guest"),
        ("ALTER TABLE spec RENAME COLUMN data TO text", "no such column: data"),
        ("UPDATE device SET data = CAST(x'ff' AS TEXT)", "UTF-8"),
    ],
)
async def test_rows_of_what_is_ours(path: Path, statement: str, words: str) -> None:
    await filled(path)
    with contextlib.closing(sqlite3.connect(path)) as other, other:
        other.execute(statement)
    with Journal.open(path) as journal, pytest.raises(HostError) as changing:
        journal.managed()
    with pytest.raises(HostError) as looking:
        read_managed(Machine(state=path.parent))
    for caught in (changing, looking):
        assert caught.value.message.startswith(f"the journal {path} is damaged: ")
        assert words in caught.value.message
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE step SET progress = 'dancing'",
        "UPDATE step SET needs = '{}'",
        "UPDATE step SET needs = '[7]'",
        "UPDATE step SET needs = '[-1]'",
        "UPDATE step SET needs = '[1]'",
        "UPDATE step SET data = '{}'",
        "UPDATE step SET data = json_set(data, '$.do', 'explode')",
        "UPDATE step SET number = number + 5",
        "UPDATE step SET data = '[' || printf('%.*c', 99999, '[')",
        "DROP TABLE step",
    ],
)
async def test_rows_of_steps(path: Path, statement: str) -> None:
    await filled(path)
    with contextlib.closing(sqlite3.connect(path)) as other, other:
        other.execute(statement)
    with Journal.open(path) as journal:
        with pytest.raises(HostError) as caught:
            read_steps(journal)
        assert "damaged" in caught.value.message
        assert "\n" not in str(caught.value)
        with pytest.raises(HostError):
            await recovery.recover_abandoned(journal, Context(Machine(path.parent)))


def read_steps(journal: Journal) -> None:
    """Read all that a recovery reads."""
    for run in journal.open_runs():
        for entry in journal.steps(run):
            decode(entry.data)
    for _, entries in journal.abandoned():
        for entry in entries:
            decode(entry.data)


# ---- whatever happens to the file ----

Damage = Callable[[bytearray], None]


def flipped(at: int, bit: int) -> Damage:
    def damage(data: bytearray) -> None:
        data[at % len(data)] ^= 1 << bit

    return damage


def truncated(at: int) -> Damage:
    def damage(data: bytearray) -> None:
        del data[at % len(data) or 1 :]

    return damage


def scribbled(at: int, text: bytes) -> Damage:
    def damage(data: bytearray) -> None:
        start = at % len(data)
        data[start : start + len(text)] = text

    return damage


def told(work: Callable[[], None]) -> str:
    """What a user is told; anything but our own error goes through."""
    try:
        work()
    except HostError as error:
        return str(error)
    return ""


DAMAGES = st.one_of(
    st.builds(flipped, st.integers(0, 1 << 20), st.integers(0, 7)),
    st.builds(truncated, st.integers(0, 1 << 20)),
    st.builds(scribbled, st.integers(0, 1 << 20), st.binary(min_size=1, max_size=600)),
)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A journal with one of everything."""
    path = tmp_path_factory.mktemp("journal") / "state" / "journal.db"
    asyncio.run(filled(path))
    return path


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(damages=st.lists(DAMAGES, min_size=1, max_size=3))
def test_whatever_happens_to_the_file_is_said_in_one_line(
    sound: Path, path: Path, damages: list[Damage]
) -> None:
    data = bytearray(sound.read_bytes())
    for damage in damages:
        damage(data)
    path.parent.mkdir(exist_ok=True)
    for name in ("", "-wal", "-shm"):
        path.with_name(path.name + name).unlink(missing_ok=True)
    path.write_bytes(data)

    def look() -> None:
        managed = read_managed(Machine(state=path.parent))
        assert all(device.uuid == uuid for uuid, device in managed.devices.items())

    def change() -> None:
        with Journal.open(path) as journal:
            assert all(guest.name == name for name, guest in journal.managed().guests.items())
            read_steps(journal)

    for work in (look, change):
        assert "\n" not in told(work)
