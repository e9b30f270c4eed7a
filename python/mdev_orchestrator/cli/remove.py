# SPDX-License-Identifier: GPL-2.0-or-later
"""``mdo remove``."""

from __future__ import annotations

from typing import Annotated
from uuid import UUID

from mdev_orchestrator.cli import output
from mdev_orchestrator.cli.options import Argument, Option
from mdev_orchestrator.engine.context import DEADLINE
from mdev_orchestrator.engine.devices import remove_devices


def remove(
    uuids: Annotated[list[str], Argument(metavar="UUID...", help="Devices to remove.")],
    *,
    detach: Annotated[
        bool, Option("--detach", help="Take a device out of the guest that holds it first.")
    ] = False,
    deadline: Annotated[
        float, Option(min=0.1, help="Seconds for each device, and again for each detach.")
    ] = DEADLINE,
    json: Annotated[bool, Option("--json", help="One JSON document.")] = False,
) -> None:
    """Remove devices. One that a guest holds is refused at once, and none is removed then."""
    removed = output.run(
        remove_devices(
            uuids,
            detach=_detach if detach else None,
            deadline=deadline,
            root=output.host_root(),
        )
    )
    if json:
        output.emit_json({"removed": [str(uuid) for uuid in removed]})


async def _detach(guest: str, uuid: UUID, deadline: float) -> None:
    from mdev_orchestrator.engine import lifecycle  # needs QMP, and few removals do

    await lifecycle.detach(guest, uuid, deadline, host=output.host_root())
