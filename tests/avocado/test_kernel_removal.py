# SPDX-License-Identifier: GPL-2.0-or-later
"""The kernel is told to remove what a guest holds: it waits, and the driver asks for the device."""

from __future__ import annotations

import asyncio

from guests import (
    GUEST_SECONDS,
    GuestTest,
    disappears,
    functions,
    guest,
    halted_guest,
    mdevs,
    refused,
    unchanged,
    use,
)

from lab import cards
from lab.machine import machine
from mdev_lab.mvgpu import GRID_TYPE
from mdev_orchestrator.engine.devices import create_devices
from mdev_orchestrator.errors import DeadlineError
from mdev_orchestrator.host import sysfs
from mdev_orchestrator.host.events import wait_until
from mdev_orchestrator.model import Mdev
from mdev_orchestrator.qemu import hotplug, process
from mdev_orchestrator.qemu.monitor import connect

SMALL = "mvgpu-128M"


async def is_gone(mdev: Mdev) -> None:
    """Wait until the kernel has removed it."""
    async with asyncio.timeout(GUEST_SECONDS):
        await wait_until(machine(), lambda: sysfs.read_mdev(machine(), mdev.uuid) is None)


class KernelRemoval(GuestTest):
    async def test_guest_lets_go_when_the_kernel_asks(self) -> None:
        async with (
            unchanged(),
            mdevs(GRID_TYPE) as (grid,),
            mdevs(SMALL) as (igd,),
            guest("asked", grid, igd) as program,
        ):
            await use(program, grid)
            running = process.find_running(machine(), "asked")
            async with connect(running.qmp_socket, running.label) as qmp:
                # While the guest stands still it cannot let go: the writer gives up, and is
                # abandoned in the kernel.
                await qmp.execute("stop", object)
                with refused(DeadlineError, str(grid.uuid), "was not removed", "has it open"):
                    await sysfs.remove(machine(), grid.uuid, 1)
                assert sysfs.read_mdev(machine(), grid.uuid) is not None
                (other,) = [m for m in await hotplug.mdevs(qmp) if m.uuid == igd.uuid]
                assert other.driver == "vfio-pci"

                # Once it runs again it does, by the unplug that the driver's request has become.
                with qmp.events(
                    ("DEVICE_DELETED",),
                    lambda data: data.get("device") == as_id(grid),
                ) as events:
                    await qmp.execute("cont", object)
                    assert await events.next(GUEST_SECONDS) is not None
            await disappears(program, grid)
            await is_gone(grid)
            assert (await functions(program)).keys() == {igd.uuid}
            await use(program, igd)

            # The driver itself cannot be taken away under a guest.
            rmmod = await asyncio.create_subprocess_exec(
                "rmmod", "mvgpu", stderr=asyncio.subprocess.PIPE
            )
            _, words = await rmmod.communicate()
            assert rmmod.returncode != 0
            assert b"in use" in words
            await use(program, igd)

    async def test_guest_lets_go_when_its_card_is_unbound(self) -> None:
        async with unchanged(), mdevs(GRID_TYPE) as (grid,):
            with cards.claimed(cards.IGD):
                (igd,) = await create_devices(machine(), SMALL, parent=cards.IGD)
                async with guest("carded", grid, igd) as program:
                    await use(program, igd)
                    unbinding = cards.unbind(cards.IGD)
                    await disappears(program, igd)
                    await is_gone(igd)
                    assert await asyncio.to_thread(unbinding.wait, GUEST_SECONDS) == 0
                    await use(program, grid)

    async def test_removal_ends_with_a_guest_that_never_answers(self) -> None:
        async with unchanged(), mdevs(SMALL) as (mdev,):
            async with halted_guest("deaf", mdev):
                with refused(DeadlineError, str(mdev.uuid), "has it open"):
                    await sysfs.remove(machine(), mdev.uuid, 1)
            await is_gone(mdev)


def as_id(mdev: Mdev) -> str:
    """Its id in QEMU."""
    return f"mdev-{mdev.uuid}"
