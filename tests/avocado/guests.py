# SPDX-License-Identifier: GPL-2.0-or-later
"""What the functional tests share: devices, guests and commands that clean up after themselves.

A test is a story told inside one coroutine. avocado never awaits an asynchronous ``setUp``, so
whatever a story needs is an ``async with`` block: it is there when the block begins, and gone when
it ends, however it ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import zlib
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

from avocado import Test
from lab.hang import where_it_hangs
from lab.kernel_log import KernelLog
from lab.machine import machine
from mdev_lab import l2
from mdev_lab.mvgpu import as_guest_mdev, counts, settled
from mdev_orchestrator.engine import guest_ops
from mdev_orchestrator.engine.devices import create_devices, remove_devices
from mdev_orchestrator.errors import DeadlineError
from mdev_orchestrator.host import sysfs
from mdev_orchestrator.model import Mdev
from mdev_orchestrator.qemu import hotplug, process
from mdev_orchestrator.qemu.command import GuestSpec
from mdev_orchestrator.qemu.process import RunningGuest
from mdev_orchestrator.spec.sizes import Size

MEMORY = 256 << 20
FILL_BYTES = 256 << 10

# No test is about time: these only end what would wait for ever, on however busy a machine.
BOOT_SECONDS = 400.0
GUEST_SECONDS = 200
COMMAND_SECONDS = 300.0


class GuestTest(Test):  # type: ignore[misc]  # avocado has no types
    """A test after which the kernel has nothing to complain of."""

    def setUp(self) -> None:
        self.kernel_log = KernelLog()

    def tearDown(self) -> None:
        complaints = self.kernel_log.complaints()
        self.kernel_log.close()
        if complaints:
            self.fail(f"the kernel complains: {' | '.join(complaints[:3])}")


@contextlib.asynccontextmanager
async def unchanged() -> AsyncIterator[None]:
    """When the block has ended, every count and every mdev is as it was before."""
    before = counts(sysfs.read_host(machine()))
    known = {mdev.uuid for mdev in sysfs.read_host(machine()).mdevs}
    assert before, "the driver offers no types"
    yield
    after = await settled(machine(), before)
    assert after == before, f"available instances: {before} before, {after} after"
    left = {mdev.uuid for mdev in sysfs.read_host(machine()).mdevs}
    assert left == known, f"mdevs: {known} before, {left} after"


@contextlib.asynccontextmanager
async def mdevs(type_id: str, count: int = 1) -> AsyncIterator[tuple[Mdev, ...]]:
    """So many fresh mdevs of a type; those that the story has not removed go at the end."""
    made = await create_devices(machine(), type_id, count)
    try:
        yield made
    finally:
        found = {mdev.uuid for mdev in sysfs.read_host(machine(), types=False).mdevs}
        if left := [mdev.uuid for mdev in made if mdev.uuid in found]:
            await remove_devices(machine(), left)


def spec(name: str, *devices: Mdev, extra: tuple[str, ...] = (), boots: bool = True) -> GuestSpec:
    """A guest of the lab's kernel and initramfs, or one that has nothing to boot."""
    return GuestSpec(
        name=name,
        uuid=uuid4(),
        memory=Size(MEMORY),
        kernel=Path(os.environ["MDO_LAB_KERNEL"]) if boots else None,
        initrd=Path(os.environ["MDO_LAB_INITRD"]) if boots else None,
        append=l2.APPEND if boots else "",
        mdevs=tuple(as_guest_mdev(mdev) for mdev in devices),
        extra=extra,
    )


@contextlib.asynccontextmanager
async def started(what: GuestSpec) -> AsyncIterator[RunningGuest]:
    """A QEMU that runs; ended without asking its guest when the story has not ended it."""
    guest = await guest_ops.launch(machine(), what, deadline=BOOT_SECONDS)
    try:
        yield guest
    finally:
        await guest_ops.end(machine(), guest, deadline=0, force=True)


@contextlib.asynccontextmanager
async def guest(name: str, *devices: Mdev) -> AsyncIterator[l2.Program]:
    """A guest that has booted: the program in it."""
    async with started(spec(name, *devices)) as running:
        try:
            async with l2.program(name, running.console_socket, BOOT_SECONDS) as program:
                yield program
        except DeadlineError as error:
            raise AssertionError(f"{error}: {await where_it_hangs(running)}") from None


@contextlib.asynccontextmanager
async def halted_guest(name: str, *devices: Mdev) -> AsyncIterator[RunningGuest]:
    """A QEMU whose processor was never started: its guest answers nothing, ever."""
    async with started(spec(name, *devices, boots=False, extra=("-S",))) as running:
        yield running


async def attach(name: str, mdev: Mdev, *, wait_guest: bool = False) -> str | None:
    """Plug an mdev into the guest of this name; the port that it sits in."""
    running = process.find_running(machine(), name)
    port = await guest_ops.attach(machine(), running, as_guest_mdev(mdev), deadline=GUEST_SECONDS)
    if wait_guest:
        await hotplug.wait_taken(running, mdev.uuid, GUEST_SECONDS)
    return port


async def use(
    program: l2.Program, mdev: Mdev, *, seed: int = 2016, interrupt: str = "msi"
) -> dict[str, Any]:
    """The guest checks identity, fills, sums up and takes interrupts; the sum is checked here."""
    command = f"use {mdev.uuid} {seed} {FILL_BYTES} {interrupt}"
    answer = await program.ask(command, GUEST_SECONDS)
    assert UUID(answer["uuid"]) == mdev.uuid
    assert answer["crc32"] == zlib.crc32(l2.pattern(seed, FILL_BYTES)), answer
    assert answer["irqs"] == 4, answer
    assert answer["irq"] == interrupt, answer
    return answer


async def functions(program: l2.Program) -> dict[UUID, dict[str, Any]]:
    """The mvgpu functions that a guest sees."""
    answer = await program.ask("list", GUEST_SECONDS)
    return {UUID(function["uuid"]): function for function in answer["functions"]}


async def appears(program: l2.Program, mdev: Mdev) -> dict[str, Any]:
    """Wait until the guest has a function and can use it."""
    return await program.ask(f"wait {mdev.uuid} {GUEST_SECONDS}", GUEST_SECONDS + 10)


async def disappears(program: l2.Program, mdev: Mdev) -> None:
    """Wait until the guest has a function no more."""
    await program.ask(f"gone {mdev.uuid} {GUEST_SECONDS}", GUEST_SECONDS + 10)


@dataclass(frozen=True, slots=True)
class Done:
    """A command that has ended."""

    status: int
    out: str
    err: str

    def json(self) -> Any:  # noqa: ANN401 - it is JSON
        """What it printed, as a value."""
        assert self.status == 0, self
        return json.loads(self.out)


async def mdo(*arguments: str) -> Done:
    """Run ``mdo`` as a user does: in a process of its own."""
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "mdev_orchestrator.cli.main", *arguments),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(COMMAND_SECONDS):
            out, err = await child.communicate()
    except BaseException:
        child.kill()
        await child.wait()
        raise
    return Done(child.returncode or 0, out.decode(), err.decode())


def one_line(text: str) -> str:
    """The one line that an error is."""
    lines = text.splitlines()
    assert len(lines) == 1, f"an error is one line, not {text!r}"
    return lines[0]


@dataclass
class Refusal:
    """What was said when the block of :func:`refused` has ended."""

    text: str = ""
    notes: list[str] = field(default_factory=list)


@contextlib.contextmanager
def refused(kind: type[BaseException], *words: str) -> Iterator[Refusal]:
    """The block must fail with an error of this kind whose text has all these words."""
    refusal = Refusal()
    raised = False
    try:
        yield refusal
    except kind as error:
        refusal.text = str(error)
        refusal.notes = getattr(error, "__notes__", [])
        raised = True
    assert raised, f"no {kind.__name__} was raised"
    for word in words:
        assert word in refusal.text, f"no {word!r} in: {refusal.text}"
