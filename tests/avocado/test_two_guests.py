# SPDX-License-Identifier: GPL-2.0-or-later
"""Two guests at once do not disturb each other."""

from __future__ import annotations

import asyncio

from guests import (
    GUEST_SECONDS,
    GuestTest,
    appears,
    attach,
    disappears,
    functions,
    guest,
    mdevs,
    mdo,
    one_line,
    refused,
    spec,
    unchanged,
    use,
)

from lab.machine import machine
from mdev_lab.mvgpu import GRID_TYPE, as_guest_mdev
from mdev_orchestrator.engine import guest_ops
from mdev_orchestrator.errors import BusyError, QemuError
from mdev_orchestrator.host.holders import read_holders
from mdev_orchestrator.model import Mdev
from mdev_orchestrator.qemu import hotplug, process
from mdev_orchestrator.qemu.monitor import connect
from mdev_orchestrator.qemu.start import start_qemu

SMALL = "mvgpu-128M"


async def plug(name: str, mdev: Mdev) -> None:
    """Have the QEMU of a guest add a device, without any check before that."""
    running = process.find_running(machine(), name)
    end = asyncio.get_running_loop().time() + GUEST_SECONDS
    async with connect(running.qmp_socket, running.label) as qmp:
        await hotplug.plug_by(qmp, hotplug.device_for(as_guest_mdev(mdev)), end)


class TwoGuests(GuestTest):
    async def test_each_has_its_own_devices(self) -> None:
        async with (
            unchanged(),
            mdevs(GRID_TYPE, 2) as (grid_of_left, grid_of_right),
            mdevs(SMALL) as (shared,),
            guest("left", grid_of_left, shared) as left,
            guest("right", grid_of_right) as right,
        ):
            # Same type, same moment, different contents.
            answers = await asyncio.gather(
                use(left, grid_of_left, seed=1), use(right, grid_of_right, seed=2)
            )
            assert answers[0]["crc32"] != answers[1]["crc32"]
            assert (await functions(left)).keys() == {grid_of_left.uuid, shared.uuid}
            assert (await functions(right)).keys() == {grid_of_right.uuid}

            # What the left one has, the right one cannot get, nor can a third: by command…
            done = await mdo("attach", "right", str(shared.uuid))
            assert done.status == BusyError.exit_code, done
            assert "held by guest 'left'" in one_line(done.err)
            # …nor past the command's checks, where the kernel is the arbiter.
            with refused(QemuError, "Device or resource busy", "another process holds the mdev"):
                await plug("right", shared)
            with refused(QemuError, "guest third", "Device or resource busy"):
                await start_qemu(machine(), spec("third", shared, boots=False))
            assert [found.name for found in process.list_guests(machine())] == ["left", "right"]
            (holder,) = read_holders(machine(), (shared,)).of(shared.uuid)
            assert holder.guest == "left"
            await use(left, shared, seed=3)

            # It changes hands when the left one has let go.
            await guest_ops.detach(machine(), "left", shared.uuid)
            await disappears(left, shared)
            await attach("right", shared, wait_guest=True)
            await appears(right, shared)
            await use(right, shared, seed=4)

            # The end of one is nothing to the other.
            ended = await guest_ops.end(machine(), process.find(machine(), "left"))
            assert ended.how == "powerdown"
            await use(right, grid_of_right, seed=5)
            assert not read_holders(machine(), (grid_of_left,)).of(grid_of_left.uuid)
