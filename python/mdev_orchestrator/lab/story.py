# SPDX-License-Identifier: GPL-2.0-or-later
"""The demo's story, told inside L1: ``python -m mdev_orchestrator.lab.story``.

Prints one JSON object a line: ``{"doing": TEXT}`` when a step begins, and ``{"step": TEXT,
"result": TEXT, "seconds": NUMBER, "ok": BOOLEAN}`` when it has ended. The first step that fails is
the last but for the clean-up.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import time
import zlib
from collections.abc import AsyncIterator
from pathlib import Path
from uuid import UUID, uuid4

from mdev_orchestrator.engine.devices import create_devices, remove_devices
from mdev_orchestrator.errors import MdoError
from mdev_orchestrator.host import sysfs
from mdev_orchestrator.lab import l2
from mdev_orchestrator.model import Host, Mdev
from mdev_orchestrator.qemu import hotplug, process
from mdev_orchestrator.qemu.command import GuestMdev, GuestSpec

GRID_TYPE = "mvgpu-12"
IGD_TYPE = "mvgpu-512M"
SEED = 2016
FILL_BYTES = 256 * 1024


def say(**words: object) -> None:
    """One line for the host."""
    sys.stdout.write(json.dumps(words) + "\n")
    sys.stdout.flush()


class Step:
    """What one step came to; set by the block that carries it out."""

    result = ""


@contextlib.asynccontextmanager
async def step(name: str) -> AsyncIterator[Step]:
    """Tell of a step when it begins and when it has ended."""
    say(doing=name)
    started = time.monotonic()
    outcome = Step()
    try:
        yield outcome
    except BaseException as error:
        outcome.result = str(error) or type(error).__name__
        raise
    finally:
        ok = sys.exception() is None
        seconds = round(time.monotonic() - started, 2)
        say(step=name, result=outcome.result, seconds=seconds, ok=ok)


def expect(what: str, wanted: object, got: object) -> None:
    """Fail when the machine does not do what was promised."""
    if wanted != got:
        raise MdoError(f"{what}: expected {wanted}, got {got}")


def counts(host: Host) -> dict[str, int | None]:
    """Available instances by type."""
    return {type_.id: type_.available_instances for p in host.parents for type_ in p.types}


def igd_counts() -> str:
    """Counts of the igd types, as the thread of 2016 writes them: 8/4/2."""
    left = counts(sysfs.scan())
    return "/".join(str(left[f"mvgpu-{size}M"]) for size in (128, 256, 512))


def as_guest_mdev(mdev: Mdev) -> GuestMdev:
    """What QEMU needs to know of an mdev."""
    return GuestMdev(mdev.uuid, mdev.path, mdev.device_api or "vfio-pci")


async def use(program: l2.Program, uuid: UUID) -> str:
    """Let the guest fill and checksum a framebuffer, and check the sum here."""
    answer = await program.ask(f"use {uuid} {SEED} {FILL_BYTES} msi")
    expect("the checksum", zlib.crc32(l2.pattern(SEED, FILL_BYTES)), answer["crc32"])
    return f"{answer['bdf']}, crc32 {answer['crc32']:08x} is right, {answer['irqs']} interrupts"


async def tell() -> None:
    """Tell the story; what it made is gone when it ends, however it ends."""
    async with step("look at the host") as this:
        before = counts(sysfs.scan())
        expect("parents that offer types", True, bool(before))
        this.result = f"{len(before)} types, igd reads {igd_counts()}"
    async with contextlib.AsyncExitStack() as undo:
        async with step(f"create one {GRID_TYPE} and one {IGD_TYPE}") as this:
            (grid,) = await create_devices(GRID_TYPE)
            undo.push_async_callback(gone, grid)
            (igd,) = await create_devices(IGD_TYPE)
            undo.push_async_callback(gone, igd)
            others = {n for id_, n in counts(sysfs.scan()).items() if id_ in GRID_OTHERS}
            expect("instances left of the other grid types", {0}, others)
            expect("instances left of the igd types", "4/2/1", igd_counts())
            this.result = "other grid types read 0, igd reads 4/2/1"
        spec = GuestSpec(
            name=f"demo-{os.getpid()}",
            uuid=uuid4(),
            memory=256 << 20,
            kernel=Path(os.environ["MDO_LAB_KERNEL"]),
            initrd=Path(os.environ["MDO_LAB_INITRD"]),
            append=l2.APPEND,
            mdevs=(as_guest_mdev(grid),),
        )
        async with step("start QEMU with the first by sysfsdev") as this:
            guest = await process.start(spec)
            undo.push_async_callback(process.stop, guest, deadline=0, force=True)
            this.result = f"pid {guest.record.pid}" if guest.record else ""
        async with step("boot the guest's Linux") as this:
            program = await undo.enter_async_context(l2.program(spec.name, guest.console_socket))
            this.result = "its program answers"
        async with step("the guest uses it: fill, checksum, interrupt") as this:
            this.result = await use(program, grid.uuid)
        async with step("hot-plug the second by QMP") as this:
            await hotplug.attach(spec.name, as_guest_mdev(igd), wait_guest=True)
            answer = await program.ask(f"wait {igd.uuid} 30")
            this.result = f"the guest has it as {answer['bdf']}"
        async with step("the guest uses that too") as this:
            this.result = await use(program, igd.uuid)
        async with step("unplug and remove it while the guest runs") as this:
            await hotplug.detach(spec.name, igd.uuid)
            await program.ask(f"gone {igd.uuid} 30")
            await remove_devices([str(igd.uuid)])
            this.result = "gone from guest and host"
        async with step("power the guest down") as this:
            this.result = (await process.stop(guest)).how
        async with step("remove the first") as this:
            await remove_devices([str(grid.uuid)])
            after = await settled(before)
            expect("available instances", before, after)
            this.result = "every count is back where it was"


GRID_OTHERS = {f"mvgpu-{number}" for number in range(11, 19)} - {GRID_TYPE}


async def gone(mdev: Mdev) -> None:
    """Remove an mdev if it is still there."""
    if sysfs.read_mdev(mdev.uuid) is not None:
        await remove_devices([str(mdev.uuid)])


async def settled(wanted: dict[str, int | None]) -> dict[str, int | None]:
    """Counts, read again for a moment: the kernel gives an instance back just after ``remove``."""
    for _ in range(20):
        if counts(sysfs.scan()) == wanted:
            break
        await asyncio.sleep(0.05)  # no event tells of it
    return counts(sysfs.scan())


def main() -> int:
    """Exit status 0 when all went as promised."""
    try:
        asyncio.run(tell())
    except MdoError as error:
        sys.stderr.write(f"demo: {error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
