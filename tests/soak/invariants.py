# SPDX-License-Identifier: GPL-2.0-or-later
"""What must be true of the machine after every move, whatever the move was and however it ended."""

from __future__ import annotations

import re
from dataclasses import dataclass
from uuid import UUID

from campaign import world
from campaign.world import Foreign, Look, Observed
from lab import vfio
from mdev_orchestrator.model import Mdev, Parent, StartGroup
from mdev_orchestrator.qemu import process

COUNT = 12
"""Invariants that :meth:`State.broken` checks."""


@dataclass(frozen=True)
class State:
    """The machine at one moment."""

    others: Foreign
    observed: Observed
    look: Look

    @classmethod
    def now(cls, others: Foreign) -> State:
        observed = Observed.now()
        return cls(others, observed, world.look(others, observed))

    # ---- what is there --------------------------------------------------------------------------

    @property
    def guests(self) -> tuple[process.RunningGuest, ...]:
        return self.observed.guests

    @property
    def ours(self) -> dict[str, Mdev]:
        """All devices that are not foreign."""
        foreign = set(self.others.uuids)
        return {str(m.uuid): m for m in self.observed.host.mdevs if str(m.uuid) not in foreign}

    @property
    def bare(self) -> list[str]:
        """Our devices that no spec asked for."""
        return sorted(str(d.uuid) for d in self.observed.managed.devices.values() if d.spec is None)

    @property
    def idle(self) -> list[str]:
        """Those of them that no process has open."""
        return [uuid for uuid in self.bare if not self.observed.held.of(UUID(uuid))]

    def held_by(self, guest: str) -> list[str]:
        """What a guest has."""
        held = self.observed.held
        return sorted(
            uuid
            for uuid, mdev in self.ours.items()
            if any(holder.guest == guest for holder in held.of(mdev.uuid))
        )

    @property
    def running(self) -> set[str]:
        return {guest.name for guest in self.guests if guest.alive}

    @property
    def gone(self) -> set[str]:
        """Guests whose QEMU has ended, with their directory."""
        return {guest.name for guest in self.guests if not guest.alive}

    @property
    def of_spec(self) -> set[str]:
        """Guests that a spec asked for."""
        return set(self.observed.managed.guests)

    @property
    def spec(self) -> bool:
        return bool(self.observed.managed.specs)

    def left(self, type_: str) -> int:
        """How many more of a type there can be."""
        types = (one for parent in self.observed.host.parents for one in parent.types)
        return next(one.available_instances or 0 for one in types if one.id == type_)

    def with_group(self, uuid: str) -> list[str]:
        """A device and all others of its start group."""
        host = self.observed.host
        mdev = host.find(UUID(uuid))
        return [] if mdev is None else [str(one) for one in host.group_of(mdev).members]

    # ---- what must be ---------------------------------------------------------------------------

    def broken(self, killed: set[str], before: Look) -> list[str]:
        """Invariants that do not hold, each in one line.

        :param killed: Guests that the soak itself has killed.
        :param before: How the machine was when nothing of ours was on it.
        """
        return [*self._of_the_journal(killed), *self._of_the_kernel(), *self._of_others(before)]

    def _of_the_journal(self, killed: set[str]) -> list[str]:
        wrong = []
        ours, managed = self.ours, {str(d.uuid): d for d in self.observed.managed.devices.values()}
        wrong += [
            f"{uuid} is left over: it is not in the journal" for uuid in ours.keys() - managed
        ]
        wrong += [f"{uuid} is lost: it is only in the journal" for uuid in managed.keys() - ours]
        for uuid in ours.keys() & managed.keys():
            wanted = (managed[uuid].parent, managed[uuid].type, managed[uuid].group)
            found = (ours[uuid].parent, ours[uuid].type_id, ours[uuid].group_uuid)
            if wanted != found:
                wrong.append(f"{uuid} is {found}, the journal says {wanted}")
        for what in ("open runs", "claims"):
            wrong += [f"{what}: {self.look[what]}"] if self.look[what] else []
        lost = self.of_spec - self.running - killed
        wrong += [f"guest {name} is in the journal and does not run" for name in sorted(lost)]
        wrong += [f"guest {g.name} is {g.state}: {g.damage}" for g in self.guests if g.damage]
        return wrong

    def _of_the_kernel(self) -> list[str]:
        host, held = self.observed.host, self.observed.held
        wrong = []
        for parent in host.parents:
            mdevs = [mdev for mdev in host.mdevs if mdev.parent == parent.name]
            wrong += _counts(parent, mdevs)
        for group in host.groups:
            users = {holder.pid for uuid in group.members for holder in held.of(uuid)}
            if group.online is not None and group.online != bool(users):
                state = "online" if group.online else "offline"
                wrong.append(f"{group.label} is {state}, and open in {sorted(users)}")
            if len(users) > 1:
                wrong.append(f"{group.label} has several users: {sorted(users)}")
        for name in ("grid0", "igd0"):
            used = sum(_links(group) for group in host.groups if group.parent == name)
            free = int((vfio.PARENTS / name / "p2p_links").read_text()) - used
            if vfio.links(name) != free:
                wrong.append(f"{name} has {vfio.links(name)} links left; it should be {free}")
        return wrong

    def _of_others(self, before: Look) -> list[str]:
        wrong = []
        if self.look["foreign"] != before["foreign"]:
            wrong.append(f"foreign: {before['foreign']} became {self.look['foreign']}")
        if self.look["strays"]:
            wrong.append(f"processes that are not meant to be there: {self.look['strays']}")
        return wrong


def _links(group: StartGroup) -> int:
    members = len(group.members)
    return members * (members - 1) // 2 if group.online else 0


def _counts(parent: Parent, mdevs: list[Mdev]) -> list[str]:
    """What an mvgpu parent should have left: each type so much as the framebuffer allows."""
    kinds = {type_.id: _numbers(type_.description or "") for type_ in parent.types}
    if not all(kinds.values()) or not parent.name.startswith(("grid", "igd")):
        return []
    grid = parent.name.startswith("grid")
    pool = (8192 if grid else 1024) - sum(kinds[mdev.type_id or ""][0] for mdev in mdevs)
    used = {mdev.type_id for mdev in mdevs}
    wrong = []
    for type_ in parent.types:
        size, most = kinds[type_.id]
        active = sum(mdev.type_id == type_.id for mdev in mdevs)
        left = 0 if grid and used - {type_.id} else min(most - active, pool // size)
        if type_.available_instances != left:
            found = type_.available_instances
            wrong.append(f"{parent.name}/{type_.id} has {found} left; it should be {left}")
    return wrong


def _numbers(description: str) -> tuple[int, int] | tuple[()]:
    """MiB of framebuffer, and how many there can be."""
    found = re.search(r"framebuffer=(\d+)M.*max_instance=(\d+)", description)
    return (int(found[1]), int(found[2])) if found else ()
