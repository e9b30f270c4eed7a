# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest's start on the host itself: what the library adds where no processor is emulated.

``guests.py`` measures the same in the lab, with a device, and there Python takes many times as
long as anywhere else. Here are no mdevs; both guests are halted, and both QEMUs emulate (TCG).

=======  ===========================================================================================
bare     QEMU's command line and a socket, until QMP answers
library  ``apply`` of a spec with that guest, in an event loop that runs already, its journal kept
=======  ===========================================================================================
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

import bench
from guests import PORTS, Qmp

MEMORY = 128
SPEC = f"""name = "one"
[[guest]]
name = "one"
memory = "{MEMORY}M"
hotplug_ports = {PORTS}
accel = "tcg"
extra = ["-S"]
"""


def bare(figures: bench.Figures, place: Path) -> None:
    """One guest by its command line."""
    from mdev_orchestrator.qemu import command

    words = ["qemu-system-x86_64", "-name", "bare", "-machine", "q35", "-accel", "tcg"]
    words += ["-m", f"{MEMORY}M", "-smp", "1", "-nodefaults", "-no-user-config"]
    words += ["-display", "none", "-serial", "null", "-S"]
    words += ["-qmp", f"unix:{place}/qmp,server=on,wait=off"]
    for number in range(PORTS):
        words += command.root_port(number, 256 << 20)
    begun = time.perf_counter()
    qemu = subprocess.Popen(words)
    with closing(Qmp(place / "qmp", pause=0.001)):
        figures.note("start", "bare", time.perf_counter() - begun)
    qemu.kill()
    qemu.wait()
    (place / "qmp").unlink()


def library(figures: bench.Figures, runner: asyncio.Runner) -> None:
    """The same by a spec."""
    import mdev_orchestrator as mdo

    spec, machine = mdo.parse(SPEC), mdo.open()
    with figures.timed("start", "library"):
        runner.run(machine.apply(spec))
    runner.run(machine.destroy("one", force=True, deadline=0))


def main() -> int:
    """Measure, on the host."""
    rounds = bench.arguments(__doc__, rounds=30).parse_args().rounds
    sys.path.insert(0, str(bench.ROOT / "python"))
    figures = bench.Figures("guest_start", rounds, ("bare",))
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name, asyncio.Runner() as runner:
        place = Path(name)
        os.environ["MDO_STATE_DIR"] = f"{place}/state"
        for way in figures.turns("start", ("bare", "library")):
            if way == "bare":
                bare(figures, place)
            else:
                library(figures, runner)
    figures.report()
    return 0


if __name__ == "__main__":
    sys.exit(main())
