# SPDX-License-Identifier: GPL-2.0-or-later
"""What each guest of a spec needs: to be started, devices by hotplug, or a restart. Pure: no I/O.

A running guest gets and loses devices by hotplug. Any other change, and more devices than it has
free ports for, needs a restart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from uuid import UUID

from msgspec import Struct, field
from msgspec.structs import replace

from mdev_orchestrator.engine.device_requests import Matched, owner_of
from mdev_orchestrator.engine.records import GuestRecord
from mdev_orchestrator.engine.snapshot import ObservedGuest, ObservedState
from mdev_orchestrator.spec import Document, GuestConfig, Place, parse, read_guest, to_json


class GuestChange(Struct, eq=False):
    """What one guest of the spec needs.

    :ivar record: Its record when all is done.
    :ivar devices: The mdevs that it has then, in order.
    :ivar old_record: Its record now; ``None`` if it is not managed yet.
    :ivar running: ``None`` if it does not run.
    :ivar attach: Devices to be attached.
    :ivar detach: Devices to be detached.
    :ivar restart_reason: Why it must be restarted instead; empty if it need not.
    """

    record: GuestRecord
    devices: tuple[UUID, ...]
    old_record: GuestRecord | None
    running: ObservedGuest | None
    attach: list[UUID] = field(default_factory=list)
    detach: list[UUID] = field(default_factory=list)
    restart_reason: str = ""


class GuestChanges(Struct, frozen=True):
    """What all guests of a spec need.

    :ivar guests: One for each guest of the spec, in its order.
    :ivar dropped: Guests that run and that the spec does not name any more.
    :ivar changed: Records that change though nothing is done to their guest.
    """

    guests: tuple[GuestChange, ...]
    dropped: tuple[GuestRecord, ...]
    changed: Mapping[str, GuestRecord | None]

    @property
    def restarts(self) -> dict[str, str]:
        """The guests that must be restarted, and why."""
        return {g.record.name: g.restart_reason for g in self.guests if g.restart_reason}


def check_guests(document: Document, observed: ObservedState) -> None:
    """Check that the names of a spec's guests are not used by other guests.

    :raise RequestError: With file and line: one is.
    """
    for number, guest in enumerate(document.spec.guests):
        place: Place = ("guest", number, "name")
        record = observed.managed.guests.get(guest.name)
        running = observed.running.get(guest.name)
        if record is not None and record.spec not in {None, document.name}:
            raise document.fault(
                place,
                f"guest {guest.name} belongs to spec {record.spec}",
                f"choose another name, or mdo destroy {record.spec}",
            )
        if running is not None and (record is None or record.uuid != running.uuid):
            raise document.fault(
                place,
                f"guest {guest.name} runs already, and was not started by a spec",
                f"mdo guest stop {guest.name}, mdo adopt {guest.name}, or choose another name",
            )


def find_changes(
    document: Document, observed: ObservedState, matched: Matched, new_uuid: Callable[[], UUID]
) -> GuestChanges:
    """Compare the guests of a spec with those that run.

    :param matched: Its devices, all of them placed.
    """
    changed: dict[str, GuestRecord | None] = {}
    guests = tuple(
        _change(document, guest, observed, matched, new_uuid) for guest in document.spec.guests
    )
    for change in guests:
        runs_on = change.running is not None and not change.restart_reason
        if runs_on and change.old_record is not None and change.record != change.old_record:
            changed[change.record.name] = change.record
    dropped = []
    named = {guest.name for guest in document.spec.guests}
    for record in observed.managed.guests.values():
        if record.spec != document.name or record.name in named:
            continue
        running = observed.running.get(record.name)
        if running is not None and running.uuid == record.uuid:
            dropped.append(record)
        else:
            changed[record.name] = None
    return GuestChanges(guests, tuple(dropped), changed)


def _change(
    document: Document,
    guest: GuestConfig,
    observed: ObservedState,
    matched: Matched,
    new_uuid: Callable[[], UUID],
) -> GuestChange:
    owner = f"guest:{guest.name}"
    devices = tuple(request.uuid for request in matched.requests if request.owner == owner)
    old_record = observed.managed.guests.get(guest.name)
    record = GuestRecord(
        name=guest.name,
        uuid=guest.uuid or (old_record.uuid if old_record is not None else new_uuid()),
        spec=document.name,
        definition=_definition(guest),
    )
    change = GuestChange(record, devices, old_record, observed.running.get(guest.name))
    if old_record is not None and change.running is not None:
        leaving = {device.uuid for device in matched.leaving}
        stays = set(change.running.mdevs) - leaving
        change.attach = [uuid for uuid in devices if uuid not in stays]
        unwanted = [u for u in change.running.mdevs if u not in devices or u in leaving]
        if unwanted:  # what a user attached by hand stays
            had = _devices_before(document.name, owner, observed, matched)
            change.detach = [uuid for uuid in unwanted if uuid in had]
        change.restart_reason = _restart_reason(old_record, change.running, change, guest)
    return change


def _devices_before(name: str, owner: str, observed: ObservedState, matched: Matched) -> set[UUID]:
    """The devices that a guest may have got from its spec when that was applied last."""
    had = {uuid for uuid, device in matched.records.items() if device.owner == owner}
    if (record := observed.managed.specs.get(name)) is None:
        return had
    spec = parse(record.text, "the journal", kind="json").spec
    return had | {
        asked.uuid
        for _, guest, asked in spec.devices()
        if asked.uuid is not None and owner_of(asked, guest) == owner
    }


def _restart_reason(
    old_record: GuestRecord, running: ObservedGuest, change: GuestChange, guest: GuestConfig
) -> str:
    """Why a guest that runs must be restarted; empty if it need not."""
    record = change.record
    if record.uuid != old_record.uuid:
        return f"its uuid changes from {old_record.uuid} to {record.uuid}"
    if old_record.definition and record.definition != old_record.definition:  # else it was adopted
        before = read_guest(old_record.definition)
        changed = [
            f"{name} changes from {_shown(getattr(before, name))} to {_shown(getattr(guest, name))}"
            for name in GuestConfig.__struct_fields__
            if name not in {"mdevs", "uuid"} and getattr(before, name) != getattr(guest, name)
        ]
        if changed:
            return ", ".join(changed)
    if running.silent and (change.attach or change.detach):
        return f"its devices change, and its QEMU does not answer: {running.silent}"
    free = running.free_ports + len(change.detach)
    if len(change.attach) > free:
        return f"{len(change.attach)} devices are to be attached, and it has {free} free ports"
    return ""


def _definition(guest: GuestConfig) -> str:
    """A guest without its devices and its UUID, which its record has elsewhere."""
    return to_json(replace(guest, mdevs=(), uuid=None))


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Sequence) and not isinstance(value, str):
        return " ".join(map(str, value)) or "nothing"
    return "nothing" if value in (None, "") else str(value)
