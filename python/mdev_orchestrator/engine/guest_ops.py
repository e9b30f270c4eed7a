# SPDX-License-Identifier: GPL-2.0-or-later
"""The steps that start and end guests, plug and unplug: with the start groups of their devices.

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

from msgspec.structs import replace

from mdev_orchestrator import errors
from mdev_orchestrator.engine import guest_iommu, start_groups
from mdev_orchestrator.engine.context import Context
from mdev_orchestrator.engine.records import Change, GuestRecord
from mdev_orchestrator.engine.start_groups import Starter
from mdev_orchestrator.engine.step import Step
from mdev_orchestrator.errors import Outcome
from mdev_orchestrator.host import sysfs
from mdev_orchestrator.host.readiness import wait_ready
from mdev_orchestrator.machine import Machine
from mdev_orchestrator.model import Host, IommuChoice, StartGroup
from mdev_orchestrator.qemu import features, hotplug, process
from mdev_orchestrator.qemu.command import GuestMdev, GuestSpec
from mdev_orchestrator.qemu.guest_dir import attaching
from mdev_orchestrator.qemu.process import RunningGuest
from mdev_orchestrator.qemu.start import START_SECONDS, start_qemu
from mdev_orchestrator.qemu.stop import STOP_SECONDS, Ended, await_pending_shutdown, stop_qemu
from mdev_orchestrator.spec import GuestSettings, read_guest

READY_SECONDS = 10.0
"""For an mdev that exists to be openable."""


# ---------------------------------------------------------------- steps


class _GuestStep(Step, frozen=True):
    """Starts or ends a guest.

    :ivar devices: The mdevs that it gets on its command line, in order; or has when it ends.
    :ivar kept: Its record stays, though the guest does not run.
    """

    guest: GuestRecord
    devices: tuple[UUID, ...] = ()
    kept: bool = False

    @property
    def claims(self) -> tuple[str, ...]:
        return (f"guest:{self.guest.name}",)

    def _forget(self) -> Change:
        """What becomes of the records when the guest does not run."""
        keeps = self.kept or self.unrecorded
        return Change() if keeps else Change(guests={self.guest.name: None})


class Launch(_GuestStep, frozen=True, tag="launch"):
    """Start a guest."""

    deadline: float = START_SECONDS

    def __str__(self) -> str:
        """What it does."""
        count = len(self.devices)
        return f"start guest {self.guest.name}" + (
            f" with {count} device{'s' * (count > 1)}" if count else ""
        )

    @property
    def on_begin(self) -> Change:  # noqa: D102
        return Change() if self.unrecorded else Change(guests={self.guest.name: self.guest})

    @property
    def on_no_effect(self) -> Change:  # noqa: D102
        return self._forget()

    async def act(self, context: Context) -> None:  # noqa: D102
        with errors.before_acting():
            found = _guest(self.guest.name, context)
            if found is not None and found.alive and found.record is not None:
                if not context.repairing or found.record.uuid != self.guest.uuid:
                    raise errors.BusyError(
                        f"{found.label} runs already, as process {found.record.pid}",
                        f"mdo guest stop {self.guest.name}, or take another name",
                        subject=found.label,
                    )
                if not await await_pending_shutdown(found):
                    return
            mdevs = [_usable(uuid, context) for uuid in self.devices]
            spec = guest_spec(self.guest, mdevs)
        await launch(context.machine, spec, deadline=self.deadline)

    def inverse(self) -> Stop:
        """What undoes it: a guest that has only just begun is not asked to power down."""
        return Stop(
            guest=self.guest,
            devices=self.devices,
            kept=self.kept,
            unrecorded=self.unrecorded,
            force=True,
            deadline=0,
        )


class Stop(_GuestStep, frozen=True, tag="stop"):
    """End a guest.

    :ivar deadline: Seconds for it to power down; 0 with ``force`` does not ask it.
    """

    force: bool = False
    deadline: float = STOP_SECONDS

    def __str__(self) -> str:
        """What it does."""
        return f"stop guest {self.guest.name}"

    @property
    def on_done(self) -> Change:  # noqa: D102
        return self._forget()

    async def act(self, context: Context) -> None:  # noqa: D102
        found = _guest(self.guest.name, context)
        if found is None or (found.record is not None and found.record.uuid != self.guest.uuid):
            return
        # one without a record was cut short at its start and cannot be asked to power down
        force = self.force or (context.repairing and found.record is None)
        context.ended[found.name] = await end(
            context.machine, found, deadline=self.deadline, force=force
        )

    def inverse(self) -> Launch:
        """What undoes it."""
        return Launch(
            guest=self.guest,
            devices=self.devices,
            kept=self.kept,
            unrecorded=self.unrecorded,
        )


class _PlugStep(Step, frozen=True):
    """Plugs an mdev into a running guest, or unplugs it."""

    guest: GuestRecord
    uuid: UUID

    @property
    def claims(self) -> tuple[str, ...]:
        return (f"guest:{self.guest.name}", f"mdev:{self.uuid}")


class Attach(_PlugStep, frozen=True, tag="attach"):
    """Plug an mdev into a running guest.

    :ivar iommu: How the device shall be opened.
    """

    deadline: float = hotplug.ATTACH_SECONDS
    iommu: IommuChoice = "auto"
    undo_deadline: float = hotplug.DETACH_SECONDS

    def __str__(self) -> str:
        """What it does."""
        return f"attach mdev {self.uuid} to guest {self.guest.name}"

    async def act(self, context: Context) -> None:  # noqa: D102
        with errors.before_acting():
            found = _alive(self.guest, context)
            if found is None:
                if context.repairing:
                    return  # a guest that has ended has no devices to give back
                raise errors.RequestError(
                    f"guest {self.guest.name} does not run",
                    "mdo apply starts it",
                    subject=f"guest {self.guest.name}",
                )
            if context.repairing and await hotplug.await_pending_unplug(
                found, self.uuid, deadline=self.deadline
            ):
                return
            mdev = _usable(self.uuid, context)
        seconds = context.seconds(self.deadline)
        context.ports[self.uuid] = await attach(
            context.machine, found, mdev, iommu=self.iommu, deadline=seconds
        )

    def inverse(self) -> Detach:
        """What undoes it."""
        return Detach(guest=self.guest, uuid=self.uuid, deadline=self.undo_deadline)


class Detach(_PlugStep, frozen=True, tag="detach"):
    """Unplug an mdev from a guest.

    :ivar named: A user named the device: that the guest does not have it is an error.
    """

    deadline: float = hotplug.DETACH_SECONDS
    named: bool = False

    def __str__(self) -> str:
        """What it does."""
        return f"detach mdev {self.uuid} from guest {self.guest.name}"

    async def act(self, context: Context) -> None:  # noqa: D102
        if _alive(self.guest, context) is None:
            return
        try:
            await detach(context.machine, self.guest.name, self.uuid, self.deadline)
        except errors.UnknownError:
            if self.named and not context.repairing:
                raise

    def inverse(self) -> Attach:
        """What undoes it."""
        return Attach(guest=self.guest, uuid=self.uuid, undo_deadline=self.deadline)


def guest_spec(own: GuestRecord, mdevs: list[GuestMdev]) -> GuestSpec:
    """What the journal knows of a guest, for QEMU.

    :raise HostError: The journal is damaged.
    """
    config = read_guest(own.definition)
    settings = {name: getattr(config, name) for name in GuestSettings.__struct_fields__}
    return GuestSpec(**settings, uuid=own.uuid, mdevs=tuple(mdevs))


def _usable(uuid: UUID, context: Context) -> GuestMdev:
    found = sysfs.read_mdev(context.machine, uuid)
    if found is None:
        raise errors.UnknownError(
            f"there is no mdev {uuid}", "mdo host lists them", subject=f"mdev {uuid}"
        )
    return GuestMdev(uuid, found.path, found.device_api or "vfio-pci")


def _guest(name: str, context: Context) -> RunningGuest | None:
    try:
        return process.find(context.machine, name)
    except errors.UnknownError:
        return None


def is_alive(machine: Machine, name: str) -> bool:
    """Whether a guest of this name runs."""
    try:
        return process.find(machine, name).alive
    except errors.UnknownError:
        return False


def _alive(own: GuestRecord, context: Context) -> RunningGuest | None:
    """The guest that is meant, if it runs; not another one of its name."""
    found = _guest(own.name, context)
    if found is None or not found.alive or found.record is None:
        return None
    return found if found.record.uuid == own.uuid else None


# ---------------------------------------------------------------- what they do


async def usable_mdev(
    machine: Machine,
    uuid: UUID,
    deadline: float,
    iommu: IommuChoice = "auto",
    *,
    user: str | None = None,
) -> GuestMdev:
    """Wait until an mdev of the host can be opened; which process has it open is checked later.

    :param deadline: Seconds; at most :data:`READY_SECONDS` of them.
    :param iommu: How it shall be opened.
    :param user: The user that will open it; the caller's without one.
    :raise UnknownError: There is no such mdev.
    :raise HostError: The host has no iommufd, which was asked for.
    :raise DeadlineError: It cannot be opened; says why.
    """
    guest_iommu.check_host(machine, iommu)
    mdev = sysfs.read_mdev(machine, uuid)
    if mdev is None:
        raise errors.UnknownError(
            f"there is no mdev {uuid}",
            "mdo host lists them; mdo create makes one",
            subject=f"mdev {uuid}",
        )
    await wait_ready(machine, uuid, min(deadline, READY_SECONDS), user=user, choice=iommu)
    return GuestMdev(uuid, mdev.path, mdev.device_api or "vfio-pci")


async def launch(
    machine: Machine, spec: GuestSpec, *, deadline: float = START_SECONDS
) -> RunningGuest:
    """Start a guest, and the groups of its mdevs before that; all of it or nothing.

    :param deadline: Seconds until QEMU must answer, and for each group at most
        :data:`.start_groups.START_SECONDS` of them before that.
    :raise BusyError: Another process has a member of a group open.
    :raise RequestError: A group is not complete.
    :raise HostError: The guest shall have its mdevs by iommufd, and that cannot be.
    :raise MdoError: A group did not come online, see :func:`mdev_orchestrator.host.groups.start`;
        or what :func:`mdev_orchestrator.qemu.start.start_qemu` raises.
    """
    with errors.before_acting():
        await start_groups.reclaim_groups(machine)
        spec = replace(spec, iommu=await guest_iommu.for_launch(machine, spec))
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
        seconds = min(deadline, start_groups.START_SECONDS)
        async with contextlib.AsyncExitStack() as stack:
            for group, by in starters.items():
                await stack.enter_async_context(
                    start_groups.online(machine, place, group, by, seconds)
                )
            await stack.enter_async_context(start_groups.explained(machine, wanted))
            yield

    return await start_qemu(machine, spec, deadline=deadline, around=around)


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
    iommu: IommuChoice = "auto",
    deadline: float = hotplug.ATTACH_SECONDS,
) -> str | None:
    """Plug an mdev into a running guest, and start its group before that if it is offline.

    :param iommu: How it shall be opened.
    :param deadline: Seconds for the whole.
    :return: The root port that it is in; ``None`` for a device that needs none.
    :raise BusyError: Another process has a member of the group open.
    :raise RequestError: The guest's devices are opened in another way.
    :raise HostError: It shall be opened by iommufd, and that cannot be.
    :raise MdoError: The group did not come online; or what
        :func:`mdev_orchestrator.qemu.hotplug.plug_by` raises.
    """
    from mdev_orchestrator.qemu.monitor import connect

    end = asyncio.get_running_loop().time() + deadline
    async with contextlib.AsyncExitStack() as stack:
        with errors.before_acting():
            await stack.enter_async_context(attaching(guest))
            qmp = await stack.enter_async_context(
                connect(guest.qmp_socket, guest.label, deadline=deadline)
            )
            kind = await guest_iommu.for_attach(machine, guest, qmp, mdev, iommu)
            found = await sysfs.scan(machine, types=False)
            wanted = start_groups.groups_of(found, [mdev.uuid])
            own = None if guest.record is None else guest.record.pid
            starters: dict[StartGroup, Starter] = {}
            for group in wanted:
                held = await start_groups.holders_of(machine, [group], found)
                start_groups.check_users(group, held, own)
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
        iommufd = None
        if kind == "iommufd":
            iommufd = await stack.enter_async_context(hotplug.iommufd_object(machine, qmp))
        return await hotplug.plug_by(qmp, hotplug.device_for(mdev, iommufd), end)


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
    except errors.UnknownError:
        return  # it has ended since, and its groups were stopped with it
    if not process.has_started(found):
        return
    for reclaimed in await start_groups.release_groups(machine, found):
        if reclaimed.error:
            raise errors.MdoError(
                f"mdev {uuid} is out of guest {guest}, but {reclaimed.group}: {reclaimed.error}",
                "mdo recover tries again",
                outcome=Outcome.UNKNOWN,
                subject=reclaimed.group,
            )


async def end(
    machine: Machine,
    guest: RunningGuest,
    *,
    deadline: float = STOP_SECONDS,
    force: bool = False,
) -> Ended:
    """End a guest, stop what was started for it, and remove its directory.

    :param deadline: Seconds for the guest to power down; 0 with ``force`` does not ask it.
    :raise MdoError: What :func:`.stop.stop_qemu` raises; or the guest has ended
        and a group does not go offline: then its directory stays, and the next command tries again.
    """

    async def release(ended: RunningGuest) -> None:
        if not process.has_started(ended):
            return
        for reclaimed in await start_groups.release_groups(machine, ended):
            if reclaimed.error:
                raise errors.MdoError(
                    f"{ended.label} has ended, but {reclaimed.group} may still be online: "
                    f"{reclaimed.error}",
                    "the next mdo guest command tries again",
                    outcome=Outcome.UNKNOWN,
                    subject=reclaimed.group,
                )

    return await stop_qemu(machine, guest, deadline=deadline, force=force, release=release)
