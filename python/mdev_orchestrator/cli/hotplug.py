# SPDX-License-Identifier: GPL-2.0-or-later
"""``mdo attach`` and ``mdo detach``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from mdev_orchestrator.cli import output

GuestArgument = Annotated[str, typer.Argument(metavar="GUEST", help="Name of a running guest.")]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON document.")]


def attach(
    guest: GuestArgument,
    what: Annotated[
        str, typer.Argument(metavar="UUID|TYPE", help="A device, or a type to create one of.")
    ],
    *,
    parent: Annotated[str | None, typer.Option(help="Parent, when several offer the type.")] = None,
    wait_guest: Annotated[
        bool, typer.Option("--wait-guest", help="Return when the guest has taken the device.")
    ] = False,
    deadline: Annotated[float, typer.Option(min=0.1, help="Seconds for the whole.")] = 30.0,
    json: JsonOption = False,
) -> None:
    """Plug a device into a running guest."""
    done = output.run(_attach(guest, what, parent=parent, wait_guest=wait_guest, deadline=deadline))
    if json:
        output.emit_json(done)
    else:
        output.emit(done["uuid"])


async def _attach(
    guest: str, what: str, *, parent: str | None, wait_guest: bool, deadline: float
) -> dict[str, Any]:
    from mdev_orchestrator.cli.guest import sweep, usable_mdev
    from mdev_orchestrator.engine import lifecycle
    from mdev_orchestrator.engine.devices import create_devices
    from mdev_orchestrator.errors import RequestError, UuidError
    from mdev_orchestrator.model import parse_uuid
    from mdev_orchestrator.qemu.process import find_running

    await sweep()
    found = find_running(guest)
    try:
        uuid, created = parse_uuid(what), False
        if parent is not None:
            raise RequestError("--parent goes with a type, not with a UUID")
    except UuidError:
        made = await create_devices(
            what, 1, parent=parent, deadline=deadline, root=output.host_root()
        )
        uuid, created = made[0].uuid, True
    try:
        mdev = await usable_mdev(str(uuid), deadline)
        port = await lifecycle.attach(
            found, mdev, deadline=deadline, wait_guest=wait_guest, host=output.host_root()
        )
    except BaseException as error:
        if created:
            await _take_back(str(uuid), error)
        raise
    return {
        "guest": guest,
        "uuid": str(uuid),
        "device": mdev.device_id,
        "port": port,
        "created": created,
        "taken": True if wait_guest else None,
    }


async def _take_back(uuid: str, error: BaseException) -> None:
    """Remove what was created for an attach that failed; one that is plugged stays, and is told."""
    from mdev_orchestrator.engine.devices import remove_devices
    from mdev_orchestrator.errors import MdoError

    try:
        await remove_devices([uuid], root=output.host_root())
    except MdoError as failure:
        error.add_note(f"mdev {uuid} was created for it and stays: {failure.message}")


def detach(
    guest: GuestArgument,
    uuid: Annotated[str, typer.Argument(metavar="UUID", help="The device.")],
    *,
    remove: Annotated[
        bool, typer.Option("--remove", help="Remove the device from the host afterwards.")
    ] = False,
    deadline: Annotated[
        float, typer.Option(min=0.1, help="Seconds for the guest to let go.")
    ] = 60.0,
    json: JsonOption = False,
) -> None:
    """Unplug a device from a running guest; returns when QEMU has closed it."""
    output.run(_detach(guest, uuid, remove=remove, deadline=deadline))
    if json:
        output.emit_json({"guest": guest, "uuid": uuid, "removed": remove})


async def _detach(guest: str, text: str, *, remove: bool, deadline: float) -> None:
    from mdev_orchestrator.engine import lifecycle
    from mdev_orchestrator.model import parse_uuid

    uuid = parse_uuid(text)
    await lifecycle.detach(guest, uuid, deadline, host=output.host_root())
    if remove:
        from mdev_orchestrator.engine.devices import remove_devices

        await remove_devices([text], root=output.host_root())
