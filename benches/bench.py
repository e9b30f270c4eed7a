# SPDX-License-Identifier: GPL-2.0-or-later
"""What the benches share: a lab to run in, turns in random order, and what was measured.

A bench is a script of two halves. On the host it prepares, and starts a lab with itself inside; in
L1 it measures and writes ``build/bench/NAME.json``: every figure in seconds, and how it was taken.
The file is written anew with each row that is finished, so that a bench that is interrupted keeps
those. ``publish.py`` puts the tables into the docs and draws the chart.
"""

from __future__ import annotations

import argparse
import compileall
import contextlib
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "build/bench"
VERSIONS = {
    "QEMU": ["qemu-system-x86_64", "--version"],
    "libvirt": ["virsh", "--version"],
    "mdevctl": ["mdevctl", "--version"],
}


Result = dict[str, Any]
"""What a result file holds: :class:`Figures` by its fields, and how they were taken."""


def arguments(doc: str | None, rounds: int, **counts: list[int]) -> argparse.ArgumentParser:
    """What every bench takes: ``--rounds``, and ``--inside`` for its half in L1.

    :param counts: How many of what is measured, by the name of the option.
    """
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=rounds, help="turns of each way")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    for name, usual in counts.items():
        parser.add_argument(f"--{name}", type=int, nargs="*", default=usual, help="so many")
    return parser


# ---- on the host --------------------------------------------------------------------------------


def compiled(name: str, *flags: str) -> Path:
    """The program of a C file of this directory."""
    program = ROOT / "build" / name
    program.parent.mkdir(exist_ok=True)
    source = ROOT / "benches" / f"{name}.c"
    subprocess.run(
        ["gcc", "-O2", "-Wall", "-Werror", *flags, "-o", program, source, "-I", ROOT / "kernel"],
        check=True,
    )
    return program


def in_lab(script: str, words: Sequence[str], *, mvgpu: str) -> int:
    """Run a bench's other half in a lab of its own; its exit status.

    :param words: The bench's arguments.
    :param mvgpu: Parameters of the driver.
    """
    sys.path.insert(0, str(ROOT / "python"))
    from mdev_lab import l1
    from mdev_orchestrator.errors import MdoError

    result = RESULTS / f"{Path(script).stem}.json"
    result.parent.mkdir(parents=True, exist_ok=True)
    result.unlink(missing_ok=True)
    load = os.getloadavg()[0]
    command = [sys.executable, str(Path(script).resolve()), "--inside", *words]
    accel = ""
    try:
        with l1.running(f"bench-{os.getpid()}", module_options=mvgpu, progress=say) as lab:
            accel = {"tcg": "emulated by QEMU (TCG)", "kvm": "under KVM"}[lab.accel]
            return l1.execute(lab, command)
    except MdoError as error:
        say(f"{Path(script).name}: {error}")
        return error.exit_code
    finally:
        if result.exists():
            found = json.loads(result.read_text())
            found["taken"] |= {"machine": f"L1 {accel}", "load": [load, os.getloadavg()[0]]}
            write(result, found)
            print(table(found), flush=True)


# ---- in L1 --------------------------------------------------------------------------------------


def installed() -> Path:
    """A directory in memory with all that an installation has, which is used from now on.

    The checkout and its virtual environment are on an uncached file system, where what is installed
    is not; the package may have no bytecode there, and the environment's Python has more in it than
    ``mdo`` needs. The state directory is new, too.
    """
    place = Path(tempfile.mkdtemp(dir="/run"))
    program = place / "bin/mdo"
    program.parent.mkdir()
    _, _, script = Path(sys.prefix, "bin/mdo").read_text().partition("\n")
    program.write_text(f"#!{sys.base_prefix}/bin/python3\n{script}")
    program.chmod(0o755)
    shutil.copytree(ROOT / "python", place / "python")
    for name in needed("mdev-orchestrator"):
        for file in metadata.files(name) or ():
            if ".." not in file.parts and file.suffix != ".pyc":
                (place / "python" / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file.locate(), place / "python" / file)
    compileall.compile_dir(place / "python", quiet=2)  # as pip does
    sys.path.insert(0, str(place / "python"))
    os.environ |= {
        "PATH": f"{program.parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(place / "python"),
        "MDO_STATE_DIR": str(place / "state"),
    }
    return place


def needed(name: str) -> set[str]:
    """The distributions that one needs on this machine, without its extras."""
    asked = [Requirement(one) for one in metadata.requires(name) or ()]
    names = {one.name for one in asked if not one.marker or one.marker.evaluate({"extra": ""})}
    return names.union(*map(needed, names))


def rest() -> None:
    """Wait until udev has come to rest: it works on what others made long after they have ended."""
    if "MDO_LAB" in os.environ:
        run(["udevadm", "settle"])


def run(words: Sequence[str | Path], text: str | None = None) -> str:
    """A process to its end; what it printed.

    :param text: Its standard input.
    :raise RuntimeError: It failed; with the last line that it said.
    """
    done = subprocess.run(words, check=False, capture_output=True, text=True, input=text)
    if done.returncode:
        said = done.stderr.strip().rpartition("\n")[2][:400]
        raise RuntimeError(f"{' '.join(map(str, words[-4:]))}: {said}")
    return done.stdout


# ---- what was measured --------------------------------------------------------------------------


@dataclass
class Figures:
    """Seconds of each work by each way, one for each turn.

    :ivar bases: What the others are compared with: of these ways the first that did the work.
    :ivar ways: In the order of the table's columns; the bases come before them.
    """

    name: str
    rounds: int
    bases: tuple[str, ...]
    ways: list[str] = field(default_factory=list)
    seconds: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    load: float = field(default_factory=lambda: os.getloadavg()[0])
    counting: bool = True

    def turns(self, what: str, ways: Iterable[str], *, warm: bool = True) -> Iterator[str]:
        """Each way once a round, in random order; afterwards the rows are finished and saved.

        :param warm: One more round comes first, which fills the caches and is not noted.
        """
        ways = list(ways)
        self.ways += [way for way in ways if way not in self.ways]
        for number in range(0 if warm else 1, self.rounds + 1):
            self.counting = number > 0
            yield from random.sample(ways, len(ways))
            say(f"{what}: round {number} of {self.rounds}")
        self.save()

    def note(self, work: str, way: str, seconds: float) -> None:
        """One figure."""
        if way not in self.ways:
            self.ways.append(way)
        if self.counting:
            self.seconds.setdefault(work, {}).setdefault(way, []).append(seconds)

    @contextlib.contextmanager
    def timed(self, work: str, way: str) -> Iterator[None]:
        """Note how long the block takes, if it ends well."""
        rest()
        begun = time.perf_counter()
        yield
        self.note(work, way, time.perf_counter() - begun)

    def save(self, *, complete: bool = False) -> Result:
        """Write the result file with all rows so far. Not while something is timed.

        :param complete: Whether there are no more rows to come.
        """
        result = asdict(self) | {"taken": taken(self.load), "complete": complete}
        write(RESULTS / f"{self.name}.json", result)
        return result

    def report(self) -> None:
        """Write the result file and print the table; that of a lab is printed by its host."""
        result = self.save(complete=True)
        if "MDO_LAB" not in os.environ:
            print(table(result), flush=True)


@cache
def versions() -> dict[str, str]:
    """Versions of what is installed."""
    found = {"Linux": platform.release(), "Python": platform.python_version()}
    for name, words in VERSIONS.items():
        if shutil.which(words[0]):
            found[name] = next(word for word in run(words).split() if word[0].isdigit())
    return found


def taken(load: float) -> dict[str, object]:
    """How and on what."""
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "machine": "L1" if "MDO_LAB" in os.environ else "host",
        "processors": os.cpu_count(),
        "load": [load, os.getloadavg()[0]],
        "versions": versions(),
    }


def write(file: Path, result: dict[str, object]) -> None:
    """Leave a result for programs, as a whole."""
    from mdev_orchestrator.system.files import write_atomic  # after installed() has set the path

    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, f"{json.dumps(result, indent=1)}\n".encode(), mode=0o644, sync=False)


def middles(result: Result) -> dict[str, dict[str, float]]:
    """The median of each work by each way."""
    return {
        work: {way: median(seconds) for way, seconds in ways.items()}
        for work, ways in result["seconds"].items()
    }


def base(result: Result, ways: Iterable[str]) -> str:
    """Which way the others are compared with."""
    found: str = next(way for way in result["bases"] if way in ways)
    return found


def table(result: Result) -> str:
    """Medians and their ratios as a Markdown table, and below it how they were taken."""
    how, bases = result["taken"], " or ".join(result["bases"])
    found = middles(result)
    names = sorted(result["ways"], key=lambda way: way not in result["bases"])
    lines = [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for work, ways in found.items():
        one = ways[base(result, ways)]
        cells = [f"{span(ways[n])} ({ways[n] / one:.3g})" if n in ways else "" for n in names]
        lines.append(f"| {work} | {' | '.join(cells)} |")
    installed = ", ".join(f"{name} {version}" for name, version in how["versions"].items())
    begin, end = how["load"]
    lines += [
        "",
        f"{how['date']}, {result['rounds']} rounds; in brackets: times {bases}.",
        f"{how['machine']}, {how['processors']} CPU; load {begin:.1f} to {end:.1f}; {installed}.",
    ]
    if not result.get("complete", True):
        lines.append("It was interrupted: the rows that it had finished.")
    return "\n".join(lines)


def span(seconds: float) -> str:
    """A time with three digits in the unit that fits it."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:#.3g}".removesuffix(".") + f" {unit}"
    return f"{seconds * 1e9:.3g} ns"


def say(line: str) -> None:
    """Print how far the bench is."""
    print(line, file=sys.stderr, flush=True)
