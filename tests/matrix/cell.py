# SPDX-License-Identifier: GPL-2.0-or-later
"""One cell of the tables: a QEMU, the driver in one of its ways to start, and fresh mdevs."""

from __future__ import annotations

import contextlib
from uuid import uuid4

from cells import Value
from guests import GuestTest

from lab import vfio
from matrix import machines
from matrix.machines import Direct, Machine, Orchestrated, Version

#: How the driver starts a group: in the first open, only when it is told to, or in each open
#: because it has neither groups nor the file to be told by.
DRIVERS = {
    "implicit": {"implicit_start": 1, "has_online": 1},
    "explicit": {"implicit_start": 0, "has_online": 1},
    "no-online": {"implicit_start": 1, "has_online": 0},
}
QEMUS = (machines.STOCK, *machines.PATCHED)
GROUPING: tuple[Value, ...] = ("implicit", "explicit")


class Cell(GuestTest):
    """A test in one cell, whose columns are ``driver`` and, unless it asks for none, ``qemu``.

    :cvar links: Links that a parent has.
    :ivar grouped: Whether the driver has start groups, and says in sysfs what is online.
    """

    links = 3
    driver: str
    grouped: bool
    version: Version

    def setUp(self) -> None:
        super().setUp()
        self._cell = contextlib.ExitStack()
        self.driver = self.params.get("driver")
        self.grouped = self.driver != "no-online"
        if name := self.params.get("qemu"):
            found = machines.versions().get(name)
            if found is None:
                self.cancel(f"MDO_TEST_QEMU names no QEMU {name}")
            self.version = found
        self._cell.enter_context(vfio.loaded(links=self.links, **DRIVERS[self.driver]))
        self.make = self._cell.enter_context(vfio.factory())

    def tearDown(self) -> None:
        try:
            self._cell.close()
        finally:
            super().tearDown()

    def group(self, count: int) -> list[str]:
        """Fresh mdevs in one start group, if they are more than one and the driver knows groups."""
        return self.make(count, str(uuid4()) if count > 1 and self.grouped else "")

    def cost(self, count: int) -> int:
        """Links that a group of so many takes."""
        return count * (count - 1) // 2 if self.grouped else 0

    @property
    def by_launcher(self) -> bool:
        """Whether the launcher of QEMU has to start its groups, and to stop them."""
        return self.driver == "explicit" and not self.version.patched

    def start(self, *uuids: str, extra: tuple[str, ...] = ()) -> Machine:
        """The cell's QEMU, launched in the way in which its groups are started."""
        kind = Orchestrated if self.by_launcher else Direct
        return kind(self.version, *uuids, extra=extra)
