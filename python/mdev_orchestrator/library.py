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

from mdev_orchestrator.capacity.planner import Policy
from mdev_orchestrator.engine import adopt as engine_adopt
from mdev_orchestrator.engine import apply as engine_apply
from mdev_orchestrator.engine import attach as engine_attach
from mdev_orchestrator.engine import devices, guests, recovery
from mdev_orchestrator.engine import probe as engine_probe
from mdev_orchestrator.engine import restore as engine_restore
from mdev_orchestrator.engine.adopt import Adopted
from mdev_orchestrator.engine.attach import Attached
from mdev_orchestrator.engine.context import DEADLINE
from mdev_orchestrator.engine.diff import Changes, Preview
from mdev_orchestrator.engine.executor import Observer, ignore
from mdev_orchestrator.engine.journal import CLAIM_SECONDS
from mdev_orchestrator.engine.journal_db import read_managed
from mdev_orchestrator.engine.probe import Probed
from mdev_orchestrator.engine.records import Managed
from mdev_orchestrator.engine.recovery import Recovered
from mdev_orchestrator.engine.restore import WAIT_SECONDS, PoweredDown, Restored
from mdev_orchestrator.errors import Outcome, UnknownError
from mdev_orchestrator.host import events as host_events
from mdev_orchestrator.host import sysfs
from mdev_orchestrator.host.events import Event
from mdev_orchestrator.machine import Machine
from mdev_orchestrator.model import Host, Mdev
from mdev_orchestrator.qemu.hotplug import ATTACH_SECONDS, DETACH_SECONDS
from mdev_orchestrator.qemu.process import START_SECONDS, STOP_SECONDS, Ended, RunningGuest
from mdev_orchestrator.qemu.status import Report
from mdev_orchestrator.spec import Document, GuestConfig


def open_machine(root: Path | str = "/", *, state: Path | str | None = None) -> OpenMachine:
    """Open a machine, for an ``async with``; :mod:`mdev_orchestrator` exports it as ``open``.

    :param root: Directory in which ``sys``, ``dev`` and ``proc`` are.
    :param state: The state directory; the one that ``mdo`` uses without it.
    """
    return OpenMachine(root, state=state)


class OpenMachine(Machine):
    """A machine, and all that can be done to it."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    # ---- looking --------------------------------------------------------------------------------

    async def scan(self) -> Host:
        """Read all parents, types and mdevs; does not block the event loop."""
        return await sysfs.scan(self)

    async def managed(self) -> Managed:
        """Read the records of what is managed here; does not block the event loop.

        :raise HostError: The journal is damaged, of a newer version, or of another user.
        """
        return await asyncio.to_thread(read_managed, self)

    async def guests(self) -> list[Report]:
        """Look at all guests, and ask the QEMU of each.

        A QEMU that does not answer within five seconds is reported as not answering.
        """
        return await guests.guest_reports(self)

    async def guest(self, name: str) -> Report:
        """Look at one guest, and ask its QEMU.

        :raise UnknownError: There is no such guest.
        """
        return await guests.show_guest(self, name)

    def events(self) -> AsyncGenerator[Event, None]:
        """Give every event about parents, mdevs and VFIO nodes, without end.

        :raise HostError: The kernel gives no event socket.
        """
        return host_events.events(lambda: host_events.udev_monitor(self))

    # ---- devices --------------------------------------------------------------------------------

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

    async def create_many(
        self,
        type_id: str,
        count: int | None = None,
        *,
        parent: str | None = None,
        uuids: Sequence[UUID] = (),
        group: str | None = None,
        attributes: Sequence[tuple[str, str]] = (),
        deadline: float = DEADLINE,
        observe: Observer = ignore,
    ) -> tuple[Mdev, ...]:
        """Create mdevs of one type, all or none.

        Takes and raises what :func:`mdev_orchestrator.engine.devices.create_devices` does.
        """
        return await devices.create_devices(
            self,
            type_id,
            count,
            parent=parent,
            uuids=uuids,
            group=group,
            attributes=attributes,
            deadline=deadline,
            observe=observe,
        )

    async def remove(
        self,
        *uuids: UUID,
        detach: bool = False,
        deadline: float = DEADLINE,
        observe: Observer = ignore,
    ) -> tuple[UUID, ...]:
        """Remove mdevs, all or none.

        Takes and raises what :func:`mdev_orchestrator.engine.devices.remove_devices` does.
        """
        return await devices.remove_devices(
            self, uuids, detach=detach, deadline=deadline, observe=observe
        )

    async def probe(self, parent: str, *, deadline: float = DEADLINE) -> Probed:
        """Learn how a parent without devices fills.

        Raises what :func:`mdev_orchestrator.engine.probe.probe` does.
        """
        return await engine_probe.probe(self, parent, deadline=deadline)

    # ---- guests ---------------------------------------------------------------------------------

    async def start_guest(
        self,
        config: GuestConfig,
        mdevs: Sequence[UUID] = (),
        *,
        uuid: UUID | None = None,
        deadline: float = START_SECONDS,
        observe: Observer = ignore,
    ) -> RunningGuest:
        """Start a guest; it outlives the caller.

        Takes and raises what :func:`mdev_orchestrator.engine.guests.start_guest` does.
        """
        return await guests.start_guest(
            self, config, mdevs, uuid=uuid, deadline=deadline, observe=observe
        )

    async def stop_guest(
        self, name: str, *, deadline: float = STOP_SECONDS, force: bool = False
    ) -> Ended:
        """End a guest.

        Takes and raises what :func:`mdev_orchestrator.engine.guests.stop_guest` does.
        """
        return await guests.stop_guest(self, name, deadline=deadline, force=force)

    async def attach(
        self,
        guest: str,
        what: UUID | str,
        *,
        parent: str | None = None,
        wait_guest: bool = False,
        deadline: float = ATTACH_SECONDS,
        observe: Observer = ignore,
    ) -> Attached:
        """Plug a device into a running guest; a type instead of a UUID creates one.

        Takes and raises what :func:`mdev_orchestrator.engine.attach.attach` does.
        """
        return await engine_attach.attach(
            self,
            guest,
            str(what),
            parent=parent,
            wait_guest=wait_guest,
            deadline=deadline,
            observe=observe,
        )

    async def detach(
        self,
        guest: str,
        uuid: UUID,
        *,
        remove: bool = False,
        deadline: float = DETACH_SECONDS,
        observe: Observer = ignore,
    ) -> None:
        """Unplug a device from a running guest.

        Takes and raises what :func:`mdev_orchestrator.engine.attach.detach` does.
        """
        await engine_attach.detach(
            self, guest, uuid, remove=remove, deadline=deadline, observe=observe
        )

    async def power_down(
        self, *, deadline: float = STOP_SECONDS, force: bool = False
    ) -> tuple[PoweredDown, ...]:
        """Power down all guests, as before a shutdown of the machine."""
        return await engine_restore.power_down(self, deadline=deadline, force=force)

    # ---- specs ----------------------------------------------------------------------------------

    async def plan(self, document: Document, *, policy: Policy = "pack") -> Preview:
        """Find where the devices of a spec would go; changes nothing, and asks no guest.

        Raises what :func:`mdev_orchestrator.engine.apply.preview` does.
        """
        return await engine_apply.preview(self, document, policy=policy)

    async def diff(self, document: Document, *, policy: Policy = "pack") -> Changes:
        """Find what :meth:`apply` would do; changes nothing.

        Raises what :func:`mdev_orchestrator.engine.apply.diff` does.
        """
        return await engine_apply.diff(self, document, policy=policy)

    async def apply(
        self,
        document: Document,
        *,
        policy: Policy = "pack",
        restart: bool = False,
        force: bool = False,
        deadline: float | None = None,
        wait: float = CLAIM_SECONDS,
        observe: Observer = ignore,
    ) -> Changes:
        """Make a spec true, all of it or nothing.

        Takes and raises what :func:`mdev_orchestrator.engine.apply.apply` does.
        """
        return await engine_apply.apply(
            self,
            document,
            policy=policy,
            restart=restart,
            force=force,
            deadline=deadline,
            wait=wait,
            observe=observe,
        )

    async def destroy(
        self,
        name: str,
        *,
        force: bool = False,
        deadline: float = STOP_SECONDS,
        observe: Observer = ignore,
    ) -> Changes:
        """Remove all that a spec has brought.

        Takes and raises what :func:`mdev_orchestrator.engine.apply.destroy` does.
        """
        return await engine_apply.destroy(
            self, name, force=force, deadline=deadline, observe=observe
        )

    async def restore(
        self,
        names: Sequence[str] = (),
        *,
        wait: float = WAIT_SECONDS,
        observe: Observer = ignore,
    ) -> tuple[Restored, ...]:
        """After a reboot, bring back what was applied.

        Takes and raises what :func:`mdev_orchestrator.engine.restore.restore` does.
        """
        return await engine_restore.restore(self, names, wait=wait, observe=observe)

    # ---- after a crash --------------------------------------------------------------------------

    async def pending(self) -> list[Recovered]:
        """Find what :meth:`recover` would undo or finish; changes nothing.

        :raise HostError: The journal is damaged, of a newer version, or of another user.
        """
        return await recovery.pending(self)

    async def recover(
        self, *, deadline: float | None = None, observe: Observer = ignore
    ) -> list[Recovered]:
        """Undo or finish what processes left open that were killed.

        Takes and raises what :func:`mdev_orchestrator.engine.recovery.recover` does.
        """
        return await recovery.recover(self, deadline=deadline, observe=observe)

    async def adopt(self, names: Sequence[str] = (), *, everything: bool = False) -> Adopted:
        """Manage guests and devices that the journal does not know.

        Takes and raises what :func:`mdev_orchestrator.engine.adopt.adopt` does.
        """
        return await engine_adopt.adopt(self, names, everything=everything)
