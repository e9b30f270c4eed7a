# SPDX-License-Identifier: GPL-2.0-or-later
"""Opens, closes and kills at random: no link lost, no group stuck, nothing for the kernel to say.

Every move is checked against a small model of what each QEMU has. The seed is printed;
MDO_TEST_SEED plays a schedule again, MDO_TEST_MOVES makes it longer.
"""

from __future__ import annotations

import os
import random
import signal
from dataclasses import dataclass, field
from uuid import uuid4

from cells import cells
from guests import refused

from lab.vfio import get, links
from matrix import checks
from matrix.cell import GROUPING, Cell
from matrix.machines import PATCHED, Direct, QmpError, Version, versions

MOVES = int(os.environ.get("MDO_TEST_MOVES", "500"))
QEMUS = 3
SIZES = (3, 3, 2)
LINKS = 6  # one less than all groups together need
ENDS = ("quit", "SIGTERM", "SIGKILL", "SIGABRT")


@dataclass
class Group:
    members: list[str]
    owner: int | None = None
    held: set[str] = field(default_factory=set)

    @property
    def cost(self) -> int:
        return len(self.members) * (len(self.members) - 1) // 2


class Schedule:
    """Several QEMUs, several groups, and what each has by the rules of the ABI."""

    def __init__(
        self, rng: random.Random, groups: list[Group], known: list[Version], *, explicit: bool
    ) -> None:
        self.rng = rng
        self.groups = groups
        self.known = known
        self.explicit = explicit
        self.qemus: dict[int, Direct] = {}
        self.done: dict[str, int] = {}
        self.trace: list[str] = []

    def note(self, what: str, text: str = "") -> None:
        self.done[what] = self.done.get(what, 0) + 1
        self.trace.append(f"{what} {text}")

    def free(self) -> int:
        return LINKS - sum(group.cost for group in self.groups if group.held)

    def move(self) -> None:
        empty = set(range(QEMUS)) - set(self.qemus)
        deed = self.rng.random()
        if not self.qemus or (empty and deed < 0.25):
            self.launch(self.rng.choice(sorted(empty)))
        elif deed < 0.62:
            self.plug(self.rng.choice(sorted(self.qemus)))
        elif deed < 0.93:
            self.unplug(self.rng.choice(sorted(self.qemus)))
        else:
            self.end(self.rng.choice(sorted(self.qemus)), self.rng.choice(ENDS))

    def launch(self, slot: int) -> None:
        """A new QEMU, with nothing or with a whole group of its own."""
        version = self.rng.choice(self.known)
        group = self.rng.choice([None, None, None, *self.groups])
        cold = group is not None and not group.held and group.cost <= self.free()
        uuids = group.members if cold and group else []
        qemu = Direct(version, *uuids)
        self.qemus[slot] = qemu
        if uuids and group:
            group.owner, group.held = slot, set(uuids)
        self.note("launch", f"{slot} {version.name} {len(uuids)}")

    def plug(self, slot: int) -> None:
        group = self.rng.choice(self.groups)
        left = [uuid for uuid in group.members if uuid not in group.held]
        if not left:
            return
        uuid = self.rng.choice(left)
        expected = ""
        if group.held and group.owner != slot:
            expected = "belongs to process"
        elif not group.held and group.cost > self.free():
            expected = "No space left"
        if expected:
            with refused(QmpError, expected):
                self.qemus[slot].plug(uuid)
            self.note(f"refused: {expected}", str(slot))
        else:
            self.qemus[slot].plug(uuid)
            group.owner = slot
            group.held.add(uuid)
            self.note("open", f"{slot} {uuid}")

    def unplug(self, slot: int) -> None:
        # what was there at the start is in a slot that only a booted guest could power off
        held = [  # in an order that the seed decides, which that of UUIDs is not
            uuid
            for group in self.groups
            if group.owner == slot
            for uuid in group.members
            if uuid in group.held - self.qemus[slot].cold
        ]
        if not held:
            return
        uuid = self.rng.choice(held)
        self.qemus[slot].unplug(uuid)
        (group,) = [group for group in self.groups if uuid in group.held]
        group.held.discard(uuid)
        self.note("close", f"{slot} {uuid}")

    def end(self, slot: int, how: str) -> None:
        qemu = self.qemus.pop(slot)
        if how == "quit":
            qemu.quit()
        else:
            qemu.signal(getattr(signal, how))
        qemu.ended()
        qemu.kill()  # closes what the test has of it
        for group in self.groups:
            if group.owner == slot and group.held:
                if self.explicit and how in {"SIGKILL", "SIGABRT"}:
                    assert get(group.members[0], "online") == "1"
                    qemu.reclaim(group.members[0])
                group.held.clear()
        self.note(f"end by {how}", str(slot))

    def check(self) -> None:
        """What the driver shows is what the model says."""
        for group in self.groups:
            if not group.held:
                group.owner = None
            states = {get(uuid, "online") for uuid in group.members}
            assert states == {"1" if group.held else "0"}, (states, group)
            pid = self.qemus[group.owner].pid if group.owner is not None else 0
            owners = {get(uuid, "group_owner") for uuid in group.members}
            assert owners == {str(pid)}, (owners, group)
        assert links() == self.free(), (links(), self.groups)


class RandomSchedule(Cell):
    links = LINKS

    @cells(driver=GROUPING)
    def test_opens_closes_and_kills(self) -> None:
        seed = int(os.environ.get("MDO_TEST_SEED") or random.SystemRandom().randrange(1 << 32))
        self.log.info("MDO_TEST_SEED=%d plays this schedule again", seed)
        known = [found for name, found in versions().items() if name in PATCHED]
        if not known:
            self.cancel("MDO_TEST_QEMU names no patched QEMU")
        groups = [Group(self.make(size, str(uuid4()))) for size in SIZES]
        rng = random.Random(seed)  # noqa: S311
        schedule = Schedule(rng, groups, known, explicit=self.driver == "explicit")
        try:
            self.play(schedule)
        finally:
            for qemu in schedule.qemus.values():
                qemu.kill()
            for group in groups:
                Direct.reclaim(*group.members)
            self.log.info("%s\nmoves: %s", "\n".join(schedule.trace[-40:]), schedule.done)

    def play(self, schedule: Schedule) -> None:
        while len(schedule.trace) < MOVES:
            schedule.move()
            schedule.check()
        for slot in sorted(schedule.qemus):
            schedule.end(slot, schedule.rng.choice(ENDS))
            schedule.check()
        for group in schedule.groups:  # nothing is stuck
            checks.given_back(group.members, LINKS)
