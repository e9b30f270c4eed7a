# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest outlives the command that started it, and its devices outlive the guest."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from uuid import UUID, uuid4

from guests import (
    FILL_BYTES,
    GuestTest,
    appears,
    guest,
    mdevs,
    mdo,
    one_line,
    refused,
    unchanged,
    use,
)

from lab import vfio
from lab.machine import machine
from mdev_lab import l2
from mdev_orchestrator.engine import guest_ops
from mdev_orchestrator.errors import BusyError, QemuError
from mdev_orchestrator.host import sysfs
from mdev_orchestrator.host.holders import read_holders
from mdev_orchestrator.qemu import process

SMALL = "mvgpu-128M"


class Lifetime(GuestTest):
    async def test_commands_find_a_guest_again(self) -> None:
        """The whole life of a guest and its devices by commands, each a process of its own."""
        async with unchanged():
            uuid = str(uuid4())
            created = (await mdo("create", SMALL, "-n", "2")).out.split()
            cold, held = map(UUID, created)
            try:
                begun = await mdo(
                    *("guest", "start", "later", "--uuid", uuid, "--memory", "256M"),
                    *("--kernel", os.environ["MDO_LAB_KERNEL"]),
                    *("--initrd", os.environ["MDO_LAB_INITRD"]),
                    *("--append", l2.APPEND, "--mdev", str(cold), "--json"),
                )
                shape = begun.json()
                assert shape["state"] == "running"

                # Another command finds the same process, and it is the same guest.
                (listed,) = (await mdo("guest", "list", "--json")).json()["guests"]
                assert listed["name"] == "later"
                assert listed["pid"] == shape["pid"]
                assert listed["uuid"] == uuid
                assert [one["uuid"] for one in listed["mdevs"]] == [str(cold)]
                words = Path(f"/proc/{shape['pid']}/cmdline").read_bytes().split(b"\0")
                assert words[words.index(b"-uuid") + 1] == uuid.encode()

                found = process.find_running(machine(), "later")
                async with l2.program("later", found.console_socket) as program:
                    attached = await mdo("attach", "later", str(held), "--wait-guest", "--json")
                    assert attached.json()["taken"] is True
                    (one,) = [m for m in sysfs.read_host(machine()).mdevs if m.uuid == held]
                    await appears(program, one)
                    await use(program, one)

                    # What a guest holds is not removed, and the refusal names the guest.
                    done = await mdo("remove", str(held))
                    assert done.status == BusyError.exit_code, done
                    assert "held by guest 'later'" in one_line(done.err)
                    assert "--detach" in done.err
                    assert sysfs.read_mdev(machine(), held) is not None
                    await use(program, one)

                    # Unless it is taken out of the guest first.
                    done = await mdo("remove", "--detach", str(held))
                    assert done.status == 0, done
                    assert sysfs.read_mdev(machine(), held) is None

                stopped = await mdo("guest", "stop", "later", "--json")
                assert stopped.json() == {"name": "later", "how": "powerdown"}
                assert (await mdo("guest", "list", "--json")).json() == {"guests": []}
                assert not Path(f"/proc/{shape['pid']}").exists()
                assert (await mdo("remove", str(cold))).status == 0
            finally:
                for left in process.list_guests(machine()):
                    await guest_ops.end(machine(), left, deadline=0, force=True)
                mdevs_left = [str(u) for u in (cold, held) if sysfs.read_mdev(machine(), u)]
                if mdevs_left:
                    await mdo("remove", *mdevs_left)

    async def test_qemu_that_dies_at_start(self) -> None:
        async with unchanged(), mdevs(SMALL) as (mdev,):
            uuid = str(uuid4())
            start = (
                *("guest", "start", "stillborn", "--uuid", uuid, "--mdev", str(mdev.uuid)),
                *("--arg=-device", "--arg=no-such-device"),
            )
            done = await mdo(*start)
            assert done.status == QemuError.exit_code, done
            words = one_line(done.err)
            assert "'no-such-device' is not a valid device model name" in words
            assert "--debug shows how QEMU was run" in words
            told = (await mdo("--debug", *start)).err
            assert "QEMU was run as: " in told
            assert f"-uuid {uuid}" in told
            assert str(mdev.path) in told
            # Nothing of the guest is left, and the device is as it was.
            assert process.list_guests(machine()) == []
            assert sysfs.read_mdev(machine(), mdev.uuid) == mdev
            assert not read_holders(machine(), (mdev,)).of(mdev.uuid)

    async def test_qemu_killed_in_the_middle(self) -> None:
        async with unchanged(), mdevs(SMALL) as (mdev,), guest("victim", mdev) as program:
            record = process.find(machine(), "victim").record
            assert record is not None
            in_use = asyncio.Event()

            async def use_on_and_on() -> None:
                while True:
                    await use(program, mdev)
                    in_use.set()

            using = asyncio.ensure_future(use_on_and_on())
            used = asyncio.ensure_future(in_use.wait())
            await asyncio.wait({using, used}, return_when=asyncio.FIRST_COMPLETED)
            assert in_use.is_set(), using
            os.kill(record.pid, signal.SIGKILL)
            with refused(QemuError, "guest victim ended"):
                await using
            assert await process.wait_ended(process.find(machine(), "victim"))

            (listed,) = (await mdo("guest", "list", "--json")).json()["guests"]
            assert listed["state"] == "gone"
            assert listed["pid"] is None

            # The device is free, and its next user finds nothing of what was in it.
            assert not read_holders(machine(), (mdev,)).of(mdev.uuid)
            with vfio.Device(str(mdev.uuid)) as device:
                seen = os.pread(device.fd, FILL_BYTES, device.offset(vfio.FB))
            assert seen == bytes(FILL_BYTES)

            stopped = await mdo("guest", "stop", "victim", "--json")
            assert stopped.json() == {"name": "victim", "how": "gone"}
            assert not machine().guests_dir.joinpath("victim").exists()
            done = await mdo("remove", str(mdev.uuid))
            assert done.status == 0, done
