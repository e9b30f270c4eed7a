# SPDX-License-Identifier: GPL-2.0-or-later
"""The child that writes to sysfs is killed before and after each of its writes.

Whether the kernel has taken such a write is not known, and no answer tells. The command finds out
by looking, or says that it is not known; after ``mdo recover`` there is all or nothing.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from itertools import count
from pathlib import Path

import pytest

from campaign.command import mdo
from campaign.conftest import EVERY, Tally
from campaign.works import WORKS, half_done
from campaign.world import Foreign, clear, denials, differences, look
from mdev_orchestrator.system import writer

PATH_BYTES = 256


class Killer:
    """Kills a writer's child at one write of a command; forks of the command share what it counts.

    :ivar number: Which write, from 1.
    :ivar after: Whether the write is made first.
    """

    def __init__(self, number: int, *, after: bool) -> None:
        self.number = number
        self.after = after
        self._seen = multiprocessing.Value("i", 0)
        self._path = multiprocessing.Array("c", PATH_BYTES)

    @property
    def path(self) -> str:
        """The file that was to be written; empty if the command has made fewer writes."""
        return self._path.value.decode()

    def change(self) -> None:
        """Have the writer's children of this process killed."""
        write_file = writer._write_file

        def struck(path: str, data: bytes) -> int:
            with self._seen.get_lock():
                self._seen.value += 1
                is_meant = self._seen.value == self.number
            if is_meant:
                self._path.value = path.encode()[-PATH_BYTES:]
                if not self.after:
                    os.kill(os.getpid(), signal.SIGKILL)
            number = write_file(path, data)
            if is_meant:
                os.kill(os.getpid(), signal.SIGKILL)
            return number

        writer._write_file = struck


@pytest.mark.usefixtures("empty")
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("name", list(WORKS))
def test_every_write(place: Path, others: Foreign, tally: Tally, name: str, after: bool) -> None:
    work = WORKS[name]
    whole = work.whole(place, others)
    failures = []
    for number in count(1, EVERY):
        was = work.prepare(place, others)
        killer = Killer(number, after=after)
        ended = mdo(*work.command(place), change=killer.change)
        if not killer.path:
            assert ended.status == 0, ended
            break
        left = denials(ended.err, was, lambda: look(others))
        if ended.status == 0:  # it says that all is done
            left += differences(whole, look(others), shape=True)
        left += work.recovered(place)
        left += half_done(was, whole, look(others))
        where = f"{'after' if after else 'before'} write {number}, {killer.path}"
        if left:
            left.append(str(ended))
        failures += tally.count(f"{name}: writer killed", left, where)
    clear(others)
    assert failures == []
