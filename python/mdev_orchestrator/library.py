# SPDX-License-Identifier: GPL-2.0-or-later
"""The library's face: an open machine, and everything that ``mdo`` does as methods of it.

>>> import mdev_orchestrator as mdo
>>> async def main() -> None:
...     async with mdo.open() as machine:
...         device = await machine.create("mvgpu-12")
...         await machine.attach("render-1", device.uuid)

A method that changes the machine does all of it or nothing, also when it is cancelled. It raises
:class:`mdev_orchestrator.errors.MdoError`, with the object, the outcome, and what to do. All
methods that look at the machine or change it are coroutines, and none holds the event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Self
from uuid import UUID

from mdev_orchestrator.engine import adopt as engine_adopt
from mdev_orchestrator.engine import apply as engine_apply
from mdev_orchestrator.engine import attach as engine_attach
from mdev_orchestrator.engine import devices, recovery
from mdev_orchestrator.engine import foreign as engine_foreign
from mdev_orchestrator.engine import guests as engine_guests
from mdev_orchestrator.engine import probe as engine_probe
from mdev_orchestrator.engine import restore as engine_restore
from mdev_orchestrator.engine.context import DEADLINE
from mdev_orchestrator.engine.executor import Observer, ignore
from mdev_orchestrator.engine.journal_db import read_managed
from mdev_orchestrator.engine.records import Managed
from mdev_orchestrator.errors import Outcome, UnknownError
from mdev_orchestrator.host import events as host_events
from mdev_orchestrator.host import sysfs
from mdev_orchestrator.host.events import Event
from mdev_orchestrator.machine import Machine
from mdev_orchestrator.model import Mdev


def open_machine(root: Path | str = "/", *, state: Path | str | None = None) -> OpenMachine:
    """Open a machine, for an ``async with``; :mod:`mdev_orchestrator` exports it as ``open``.

    :param root: Directory in which ``sys``, ``dev`` and ``proc`` are.
    :param state: The state directory; the one that ``mdo`` uses without it.
    """
    return OpenMachine(root, state=state)


class OpenMachine(Machine):
    """A machine, and all that can be done to it.

    Most methods are functions of the engine, which take the machine first: they are documented
    there.
    """

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    # ---- looking --------------------------------------------------------------------------------

    scan = sysfs.scan
    guests = engine_guests.guest_reports
    guest = engine_guests.show_guest
    foreign_guests = engine_foreign.foreign_guests

    async def managed(self) -> Managed:
        """Read the records of what is managed here; does not block the event loop.

        :raise HostError: The journal is damaged, of a newer version, or of another user.
        """
        return await asyncio.to_thread(read_managed, self)

    def events(self) -> AsyncGenerator[Event, None]:
        """Give every event about parents, mdevs and VFIO nodes, without end.

        :raise HostError: The kernel gives no event socket.
        """
        return host_events.events(lambda: host_events.udev_monitor(self))

    # ---- devices --------------------------------------------------------------------------------

    create_many = devices.create_devices
    remove = devices.remove_devices
    probe = engine_probe.probe

    async def create(
        self,
        type_id: str,
        *,
        parent: str | None = None,
        uuid: UUID | None = None,
        group: str | None = None,
        attributes: Sequence[tuple[str, str]] = (),
        deadline: float = DEADLINE,
        observe: Observer = ignore,
    ) -> Mdev:
        """Create one mdev, and return when it is usable.

        Takes and raises what :func:`mdev_orchestrator.engine.devices.create_devices` does.

        :raise UnknownError: Another program removed it as soon as it was there.
        """
        made = await self.create_many(
            type_id,
            1,
            parent=parent,
            uuids=() if uuid is None else (uuid,),
            group=group,
            attributes=attributes,
            deadline=deadline,
            observe=observe,
        )
        if not made:
            raise UnknownError(
                f"another program removed the mdev of type {type_id} right after its creation",
                "see which program it was, then try again",
                outcome=Outcome.UNKNOWN,
            )
        return made[0]

    # ---- guests ---------------------------------------------------------------------------------

    start_guest = engine_guests.start_guest
    stop_guest = engine_guests.stop_guest
    attach = engine_attach.attach
    detach = engine_attach.detach
    power_down = engine_restore.power_down

    # ---- specs ----------------------------------------------------------------------------------

    plan = engine_apply.preview
    diff = engine_apply.diff
    apply = engine_apply.apply
    destroy = engine_apply.destroy
    restore = engine_restore.restore

    # ---- after a crash --------------------------------------------------------------------------

    pending = recovery.pending
    recover = recovery.recover
    adopt = engine_adopt.adopt
