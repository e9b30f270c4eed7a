# SPDX-License-Identifier: GPL-2.0-or-later
"""Sixty-four devices: created and made ready, and removed, by mdo and by what people use today.

Runs in the lab on mvgpu, four parents of sixteen. In every round each way has its turn, in random
order; what is printed are medians and their ratios, which travel between machines as times do not.

===========  ==================================================================================
C            ``bare_writes.c``: one process, an open and a write each; not even ready
library      ``apply`` of a spec with one pool, in a process that has imported it
mdo          ``mdo apply``, a process of its own, Python's start and imports included
mdevctl      ``mdevctl start``, a process each: it knows no other way
===========  ==================================================================================

usage: devices.py [ROUNDS]
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

ROOT = Path(__file__).resolve().parents[1]
COUNT, PARENTS, TYPE = 64, 4, "mvgpu-11"
ROUNDS = 5
SPEC = f'name = "many"\n[[pool]]\nname = "p"\ntype = "{TYPE}"\ncount = {COUNT}\n'
MDEVS = Path("/sys/bus/mdev/devices")
CODE = "from mdev_orchestrator.cli.main import main; raise SystemExit(main())"


def outside(rounds: int) -> int:
    """Build the C program and run the rest in a lab with an installed copy of the package."""
    program = ROOT / "build/bare_writes"
    program.parent.mkdir(exist_ok=True)
    source = ROOT / "benches/bare_writes.c"
    subprocess.run(["gcc", "-O2", "-Wall", "-Werror", "-o", program, source], check=True)
    lab = [sys.executable, "-c", CODE, "lab", "run", "--name", f"bench-{os.getpid()}"]
    options = ["--mvgpu", f"grid_parents={PARENTS} igd_parents=0"]
    inside = [sys.executable, str(Path(__file__).resolve()), "--inside", str(rounds)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "python")}
    return subprocess.run([*lab, *options, "--", *inside], check=False, env=environment).returncode


def inside(rounds: int) -> int:
    """Measure, in L1."""
    place = Path(tempfile.mkdtemp(dir="/run"))
    # the checkout is on an uncached file system, where an installed package is not
    shutil.copytree(ROOT / "python", place / "python")
    sys.path.insert(0, str(place / "python"))
    os.environ |= {"PYTHONPATH": str(place / "python"), "MDO_STATE_DIR": str(place / "state")}
    (place / "many.toml").write_text(SPEC)
    ways: dict[str, Callable[[], float]] = {
        "C": bare,
        "library": library,
        "mdo": lambda: command(place),
    }
    if shutil.which("mdevctl"):
        ways["mdevctl"] = mdevctl
    times: dict[str, list[float]] = {name: [] for name in ways}
    removals: list[float] = []
    for number in range(-1, rounds):
        for name in random.sample(sorted(ways), len(ways)):
            taken = ways[name]()
            if len(list(MDEVS.iterdir())) != COUNT:
                raise RuntimeError(f"{name} did not make {COUNT} devices")
            removed = remove_all()
            shutil.rmtree(place / "state", ignore_errors=True)
            if number >= 0:  # the first round fills the caches
                times[name].append(taken)
                removals.append(removed)
        print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    report(times, removals, rounds)
    return 0


def slots() -> list[tuple[str, str]]:
    """Where each device goes, and its UUID: sixteen on each parent."""
    parents = sorted(path.name for path in Path("/sys/class/mdev_bus").iterdir())
    return [(parents[index * PARENTS // COUNT], str(uuid4())) for index in range(COUNT)]


def write_all(lines: list[str]) -> float:
    """Write by the C program; seconds."""
    begun = time.perf_counter()
    text = "\n".join(lines).encode()
    subprocess.run([ROOT / "build/bare_writes"], input=text, check=True)
    return time.perf_counter() - begun


def bare() -> float:
    """By C; seconds."""
    return write_all(
        [
            f"/sys/class/mdev_bus/{parent}/mdev_supported_types/{TYPE}/create {uuid}"
            for parent, uuid in slots()
        ]
    )


def remove_all() -> float:
    """All that there are, by C; seconds."""
    return write_all([f"{path}/remove 1" for path in MDEVS.iterdir()])


def library() -> float:
    """In this process; seconds."""
    import mdev_orchestrator as mdo

    spec = mdo.parse(SPEC)
    begun = time.perf_counter()
    asyncio.run(mdo.apply(spec))
    return time.perf_counter() - begun


def command(place: Path) -> float:
    """By a process of its own; seconds."""
    begun = time.perf_counter()
    words = [sys.executable, "-c", CODE, "apply", str(place / "many.toml")]
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - begun


def mdevctl() -> float:
    """By a process for each device; seconds."""
    begun = time.perf_counter()
    for parent, uuid in slots():
        words = ["mdevctl", "start", "--uuid", uuid, "--parent", parent, "--type", TYPE]
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begun


def report(times: dict[str, list[float]], removals: list[float], rounds: int) -> None:
    """Print the table and, for programs, one line of JSON."""
    middle = {name: statistics.median(taken) for name, taken in times.items()}
    print(f"{COUNT} devices created, {rounds} rounds, medians; L1 is emulated, one processor")
    for name, seconds in middle.items():
        low, high = min(times[name]), max(times[name])
        print(
            f"{name:8} {seconds:7.3f} s ({low:.3f} to {high:.3f})"
            f"  {seconds / middle['C']:6.2f} x C"
            + (f"  mdevctl / it: {middle['mdevctl'] / seconds:5.1f}" if "mdevctl" in middle else "")
        )
    print(f"removed by C: {statistics.median(removals):.3f} s")
    print(json.dumps({"count": COUNT, "rounds": rounds, "seconds": times, "removed": removals}))


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if arguments[:1] == ["--inside"]:
        sys.exit(inside(int(arguments[1])))
    sys.exit(outside(int(arguments[0]) if arguments else ROUNDS))
