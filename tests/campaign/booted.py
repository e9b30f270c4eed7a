# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest that has booted: it is asked to let go of devices, and does."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from uuid import UUID

from campaign import specs
from lab.hang import where_it_hangs
from mdev_orchestrator.errors import DeadlineError
from mdev_orchestrator.lab import l2
from mdev_orchestrator.machine import Machine
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
    guest = process.find_running(Machine(), NAME)
    assert guest.record is not None
    plugged = {mdev.uuid for mdev in await hotplug.mdevs_of(guest)}
    found: set[UUID] = set()
    try:
        async with l2.program(NAME, guest.console_socket, BOOT_SECONDS) as program:
            for uuid in plugged:
                await program.ask(f"wait {uuid} {GUEST_SECONDS}", GUEST_SECONDS + 10)
            async with asyncio.timeout(GUEST_SECONDS):
                while found != plugged:
                    listed = (await program.ask("list", GUEST_SECONDS))["functions"]
                    found = {UUID(one["uuid"]) for one in listed if one["uuid"]}
    except (TimeoutError, DeadlineError) as error:
        last = guest.console_log.read_text(errors="replace")[-1000:]
        raise AssertionError(
            f"{error}: QEMU has {plugged}, the guest uses {found}; its console: {last}; "
            f"{await where_it_hangs(guest)}"
        ) from None
    return guest.record.pid
