# SPDX-License-Identifier: GPL-2.0-or-later
"""Where the devices go that a spec asks for and that must be created. Pure: no I/O.

The planner (:mod:`..capacity.planner`) decides. A lost device is placed as it was; a new one on the
parent of its start group, if the group has a device already.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from uuid import UUID

from msgspec import Struct
from msgspec.structs import replace

from mdev_orchestrator.capacity.models import ParentCapacity
from mdev_orchestrator.capacity.planner import Placement, Plan, Policy, Request
from mdev_orchestrator.capacity.planner import plan as make_plan
from mdev_orchestrator.engine.device_requests import (
    DeviceRequest,
    Existing,
    Group,
    Matched,
    existing,
    is_bare,
    kept_record,
)
from mdev_orchestrator.engine.records import DeviceRecord
from mdev_orchestrator.errors import CapacityError, RequestError
from mdev_orchestrator.model import Host, Mdev, is_uuid
from mdev_orchestrator.spec import Document, key

Survey = Callable[[Host, frozenset[UUID]], tuple[ParentCapacity, ...]]
"""What parents can take when some devices are removed before."""


class MisfitError(CapacityError):
    """The devices do not fit; the plan tells what would, and why the others do not."""

    def __init__(self, error: RequestError, plan: Plan, existing: tuple[Existing, ...]) -> None:
        super().__init__(error.message, error.hint)
        self.plan = plan
        self.existing = existing


class Placed(Struct, frozen=True):
    """Where the devices go.

    :ivar plan: Under the keys that the spec has.
    :ivar missing: The requests for which a device is created.
    :ivar remove_first: Devices that leave must be removed before others are created: the new ones
        do not fit beside them, or have a UUID of them.
    """

    plan: Plan
    missing: tuple[DeviceRequest, ...]
    remove_first: bool


def place(
    document: Document,
    host: Host,
    matched: Matched,
    *,
    policy: Policy,
    capacity: Survey,
    new_uuid: Callable[[], UUID],
) -> Placed:
    """Place all requests that have no device, and decide what each of these devices will be.

    :raise RequestError: With file and line: a group is across parents, or nothing says which type.
    :raise MisfitError: They do not fit, not even in place of the devices that leave.
    """
    missing = tuple(request for request in matched.requests if request.is_missing)
    placing = _Placing(document, host, matched, missing, new_uuid)
    leaving = frozenset(record.uuid for record in matched.leaving)
    plan = make_plan(placing.asked, capacity(host, frozenset()), policy)
    in_place = False
    if not plan.fits and leaving:
        beside, plan = plan, make_plan(placing.asked, capacity(host, leaving), policy)
        in_place = plan != beside
    placing.check_fits(plan)
    placing.assign(plan)
    remove_first = in_place or any(request.uuid in leaving for request in missing)
    return Placed(placing.as_in_spec(plan), missing, remove_first)


class _Placing:
    """The planner's requests of a spec.

    :ivar tables: For each request of the planner those of the spec: all devices of one table
        together, each lost device by itself.
    """

    def __init__(
        self,
        document: Document,
        host: Host,
        matched: Matched,
        missing: Sequence[DeviceRequest],
        new_uuid: Callable[[], UUID],
    ) -> None:
        self.document = document
        self.host = host
        self.requests = matched.requests
        self.new_uuid = new_uuid
        self.tables: dict[str, list[DeviceRequest]] = {}
        for request in missing:
            lost = "" if request.record is None else f" {request.record.uuid}"
            self.tables.setdefault(key(request.place) + lost, []).append(request)
        parents = self._group_parents()
        self.asked = [self._request(name, table, parents) for name, table in self.tables.items()]

    def _group_parents(self) -> dict[Group, str]:
        """The parents of start groups that have a device already."""
        first: dict[Group, Mdev] = {}
        for request in self.requests:
            uuid = request.known_uuid
            found = None if uuid is None else self.host.find(uuid)
            if found is None or request.group_name is None:
                continue
            other = first.setdefault(request.group, found)
            at = (*request.place, "group")
            if other.parent != found.parent:
                raise self.document.fault(
                    at,
                    f"group {request.group_name} is across parents: device {other.uuid} is on "
                    f"{other.parent}, {found.uuid} on {found.parent}",
                    "a group is on one parent",
                )
            if found.group_uuid is None or found.group_uuid != other.group_uuid:
                raise self.document.fault(
                    at,
                    f"device {found.uuid} exists and is not in the start group of group "
                    f"{request.group_name}",
                    "leave its group away, or remove the device: it is created again",
                )
        return {name: mdev.parent for name, mdev in first.items()}

    def _request(
        self, name: str, table: Sequence[DeviceRequest], parents: Mapping[Group, str]
    ) -> Request:
        first = table[0]
        asked, record, group = first.asked, first.record, first.group_name
        if record is None and is_bare(asked):
            raise self.document.fault(
                (*first.place, "uuid"),
                f"there is no device {asked.uuid}, and nothing says of what type to make it",
                'add type = "…"',
            )
        parent = parents.get(first.group, asked.parent)
        if asked.parent not in {None, parent}:
            raise self.document.fault(
                (*first.place, "parent"),
                f"group {group} is across parents: it has a device on {parent}",
                "a group is on one parent",
            )
        request = Request(
            key=name,
            type_id=asked.type,
            conditions=asked.conditions,
            count=len(table),
            group=None if group is None else f"{first.owner}/{group}",
            parent=parent,
        )
        if record is None:
            return request
        return replace(request, type_id=record.type, conditions=(), parent=record.parent)

    def check_fits(self, plan: Plan) -> None:
        """Raise the error that says which devices do not fit, if not all do."""
        if plan.fits:
            return
        first = plan.shortfalls[0]
        others = len(plan.shortfalls) - 1
        more = f"; {others} more do not fit" if others else ""
        error = self.document.fault(
            self.tables[first.request][0].place,
            f"{first.asked} asked for, {first.placed} fit: {first.reason}{more}",
            first.hint,
        )
        present = tuple(existing(self.requests, self.host))
        raise MisfitError(error, self.as_in_spec(plan), present)

    def as_in_spec(self, plan: Plan) -> Plan:
        """Return a plan under the keys that the spec has."""
        keys = {name: key(table[0].place) for name, table in self.tables.items()}
        return replace(
            plan,
            placements=tuple(replace(p, request=keys[p.request]) for p in plan.placements),
            shortfalls=tuple(replace(s, request=keys[s.request]) for s in plan.shortfalls),
        )

    def assign(self, plan: Plan) -> None:
        """Give each request without a device the record of the one that is created for it."""
        placements: dict[str, list[Placement]] = {}
        for placement in plan.placements:
            placements.setdefault(placement.request, []).append(placement)
        groups = {
            request.group: known.group
            for request in self.requests
            if (known := request.device or request.record) is not None
        }
        for name, table in self.tables.items():
            for request, where in zip(table, placements[name], strict=True):
                request.is_new = True
                if request.record is not None:
                    request.device = kept_record(request, request.record, self.document.name)
                else:
                    request.device = self._new_record(request, where, groups)

    def _new_record(
        self, request: DeviceRequest, where: Placement, groups: dict[Group, UUID | None]
    ) -> DeviceRecord:
        """Describe a new device.

        :param groups: UUIDs of the start groups; one that is missing is added.
        """
        name, group = request.group_name, None
        if name is not None:
            group = groups.get(request.group)
            if group is None:
                group = UUID(name) if is_uuid(name) else self.new_uuid()
                groups[request.group] = group
        return DeviceRecord(
            uuid=request.asked.uuid or self.new_uuid(),
            parent=where.parent,
            type=where.type_id,
            spec=self.document.name,
            owner=request.owner,
            label=name,
            group=group,
            params=request.asked.params,
            attributes=request.asked.attributes,
            want=request.text,
        )
