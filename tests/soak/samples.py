# SPDX-License-Identifier: GPL-2.0-or-later
"""Memory and descriptors of processes that live long, over time."""

from __future__ import annotations

import json
import os
import re
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

EVERY = 5.0
"""Seconds between two samples."""
IDLE_SECONDS = 1.0
"""That an idle moment is looked at: a file that is read just then is closed before its end."""
WARM = 1 / 3
"""Of the time, until a process is warm: each move was made some times, with all that it imports."""
MARGIN_KIB = 2048
"""What memory may be more in the second half than in the first: Python's allocator breathes."""
MARGIN_OBJECTS = 0.02
"""That of Python's objects, as a part of them."""


@dataclass(frozen=True)
class Sample:
    """One process at one moment.

    :ivar at: Seconds since the beginning.
    :ivar kib: Memory that it has (VmRSS).
    :ivar descriptors: Files that it has open.
    :ivar idle: Nothing of ours was on the machine.
    """

    at: float
    kib: int
    descriptors: int
    idle: bool


@dataclass
class Samples:
    """Of some processes, by name.

    :ivar objects: Seconds, and the blocks that Python has allocated in the service, all garbage
        collected; at idle moments. Memory has a high-water mark, which late moves raise; this has
        none.
    """

    pids: dict[str, int]
    taken: dict[str, list[Sample]] = field(default_factory=dict)
    objects: list[tuple[float, int]] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)
    _last: float = 0.0

    def take(self) -> None:
        """One of each, if it is time."""
        if time.monotonic() - self._last >= EVERY:
            self._add({name: descriptors(pid) for name, pid in self.pids.items()}, idle=False)

    def take_idle(self, objects: int) -> None:
        """One of each now, with the fewest descriptors of a while."""
        least = {name: descriptors(pid) for name, pid in self.pids.items()}
        end = time.monotonic() + IDLE_SECONDS
        while time.monotonic() < end:
            time.sleep(0.1)
            least = {name: min(n, descriptors(self.pids[name])) for name, n in least.items()}
        self._add(least, idle=True)
        self.objects.append((self._last - self.began, objects))

    def _add(self, open_: dict[str, int], *, idle: bool) -> None:
        self._last = time.monotonic()
        for name, pid in self.pids.items():
            sample = Sample(round(self._last - self.began, 2), memory(pid), open_[name], idle)
            self.taken.setdefault(name, []).append(sample)

    def verdict(self, name: str) -> list[str]:
        """What is not flat."""
        samples = self.taken[name]
        wrong = []
        first, second = self.halves(name)
        if second - first > MARGIN_KIB:
            wrong.append(f"{name}: {first:.0f} KiB in the first half, {second:.0f} in the second")
        idle = [sample.descriptors for sample in samples if sample.idle]
        if len(set(idle)) > 1:
            wrong.append(f"{name}: when all is idle, {sorted(set(idle))} descriptors are open")
        return wrong

    def objects_verdict(self) -> list[str]:
        """What is not flat of the service's objects."""
        if not self.objects:  # no episode came to its end
            return []
        first, second = _halves(self.objects)
        if second > first * (1 + MARGIN_OBJECTS):
            return [f"{first:.0f} objects in the first half, {second:.0f} in the second"]
        return []

    def objects_line(self) -> str:
        """The figures of the service's objects."""
        if not self.objects:
            return "library: never idle"
        numbers = [number for _, number in self.objects]
        first, second = _halves(self.objects)
        return (
            f"library: {min(numbers)} to {max(numbers)} objects when idle, {first:.0f} in the first"
            f" half and {second:.0f} in the second; {len(numbers)} samples"
        )

    def halves(self, name: str) -> tuple[float, float]:
        """Median of memory in each half of the time in which the process is warm."""
        return _halves([(sample.at, sample.kib) for sample in self.taken[name]])

    def line(self, name: str) -> str:
        """The figures of one process."""
        samples = self.taken[name]
        kib = [sample.kib for sample in samples]
        open_ = [sample.descriptors for sample in samples]
        idle = sorted({sample.descriptors for sample in samples if sample.idle})
        first, second = self.halves(name)
        return (
            f"{name}: {min(kib)} to {max(kib)} KiB, {first:.0f} in the first half and"
            f" {second:.0f} in the second, {self.slope(name):+.0f} KiB an hour;"
            f" {min(open_)} to {max(open_)} descriptors, {idle} when idle; {len(samples)} samples"
        )

    def slope(self, name: str) -> float:
        """KiB an hour, by least squares, in the time in which the process is warm."""
        samples = self.taken[name]
        warm = [sample for sample in samples if sample.at >= samples[-1].at * WARM]
        if len({sample.at for sample in warm}) < 2:
            return 0.0
        at = [sample.at for sample in warm]
        return 3600 * statistics.linear_regression(at, [sample.kib for sample in warm]).slope

    def write(self, path: Path, **more: object) -> None:
        """All of them as JSON, for the chart: a list of ``[seconds, KiB, descriptors]`` each."""
        rows = {
            name: [[s.at, s.kib, s.descriptors] for s in samples]
            for name, samples in self.taken.items()
        }
        path.write_text(json.dumps({"processes": rows, **more}, indent=1) + "\n")


def _halves(points: list[tuple[float, int]]) -> tuple[float, float]:
    """Median of each half of the warm time; points are a time and a value."""
    end = points[-1][0]
    middle = end * (1 + WARM) / 2
    first = [value for at, value in points if end * WARM <= at < middle]
    second = [value for at, value in points if at >= middle]
    return statistics.median(first or second), statistics.median(second)


def memory(pid: int) -> int:
    """KiB that a process has in memory."""
    found = re.search(r"^VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found is not None, f"process {pid} has ended"
    return int(found[1])


def descriptors(pid: int) -> int:
    """How many files a process has open."""
    return len(os.listdir(f"/proc/{pid}/fd"))  # noqa: PTH208 - all of them, at once
