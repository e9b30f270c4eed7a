# SPDX-License-Identifier: GPL-2.0-or-later
"""``mdo attach`` and ``mdo detach``."""

from __future__ import annotations

from typing import Annotated

from mdev_orchestrator.cli import output
from mdev_orchestrator.cli.guest import reclaim_groups
from mdev_orchestrator.cli.options import Argument, Option

GuestArgument = Annotated[str, Argument(metavar="GUEST", help="Name of a running guest.")]
JsonOption = Annotated[bool, Option("--json", help="One JSON document.")]


def attach(
    guest: GuestArgument,
    what: Annotated[
        str, Argument(metavar="UUID|TYPE", help="A device, or a type to create one of.")
    ],
    *,
    parent: Annotated[str | None, Option(help="Parent, when several offer the type.")] = None,
    wait_guest: Annotated[
        bool, Option("--wait-guest", help="Return when the guest has taken the device.")
    ] = False,
    deadline: Annotated[float, Option(min=0.1, help="Seconds for the whole.")] = 30.0,
    json: JsonOption = False,
) -> None:
    """Plug a device into a running guest."""
    from mdev_orchestrator.engine import attach

    output.run(reclaim_groups())
    done = output.run(
        attach.attach(
            guest,
            what,
            parent=parent,
            wait_guest=wait_guest,
            deadline=deadline,
            host=output.host_root(),
        )
    )
    if json:
        output.emit_json(
            {
                "guest": guest,
                "uuid": str(done.uuid),
                "device": done.device_id,
                "port": done.port,
                "created": done.created,
                "taken": True if wait_guest else None,
            }
        )
    else:
        output.emit(str(done.uuid))


def detach(
    guest: GuestArgument,
    uuid: Annotated[str, Argument(metavar="UUID", help="The device.")],
    *,
    remove: Annotated[
        bool, Option("--remove", help="Remove the device from the host afterwards.")
    ] = False,
    deadline: Annotated[float, Option(min=0.1, help="Seconds for the guest to let go.")] = 60.0,
    json: JsonOption = False,
) -> None:
    """Unplug a device from a running guest; returns when QEMU has closed it."""
    from mdev_orchestrator.engine import attach
    from mdev_orchestrator.model import parse_uuid

    output.run(
        attach.detach(
            guest, parse_uuid(uuid), remove=remove, deadline=deadline, host=output.host_root()
        )
    )
    if json:
        output.emit_json({"guest": guest, "uuid": uuid, "removed": remove})
