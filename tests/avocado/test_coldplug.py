# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest that gets its devices on QEMU's command line."""

from __future__ import annotations

from guests import GuestTest, functions, guest, mdevs, unchanged, use

from mdev_orchestrator.host import sysfs
from mdev_orchestrator.lab.story import GRID_OTHERS, GRID_TYPE, IGD_TYPE, counts
from mdev_orchestrator.machine import Machine
from mdev_orchestrator.qemu import hotplug, process


class ColdPlug(GuestTest):
    async def test_guest_uses_what_it_was_started_with(self) -> None:
        async with unchanged(), mdevs(GRID_TYPE) as (grid,), mdevs(IGD_TYPE) as (igd,):
            left = counts(sysfs.read_host(Machine()))
            assert {left[other] for other in GRID_OTHERS} == {0}
            async with guest("cold", grid, igd) as program:
                seen = await functions(program)
                assert seen.keys() == {grid.uuid, igd.uuid}
                assert seen[grid.uuid]["bytes"] == 512 << 20
                assert seen[igd.uuid]["bytes"] == 512 << 20

                with_msi = await use(program, grid, seed=1, interrupt="msi")
                with_intx = await use(program, grid, seed=2, interrupt="intx")
                assert with_msi["bdf"] == with_intx["bdf"] == seen[grid.uuid]["bdf"]
                assert with_msi["crc32"] != with_intx["crc32"]
                await use(program, igd, seed=3, interrupt="msi")

                plugged = await hotplug.mdevs_of(process.find("cold"))
                assert {one.uuid: one.port for one in plugged} == {
                    grid.uuid: "port0",
                    igd.uuid: "port1",
                }
