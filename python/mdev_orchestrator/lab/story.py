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
import re
import sys
import time
import zlib
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path
from uuid import UUID, uuid4

from mdev_orchestrator.engine import lifecycle
from mdev_orchestrator.engine.devices import create_devices, remove_devices
from mdev_orchestrator.errors import BusyError, CapacityError, MdoError
from mdev_orchestrator.host import sysfs
from mdev_orchestrator.lab import l2
from mdev_orchestrator.machine import Machine
from mdev_orchestrator.model import Host, Mdev
from mdev_orchestrator.qemu import process
from mdev_orchestrator.qemu.command import GuestMdev, GuestSpec

GRID_TYPE = "mvgpu-12"
IGD_TYPE = "mvgpu-512M"
PEER_TYPE = "mvgpu-128M"
PEER_PARENT = "igd0"
SEED = 2016
FILL_BYTES = 256 * 1024
UUID_TEXT = re.compile(r"([0-9a-f]{8})(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")


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
    left = counts(sysfs.read_host(Machine()))
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
        before = counts(sysfs.read_host(Machine()))
        expect("parents that offer types", True, bool(before))
        this.result = f"{len(before)} types, igd reads {igd_counts()}"
    async with contextlib.AsyncExitStack() as devices, contextlib.AsyncExitStack() as undo:
        async with step(f"create one {GRID_TYPE} and one {IGD_TYPE}") as this:
            (grid,) = await create_devices(GRID_TYPE)
            devices.push_async_callback(gone, grid)
            (igd,) = await create_devices(IGD_TYPE)
            devices.push_async_callback(gone, igd)
            others = {
                n for id_, n in counts(sysfs.read_host(Machine())).items() if id_ in GRID_OTHERS
            }
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
            guest = await lifecycle.launch(spec)
            undo.push_async_callback(lifecycle.end, guest, deadline=0, force=True)
            this.result = f"pid {guest.record.pid}" if guest.record else ""
        async with step("boot the guest's Linux") as this:
            program = await undo.enter_async_context(l2.program(spec.name, guest.console_socket))
            this.result = "its program answers"
        async with step("the guest uses it: fill, checksum, interrupt") as this:
            this.result = await use(program, grid.uuid)
        async with step("hot-plug the second by QMP") as this:
            await lifecycle.attach(guest, as_guest_mdev(igd), wait_guest=True)
            answer = await program.ask(f"wait {igd.uuid} 30")
            this.result = f"the guest has it as {answer['bdf']}"
        async with step("the guest uses that too") as this:
            this.result = await use(program, igd.uuid)
        async with step("unplug and remove it while the guest runs") as this:
            await lifecycle.detach(spec.name, igd.uuid)
            await program.ask(f"gone {igd.uuid} 30")
            await remove_devices([str(igd.uuid)])
            this.result = "gone from guest and host"
        peers = await group_act(devices, guest, program)
        async with step("power the guest down") as this:
            how = (await lifecycle.end(guest)).how
            expect("the group's state", {False}, {online(mdev) for mdev in peers})
            expect("free links", links()[0], links()[1])
            this.result = f"{how}; the group is offline, its links are back"
        async with step("remove the rest") as this:
            await remove_devices([str(mdev.uuid) for mdev in (grid, *peers)])
            after = await settled(before)
            expect("available instances", before, after)
            this.result = "every count is back where it was"


async def group_act(
    devices: contextlib.AsyncExitStack, guest: process.RunningGuest, program: l2.Program
) -> tuple[Mdev, Mdev]:
    """Two devices of one start group in one guest, and who else would like to have something.

    :param devices: Removes what is left of them when the guest has ended.
    """
    async with step(f"create two {PEER_TYPE} in one start group") as this:
        first, second = await create_devices(PEER_TYPE, 2, group="demo-peers")
        devices.push_async_callback(gone, first)
        devices.push_async_callback(gone, second)
        all_links, free = links()
        expect("the group's state", {False}, {online(first), online(second)})
        this.result = f"offline; {free} of {all_links} links free"
    async with step("hot-plug one: its group comes online first") as this:
        await lifecycle.attach(guest, as_guest_mdev(first), wait_guest=True)
        expect("the group's state", {True}, {online(first), online(second)})
        expect("free links", free - 1, links()[1])
        this.result = f"both are online; {links()[1]} of {all_links} links free"
    async with step("another guest asks for the other one") as this:
        this.result = await refused(BusyError, lifecycle.launch(idle(second)))
    async with step("hot-plug that into the same guest") as this:
        await lifecycle.attach(guest, as_guest_mdev(second), wait_guest=True)
        for mdev in (first, second):
            await program.ask(f"wait {mdev.uuid} 30")
        this.result = "the guest has both"
    async with step("copy from one framebuffer to the other") as this:
        answer = await program.ask(f"peer {second.uuid} {first.uuid} {SEED} {FILL_BYTES}")
        expect("the checksum", zlib.crc32(l2.pattern(SEED, FILL_BYTES)), answer["crc32"])
        this.result = f"from slot {answer['slot']}, crc32 {answer['crc32']:08x} is right"
    async with step("a group of three for another guest") as this:
        three = await create_devices(PEER_TYPE, 3, group="demo-three")
        for mdev in three:
            devices.push_async_callback(gone, mdev)
        this.result = await refused(CapacityError, lifecycle.launch(idle(*three)))
        expect("the group's state", {False}, {online(mdev) for mdev in three})
        await remove_devices([str(mdev.uuid) for mdev in three])
    return first, second


def idle(*mdevs: Mdev) -> GuestSpec:
    """A guest that never boots: QEMU opens its devices and waits."""
    return GuestSpec(
        name=f"demo-other-{os.getpid()}",
        uuid=uuid4(),
        memory=64 << 20,
        mdevs=tuple(map(as_guest_mdev, mdevs)),
        extra=("-S",),
    )


async def refused(kind: type[MdoError], launching: Awaitable[process.RunningGuest]) -> str:
    """Fail unless a guest is refused; gives the reason."""
    try:
        guest = await launching
    except kind as error:
        return "refused: " + UUID_TEXT.sub(r"\1…", error.message)
    await lifecycle.end(guest, deadline=0, force=True)
    raise MdoError(f"guest {guest.name} was not refused")


def online(mdev: Mdev) -> bool | None:
    """Whether an mdev is online now."""
    found = sysfs.read_mdev(Machine(), mdev.uuid)
    return None if found is None else found.online


def links() -> tuple[int, int]:
    """All links of the parent, and how many are free."""
    parent = next(p for p in sysfs.read_host(Machine()).parents if p.name == PEER_PARENT)
    return parent.links or 0, parent.links_free or 0


GRID_OTHERS = {f"mvgpu-{number}" for number in range(11, 19)} - {GRID_TYPE}


async def gone(mdev: Mdev) -> None:
    """Remove an mdev if it is still there."""
    if sysfs.read_mdev(Machine(), mdev.uuid) is not None:
        await remove_devices([str(mdev.uuid)])


async def settled(wanted: dict[str, int | None]) -> dict[str, int | None]:
    """Counts, read again for a moment: the kernel gives an instance back just after ``remove``."""
    for _ in range(20):
        if counts(sysfs.read_host(Machine())) == wanted:
            break
        await asyncio.sleep(0.05)  # no event tells of it
    return counts(sysfs.read_host(Machine()))


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
