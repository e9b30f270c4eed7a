# SPDX-License-Identifier: GPL-2.0-or-later
"""Devices created and made ready, and removed: by mdo and by what people use today.

Runs in the lab on mvgpu, four parents of sixteen: 1, 8 and 64 devices; and as many of a driver that
waits for its hardware when it creates one, some milliseconds and the rest of a kernel's tick; mvgpu
by itself never waits.

===========  =======================================================================================
C            ``bare_writes.c``: one process, an open and a write each; not even ready
shell        one ``sh``, ``echo UUID > create`` for each; not even ready
library      ``apply`` and ``destroy`` of a pool, in an event loop that runs already
mdo          ``mdo apply`` and ``mdo destroy``, a process each, Python's start and imports included
mdevctl      ``mdevctl start`` and ``stop``, a process for each device: it knows no other way
===========  =======================================================================================

The library's and ``mdo``'s journal stays from round to round, as an operator's does.
"""

from __future__ import annotations

import asyncio
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from uuid import uuid4

import bench

PARENTS, TYPE = 4, "mvgpu-11"
WAITS = (2, 5, 10)  # milliseconds
MDEVS = Path("/sys/bus/mdev/devices")
FAULT = Path("/sys/kernel/debug/mvgpu/fault/create")
WRITER = bench.ROOT / "build/bare_writes"

#: What creates devices, and what removes them.
Pair = tuple[Callable[[], object], Callable[[], object]]
#: That for so many.
Way = Callable[[int], Pair]


def inside(rounds: int, counts: list[int]) -> None:
    """Measure, in L1."""
    place = bench.installed()
    figures = bench.Figures("devices", rounds, ("C",))
    with asyncio.Runner() as runner:
        ways: dict[str, Way] = {
            "C": partial(by_c, Path(shutil.copy(WRITER, place))),
            "shell": by_shell,
            "library": partial(library, runner),
            "mdo": partial(command, place / "many.toml"),
            "mdevctl": by_mdevctl,
        }
        for count in counts:
            measure(figures, f"{count}", ways, count)
        for wait in WAITS:
            FAULT.write_text(f"delay_ms={wait} times=-1")
            measure(figures, f"{count} of {wait} ms", ways, count)
        FAULT.write_text("\n")
    figures.report()


def measure(figures: bench.Figures, what: str, ways: dict[str, Way], count: int) -> None:
    """All rounds of so many devices."""
    for way in figures.turns(what, ways):
        create, remove = ways[way](count)
        with figures.timed(f"{what} created", way):
            create()
        made = len(list(MDEVS.iterdir()))
        with figures.timed(f"{what} removed", way):
            remove()
        if made != count or any(MDEVS.iterdir()):
            raise RuntimeError(f"{way} did not make {count} devices and remove them")


# ---- the ways -----------------------------------------------------------------------------------


def slots(count: int) -> list[tuple[str, str]]:
    """Parent and UUID of each device, the same number on each parent."""
    parents = sorted(path.name for path in Path("/sys/class/mdev_bus").iterdir())
    return [(parents[number * len(parents) // count], str(uuid4())) for number in range(count)]


def writes(count: int) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """File and text of each write that creates devices, and of each that removes them."""
    chosen = slots(count)
    bus = "/sys/class/mdev_bus"
    create = [(f"{bus}/{parent}/mdev_supported_types/{TYPE}/create", u) for parent, u in chosen]
    return create, [(f"{MDEVS}/{uuid}/remove", "1") for _, uuid in chosen]


def by_c(program: Path, count: int) -> Pair:
    """One process of C."""
    create, remove = ("".join(f"{f} {text}\n" for f, text in lines) for lines in writes(count))
    return lambda: bench.run([program], create), lambda: bench.run([program], remove)


def by_shell(count: int) -> Pair:
    """One shell."""
    create, remove = ("".join(f"echo {t} > {f}\n" for f, t in lines) for lines in writes(count))
    return lambda: bench.run(["sh", "-e"], create), lambda: bench.run(["sh", "-e"], remove)


def by_mdevctl(count: int) -> Pair:
    """A process for each."""
    chosen = slots(count)

    def start() -> None:
        for parent, uuid in chosen:
            bench.run(["mdevctl", "start", "--uuid", uuid, "--parent", parent, "--type", TYPE])

    def stop() -> None:
        for _, uuid in chosen:
            bench.run(["mdevctl", "stop", "--uuid", uuid])

    return start, stop


def spec(count: int) -> str:
    """A spec of one pool."""
    return f'name = "many"\n[[pool]]\nname = "p"\ntype = "{TYPE}"\ncount = {count}\n'


def library(runner: asyncio.Runner, count: int) -> Pair:
    """In this process."""
    import mdev_orchestrator as mdo

    asked, machine = mdo.parse(spec(count)), mdo.open()
    return lambda: runner.run(machine.apply(asked)), lambda: runner.run(machine.destroy("many"))


def command(file: Path, count: int) -> Pair:
    """A process of its own."""
    file.write_text(spec(count))
    return (
        lambda: bench.run(["mdo", "apply", file]),
        lambda: bench.run(["mdo", "destroy", "many"]),
    )


def main() -> int:
    """Read the arguments."""
    given = bench.arguments(__doc__, rounds=5, devices=[1, 8, 64]).parse_args()
    if given.inside:
        inside(given.rounds, given.devices)
        return 0
    bench.compiled(WRITER.name)
    mvgpu = f"grid_parents={PARENTS} igd_parents=0"
    return bench.in_lab(__file__, sys.argv[1:], mvgpu=mvgpu)


if __name__ == "__main__":
    sys.exit(main())
