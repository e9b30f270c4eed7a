# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest's reads and writes of its device: trapped ones beside mtty's, mapped ones beside its RAM.

Runs in the lab, in one guest with a device of mvgpu and one of the kernel's sample mtty. The guest
is ``registers.c`` and measures itself; a figure is the mean of a thousand reads, or a MiB written.

==================  ================================================================================
register read       trapped: ends in QEMU, which asks the driver. mvgpu's registers are memory and
                    mtty's ports: an access to memory must be decoded, one to ports not
configuration read  trapped as well, and in the same way for both
1 MiB written       mapped: the framebuffer's pages are the guest's, as its RAM is
==================  ================================================================================
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from uuid import uuid4

import bench

BUS = Path("/sys/class/mdev_bus")
DEVICES = {"grid0": "mvgpu-11", "mtty": "mtty-1"}
IMAGE = bench.ROOT / "build/registers.img"
INIT = """#!/bin/busybox sh
/bin/busybox mount -t devtmpfs dev /dev
exec > /dev/ttyS0 2>&1
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
/bin/busybox dmesg -n 1
/bin/registers
/bin/busybox poweroff -f
"""


def outside(words: list[str]) -> int:
    """Build what is needed, and run the rest in a lab."""
    sys.path.insert(0, str(bench.ROOT / "python"))
    from mdev_lab import initramfs, kernels, sample_drivers

    kernel = kernels.fetch_kernel(kernels.DEFAULT_SERIES)
    sample_drivers.build(kernel)
    program = bench.compiled("registers", "-static")
    initramfs.build(IMAGE, init=INIT, kernel=kernel, files={"bin/registers": program})
    return bench.in_lab(__file__, words, mvgpu="grid_parents=1 igd_parents=0")


def inside(rounds: int) -> None:
    """Measure, in L1."""
    log = bench.installed() / "qemu.log"
    from mdev_lab import l2
    from mdev_orchestrator.qemu import command

    bench.run(["insmod", Path(os.environ["MDO_LAB_SAMPLES"]) / "mtty.ko"])
    words = ["qemu-system-x86_64", "-machine", "q35", *command.accelerators("auto"), "-m", "128M"]
    words += ["-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio"]
    words += ["-no-reboot", "-kernel", os.environ["MDO_LAB_KERNEL"], "-initrd", str(IMAGE)]
    words += ["-append", f"{l2.APPEND} rounds={rounds}"]
    for parent, type_ in DEVICES.items():
        uuid = uuid4()
        (BUS / parent / "mdev_supported_types" / type_ / "create").write_text(str(uuid))
        words += ["-device", f"vfio-pci,sysfsdev=/sys/bus/mdev/devices/{uuid}"]
    figures = bench.Figures("registers", rounds, ("mtty", "guest RAM"))
    with (
        log.open("w") as errors,
        subprocess.Popen(words, stdout=subprocess.PIPE, stderr=errors, text=True) as guest,
    ):
        said = list(guest.stdout or ())
    for line in sorted(line for line in said if line.startswith("@bench ")):
        work, way, seconds = line.removeprefix("@bench ").split(";")
        figures.note(work, way, float(seconds))
    counts = {len(seconds) for ways in figures.seconds.values() for seconds in ways.values()}
    if counts != {rounds}:
        said += log.read_text().splitlines(keepends=True)
        raise RuntimeError(f"the guest did not measure all: {''.join(said[-20:])}")
    figures.report()


def main() -> int:
    """Read the arguments."""
    given = bench.arguments(__doc__, rounds=20).parse_args()
    if given.inside:
        inside(given.rounds)
        return 0
    return outside(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
