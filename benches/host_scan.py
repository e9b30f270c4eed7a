# SPDX-License-Identifier: GPL-2.0-or-later
"""The host listed with few, many and very many mdevs, by us and by what people use today.

Runs in the lab. ``plain`` devices are those of the kernel's sample mbochs, one parent with three
types: a type, an IOMMU group and nothing else. ``grouped`` ones are mvgpu's, sixteen on each of up
to 64 parents with eight types: each has three files of its own besides.

=========  =====================================================================================
C          ``host_walk.c``: the same files and links, opened, read and forgotten; its own clock
library    ``read_host()``, in a process that has imported it
mdo        ``mdo host --json``, a process of its own, Python's start and imports included
mdevctl    ``mdevctl list --dumpjson``; one round only where it lists thousands
=========  =====================================================================================
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from uuid import uuid4

import bench

GROUPED = 1024
POOL = "count=16384"  # MiB, of which mbochs-small takes 4; the parameter is called so
MANY = 1000  # devices; mdevctl takes minutes for them
PARENTS, MDEVS = Path("/sys/class/mdev_bus"), Path("/sys/bus/mdev/devices")
WALK = bench.ROOT / "build/host_walk"


def outside(words: list[str]) -> int:
    """Build what is needed, and run the rest in a lab."""
    sys.path.insert(0, str(bench.ROOT / "python"))
    from mdev_lab import kernels, sample_drivers

    bench.compiled(WALK.name)
    sample_drivers.build(kernels.fetch_kernel(kernels.DEFAULT_SERIES))
    return bench.in_lab(__file__, words, mvgpu="grid_parents=0 igd_parents=0")


def inside(rounds: int, counts: list[int]) -> None:
    """Measure, in L1."""
    place = bench.installed()
    # three events for each device, and minutes until all have been looked at for nothing
    bench.run(["udevadm", "control", "--stop-exec-queue"])
    figures = bench.Figures("host_scan", rounds, ("C",))
    samples, modules = (Path(os.environ[f"MDO_LAB_{what}"]) for what in ("SAMPLES", "MODULES"))
    bench.run(["insmod", samples / "mbochs.ko", POOL])
    for count in counts:
        make("mbochs-small", count - len(os.listdir(MDEVS)))
        measure(figures, f"{count} listed", place)
    bench.run(["rmmod", "mbochs", "mvgpu"])
    bench.run(["insmod", modules / "mvgpu.ko", "grid_parents=64", "igd_parents=0"])
    make("mvgpu-11", GROUPED)
    measure(figures, f"{GROUPED} of mvgpu listed", place)
    figures.report()


def measure(figures: bench.Figures, work: str, place: Path) -> None:
    """All rounds of the devices that there are."""
    uuids = frozenset(os.listdir(MDEVS))
    ways: dict[str, Callable[[frozenset[str]], float]] = {
        "C": partial(walk, Path(shutil.copy(WALK, place))),
        "library": library,
        "mdo host --json": partial(listing, ["mdo", "host", "--json"]),
        "mdevctl list --dumpjson": partial(listing, ["mdevctl", "list", "--dumpjson"]),
    }
    for way in figures.turns(work, ways):
        done = not figures.counting or way in figures.seconds.get(work, {})
        if "mdevctl" in way and len(uuids) >= MANY and done:
            continue  # once takes minutes
        figures.note(work, way, ways[way](uuids))


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


def walk(program: Path, uuids: frozenset[str]) -> float:
    """By C; seconds without the program's start."""
    values, seconds = bench.run([program]).split()
    check(int(values) >= 2 * len(uuids), "C")
    return float(seconds)


def library(uuids: frozenset[str]) -> float:
    """In this process; seconds."""
    from mdev_orchestrator.host.sysfs import read_host
    from mdev_orchestrator.machine import Machine

    machine = Machine()
    begun = time.perf_counter()
    found = read_host(machine)
    taken = time.perf_counter() - begun
    whole = {str(mdev.uuid) for mdev in found.mdevs if not mdev.damage}
    check(whole == uuids, "read_host")
    return taken


def listing(words: list[str], uuids: frozenset[str]) -> float:
    """By a process of its own; seconds."""
    begun = time.perf_counter()
    said = bench.run(words)
    taken = time.perf_counter() - begun
    check(all(uuid in said for uuid in uuids), words[0])
    return taken


def check(right: bool, way: str) -> None:
    """A listing that is not the whole is no measurement."""
    if not right:
        raise RuntimeError(f"{way} did not list all devices")


def main() -> int:
    """Read the arguments."""
    given = bench.arguments(__doc__, rounds=5, devices=[16, 256, 4096]).parse_args()
    if given.inside:
        inside(given.rounds, given.devices)
        return 0
    return outside(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
