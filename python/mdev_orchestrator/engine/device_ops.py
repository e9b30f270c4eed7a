# SPDX-License-Identifier: GPL-2.0-or-later
"""The steps that create and remove mdevs, one or many at a time.

A write that was given up goes on in the kernel. So these functions wait for the outcome of what
they have begun, also when they are cancelled: an undo must not be overtaken by a late creation.
What could not be waited for is raised with the outcome *unknown*.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from uuid import UUID

from mdev_orchestrator import errors
from mdev_orchestrator.engine.context import Context
from mdev_orchestrator.engine.records import Change, DeviceRecord
from mdev_orchestrator.engine.step import Step
from mdev_orchestrator.errors import Outcome
from mdev_orchestrator.host import sysfs
from mdev_orchestrator.host.events import wait_until
from mdev_orchestrator.host.groups import join
from mdev_orchestrator.host.holders import find_creators, find_holders
from mdev_orchestrator.host.readiness import missing, wait_ready
from mdev_orchestrator.model import GROUP_FILE, Mdev, parse_uuid
from mdev_orchestrator.system.waiting import run_to_completion
from mdev_orchestrator.system.writer import WriteBatch, WriteResult

ResultCallback = Callable[[int, Outcome], None]
"""Takes the index of a device and the outcome of its step."""

_NO_INSTANCE_LEFT = frozenset((errno.EUSERS, errno.ENOSPC))
"""What ``create`` gives when all instances are in use."""
_LISTED = 8  # files that fit one line
_LOOK_SECONDS = 0.05
"""Between two looks at something that sends no event."""


def is_same(found: Mdev, device: DeviceRecord) -> bool:
    """Whether an mdev is the one of a record, as far as can be seen.

    An mdev that is being removed has no type any more.
    """
    return found.parent == device.parent and found.type_id in (device.type, None)


# ---------------------------------------------------------------- steps


class _DeviceStep(Step, frozen=True):
    """Creates or removes an mdev.

    :ivar kept: The record stays when the device is not there: it was there before the device, and
        a creation failed; or only the device is removed.
    """

    device: DeviceRecord
    kept: bool = False

    @property
    def claims(self) -> tuple[str, ...]:
        return (f"mdev:{self.device.uuid}",)

    def _forget(self) -> Change:
        """What becomes of the records when the device is not there."""
        keeps = self.kept or self.unrecorded
        return Change() if keeps else Change(devices={self.device.uuid: None})


class Create(_DeviceStep, frozen=True, tag="create"):
    """Make an mdev."""

    def __str__(self) -> str:
        """What it does."""
        d = self.device
        return f"create {d.type} on {d.parent}: mdev {d.uuid}"

    @property
    def batch(self) -> str | None:  # noqa: D102 - where nothing is to be set up afterwards
        device = self.device
        return None if device.params or device.attributes or device.group else device.parent

    @property
    def on_begin(self) -> Change:  # noqa: D102
        return Change() if self.unrecorded else Change(devices={self.device.uuid: self.device})

    @property
    def on_no_effect(self) -> Change:  # noqa: D102
        return self._forget()

    async def act(self, context: Context) -> None:  # noqa: D102
        await create(self.device, context)

    def inverse(self) -> Remove:
        """What undoes it."""
        return Remove(device=self.device, kept=self.kept, unrecorded=self.unrecorded)


class Remove(_DeviceStep, frozen=True, tag="remove"):
    """Remove an mdev."""

    def __str__(self) -> str:
        """What it does."""
        return f"remove mdev {self.device.uuid} ({self.device.type} on {self.device.parent})"

    @property
    def on_done(self) -> Change:  # noqa: D102
        return self._forget()

    @property
    def batch(self) -> str | None:  # noqa: D102
        return self.device.parent

    async def act(self, context: Context) -> None:  # noqa: D102
        await remove(self.device, context)

    def inverse(self) -> Create:
        """What undoes it."""
        return Create(device=self.device, kept=self.kept, unrecorded=self.unrecorded)


# ---------------------------------------------------------------- creating


async def create(device: DeviceRecord, context: Context) -> None:
    """Create an mdev, set it up, and wait until it can be opened; or remove it again.

    :raise UuidError: Another device has its UUID.
    :raise MdoError: It cannot be; the outcome says whether there may be something of it.
    """
    machine = context.machine
    found = None
    if context.repairing:  # otherwise EEXIST tells of a UUID that is taken
        with errors.before_acting():
            found = sysfs.read_mdev(machine, device.uuid)
            if found is not None and found.type_id is None:
                await _wait_gone(device.uuid, context)  # an earlier removal has not ended
                found = None
            if found is not None and not is_same(found, device):
                raise sysfs.taken(machine, device.uuid)
    loop = asyncio.get_running_loop()
    end = loop.time() + context.deadline
    if found is None:
        await _create(device, context)
    try:
        async with asyncio.timeout_at(end):
            await _set_up(device, context)
        await wait_ready(machine, device.uuid, max(end - loop.time(), 0))
    except BaseException as error:
        if found is None:
            await _remove_again(device, context, error)
        if isinstance(error, TimeoutError):
            raise errors.DeadlineError(
                f"mdev {device.uuid} on {device.parent} was not set up within "
                f"{context.deadline:g} s: its driver did not answer",
                "see the kernel log (dmesg)",
                outcome=Outcome.UNKNOWN if found is not None else Outcome.NO_EFFECT,
                subject=f"mdev {device.uuid}",
            ) from None
        if isinstance(error, errors.MdoError) and found is None:
            error.outcome = Outcome.NO_EFFECT  # the device is gone again
        raise


async def create_all(
    devices: Sequence[DeviceRecord], context: Context, on_result: ResultCallback
) -> None:
    """Create several mdevs of one parent that do not need each other, by few messages to a writer.

    Nothing is set up, and unlike :func:`create` nothing is removed again.

    :param on_result: Called for each whose outcome is known; the outcome of others is unknown when
        this raises.
    :raise MdoError: The first that failed; no other was begun after it.
    """
    unready = await _create_batch(devices, context, on_result)
    loop = asyncio.get_running_loop()
    end = loop.time() + context.deadline
    for index in unready:
        left = max(end - loop.time(), 0)
        await wait_ready(context.machine, devices[index].uuid, left)
        on_result(index, Outcome.DONE)


async def _create(device: DeviceRecord, context: Context) -> None:
    """Write to ``create`` and learn the outcome, also when cancelled."""
    machine = context.machine
    with errors.before_acting():
        path, data = sysfs.creation(machine, device.parent, device.type, device.uuid)
    while True:
        writing = asyncio.ensure_future(machine.writer.write(path, data, lane=device.parent))
        try:
            async with asyncio.timeout(context.deadline):
                result = await asyncio.shield(writing)
        except (TimeoutError, asyncio.CancelledError) as cause:
            await _await_late(writing, device, context, cause)
            if isinstance(cause, asyncio.CancelledError):
                raise
            raise _late(device, context) from None
        if result.outcome is Outcome.DONE:
            return
        error = _refusal(device, result, context)
        if result.errno not in _NO_INSTANCE_LEFT or not context.may_settle(device.parent):
            raise error
        await asyncio.sleep(_LOOK_SECONDS)  # the driver has not counted our removal yet


async def _await_late(
    writing: asyncio.Future[WriteResult],
    device: DeviceRecord,
    context: Context,
    cause: BaseException,
) -> None:
    """After a creation was given up: wait for its outcome, and remove what it made."""
    await asyncio.wait((writing,), timeout=context.deadline)
    if not writing.done():
        writing.cancel()
        raise _unanswered(device) from cause
    result = writing.result()
    if result.outcome is not Outcome.DONE:
        # of this UUID there may be another program's device by now: nothing is removed
        raise _refusal(device, result, context) from cause
    await _remove_again(device, context, cause)


async def _create_batch(
    devices: Sequence[DeviceRecord], context: Context, on_result: ResultCallback
) -> list[int]:
    """Write to ``create`` for several, and learn the outcome of each, also when cancelled.

    :return: Those that are there and cannot be opened yet; the others have been reported.
    """
    machine = context.machine
    with errors.before_acting():
        lines = [sysfs.creation(machine, d.parent, d.type, d.uuid) for d in devices]
    unready: list[int] = []
    failed: dict[int, WriteResult] = {}

    def written(index: int, result: WriteResult) -> None:
        if result.outcome is not Outcome.DONE:
            on_result(index, result.outcome)
            failed[index] = result
        elif missing(machine, devices[index].uuid) is None:
            on_result(index, Outcome.DONE)
        else:
            unready.append(index)

    batch = machine.writer.batch(lines, written, lane=devices[0].parent)
    cause = await _finish_batch(batch, context, on_result)
    if batch.unknown:
        raise _unanswered(devices[min(batch.unknown)]) from cause
    if isinstance(cause, TimeoutError):
        raise _late(devices[0], context) from None
    if cause is not None:
        raise cause
    if failed:
        raise _first_of(_refusal(devices[i], failed[i], context) for i in sorted(failed))
    return unready


def _first_of(failures: Iterable[errors.MdoError]) -> errors.MdoError:
    """The first of some errors, with the others as its notes."""
    first, *others = failures
    for other in others:
        first.add_note(f"also: {other}")
    return first


async def _finish_batch(
    batch: WriteBatch, context: Context, on_result: ResultCallback
) -> BaseException | None:
    """Have a batch written, and report the writes that were not begun as without effect.

    :return: Why it was given up, if it was; writes that had begun then were waited for.
    """
    cause: BaseException | None = None
    batch.begin()
    try:
        await _answered(batch, context.deadline)
    except (TimeoutError, asyncio.CancelledError) as error:
        cause = error
        batch.stop()
        await asyncio.wait((batch.ended,), timeout=context.deadline)
    for index, result in enumerate(batch.results):
        if result is None and index not in batch.unknown:
            on_result(index, Outcome.NO_EFFECT)
    return cause


async def _answered(batch: WriteBatch, deadline: float) -> None:
    """Wait for the end of a batch.

    :raise TimeoutError: One of its writes took longer than ``deadline``, in seconds.
    """
    while not batch.ended.done():
        await asyncio.wait((batch.ended,), timeout=max(deadline - batch.longest, 0))
        if not batch.ended.done() and batch.longest >= deadline:
            raise TimeoutError


def _refusal(device: DeviceRecord, result: WriteResult, context: Context) -> errors.MdoError:
    """What it means that a write to ``create`` did not succeed."""
    if result.outcome is Outcome.UNKNOWN:
        return errors.MdoError(
            f"the process that wrote mdev {device.uuid} to create on {device.parent} was killed: "
            "whether the device was created is not known",
            "mdo recover looks, and removes it then",
            outcome=Outcome.UNKNOWN,
            subject=f"mdev {device.uuid}",
        )
    return sysfs.refusal(context.machine, device.parent, device.type, device.uuid, result.errno)


def _unanswered(device: DeviceRecord) -> errors.DeadlineError:
    return errors.DeadlineError(
        f"the driver of {device.parent} has not answered for mdev {device.uuid}: it may still "
        "appear",
        "mdo recover removes it then",
        outcome=Outcome.UNKNOWN,
        subject=f"mdev {device.uuid}",
    )


def _late(device: DeviceRecord, context: Context) -> errors.DeadlineError:
    return errors.DeadlineError(
        f"{device.type} on {device.parent} was not created within {context.deadline:g} s",
        "give it a longer --deadline, and see the kernel log",
        outcome=Outcome.NO_EFFECT,
        subject=f"mdev {device.uuid}",
    )


async def _set_up(device: DeviceRecord, context: Context) -> None:
    if device.params:
        await _set_params(device, context)
    joins = [] if device.group is None else [(GROUP_FILE, str(device.group))]
    if GROUP_FILE in dict(device.attributes):
        joins = []  # it is written in its turn
    for name, value in (*device.attributes, *joins):
        if name == GROUP_FILE:
            await join(context.machine, device.uuid, parse_uuid(value), device.parent)
        else:
            await set_attribute(device.uuid, name, value, context)


async def _set_params(device: DeviceRecord, context: Context) -> None:
    for name in sysfs.PARAMS_FILES:
        if await sysfs.write_file(context.machine, device.uuid, name, device.params):
            return
    raise errors.HostError(
        f"the driver of mdev {device.uuid} on {device.parent} takes no parameters: it has neither "
        + " nor ".join(sysfs.PARAMS_FILES),
        "leave params away",
        subject=f"mdev {device.uuid}",
    )


async def set_attribute(uuid: UUID, name: str, value: str, context: Context) -> None:
    """Write one file of an mdev.

    :raise RequestError: The name leads out of its directory.
    :raise HostError: The driver has no such file.
    :raise MdoError: It refused the value.
    """
    machine = context.machine
    if sysfs.leads_out(machine, uuid, name):
        raise errors.RequestError(
            f"{name!r} of mdev {uuid} leads out of its directory", "name a file of the mdev itself"
        )
    if not await sysfs.write_file(machine, uuid, name, value):
        files = sysfs.writable_files(machine, uuid)
        shown = ", ".join(files[:_LISTED]) + (", …" if len(files) > _LISTED else "")
        raise errors.HostError(
            f"the driver of mdev {uuid} has no file {name}",
            f"files that can be set: {shown or 'none'}",
            subject=f"mdev {uuid}",
        )


async def _remove_again(device: DeviceRecord, context: Context, cause: BaseException) -> None:
    """Remove what was created, also when cancelled; what stays is of unknown outcome."""
    try:
        await run_to_completion(_remove(device.uuid, context))
    except errors.MdoError as failure:
        error = errors.MdoError(
            f"mdev {device.uuid} was created and could not be removed again: {failure.message}",
            failure.hint,
            outcome=Outcome.UNKNOWN,
            subject=f"mdev {device.uuid}",
        )
        for note in getattr(cause, "__notes__", ()):
            error.add_note(note)
        raise error from cause


# ---------------------------------------------------------------- removing


async def remove(device: DeviceRecord, context: Context) -> None:
    """Remove an mdev, if it is there and the one that is meant.

    :raise BusyError: A process has it open.
    :raise MdoError: It cannot be; the outcome says whether it may go yet.
    """
    machine, uuid = context.machine, device.uuid
    with errors.before_acting():
        found = sysfs.read_mdev(machine, uuid)
        if context.repairing and (found is None or found.type_id is None):
            # one that is being created has no type either, and nothing to remove it by
            await _await_creators(device, context)
            found = sysfs.read_mdev(machine, uuid)
        if found is None or not is_same(found, device):
            return
        if held_by := await context.held(uuid):
            raise errors.BusyError(
                f"mdev {uuid} is held by {', '.join(map(str, held_by))}",
                "stop that guest, or detach the device from it",
                subject=f"mdev {uuid}",
            )
    await run_to_completion(_remove(uuid, context))
    context.note_removal(device.parent)


async def remove_all(
    devices: Sequence[DeviceRecord], context: Context, on_result: ResultCallback
) -> None:
    """Remove several mdevs of one parent that do not need each other; see :func:`create_all`.

    Nothing is removed if a process has one of them open.
    """
    machine = context.machine
    host = await sysfs.scan(machine, types=False)
    there = {mdev.uuid: mdev for mdev in host.mdevs}
    homes = {parent.name: parent.path for parent in host.parents}
    held = await find_holders(machine, [there[d.uuid] for d in devices if d.uuid in there])
    plain: dict[int, str] = {}
    special: list[int] = []
    for index, device in enumerate(devices):
        found = there.get(device.uuid)
        if found is None or not is_same(found, device):
            on_result(index, Outcome.DONE)
        elif found.type_id is None or found.parent not in homes or held.of(found.uuid):
            special.append(index)
        else:
            plain[index] = sysfs.removal(homes[found.parent], found.uuid)
    for place, index in enumerate(special):
        try:
            await remove(devices[index], context)
        except errors.MdoError as error:
            on_result(index, error.outcome or Outcome.UNKNOWN)
            for other in (*special[place + 1 :], *plain):
                on_result(other, Outcome.NO_EFFECT)
            raise
        on_result(index, Outcome.DONE)
    indices = list(plain)
    if indices:
        await _remove_batch(
            [devices[index] for index in indices],
            list(plain.values()),
            context,
            lambda place, outcome: on_result(indices[place], outcome),
        )


async def _remove_batch(
    devices: Sequence[DeviceRecord],
    files: Sequence[str],
    context: Context,
    on_result: ResultCallback,
) -> None:
    """Write to the ``remove`` files of mdevs that are there and that no process has open."""
    lingering: list[int] = []
    refused: dict[int, int] = {}

    def written(index: int, result: WriteResult) -> None:
        if result.outcome is Outcome.UNKNOWN:
            lingering.append(index)
        elif result.errno not in sysfs.REMOVING:
            on_result(index, Outcome.NO_EFFECT)
            refused[index] = result.errno
        elif Path(files[index]).parent.exists():
            lingering.append(index)
        else:
            on_result(index, Outcome.DONE)

    parent = devices[0].parent
    lines = [(file, b"1") for file in files]
    batch = context.machine.writer.batch(lines, written, lane=parent, accepted=sysfs.REMOVING)
    cause = await _finish_batch(batch, context, on_result)
    context.note_removal(parent)
    for index in (*lingering, *sorted(batch.unknown)):
        # an error of this names the process that has it open
        await run_to_completion(_remove(devices[index].uuid, context))
        on_result(index, Outcome.DONE)
    if isinstance(cause, asyncio.CancelledError):
        raise cause
    if refused:
        raise _first_of(sysfs.not_removed(devices[i].uuid, refused[i]) for i in sorted(refused))
    for index, result in enumerate(batch.results):
        if result is None and index not in batch.unknown:
            raise errors.DeadlineError(
                f"mdev {devices[index].uuid} was not removed: others before it took longer than "
                f"{context.deadline:g} s",
                "try again",
                outcome=Outcome.NO_EFFECT,
                subject=f"mdev {devices[index].uuid}",
            )


async def _await_creators(device: DeviceRecord, context: Context) -> None:
    """Wait until no creation is under way that may be of this device.

    A write that was given up, or whose command was killed, goes on in the kernel.
    """
    loop = asyncio.get_running_loop()
    end = loop.time() + context.deadline
    while creators := await find_creators(context.machine, device.parent, device.type):
        if loop.time() >= end:
            raise errors.DeadlineError(
                f"mdev {device.uuid} may still appear: the driver of {device.parent} has not "
                f"answered {', '.join(map(str, creators))}",
                "mdo recover removes it then",
                outcome=Outcome.UNKNOWN,
                subject=f"mdev {device.uuid}",
            )
        await asyncio.sleep(_LOOK_SECONDS)


async def _wait_gone(uuid: UUID, context: Context) -> None:
    try:
        async with asyncio.timeout(context.deadline):
            await wait_until(
                context.machine, lambda: sysfs.directory(context.machine, uuid) is None
            )
    except TimeoutError:
        raise errors.DeadlineError(
            f"mdev {uuid} is still being removed after {context.deadline:g} s",
            "the kernel waits until the process that has it open closes it",
            subject=f"mdev {uuid}",
        ) from None


async def _remove(uuid: UUID, context: Context) -> None:
    machine = context.machine
    try:
        await sysfs.remove(machine, uuid, context.deadline)
    except errors.UnknownError:
        return
    except errors.DeadlineError as error:
        found = sysfs.read_mdev(machine, uuid)
        holders = () if found is None else (await find_holders(machine, (found,))).of(uuid)
        if not holders:
            raise
        raise errors.DeadlineError(
            f"mdev {uuid} was not removed within {context.deadline:g} s: held by "
            + ", ".join(map(str, holders)),
            error.hint,
            outcome=error.outcome,
            subject=f"mdev {uuid}",
        ) from None
