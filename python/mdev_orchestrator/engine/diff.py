# SPDX-License-Identifier: GPL-2.0-or-later
"""From what a spec asks for, and what there is, to the steps between. Pure: no I/O.

How a request finds its devices again
=====================================

A spec asks for kinds of devices, the journal knows single ones. A device of ours stays with a
request of the same guest or pool when it is what the request asks for: by its UUID where one is
given, else the one that was made for the very same request, else any that will do. What no request
wants any more goes, and what is missing is planned (:mod:`..capacity.planner`) and made. A device
that is ours and not there, after a reboot for instance, is made again as it was.

In which order
==============

What is new comes first and what is old goes last, so that a change that fails has touched nothing
that works. Only when the new does not fit beside the old, or has its UUID, the old goes first.

What a running guest takes
==========================

Devices come and go by hotplug. Everything else about a guest, and more devices than it has free
ports for, takes a restart, which has to be asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from graphlib import TopologicalSorter
from typing import Literal
from uuid import UUID, uuid4

import msgspec
from msgspec import Struct, field
from msgspec.structs import replace

from mdev_orchestrator.capacity.attributes import facts_of, meets
from mdev_orchestrator.capacity.models import ParentCapacity, survey
from mdev_orchestrator.capacity.planner import (
    Placement,
    Plan,
    Policy,
    Request,
)
from mdev_orchestrator.capacity.planner import plan as make_plan
from mdev_orchestrator.engine.device_ops import is_same
from mdev_orchestrator.engine.executor import PlannedStep
from mdev_orchestrator.engine.records import Change, DeviceRecord, GuestRecord
from mdev_orchestrator.engine.snapshot import ObservedGuest, ObservedState
from mdev_orchestrator.engine.steps import AnyStep, Attach, Create, Detach, Launch, Remove, Stop
from mdev_orchestrator.errors import CapacityError, RequestError
from mdev_orchestrator.interop.mdevctl import complete, is_of
from mdev_orchestrator.model import Host, Mdev, MdevType, is_uuid
from mdev_orchestrator.qemu.hotplug import ATTACH_SECONDS, DETACH_SECONDS
from mdev_orchestrator.qemu.process import START_SECONDS, STOP_SECONDS
from mdev_orchestrator.spec import (
    Document,
    GuestConfig,
    GuestMdev,
    Place,
    Pool,
    key,
    parse,
    read_guest,
    to_json,
)

Survey = Callable[[Host, frozenset[UUID]], tuple[ParentCapacity, ...]]
"""What parents can take, when some devices are removed before."""


class Existing(Struct, frozen=True):
    """A device that stays."""

    request: str
    uuid: UUID
    parent: str
    type_id: str


class Changes(Struct, frozen=True):
    """What is to be done.

    :ivar name: The spec's name.
    :ivar steps: In an order in which they could be done one by one.
    :ivar restarts: The guests that must be restarted, and why.
    :ivar change: What becomes ours, or is not any more, without anything being done.
    :ivar plan: Where new devices go, by the key of their request, and what remains.
    :ivar existing: The devices that stay.
    """

    name: str
    steps: tuple[PlannedStep, ...] = ()
    restarts: Mapping[str, str] = field(default_factory=dict)
    change: Change = field(default_factory=Change)
    plan: Plan = field(default_factory=lambda: make_plan([], []))
    existing: tuple[Existing, ...] = ()

    def __repr__(self) -> str:
        """Short: asyncio.run puts what it returns into words, and most of that is the steps."""
        return f"<Changes of {self.name!r}: {len(self.steps)} steps>"

    @property
    def nothing(self) -> bool:
        """Whether all is as asked for, and is known to be."""
        return not (self.steps or self.change.devices or self.change.guests)


class MisfitError(CapacityError):
    """The devices do not fit; the plan tells what would, and why the others do not."""

    def __init__(self, error: RequestError, plan: Plan, existing: tuple[Existing, ...]) -> None:
        super().__init__(error.message, error.hint)
        self.plan = plan
        self.existing = existing


def diff(
    document: Document,
    seen: ObservedState,
    *,
    policy: Policy = "pack",
    force: bool = False,
    deadline: float | None = None,
    capacity: Survey = survey,
    new_uuid: Callable[[], UUID] = uuid4,
) -> Changes:
    """Find the steps that make a spec true.

    :param force: End guests that do not power down in time.
    :param deadline: Seconds for each step; each kind of step has a default.
    :raise RequestError: With file and line: the spec asks for what belongs to another one.
    :raise MisfitError: The devices do not fit, not even in place of those that go.
    """
    return _Diff(document, seen, policy, force, deadline, capacity, new_uuid).changes()


def without(
    name: str, seen: ObservedState, *, force: bool = False, deadline: float = STOP_SECONDS
) -> Changes:
    """Find the steps that remove all that a spec has brought: guests first, then devices.

    :param deadline: Seconds for a guest to power down.
    """
    guests = [guest for guest in seen.managed.guests.values() if guest.spec == name]
    owners = {f"guest:{guest.name}" for guest in guests}
    stops: list[PlannedStep] = []
    for guest in guests:
        running = seen.running.get(guest.name)
        if running is not None and running.uuid == guest.uuid:
            stops.append(
                PlannedStep(
                    Stop(guest=guest, devices=running.mdevs, force=force, deadline=deadline)
                )
            )
    needs = tuple(range(len(stops)))
    mine = [d for d in seen.managed.devices.values() if d.spec == name or d.owner in owners]
    removes = [PlannedStep(Remove(device=d), needs) for d in mine if _is_here(d, seen.host)]
    gone = {d.uuid: None for d in mine if not _is_here(d, seen.host)}
    stopped = {planned.step.guest.name for planned in stops if isinstance(planned.step, Stop)}
    ended = {guest.name: None for guest in guests if guest.name not in stopped}
    return Changes(name, (*stops, *removes), change=Change(devices=gone, guests=ended))


def _is_here(device: DeviceRecord, host: Host) -> bool:
    found = host.find(device.uuid)
    return found is not None and is_same(found, device)


class _Want(Struct, eq=False):
    """One device that is asked for.

    :ivar asked: With what mdevctl knows of it.
    :ivar text: As the spec has it.
    :ivar bare: The spec says no more than the UUID.
    :ivar row: The device of ours that it is or was.
    :ivar borrowed: It is there and somebody else's.
    :ivar device: What it is or will be; ``None`` for a borrowed one.
    """

    place: Place
    owner: str
    asked: GuestMdev | Pool
    text: str
    bare: bool
    row: DeviceRecord | None = None
    borrowed: UUID | None = None
    device: DeviceRecord | None = None

    @property
    def label(self) -> str | None:
        return self.asked.group if isinstance(self.asked, GuestMdev) else None

    @property
    def uuid(self) -> UUID:
        if self.borrowed is not None:
            return self.borrowed
        if self.device is None:
            raise AssertionError("a device that was not placed")
        return self.device.uuid


def _may_have(want: _Want, row: DeviceRecord) -> bool:
    """Whether a device is its owner's already, or was adopted and is nobody's yet."""
    return row.owner == want.owner or (row.adopted and row.spec is None and not row.owner)


class _Diff:
    def __init__(
        self,
        document: Document,
        seen: ObservedState,
        policy: Policy,
        force: bool,
        deadline: float | None,
        capacity: Survey,
        new_uuid: Callable[[], UUID],
    ) -> None:
        self.document = document
        self.name = document.name
        self.seen = seen
        self.policy = policy
        self.force = force
        self.deadline = deadline
        self.capacity = capacity
        self.new_uuid = new_uuid
        self.types = {
            (type_.parent, type_.id): type_ for p in seen.host.parents for type_ in p.types
        }
        filled = complete(document, seen.defined, seen.host).spec.devices()
        self.wants = [
            _Want(place, _owner(asked, owner), asked, _text(said), _is_bare(said))
            for (place, owner, said), (_, _, asked) in zip(
                document.spec.devices(), filled, strict=True
            )
            for _ in range(asked.count)
        ]
        self.named = {want.asked.uuid for want in self.wants}
        owners = {want.owner for want in self.wants}
        self.rows = {
            d.uuid: d
            for d in seen.managed.devices.values()
            if d.spec == self.name or (d.spec is None and (d.owner in owners or d.adopted))
        }
        self.restarts: dict[str, str] = {}
        self.devices: dict[UUID, DeviceRecord | None] = {}
        self.guests: dict[str, GuestRecord | None] = {}
        self.made: set[UUID] = set()
        self.leaving: frozenset[UUID] = frozenset()
        self.asked: dict[str, list[_Want]] = {}

    def changes(self) -> Changes:
        self._check_guests()
        self._match()
        going = self._going()
        self.leaving = leaving = frozenset(d.uuid for d in going)
        missing = [want for want in self.wants if want.device is None and want.borrowed is None]
        plan, in_place = self._place(missing, leaving)
        self._make(missing, plan)
        old_first = in_place or not leaving.isdisjoint(
            want.device.uuid for want in missing if want.device is not None
        )
        steps = self._order(going, missing, old_first=old_first)
        return Changes(
            self.name,
            steps,
            self.restarts,
            Change(devices=self.devices, guests=self.guests),
            self._shown(plan),
            tuple(self._existing()),
        )

    # ---- devices --------------------------------------------------------------------------------

    def _match(self) -> None:
        """Give each want the device of ours that it is or was."""
        free = dict(self.rows)
        rules: tuple[Callable[[_Want, DeviceRecord], bool], ...] = (
            lambda want, row: want.asked.uuid == row.uuid,
            lambda want, row: row.want == want.text and _is_here(row, self.seen.host),
            lambda want, row: row.want == want.text,
            lambda _, row: _is_here(row, self.seen.host),
        )
        for rule in rules:
            for want in self.wants:
                if want.row is not None:
                    continue
                for row in free.values():
                    if _may_have(want, row) and rule(want, row) and self._will_do(want, row):
                        want.row = free.pop(row.uuid)
                        break
        for want in self.wants:
            self._settle(want)

    def _will_do(self, want: _Want, row: DeviceRecord) -> bool:
        """Whether a device of ours is what is asked for, if it is there or can be made again."""
        asked = want.asked
        type_ = self.types.get((row.parent, row.type))
        found = self.seen.host.find(row.uuid)
        return (
            type_ is not None
            and (asked.uuid == row.uuid or (asked.uuid is None and row.uuid not in self.named))
            and asked.type in {None, row.type}
            and asked.parent in {None, row.parent}
            and self._is_set_up(want, row)
            and meets(facts_of(type_), asked.conditions)
            # under the same UUID there may be somebody else's device, or one that is on its way out
            and (found is None or (is_same(found, row) and found.type_id is not None))
        )

    def _is_set_up(self, want: _Want, row: DeviceRecord) -> bool:
        asked = want.asked
        if row.spec is None:  # adopted: what it was asked for as is not known
            same_group = (row.group is None) == (want.label is None)
            return same_group and asked.params in {"", row.params}
        if row.want == want.text and (
            _is_bare(asked) or (want.bare and _is_here(row, self.seen.host))
        ):
            return True  # as mdevctl had defined it; a new definition is for the next time
        return (want.label, asked.params, asked.attributes) == (
            row.label,
            row.params,
            row.attributes,
        )

    def _settle(self, want: _Want) -> None:
        """Take what is there: ours, or by its UUID."""
        host, asked = self.seen.host, want.asked
        if want.row is not None:
            if _is_here(want.row, host):
                want.device = self._ours(want, want.row)
            return
        found = None if asked.uuid is None else host.find(asked.uuid)
        if found is None or found.uuid in self.rows:
            return  # it is to be made, perhaps in the place of one of the same UUID
        type_ = self.types.get((found.parent, found.type_id or ""))
        row = self.seen.managed.devices.get(found.uuid)
        at = (*want.place, "uuid")
        if row is not None and is_same(found, row):
            if row.spec is not None or row.owner:
                raise self.document.fault(
                    at, f"device {found.uuid} belongs to {_whose(row)}", "choose another UUID"
                )
            _check_existing(self.document, want.place, asked, found, type_)
            want.device = self._ours(want, row)
        elif isinstance(asked, GuestMdev) and any(
            is_of(found, definition) for definition in self.seen.defined.get(found.uuid, ())
        ):
            _check_existing(self.document, want.place, asked, found, type_)
            want.borrowed = found.uuid
        else:
            raise self.document.fault(
                at,
                f"device {found.uuid} exists and is not ours",
                f"choose another UUID, or mdo adopt {found.uuid}",
            )

    def _ours(self, want: _Want, row: DeviceRecord) -> DeviceRecord:
        """A device that stays, under the words that the spec has for it now."""
        device = msgspec.structs.replace(
            row,
            spec=self.name,
            owner=want.owner,
            label=want.label,
            want=want.text,
            adopted=False,
        )
        if device != row:
            self.devices[device.uuid] = device
        return device

    def _going(self) -> list[DeviceRecord]:
        """The devices that no want has; those that are not there are only forgotten."""
        kept = {want.row.uuid for want in self.wants if want.row is not None}
        going = []
        for row in self.rows.values():
            if row.uuid in kept or row.spec is None:
                continue
            if _is_here(row, self.seen.host):
                going.append(row)
            else:
                self.devices[row.uuid] = None
        return going

    def _place(self, missing: Sequence[_Want], leaving: frozenset[UUID]) -> tuple[Plan, bool]:
        """Where the missing devices go, and whether only in place of those that go."""
        requests = self._requests(missing)
        host = self.seen.host
        plan = make_plan(requests, self.capacity(host, frozenset()), self.policy)
        if not plan.fits and leaving:
            beside, plan = plan, make_plan(requests, self.capacity(host, leaving), self.policy)
            return self._fitting(plan), plan != beside
        return self._fitting(plan), False

    def _fitting(self, plan: Plan) -> Plan:
        """The plan, or the error that says what does not fit."""
        if plan.fits:
            return plan
        first = plan.shortfalls[0]
        others = len(plan.shortfalls) - 1
        more = f"; {others} more do not fit" if others else ""
        error = self.document.fault(
            self.asked[first.request][0].place,
            f"{first.asked} asked for, {first.placed} fit: {first.reason}{more}",
            first.hint,
        )
        raise MisfitError(error, self._shown(plan), tuple(self._existing()))

    def _shown(self, plan: Plan) -> Plan:
        """A plan under the keys that the spec has."""
        keys = {name: key(wants[0].place) for name, wants in self.asked.items()}
        return replace(
            plan,
            placements=tuple(replace(p, request=keys[p.request]) for p in plan.placements),
            shortfalls=tuple(replace(s, request=keys[s.request]) for s in plan.shortfalls),
        )

    def _requests(self, missing: Sequence[_Want]) -> list[Request]:
        """What is to be placed: all of a table of the spec together, what was lost as it was."""
        homes = self._homes()
        for want in missing:
            again = "" if want.row is None else f" {want.row.uuid}"
            self.asked.setdefault(key(want.place) + again, []).append(want)
        return [self._request(name, wants, homes) for name, wants in self.asked.items()]

    def _homes(self) -> dict[tuple[str, str | None], str]:
        """The parents of groups that have a device already."""
        first: dict[tuple[str, str | None], Mdev] = {}
        for want in self.wants:
            there = want.borrowed or (want.device and want.device.uuid)
            found = self.seen.host.find(there) if there else None
            if found is None or want.label is None:
                continue
            other = first.setdefault((want.owner, want.label), found)
            at = (*want.place, "group")
            if other.parent != found.parent:
                raise self.document.fault(
                    at,
                    f"group {want.label} is across parents: device {other.uuid} is on "
                    f"{other.parent}, {found.uuid} on {found.parent}",
                    "a group is on one parent",
                )
            if found.group_uuid is None or found.group_uuid != other.group_uuid:
                raise self.document.fault(
                    at,
                    f"device {found.uuid} exists and is not in the start group of group "
                    f"{want.label}",
                    "leave its group away, or remove the device: it is created again",
                )
        return {name: mdev.parent for name, mdev in first.items()}

    def _request(
        self, name: str, wants: Sequence[_Want], homes: Mapping[tuple[str, str | None], str]
    ) -> Request:
        want = wants[0]
        asked, row = want.asked, want.row
        if row is None and _is_bare(asked):
            raise self.document.fault(
                (*want.place, "uuid"),
                f"there is no device {asked.uuid}, and nothing says of what type to make it",
                'add type = "…"',
            )
        parent = homes.get((want.owner, want.label), asked.parent)
        if asked.parent not in {None, parent}:
            raise self.document.fault(
                (*want.place, "parent"),
                f"group {want.label} is across parents: it has a device on {parent}",
                "a group is on one parent",
            )
        request = Request(
            key=name,
            type_id=asked.type,
            conditions=asked.conditions,
            count=len(wants),
            group=None if want.label is None else f"{want.owner}/{want.label}",
            parent=parent,
        )
        if row is None:
            return request
        return replace(request, type_id=row.type, conditions=(), parent=row.parent)

    def _make(self, missing: Sequence[_Want], plan: Plan) -> None:
        """Decide what each missing device will be."""
        placed: dict[str, list[Placement]] = {}
        for placement in plan.placements:
            placed.setdefault(placement.request, []).append(placement)
        where_of = {
            want: where
            for name, wants in self.asked.items()
            for want, where in zip(wants, placed[name], strict=True)
        }
        groups = {
            (want.owner, want.label): known.group
            for want in self.wants
            if (known := want.device or want.row) is not None
        }
        for want in missing:
            asked, where = want.asked, where_of[want]
            if want.row is not None:
                self._is_made(self._ours(want, want.row), want)
                continue
            group = None
            if want.label is not None:
                group = groups.get((want.owner, want.label))
                if group is None:
                    group = UUID(want.label) if is_uuid(want.label) else self.new_uuid()
                    groups[want.owner, want.label] = group
            device = DeviceRecord(
                uuid=asked.uuid or self.new_uuid(),
                parent=where.parent,
                type=where.type_id,
                spec=self.name,
                owner=want.owner,
                label=want.label,
                group=group,
                params=asked.params,
                attributes=asked.attributes,
                want=want.text,
            )
            self._is_made(device, want)

    def _is_made(self, device: DeviceRecord, want: _Want) -> None:
        want.device = device
        self.made.add(device.uuid)
        self.devices.pop(device.uuid, None)  # its step says it

    def _existing(self) -> Iterator[Existing]:
        for want in self.wants:
            there = want.borrowed or (want.device and want.device.uuid)
            found = self.seen.host.find(there) if there else None
            if found is not None and found.uuid not in self.made:
                yield Existing(key(want.place), found.uuid, found.parent, found.type_id or "")

    # ---- guests ---------------------------------------------------------------------------------

    def _check_guests(self) -> None:
        """See that no guest of the spec is somebody else's."""
        for number, guest in enumerate(self.document.spec.guests):
            place: Place = ("guest", number, "name")
            row = self.seen.managed.guests.get(guest.name)
            running = self.seen.running.get(guest.name)
            if row is not None and row.spec not in {None, self.name}:
                raise self.document.fault(
                    place,
                    f"guest {guest.name} belongs to spec {row.spec}",
                    f"choose another name, or mdo destroy {row.spec}",
                )
            if running is not None and (row is None or row.uuid != running.uuid):
                raise self.document.fault(
                    place,
                    f"guest {guest.name} runs already, and was not started by a spec",
                    f"mdo guest stop {guest.name}, mdo adopt {guest.name}, or choose another name",
                )

    def _turns(self) -> list[_Turn]:
        """What each guest of the spec needs."""
        turns = []
        for guest in self.document.spec.guests:
            owner = f"guest:{guest.name}"
            devices = tuple(want.uuid for want in self.wants if want.owner == owner)
            row = self.seen.managed.guests.get(guest.name)
            own = GuestRecord(
                name=guest.name,
                uuid=guest.uuid or (row.uuid if row is not None else self.new_uuid()),
                spec=self.name,
                definition=_definition(guest),
            )
            turn = _Turn(own, devices, row, self.seen.running.get(guest.name))
            if row is not None and turn.running is not None:
                has = set(turn.running.mdevs) - self.leaving
                turn.new = [uuid for uuid in devices if uuid not in has]
                turn.old = self._given_up(turn.running, owner, devices)
                turn.reason = _restart_reason(row, turn, guest)
                if turn.reason:
                    self.restarts[guest.name] = turn.reason
                elif own != row:
                    self.guests[own.name] = own
            turns.append(turn)
        return turns

    def _given_up(self, running: ObservedGuest, owner: str, devices: Sequence[UUID]) -> list[UUID]:
        """What a guest has from this spec and shall not have any more."""
        spec = self.seen.managed.specs.get(self.name)
        named = set() if spec is None else _named_before(spec.text, owner)
        return [
            uuid
            for uuid in running.mdevs
            if (uuid not in devices or uuid in self.leaving)
            and (uuid in named or (uuid in self.rows and self.rows[uuid].owner == owner))
        ]

    def _dropped(self) -> list[GuestRecord]:
        """The guests that the spec does not have any more; those that have ended are forgotten."""
        asked = {guest.name for guest in self.document.spec.guests}
        dropped = []
        for row in self.seen.managed.guests.values():
            if row.spec != self.name or row.name in asked:
                continue
            running = self.seen.running.get(row.name)
            if running is not None and running.uuid == row.uuid:
                dropped.append(row)
            else:
                self.guests[row.name] = None
        return dropped

    # ---- order ----------------------------------------------------------------------------------

    def _order(
        self, going: Sequence[DeviceRecord], missing: Sequence[_Want], *, old_first: bool
    ) -> tuple[PlannedStep, ...]:
        """All steps, each after those that it needs."""
        turns, dropped = self._turns(), self._dropped()
        creates = _creates(missing)
        stops = {row.name: _Node(self._stop(row)) for row in dropped}
        nodes = [*creates.values(), *stops.values()]
        fresh, old = list(creates.values()), list(stops.values())
        detaches: dict[UUID, _Node] = {}
        for turn in turns:
            own = turn.own
            made = [creates[uuid] for uuid in turn.devices if uuid in creates]
            if turn.running is None or turn.row is None:
                launch = Launch(
                    guest=own,
                    devices=turn.devices,
                    kept=turn.row is not None,
                    deadline=self._seconds(START_SECONDS),
                )
                fresh.append(_Node(launch, made))
                nodes.append(fresh[-1])
            elif turn.reason:
                # a guest that must stop does so when all is there that it is to come back with
                stop = _Node(self._stop(turn.row, kept=True), [] if old_first else [*fresh])
                stops[own.name] = stop
                start = Launch(
                    guest=own,
                    devices=turn.devices,
                    kept=True,
                    deadline=self._seconds(START_SECONDS),
                )
                nodes += [stop, _Node(start, [stop, *made])]
            else:
                crowded = len(turn.new) > turn.running.free_ports
                away = _chain(
                    Detach(guest=own, uuid=uuid, deadline=self._seconds(DETACH_SECONDS))
                    for uuid in turn.old
                )
                plugs = _chain(
                    Attach(guest=own, uuid=uuid, deadline=self._seconds(ATTACH_SECONDS))
                    for uuid in turn.new
                )
                for node, uuid in zip(plugs, turn.new, strict=True):
                    node.needs += [creates[uuid]] if uuid in creates else []
                if crowded:
                    plugs[0].needs += away
                    away[0].needs += [] if old_first else made
                else:
                    fresh += plugs
                    old += away
                detaches |= zip(turn.old, away, strict=True)
                nodes += [*away, *plugs]
        for row in going:
            name = row.owner.removeprefix("guest:")
            before = [node for node in (detaches.get(row.uuid), stops.get(name)) if node]
            old.append(_Node(Remove(device=row), before))
            nodes.append(old[-1])
        if old_first:
            for node in creates.values():
                node.needs += [other for other in old if isinstance(other.step, Remove)]
        else:
            for node in old:
                node.needs += fresh
        return _numbered(nodes)

    def _seconds(self, default: float) -> float:
        return default if self.deadline is None else self.deadline

    def _stop(self, row: GuestRecord, *, kept: bool = False) -> Stop:
        running = self.seen.running[row.name]
        return Stop(
            guest=row,
            devices=running.mdevs,
            kept=kept,
            force=self.force,
            deadline=self._seconds(STOP_SECONDS),
        )


class _Turn(Struct, eq=False):
    """What one guest of the spec needs.

    :ivar row: As it is ours now.
    :ivar new: Devices to be attached.
    :ivar old: Devices to be detached.
    :ivar reason: Why it must be restarted instead.
    """

    own: GuestRecord
    devices: tuple[UUID, ...]
    row: GuestRecord | None
    running: ObservedGuest | None
    new: list[UUID] = field(default_factory=list)
    old: list[UUID] = field(default_factory=list)
    reason: str = ""


class _Node(Struct, eq=False):
    step: AnyStep
    needs: list[_Node] = field(default_factory=list)


def _creates(missing: Sequence[_Want]) -> dict[UUID, _Node]:
    made: dict[UUID, _Node] = {}
    last: dict[tuple[str, str | None], _Node] = {}
    for want in missing:
        if want.device is None:
            raise AssertionError("a device that was not placed")
        node = _Node(Create(device=want.device, kept=want.row is not None))
        if want.label is not None:
            # drivers number the members of a group in the order in which they join
            if before := last.get((want.owner, want.label)):
                node.needs.append(before)
            last[want.owner, want.label] = node
        made[want.device.uuid] = node
    return made


def _chain(steps: Iterable[AnyStep]) -> list[_Node]:
    """Steps that share a guest's monitor: one after the other."""
    nodes: list[_Node] = []
    for step in steps:
        nodes.append(_Node(step, nodes[-1:]))
    return nodes


def _numbered(nodes: Sequence[_Node]) -> tuple[PlannedStep, ...]:
    order = list(TopologicalSorter({node: node.needs for node in nodes}).static_order())
    number = {node: index for index, node in enumerate(order)}
    return tuple(
        PlannedStep(node.step, tuple(sorted({number[need] for need in node.needs})))
        for node in order
    )


def _check_existing(
    document: Document,
    place: Place,
    devices: GuestMdev | Pool,
    mdev: Mdev,
    type_: MdevType | None,
) -> None:
    """See that a device that is named by its UUID is what the spec says."""
    what = f"device {mdev.uuid}"
    if mdev.type_id is None:
        raise document.fault((*place, "uuid"), f"{what} is being removed", "wait until it is gone")
    if devices.type not in {None, mdev.type_id}:
        raise document.fault(
            (*place, "type"), f"{what} exists as {mdev.type_id}, not as {devices.type}"
        )
    if devices.parent not in {None, mdev.parent}:
        raise document.fault(
            (*place, "parent"), f"{what} exists on {mdev.parent}, not on {devices.parent}"
        )
    if devices.conditions and not (type_ and meets(facts_of(type_), devices.conditions)):
        words = ", ".join(f"{name} {condition}" for name, condition in devices.conditions)
        raise document.fault(place, f"{what} exists as {mdev.type_id}, which has not {words}")


def _owner(asked: GuestMdev | Pool, name: str) -> str:
    kind: Literal["guest", "pool"] = "guest" if isinstance(asked, GuestMdev) else "pool"
    return f"{kind}:{name}"


def _is_bare(said: GuestMdev | Pool) -> bool:
    return said.type is None and not said.conditions


def _text(said: GuestMdev | Pool) -> str:
    return to_json(msgspec.structs.replace(said, count=1))


def _whose(row: DeviceRecord) -> str:
    words = [row.owner.replace(":", " ")] if row.owner else []
    return " of ".join([*words, f"spec {row.spec}"] if row.spec is not None else words)


def _definition(guest: GuestConfig) -> str:
    """A guest without its devices, and without its UUID, which has a place of its own."""
    return to_json(msgspec.structs.replace(guest, mdevs=(), uuid=None))


def _restart_reason(row: GuestRecord, turn: _Turn, guest: GuestConfig) -> str:
    """Why a guest that runs must be restarted; empty if it need not."""
    if turn.own.uuid != row.uuid:
        return f"its uuid changes from {row.uuid} to {turn.own.uuid}"
    if row.definition and turn.own.definition != row.definition:  # else it was adopted
        before = read_guest(row.definition)
        changed = [
            f"{name} changes from {_shown(getattr(before, name))} to {_shown(getattr(guest, name))}"
            for name in GuestConfig.__struct_fields__
            if name not in {"mdevs", "uuid"} and getattr(before, name) != getattr(guest, name)
        ]
        if changed:
            return ", ".join(changed)
    free = (turn.running.free_ports if turn.running is not None else 0) + len(turn.old)
    if len(turn.new) > free:
        return f"{len(turn.new)} devices are to be attached, and it has {free} free ports"
    return ""


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "nothing"
    return "nothing" if value in (None, "") else str(value)


def _named_before(text: str, owner: str) -> set[UUID]:
    """The UUIDs that a guest's devices had in the spec that was applied."""
    spec = parse(text, "the journal", kind="json").spec
    return {
        asked.uuid
        for _, name, asked in spec.devices()
        if asked.uuid is not None and _owner(asked, name) == owner
    }
