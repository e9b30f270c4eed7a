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

Each *makes it so*: where it is so already there is nothing to do, so a step can be done again after
a crash, by another process. Each ends in one of three ways, which :meth:`Step.attempt` returns as a
:class:`Result`: done, without effect, or unknown.

Before a step touches an object it checks that this is still the one it means. An mdev of the same
UUID under another parent, or a guest of the same name with another UUID, is another program's.

Steps are data: the journal keeps them as JSON.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

import msgspec

from mdev_orchestrator.engine import device_ops, guest_ops
from mdev_orchestrator.engine.context import Context
from mdev_orchestrator.engine.device_ops import ResultCallback
from mdev_orchestrator.engine.records import Change, DeviceRecord, GuestRecord
from mdev_orchestrator.errors import (
    BusyError,
    HostError,
    MdoError,
    Outcome,
    RequestError,
    UnknownError,
    before_acting,
)
from mdev_orchestrator.host import sysfs
from mdev_orchestrator.qemu import hotplug, process
from mdev_orchestrator.qemu.command import GuestMdev, GuestSpec
from mdev_orchestrator.qemu.process import RunningGuest
from mdev_orchestrator.spec import read_guest


@dataclass(frozen=True, slots=True)
class Result:
    """How a step ended.

    :ivar error: Why it is not done; ``None`` if it is.
    """

    outcome: Outcome
    error: MdoError | None = None


class Step(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="do"):
    """One change to one object.

    :ivar unrecorded: The object is not managed here, and the step does not change that: a device of
        another program that a user names, or a guest that a user starts by hand.
    """

    unrecorded: bool = False

    @property
    def claims(self) -> tuple[str, ...]:
        """The objects that it changes, as the journal claims them."""
        raise NotImplementedError

    @property
    def on_begin(self) -> Change:
        """The records that are valid as soon as it may have begun."""
        return Change()

    @property
    def on_done(self) -> Change:
        """The records that change when it is done."""
        return Change()

    @property
    def on_no_effect(self) -> Change:
        """The records that change back when it has had no effect."""
        return Change()

    @property
    def batch(self) -> str | None:
        """Steps of one kind with the same value are better made together, by :func:`attempt_all`.

        ``None`` for a step that is made by itself.
        """
        return None

    async def attempt(self, context: Context) -> Result:
        """Make it so, and say what is known of it."""
        try:
            await self._act(context)
        except MdoError as error:
            return Result(error.outcome or Outcome.UNKNOWN, error)
        return Result(Outcome.DONE)

    async def _act(self, context: Context) -> None:
        raise NotImplementedError


class Create(Step, frozen=True, tag="create"):
    """Make an mdev.

    :ivar kept: Its record was there before the device: the record stays if this fails.
    """

    device: DeviceRecord
    kept: bool = False

    def __str__(self) -> str:
        """What it does."""
        d = self.device
        return f"create {d.type} on {d.parent}: mdev {d.uuid}"

    @property
    def batch(self) -> str | None:  # noqa: D102 - where nothing is to be set up afterwards
        device = self.device
        return None if device.params or device.attributes or device.group else device.parent

    @property
    def claims(self) -> tuple[str, ...]:  # noqa: D102
        return (f"mdev:{self.device.uuid}",)

    @property
    def on_begin(self) -> Change:  # noqa: D102
        return Change() if self.unrecorded else Change(devices={self.device.uuid: self.device})

    @property
    def on_no_effect(self) -> Change:  # noqa: D102
        return (
            Change() if self.kept or self.unrecorded else Change(devices={self.device.uuid: None})
        )

    async def _act(self, context: Context) -> None:
        await device_ops.create(self.device, context)

    def inverse(self) -> Remove:
        """What undoes it."""
        return Remove(device=self.device, kept=self.kept, unrecorded=self.unrecorded)


class Remove(Step, frozen=True, tag="remove"):
    """Remove an mdev.

    :ivar kept: Its record stays, though the device is removed.
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
    def on_done(self) -> Change:  # noqa: D102
        return (
            Change() if self.kept or self.unrecorded else Change(devices={self.device.uuid: None})
        )

    @property
    def batch(self) -> str | None:  # noqa: D102
        return self.device.parent

    async def _act(self, context: Context) -> None:
        await device_ops.remove(self.device, context)

    def inverse(self) -> Create:
        """What undoes it."""
        return Create(device=self.device, kept=self.kept, unrecorded=self.unrecorded)


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
    def on_begin(self) -> Change:  # noqa: D102
        return Change() if self.unrecorded else Change(guests={self.guest.name: self.guest})

    @property
    def on_no_effect(self) -> Change:  # noqa: D102
        return Change() if self.kept or self.unrecorded else Change(guests={self.guest.name: None})

    async def _act(self, context: Context) -> None:
        with before_acting():
            found = _guest(self.guest.name, context)
            if found is not None and found.alive and found.record is not None:
                if not context.repairing or found.record.uuid != self.guest.uuid:
                    raise BusyError(
                        f"{found.label} runs already, as process {found.record.pid}",
                        f"mdo guest stop {self.guest.name}, or take another name",
                        subject=found.label,
                    )
                if not await process.await_pending_shutdown(found):
                    return
            mdevs = [_usable(uuid, context) for uuid in self.devices]
            spec = guest_spec(self.guest, mdevs)
        await guest_ops.launch(context.machine, spec, deadline=self.deadline)

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


class Stop(Step, frozen=True, tag="stop"):
    """End a guest.

    :ivar devices: The mdevs that it has now.
    :ivar deadline: Seconds for it to power down; 0 with ``force`` does not ask it.
    :ivar kept: Its record stays, though the guest does not run.
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
    def on_done(self) -> Change:  # noqa: D102
        return Change() if self.kept or self.unrecorded else Change(guests={self.guest.name: None})

    async def _act(self, context: Context) -> None:
        found = _guest(self.guest.name, context)
        if found is None or (found.record is not None and found.record.uuid != self.guest.uuid):
            return
        # one without a record was cut short at its start and cannot be asked to power down
        force = self.force or found.record is None
        context.ended[found.name] = await guest_ops.end(
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

    async def _act(self, context: Context) -> None:
        with before_acting():
            found = _alive(self.guest, context)
            if found is None:
                if context.repairing:
                    return  # a guest that has ended has no devices to give back
                raise RequestError(
                    f"guest {self.guest.name} does not run",
                    "mdo apply starts it",
                    subject=f"guest {self.guest.name}",
                )
            if context.repairing and await hotplug.await_pending_unplug(
                found, self.uuid, deadline=self.deadline
            ):
                return
            mdev = _usable(self.uuid, context)
        context.ports[self.uuid] = await guest_ops.attach(
            context.machine, found, mdev, deadline=self.deadline
        )

    def inverse(self) -> Detach:
        """What undoes it."""
        return Detach(guest=self.guest, uuid=self.uuid, deadline=self.undo_deadline)


class Detach(Step, frozen=True, tag="detach"):
    """Unplug an mdev from a guest.

    :ivar named: A user named the device: that the guest does not have it is an error.
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

    async def _act(self, context: Context) -> None:
        if _alive(self.guest, context) is None:
            return
        try:
            await guest_ops.detach(context.machine, self.guest.name, self.uuid, self.deadline)
        except UnknownError:
            if self.named and not context.repairing:
                raise

    def inverse(self) -> Attach:
        """What undoes it."""
        return Attach(guest=self.guest, uuid=self.uuid, undo_deadline=self.deadline)


AnyStep = Create | Remove | Launch | Stop | Attach | Detach


async def attempt_all(
    steps: Sequence[AnyStep], context: Context, on_result: ResultCallback
) -> MdoError | None:
    """Attempt several steps of the same kind and ``batch``; see :func:`.device_ops.create_all`.

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
        hotplug_window=int(guest.hotplug_window),
        mdevs=tuple(mdevs),
        hotplug_ports=guest.hotplug_ports,
        accel=guest.accel,
        machine=guest.machine,
        qemu=guest.qemu,
        firmware=guest.firmware,
        extra=guest.extra,
    )


def _usable(uuid: UUID, context: Context) -> GuestMdev:
    found = sysfs.read_mdev(context.machine, uuid)
    if found is None:
        raise UnknownError(
            f"there is no mdev {uuid}", "mdo host lists them", subject=f"mdev {uuid}"
        )
    return GuestMdev(uuid, found.path, found.device_api or "vfio-pci")


# ---------------------------------------------------------------- guests


def _guest(name: str, context: Context) -> RunningGuest | None:
    try:
        return process.find(context.machine, name)
    except UnknownError:
        return None


def _alive(own: GuestRecord, context: Context) -> RunningGuest | None:
    """The guest that is meant, if it runs; not another one of its name."""
    found = _guest(own.name, context)
    if found is None or not found.alive or found.record is None:
        return None
    return found if found.record.uuid == own.uuid else None
