# SPDX-License-Identifier: GPL-2.0-or-later
"""Writes by children: one, many, refused ones, those that never end, and children that are killed.

A FIFO is a file whose open for writing blocks until a reader comes, as a driver may block a write.
"""

from __future__ import annotations

import asyncio
import errno
import os
import random
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path

import pytest

from mdev_orchestrator.errors import Outcome
from mdev_orchestrator.machine import Machine
from mdev_orchestrator.system import writer
from mdev_orchestrator.system.waiting import readable
from mdev_orchestrator.system.writer import (
    DEPTH,
    SysfsWriter,
    WriteBatch,
    WriteResult,
)

DONE = WriteResult(Outcome.DONE)
UNKNOWN = WriteResult(Outcome.UNKNOWN)
LANE = "card0"


def refused(number: int) -> WriteResult:
    return WriteResult(Outcome.NO_EFFECT, number)


@pytest.fixture
async def sysfs() -> AsyncIterator[SysfsWriter]:
    sysfs = SysfsWriter()
    yield sysfs
    await sysfs.close()


@pytest.fixture
def one_child(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "CHILDREN", 1)
    monkeypatch.setattr(writer, "MOST_CHILDREN", 1)


@pytest.fixture
def lines(tmp_path: Path) -> list[tuple[str, bytes]]:
    """Empty files, and what is to be written to each."""
    made = []
    for number in range(60):
        (tmp_path / f"{number}").touch()
        made.append((str(tmp_path / f"{number}"), f"data {number}".encode()))
    return made


def fifo(place: Path, name: str = "fifo") -> Path:
    os.mkfifo(place / name)
    return place / name


def stuck(sysfs: SysfsWriter, pipe: Path) -> WriteBatch:
    """A batch that has begun with its only write, to a FIFO that is not read."""
    batch = sysfs.batch([(str(pipe), b"x")], ignore, lane=LANE)
    batch.begin()
    return batch


def release(*fifos: Path) -> None:
    """Let the writes to some FIFOs end."""
    for one in fifos:
        threading.Thread(target=one.read_bytes, daemon=True).start()


def ignore(_index: int, _result: WriteResult) -> None:
    pass


def children() -> set[int]:
    """The processes that this one has started and that have not been reaped."""
    found = set[int]()
    for task in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # a thread that has ended
            found.update(map(int, (task / "children").read_text().split()))
    return found


def names(pid: int, path: Path) -> bool:
    """Whether a process has a file open, or names it by a descriptor."""
    entries: list[Path] = []
    with suppress(OSError):  # it has ended
        entries = [*Path(f"/proc/{pid}/fd").iterdir()]
    for entry in entries:
        with suppress(OSError):  # closed meanwhile
            if entry.readlink() == path:
                return True
    return False


def at(path: Path) -> list[int]:
    """The children that are at a write to a file."""
    return [pid for pid in children() if names(pid, path)]


async def seen(what: Callable[[], object]) -> None:
    """Wait until something can be seen."""
    async with asyncio.timeout(20):
        while not what():
            await asyncio.sleep(0.005)


async def ended(batch: WriteBatch) -> list[WriteResult | None]:
    await asyncio.wait_for(asyncio.shield(batch.ended), 20)
    return batch.results


# ---- one ----


async def test_a_write_is_done_or_has_its_errno(sysfs: SysfsWriter, tmp_path: Path) -> None:
    file = tmp_path / "file"
    assert await sysfs.write(str(file), b"x", lane=LANE) == refused(errno.ENOENT)
    file.touch()
    assert await sysfs.write(str(file), b"a\0b", lane=LANE) == DONE
    assert file.read_bytes() == b"a\0b"
    assert await sysfs.write("/dev/full", b"x", lane=LANE) == refused(errno.ENOSPC)


async def test_a_blocked_write_is_left_behind(sysfs: SysfsWriter, tmp_path: Path) -> None:
    pipe = fifo(tmp_path)
    writing = asyncio.ensure_future(sysfs.write(str(pipe), b"late", lane=LANE))
    await seen(lambda: at(pipe))
    writing.cancel()
    await asyncio.wait((writing,))
    assert writing.cancelled()
    (child,) = at(pipe)
    assert await asyncio.to_thread(pipe.read_bytes) == b"late"
    await seen(lambda: child not in children())


async def test_the_lane_goes_on_beside_what_is_left_behind(
    sysfs: SysfsWriter, tmp_path: Path, one_child: None, lines: list[tuple[str, bytes]]
) -> None:
    pipe = fifo(tmp_path)
    writing = asyncio.ensure_future(sysfs.write(str(pipe), b"x", lane=LANE))
    await seen(lambda: at(pipe))
    writing.cancel()
    batch = sysfs.batch(lines[:3], ignore, lane=LANE)
    batch.begin()
    assert await ended(batch) == [DONE] * 3
    release(pipe)


async def test_a_write_that_is_given_up_halfway_is_killed(
    sysfs: SysfsWriter, tmp_path: Path
) -> None:
    pipe = fifo(tmp_path)
    writing = asyncio.ensure_future(sysfs.write(str(pipe), b"1", lane=LANE, kill_if_cancelled=True))
    await seen(lambda: at(pipe))
    (child,) = at(pipe)
    writing.cancel()
    await asyncio.wait((writing,))
    assert child not in children()


async def test_a_cancelled_write_that_has_not_begun_never_begins(
    sysfs: SysfsWriter, tmp_path: Path, one_child: None, lines: list[tuple[str, bytes]]
) -> None:
    pipe = fifo(tmp_path)
    first = stuck(sysfs, pipe)
    await seen(lambda: at(pipe))
    path, data = lines[0]
    second = asyncio.ensure_future(sysfs.write(path, data, lane=LANE, kill_if_cancelled=True))
    await asyncio.sleep(0)  # it is in the child's queue now
    second.cancel()
    await asyncio.wait((second,))
    release(pipe)
    assert await ended(first) == [DONE]
    await sysfs.close()
    assert Path(path).read_bytes() == b""


async def test_a_cancelled_write_takes_no_other_with_it(
    sysfs: SysfsWriter, tmp_path: Path, one_child: None, loop_holds: list[str]
) -> None:
    """The child has made it, and is at the write of a batch when its answer is still unread."""
    pipe = fifo(tmp_path)
    (tmp_path / "file").touch()
    write = sysfs.write(str(tmp_path / "file"), b"x", lane=LANE, kill_if_cancelled=True)
    writing = asyncio.ensure_future(write)
    batch = sysfs.batch([(str(pipe), b"x")], ignore, lane=LANE)
    asyncio.get_running_loop().call_soon(batch.begin)
    await asyncio.sleep(0)
    while not at(pipe):
        time.sleep(0.001)  # noqa: ASYNC251 - the loop is not to read the answer
    writing.cancel()
    await asyncio.wait((writing,))
    assert (tmp_path / "file").read_bytes() == b"x"
    assert len(at(pipe)) == 1
    release(pipe)
    assert await ended(batch) == [DONE]
    loop_holds.clear()


# ---- many ----


async def test_all_are_written_once_and_each_result_is_told_once(
    sysfs: SysfsWriter, tmp_path: Path, lines: list[tuple[str, bytes]]
) -> None:
    results: list[tuple[int, WriteResult]] = []
    batch = sysfs.batch(lines, lambda *result: results.append(result), lane=LANE)
    batch.begin()
    assert await ended(batch) == [DONE] * 60
    assert sorted(index for index, _ in results) == list(range(60))
    assert [Path(path).read_bytes() for path, _ in lines] == [data for _, data in lines]


async def test_an_empty_batch_ends(sysfs: SysfsWriter) -> None:
    batch = sysfs.batch([], ignore, lane=LANE)
    batch.begin()
    assert await ended(batch) == []


async def test_no_write_begins_after_one_is_refused(
    sysfs: SysfsWriter, tmp_path: Path, one_child: None, lines: list[tuple[str, bytes]]
) -> None:
    lines[20] = (str(tmp_path / "missing"), b"x")
    batch = sysfs.batch(lines, ignore, lane=LANE)
    batch.begin()
    results = await ended(batch)
    assert results[20] == refused(errno.ENOENT)
    begun = {index for index, result in enumerate(results) if result is not None}
    assert begun >= {*range(21)}
    assert len(begun) <= 20 + DEPTH
    written = {index for index in {*range(60)} - {20} if Path(lines[index][0]).read_bytes()}
    assert written == begun - {20}


async def test_an_accepted_errno_is_no_refusal(
    sysfs: SysfsWriter, tmp_path: Path, one_child: None, lines: list[tuple[str, bytes]]
) -> None:
    lines = [(str(tmp_path / "missing"), b"x"), lines[0]]
    batch = sysfs.batch(lines, ignore, lane=LANE, accepted=frozenset((0, errno.ENOENT)))
    batch.begin()
    assert await ended(batch) == [refused(errno.ENOENT), DONE]


async def test_a_late_answer_brings_one_more_child_at_a_time(
    sysfs: SysfsWriter, tmp_path: Path
) -> None:
    """Eight writes that each wait for a reader: all of them wait at the same time."""
    fifos = [fifo(tmp_path, f"{number}") for number in range(8)]
    before = children()
    batch = sysfs.batch([(str(one), b"x") for one in fifos], ignore, lane=LANE)
    batch.begin()
    counts = [len(children() - before)]
    while not all(map(at, fifos)):
        counts.append(len(children() - before))
        await asyncio.sleep(0.005)
    counts.append(len(children() - before))
    assert set(counts) == {*range(1, 9)}
    assert counts == sorted(counts)
    assert batch.results == [None] * 8
    release(*fifos)
    assert await ended(batch) == [DONE] * 8


async def test_no_lane_has_more_children_than_the_limit(
    sysfs: SysfsWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "LATE_SECONDS", 0.0)
    monkeypatch.setattr(writer, "MOST_CHILDREN", 4)
    fifos = [fifo(tmp_path, f"{number}") for number in range(6)]
    before = children()
    batch = sysfs.batch([(str(one), b"x") for one in fifos], ignore, lane=LANE)
    batch.begin()
    await seen(lambda: sum(bool(at(one)) for one in fifos) == 4)
    assert batch.stop() is False
    assert len(batch.unknown) == len(children() - before) == 4
    release(*fifos)
    results = await ended(batch)
    assert (results.count(DONE), results.count(None)) == (4, 2)


async def test_writes_behind_a_slow_one_are_made_by_others(
    sysfs: SysfsWriter, tmp_path: Path, lines: list[tuple[str, bytes]]
) -> None:
    pipe = fifo(tmp_path)
    lines[30] = (str(pipe), b"x")
    batch = sysfs.batch(lines, ignore, lane=LANE)
    batch.begin()
    await seen(lambda: batch.results.count(DONE) == 59)
    assert batch.unknown == {30}
    release(pipe)
    assert await ended(batch) == [DONE] * 60


async def test_a_stopped_batch_begins_nothing_more(
    sysfs: SysfsWriter, tmp_path: Path, one_child: None, lines: list[tuple[str, bytes]]
) -> None:
    pipe = fifo(tmp_path)
    lines[0] = (str(pipe), b"x")
    batch = sysfs.batch(lines, ignore, lane=LANE)
    batch.begin()
    await seen(lambda: at(pipe))
    assert len(batch.unknown) == DEPTH
    assert batch.stop() is False
    assert batch.unknown == {0}
    release(pipe)
    assert await ended(batch) == [DONE] + [None] * 59
    assert not any(Path(path).read_bytes() for path, _ in lines[1:])


async def test_a_batch_that_is_stopped_before_it_begins(
    sysfs: SysfsWriter, tmp_path: Path, lines: list[tuple[str, bytes]]
) -> None:
    batch = sysfs.batch(lines[:3], ignore, lane=LANE)
    assert batch.stop() is True
    batch.begin()
    assert await ended(batch) == [None] * 3


async def test_what_a_batch_leaves_is_unknown_and_told_once(
    sysfs: SysfsWriter, tmp_path: Path
) -> None:
    results: list[tuple[int, WriteResult]] = []
    pipe = fifo(tmp_path)
    batch = sysfs.batch([(str(pipe), b"x")], lambda *result: results.append(result), lane=LANE)
    batch.begin()
    await seen(lambda: at(pipe))
    (child,) = at(pipe)
    batch.stop()
    batch.leave()
    assert await ended(batch) == [UNKNOWN]
    release(pipe)
    await seen(lambda: child not in children())
    assert results == [(0, UNKNOWN)]


@pytest.mark.parametrize("other", [LANE, "card1"])
async def test_two_batches_go_on_beside_each_other(
    sysfs: SysfsWriter, tmp_path: Path, other: str, lines: list[tuple[str, bytes]]
) -> None:
    pipe = fifo(tmp_path)
    waiting = stuck(sysfs, pipe)
    batch = sysfs.batch(lines[:40], ignore, lane=other)
    batch.begin()
    assert await ended(batch) == [DONE] * 40
    assert waiting.unknown == {0}
    assert waiting.longest >= 0
    release(pipe)
    assert await ended(waiting) == [DONE]


@pytest.mark.parametrize("path", ["a\0b", "x" * 70000])
async def test_what_no_message_can_carry_is_refused(sysfs: SysfsWriter, path: str) -> None:
    with pytest.raises(ValueError, match="no file of sysfs has such a path"):
        sysfs.batch([(path, b"x")], ignore, lane=LANE)


async def test_without_a_process_to_be_had_the_write_has_no_effect(
    sysfs: SysfsWriter,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lines: list[tuple[str, bytes]],
) -> None:
    def none_left(_channel: int) -> int:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    with monkeypatch.context() as patch:
        patch.setattr(writer, "_fork", none_left)
        batch = sysfs.batch(lines[:3], ignore, lane=LANE)
        batch.begin()
        assert await ended(batch) == [refused(errno.EAGAIN), None, None]
    batch = sysfs.batch(lines[:3], ignore, lane=LANE)
    batch.begin()
    assert await ended(batch) == [DONE] * 3


# ---- callbacks ----


async def test_a_callback_that_raises_loses_no_result(
    sysfs: SysfsWriter, tmp_path: Path, lines: list[tuple[str, bytes]]
) -> None:
    errors: list[BrokenPipeError] = []

    def raises(index: int, _result: WriteResult) -> None:
        if index % 2:
            errors.append(BrokenPipeError(f"print to nowhere {index}"))
            raise errors[-1]

    batch = sysfs.batch(lines[:40], raises, lane=LANE)
    batch.begin()
    assert await ended(batch) == [DONE] * 40
    assert len(errors) == 20
    assert batch.callback_error is errors[0]
    path, data = lines[0]
    assert await sysfs.write(path, data, lane=LANE) == DONE


async def test_a_callback_can_stop_its_batch(
    sysfs: SysfsWriter, tmp_path: Path, one_child: None, lines: list[tuple[str, bytes]]
) -> None:
    def stop(index: int, _result: WriteResult) -> None:
        if index == 2:
            batch.stop()

    lines = lines[:40]
    pipe = fifo(tmp_path)
    lines[3] = (str(pipe), b"x")
    batch = sysfs.batch(lines, stop, lane=LANE)
    batch.begin()
    await seen(lambda: batch.results[2])
    release(pipe)
    results = await ended(batch)
    assert results[:3] == [DONE] * 3
    assert results[4:] == [None] * 36


# ---- children that are killed ----


async def test_a_killed_child_leaves_one_write_unknown_and_another_makes_the_rest(
    sysfs: SysfsWriter, tmp_path: Path, one_child: None, lines: list[tuple[str, bytes]]
) -> None:
    lines = lines[:20]
    pipe = fifo(tmp_path)
    lines[2] = (str(pipe), b"x")
    batch = sysfs.batch(lines, ignore, lane=LANE)
    other = sysfs.batch([(str(tmp_path / "other"), b"y")], ignore, lane=LANE)
    (tmp_path / "other").touch()
    batch.begin()
    other.begin()
    await seen(lambda: at(pipe))
    os.kill(at(pipe)[0], signal.SIGKILL)
    results = await ended(batch)
    assert results[2] == UNKNOWN
    assert results[:2] + results[3:] == [DONE] * 19
    assert await ended(other) == [DONE]


async def test_a_killed_child_is_no_refusal(sysfs: SysfsWriter, tmp_path: Path) -> None:
    pipe = fifo(tmp_path)
    writing = asyncio.ensure_future(sysfs.write(str(pipe), b"x", lane=LANE))
    await seen(lambda: at(pipe))
    os.kill(at(pipe)[0], signal.SIGKILL)
    assert await writing == UNKNOWN


async def test_an_idle_child_that_is_killed_is_replaced(
    sysfs: SysfsWriter, tmp_path: Path, lines: list[tuple[str, bytes]]
) -> None:
    before = children()
    path, data = lines[0]
    assert await sysfs.write(path, data, lane=LANE) == DONE
    (child,) = children() - before
    os.kill(child, signal.SIGKILL)
    assert await sysfs.write(path, data, lane=LANE) == DONE  # in its queue before we know
    await seen(lambda: child not in children())


async def test_a_child_that_other_code_reaps_is_noticed_and_its_id_never_used(
    sysfs: SysfsWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = fifo(tmp_path)
    batch = stuck(sysfs, pipe)
    await seen(lambda: at(pipe))
    (child,) = at(pipe)
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[0] == child  # from here on the id may be another process's
    by_id: list[object] = []
    with monkeypatch.context() as patch:
        for name in ("kill", "waitpid"):
            patch.setattr(os, name, lambda *arguments: by_id.append(arguments))
        batch.kill()
        assert await ended(batch) == [UNKNOWN]
    assert by_id == []


async def test_after_its_parent_has_died_a_child_begins_nothing(
    tmp_path: Path, lines: list[tuple[str, bytes]]
) -> None:
    """What the parent's death leaves to be done is seen in /proc, and nothing else is done."""
    pipe = fifo(tmp_path)
    told = [(str(pipe), b"begun"), *lines[:4]]
    program = (
        "import asyncio\n"
        "from mdev_orchestrator.system.writer import SysfsWriter\n"
        "async def main():\n"
        f"    batch = SysfsWriter().batch({told!r}, print, lane='p')\n"
        "    batch.begin()\n"
        "    await batch.ended\n"
        "asyncio.run(main())\n"
    )
    parent = await asyncio.create_subprocess_exec(sys.executable, "-c", program)

    def child() -> int:
        found = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
        for pid in found:
            if names(int(pid), pipe):
                return int(pid)
        return 0

    await seen(child)
    pid = child()
    orphan = os.pidfd_open(pid)
    try:
        parent.kill()
        await parent.wait()
        assert names(pid, pipe)
        assert await asyncio.to_thread(pipe.read_bytes) == b"begun"
        await asyncio.wait_for(readable(orphan), 20)
    finally:
        os.close(orphan)
    assert [Path(path).read_bytes() for path, _ in lines[:4]] == [b""] * 4


# ---- children that end ----


async def test_a_child_has_nothing_of_its_parent(
    sysfs: SysfsWriter, tmp_path: Path, lines: list[tuple[str, bytes]]
) -> None:
    before = children()
    path, data = lines[0]
    await sysfs.write(path, data, lane=LANE)
    (child,) = children() - before
    assert len([*Path(f"/proc/{child}/fd").iterdir()]) == 1
    assert os.getsid(child) == child


async def test_idle_children_end(
    sysfs: SysfsWriter,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lines: list[tuple[str, bytes]],
) -> None:
    monkeypatch.setattr(writer, "IDLE_SECONDS", 0.02)
    before = children()
    batch = sysfs.batch(lines[:40], ignore, lane=LANE)
    batch.begin()
    await ended(batch)
    await seen(lambda: not children() - before)


async def test_a_write_for_a_child_that_just_ends_is_made_by_another(
    sysfs: SysfsWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "IDLE_SECONDS", 0.001)
    log = tmp_path / "log"
    os.mkfifo(log)
    reader = os.open(log, os.O_RDONLY | os.O_NONBLOCK)
    try:
        for number in range(100):
            assert await sysfs.write(str(log), b"x", lane=LANE) == DONE
            time.sleep(number % 7 * 0.0005)  # noqa: ASYNC251 - the child is to be ahead of the loop
        assert os.read(reader, 1000) == b"x" * 100
    finally:
        os.close(reader)


async def test_closing_ends_the_children_and_leaves_what_is_under_way(
    tmp_path: Path, lines: list[tuple[str, bytes]]
) -> None:
    sysfs = SysfsWriter()
    before = children()
    lines = lines[:20]
    pipe = fifo(tmp_path)
    batch = sysfs.batch([(str(pipe), b"x"), *lines], ignore, lane=LANE)
    batch.begin()
    await seen(lambda: batch.results.count(DONE) == 20)
    (stays,) = at(pipe)
    await sysfs.close()
    assert children() - before == {stays}
    assert batch.ended.done()
    assert batch.results == [UNKNOWN] + [DONE] * 20
    release(pipe)
    assert await sysfs.write(*lines[0], lane=LANE) == DONE  # it can be used again
    while children() != before:
        await sysfs.close()
        await asyncio.sleep(0.005)


async def test_closing_lets_nothing_more_begin(
    tmp_path: Path, one_child: None, lines: list[tuple[str, bytes]]
) -> None:
    sysfs = SysfsWriter()
    lines = lines[:20]
    pipe = fifo(tmp_path)
    batch = sysfs.batch([(str(pipe), b"x"), *lines], ignore, lane=LANE)
    batch.begin()
    alone = asyncio.ensure_future(sysfs.write(*lines[0], lane=LANE))
    await asyncio.sleep(0)
    await seen(lambda: at(pipe))
    await sysfs.close()
    assert batch.results == [UNKNOWN] + [None] * 20
    assert await alone == refused(errno.ECANCELED)
    release(pipe)
    await seen(lambda: not at(pipe))
    assert not any(Path(path).read_bytes() for path, _ in lines)


def test_one_machine_serves_one_event_loop_after_another(tmp_path: Path) -> None:
    """In a process of its own, whose children and descriptors are all the writer's."""
    (tmp_path / "file").touch()
    program = f"""
import asyncio, os
from mdev_orchestrator.machine import Machine
from mdev_orchestrator.system import writer

async def write(machine):
    result = await machine.writer.write({str(tmp_path / "file")!r}, b"x", lane="p")
    assert result.errno == 0, result

async def write_and_close(machine):
    await write(machine)
    await machine.close()

def state():
    children = open(f"/proc/self/task/{{os.getpid()}}/children").read().split()
    return len(children), len(os.listdir("/proc/self/fd"))

asyncio.run(asyncio.sleep(0))
before = state()
machine = Machine()
for _ in range(4):
    asyncio.run(write(machine))
asyncio.run(write_and_close(machine))
assert state() == before, (state(), before)
for _ in range(4):
    asyncio.run(write(Machine()))
assert state()[0] <= before[0] + 4
writer.IDLE_SECONDS = 0
asyncio.run(write_and_close(Machine()))
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


async def test_a_machine_without_a_write_has_nothing_to_close(tmp_path: Path) -> None:
    await Machine(tmp_path).close()


async def test_a_fork_beside_threads_gives_no_warning(
    sysfs: SysfsWriter,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lines: list[tuple[str, bytes]],
) -> None:
    """Python 3.12 and later warn, and a warning is an error here."""
    fork = os.fork

    def warning_fork() -> int:
        message = "This process (pid=1) is multi-threaded, use of fork() may lead to deadlocks"
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        return fork()

    monkeypatch.setattr(os, "fork", warning_fork)
    path, data = lines[0]
    assert await sysfs.write(path, data, lane=LANE) == DONE


@pytest.mark.parametrize("seed", range(6))
async def test_each_result_says_what_the_file_says_whatever_is_killed_or_stopped(
    sysfs: SysfsWriter,
    seed: int,
    lines: list[tuple[str, bytes]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(writer, "LATE_SECONDS", 0.005)
    monkeypatch.setattr(writer, "IDLE_SECONDS", 0.01)
    rng = random.Random(seed)  # noqa: S311 - not for secrets
    before = children()
    calls: list[tuple[int, int]] = []
    batches = [
        sysfs.batch(part, lambda i, _, k=k: calls.append((k, i)), lane=rng.choice("ab"))  # type: ignore[misc]
        for k, part in enumerate((lines[:25], lines[25:35], lines[35:58]))
    ]
    for batch in batches:
        batch.begin()
    alone = [
        asyncio.ensure_future(sysfs.write(*line, lane="a", kill_if_cancelled=True))
        for line in lines[58:]
    ]
    for _ in range(8):
        await asyncio.sleep(rng.random() * 0.003)
        for child in children() - before:
            if rng.random() < 0.5:
                os.kill(child, signal.SIGKILL)
    alone[0].cancel()
    batches[seed % 3].stop()
    if seed % 2:
        batches[seed % 3].leave()
    await asyncio.wait(alone)
    assert len(calls) == len(set(calls))
    for number, (batch, first) in enumerate(zip(batches, (0, 25, 35), strict=True)):
        results = await ended(batch)
        assert {index for k, index in calls if k == number} == {
            index for index, result in enumerate(results) if result is not None
        }
        for index, result in enumerate(results):
            path, data = lines[first + index]
            written = Path(path).read_bytes()
            assert written in {b"", data}
            if result in {None, DONE}:
                assert written == (b"" if result is None else data)
            else:
                assert result == UNKNOWN
