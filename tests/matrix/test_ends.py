# SPDX-License-Identifier: GPL-2.0-or-later
"""Every way to end, every QEMU: afterwards offline, links back, the group free for others."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import zlib
from collections.abc import Callable
from uuid import UUID

from cells import cells
from guests import BOOT_SECONDS, FILL_BYTES, GUEST_SECONDS, refused, spec, started, use
from msgspec.structs import replace

from lab import vfio
from lab.machine import machine
from lab.vfio import get, links
from matrix import checks
from matrix.cell import DRIVERS, QEMUS, Cell
from matrix.machines import Machine, Orchestrated
from mdev_lab import l2
from mdev_orchestrator.engine import start_groups
from mdev_orchestrator.errors import MdoError, QemuError
from mdev_orchestrator.host import sysfs
from mdev_orchestrator.qemu import process
from mdev_orchestrator.qemu.monitor import connect

NOWHERE = "/sys/bus/mdev/devices/00000000-0000-4000-8000-000000000000"
BAD = ("-device", f"vfio-pci,sysfsdev={NOWHERE}")
#: Nothing of QEMU's runs after these.
UNCAUGHT = {"SIGKILL", "SIGABRT", "SIGSEGV"}
SEED = 2016


def unplug_all(qemu: Machine, uuids: list[str]) -> None:
    for uuid in uuids:
        qemu.unplug(uuid)
    assert checks.online(uuids) == {False}


def unplug_all_and_again(qemu: Machine, uuids: list[str]) -> None:
    unplug_all(qemu, uuids)
    qemu.plug(uuids[0])
    qemu.unplug(uuids[0])


def fail_a_hot_plug(qemu: Machine, uuids: list[str]) -> None:
    """A device that cannot be realized leaves those of before as they are."""
    with refused(QemuError, "no such host device"):
        qemu.command("device_add", driver="vfio-pci", id="bad", sysfsdev=NOWHERE, bus="port3")
    assert checks.online(uuids) == {True}
    unplug_all(qemu, uuids)


def quit_(qemu: Machine, uuids: list[str]) -> None:
    qemu.quit()
    qemu.ended()


def by(number: int) -> Callable[[Machine, list[str]], None]:
    def send(qemu: Machine, uuids: list[str]) -> None:
        qemu.signal(number)
        qemu.ended()

    return send


#: Those of devices that were hot-plugged; the others are of devices of the command line.
UNPLUGS = {
    "device_del": unplug_all,
    "device_del-twice": unplug_all_and_again,
    "failed-hot-plug": fail_a_hot_plug,
}
ENDS = {
    **UNPLUGS,
    "quit": quit_,
    **{
        name: by(getattr(signal, name))
        for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGKILL", "SIGABRT", "SIGSEGV")
    },
}

LAUNCHER = """
import sys, time
from matrix.machines import Orchestrated, versions
qemu = Orchestrated(versions()[sys.argv[1]], *sys.argv[2:])
print("up", flush=True)
time.sleep(3600)
"""


class Ends(Cell):
    @cells(driver=DRIVERS, qemu=QEMUS, how=ENDS)
    def test_however_it_ends(self, how: str) -> None:
        uuids = self.group(2)
        since = vfio.now()
        with self.start(*(() if how in UNPLUGS else uuids)) as qemu:
            if how in UNPLUGS:
                for uuid in uuids:
                    qemu.plug(uuid)
            assert checks.online(uuids) == {True}
            assert links() == self.links - self.cost(2)
            ENDS[how](qemu, uuids)
            left = how not in UNPLUGS and (
                self.by_launcher or (how in UNCAUGHT and self.driver == "explicit")
            )
            self.is_left_online(uuids, left)
            if left:
                qemu.reclaim(*uuids)
            if how != "device_del-twice":
                checks.closed_before_stopped(uuids, since, as_group=self.grouped)
            checks.given_back(uuids, self.links)

    def is_left_online(self, uuids: list[str], left: bool) -> None:
        """Whether a QEMU that has ended has left its group online, which then has no owner."""
        assert checks.online(uuids) == {left}
        assert links() == self.links - (self.cost(len(uuids)) if left else 0)
        if self.grouped:
            assert {get(uuid, "group_owner") for uuid in uuids} == {"0"}

    @cells(driver=DRIVERS, qemu=QEMUS)
    def test_a_later_device_that_cannot_be_realized(self) -> None:
        """The command line's last device is bad: QEMU ends, and the group is not left online."""
        uuids = self.group(2)
        since = vfio.now()
        with refused(MdoError, "no such host device"):
            self.start(*uuids, extra=BAD)
        assert checks.history(uuids[0], since)["opened"]
        checks.closed_before_stopped(uuids, since, as_group=self.grouped)
        checks.given_back(uuids, self.links)

    @cells(driver=DRIVERS, qemu=QEMUS)
    def test_a_member_that_cannot_be_opened(self) -> None:
        """The second open of a group fails: the first is closed, and the group stopped."""
        uuids = self.group(2)
        with (
            vfio.fault("open", f"errno=5 times=-1 uuid={uuids[1]}"),
            refused(MdoError, "Input/output error"),
        ):
            self.start(*uuids)
        checks.given_back(uuids, self.links)

    @cells(driver=DRIVERS, qemu=QEMUS)
    def test_a_launcher_that_is_killed(self) -> None:
        """The guest outlives it and keeps its group; the next command finds both."""
        uuids = self.group(2)
        since = vfio.now()
        launcher = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER, self.version.name, *uuids],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            stdout=subprocess.PIPE,
        )
        assert launcher.stdout
        with launcher.stdout:
            assert launcher.stdout.readline() == b"up\n"
            launcher.kill()
            launcher.wait()
        with Orchestrated(self.version, guest=process.find(machine(), "matrix")) as qemu:
            qemu.reclaim()
            assert checks.online(uuids) == {True}, "it was taken from a guest that runs"
            assert links() == self.links - self.cost(2)
            qemu.kill()
            self.is_left_online(uuids, self.driver == "explicit")
            qemu.reclaim()
            checks.closed_before_stopped(uuids, since, as_group=self.grouped)
            checks.given_back(uuids, self.links)

    @cells(driver=DRIVERS, qemu=QEMUS)
    async def test_a_guest_that_powers_off(self) -> None:
        """A booted guest uses its devices, is told to power off, and no command follows."""
        uuids = self.group(2)
        since = vfio.now()
        mdevs = [mdev for uuid in uuids if (mdev := sysfs.read_mdev(machine(), UUID(uuid)))]
        what = replace(
            spec("matrix", *mdevs), qemu=self.version.binary, firmware=self.version.firmware
        )
        async with started(what) as guest:
            async with l2.program("matrix", guest.console_socket, BOOT_SECONDS) as program:
                assert checks.online(uuids) == {True}
                for mdev in mdevs:
                    await use(program, mdev)
                if self.grouped:
                    first, second = uuids
                    command = f"peer {first} {second} {SEED} {FILL_BYTES}"
                    answer = await program.ask(command, GUEST_SECONDS)
                    assert answer["crc32"] == zlib.crc32(l2.pattern(SEED, FILL_BYTES)), answer
            async with connect(guest.qmp_socket, guest.label) as qmp:
                await qmp.execute("system_powerdown", object)
            assert await process.wait_ended(guest, BOOT_SECONDS)
            self.is_left_online(uuids, self.by_launcher)
            assert not any(one.error for one in await start_groups.reclaim_groups(machine()))
            checks.closed_before_stopped(uuids, since, as_group=self.grouped)
            checks.given_back(uuids, self.links)
