# SPDX-License-Identifier: GPL-2.0-or-later
"""The acts of the demo, carried out in L1: ``python -m mdev_lab.demo_acts``.

Prints one JSON object a line: ``{"doing": TEXT}`` when a step begins, and ``{"step": TEXT,
"result": TEXT, "seconds": NUMBER, "ok": BOOLEAN}`` when it has ended. After a step that fails only
the clean-up follows.
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

from mdev_lab import l2
from mdev_lab.mvgpu import (
    GRID_OTHERS,
    GRID_TYPE,
    IGD_TYPE,
    PEER_TYPE,
    as_guest_mdev,
    counts,
    settled,
)
from mdev_orchestrator.engine import guest_ops
from mdev_orchestrator.engine.devices import create_devices, remove_devices
from mdev_orchestrator.errors import BusyError, CapacityError, MdoError
from mdev_orchestrator.host import sysfs
from mdev_orchestrator.machine import Machine
from mdev_orchestrator.model import Host, Mdev
from mdev_orchestrator.qemu import hotplug, process
from mdev_orchestrator.qemu.command import GuestSpec
from mdev_orchestrator.spec.sizes import Size

SEED = 2016
FILL_BYTES = 256 * 1024
UUID_TEXT = re.compile(r"([0-9a-f]{8})(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def emit(**words: object) -> None:
    """Print one line for the host."""
    sys.stdout.write(json.dumps(words) + "\n")
    sys.stdout.flush()


class Step:
    """The result of a step, set by the block that carries it out."""

    result = ""


@contextlib.asynccontextmanager
async def step(name: str) -> AsyncIterator[Step]:
    """Report a step when it begins and when it has ended."""
    emit(doing=name)
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
        emit(step=name, result=outcome.result, seconds=seconds, ok=ok)


def expect(what: str, wanted: object, got: object) -> None:
    """Raise an error unless ``got`` is ``wanted``.

    :raise MdoError: It is not.
    """
    if wanted != got:
        raise MdoError(f"{what}: expected {wanted}, got {got}")


def igd_counts(host: Host) -> str:
    """Return the counts of the igd types, in the notation of the discussion of 2016: 8/4/2."""
    left = counts(host)
    return "/".join(str(left[f"mvgpu-{size}M"]) for size in (128, 256, 512))


async def use(program: l2.Program, uuid: UUID) -> str:
    """Have the guest fill a framebuffer and compute its checksum, and verify that here."""
    answer = await program.ask(f"use {uuid} {SEED} {FILL_BYTES} msi")
    expect("the checksum", zlib.crc32(l2.pattern(SEED, FILL_BYTES)), answer["crc32"])
    return f"{answer['bdf']}, crc32 {answer['crc32']:08x} is right, {answer['irqs']} interrupts"


async def play(machine: Machine) -> None:
    """Carry out all acts; in the end, also after a failure, remove what they made."""
    async with step("look at the host") as this:
        host = await sysfs.scan(machine)
        before = counts(host)
        expect("parents that offer types", True, bool(before))
        cards = " and ".join(parent.name for parent in host.parents)
        this.result = f"{len(before)} types on {cards}, igd reads {igd_counts(host)}"
    async with contextlib.AsyncExitStack() as devices, contextlib.AsyncExitStack() as undo:
        async with step(f"create one {GRID_TYPE} and one {IGD_TYPE}") as this:
            (grid,) = await create_devices(machine, GRID_TYPE)
            devices.push_async_callback(remove_if_there, machine, grid)
            (igd,) = await create_devices(machine, IGD_TYPE)
            devices.push_async_callback(remove_if_there, machine, igd)
            host = await sysfs.scan(machine)
            others = {n for id_, n in counts(host).items() if id_ in GRID_OTHERS}
            expect("instances left of the other grid types", {0}, others)
            expect("instances left of the igd types", "4/2/1", igd_counts(host))
            this.result = "other grid types read 0, igd reads 4/2/1"
        spec = GuestSpec(
            name=f"demo-{os.getpid()}",
            uuid=uuid4(),
            memory=Size(256 << 20),
            kernel=Path(os.environ["MDO_LAB_KERNEL"]),
            initrd=Path(os.environ["MDO_LAB_INITRD"]),
            append=l2.APPEND,
            mdevs=(as_guest_mdev(grid),),
        )
        async with step("start QEMU with the first by sysfsdev") as this:
            guest = await guest_ops.launch(machine, spec)
            undo.push_async_callback(guest_ops.end, machine, guest, deadline=0, force=True)
            this.result = f"pid {guest.record.pid}" if guest.record else ""
        async with step("boot the guest's Linux") as this:
            program = await undo.enter_async_context(l2.program(spec.name, guest.console_socket))
            this.result = "its program answers"
        async with step("the guest uses it: fill, checksum, interrupt") as this:
            this.result = await use(program, grid.uuid)
        async with step("hot-plug the second by QMP") as this:
            await plug(machine, guest, igd)
            answer = await program.ask(f"wait {igd.uuid} 30")
            this.result = f"the guest has it as {answer['bdf']}"
        async with step("the guest uses that too") as this:
            this.result = await use(program, igd.uuid)
        async with step("unplug and remove it while the guest runs") as this:
            await guest_ops.detach(machine, spec.name, igd.uuid)
            await program.ask(f"gone {igd.uuid} 30")
            await remove_devices(machine, [igd.uuid])
            this.result = "gone from guest and host"
        peers = await group_act(machine, devices, guest, program)
        async with step("power the guest down") as this:
            how = (await guest_ops.end(machine, guest)).how
            expect("the group's state", {False}, {online(machine, mdev) for mdev in peers})
            expect("free links", *sysfs.parent_links(machine, peers[0].parent))
            this.result = f"{how}; the group is offline, its links are back"
        async with step("remove the rest") as this:
            await remove_devices(machine, [mdev.uuid for mdev in (grid, *peers)])
            after = await settled(machine, before)
            expect("available instances", before, after)
            this.result = "every count is back where it was"


async def plug(machine: Machine, guest: process.RunningGuest, mdev: Mdev) -> None:
    """Plug a device into a guest, and wait until the guest has taken it."""
    await guest_ops.attach(machine, guest, as_guest_mdev(mdev))
    await hotplug.wait_taken(guest, mdev.uuid, hotplug.ATTACH_SECONDS)


async def group_act(
    machine: Machine,
    devices: contextlib.AsyncExitStack,
    guest: process.RunningGuest,
    program: l2.Program,
) -> tuple[Mdev, Mdev]:
    """Plug two devices of one start group into a guest; other guests that want more are refused.

    :param devices: Removes the devices when the guest has ended.
    :param program: The program in the guest.
    :return: The two devices.
    """
    async with step(f"create two {PEER_TYPE} in one start group") as this:
        first, second = await create_devices(machine, PEER_TYPE, 2, group="demo-peers")
        devices.push_async_callback(remove_if_there, machine, first)
        devices.push_async_callback(remove_if_there, machine, second)
        all_links, free = links(machine, first)
        expect("the group's state", {False}, {online(machine, first), online(machine, second)})
        this.result = f"offline; {free} of {all_links} links free"
    async with step("hot-plug one: its group comes online first") as this:
        await plug(machine, guest, first)
        expect("the group's state", {True}, {online(machine, first), online(machine, second)})
        expect("free links", free - 1, links(machine, first)[1])
        this.result = f"both are online; {links(machine, first)[1]} of {all_links} links free"
    async with step("another guest asks for the other one") as this:
        this.result = await refused(
            machine, BusyError, guest_ops.launch(machine, halted_guest(second))
        )
    async with step("hot-plug that into the same guest") as this:
        await plug(machine, guest, second)
        for mdev in (first, second):
            await program.ask(f"wait {mdev.uuid} 30")
        this.result = "the guest has both"
    async with step("copy from one framebuffer to the other") as this:
        answer = await program.ask(f"peer {second.uuid} {first.uuid} {SEED} {FILL_BYTES}")
        expect("the checksum", zlib.crc32(l2.pattern(SEED, FILL_BYTES)), answer["crc32"])
        this.result = f"from slot {answer['slot']}, crc32 {answer['crc32']:08x} is right"
    async with step("a group of three for another guest") as this:
        three = await create_devices(machine, PEER_TYPE, 3, group="demo-three")
        for mdev in three:
            devices.push_async_callback(remove_if_there, machine, mdev)
        this.result = await refused(
            machine, CapacityError, guest_ops.launch(machine, halted_guest(*three))
        )
        expect("the group's state", {False}, {online(machine, mdev) for mdev in three})
        await remove_devices(machine, [mdev.uuid for mdev in three])
    return first, second


def halted_guest(*mdevs: Mdev) -> GuestSpec:
    """Return a guest that never boots: QEMU opens its devices and waits."""
    return GuestSpec(
        name=f"demo-other-{os.getpid()}",
        uuid=uuid4(),
        memory=Size(64 << 20),
        mdevs=tuple(map(as_guest_mdev, mdevs)),
        extra=("-S",),
    )


async def refused(
    machine: Machine, kind: type[MdoError], launching: Awaitable[process.RunningGuest]
) -> str:
    """Wait for the start of a guest to fail; return the reason.

    :raise MdoError: The guest started.
    """
    try:
        guest = await launching
    except kind as error:
        return "refused: " + UUID_TEXT.sub(r"\1…", error.message)
    await guest_ops.end(machine, guest, deadline=0, force=True)
    raise MdoError(f"guest {guest.name} was not refused")


def online(machine: Machine, mdev: Mdev) -> bool | None:
    """Return whether an mdev is online now."""
    found = sysfs.read_mdev(machine, mdev.uuid)
    return None if found is None else found.online


def links(machine: Machine, mdev: Mdev) -> tuple[int, int]:
    """Return how many links an mdev's parent has, and how many of them are free."""
    all_links, free = sysfs.parent_links(machine, mdev.parent)
    return all_links or 0, free or 0


async def remove_if_there(machine: Machine, mdev: Mdev) -> None:
    """Remove an mdev if it is still there."""
    if sysfs.read_mdev(machine, mdev.uuid) is not None:
        await remove_devices(machine, [mdev.uuid])


def main() -> int:
    """Carry out all acts; return the exit status."""
    try:
        asyncio.run(play(Machine()))
    except MdoError as error:
        sys.stderr.write(f"demo: {error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
