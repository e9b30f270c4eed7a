# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest with a disk, with and without mediated devices, by command and by spec.

The image is raw; the guest reads its size and its first page. With every QEMU: 'make test-qemu'.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import zlib
from pathlib import Path

import guests
from cells import cells
from guests import GuestTest, functions, mdevs, mdo, one_line, unchanged

from lab.machine import machine
from matrix import machines
from mdev_lab import l2
from mdev_lab.mvgpu import IGD_TYPE
from mdev_orchestrator.qemu import process

SIZE = 3 << 20


class Disk(GuestTest):
    def setUp(self) -> None:
        super().setUp()
        self.version = machines.versions().get(self.params.get("qemu"))
        if self.version is None:
            self.cancel(f"MDO_TEST_QEMU names no QEMU {self.params.get('qemu')}")

    @cells(qemu=(machines.STOCK, *machines.PATCHED), count=(0, 2))
    async def test_started_by_command(self, count: int) -> None:
        with disk() as (image, crc):
            async with unchanged(), mdevs(IGD_TYPE, count) if count else none() as devices:
                named = [word for mdev in devices for word in ("--mdev", str(mdev.uuid))]
                done = await mdo(
                    *("guest", "start", "disk", "--memory", "256M", "--disk", str(image)),
                    *("--kernel", os.environ["MDO_LAB_KERNEL"]),
                    *("--initrd", os.environ["MDO_LAB_INITRD"], "--append", l2.APPEND),
                    *self.qemu_words(),
                    *named,
                )
                assert done.status == 0, done
                async with started_guest() as program:
                    await self.reads_its_disk(program, crc)
                    assert (await functions(program)).keys() == {mdev.uuid for mdev in devices}

    @cells(qemu=(machines.STOCK, *machines.PATCHED))
    async def test_started_by_a_spec(self) -> None:
        with disk() as (image, crc):
            spec = image.with_name("disk.toml")
            firmware = self.version.firmware
            # they have no addresses either; ours are built without a network
            nic = [] if self.version.patched else ["-nic", "user"]
            spec.write_text(
                f"""
                [[guest]]
                name = "disk"
                memory = "256M"
                kernel = "{os.environ["MDO_LAB_KERNEL"]}"
                initrd = "{os.environ["MDO_LAB_INITRD"]}"
                append = "{l2.APPEND}"
                disk = "{image}"
                qemu = "{self.version.binary}"
                {f'firmware = "{firmware}"' if firmware else ""}
                extra = {json.dumps(["-vga", "std", *nic])}
                [[guest.mdev]]
                type = "{IGD_TYPE}"
                """
            )
            async with unchanged():
                done = await mdo("apply", str(spec))
                assert done.status == 0, done
                async with started_guest() as program:
                    await self.reads_its_disk(program, crc)
                    (uuid,) = await functions(program)
                    attached = await mdo("attach", "disk", IGD_TYPE, "--wait-guest")
                    assert attached.status == 0, attached
                    more = await functions(program)
                    assert more.keys() - {uuid}
                destroyed = await mdo("destroy", "disk", "--force")
                assert destroyed.status == 0, destroyed
                removed = await mdo("remove", one_line(attached.out))
                assert removed.status == 0, removed

    def qemu_words(self) -> list[str]:
        firmware = self.version.firmware
        return ["--qemu", self.version.binary, *(["--firmware", str(firmware)] if firmware else [])]

    async def reads_its_disk(self, program: l2.Program, crc: int) -> None:
        seen = await program.ask("disk vda", guests.GUEST_SECONDS)
        assert seen["bytes"] == SIZE
        assert seen["crc32"] == crc


@contextlib.contextmanager
def disk():  # noqa: ANN201
    """A raw image, and the sum of its first page."""
    content = bytes(range(256)) * 16
    with tempfile.TemporaryDirectory(prefix="mdo-disk,") as directory:
        image = Path(directory) / "disk.img"
        with image.open("wb") as file:
            file.write(content)
            file.truncate(SIZE)
        yield image, zlib.crc32(content)


@contextlib.asynccontextmanager
async def none():  # noqa: ANN201
    yield ()


@contextlib.asynccontextmanager
async def started_guest():  # noqa: ANN201
    """The program in the guest ``disk``, which a command has started and the test ends."""
    running = process.find_running(machine(), "disk")
    try:
        async with l2.program("disk", running.console_socket, guests.BOOT_SECONDS) as program:
            yield program
    finally:
        with contextlib.suppress(Exception):
            await guests.guest_ops.end(machine(), running, deadline=0, force=True)
