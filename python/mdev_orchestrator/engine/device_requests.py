# SPDX-License-Identifier: GPL-2.0-or-later
"""The devices that a spec asks for, and which device each request keeps. Pure: no I/O.

A spec asks for kinds of devices, the journal has records of single ones. A managed device stays
with a request of the same guest or pool if it is what the request asks for. These rules are tried
one after the other:

1. it has the UUID that the request gives;
2. it was made for the very same request, and is present;
3. it was made for the very same request, and is absent, after a reboot for instance: it is created
   again as it was;
4. it is present and will do, and has the same parameters;
5. it is present and will do.

A request may also take an adopted device that belongs to no guest, pool or spec. Of such a device
it is believed that it is as the spec says, but for its type, its start group, and parameters that
the driver shows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Literal
from uuid import UUID

from msgspec import Struct
from msgspec.structs import replace

from mdev_orchestrator.capacity.attributes import facts_of, meets
from mdev_orchestrator.engine.device_ops import is_same
from mdev_orchestrator.engine.records import DeviceRecord
from mdev_orchestrator.engine.snapshot import ObservedState
from mdev_orchestrator.interop.mdevctl import complete, is_of
from mdev_orchestrator.model import Host, Mdev, MdevType
from mdev_orchestrator.spec import Document, GuestMdev, Place, Pool, key, to_json

Group = tuple[str, str | None]
"""A start group of a spec: its owner and its name; no name for devices without a group."""


class Existing(Struct, frozen=True):
    """A device that is present and stays.

    :ivar request: Key of the request that it is for.
    """

    request: str
    uuid: UUID
    parent: str
    type_id: str


class DeviceRequest(Struct, eq=False):
    """One device that a spec asks for.

    :ivar place: Where the spec asks for it.
    :ivar owner: ``guest:NAME`` or ``pool:NAME``.
    :ivar asked: What is asked for, with what mdevctl defines for its UUID.
    :ivar text: What the spec itself says, to recognise the request by.
    :ivar bare: The spec says no more than a UUID.
    :ivar record: Record of the managed device that it keeps, present or not.
    :ivar borrowed: UUID of a present device that it uses and that is not managed here.
    :ivar device: Its record when all is done; ``None`` for a borrowed device, and until it is
        placed.
    :ivar is_new: The device is created by this change.
    """

    place: Place
    owner: str
    asked: GuestMdev | Pool
    text: str
    bare: bool
    record: DeviceRecord | None = None
    borrowed: UUID | None = None
    device: DeviceRecord | None = None
    is_new: bool = False

    @property
    def group_name(self) -> str | None:
        """Name of the start group, as the spec gives it."""
        return self.asked.group if isinstance(self.asked, GuestMdev) else None

    @property
    def group(self) -> Group:
        """Its start group, or the devices of its owner that are in none."""
        return self.owner, self.group_name

    @property
    def known_uuid(self) -> UUID | None:
        """UUID of the device that it has; ``None`` until it is placed."""
        if self.borrowed is not None:
            return self.borrowed
        return None if self.device is None else self.device.uuid

    @property
    def uuid(self) -> UUID:
        """The same when all requests are placed."""
        if (uuid := self.known_uuid) is None:
            raise AssertionError("a request that was not placed")
        return uuid

    @property
    def is_missing(self) -> bool:
        """Whether a device must be created for it."""
        return self.known_uuid is None


class Matched(Struct, frozen=True):
    """Which device each request keeps.

    :ivar requests: In the order of the spec, one for each device.
    :ivar records: Records of the managed devices that may belong to this spec, by UUID.
    :ivar changed: Records that change though nothing is done to their device.
    :ivar leaving: Devices of this spec that are present and that no request asks for any more.
    """

    requests: tuple[DeviceRequest, ...]
    records: Mapping[UUID, DeviceRecord]
    changed: Mapping[UUID, DeviceRecord | None]
    leaving: tuple[DeviceRecord, ...]


def match(document: Document, observed: ObservedState) -> Matched:
    """Find the device that each request of a spec keeps.

    :raise RequestError: With file and line: a UUID that it gives is of a device that it cannot
        have.
    """
    return _Matching(document, observed).match()


def existing(requests: Iterable[DeviceRequest], host: Host) -> Iterator[Existing]:
    """Give the present devices that stay with a request."""
    for request in requests:
        uuid = request.known_uuid
        found = None if uuid is None or request.is_new else host.find(uuid)
        if found is not None:
            yield Existing(key(request.place), found.uuid, found.parent, found.type_id or "")


def is_present(record: DeviceRecord, host: Host) -> bool:
    """Whether the device of a record is on the host."""
    found = host.find(record.uuid)
    return found is not None and is_same(found, record)


def owner_of(asked: GuestMdev | Pool, name: str) -> str:
    """The owner of a device, as its record has it."""
    kind: Literal["guest", "pool"] = "guest" if isinstance(asked, GuestMdev) else "pool"
    return f"{kind}:{name}"


def is_bare(asked: GuestMdev | Pool) -> bool:
    """Whether a request does not say which types will do."""
    return asked.type is None and not asked.conditions


def kept_record(request: DeviceRequest, record: DeviceRecord, spec: str) -> DeviceRecord:
    """Return the record of a device that a request keeps, as the spec describes it now."""
    described = replace(
        record,
        spec=spec,
        owner=request.owner,
        label=request.group_name,
        want=request.text,
        adopted=False,
    )
    if record.spec is not None or request.bare:
        return described
    # of a device that was not made by a spec it is believed that it is as the spec says
    return replace(described, params=request.asked.params, attributes=request.asked.attributes)


class _Matching:
    def __init__(self, document: Document, observed: ObservedState) -> None:
        self.document = document
        self.observed = observed
        self.host = observed.host
        self.types = {
            (type_.parent, type_.id): type_ for p in self.host.parents for type_ in p.types
        }
        self.requests = list(_requests(document, observed))
        self.named = {request.asked.uuid for request in self.requests}
        owners = {request.owner for request in self.requests}
        self.records = {
            record.uuid: record
            for record in observed.managed.devices.values()
            if record.spec == document.name
            or (record.spec is None and (record.owner in owners or record.adopted))
        }
        self.changed: dict[UUID, DeviceRecord | None] = {}
        self.adopted_groups = self._recognise_groups()

    def match(self) -> Matched:
        self._assign_records()
        for request in self.requests:
            self._take_present(request)
        leaving = tuple(self._leaving())
        return Matched(tuple(self.requests), self.records, self.changed, leaving)

    def _assign_records(self) -> None:
        """Give each request the record of the managed device that it keeps."""
        free = dict(self.records)
        rules: tuple[Callable[[DeviceRequest, DeviceRecord], bool], ...] = (
            lambda request, record: request.asked.uuid == record.uuid,
            lambda request, record: record.want == request.text and is_present(record, self.host),
            lambda request, record: record.want == request.text,
            lambda request, record: (
                record.params == request.asked.params and is_present(record, self.host)
            ),
            lambda _, record: is_present(record, self.host),
        )
        # a request for any type that meets conditions leaves a device to one that needs its type
        by_need = sorted(self.requests, key=lambda request: request.asked.type is None)
        for rule in rules:
            for request in by_need:
                if request.record is not None:
                    continue
                # its owner's before one that was adopted and has none
                own_first = sorted(free.values(), key=lambda one: one.owner != request.owner)
                fitting = (
                    record
                    for record in own_first
                    if _may_have(request, record)
                    and rule(request, record)
                    and self._will_do(request, record)
                )
                if (found := next(fitting, None)) is not None:
                    request.record = free.pop(found.uuid)

    def _recognise_groups(self) -> dict[Group, UUID]:
        """Find the start groups of the spec among those of adopted devices, whose names are lost.

        A group's devices are of one guest. Of several the one with as many devices is taken.
        """
        named: dict[Group, list[DeviceRequest]] = {}
        for request in self.requests:
            if request.group_name is not None:
                named.setdefault(request.group, []).append(request)
        adopted: dict[UUID, list[DeviceRecord]] = {}
        for record in self.records.values():
            if record.spec is None and record.group is not None:
                adopted.setdefault(record.group, []).append(record)
        found: dict[Group, UUID] = {}
        for group, requests in named.items():
            fitting = [
                (str(uuid) != group[1], abs(len(records) - len(requests)), uuid)
                for uuid, records in adopted.items()
                if any(_may_have(requests[0], record) for record in records)
            ]
            if fitting:
                *_, found[group] = min(fitting)
                del adopted[found[group]]
        return found

    def _will_do(self, request: DeviceRequest, record: DeviceRecord) -> bool:
        """Whether a managed device is what is asked for, if it is present or is created again."""
        asked = request.asked
        type_ = self.types.get((record.parent, record.type))
        found = self.host.find(record.uuid)
        return (
            type_ is not None
            and (
                asked.uuid == record.uuid or (asked.uuid is None and record.uuid not in self.named)
            )
            and asked.type in {None, record.type}
            and asked.parent in {None, record.parent}
            and self._is_set_up(request, record)
            and meets(facts_of(type_), asked.conditions)
            # another program's device may have the same UUID, or it is being removed
            and (found is None or (is_same(found, record) and found.type_id is not None))
        )

    def _is_set_up(self, request: DeviceRequest, record: DeviceRecord) -> bool:
        asked = request.asked
        if record.spec is None:  # which attributes it was made with is not known
            same_group = record.group == self.adopted_groups.get(request.group)
            return same_group and asked.params in {"", record.params}
        if record.want == request.text and (
            is_bare(asked) or (request.bare and is_present(record, self.host))
        ):
            return True  # as mdevctl defined it; a new definition is for the next creation
        return (request.group_name, asked.params, asked.attributes) == (
            record.label,
            record.params,
            record.attributes,
        )

    def _take_present(self, request: DeviceRequest) -> None:
        """Let a request have the device that it keeps, or the one whose UUID it gives."""
        asked = request.asked
        if request.record is not None:
            if is_present(request.record, self.host):
                self._keep(request, request.record)
            return
        found = None if asked.uuid is None else self.host.find(asked.uuid)
        if found is None:
            return
        record = self.observed.managed.devices.get(found.uuid)
        if record is not None and not is_same(found, record):
            record = None
        if record is not None and record.spec == self.document.name:
            return  # it leaves, and the new device gets its UUID
        if record is not None:
            if record.spec is not None or record.owner not in {"", request.owner}:
                raise self.document.fault(
                    (*request.place, "uuid"),
                    f"device {found.uuid} belongs to {_owner_words(record)}",
                    "choose another UUID",
                )
            self._check_as_asked(request, found)
            self._keep(request, record)
        elif isinstance(asked, GuestMdev) and any(
            is_of(found, definition) for definition in self.observed.defined.get(found.uuid, ())
        ):
            self._check_as_asked(request, found)
            request.borrowed = found.uuid
        else:
            raise self.document.fault(
                (*request.place, "uuid"),
                f"device {found.uuid} exists and is not ours",
                f"choose another UUID, or mdo adopt {found.uuid}",
            )

    def _keep(self, request: DeviceRequest, record: DeviceRecord) -> None:
        request.device = kept_record(request, record, self.document.name)
        if request.device != record:
            self.changed[record.uuid] = request.device

    def _leaving(self) -> Iterator[DeviceRecord]:
        """The devices of this spec that no request keeps; the records of absent ones just go."""
        kept = {request.record.uuid for request in self.requests if request.record is not None}
        for record in self.records.values():
            if record.uuid in kept or record.spec is None:
                continue
            if is_present(record, self.host):
                yield record
            else:
                self.changed[record.uuid] = None

    def _check_as_asked(self, request: DeviceRequest, mdev: Mdev) -> None:
        """Check that a device that is named by its UUID is what the spec says.

        :raise RequestError: It is not, or it is being removed.
        """
        asked, place = request.asked, request.place
        what = f"device {mdev.uuid}"
        if mdev.type_id is None:
            raise self.document.fault(
                (*place, "uuid"), f"{what} is being removed", "wait until it is gone"
            )
        if asked.type not in {None, mdev.type_id}:
            raise self.document.fault(
                (*place, "type"), f"{what} exists as {mdev.type_id}, not as {asked.type}"
            )
        if asked.parent not in {None, mdev.parent}:
            raise self.document.fault(
                (*place, "parent"), f"{what} exists on {mdev.parent}, not on {asked.parent}"
            )
        if asked.conditions and not _meets(self.types.get((mdev.parent, mdev.type_id)), asked):
            words = ", ".join(f"{name} {condition}" for name, condition in asked.conditions)
            raise self.document.fault(
                place, f"{what} exists as {mdev.type_id}, which has not {words}"
            )


def _requests(document: Document, observed: ObservedState) -> Iterator[DeviceRequest]:
    completed = complete(document, observed.defined, observed.host).spec.devices()
    for (place, name, said), (_, _, asked) in zip(document.spec.devices(), completed, strict=True):
        for _ in range(asked.count):
            owner, text = owner_of(asked, name), to_json(replace(said, count=1))
            yield DeviceRequest(place, owner, asked, text, is_bare(said))


def _may_have(request: DeviceRequest, record: DeviceRecord) -> bool:
    """Whether a device has the request's owner already, or was adopted and has none."""
    return record.owner == request.owner or (
        record.adopted and record.spec is None and not record.owner
    )


def _meets(type_: MdevType | None, asked: GuestMdev | Pool) -> bool:
    return type_ is not None and meets(facts_of(type_), asked.conditions)


def _owner_words(record: DeviceRecord) -> str:
    words = [record.owner.replace(":", " ")] if record.owner else []
    return " of ".join([*words, f"spec {record.spec}"] if record.spec is not None else words)
