# SPDX-License-Identifier: GPL-2.0-or-later
"""Starting and ending guests, plugging and unplugging: with the start groups of their devices.

:mod:`..qemu` knows one QEMU; this module brings the groups online before QEMU opens a member, and
offline when it has closed the last (:mod:`.start_groups`).
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import AsyncIterator, Collection
from pathlib import Path
from uuid import UUID

from mdev_orchestrator.engine import start_groups
from mdev_orchestrator.engine.start_groups import START_SECONDS, Starter
from mdev_orchestrator.errors import MdoError, Outcome, UnknownError, before_acting
from mdev_orchestrator.host import sysfs
from mdev_orchestrator.host.readiness import wait_ready
from mdev_orchestrator.machine import Machine
from mdev_orchestrator.model import Host, StartGroup
from mdev_orchestrator.qemu import features, hotplug, process
from mdev_orchestrator.qemu.command import GuestMdev, GuestSpec
from mdev_orchestrator.qemu.process import Ended, RunningGuest

READY_SECONDS = 10.0
"""For an mdev that exists to be openable."""


async def usable_mdev(machine: Machine, uuid: UUID, deadline: float) -> GuestMdev:
    """Wait until an mdev of the host can be opened; which process has it open is checked later.

    :param deadline: Seconds; at most :data:`READY_SECONDS` of them.
    :raise UnknownError: There is no such mdev.
    :raise DeadlineError: It cannot be opened; says why.
    """
    mdev = sysfs.read_mdev(machine, uuid)
    if mdev is None:
        raise UnknownError(
            f"there is no mdev {uuid}",
            "mdo host lists them; mdo create makes one",
            subject=f"mdev {uuid}",
        )
    await wait_ready(machine, uuid, min(deadline, READY_SECONDS))
    return GuestMdev(uuid, mdev.path, mdev.device_api or "vfio-pci")


async def launch(
    machine: Machine, spec: GuestSpec, *, deadline: float = process.START_SECONDS
) -> RunningGuest:
    """Start a guest, and the groups of its mdevs before that; all of it or nothing.

    :param deadline: Seconds until QEMU must answer, and for each group at most
        :data:`.start_groups.START_SECONDS` of them before that.
    :raise BusyError: Another process has a member of a group open.
    :raise RequestError: A group is not complete.
    :raise MdoError: A group did not come online, see :func:`mdev_orchestrator.host.groups.start`;
        or what :func:`mdev_orchestrator.qemu.process.start` raises.
    """
    with before_acting():
        await start_groups.reclaim_groups(machine)
        found = await sysfs.scan(machine, types=False) if spec.mdevs else Host()
        given = {mdev.uuid: mdev.device_api for mdev in spec.mdevs}
        wanted = start_groups.groups_of(found, given)
        held = await start_groups.holders_of(machine, wanted, found)
        for group in wanted:
            start_groups.check_users(group, held)
        start_groups.check_complete(f"guest {spec.name}", wanted, given)
        starters = {
            group: await _starter(spec.qemu, group, given[_first(group, given)]) for group in wanted
        }

    @contextlib.asynccontextmanager
    async def around(directory: Path) -> AsyncIterator[None]:
        place = directory / process.STARTED
        seconds = min(deadline, START_SECONDS)
        async with contextlib.AsyncExitStack() as stack:
            for group, by in starters.items():
                await stack.enter_async_context(
                    start_groups.online(machine, place, group, by, seconds)
                )
            await stack.enter_async_context(start_groups.explained(machine, wanted))
            yield

    return await process.start(machine, spec, deadline=deadline, around=around)


async def _starter(qemu: str, group: StartGroup, driver: str) -> Starter:
    """The program that starts a group for a QEMU that is launched."""
    if group.online is not False:
        return "mdo"
    program = shutil.which(qemu) or qemu
    return "qemu" if features.START in await features.properties(program, driver) else "mdo"


def _first(group: StartGroup, of: Collection[UUID]) -> UUID:
    return next(uuid for uuid in group.members if uuid in of)


async def attach(
    machine: Machine,
    guest: RunningGuest,
    mdev: GuestMdev,
    *,
    deadline: float = hotplug.ATTACH_SECONDS,
) -> str | None:
    """Plug an mdev into a running guest, and start its group before that if it is offline.

    :param deadline: Seconds for the whole.
    :return: The root port that it is in; ``None`` for a device that needs none.
    :raise BusyError: Another process has a member of the group open.
    :raise MdoError: The group did not come online; or what
        :func:`mdev_orchestrator.qemu.hotplug.plug_by` raises.
    """
    from mdev_orchestrator.qemu.monitor import connect

    end = asyncio.get_running_loop().time() + deadline
    async with contextlib.AsyncExitStack() as stack:
        with before_acting():
            await stack.enter_async_context(process.attaching(guest))
            qmp = await stack.enter_async_context(
                connect(guest.qmp_socket, guest.label, deadline=deadline)
            )
            found = await sysfs.scan(machine, types=False)
            wanted = start_groups.groups_of(found, [mdev.uuid])
            starters: dict[StartGroup, Starter] = {}
            for group in wanted:
                held = await start_groups.holders_of(machine, [group], found)
                start_groups.check_users(group, held, guest)
                has_start = group.online is False and await features.has_property(
                    qmp, mdev.device_api, features.START
                )
                starters[group] = "qemu" if has_start else "mdo"
        for group, by in starters.items():
            left = end - asyncio.get_running_loop().time()
            await stack.enter_async_context(
                start_groups.online(machine, guest.started, group, by, left)
            )
            await stack.enter_async_context(start_groups.explained(machine, [group]))
        return await hotplug.plug_by(qmp, hotplug.device_for(mdev), end)


async def detach(
    machine: Machine, guest: str, uuid: UUID, deadline: float = hotplug.DETACH_SECONDS
) -> None:
    """Unplug an mdev from a running guest, and stop its group when that was its last member.

    :param deadline: Seconds for the guest.
    :raise MdoError: What :func:`mdev_orchestrator.qemu.hotplug.detach` raises; or the device is out
        and its group does not go offline.
    """
    await hotplug.detach(machine, guest, uuid, deadline)
    try:
        found = process.find(machine, guest)
    except UnknownError:
        return  # it has ended since, and its groups were stopped with it
    if not process.has_started(found):
        return
    for reclaimed in await start_groups.release_groups(machine, found):
        if reclaimed.error:
            raise MdoError(
                f"mdev {uuid} is out of guest {guest}, but {reclaimed.group}: {reclaimed.error}",
                "mdo recover tries again",
                outcome=Outcome.UNKNOWN,
                subject=reclaimed.group,
            )


async def end(
    machine: Machine,
    guest: RunningGuest,
    *,
    deadline: float = process.STOP_SECONDS,
    force: bool = False,
) -> Ended:
    """End a guest, stop what was started for it, and remove its directory.

    :param deadline: Seconds for the guest to power down; 0 with ``force`` does not ask it.
    :raise MdoError: What :func:`mdev_orchestrator.qemu.process.stop` raises; or the guest has ended
        and a group does not go offline: then its directory stays, and the next command tries again.
    """

    async def release(ended: RunningGuest) -> None:
        if not process.has_started(ended):
            return
        for reclaimed in await start_groups.release_groups(machine, ended):
            if reclaimed.error:
                raise MdoError(
                    f"{ended.label} has ended, but {reclaimed.group} may still be online: "
                    f"{reclaimed.error}",
                    "the next mdo guest command tries again",
                    outcome=Outcome.UNKNOWN,
                    subject=reclaimed.group,
                )

    return await process.stop(machine, guest, deadline=deadline, force=force, release=release)
