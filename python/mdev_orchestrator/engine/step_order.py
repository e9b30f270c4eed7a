# SPDX-License-Identifier: GPL-2.0-or-later
"""The steps of a change, each after those that it needs. Pure: no I/O.

What is new comes first and what is old goes last, so that a change that fails has touched nothing
that works. Only where the new does not fit beside the old, or has its UUID, the old goes first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from graphlib import TopologicalSorter
from uuid import UUID

from msgspec import Struct, field

from mdev_orchestrator.engine.device_requests import DeviceRequest
from mdev_orchestrator.engine.executor import PlannedStep
from mdev_orchestrator.engine.guest_changes import GuestChange, GuestChanges
from mdev_orchestrator.engine.records import DeviceRecord, GuestRecord
from mdev_orchestrator.engine.snapshot import ObservedGuest, ObservedState
from mdev_orchestrator.engine.steps import AnyStep, Attach, Create, Detach, Launch, Remove, Stop
from mdev_orchestrator.qemu.hotplug import ATTACH_SECONDS, DETACH_SECONDS
from mdev_orchestrator.qemu.start import START_SECONDS
from mdev_orchestrator.qemu.stop import STOP_SECONDS


class StepOptions(Struct, frozen=True):
    """What a user may say of all steps.

    :ivar force: End guests that do not power down in time.
    :ivar deadline: Seconds for each step; each kind of step has a default.
    """

    force: bool = False
    deadline: float | None = None

    def seconds(self, default: float) -> float:
        """The deadline of a step whose kind has this default."""
        return default if self.deadline is None else self.deadline


class _Node(Struct, eq=False):
    """A step and those that it needs."""

    step: AnyStep
    needs: list[_Node] = field(default_factory=list)


def order(
    missing: Sequence[DeviceRequest],
    leaving: Sequence[DeviceRecord],
    guests: GuestChanges,
    observed: ObservedState,
    options: StepOptions,
    *,
    remove_first: bool,
) -> tuple[PlannedStep, ...]:
    """Order all steps of an apply.

    :param missing: The requests for which devices are created.
    :param leaving: The devices that are removed.
    :param remove_first: Remove these before those are created.
    """
    ordering = _Ordering(_creates(missing), observed.running, options, remove_first=remove_first)
    for record in guests.dropped:
        ordering.drop(record)
    for guest in guests.guests:
        ordering.change(guest)
    for device in leaving:
        ordering.remove(device)
    return ordering.planned()


def order_removal(
    guests: Sequence[GuestRecord],
    devices: Sequence[DeviceRecord],
    observed: ObservedState,
    options: StepOptions,
) -> tuple[PlannedStep, ...]:
    """Order the steps that end guests that run, and then remove devices that are present."""
    stops = [
        PlannedStep(_stop_step(guest, observed.running[guest.name].mdevs, options))
        for guest in guests
    ]
    needs = tuple(range(len(stops)))
    return (*stops, *(PlannedStep(Remove(device=device), needs) for device in devices))


class _Ordering:
    """The steps of an apply while they are gathered.

    :ivar additions: Steps after which there is more than before.
    :ivar removals: Steps after which there is less; they come last, or first.
    """

    def __init__(
        self,
        creates: Mapping[UUID, _Node],
        running: Mapping[str, ObservedGuest],
        options: StepOptions,
        *,
        remove_first: bool,
    ) -> None:
        self.creates = creates
        self.running = running
        self.options = options
        self.remove_first = remove_first
        self.nodes = list(creates.values())
        self.additions = list(creates.values())
        self.removals: list[_Node] = []
        self.stops: dict[str, _Node] = {}
        self.detaches: dict[UUID, _Node] = {}

    def drop(self, guest: GuestRecord) -> None:
        """Add the step for a guest that the spec does not name any more."""
        self.removals.append(self._stop(guest))

    def change(self, guest: GuestChange) -> None:
        """Add the steps for a guest of the spec."""
        if guest.running is None or guest.old_record is None:
            self.additions.append(self._launch(guest, kept=guest.old_record is not None))
        elif guest.restart_reason:
            self._restart(guest, guest.old_record)
        else:
            self._plug(guest, guest.running.free_ports)

    def remove(self, device: DeviceRecord) -> None:
        """Add the step for a device that leaves, after the guest that has it has given it back."""
        guest = device.owner.removeprefix("guest:")
        before = [self.detaches.get(device.uuid), self.stops.get(guest)]
        self.removals.append(
            self._node(Remove(device=device), [node for node in before if node is not None])
        )

    def planned(self) -> tuple[PlannedStep, ...]:
        """Return all steps in an order in which they could be done one by one."""
        if self.remove_first:
            removes = [node for node in self.removals if isinstance(node.step, Remove)]
            for node in self.creates.values():
                node.needs += removes
        else:
            for node in self.removals:
                node.needs += self.additions
        order = list(TopologicalSorter({node: node.needs for node in self.nodes}).static_order())
        number = {node: index for index, node in enumerate(order)}
        return tuple(
            PlannedStep(node.step, tuple(sorted({number[need] for need in node.needs})))
            for node in order
        )

    def _node(self, step: AnyStep, needs: Sequence[_Node] = ()) -> _Node:
        node = _Node(step, list(needs))
        self.nodes.append(node)
        return node

    def _created(self, guest: GuestChange) -> list[_Node]:
        return [self.creates[uuid] for uuid in guest.devices if uuid in self.creates]

    def _stop(
        self, guest: GuestRecord, needs: Sequence[_Node] = (), *, kept: bool = False
    ) -> _Node:
        step = _stop_step(guest, self.running[guest.name].mdevs, self.options, kept=kept)
        self.stops[guest.name] = self._node(step, needs)
        return self.stops[guest.name]

    def _launch(self, guest: GuestChange, needs: Sequence[_Node] = (), *, kept: bool) -> _Node:
        step = Launch(
            guest=guest.record,
            devices=guest.devices,
            kept=kept,
            deadline=self.options.seconds(START_SECONDS),
        )
        return self._node(step, [*needs, *self._created(guest)])

    def _restart(self, guest: GuestChange, old_record: GuestRecord) -> None:
        """Stop a guest when all is there that was to be added, and start it again."""
        needs = [] if self.remove_first else self.additions
        stop = self._stop(old_record, needs, kept=True)
        self._launch(guest, [stop], kept=True)

    def _plug(self, guest: GuestChange, free_ports: int) -> None:
        """Attach and detach devices; the steps of one guest share its monitor."""
        detaches: list[_Node] = []
        for uuid in guest.detach:
            unplug = Detach(
                guest=guest.record, uuid=uuid, deadline=self.options.seconds(DETACH_SECONDS)
            )
            detaches.append(self._node(unplug, detaches[-1:]))
            self.detaches[uuid] = detaches[-1]
        attaches: list[_Node] = []
        for uuid in guest.attach:
            plug = Attach(
                guest=guest.record, uuid=uuid, deadline=self.options.seconds(ATTACH_SECONDS)
            )
            made = [self.creates[uuid]] if uuid in self.creates else []
            attaches.append(self._node(plug, [*attaches[-1:], *made]))
        if len(attaches) <= free_ports:
            self.additions += attaches
            self.removals += detaches
            return
        # the devices that leave make room for the new ones
        attaches[0].needs += detaches
        detaches[0].needs += [] if self.remove_first else self._created(guest)


def _stop_step(
    guest: GuestRecord, devices: tuple[UUID, ...], options: StepOptions, *, kept: bool = False
) -> Stop:
    """Return the step that ends a guest that runs.

    :param devices: The mdevs that it has now.
    """
    return Stop(
        guest=guest,
        devices=devices,
        kept=kept,
        force=options.force,
        deadline=options.seconds(STOP_SECONDS),
    )


def _creates(missing: Sequence[DeviceRequest]) -> dict[UUID, _Node]:
    """The steps that create devices, by UUID."""
    creates: dict[UUID, _Node] = {}
    last: dict[tuple[str, str], _Node] = {}
    for request in missing:
        if request.device is None:
            raise AssertionError("a request that was not placed")
        node = _Node(Create(device=request.device, kept=request.record is not None))
        if request.group_name is not None:
            # drivers number the members of a group in the order in which they join
            group = request.owner, request.group_name
            node.needs += [last[group]] if group in last else []
            last[group] = node
        creates[request.device.uuid] = node
    return creates
