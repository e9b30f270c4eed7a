# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest of the lab that does not answer: what can be known of it before it is ended.

Under L1's emulated SVM a guest hangs now and then, in its boot or later, while L1 works on. Three
were seen in November 2026, on busy machines, and none in fifty starts to find out why.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from mdev_orchestrator.qemu.monitor import connect
from mdev_orchestrator.qemu.process import RunningGuest


async def where_it_hangs(guest: RunningGuest) -> str:
    """What the processor of a guest does that does not answer, and where QEMU's threads wait."""
    assert guest.record is not None
    said = []
    async with connect(guest.query_socket, guest.label) as qmp:
        for _ in range(2):
            for line in ("info registers", "info lapic", "info irq"):
                arguments = {"command-line": line}
                text = await qmp.execute("human-monitor-command", str, arguments)
                said.append(f"{line}: {text}")
            await asyncio.sleep(2)  # whether anything has moved
    for thread in Path(f"/proc/{guest.record.pid}/task").iterdir():
        stack = (thread / "stack").read_text()
        said.append(f"thread {(thread / 'comm').read_text().strip()}: {stack}")
    return "\n".join(said)
