# SPDX-License-Identifier: GPL-2.0-or-later
"""``mdo host``."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any

import typer

from mdev_orchestrator.cli import output
from mdev_orchestrator.host.holders import Holders, holders
from mdev_orchestrator.host.sysfs import scan
from mdev_orchestrator.model import Host, Mdev

UNKNOWN = "?"
NONE = "-"
STATES = {None: NONE, False: "offline", True: "online"}


def host(
    *,
    json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """Show parents, their types with free and used instances, and devices with their holders."""
    root = output.host_root()
    found = scan(root)
    held = holders(found.mdevs, root)
    if json:
        output.emit_json(shape(found, held))
    else:
        _show(found, held)


def shape(found: Host, held: Holders) -> dict[str, Any]:
    """The documented JSON shape of a host."""
    used = _used(found)
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
                "links": parent.links,
                "links_free": parent.links_free,
                "damage": parent.damage,
            }
            for parent in found.parents
        ],
        "mdevs": [mdev_shape(mdev, held) for mdev in found.mdevs],
        "groups": [
            {
                "uuid": str(group.uuid),
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
        "path": str(mdev.path),
        "parent": mdev.parent,
        "type": mdev.type_id,
        "device_api": mdev.device_api,
        "iommu_group": mdev.iommu_group,
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


def _used(found: Host) -> Counter[tuple[str, str | None]]:
    return Counter((mdev.parent, mdev.type_id) for mdev in found.mdevs)


def _show(found: Host, held: Holders) -> None:
    used = _used(found)
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
    )
    linked = [parent for parent in found.parents if parent.links is not None]
    if linked:
        output.emit("")
    output.emit_table(
        "Links between devices of a start group",
        ("parent", "links", "free"),
        [(parent.name, _line(parent.links), _line(parent.links_free)) for parent in linked],
    )
    if found.parents and found.mdevs:
        output.emit("")
    output.emit_table(
        "Devices",
        ("uuid", "parent", "type", "iommu", "state", "group", "holder", "remarks"),
        [
            (
                str(mdev.uuid),
                mdev.parent,
                _line(mdev.type_id),
                _line(mdev.iommu_group),
                STATES[mdev.online],
                NONE if mdev.group_uuid is None else str(mdev.group_uuid),
                ", ".join(map(str, held.of(mdev.uuid))),
                "; ".join(mdev.damage),
            )
            for mdev in found.mdevs
        ],
    )
    for damage in found.damage:
        output.say(damage)
    if not found.mdev_bus:
        output.say("this host has no mdev bus \u2014 modprobe mdev, and see mdo doctor")
    elif not found.parents:
        output.say("no device of this host offers mdevs \u2014 mdo doctor says what is missing")
    if held.unseen and found.mdevs:
        output.say(
            f"{held.unseen} processes of other users may hold devices too \u2014 run as root"
        )


def _line(value: object) -> str:
    return UNKNOWN if value is None else " ".join(str(value).split())
