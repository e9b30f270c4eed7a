# SPDX-License-Identifier: GPL-2.0-or-later
"""What our patches cost a QEMU without mediated devices: its start-up beside a stock one's.

Builds, unless the cache has them, the patched QEMU of each series and a stock one of the same
source and options. Both start a halted machine, answer a QMP command and quit; the patched one is
given ``mdev-start=off``. Compared are:

- instructions, counted by valgrind: they hardly differ from run to run or between machines;
- processor time, user and system, until the process has ended;
- time until QMP has answered.

The latter two are medians of many rounds, each of which starts every program once, in random order.
Their ratios are those of the same round, with half of the 95 % interval of the median. A second
copy of the stock program, "stock again", shows how far two equal programs seem to be apart. Exits 1
where the patched one is surely more than 1 % slower; on a busy machine the times cannot tell.
"""

from __future__ import annotations

import math
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE / "python"))

import bench  # noqa: E402

from mdev_lab import qemus  # noqa: E402 - from the checkout
from mdev_orchestrator.qemu_build import builds, patches  # noqa: E402 - from the checkout

ROUNDS = 400
COUNTS = 3  # runs under valgrind
LIMIT = 1.01
OFF = ("-global", "vfio-pci.mdev-start=off")
MACHINE = (
    *("-machine", "q35,accel=tcg", "-m", "256", "-nodefaults", "-no-user-config"),
    *("-display", "none", "-S", "-mon", "qmp,mode=control"),
)
COMMANDS = (b"qmp_capabilities", b"query-status")
_COUNT = re.compile(r"I\s+refs:\s+([\d,]+)")


@dataclass
class Program:
    """One of those that are compared, and what was measured, one value a round."""

    name: str
    binary: Path
    options: tuple[str, ...]
    instructions_m: list[float] = field(default_factory=list)  # millions
    cpu_ms: list[float] = field(default_factory=list)
    wall_ms: list[float] = field(default_factory=list)

    def start(self, *wrapper: str) -> tuple[float, float]:
        """Start it and end it; seconds until QMP has answered, and of processor time."""
        ours, theirs = socket.socketpair()
        begin = time.perf_counter()
        with ours, ours.makefile("rwb") as qmp:
            with theirs:
                monitor = ("-chardev", f"socket,id=qmp,fd={theirs.fileno()}")
                process = subprocess.Popen(
                    [*wrapper, self.binary, *self.options, *monitor, *MACHINE],
                    pass_fds=[theirs.fileno()],
                )
            for command in COMMANDS:
                qmp.readline()
                qmp.write(b'{"execute": "%s"}\n' % command)
                qmp.flush()
            answer = qmp.readline()
            answered = time.perf_counter() - begin
            if b"prelaunch" not in answer:
                raise SystemExit(f"{self.binary} does not start")
            qmp.write(b'{"execute": "quit"}\n')
            qmp.flush()
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        return answered, usage.ru_utime + usage.ru_stime

    def measure(self) -> None:
        """One round."""
        wall, cpu = self.start()
        self.wall_ms.append(wall * 1000)
        self.cpu_ms.append(cpu * 1000)

    def count(self, log: Path) -> None:
        """One count of instructions."""
        self.start("valgrind", "--tool=cachegrind", "--cachegrind-out-file=/dev/null",
                   "--cache-sim=no", f"--log-file={log}")  # fmt: skip
        found = _COUNT.search(log.read_text())
        if not found:
            raise SystemExit(f"valgrind said: {log.read_text()}")
        self.instructions_m.append(int(found[1].replace(",", "")) / 1e6)


def ratio(values: list[float], base: list[float]) -> tuple[float, float]:
    """Median of the ratios of the same round, and half of its 95 % interval."""
    ratios = [value / other for value, other in zip(values, base, strict=True)]
    low, _, high = quantiles(ratios, n=4)
    return median(ratios), 1.57 * (high - low) / math.sqrt(len(ratios))  # McGill et al. 1978


def compare(figures: bench.Figures, series: str, work: Path) -> bool:
    """Measure one series and print its table; returns whether it keeps the limit."""
    patched = builds.build(series, progress=tell)
    stock = qemus.build_stock(series, progress=tell)
    options = ("-L", str(stock.firmware))
    programs = [
        Program("stock", work / f"{series}-stock", options),
        Program("stock again", work / f"{series}-again", options),
        Program("patched", work / f"{series}-patched", (*options, *OFF)),
    ]
    for program, origin in zip(programs, (stock, stock, patched), strict=True):
        # how a file lies in the page cache makes a difference of up to 5 %
        shutil.copy2(origin.binary, program.binary)
    for program in programs:
        program.start()  # from now on it is in memory
    for _ in range(figures.rounds):
        for program in random.sample(programs, len(programs)):
            program.measure()
    if shutil.which("valgrind"):
        for program in programs * COUNTS:
            program.count(work / "valgrind.log")
    else:
        tell("instructions are not counted: apt-get install valgrind")
    for program in programs:
        for clock, taken in (("processor", program.cpu_ms), ("wall", program.wall_ms)):
            for milliseconds in taken:
                figures.note(f"{series} {clock} time", program.name, milliseconds / 1000)
    figures.save()
    print(f"\nQEMU {stock.version}, start-up without mediated devices; {figures.rounds} rounds")
    return table(programs)


def table(programs: list[Program]) -> bool:
    """Print what was measured, the first of the programs being the base."""
    print(f"{'':28}{'median':>8}{'quartiles':>20}{'ratio to stock':>19}  within {LIMIT - 1:.0%}")
    kept = True
    for measure in ("instructions_m", "cpu_ms", "wall_ms"):
        base = getattr(programs[0], measure)
        for program in programs if base else ():
            values = getattr(program, measure)
            low, middle, high = quantiles(values, n=4)
            line = f"{measure:15}{program.name:13}{middle:8.2f}{low:11.2f} -{high:7.2f}"
            if program is not programs[0]:
                value, half = ratio(values, base)
                line += f"{value:11.4f} ±{half:.4f}"
            if program.name == "patched":
                line += f"  {verdict(value, half)}"
                kept = kept and verdict(value, half) != "no"
            print(line)
    return kept


def verdict(value: float, half: float) -> str:
    """Whether a ratio keeps the limit, as far as its interval tells."""
    if value + half <= LIMIT:
        return "yes"
    return "no" if value - half > LIMIT else "cannot tell"


def tell(line: str) -> None:
    """Say how far a build is."""
    print(line, file=sys.stderr)


def main() -> int:
    """Measure, print, judge."""
    parser = bench.arguments(__doc__, ROUNDS)
    parser.add_argument("series", nargs="*", default=patches.series_known())
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        figures = bench.Figures("qemu_startup", given.rounds, ("stock",))
        kept = [compare(figures, series, Path(directory)) for series in given.series]
    figures.report()
    if not all(kept):
        print(f"over the limit: more than {LIMIT - 1:.0%} slower", file=sys.stderr)
    return 0 if all(kept) else 1


if __name__ == "__main__":
    sys.exit(main())
