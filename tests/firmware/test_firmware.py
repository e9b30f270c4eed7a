# SPDX-License-Identifier: GPL-2.0-or-later
"""Devices of a booted guest, with every QEMU, firmware and way to open devices: 'make
test-firmware'. Each kernel is a suite of its own.

Firmware places the windows of the ports before the guest's kernel runs, so whether a hot-plugged
device can be used is decided by QEMU, firmware and kernel together.

A cell whose QEMU is not on this machine is not run, and says why. Debian's QEMUs are one for each
release, and one in the backports of Debian 13; see docs/qemu.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import os

import guests
from cells import cells
from guests import GuestTest, appears, disappears, functions, mdevs, mdo, unchanged, use

from lab.machine import machine
from matrix import machines
from mdev_lab import l2
from mdev_orchestrator.engine import guest_ops
from mdev_orchestrator.qemu import features, process
from mdev_orchestrator.qemu.log import qemu_words

TYPE = "mvgpu-128M"
NAME = "firmware"
BOOT_SECONDS = 3 * guests.BOOT_SECONDS
"""UEFI alone takes longer than the kernel after it."""
PACKAGED = {
    "debian-7.2": "Debian 12 has it",
    "debian-10.0": "Debian 13 has it",
    "debian-11.1": "the backports of Debian 13 have it",
}
FIRMWARE = {"seabios": (), "uefi": ("--uefi",)}
IOMMUS = ("container", "iommufd")
#: QEMU 10.2 ends by an assertion when it opens a device by iommufd on a kernel before this.
IOMMUFD_KERNEL = {"10.2": (6, 13)}
#: QEMU reserves addresses for an AMD processor, which the lab's is, and none for Intel's.
PROCESSORS = {"amd": (), "intel": ("--arg=-cpu", "--arg=qemu64,vendor=GenuineIntel")}


class Firmware(GuestTest):
    def setUp(self) -> None:
        super().setUp()
        name = self.params.get("qemu")
        packaged = machines.packaged()
        found = machines.versions() | {packaged.name: packaged}
        if name not in found:
            why = PACKAGED.get(name, f"'mdo qemu build --series {name}' makes it")
            self.cancel(f"QEMU {name} is not here: {why}")
        self.version = found[name]
        if self.params.get("iommu") == "iommufd":
            self.check_iommufd(name)

    def check_iommufd(self, name: str) -> None:
        """Leave out what kernel and QEMU cannot do together."""
        properties = features.properties(self.version.binary, "vfio-pci")
        if "iommufd" not in asyncio.run(properties):
            self.cancel(f"QEMU {name} has no iommufd")
        release = os.uname().release
        needed = IOMMUFD_KERNEL.get(name, (0, 0))
        if tuple(map(int, release.split(".")[:2])) < needed:
            self.cancel(
                f"QEMU {name} with iommufd needs Linux {needed[0]}.{needed[1]}, this is {release}"
            )

    @cells(
        iommu=IOMMUS,
        qemu=(*PACKAGED, *machines.PATCHED),
        firmware=FIRMWARE,
        processor=PROCESSORS,
    )
    async def test_devices_come_and_go(self, iommu: str, firmware: str, processor: str) -> None:
        async with unchanged(), mdevs(TYPE, 2) as (cold, hot):
            started = await mdo(
                *("guest", "start", NAME, "--memory", "256M", "--mdev", str(cold.uuid)),
                *("--kernel", os.environ["MDO_LAB_KERNEL"]),
                *("--initrd", os.environ["MDO_LAB_INITRD"], "--append", l2.APPEND),
                *("--qemu", self.version.binary),
                *(("--firmware", str(self.version.firmware)) if self.version.firmware else ()),
                *FIRMWARE[firmware],
                *("--iommu", iommu),
                *PROCESSORS[processor],
            )
            assert started.status == 0, started
            running = process.find_running(machine(), NAME)
            assert running.record
            assert running.record.iommu == iommu
            try:
                async with l2.program(NAME, running.console_socket, BOOT_SECONDS) as program:
                    # The device of the command line is there, and works.
                    assert (await functions(program)).keys() == {cold.uuid}
                    await use(program, cold, seed=1)

                    # One that is plugged in is there when the command ends, and works, too.
                    attached = await mdo("attach", NAME, str(hot.uuid), "--wait-guest")
                    assert attached.status == 0, attached
                    await appears(program, hot)
                    await use(program, hot, seed=2)

                    # Both can be taken out.
                    for mdev in (hot, cold):
                        await guest_ops.detach(machine(), NAME, mdev.uuid, guests.GUEST_SECONDS)
                        await disappears(program, mdev)
                    assert await functions(program) == {}
                said = qemu_words(running.qemu_log).split("; ")
                assert not [words for words in said if "-mon" in words], said
            finally:
                with contextlib.suppress(Exception):
                    await guest_ops.end(machine(), running, deadline=0, force=True)
