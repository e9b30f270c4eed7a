# SPDX-License-Identifier: GPL-2.0-or-later
"""From what a spec asks for, and what was observed, to the steps between. Pure: no I/O.

===============  =====================================================================
device_requests  which device each request of the spec keeps, and which devices leave
placement        where the missing devices are created, and what each of them is
guest_changes    which guests are started, restarted, or get and lose devices
step_order       the steps, each after those that it needs
===============  =====================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from uuid import UUID, uuid4

from msgspec import Struct, field

from mdev_orchestrator.capacity.models import survey
from mdev_orchestrator.capacity.planner import Plan, Policy
from mdev_orchestrator.capacity.planner import plan as make_plan
from mdev_orchestrator.engine import device_requests, guest_changes, placement, step_order
from mdev_orchestrator.engine.device_requests import Existing, Matched, is_present
from mdev_orchestrator.engine.executor import PlannedStep
from mdev_orchestrator.engine.placement import Placed, Survey
from mdev_orchestrator.engine.records import Change
from mdev_orchestrator.engine.snapshot import ObservedState
from mdev_orchestrator.engine.step_order import StepOptions
from mdev_orchestrator.spec import Document


class Changes(Struct, frozen=True):
    """What is to be done.

    :ivar name: The spec's name.
    :ivar steps: In an order in which they could be done one by one.
    :ivar restarts: The guests that must be restarted, and why.
    :ivar change: Records that change though nothing is done to their object.
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
        """Whether the machine is as asked for, and the records say so."""
        return not (self.steps or self.change.devices or self.change.guests)


class Preview(Struct, frozen=True):
    """Where the devices of a spec go, whatever else an apply does.

    :ivar plan: Where new devices go, by the key of their request, and what remains.
    :ivar existing: The devices that stay.
    """

    plan: Plan
    existing: tuple[Existing, ...]


def preview(
    document: Document,
    observed: ObservedState,
    *,
    policy: Policy = "pack",
    capacity: Survey = survey,
    new_uuid: Callable[[], UUID] = uuid4,
) -> Preview:
    """Find where the devices of a spec go; which devices guests have now does not matter.

    Raises what :func:`diff` does.
    """
    matched, placed = _place_all(document, observed, policy, capacity, new_uuid)
    present = device_requests.existing(matched.requests, observed.host)
    return Preview(placed.plan, tuple(present))


def diff(
    document: Document,
    observed: ObservedState,
    *,
    policy: Policy = "pack",
    options: StepOptions | None = None,
    capacity: Survey = survey,
    new_uuid: Callable[[], UUID] = uuid4,
) -> Changes:
    """Find the steps that make a spec true.

    :raise RequestError: With file and line: the spec asks for what belongs to another one.
    :raise MisfitError: The devices do not fit, not even in place of those that leave.
    """
    matched, placed = _place_all(document, observed, policy, capacity, new_uuid)
    guests = guest_changes.find_changes(document, observed, matched, new_uuid)
    steps = step_order.order(
        placed.missing,
        matched.leaving,
        guests,
        observed,
        options or StepOptions(),
        remove_first=placed.remove_first,
    )
    created = {request.uuid for request in placed.missing}  # their steps change their records
    devices = {uuid: record for uuid, record in matched.changed.items() if uuid not in created}
    return Changes(
        document.name,
        steps,
        guests.restarts,
        Change(devices=devices, guests=guests.changed),
        placed.plan,
        tuple(device_requests.existing(matched.requests, observed.host)),
    )


def _place_all(
    document: Document,
    observed: ObservedState,
    policy: Policy,
    capacity: Survey,
    new_uuid: Callable[[], UUID],
) -> tuple[Matched, Placed]:
    guest_changes.check_guests(document, observed)
    matched = device_requests.match(document, observed)
    placed = placement.place(
        document, observed.host, matched, policy=policy, capacity=capacity, new_uuid=new_uuid
    )
    return matched, placed


def without(name: str, observed: ObservedState, options: StepOptions | None = None) -> Changes:
    """Find the steps that remove all that a spec has brought: guests first, then devices."""
    guests = [guest for guest in observed.managed.guests.values() if guest.spec == name]
    owners = {f"guest:{guest.name}" for guest in guests}
    running = [
        guest
        for guest in guests
        if (found := observed.running.get(guest.name)) is not None and found.uuid == guest.uuid
    ]
    devices = [
        device
        for device in observed.managed.devices.values()
        if device.spec == name or device.owner in owners
    ]
    present = [device for device in devices if is_present(device, observed.host)]
    steps = step_order.order_removal(running, present, observed, options or StepOptions())
    # a step deletes the record of its object
    absent = {device.uuid for device in devices} - {device.uuid for device in present}
    ended = {guest.name for guest in guests} - {guest.name for guest in running}
    change = Change(devices=dict.fromkeys(absent), guests=dict.fromkeys(ended))
    return Changes(name, steps, change=change)
