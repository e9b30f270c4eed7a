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
:class:`UnsettledError`; and of one that was cancelled nothing is known either.

Before a step touches an object it looks whether that is still the one it means. An mdev of the same
UUID under another parent, or a guest of the same name with another UUID, is somebody else's.

Steps are data: the journal keeps them as JSON.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar
from uuid import UUID

import msgspec

from mdev_orchestrator.engine import lifecycle
from mdev_orchestrator.engine.store import Change, OwnDevice, OwnGuest
from mdev_orchestrator.errors import (
    BusyError,
    DeadlineError,
    HostError,
    MdoError,
    RequestError,
    UnknownError,
)
from mdev_orchestrator.host import sysfs
from mdev_orchestrator.host.events import until
from mdev_orchestrator.host.groups import join
from mdev_orchestrator.host.holders import Holder, Holders, creators, holders
from mdev_orchestrator.host.readiness import missing, wait_ready
from mdev_orchestrator.host.sysfs import ROOT
from mdev_orchestrator.host.writer import (
    FINE,
    AnyBatch,
    Batch,
    Separately,
    Writer,
    write_apart,
    write_or_kill,
)
from mdev_orchestrator.model import GROUP_FILE, Mdev, parse_uuid
from mdev_orchestrator.qemu import hotplug, process
from mdev_orchestrator.qemu.command import GuestMdev, GuestSpec
from mdev_orchestrator.qemu.process import Guest
from mdev_orchestrator.spec import read_guest

T = TypeVar("T")

DEADLINE = 30.0
"""Seconds for one device to be made or removed."""
_HELD_SECONDS = 0.5
"""How old an answer about who has what open may be."""
_LOOK_SECONDS = 0.05
"""Between two looks at a creation that goes on without us; no event tells of its end."""


class UnsettledError(DeadlineError):
    """A step failed and may have an effect yet: nobody answers who could tell."""


@dataclass
class Context:
    """The machine that steps act on.

    :ivar host: Directory in which ``sys``, ``dev`` and ``proc`` stand.
    :ivar guests: Where guests live; the state directory's without it.
    :ivar deadline: Seconds for one device; guests have their own.
    :ivar repairing: What is there already counts as made by the step that shall make it.
    """

    host: Path = ROOT
    guests: Path | None = None
    deadline: float = DEADLINE
    write: Writer = write_apart
    start: Writer = write_or_kill
    repairing: bool = False
    _held: tuple[float, Holders] | None = field(default=None, repr=False)

    def batch(
        self,
        lines: Sequence[tuple[str, bytes]],
        told: Callable[[int, int], None],
        fine: frozenset[int] = FINE,
    ) -> AnyBatch:
        """Several writes, by ``write`` or as it would make them."""
        make = Batch if self.write is write_apart else partial(Separately, self.write)
        return make(lines, told, fine)

    def held(self, uuid: UUID) -> tuple[Holder, ...]:
        """Who has an mdev open.

        It is looked up for many steps at once. That nobody has it is believed for a moment; that
        somebody has it is not: he may have let go of it since.
        """
        now = time.monotonic()
        if self._held is None or now - self._held[0] > _HELD_SECONDS or self._held[1].of(uuid):
            self._held = now, holders(sysfs.scan(self.host, types=False).mdevs, self.host)
        return self._held[1].of(uuid)


Told = Callable[[int, bool], None]
"""Takes the number of a step, and whether it is made or has done nothing."""


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

    device: OwnDevice
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
        device = self.device
        # who does not repair need not look: the kernel makes a UUID once
        found = sysfs.read_mdev(device.uuid, context.host) if context.repairing else None
        if found is not None and found.type_id is None:
            await _gone(device.uuid, context)  # our own removal has not come to its end
            found = None
        if found is not None and not is_same(found, device):
            raise sysfs.taken(device.uuid, context.host)
        loop = asyncio.get_running_loop()
        end = loop.time() + context.deadline
        if found is None:
            await _create(device, context)
        try:
            async with asyncio.timeout_at(end):
                await _set_up(device, context)
            await wait_ready(device.uuid, max(end - loop.time(), 0), context.host)
        except BaseException as error:
            if found is None:
                await _take_back(device, context, error)
            if isinstance(error, TimeoutError):
                raise DeadlineError(
                    f"mdev {device.uuid} on {device.parent} was not set up within "
                    f"{context.deadline:g} s: its driver is silent",
                    "see the kernel log (dmesg)",
                ) from None
            raise

    @staticmethod
    async def make_all(steps: Sequence[Create], context: Context, told: Told) -> None:
        """Make several that do not need each other: what one costs is mostly the way to it.

        Unlike :meth:`make` it takes back nothing.

        :param told: Called for each that is made, and for each that has done nothing; of the others
            nothing is known when this raises.
        :raise MdoError: The first that failed; no other was begun after it.
        """
        unready = await _create_all([step.device for step in steps], context, told)
        loop = asyncio.get_running_loop()
        end = loop.time() + context.deadline
        for index in unready:
            left = max(end - loop.time(), 0)
            await wait_ready(steps[index].device.uuid, left, context.host)
            told(index, True)

    def inverse(self) -> Remove:
        """What undoes it."""
        return Remove(device=self.device, kept=self.kept)


class Remove(Step, frozen=True, tag="remove"):
    """Remove an mdev.

    :ivar kept: It stays ours, though it is not there.
    """

    device: OwnDevice
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
        uuid = self.device.uuid
        found = sysfs.read_mdev(uuid, context.host)
        if context.repairing and (found is None or found.type_id is None):
            # one that is being created has no type either, and nothing to remove it by
            await _settled(self.device, context)
            found = sysfs.read_mdev(uuid, context.host)
        if found is None or not is_same(found, self.device):
            return
        if who := context.held(uuid):
            raise BusyError(
                f"mdev {uuid} is held by {', '.join(map(str, who))}",
                "stop that guest, or detach the device from it",
            )
        try:
            await _finish(_removed(uuid, context))
        except DeadlineError as error:  # the kernel goes on
            raise UnsettledError(error.message, error.hint) from None

    @staticmethod
    async def make_all(steps: Sequence[Remove], context: Context, told: Told) -> None:
        """Make several that do not need each other; see :meth:`Create.make_all`."""
        plain, odd = [], []
        for index, step in enumerate(steps):
            found = sysfs.read_mdev(step.device.uuid, context.host)
            if found is None or not is_same(found, step.device):
                told(index, True)
            elif found.type_id is None or context.held(found.uuid):
                odd.append(index)
            else:
                plain.append(index)
        for place, index in enumerate(odd):
            try:
                await steps[index].make(context)
            except MdoError as error:
                for other in (*odd[place + isinstance(error, UnsettledError) :], *plain):
                    told(other, False)
                raise
            told(index, True)
        await _remove_all(
            [steps[index].device.uuid for index in plain],
            context,
            lambda place, made: told(plain[place], made),
        )

    def inverse(self) -> Create:
        """What undoes it."""
        return Create(device=self.device, kept=self.kept)


class Launch(Step, frozen=True, tag="launch"):
    """Start a guest.

    :ivar devices: The mdevs on its command line, in order.
    """

    guest: OwnGuest
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
            if context.repairing and found.record.uuid == self.guest.uuid:
                return
            raise BusyError(
                f"{found.who} runs already, as process {found.record.pid}",
                f"mdo guest stop {self.guest.name}, or take another name",
            )
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

    guest: OwnGuest
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

    guest: OwnGuest
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
        if context.repairing and await _has(found, self.uuid, self.deadline):
            return
        await lifecycle.attach(
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
    """Unplug an mdev from a guest."""

    guest: OwnGuest
    uuid: UUID
    deadline: float = hotplug.DETACH_SECONDS

    def __str__(self) -> str:
        """What it does."""
        return f"detach mdev {self.uuid} from guest {self.guest.name}"

    @property
    def claims(self) -> tuple[str, ...]:  # noqa: D102
        return (f"guest:{self.guest.name}", f"mdev:{self.uuid}")

    async def make(self, context: Context) -> None:  # noqa: D102
        found = _alive(self.guest, context)
        if found is None or not await _has(found, self.uuid, self.deadline):
            return
        await lifecycle.detach(
            self.guest.name,
            self.uuid,
            self.deadline,
            root=context.guests,
            host=context.host,
            write=context.start,
        )

    def inverse(self) -> Attach:
        """What undoes it."""
        return Attach(guest=self.guest, uuid=self.uuid, undo_deadline=self.deadline)


AnyStep = Create | Remove | Launch | Stop | Attach | Detach


async def make_all(steps: Sequence[AnyStep], context: Context, told: Told) -> None:
    """Make several steps of a kind that joins others; see :meth:`Create.make_all`."""
    creates = [step for step in steps if isinstance(step, Create)]
    if creates:
        await Create.make_all(creates, context, told)
    else:
        await Remove.make_all([s for s in steps if isinstance(s, Remove)], context, told)


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


def is_same(found: Mdev, device: OwnDevice) -> bool:
    """Whether an mdev is the one that we made, as far as can be told.

    One that is being removed has no type any more.
    """
    return found.parent == device.parent and found.type_id in (device.type, None)


def guest_spec(own: OwnGuest, mdevs: list[GuestMdev]) -> GuestSpec:
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


# ---------------------------------------------------------------- devices


async def _create(device: OwnDevice, context: Context) -> None:
    """Write to ``create`` and learn the outcome, whatever happens to us meanwhile."""
    creating = asyncio.ensure_future(
        sysfs.create(device.parent, device.type, device.uuid, context.host, write=context.write)
    )
    try:
        async with asyncio.timeout(context.deadline):
            await asyncio.shield(creating)
    except (TimeoutError, asyncio.CancelledError) as error:
        await _known(creating, device, context, error)
        if isinstance(error, asyncio.CancelledError):
            raise
        raise _late(device, context) from None


async def _known(
    creating: asyncio.Future[None], device: OwnDevice, context: Context, cause: BaseException
) -> None:
    """After a creation was given up: wait for its outcome, and take it back."""
    await asyncio.wait((creating,), timeout=context.deadline)
    if not creating.done():
        creating.cancel()
        raise _unanswered(device) from cause
    creating.result()  # or its refusal: the device of this UUID may be somebody else's by now
    await _take_back(device, context, cause)


async def _create_all(devices: Sequence[OwnDevice], context: Context, told: Told) -> list[int]:
    """Write to ``create`` for several, and learn the outcome of each, whatever happens to us.

    :return: Those that are there and cannot be opened yet; the others have been told of.
    """
    root = context.host
    lines = [sysfs.creation(d.parent, d.type, d.uuid, root) for d in devices]
    unready: list[int] = []
    refused: list[int] = []

    def written(index: int, number: int) -> None:
        if number:
            told(index, False)
            refused.append(index)
        elif missing(devices[index].uuid, root) is None:
            told(index, True)
        else:
            unready.append(index)

    batch = context.batch(lines, written)
    cause = await _written(batch, context, told)
    if batch.unknown:
        raise _unanswered(devices[min(batch.unknown)]) from cause
    if isinstance(cause, TimeoutError):
        raise _late(devices[0], context) from None
    if cause is not None:
        raise cause
    if refused:
        first, *others = (_refusal(devices[i], batch.results[i] or 0, root) for i in refused)
        for other in others:
            first.add_note(f"also: {other}")
        raise first
    return unready


def _refusal(device: OwnDevice, number: int, root: Path) -> MdoError:
    return sysfs.refusal(device.parent, device.type, device.uuid, number, root)


async def _written(batch: AnyBatch, context: Context, told: Told) -> BaseException | None:
    """Have a batch written, and tell of those that were not begun.

    :return: Why it was given up, if it was; what had begun then was waited for.
    """
    cause: BaseException | None = None
    batch.begin()
    try:
        await _answered(batch, context.deadline)
    except (TimeoutError, asyncio.CancelledError) as error:
        cause = error
        batch.stop()
        await asyncio.wait((batch.ended,), timeout=context.deadline)
    for index, number in enumerate(batch.results):
        if number is None and index not in batch.unknown:
            told(index, False)
    return cause


async def _answered(batch: AnyBatch, deadline: float) -> None:
    """Wait for the end of a batch.

    :raise TimeoutError: One of its writes took longer than ``deadline``, in seconds.
    """
    while not batch.ended.done():
        await asyncio.wait((batch.ended,), timeout=max(deadline - batch.longest, 0))
        if not batch.ended.done() and batch.longest >= deadline:
            raise TimeoutError


def _unanswered(device: OwnDevice) -> UnsettledError:
    return UnsettledError(
        f"the driver of {device.parent} has not answered for mdev {device.uuid}: it may still "
        "appear",
        "mdo recover removes it then",
    )


def _late(device: OwnDevice, context: Context) -> DeadlineError:
    return DeadlineError(
        f"{device.type} on {device.parent} was not created within {context.deadline:g} s",
        "give it a longer --deadline, and see the kernel log",
    )


async def _settled(device: OwnDevice, context: Context) -> None:
    """Wait until no creation is under way that may be of this device.

    One that was given up, or whose command was killed, goes on in the kernel.
    """
    end = time.monotonic() + context.deadline
    while who := creators(device.parent, device.type, context.host):
        if time.monotonic() >= end:
            raise UnsettledError(
                f"mdev {device.uuid} may still appear: the driver of {device.parent} has not "
                f"answered {', '.join(map(str, who))}",
                "mdo recover removes it then",
            )
        await asyncio.sleep(_LOOK_SECONDS)


async def _set_up(device: OwnDevice, context: Context) -> None:
    if device.params:
        await _set_params(device, context)
    joins = [] if device.group is None else [(GROUP_FILE, str(device.group))]
    if GROUP_FILE in dict(device.attributes):
        joins = []  # it stands where it is to be written
    for name, value in (*device.attributes, *joins):
        if name == GROUP_FILE:
            group = parse_uuid(value)
            await join(device.uuid, group, device.parent, context.host, write=context.write)
        else:
            await set_attribute(device.uuid, name, value, context)


async def _set_params(device: OwnDevice, context: Context) -> None:
    for name in sysfs.PARAMS_FILES:
        if await sysfs.write_file(
            device.uuid, name, device.params, context.host, write=context.write
        ):
            return
    raise HostError(
        f"the driver of mdev {device.uuid} on {device.parent} takes no parameters: it has neither "
        + " nor ".join(sysfs.PARAMS_FILES),
        "leave params away",
    )


async def set_attribute(uuid: UUID, name: str, value: str, context: Context) -> None:
    """Write one file of an mdev.

    :raise RequestError: The name leads out of its directory.
    :raise HostError: The driver has no such file.
    :raise MdoError: It refused the value.
    """
    root = context.host
    if sysfs.leads_out(uuid, name, root):
        raise RequestError(
            f"{name!r} of mdev {uuid} leads out of its directory", "name a file of the mdev itself"
        )
    if not await sysfs.write_file(uuid, name, value, root, write=context.write):
        files = sysfs.writable_files(uuid, root)
        shown = ", ".join(files[:8]) + (", …" if len(files) > 8 else "")  # noqa: PLR2004 - one line
        raise HostError(
            f"the driver of mdev {uuid} has no file {name}",
            f"files that can be set: {shown or 'none'}",
        )


async def _take_back(device: OwnDevice, context: Context, cause: BaseException) -> None:
    """Remove what was created, in spite of whoever cancels; what stays is unsettled."""
    try:
        await _finish(_removed(device.uuid, context))
    except MdoError as failure:
        error = UnsettledError(
            f"mdev {device.uuid} was created and could not be removed again: {failure.message}",
            failure.hint,
        )
        for note in getattr(cause, "__notes__", ()):
            error.add_note(note)
        raise error from cause


async def _finish(work: Awaitable[T]) -> T:
    """Wait for something to its end; only then is a cancellation passed on."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait((task,))
        raise


async def _gone(uuid: UUID, context: Context) -> None:
    try:
        async with asyncio.timeout(context.deadline):
            await until(lambda: sysfs.directory(uuid, context.host) is None, context.host)
    except TimeoutError:
        raise DeadlineError(
            f"mdev {uuid} is still being removed after {context.deadline:g} s",
            "the kernel waits until whoever has it open closes it",
        ) from None


async def _removed(uuid: UUID, context: Context) -> None:
    try:
        await sysfs.remove(uuid, context.deadline, context.host, write=context.write)
    except UnknownError:
        return
    except DeadlineError as error:
        found = sysfs.read_mdev(uuid, context.host)
        who = () if found is None else holders((found,), context.host).of(uuid)
        if not who:
            raise
        raise DeadlineError(
            f"mdev {uuid} was not removed within {context.deadline:g} s: held by "
            + ", ".join(map(str, who)),
            error.hint,
        ) from None


async def _remove_all(uuids: Sequence[UUID], context: Context, told: Told) -> None:
    """Write to ``remove`` of several that are there and that nobody holds."""
    root = context.host
    lines = [(sysfs.removal(uuid, root), b"1") for uuid in uuids]
    lingering: list[int] = []
    refused: list[int] = []

    def written(index: int, number: int) -> None:
        if number not in sysfs.ON_ITS_WAY:
            told(index, False)
            refused.append(index)
        elif Path(lines[index][0]).parent.exists():
            lingering.append(index)
        else:
            told(index, True)

    batch = context.batch(lines, written, sysfs.ON_ITS_WAY)
    cause = await _written(batch, context, told)
    for index in (*lingering, *sorted(batch.unknown)):
        # it says who has it, if it does not go
        try:
            await _finish(_removed(uuids[index], context))
        except DeadlineError as error:
            raise UnsettledError(error.message, error.hint) from cause
        told(index, True)
    if cause is not None:
        raise cause
    for index in refused:
        raise sysfs.not_removed(uuids[index], batch.results[index] or 0)


def _usable(uuid: UUID, context: Context) -> GuestMdev:
    found = sysfs.read_mdev(uuid, context.host)
    if found is None:
        raise UnknownError(f"there is no mdev {uuid}", "mdo host lists them")
    return GuestMdev(uuid, found.path, found.device_api or "vfio-pci")


# ---------------------------------------------------------------- guests


def _guest(name: str, context: Context) -> Guest | None:
    try:
        return process.find(name, context.guests)
    except UnknownError:
        return None


def _alive(own: OwnGuest, context: Context) -> Guest | None:
    """The guest that is meant, if it runs; another one of its name is somebody else's."""
    found = _guest(own.name, context)
    if found is None or not found.alive or found.record is None:
        return None
    return found if found.record.uuid == own.uuid else None


async def _has(guest: Guest, uuid: UUID, deadline: float) -> bool:
    return uuid in {plugged.uuid for plugged in await hotplug.mdevs_of(guest, deadline=deadline)}
