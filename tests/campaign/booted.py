# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest that has booted: it is asked to let go of devices, and does."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from uuid import UUID

from campaign import specs
from mdev_orchestrator.lab import l2
from mdev_orchestrator.qemu import hotplug, process

NAME = "alive"
BOOT_SECONDS = 400.0
GUEST_SECONDS = 200


def spec(place: Path, file: str, *types: str, memory: str = "256M") -> str:
    """One guest of the lab's kernel with devices of these types."""
    guest = {
        "name": NAME,
        "memory": memory,
        "kernel": os.environ["MDO_LAB_KERNEL"],
        "initrd": os.environ["MDO_LAB_INITRD"],
        "append": l2.APPEND,
        "mdev": [{"type": type_} for type_ in types],
    }
    return specs.write(place / file, guest)


def answers() -> int:
    """Wait until the guest uses all devices that its QEMU has, and no other; its QEMU's pid."""
    return asyncio.run(_answers())


async def _answers() -> int:
    guest = process.find_running(NAME)
    assert guest.record is not None
    async with l2.program(NAME, guest.console_socket, BOOT_SECONDS) as program:
        plugged = {mdev.uuid for mdev in await hotplug.mdevs_of(guest)}
        for uuid in plugged:
            await program.ask(f"wait {uuid} {GUEST_SECONDS}", GUEST_SECONDS + 10)
        found: set[UUID] = set()
        try:
            async with asyncio.timeout(GUEST_SECONDS):
                while True:
                    listed = (await program.ask("list", GUEST_SECONDS))["functions"]
                    found = {UUID(one["uuid"]) for one in listed if one["uuid"]}
                    if found == plugged:
                        return guest.record.pid
                    await asyncio.sleep(0.5)
        except TimeoutError:
            last = guest.console_log.read_text(errors="replace")[-2000:]
            raise AssertionError(
                f"QEMU has {plugged}, the guest uses {found}; its console: {last}"
            ) from None
