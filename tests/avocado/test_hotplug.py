# SPDX-License-Identifier: GPL-2.0-or-later
"""Devices that come and go while the guest runs, by QMP."""

from __future__ import annotations

import asyncio
import contextlib

from guests import (
    GuestTest,
    appears,
    attach,
    disappears,
    functions,
    guest,
    halted_guest,
    mdevs,
    mdo,
    one_line,
    refused,
    unchanged,
    use,
)

from lab.machine import machine
from mdev_lab.mvgpu import counts
from mdev_orchestrator.engine import attach as engine_attach
from mdev_orchestrator.engine import guest_ops
from mdev_orchestrator.engine.devices import remove_devices
from mdev_orchestrator.errors import CommandError, DeadlineError, RequestError
from mdev_orchestrator.host import sysfs
from mdev_orchestrator.host.holders import read_holders
from mdev_orchestrator.qemu import hotplug, process
from mdev_orchestrator.qemu.command import device_id
from mdev_orchestrator.qemu.monitor import connect

SMALL = "mvgpu-128M"
PORTS = 4


class HotPlug(GuestTest):
    async def test_devices_come_and_go_in_every_port(self) -> None:
        async with unchanged(), mdevs(SMALL, PORTS + 1) as devices, guest("ports") as program:
            *four, fifth = devices
            first, second, *_ = four
            assert await functions(program) == {}

            # With wait_guest the guest has the device when attach returns.
            port = await attach("ports", first, wait_guest=True)
            assert port == "port0"
            await appears(program, first)
            await use(program, first, seed=1)

            # Detach returns when QEMU has closed it: no process holds it then.
            await guest_ops.detach(machine(), "ports", first.uuid)
            assert not read_holders(machine(), (first,)).of(first.uuid)
            await disappears(program, first)

            # The same device again, and one in every other port.
            for number, mdev in enumerate(four):
                port = await attach("ports", mdev, wait_guest=True)
                assert port == f"port{number}"
            for seed, mdev in enumerate(four):
                await appears(program, mdev)
                await use(program, mdev, seed=seed)
            with refused(RequestError, "guest ports", "all 4 root ports are taken", "detach"):
                await attach("ports", fifth)
            with refused(RequestError, "guest ports has", str(first.uuid), "already"):
                await attach("ports", first)
            held = await hotplug.mdevs_of(process.find(machine(), "ports"))
            assert {one.uuid for one in held} == {mdev.uuid for mdev in four}

            # A port that is free again takes another, which the host can also remove for good.
            await guest_ops.detach(machine(), "ports", second.uuid)
            await remove_devices(machine(), [second.uuid])
            assert await attach("ports", fifth, wait_guest=True) == "port1"
            await appears(program, fifth)
            await use(program, fifth, seed=5)
            seen = await functions(program)
            assert seen.keys() == {mdev.uuid for mdev in devices} - {second.uuid}

            # The request to let go cannot be taken back: an interrupted detach plugs in anew.
            running = process.find_running(machine(), "ports")
            async with connect(running.watch_socket, running.label) as qmp:
                with qmp.events(("DEVICE_DELETED",), lambda data: "device" in data) as events:
                    detaching = asyncio.ensure_future(
                        engine_attach.detach(machine(), "ports", fifth.uuid)
                    )
                    while not any(running.directory.glob("asked-*")):
                        assert not detaching.done()
                        await asyncio.sleep(0.01)
                    # The mark comes before the question; after this the guest was asked for sure.
                    with contextlib.suppress(CommandError):  # it is "in the process of unplug"
                        await qmp.execute("device_del", object, {"id": device_id(fifth.uuid)})
                    detaching.cancel()
                    with refused(asyncio.CancelledError) as undone:
                        await detaching
                    assert undone.notes == ["all was undone"]
                    assert await events.next(0), "the guest has not let go yet"
            await appears(program, fifth)
            await use(program, fifth, seed=6)

    async def test_guest_that_ignores_an_unplug(self) -> None:
        async with unchanged(), mdevs(SMALL) as (mdev,):
            async with halted_guest("deaf", mdev) as deaf:
                with refused(DeadlineError, "guest deaf", str(mdev.uuid), "still has the device"):
                    await guest_ops.detach(machine(), "deaf", mdev.uuid, 1)
                (plugged,) = await hotplug.mdevs_of(deaf)
                assert plugged.uuid == mdev.uuid

                # To ask again is no error, and a command tells the same by its exit code.
                done = await mdo("detach", "deaf", str(mdev.uuid), "--deadline", "1")
                assert done.status == DeadlineError.exit_code, done
                assert "did not let go" in one_line(done.err)
                assert sysfs.read_mdev(machine(), mdev.uuid) is not None
                assert counts(sysfs.read_host(machine()))[SMALL] == 7
            # A guest that has ended holds nothing.
            assert not read_holders(machine(), (mdev,)).of(mdev.uuid)
            await remove_devices(machine(), [mdev.uuid])
