# SPDX-License-Identifier: GPL-2.0-or-later
"""What the types of the structures cannot say of a spec: how its keys depend on each other."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from uuid import UUID

import msgspec

from mdev_orchestrator.errors import RequestError
from mdev_orchestrator.model import check_attribute, is_uuid
from mdev_orchestrator.spec.document import Document
from mdev_orchestrator.spec.messages import Place, key
from mdev_orchestrator.spec.sizes import MIB
from mdev_orchestrator.spec.structures import MAX_DEVICES, GuestConfig, GuestMdev, Pool


def check_rules(document: Document) -> None:
    """Check all that follows from the text alone.

    :raise RequestError: With file and line: the first fault found.
    """
    spec = document.spec
    if not spec.guests and not spec.pools:
        raise RequestError(
            f"{document.source} asks for nothing", "write a [[guest]] or a [[pool]] into it"
        )
    _check_names(document)
    for number, guest in enumerate(spec.guests):
        _check_guest(document, ("guest", number), guest)
    total = 0
    seen: dict[UUID, Place] = {}
    for place, _, devices in spec.devices():
        total += devices.count
        if total > MAX_DEVICES:
            raise document.fault(
                (*place, "count"), f"this file asks for more than {MAX_DEVICES} devices"
            )
        _check_attributes(document, place, devices)
        uuid = devices.uuid
        if uuid is None:
            if devices.type is None and not devices.conditions:
                raise document.fault(
                    place, "says neither type nor attributes", 'add type = "…", see mdo host'
                )
            continue
        if uuid in seen:
            raise document.fault(
                (*place, "uuid"),
                f"device {uuid} is named a second time, first as {key(seen[uuid])}",
            )
        seen[uuid] = place
        if devices.count != 1:
            raise document.fault((*place, "count"), "a UUID names one device", "leave count out")
    _check_groups(document)


def _check_names(document: Document) -> None:
    seen: dict[str, Place] = {}
    uuids: dict[UUID, Place] = {}
    owners: list[tuple[Place, GuestConfig | Pool]] = [
        *((("guest", number), guest) for number, guest in enumerate(document.spec.guests)),
        *((("pool", number), pool) for number, pool in enumerate(document.spec.pools)),
    ]
    for place, owner in owners:
        if owner.name in seen:
            raise document.fault(
                (*place, "name"), f"{owner.name} is the name of {key(seen[owner.name])} already"
            )
        seen[owner.name] = place
        if isinstance(owner, GuestConfig) and owner.uuid is not None:
            if owner.uuid in uuids:
                raise document.fault(
                    (*place, "uuid"), f"is the UUID of {key(uuids[owner.uuid])} already"
                )
            uuids[owner.uuid] = place


def _check_guest(document: Document, place: Place, guest: GuestConfig) -> None:
    if guest.memory < MIB or guest.memory % MIB:
        raise document.fault(
            (*place, "memory"), f"{int(guest.memory)} bytes are no multiple of 1 MiB"
        )
    window = int(guest.hotplug_window)
    if window < MIB or window.bit_count() != 1:
        raise document.fault(
            (*place, "hotplug_window"), f"{window} bytes are not a power of two of at least 1 MiB"
        )
    for name in ("initrd", "append"):
        if getattr(guest, name) and guest.kernel is None:
            raise document.fault((*place, name), "needs a kernel", 'add kernel = "…"')
    if guest.uefi_variables is not None and not guest.uefi:
        raise document.fault((*place, "uefi_variables"), "needs UEFI", "add uefi = true")


def _check_attributes(document: Document, place: Place, devices: GuestMdev | Pool) -> None:
    for number, (name, value) in enumerate(devices.attributes):
        at = (*place, "attributes", number)
        try:
            check_attribute(name, value)
        except RequestError as error:
            raise document.fault(at, error.message, error.hint) from None
        if name == "group_uuid" and isinstance(devices, GuestMdev):
            raise document.fault(at, "a guest's devices have a group", f'group = "{value}"')
    if isinstance(devices, Pool) and devices.mdevctl:
        try:
            found = msgspec.json.decode(devices.mdevctl, type=dict[str, Any])
        except (msgspec.MsgspecError, RecursionError):
            raise document.fault((*place, "mdevctl"), "must be a JSON object") from None
        if known := {"mdev_type", "start", "attrs"}.intersection(found):
            raise document.fault(
                (*place, "mdevctl"),
                f"{min(known)} has a key of its own here",
                "type, start and attributes say it",
            )


def _check_groups(document: Document) -> None:
    """A start group has one user and one parent."""
    owners: dict[str, tuple[Place, str]] = {}
    parents: dict[tuple[str, str], tuple[Place, str]] = {}
    for place, owner, devices in document.spec.devices():
        if not isinstance(devices, GuestMdev) or devices.group is None:
            continue
        at = (*place, "group")
        if is_uuid(devices.group):
            first, name = owners.setdefault(devices.group.lower(), (place, owner))
            if name != owner:
                raise document.fault(
                    at, f"group {devices.group} is of guest {name} ({key(first)}): one user a group"
                )
        if devices.parent is None:
            continue
        first, parent = parents.setdefault((owner, devices.group), (place, devices.parent))
        if parent != devices.parent:
            raise document.fault(
                at,
                f"group {devices.group} is across parents: {key(first)} wants {parent}, "
                f"this {devices.parent}",
                "a group is on one parent",
            )


def check_files(document: Document) -> None:
    """Check that the files and directories that a spec names are there.

    :raise RequestError: With file and line: the first fault found.
    """
    for number, guest in enumerate(document.spec.guests):
        for name in ("disk", "kernel", "initrd", "firmware"):
            path: Path | None = getattr(guest, name)
            if path is None:
                continue
            place = ("guest", number, name)
            try:
                is_directory = path.is_dir()
                path.stat()
            except OSError as error:
                reason = os.strerror(error.errno or 0)
                raise document.fault(place, f"{path} cannot be used: {reason}") from None
            if is_directory != (name == "firmware"):
                kind = "is no directory" if name == "firmware" else "is a directory"
                raise document.fault(place, f"{path} {kind}")
