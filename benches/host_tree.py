# SPDX-License-Identifier: GPL-2.0-or-later
"""How long the host layer and the command line take, as ratios that travel between machines.

Builds a tree of 64 parents with 8 types each and 4,096 devices, and prints a table: the scan beside
a bare walk that touches the same files and links, and commands beside ``python3 -c pass``. Exits 1
where a limit is passed; the limits are the issue's.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from uuid import UUID

HERE = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(HERE / "python"), str(HERE / "tests")]

import bench  # noqa: E402

from mdev_orchestrator.host.sysfs import read_host  # noqa: E402 - from the checkout
from mdev_orchestrator.machine import Machine  # noqa: E402
from unit.fakesys import FakeSystem  # noqa: E402

PARENTS, TYPES, DEVICES = 64, 8, 4096
HELP_LIMIT = 0.2  # seconds
HOST_LIMIT = 0.5  # seconds
MEMORY_LIMIT = 60.0  # MB
PYTHON, WALK = "python3 -c pass", "bare walk"
MDO = ["-m", "mdev_orchestrator.cli.main"]


def build(root: Path) -> None:
    """Make the tree; each type has a description and four attribute files, as mvgpu's do."""
    system = FakeSystem(root)
    for number in range(PARENTS):
        parent = f"0000:{number:02x}:00.0"
        system.parent(parent, bus="pci0000:00")
        for index in range(TYPES):
            path = system.type(parent, f"mvgpu-{index + 11}", 16, description="num_heads=2, x=1\n")
            (path / "attributes").mkdir()
            for name in ("heads", "frame_rate_limit", "framebuffer", "max_instances"):
                (path / "attributes" / name).write_text("16\n")
        for index in range(DEVICES // PARENTS):
            uuid = UUID(int=(number << 64) + index, version=4)
            system.mdev(parent, f"mvgpu-{index % TYPES + 11}", str(uuid))


def walk(root: Path) -> int:
    """The least that any program must do: list every directory, read every file and link."""
    entries = 0
    for place in ("sys/class/mdev_bus", "sys/bus/mdev/devices"):
        base = root / place
        for name in os.listdir(base):
            path = f"{base}/{name}"
            os.readlink(path)
            entries += 1
            if place.startswith("sys/bus"):
                os.readlink(path + "/mdev_type")
                os.readlink(path + "/iommu_group")
                entries += 2
                continue
            for directory, _, files in os.walk(path + "/mdev_supported_types"):
                for file in files:
                    if file == "create":
                        continue
                    fd = os.open(f"{directory}/{file}", os.O_RDONLY)
                    os.read(fd, 65536)
                    os.close(fd)
                    entries += 1
    return entries


def best(figures: bench.Figures, work: str, name: str, action: Callable[[], object]) -> float:
    """Seconds of the quickest of some rounds: the others are the machine's other work."""
    for _ in range(figures.rounds):
        with figures.timed(work, name):
            action()
    return min(figures.seconds[work][name])


def command(root: Path, *arguments: str) -> Callable[[], object]:
    """A run of Python, with our package on its path and the tree as its machine."""
    environment = {**os.environ, "PYTHONPATH": str(HERE / "python"), "MDO_ROOT": str(root)}
    return lambda: subprocess.run(
        [sys.executable, *arguments], env=environment, check=True, stdout=subprocess.DEVNULL
    )


def main() -> int:
    """Measure, print, judge."""
    rounds = bench.arguments(__doc__, rounds=5).parse_args().rounds
    figures = bench.Figures("host_tree", rounds, (PYTHON, WALK))
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        build(root)
        machine = Machine(root)
        # the largest child so far: only these two have run, and the help is the smaller
        best(figures, "a command", PYTHON, command(root, "-c", "pass"))
        help_ = best(figures, "a command", "mdo --help", command(root, *MDO, "--help"))
        host = max(
            best(figures, "a command", "mdo host", command(root, *MDO, "host")),
            best(figures, "a command", "mdo host --json", command(root, *MDO, "host", "--json")),
        )
        memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        best(figures, "a scan", WALK, lambda: walk(root))
        best(figures, "a scan", "library", lambda: read_host(machine))
    print(f"{PARENTS} parents, {TYPES} types each, {DEVICES} devices")
    figures.report()
    print(f"memory of mdo host: {memory:.0f} MB")
    missed = [
        name
        for name, value, limit in (
            ("mdo --help", help_, HELP_LIMIT),
            ("mdo host", host, HOST_LIMIT),
            ("memory", memory, MEMORY_LIMIT),
        )
        if value > limit
    ]
    if missed:
        print("over the limit: " + ", ".join(missed))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
