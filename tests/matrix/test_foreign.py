# SPDX-License-Identifier: GPL-2.0-or-later
"""Drivers that are not ours: with them a patched QEMU does what the unpatched one does.

The same devices are given to both, one after the other, and all that can be seen is compared. The
drivers are the samples of the kernel's source, which know neither groups nor ``online``.
"""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import os
import pprint
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cells import cells
from guests import GuestTest, refused

from lab.machine import machine
from matrix.machines import PATCHED, Direct, Version, versions
from mdev_orchestrator.engine.devices import create_devices, remove_devices
from mdev_orchestrator.errors import QemuError
from mdev_orchestrator.host import sysfs

SAMPLES = ("mtty", "mdpy", "mbochs")
MONITOR = ("info pci", "info qtree", "info mtree", "info qom-tree", "info irq", "info migrate")
#: QEMU keeps these in the order of addresses in its own memory.
UNORDERED = {"info mtree"}
#: All that a device of the patched QEMU has more than one of the unpatched.
PROPERTY = 'mdev-start = "auto"'


class Foreign(GuestTest):
    @cells(driver=SAMPLES, qemu=PATCHED)
    def test_behaves_as_the_unpatched_one(self) -> None:
        series, known = self.params.get("qemu"), versions()
        if missing := {series, f"{series}-stock"} - known.keys():
            self.cancel(f"MDO_TEST_QEMU names no {' and no '.join(sorted(missing))}")
        with loaded(self.params.get("driver")) as uuids:
            stock = observe(known[f"{series}-stock"], uuids)
            patched = observe(known[series], uuids)
        trees = patched["info qtree"]
        devices = [sum("sysfsdev" in line for line in tree) for tree in trees]
        assert devices == [sum(PROPERTY in line for line in tree) for tree in trees] == [1, 2, 1]
        patched["info qtree"] = [[line for line in tree if PROPERTY not in line] for tree in trees]
        differs = difflib.unified_diff(lines_of(stock), lines_of(patched), "unpatched", "patched")
        assert stock == patched, "\n".join(differs)


def lines_of(seen: dict[str, list[Any]]) -> list[str]:
    """What was seen, on many lines; in the order of its names."""
    return pprint.pformat(seen).splitlines()


@contextlib.contextmanager
def loaded(driver: str) -> Iterator[list[str]]:
    """The driver, with two devices of it."""
    subprocess.run(["insmod", Path(os.environ["MDO_LAB_SAMPLES"], f"{driver}.ko")], check=True)
    try:
        (parent,) = (
            parent for parent in sysfs.read_host(machine()).parents if parent.name == driver
        )
        made = asyncio.run(create_devices(machine(), parent.types[0].id, 2))
        uuids = [str(mdev.uuid) for mdev in made]
        try:
            yield uuids
        finally:
            asyncio.run(remove_devices(machine(), [mdev.uuid for mdev in made]))
    finally:
        subprocess.run(["rmmod", driver], check=True)


def observe(version: Version, uuids: list[str]) -> dict[str, list[Any]]:
    """What there is to see of a QEMU that gets one device cold and one hot, and loses that again.

    :return: What was looked at: what was seen, each time.
    """
    cold, hot = uuids
    seen: dict[str, list[Any]] = {what: [] for what in (*MONITOR, "query-pci", "events", "words")}

    def look(qemu: Direct) -> None:
        for line in MONITOR:
            lines = qemu.command("human-monitor-command", command_line=line).splitlines()
            seen[line].append(sorted(lines) if line in UNORDERED else lines)
        seen["query-pci"].append(qemu.command("query-pci"))

    with Direct(version, cold) as qemu:
        look(qemu)
        qemu.plug(hot)
        look(qemu)
        # both are taken: neither can another one have them, nor this one twice
        for uuids_of_another in ((cold,), (hot,)):
            with refused(QemuError) as failure:
                Direct(version, *uuids_of_another)
            seen["words"].append(failure.text)
        with refused(QemuError) as failure:
            qemu.command(
                "device_add", driver="vfio-pci", id="again", sysfsdev=sysfs_of(hot), bus="port7"
            )
        seen["words"].append(failure.text)
        qemu.unplug(hot)
        seen["events"] += [(event["event"], event.get("data")) for event in qemu.qmp.events]
        look(qemu)
        qemu.quit()
        seen["words"].append(qemu.words())
    # a later device that cannot be realized
    with refused(QemuError) as failure:
        Direct(version, cold, extra=("-device", f"vfio-pci,sysfsdev={sysfs_of(hot)},bus=none"))
    seen["words"].append(failure.text)
    return seen


def sysfs_of(uuid: str) -> str:
    return f"/sys/bus/mdev/devices/{uuid}"
