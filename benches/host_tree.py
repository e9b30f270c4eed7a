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
import time
from collections.abc import Callable
from pathlib import Path
from uuid import UUID

HERE = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(HERE / "python"), str(HERE / "tests")]

from mdev_orchestrator.host.sysfs import scan  # noqa: E402 - from the checkout
from unit.fakesys import FakeSystem  # noqa: E402

PARENTS, TYPES, DEVICES = 64, 8, 4096
ROUNDS = 5
HELP_LIMIT = 0.2  # seconds
HOST_LIMIT = 0.5  # seconds
MEMORY_LIMIT = 60.0  # MB
CODE = "from mdev_orchestrator.cli.main import main; raise SystemExit(main())"


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


def best(action: Callable[[], object]) -> float:
    """Seconds of the quickest of some rounds: the others are the machine's other work."""
    times = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        action()
        times.append(time.perf_counter() - begin)
    return min(times)


def command(root: Path, *arguments: str) -> Callable[[], object]:
    """A run of Python, with our package on its path and the tree as its machine."""
    environment = {**os.environ, "PYTHONPATH": str(HERE / "python"), "MDO_ROOT": str(root)}
    return lambda: subprocess.run(
        [sys.executable, *arguments], env=environment, check=True, stdout=subprocess.DEVNULL
    )


def main() -> int:
    """Measure, print, judge."""
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        build(root)
        # the largest child so far: only these two have run, and the help is the smaller
        bare = best(command(root, "-c", "pass"))
        help_ = best(command(root, "-c", CODE, "--help"))
        host = best(command(root, "-c", CODE, "host"))
        as_json = best(command(root, "-c", CODE, "host", "--json"))
        memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        walked = best(lambda: walk(root))
        scanned = best(lambda: scan(root))
    print(f"{PARENTS} parents, {TYPES} types each, {DEVICES} devices; best of {ROUNDS}")
    print(f"{'':24}{'seconds':>9}{'ratio':>8}  of")
    for name, value, base, of in (
        ("python3 -c pass", bare, bare, ""),
        ("mdo --help", help_, bare, "python3 -c pass"),
        ("mdo host", host, bare, "python3 -c pass"),
        ("mdo host --json", as_json, bare, "python3 -c pass"),
        ("bare walk", walked, walked, ""),
        ("scan()", scanned, walked, "bare walk"),
    ):
        print(f"{name:24}{value:9.3f}{value / base:8.1f}  {of}")
    print(f"{'memory of mdo host':24}{memory:6.0f} MB")
    missed = [
        name
        for name, value, limit in (
            ("mdo --help", help_, HELP_LIMIT),
            ("mdo host", max(host, as_json), HOST_LIMIT),
            ("memory", memory, MEMORY_LIMIT),
        )
        if value > limit
    ]
    if missed:
        print("over the limit: " + ", ".join(missed))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
