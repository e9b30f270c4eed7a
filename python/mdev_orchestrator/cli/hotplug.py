# SPDX-License-Identifier: GPL-2.0-or-later
"""``mdo attach`` and ``mdo detach``."""

from __future__ import annotations

from typing import Annotated

import typer

from mdev_orchestrator.cli import output
from mdev_orchestrator.cli.context import run
from mdev_orchestrator.cli.guest import reclaim_groups
from mdev_orchestrator.cli.params import (
    Json,
    complete_device,
    complete_device_or_type,
    complete_guest,
    complete_parent,
    seconds,
)
from mdev_orchestrator.machine import Machine

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
    parent: Annotated[
        str | None,
        typer.Option(
            metavar="PARENT",
            help="Parent, when several offer the type.",
            autocompletion=complete_parent,
        ),
    ] = None,
    wait_guest: Annotated[
        bool, typer.Option("--wait-guest", help="Return when the guest has taken the device.")
    ] = False,
    deadline: Annotated[float, seconds("Seconds for the whole.", least=0.1)] = 30.0,
    json: Json = False,
) -> None:
    """Plug a device into a running guest."""
    from mdev_orchestrator.engine import attach

    async def work(machine: Machine) -> attach.Attached:
        await reclaim_groups(machine)
        return await attach.attach(
            machine, guest, what, parent=parent, wait_guest=wait_guest, deadline=deadline
        )

    done = run(work)
    made = f"mdev {done.uuid} is attached to guest {guest}"
    if not json:
        output.emit(str(done.uuid), made=made)
        return
    output.emit_json(
        {
            "guest": guest,
            "uuid": str(done.uuid),
            "device": done.device_id,
            "port": done.port,
            "created": done.created,
            "taken": True if wait_guest else None,
        },
        made=made,
    )


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
        output.emit_json({"guest": guest, "uuid": str(device), "removed": remove}, made=made)
