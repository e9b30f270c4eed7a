# SPDX-License-Identifier: GPL-2.0-or-later
"""``mdo host``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from uuid import UUID

from mdev_orchestrator import model
from mdev_orchestrator.cli import output
from mdev_orchestrator.cli.context import machine
from mdev_orchestrator.cli.params import Json
from mdev_orchestrator.host.holders import Holders, read_holders
from mdev_orchestrator.host.sysfs import read_host
from mdev_orchestrator.machine import Machine
from mdev_orchestrator.model import Host, Mdev

if TYPE_CHECKING:
    from mdev_orchestrator.engine.records import DeviceRecord, Managed

UNKNOWN = "?"
NONE = "-"
OURS = "ours"
FOREIGN = "foreign"
STATES = {None: NONE, False: "offline", True: "online"}


def host(*, json: Json = False) -> None:
    """Show parents, their types with free and used instances, and devices with their holders."""
    here = machine()
    found = read_host(here)
    held = read_holders(here, found.mdevs)
    owned = _owned(here)
    if json:
        output.emit_json(shape(found, held, owned))
    else:
        _show(found, held, owned)


def _owned(here: Machine) -> Managed | None:
    """What is ours; ``None`` when the journal cannot be read."""
    from mdev_orchestrator.engine.journal_db import read_managed
    from mdev_orchestrator.errors import MdoError

    try:
        return read_managed(here)
    except MdoError as error:
        output.report(error)
        return None


def shape(found: Host, held: Holders, owned: Managed | None) -> dict[str, Any]:
    """The documented JSON shape of a host."""
    used = _used(found)
    names = group_names(owned)
    return {
        "mdev_bus": found.mdev_bus,
        "parents": [
            {
                "name": parent.name,
                "path": str(parent.path),
                "types": [
                    {
                        "id": type_.id,
                        "name": type_.name,
                        "available_instances": type_.available_instances,
                        "used_instances": used[parent.name, type_.id],
                        "device_api": type_.device_api,
                        "description": type_.description,
                        "attributes": type_.attributes,
                        "damage": type_.damage,
                    }
                    for type_ in parent.types
                ],
                "numa_node": parent.numa_node,
                "links": parent.links,
                "links_free": parent.links_free,
                "damage": parent.damage,
            }
            for parent in found.parents
        ],
        "mdevs": [
            {**mdev_shape(mdev, held), **_ownership(mdev, owned, names)} for mdev in found.mdevs
        ],
        "lost": [
            {
                "uuid": str(device.uuid),
                "parent": device.parent,
                "type": device.type,
                "spec": device.spec,
                "for": device.owner or None,
                "remedy": _remedy(device),
            }
            for device in _lost(found, owned)
        ],
        "groups": [
            {
                "uuid": str(group.uuid),
                "name": None if group.uuid is None else names.get(group.uuid),
                "parent": group.parent,
                "members": [str(uuid) for uuid in group.members],
                "online": group.online,
            }
            for group in found.groups
        ],
        "unseen_processes": held.unseen,
        "damage": found.damage,
    }


def mdev_shape(mdev: Mdev, held: Holders | None = None) -> dict[str, Any]:
    """The documented JSON shape of one mdev; with ``holders`` when they were looked for."""
    result: dict[str, Any] = {
        "uuid": str(mdev.uuid),
        "path": mdev.directory,
        "parent": mdev.parent,
        "type": mdev.type_id,
        "device_api": mdev.device_api,
        "iommu_group": mdev.iommu_group,
        "cdev": mdev.cdev,
        "group_uuid": None if mdev.group_uuid is None else str(mdev.group_uuid),
        "online": mdev.online,
        "params": mdev.params,
        "damage": mdev.damage,
    }
    if held is not None:
        result["holders"] = [
            {"pid": holder.pid, "comm": holder.comm, "guest": holder.guest}
            for holder in held.of(mdev.uuid)
        ]
    return result


def _ownership(mdev: Mdev, owned: Managed | None, names: Mapping[UUID, str]) -> dict[str, Any]:
    """The owner of an mdev, ``ours`` or ``foreign``, and what the journal knows of it."""
    device = None if owned is None else _device(mdev, owned)
    return {
        "owner": None if owned is None else FOREIGN if device is None else OURS,
        "spec": None if device is None else device.spec,
        "for": None if device is None else device.owner or None,
        "group": None if mdev.group_uuid is None else names.get(mdev.group_uuid),
    }


def _device(mdev: Mdev, owned: Managed) -> DeviceRecord | None:
    """An mdev as the journal has it; one of the same UUID on another parent is foreign."""
    device = owned.devices.get(mdev.uuid)
    same = device and device.parent == mdev.parent and mdev.type_id in {device.type, None}
    return device if same else None


def _lost(found: Host, owned: Managed | None) -> list[DeviceRecord]:
    """Devices that are ours and do not exist (any more)."""
    here = {mdev.uuid for mdev in found.mdevs if owned is not None and _device(mdev, owned)}
    devices = () if owned is None else owned.devices.values()
    return [device for device in devices if device.uuid not in here]


def _remedy(device: DeviceRecord) -> str:
    """What brings a lost device back."""
    if device.spec is not None:
        return f"mdo apply brings it back, mdo destroy {device.spec} removes all of its spec"
    return f"mdo create {device.type} --parent {device.parent} --uuid {device.uuid} brings it back"


def group_names(owned: Managed | None) -> dict[UUID, str]:
    """The names of start groups, as far as they were given any."""
    devices = () if owned is None else owned.devices.values()
    return model.group_names((device.group, device.label) for device in devices)


def _owner(mdev: Mdev, owned: Managed | None) -> str:
    ownership = _ownership(mdev, owned, {})
    words = [ownership["owner"] or UNKNOWN, ownership["spec"], ownership["for"]]
    return " ".join(word for word in words if word)


def _used(found: Host) -> Counter[tuple[str, str | None]]:
    return Counter((mdev.parent, mdev.type_id) for mdev in found.mdevs)


def _show(found: Host, held: Holders, owned: Managed | None) -> None:
    used = _used(found)
    names = group_names(owned)
    output.emit_table(
        "Types",
        ("parent", "type", "name", "free", "used", "api", "remarks"),
        [
            (
                parent.name,
                type_.id,
                _line(type_.name),
                _line(type_.available_instances),
                str(used[parent.name, type_.id]),
                _line(type_.device_api),
                "; ".join((*parent.damage, *type_.damage)),
            )
            for parent in found.parents
            for type_ in parent.types
        ]
        + [
            (parent.name, "", "", "", "", "", "; ".join(parent.damage))
            for parent in found.parents
            if not parent.types
        ],
        whole={"parent", "type"},
    )
    placed = [parent for parent in found.parents if parent.numa_node is not None]
    if placed:
        output.emit("")
    output.emit_table(
        "NUMA nodes of the parents",
        ("parent", "numa node"),
        [(parent.name, str(parent.numa_node)) for parent in placed],
        whole={"parent"},
    )
    linked = [parent for parent in found.parents if parent.links is not None]
    if linked:
        output.emit("")
    output.emit_table(
        "Links between devices of a start group",
        ("parent", "links", "free"),
        [(parent.name, _line(parent.links), _line(parent.links_free)) for parent in linked],
        whole={"parent"},
    )
    if found.parents and found.mdevs:
        output.emit("")
    output.emit_table(
        "Devices",
        ("uuid", "parent", "type", "iommu", "state", "group", "owner", "holder", "remarks"),
        [
            (
                str(mdev.uuid),
                mdev.parent,
                _line(mdev.type_id),
                _iommu(mdev),
                STATES[mdev.online],
                _group(mdev, names),
                _owner(mdev, owned),
                ", ".join(map(str, held.of(mdev.uuid))),
                "; ".join(mdev.damage),
            )
            for mdev in found.mdevs
        ],
        whole={"uuid", "parent", "type", "group"},
    )
    for device in _lost(found, owned):
        spec = f" of spec {device.spec}" if device.spec is not None else ""
        output.remark(
            f"mdev {device.uuid}{spec} is lost: it is ours and not on {device.parent} any more"
            f" \u2014 {_remedy(device)}"
        )
    for damage in found.damage:
        output.remark(damage)
    if not found.mdev_bus:
        output.remark("this host has no mdev bus \u2014 modprobe mdev, and see mdo doctor")
    elif not found.parents:
        output.remark("no device of this host offers mdevs \u2014 mdo doctor says what is missing")
    if held.unseen and found.mdevs:
        output.remark(
            f"{held.unseen} processes of other users may hold devices too \u2014 run as root"
        )


def _iommu(mdev: Mdev) -> str:
    """The names of its VFIO nodes."""
    return " ".join([_line(mdev.iommu_group), *filter(None, [mdev.cdev])])


def _group(mdev: Mdev, names: Mapping[UUID, str]) -> str:
    """A start group by its name, or else by its UUID."""
    if mdev.group_uuid is None:
        return NONE
    return names.get(mdev.group_uuid, str(mdev.group_uuid))


def _line(value: object) -> str:
    return UNKNOWN if value is None else " ".join(str(value).split())
