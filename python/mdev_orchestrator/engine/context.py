# SPDX-License-Identifier: GPL-2.0-or-later
"""What steps act on, and what one raises of which nobody knows the outcome."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from uuid import UUID

from mdev_orchestrator.errors import DeadlineError
from mdev_orchestrator.host import sysfs
from mdev_orchestrator.host.holders import Holder, Holders, read_holders
from mdev_orchestrator.machine import Machine

ROOT = Path("/")
DEADLINE = 30.0
"""Seconds for one device to be made or removed."""
_HELD_SECONDS = 0.5
"""How old an answer about who has what open may be."""


@lru_cache(maxsize=1)
def machine_of(root: Path) -> Machine:
    """The handle of a host by its root."""
    return Machine(root)


class UnsettledError(DeadlineError):
    """A step failed and may have an effect yet: nobody answers who could tell."""


@dataclass
class Context:
    """The machine that steps act on.

    :ivar host: Directory in which ``sys``, ``dev`` and ``proc`` stand.
    :ivar guests: Where guests live; the state directory's without it.
    :ivar deadline: Seconds for one device; guests have their own.
    :ivar ports: What devices that were attached sit in; ``None`` for those that need no port.
    :ivar repairing: What is there already counts as made by the step that shall make it.
    """

    host: Path = ROOT
    guests: Path | None = None
    deadline: float = DEADLINE
    ports: dict[UUID, str | None] = field(default_factory=dict)
    repairing: bool = False
    _held: tuple[float, Holders] | None = field(default=None, repr=False)

    @property
    def machine(self) -> Machine:
        """The handle of the host."""
        return machine_of(self.host)

    def held(self, uuid: UUID) -> tuple[Holder, ...]:
        """Who has an mdev open.

        It is looked up for many steps at once. That nobody has it is believed for a moment; that
        somebody has it is not: he may have let go of it since.
        """
        now = time.monotonic()
        if self._held is None or now - self._held[0] > _HELD_SECONDS or self._held[1].of(uuid):
            self._held = (
                now,
                read_holders(self.machine, sysfs.read_host(self.machine, types=False).mdevs),
            )
        return self._held[1].of(uuid)
