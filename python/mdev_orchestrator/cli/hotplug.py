# SPDX-License-Identifier: GPL-2.0-or-later
"""``mdo attach`` and ``mdo detach``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any
from uuid import UUID

import typer

from mdev_orchestrator.cli import output
from mdev_orchestrator.cli.context import run
from mdev_orchestrator.cli.guest import reclaim_groups
from mdev_orchestrator.cli.params import (
    Iommu,
    Json,
    ParentOfType,
    complete_device,
    complete_device_or_type,
    complete_guest,
    seconds,
)
from mdev_orchestrator.machine import Machine

if TYPE_CHECKING:
    from mdev_orchestrator.engine.attach import Attached

GuestArgument = Annotated[
    str,
    typer.Argument(metavar="GUEST", help="Name of a running guest.", autocompletion=complete_guest),
]


def attach(
    guest: GuestArgument,
    what: Annotated[
        str,
        typer.Argument(
            metavar="UUID|TYPE",
            help="A device, or a type to create one of.",
            autocompletion=complete_device_or_type,
        ),
    ],
    *,
    parent: ParentOfType = None,
    iommu: Iommu = "auto",
    wait_guest: Annotated[
        bool, typer.Option("--wait-guest", help="Return when the guest has taken the device.")
    ] = False,
    deadline: Annotated[float, seconds("Seconds for the whole.", least=0.1)] = 30.0,
    json: Json = False,
) -> None:
    """Plug a device into a running guest."""
    from mdev_orchestrator.engine import attach
    from mdev_orchestrator.qemu.command import parse_iommu

    choice = parse_iommu(iommu)

    async def work(machine: Machine) -> Attached:
        await reclaim_groups(machine)
        return await attach.attach(
            machine,
            guest,
            what,
            parent=parent,
            iommu=choice,
            wait_guest=wait_guest,
            deadline=deadline,
        )

    done = run(work)
    made = f"mdev {done.uuid} is attached to guest {guest}"
    if json:
        output.emit_json(attached_shape(guest, done, taken=wait_guest), made=made)
    else:
        output.emit(str(done.uuid), made=made)


def attached_shape(guest: str, done: Attached, *, taken: bool) -> dict[str, Any]:
    """The documented JSON shape of a device that was attached."""
    return {
        "guest": guest,
        "uuid": str(done.uuid),
        "device": done.device_id,
        "port": done.port,
        "created": done.created,
        "taken": True if taken else None,
    }


def detach(
    guest: GuestArgument,
    uuid: Annotated[
        str,
        typer.Argument(metavar="UUID", help="The device.", autocompletion=complete_device),
    ],
    *,
    remove: Annotated[
        bool, typer.Option("--remove", help="Remove the device from the host afterwards.")
    ] = False,
    deadline: Annotated[float, seconds("Seconds for the guest to let go.", least=0.1)] = 60.0,
    json: Json = False,
) -> None:
    """Unplug a device from a running guest; returns when QEMU has closed it."""
    from mdev_orchestrator.engine import attach
    from mdev_orchestrator.model import parse_uuid

    device = parse_uuid(uuid)
    run(lambda machine: attach.detach(machine, guest, device, remove=remove, deadline=deadline))
    if json:
        made = f"mdev {device} is detached from guest {guest}"
        output.emit_json(detached_shape(guest, device, removed=remove), made=made)


def detached_shape(guest: str, device: UUID, *, removed: bool) -> dict[str, Any]:
    """The documented JSON shape of a device that was detached."""
    return {"guest": guest, "uuid": str(device), "removed": removed}
