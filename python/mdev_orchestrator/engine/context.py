# SPDX-License-Identifier: GPL-2.0-or-later
"""What steps act on, and what one raises of which nobody knows the outcome."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from uuid import UUID

from mdev_orchestrator.errors import DeadlineError
from mdev_orchestrator.host import sysfs
from mdev_orchestrator.host.holders import Holder, Holders, holders
from mdev_orchestrator.host.sysfs import ROOT
from mdev_orchestrator.system.writer import (
    FINE,
    Batch,
    Separately,
    Writer,
    Writes,
    write_apart,
    write_or_kill,
)

DEADLINE = 30.0
"""Seconds for one device to be made or removed."""
_HELD_SECONDS = 0.5
"""How old an answer about who has what open may be."""


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
    write: Writer = write_apart
    start: Writer = write_or_kill
    ports: dict[UUID, str | None] = field(default_factory=dict)
    repairing: bool = False
    _held: tuple[float, Holders] | None = field(default=None, repr=False)

    def batch(
        self,
        lines: Sequence[tuple[str, bytes]],
        told: Callable[[int, int], None],
        fine: frozenset[int] = FINE,
    ) -> Writes:
        """Several writes, by ``write`` or as it would make them."""
        make = Batch if self.write is write_apart else partial(Separately, self.write)
        return make(lines, told, fine)

    def held(self, uuid: UUID) -> tuple[Holder, ...]:
        """Who has an mdev open.

        It is looked up for many steps at once. That nobody has it is believed for a moment; that
        somebody has it is not: he may have let go of it since.
        """
        now = time.monotonic()
        if self._held is None or now - self._held[0] > _HELD_SECONDS or self._held[1].of(uuid):
            self._held = now, holders(sysfs.scan(self.host, types=False).mdevs, self.host)
        return self._held[1].of(uuid)
