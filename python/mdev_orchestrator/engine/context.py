# SPDX-License-Identifier: GPL-2.0-or-later
"""What steps act with: the machine, their time limits, and what one run has learned so far."""

from __future__ import annotations

import asyncio
import math
import time
from dataclasses import dataclass, field
from uuid import UUID

from mdev_orchestrator.host import sysfs
from mdev_orchestrator.host.holders import Holder, Holders, find_holders
from mdev_orchestrator.machine import Machine
from mdev_orchestrator.qemu.stop import Ended

DEADLINE = 30.0
"""Seconds for one device to be created or removed."""
SETTLE_SECONDS = 2.0
"""For the driver to count an instance as free after its device was removed. No event tells; the
core gives it back with the device's last reference."""
_LEAST_SECONDS = 0.1
"""For a step that begins when there is no time left: its error says what was not done."""
_HELD_SECONDS = 0.5
"""How old an answer about open devices may be."""


@dataclass
class Context:
    """One run of steps on a machine.

    :ivar deadline: Seconds for one device; guests have their own.
    :ivar end: When the steps are given up, whatever their own time limits are, in the event loop's
        time. An undo has its own time.
    :ivar ports: The root port of each device that was attached; ``None`` for one that needs none.
    :ivar names: What QEMU calls each device that was attached to a domain of libvirt.
    :ivar ended: How each guest ended that was stopped.
    :ivar repairing: The run is being undone, or finished by another process: what is there already
        counts as made by the step that makes it.
    """

    machine: Machine
    deadline: float = DEADLINE
    end: float = math.inf
    ports: dict[UUID, str | None] = field(default_factory=dict)
    names: dict[UUID, str] = field(default_factory=dict)
    ended: dict[str, Ended] = field(default_factory=dict)
    repairing: bool = False
    _held: tuple[float, Holders] | None = field(default=None, repr=False)
    _looking: asyncio.Lock = field(default_factory=asyncio.Lock, repr=False)
    _removed: dict[str, float] = field(default_factory=dict, repr=False)

    def seconds(self, limit: float) -> float:
        """The time limit of a step that begins now, in seconds.

        :param limit: Its own.
        """
        if self.repairing:
            return limit
        return min(limit, max(self.end - asyncio.get_running_loop().time(), _LEAST_SECONDS))

    async def held(self, uuid: UUID) -> tuple[Holder, ...]:
        """The processes that have an mdev open.

        One walk of /proc serves many steps. That no process has the device open is believed for a
        moment; that one has it is not: it may have closed it since.
        """
        async with self._looking:
            now = time.monotonic()
            if self._held is None or now - self._held[0] > _HELD_SECONDS or self._held[1].of(uuid):
                found = await sysfs.scan(self.machine, types=False)
                self._held = now, await find_holders(self.machine, found.mdevs)
            return self._held[1].of(uuid)

    def note_removal(self, parent: str) -> None:
        """Remember that a device of a parent was removed just now."""
        self._removed[parent] = time.monotonic()

    def may_settle(self, parent: str) -> bool:
        """Whether a parent without an instance may soon have one: this run removed a device."""
        removed = self._removed.get(parent)
        return removed is not None and time.monotonic() - removed < SETTLE_SECONDS
