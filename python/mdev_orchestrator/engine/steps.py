# SPDX-License-Identifier: GPL-2.0-or-later
"""Single changes to one object, which operations are made of.

===========  =========  ==========================================================
step         undone by  afterwards
===========  =========  ==========================================================
``Create``   Remove     the mdev is there, set up, in its group, and can be opened
``Remove``   Create     it is not
``Launch``   Stop       the guest runs with its devices, and its groups are online
``Stop``     Launch     it does not, and they are offline
``Attach``   Detach     the guest has the device
``Detach``   Attach     it has not, and QEMU has closed it
===========  =========  ==========================================================

``AttachDomain`` and ``DetachDomain`` are the last two for a domain of libvirt.

Each *makes it so*: where it is so already there is nothing to do, so a step can be done again after
a crash, by another process. Each ends in one of three ways, which :func:`attempt` returns as a
:class:`Result`: done, without effect, or unknown.

Before a step touches an object it checks that this is still the one it means. An mdev of the same
UUID under another parent, or a guest of the same name with another UUID, is another program's.

Steps are data: the journal keeps them as JSON.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from mdev_orchestrator.engine import device_ops
from mdev_orchestrator.engine.context import Context
from mdev_orchestrator.engine.device_ops import Create, Remove, ResultCallback
from mdev_orchestrator.engine.domain_ops import AttachDomain, DetachDomain
from mdev_orchestrator.engine.guest_ops import Attach, Detach, Launch, Stop
from mdev_orchestrator.engine.journal_db import JournalError
from mdev_orchestrator.errors import MdoError

__all__ = [
    "AnyStep",
    "Attach",
    "AttachDomain",
    "Create",
    "Detach",
    "DetachDomain",
    "Launch",
    "Remove",
    "Stop",
    "act_together",
    "decode",
    "encode",
]

AnyStep = Create | Remove | Launch | Stop | Attach | Detach | AttachDomain | DetachDomain


async def act_together(
    steps: Sequence[AnyStep], context: Context, on_result: ResultCallback
) -> MdoError | None:
    """Make several steps of the same kind and ``batch``; see :func:`.device_ops.create_all`.

    :return: The first error. Of a step for which ``on_result`` was not called nothing is known.
    """
    devices = [step.device for step in steps if isinstance(step, Create | Remove)]
    act = device_ops.create_all if isinstance(steps[0], Create) else device_ops.remove_all
    try:
        await act(devices, context, on_result)
    except MdoError as error:
        return error
    return None


def encode(step: AnyStep) -> str:
    """A step as the journal keeps it."""
    return msgspec.json.encode(step).decode()


def decode(text: str) -> AnyStep:
    """Read a step.

    :raise HostError: It is none.
    """
    try:
        step: AnyStep = msgspec.json.decode(text, type=AnyStep)
    except (msgspec.DecodeError, RecursionError) as error:
        raise JournalError(
            f"the journal is damaged: a step of it cannot be read: {error}",
            "move it away; mdo adopt --all then makes a new one from what runs",
        ) from error
    else:
        return step
