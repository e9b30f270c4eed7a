# SPDX-License-Identifier: GPL-2.0-or-later
"""Waits until an mdev that was just created can be opened by a guest.

That is when the kernel has linked its type and named its VFIO nodes, the nodes are there, and the
user that will open them may do so. The last is done by udev's rules, some time later.
"""

from __future__ import annotations

import asyncio
import os
from functools import partial
from uuid import UUID

from mdev_orchestrator.errors import DeadlineError
from mdev_orchestrator.host import iommu, sysfs
from mdev_orchestrator.host.events import wait_until
from mdev_orchestrator.host.iommu import Lack
from mdev_orchestrator.machine import Machine
from mdev_orchestrator.model import IommuChoice

EVERY_SECONDS = 2.0
"""For all nodes of a device to be ready, on a host that offers both kinds. Then one is enough: an
administrator may have given a permission for one kind only."""


def missing(
    machine: Machine,
    uuid: UUID,
    user: str | None = None,
    *,
    choice: IommuChoice = "auto",
    every: bool = True,
) -> Lack | None:
    """Say what an mdev lacks to be opened by ``user``, and the remedy.

    :param user: This process without one.
    :param choice: How it shall be opened; in each way that this host offers for ``auto``.
    :param every: Whether ``auto`` means that it can be opened in every such way, not only in one.
    :return: ``None`` when it is ready.
    :raise HostError: There is no such user.
    """
    if not os.path.lexists(sysfs.file(machine, uuid, "mdev_type")):
        if not os.path.exists(sysfs.file(machine, uuid, "")):
            remedy = "see the kernel log: its driver may have taken it back"
            return "it is not on the mdev bus", remedy
        return "the kernel has not linked its type", "see the kernel log"
    kinds = iommu.kinds(machine, user) if choice == "auto" else (choice,)
    lacks = [iommu.lack_of_node(machine, uuid, kind, user) for kind in kinds]
    if not every and None in lacks:
        return None
    return next((lack for lack in lacks if lack is not None), None)


async def wait_ready(
    machine: Machine,
    uuid: UUID,
    deadline: float,
    *,
    user: str | None = None,
    choice: IommuChoice = "auto",
) -> None:
    """Return when the mdev can be opened by ``user``, or by this process without one.

    :param deadline: Seconds.
    :param choice: How it shall be opened. For ``auto``, on a host that offers both ways, one of
        them is enough after :data:`EVERY_SECONDS`.
    :raise DeadlineError: Something is still missing; says what, and how to mend it.
    :raise HostError: There is no such user.
    """

    def is_ready(*, every: bool) -> bool:
        return missing(machine, uuid, user, choice=choice, every=every) is None

    if is_ready(every=True):
        return
    patience = min(deadline, EVERY_SECONDS)
    for seconds, every in ((patience, True), (deadline - patience, False)):
        try:
            async with asyncio.timeout(seconds):
                await wait_until(machine, partial(is_ready, every=every))
        except TimeoutError:
            continue
        return
    lack = missing(machine, uuid, user, choice=choice, every=False)
    if lack is not None:
        raise DeadlineError(
            f"mdev {uuid} is not usable after {deadline:g} s: {lack[0]}",
            lack[1],
            subject=f"mdev {uuid}",
        )
