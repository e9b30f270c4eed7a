# SPDX-License-Identifier: GPL-2.0-or-later
"""What the machine can be made to do, one object at a time.

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

Each *makes it so*: where it is so already there is nothing to do, so a step can be done again after
a crash, by whoever comes next. And each is all or nothing by itself: a step that raises an error
has taken back what it did. Where that cannot be known (a driver that does not answer), it raises
:class:`.context.UnsettledError`; and of one that was cancelled nothing is known either.

Before a step touches an object it looks whether that is still the one it means. An mdev of the same
UUID under another parent, or a guest of the same name with another UUID, is somebody else's.

Steps are data: the journal keeps them as JSON.
"""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

import msgspec

from mdev_orchestrator.engine import device_ops, lifecycle
from mdev_orchestrator.engine.context import Context
from mdev_orchestrator.engine.device_ops import ResultCallback
from mdev_orchestrator.engine.journal_db import Change, DeviceRecord, GuestRecord
from mdev_orchestrator.errors import BusyError, HostError, RequestError, UnknownError
from mdev_orchestrator.host import sysfs
from mdev_orchestrator.qemu import hotplug, process
from mdev_orchestrator.qemu.command import GuestMdev, GuestSpec
from mdev_orchestrator.qemu.process import RunningGuest
from mdev_orchestrator.spec import read_guest


class Step(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="do"):
    """One change to one object."""

    @property
    def claims(self) -> tuple[str, ...]:
        """The objects that it changes, as the journal claims them."""
        raise NotImplementedError

    @property
    def intent(self) -> Change:
        """What is ours as soon as it may have begun."""
        return Change()

    @property
    def outcome(self) -> Change:
        """What is ours, or not any more, when it is done."""
        return Change()

    @property
    def refused(self) -> Change:
        """What is ours, or not any more, when it has done nothing."""
        return Change()

    @property
    def joins_others(self) -> bool:
        """Whether it is better made together with others of its kind, by ``make_all``."""
        return False

    async def make(self, context: Context) -> None:
        """Make it so.

        :raise MdoError: It cannot be; nothing was changed.
        :raise UnsettledError: It may come true yet.
        """
        raise NotImplementedError


class Create(Step, frozen=True, tag="create"):
    """Make an mdev.

    :ivar kept: It was ours before, though it was not there: it stays ours if this fails.
    """

    device: DeviceRecord
    kept: bool = False

    def __str__(self) -> str:
        """What it does."""
        d = self.device
        return f"create {d.type} on {d.parent}: mdev {d.uuid}"

    @property
    def joins_others(self) -> bool:  # noqa: D102 - where nothing is to be set up afterwards
        device = self.device
        return not (device.params or device.attributes or device.group)

    @property
    def claims(self) -> tuple[str, ...]:  # noqa: D102
        return (f"mdev:{self.device.uuid}",)

    @property
    def intent(self) -> Change:  # noqa: D102
        return Change(devices={self.device.uuid: self.device})

    @property
    def refused(self) -> Change:  # noqa: D102
        return Change() if self.kept else Change(devices={self.device.uuid: None})

    async def make(self, context: Context) -> None:  # noqa: D102
        await device_ops.create(self.device, context)

    def inverse(self) -> Remove:
        """What undoes it."""
        return Remove(device=self.device, kept=self.kept)


class Remove(Step, frozen=True, tag="remove"):
    """Remove an mdev.

    :ivar kept: It stays ours, though it is not there.
    """

    device: DeviceRecord
    kept: bool = False

    def __str__(self) -> str:
        """What it does."""
        return f"remove mdev {self.device.uuid} ({self.device.type} on {self.device.parent})"

    @property
    def claims(self) -> tuple[str, ...]:  # noqa: D102
        return (f"mdev:{self.device.uuid}",)

    @property
    def outcome(self) -> Change:  # noqa: D102
        return Change() if self.kept else Change(devices={self.device.uuid: None})

    @property
    def joins_others(self) -> bool:  # noqa: D102
        return True

    async def make(self, context: Context) -> None:  # noqa: D102
        await device_ops.remove(self.device, context)

    def inverse(self) -> Create:
        """What undoes it."""
        return Create(device=self.device, kept=self.kept)


class Launch(Step, frozen=True, tag="launch"):
    """Start a guest.

    :ivar devices: The mdevs on its command line, in order.
    """

    guest: GuestRecord
    devices: tuple[UUID, ...] = ()
    kept: bool = False
    deadline: float = process.START_SECONDS

    def __str__(self) -> str:
        """What it does."""
        count = len(self.devices)
        return f"start guest {self.guest.name}" + (
            f" with {count} device{'s' * (count > 1)}" if count else ""
        )

    @property
    def claims(self) -> tuple[str, ...]:  # noqa: D102
        return (f"guest:{self.guest.name}",)

    @property
    def intent(self) -> Change:  # noqa: D102
        return Change(guests={self.guest.name: self.guest})

    @property
    def refused(self) -> Change:  # noqa: D102
        return Change() if self.kept else Change(guests={self.guest.name: None})

    async def make(self, context: Context) -> None:  # noqa: D102
        found = _guest(self.guest.name, context)
        if found is not None and found.alive and found.record is not None:
            if not context.repairing or found.record.uuid != self.guest.uuid:
                raise BusyError(
                    f"{found.label} runs already, as process {found.record.pid}",
                    f"mdo guest stop {self.guest.name}, or take another name",
                )
            if not await process.await_pending_shutdown(found):
                return
        await lifecycle.launch(
            guest_spec(self.guest, [_usable(uuid, context) for uuid in self.devices]),
            deadline=self.deadline,
            root=context.guests,
            host=context.host,
            write=context.start,
        )

    def inverse(self) -> Stop:
        """What undoes it: without asking a guest that has only just begun."""
        return Stop(guest=self.guest, devices=self.devices, kept=self.kept, force=True, deadline=0)


class Stop(Step, frozen=True, tag="stop"):
    """End a guest.

    :ivar devices: The mdevs that it has now.
    :ivar deadline: Seconds for it to power down; 0 with ``force`` does not ask it.
    :ivar kept: It stays ours, though it does not run.
    """

    guest: GuestRecord
    devices: tuple[UUID, ...] = ()
    kept: bool = False
    force: bool = False
    deadline: float = process.STOP_SECONDS

    def __str__(self) -> str:
        """What it does."""
        return f"stop guest {self.guest.name}"

    @property
    def claims(self) -> tuple[str, ...]:  # noqa: D102
        return (f"guest:{self.guest.name}",)

    @property
    def outcome(self) -> Change:  # noqa: D102
        return Change() if self.kept else Change(guests={self.guest.name: None})

    async def make(self, context: Context) -> None:  # noqa: D102
        found = _guest(self.guest.name, context)
        if found is None or (found.record is not None and found.record.uuid != self.guest.uuid):
            return
        # one without a record was cut short at its start: nothing of it can be asked
        force = self.force or found.record is None
        await lifecycle.end(
            found, deadline=self.deadline, force=force, host=context.host, write=context.start
        )

    def inverse(self) -> Launch:
        """What undoes it."""
        return Launch(guest=self.guest, devices=self.devices, kept=self.kept)


class Attach(Step, frozen=True, tag="attach"):
    """Plug an mdev into a running guest."""

    guest: GuestRecord
    uuid: UUID
    deadline: float = hotplug.ATTACH_SECONDS
    undo_deadline: float = hotplug.DETACH_SECONDS

    def __str__(self) -> str:
        """What it does."""
        return f"attach mdev {self.uuid} to guest {self.guest.name}"

    @property
    def claims(self) -> tuple[str, ...]:  # noqa: D102
        return (f"guest:{self.guest.name}", f"mdev:{self.uuid}")

    async def make(self, context: Context) -> None:  # noqa: D102
        found = _alive(self.guest, context)
        if found is None:
            if context.repairing:
                return  # a guest that has gone has no devices to give back
            raise RequestError(f"guest {self.guest.name} does not run", "mdo apply starts it")
        if context.repairing and await hotplug.await_pending_unplug(
            found, self.uuid, deadline=self.deadline
        ):
            return
        context.ports[self.uuid] = await lifecycle.attach(
            found,
            _usable(self.uuid, context),
            deadline=self.deadline,
            host=context.host,
            write=context.start,
        )

    def inverse(self) -> Detach:
        """What undoes it."""
        return Detach(guest=self.guest, uuid=self.uuid, deadline=self.undo_deadline)


class Detach(Step, frozen=True, tag="detach"):
    """Unplug an mdev from a guest.

    :ivar named: Whether somebody named it who wants to know when the guest does not have it.
    """

    guest: GuestRecord
    uuid: UUID
    deadline: float = hotplug.DETACH_SECONDS
    named: bool = False

    def __str__(self) -> str:
        """What it does."""
        return f"detach mdev {self.uuid} from guest {self.guest.name}"

    @property
    def claims(self) -> tuple[str, ...]:  # noqa: D102
        return (f"guest:{self.guest.name}", f"mdev:{self.uuid}")

    async def make(self, context: Context) -> None:  # noqa: D102
        if _alive(self.guest, context) is None:
            return
        try:
            await lifecycle.detach(
                self.guest.name,
                self.uuid,
                self.deadline,
                root=context.guests,
                host=context.host,
                write=context.start,
            )
        except UnknownError:
            if self.named and not context.repairing:
                raise

    def inverse(self) -> Attach:
        """What undoes it."""
        return Attach(guest=self.guest, uuid=self.uuid, undo_deadline=self.deadline)


AnyStep = Create | Remove | Launch | Stop | Attach | Detach


async def make_all(steps: Sequence[AnyStep], context: Context, told: ResultCallback) -> None:
    """Make several steps of a kind that joins others; see :func:`.device_ops.create_all`."""
    devices = [step.device for step in steps if isinstance(step, Create | Remove)]
    if isinstance(steps[0], Create):
        await device_ops.create_all(devices, context, told)
    else:
        await device_ops.remove_all(devices, context, told)


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
        raise HostError(
            f"the journal is damaged: a step of it cannot be read: {error}",
            "move it away; mdo adopt --all then makes a new one from what runs",
        ) from error
    else:
        return step


def guest_spec(own: GuestRecord, mdevs: list[GuestMdev]) -> GuestSpec:
    """What the journal knows of a guest, for QEMU.

    :raise HostError: The journal is damaged.
    """
    guest = read_guest(own.definition)
    return GuestSpec(
        name=own.name,
        uuid=own.uuid,
        memory=int(guest.memory),
        cpus=guest.cpus,
        kernel=guest.kernel,
        initrd=guest.initrd,
        append=guest.append,
        disk=guest.disk,
        disk_format=guest.disk_format,
        mdevs=tuple(mdevs),
        hotplug_ports=guest.hotplug_ports,
        accel=guest.accel,
        machine=guest.machine,
        qemu=guest.qemu,
        firmware=guest.firmware,
        extra=guest.extra,
    )


def _usable(uuid: UUID, context: Context) -> GuestMdev:
    found = sysfs.read_mdev(uuid, context.host)
    if found is None:
        raise UnknownError(f"there is no mdev {uuid}", "mdo host lists them")
    return GuestMdev(uuid, found.path, found.device_api or "vfio-pci")


# ---------------------------------------------------------------- guests


def _guest(name: str, context: Context) -> RunningGuest | None:
    try:
        return process.find(lifecycle.machine_of(context.guests), name)
    except UnknownError:
        return None


def _alive(own: GuestRecord, context: Context) -> RunningGuest | None:
    """The guest that is meant, if it runs; another one of its name is somebody else's."""
    found = _guest(own.name, context)
    if found is None or not found.alive or found.record is None:
        return None
    return found if found.record.uuid == own.uuid else None
