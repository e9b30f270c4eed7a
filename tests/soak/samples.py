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
MARGIN_KIB = 2048
"""What memory may be more in the second half than in the first: Python's allocator breathes."""


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
    """Of some processes, by name."""

    pids: dict[str, int]
    taken: dict[str, list[Sample]] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)
    _last: float = 0.0

    def take(self, *, idle: bool = False) -> None:
        """One of each, if it is time; an idle moment is always looked at."""
        now = time.monotonic()
        if not idle and now - self._last < EVERY:
            return
        self._last = now
        for name, pid in self.pids.items():
            sample = Sample(round(now - self.began, 2), memory(pid), descriptors(pid), idle)
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

    def halves(self, name: str) -> tuple[float, float]:
        """Median of memory in each half of the time, the first tenth left out: it grows warm."""
        samples = self.taken[name]
        end = samples[-1].at
        warm = [sample for sample in samples if sample.at >= end / 10]
        first = [sample.kib for sample in warm if sample.at < end / 2]
        second = [sample.kib for sample in warm if sample.at >= end / 2]
        return statistics.median(first or second), statistics.median(second)

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
        """KiB an hour, by least squares, the first tenth of the time left out."""
        samples = self.taken[name]
        warm = [sample for sample in samples if sample.at >= samples[-1].at / 10]
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


def memory(pid: int) -> int:
    """KiB that a process has in memory."""
    found = re.search(r"^VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found is not None, f"process {pid} has ended"
    return int(found[1])


def descriptors(pid: int) -> int:
    """How many files a process has open."""
    return len(os.listdir(f"/proc/{pid}/fd"))  # noqa: PTH208 - all of them, at once
