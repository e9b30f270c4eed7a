# SPDX-License-Identifier: GPL-2.0-or-later
"""Writes by children: one, many, refused ones, and those that never come back."""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from mdev_orchestrator.system import writer
from mdev_orchestrator.system.writer import (
    AT_ONCE,
    CHILDREN,
    Batch,
    Separately,
    Writes,
    write_apart,
)

Make = Callable[[Sequence[tuple[str, bytes]], Callable[[int, int], None]], Writes]


def separately(lines: Sequence[tuple[str, bytes]], told: Callable[[int, int], None]) -> Separately:
    return Separately(write_apart, lines, told)


both = pytest.mark.parametrize("make", [Batch, separately])


def files(place: Path, count: int) -> list[tuple[str, bytes]]:
    """Empty files, and what is to be written to each."""
    lines = []
    for number in range(count):
        (place / f"{number}").touch()
        lines.append((str(place / f"{number}"), f"data {number}".encode()))
    return lines


def children() -> set[str]:
    """The processes that this one has started and that have not ended."""
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


async def written(batch: Writes) -> None:
    batch.begin()
    await asyncio.wait_for(asyncio.shield(batch.ended), 20)


async def begun(batch: Batch, count: int) -> None:
    """Wait until so many are under way; nothing tells that a write has begun."""
    async with asyncio.timeout(20):
        while len(batch.unknown) < count:
            await asyncio.sleep(0.01)


# ---- one ----


def test_a_loop_that_has_gone_leaves_no_child(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    descriptors = Path("/proc/self/fd")
    before, files = children(), [*descriptors.iterdir()]
    for _ in range(5):
        assert asyncio.run(write_apart(str(tmp_path / "file"), b"x")) == 0
    gc.collect()
    end = time.monotonic() + 20
    while children() - before:
        assert time.monotonic() < end
        time.sleep(0.01)
        writer.reap(writer._children)
    assert len([*descriptors.iterdir()]) == len(files)


async def test_one_child_stays_for_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "_IDLE_SECONDS", 0.05)
    monkeypatch.setattr(writer, "PATIENCE", 0.02)
    fifos = [tmp_path / f"{number}" for number in range(4)]
    for fifo in fifos:
        os.mkfifo(fifo)
    before = children()
    batch = Batch([(str(fifo), b"x") for fifo in fifos])
    batch.begin()
    await begun(batch, 4)
    assert len(children() - before) == 4
    for fifo in fifos:
        threading.Thread(target=fifo.read_bytes, daemon=True).start()
    await asyncio.wait_for(asyncio.shield(batch.ended), 20)
    while len(children() - before) > 1:
        await asyncio.sleep(0.01)
    (stays,) = children() - before
    monkeypatch.setattr(writer, "_LAST_SECONDS", 0.2)
    (tmp_path / "file").touch()
    assert await write_apart(str(tmp_path / "file"), b"x") == 0
    assert children() - before == {stays}
    while children() - before:
        await asyncio.sleep(0.01)


async def test_the_writer_writes_and_reports_the_errno(tmp_path: Path) -> None:
    file = tmp_path / "file"
    assert await write_apart(str(file), b"x") == errno.ENOENT
    file.touch()
    assert await write_apart(str(file), b"x") == 0
    assert file.read_bytes() == b"x"
    assert await write_apart("/dev/full", b"x") == errno.ENOSPC


async def test_a_blocked_write_can_be_left_behind(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)  # opening it for writing blocks until somebody reads
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await write_apart(str(fifo), b"late")
    received: list[bytes] = []
    reader = threading.Thread(target=lambda: received.append(fifo.read_bytes()))
    reader.start()
    await asyncio.to_thread(reader.join, 5)
    assert received == [b"late"]


# ---- many ----


@both
async def test_all_are_written_and_told_of_once(tmp_path: Path, make: Make) -> None:
    lines = files(tmp_path, 100)
    told: list[int] = []
    batch = make(lines, lambda index, _: told.append(index))
    await written(batch)
    assert sorted(told) == list(range(100))
    assert batch.results == [0] * 100
    assert [Path(path).read_bytes() for path, _ in lines] == [data for _, data in lines]


@both
async def test_nothing_is_written_at_once(make: Make) -> None:
    batch = make([], lambda *_: None)
    await written(batch)
    assert batch.results == []


@both
async def test_what_is_refused_is_the_last_that_begins(tmp_path: Path, make: Make) -> None:
    lines = files(tmp_path, 500)
    lines[20] = (str(tmp_path / "missing"), b"x")
    batch = make(lines, lambda *_: None)
    await written(batch)
    assert batch.results[20] == errno.ENOENT
    assert {*batch.results[:20]} <= {0, None}  # one child may be there before another
    begun = [index for index, number in enumerate(batch.results) if number is not None]
    assert len(begun) <= 20 + CHILDREN * AT_ONCE
    assert all(not Path(lines[index][0]).read_bytes() for index in {*range(500)} - {*begun, 20})


async def test_a_slow_driver_is_asked_by_many(tmp_path: Path) -> None:
    """Eight writes that each wait for a reader: all of them wait at the same time."""
    fifos = [tmp_path / f"{number}" for number in range(8)]
    for fifo in fifos:
        os.mkfifo(fifo)
    before = children()
    batch = Batch([(str(fifo), b"x") for fifo in fifos])
    batch.begin()
    seen = set()
    while len(batch.unknown) < 8:
        seen.add(len(children() - before))
        await asyncio.sleep(0.01)
    assert seen <= {1, 2, 4, 8}, "there are twice as many as long as nobody answers"
    assert batch.results == [None] * 8
    for fifo in fifos:
        threading.Thread(target=fifo.read_bytes, daemon=True).start()
    await asyncio.wait_for(asyncio.shield(batch.ended), 20)
    assert batch.results == [0] * 8


@pytest.mark.parametrize(
    ("busy", "doubt", "more"), [(False, 1e6, True), (True, 4.0, True), (True, 1e6, False)]
)
async def test_more_children_come_as_soon_as_they_save_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, busy: bool, doubt: float, more: bool
) -> None:
    """Not only when one is late: a driver that takes a moment for each is asked by several.

    When every processor is at work it is doubted that they wait for the driver.
    """
    monkeypatch.setattr(writer, "PATIENCE", 60.0)
    monkeypatch.setattr(writer, "_DOUBT", doubt)
    monkeypatch.setattr(writer, "idle_seconds", lambda: 0.0 if busy else time.monotonic())
    fifos = [tmp_path / f"{number}" for number in range(40)]
    for fifo in fifos:
        os.mkfifo(fifo)
    before = children()
    batch = Batch([(str(fifo), b"x") for fifo in fifos])
    batch.begin()
    most, answered = 0, set[int]()
    while not batch.ended.done():
        most = max(most, len(children() - before))
        await asyncio.sleep(0.02)
        for index in batch.unknown - answered:
            answered.add(index)
            threading.Thread(target=fifos[index].read_bytes, daemon=True).start()
    assert batch.results == [0] * 40
    assert (most > 1) is more


async def test_who_is_late_on_a_busy_machine_is_given_more_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "PATIENCE", 0.02)
    monkeypatch.setattr(writer, "BUSY_PATIENCE", 0.5)
    monkeypatch.setattr(writer, "idle_seconds", lambda: 0.0)
    fifos = [tmp_path / "1", tmp_path / "2"]
    for fifo in fifos:
        os.mkfifo(fifo)
    before, began = children(), time.monotonic()
    batch = Batch([(str(fifo), b"x") for fifo in fifos])
    batch.begin()
    await begun(batch, 2)
    assert time.monotonic() - began >= 0.5
    assert len(children() - before) == 2
    for fifo in fifos:
        threading.Thread(target=fifo.read_bytes, daemon=True).start()
    await asyncio.wait_for(asyncio.shield(batch.ended), 20)


async def test_what_stands_behind_a_slow_write_is_done_by_others(tmp_path: Path) -> None:
    """A child that is told several and stays at one gives the rest back, when it can."""
    lines = files(tmp_path, 60)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    lines[30] = (str(fifo), b"x")
    batch = Batch(lines)
    batch.begin()
    while batch.results[59] != 0:
        await asyncio.sleep(0.01)
    assert 30 in batch.unknown
    threading.Thread(target=fifo.read_bytes, daemon=True).start()
    await asyncio.wait_for(asyncio.shield(batch.ended), 20)
    assert batch.results == [0] * 60


async def test_a_batch_that_is_stopped_begins_nothing_more(tmp_path: Path) -> None:
    lines = files(tmp_path, 60)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    lines[0] = (str(fifo), b"x")
    batch = Batch(lines)
    batch.begin()
    assert batch.stop() is False
    threading.Thread(target=fifo.read_bytes, daemon=True).start()
    await asyncio.wait_for(asyncio.shield(batch.ended), 20)
    assert batch.results == [0] + [None] * 59
    assert not any(Path(path).read_bytes() for path, _ in lines[1:])


async def test_two_batches_go_on_beside_each_other(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    waiting = Batch([(str(fifo), b"x")])
    waiting.begin()
    await written(Batch(files(tmp_path, 40)))
    assert waiting.unknown == {0}
    threading.Thread(target=fifo.read_bytes, daemon=True).start()
    await asyncio.wait_for(asyncio.shield(waiting.ended), 20)


async def test_data_that_no_child_could_tell_apart_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="null byte"):
        Batch([(str(tmp_path), b"a\0b")])
