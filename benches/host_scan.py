# SPDX-License-Identifier: GPL-2.0-or-later
"""The host listed with few, many and very many mdevs, by us and by what people use today.

Runs in the lab. ``plain`` devices are those of the kernel's sample mbochs, one parent with three
types: a type, an IOMMU group and nothing else. ``grouped`` ones are mvgpu's, sixteen on each of up
to 64 parents with eight types: each has three files of its own besides. In every round each way has
its turn, in random order; what is printed are medians and their ratios, which travel between
machines as times do not.

=========  =====================================================================================
C          ``host_walk.c``: the same files and links, opened, read and forgotten; its own clock
library    ``scan()``, in a process that has imported it
mdo        ``mdo host --json``, a process of its own, Python's start and imports included
mdevctl    ``mdevctl list --dumpjson``; one round only where it lists thousands
=========  =====================================================================================

usage: host_scan.py [ROUNDS]
"""

from __future__ import annotations

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
ROUNDS = 5
SERIES = {
    # the lab's mvgpu, the type, and the counts; mbochs-small takes 4 of mbochs's MiB
    "plain": ("grid_parents=0 igd_parents=0", "mbochs-small", (16, 256, 4096)),
    "grouped": ("grid_parents=64 igd_parents=0", "mvgpu-11", (1024,)),
}
POOL = "count=16384"  # MiB: the parameter is called so
MANY = 1000  # devices; mdevctl takes minutes for them
PARENTS = Path("/sys/class/mdev_bus")
CODE = "from mdev_orchestrator.cli.main import main; raise SystemExit(main())"


def outside(rounds: int) -> int:
    """Build what is needed, and run each series in a lab of its own."""
    sys.path.insert(0, str(ROOT / "python"))
    from mdev_orchestrator.lab import debian, samples

    program = ROOT / "build/host_walk"
    program.parent.mkdir(exist_ok=True)
    source = ROOT / "benches/host_walk.c"
    subprocess.run(["gcc", "-O2", "-Wall", "-Werror", "-o", program, source], check=True)
    modules = samples.build(debian.fetch_kernel(debian.DEFAULT_SERIES))
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "python")}
    failed = 0
    for series, (parameters, _, _) in SERIES.items():
        lab = [sys.executable, "-c", CODE, "lab", "run", "--name", f"bench-{os.getpid()}"]
        words = [*lab, "--mvgpu", parameters, "--", sys.executable, str(Path(__file__).resolve())]
        words += ["--inside", series, str(rounds), str(modules / "mbochs.ko")]
        failed |= subprocess.run(words, check=False, env=environment).returncode
    return failed


def inside(series: str, rounds: int, module: str) -> int:
    """Measure, in L1."""
    place = Path(tempfile.mkdtemp(dir="/run"))
    # the checkout is on an uncached file system, where an installed package is not
    shutil.copytree(ROOT / "python", place / "python")
    shutil.copy(ROOT / "build/host_walk", place)
    sys.path.insert(0, str(place / "python"))
    os.environ |= {"PYTHONPATH": str(place / "python"), "MDO_STATE_DIR": str(place / "state")}
    # three events for each device, and minutes until all have been looked at for nothing
    subprocess.run(["udevadm", "control", "--stop-exec-queue"], check=True)
    _, type_, counts = SERIES[series]
    if series == "plain":
        subprocess.run(["insmod", module, POOL], check=True)
    ways: dict[str, Callable[[int], float]] = {
        "C": lambda count: walk(place / "host_walk", count),
        "library": library,
        "mdo": lambda count: listing([sys.executable, "-c", CODE, "host", "--json"], count),
    }
    if shutil.which("mdevctl"):
        ways["mdevctl"] = lambda count: listing(["mdevctl", "list", "--dumpjson"], count)
    made = 0
    for count in counts:
        make(type_, count - made)
        made = count
        times: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(-1, rounds):
            for name in random.sample(sorted(ways), len(ways)):
                if name == "mdevctl" and count >= MANY and number != 0:
                    continue
                taken = ways[name](count)
                if number >= 0:  # the first round fills the caches
                    times[name].append(taken)
            print(f"{count}: round {number + 1} of {rounds}", file=sys.stderr, flush=True)
        report(series, count, times)
    return 0


def make(type_: str, count: int) -> None:
    """Create so many more devices, on each parent as many as fit."""
    parents = sorted(PARENTS.iterdir())
    while count:
        file = parents[0] / "mdev_supported_types" / type_ / "create"
        if not int(file.with_name("available_instances").read_text()):
            del parents[0]
            continue
        file.write_text(str(uuid4()))
        count -= 1


def walk(program: Path, count: int) -> float:
    """By C; seconds without the program's start."""
    done = subprocess.run([program], check=True, capture_output=True, text=True)
    values, seconds = done.stdout.split()
    check(int(values) >= 2 * count, "C")
    return float(seconds)


def library(count: int) -> float:
    """In this process; seconds."""
    from mdev_orchestrator.host.sysfs import scan

    begun = time.perf_counter()
    found = scan()
    taken = time.perf_counter() - begun
    check(len(found.mdevs) == count and not any(mdev.damage for mdev in found.mdevs), "scan")
    return taken


def listing(words: list[str], count: int) -> float:
    """By a process of its own; seconds."""
    begun = time.perf_counter()
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    taken = time.perf_counter() - begun
    uuids = {name for name in os.listdir("/sys/bus/mdev/devices") if name in done.stdout}
    check(len(uuids) == count, words[0])
    return taken


def check(right: bool, who: str) -> None:
    """A listing that is not the whole is no measurement."""
    if not right:
        raise RuntimeError(f"{who} did not list all devices")


def report(series: str, count: int, times: dict[str, list[float]]) -> None:
    """Print the table and, for programs, one line of JSON."""
    middle = {name: statistics.median(taken) for name, taken in times.items()}
    print(f"{count} {series} devices listed, medians; L1 is emulated, one processor")
    for name, seconds in middle.items():
        low, high = min(times[name]), max(times[name])
        print(
            f"{name:8} {seconds:8.4f} s ({low:.4f} to {high:.4f}, {len(times[name])} rounds)"
            f"  {seconds / count * 1e3:6.3f} ms each  {seconds / middle['C']:6.2f} x C"
            + (f"  mdevctl / it: {middle['mdevctl'] / seconds:5.1f}" if "mdevctl" in middle else "")
        )
    print(json.dumps({"series": series, "count": count, "seconds": times}), flush=True)


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if arguments[:1] == ["--inside"]:
        sys.exit(inside(arguments[1], int(arguments[2]), arguments[3]))
    sys.exit(outside(int(arguments[0]) if arguments else ROUNDS))
