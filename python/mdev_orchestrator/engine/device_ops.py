# SPDX-License-Identifier: GPL-2.0-or-later
"""How mdevs are made and removed, alone and many at a time, whatever the driver does meanwhile.

What was begun has an outcome, and these functions wait for it: a write that was given up goes on in
the kernel, and who undoes things must not be overtaken by it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TypeVar
from uuid import UUID

from mdev_orchestrator.engine.context import Context, UnsettledError
from mdev_orchestrator.engine.journal_db import DeviceRecord
from mdev_orchestrator.errors import (
    BusyError,
    DeadlineError,
    HostError,
    MdoError,
    Outcome,
    RequestError,
    UnknownError,
)
from mdev_orchestrator.host import sysfs
from mdev_orchestrator.host.events import wait_until
from mdev_orchestrator.host.groups import join
from mdev_orchestrator.host.holders import find_creators, find_holders
from mdev_orchestrator.host.readiness import missing, wait_ready
from mdev_orchestrator.machine import Machine
from mdev_orchestrator.model import GROUP_FILE, Mdev, parse_uuid
from mdev_orchestrator.system.writer import WriteBatch, WriteResult

T = TypeVar("T")

ResultCallback = Callable[[int, bool], None]
"""Takes the number of a device, and whether it is as wanted or nothing was done to it."""

_LISTED = 8  # files that fit one line
_LOOK_SECONDS = 0.05
"""Between two looks at a creation that goes on without us; no event tells of its end."""


def is_same(found: Mdev, device: DeviceRecord) -> bool:
    """Whether an mdev is the one that we made, as far as can be told.

    One that is being removed has no type any more.
    """
    return found.parent == device.parent and found.type_id in (device.type, None)


# ---- making ----


async def create(device: DeviceRecord, context: Context) -> None:
    """Make an mdev, set it up, and wait until it can be opened; or take it back.

    :raise UuidError: Another device has its UUID.
    :raise UnsettledError: It may appear yet, or could not be taken back.
    :raise MdoError: It cannot be; there is nothing of it.
    """
    # who does not repair need not look: the kernel makes a UUID once
    found = sysfs.read_mdev(context.machine, device.uuid) if context.repairing else None
    if found is not None and found.type_id is None:
        await _gone(device.uuid, context)  # our own removal has not come to its end
        found = None
    if found is not None and not is_same(found, device):
        raise sysfs.taken(context.machine, device.uuid)
    loop = asyncio.get_running_loop()
    end = loop.time() + context.deadline
    if found is None:
        await _create(device, context)
    try:
        async with asyncio.timeout_at(end):
            await _set_up(device, context)
        await wait_ready(context.machine, device.uuid, max(end - loop.time(), 0))
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


async def create_all(
    devices: Sequence[DeviceRecord], context: Context, told: ResultCallback
) -> None:
    """Make several that do not need each other: what one costs is mostly the way to it.

    Nothing is set up, and unlike :func:`create` it takes back nothing.

    :param told: Called for each that is made, and for each of which there is nothing; of the others
        nothing is known when this raises.
    :raise MdoError: The first that failed; no other was begun after it.
    """
    unready = await _create_all(devices, context, told)
    loop = asyncio.get_running_loop()
    end = loop.time() + context.deadline
    for index in unready:
        left = max(end - loop.time(), 0)
        await wait_ready(context.machine, devices[index].uuid, left)
        told(index, True)


# ---- removing ----


async def remove(device: DeviceRecord, context: Context) -> None:
    """Remove an mdev, if it is there and the one that is meant.

    :raise BusyError: Somebody has it open.
    :raise UnsettledError: The kernel still waits for somebody.
    :raise MdoError: It cannot be; it is there.
    """
    uuid = device.uuid
    found = sysfs.read_mdev(context.machine, uuid)
    if context.repairing and (found is None or found.type_id is None):
        # one that is being created has no type either, and nothing to remove it by
        await _settled(device, context)
        found = sysfs.read_mdev(context.machine, uuid)
    if found is None or not is_same(found, device):
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


async def remove_all(
    devices: Sequence[DeviceRecord], context: Context, told: ResultCallback
) -> None:
    """Remove several that do not need each other; see :func:`create_all`.

    Nothing is removed when somebody has one of them open.
    """
    host = await sysfs.scan(context.machine, types=False)
    there = {mdev.uuid: mdev for mdev in host.mdevs}
    homes = {parent.name: parent.path for parent in host.parents}
    held = await find_holders(context.machine, host.mdevs)
    plain: dict[int, str] = {}
    odd: list[int] = []
    for index, device in enumerate(devices):
        found = there.get(device.uuid)
        if found is None or not is_same(found, device):
            told(index, True)
        elif found.type_id is None or found.parent not in homes or held.of(found.uuid):
            odd.append(index)
        else:
            plain[index] = sysfs.removal(homes[found.parent], found.uuid)
    for place, index in enumerate(odd):
        try:
            await remove(devices[index], context)
        except MdoError as error:
            for other in (*odd[place + isinstance(error, UnsettledError) :], *plain):
                told(other, False)
            raise
        told(index, True)
    indices = list(plain)
    if indices:
        await _remove_all(
            [devices[index].uuid for index in indices],
            list(plain.values()),
            context,
            lambda place, made: told(indices[place], made),
        )


# ---- parts of them ----


async def _create(device: DeviceRecord, context: Context) -> None:
    """Write to ``create`` and learn the outcome, whatever happens to us meanwhile."""
    creating = asyncio.ensure_future(
        sysfs.create(context.machine, device.parent, device.type, device.uuid)
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
    creating: asyncio.Future[None], device: DeviceRecord, context: Context, cause: BaseException
) -> None:
    """After a creation was given up: wait for its outcome, and take it back."""
    await asyncio.wait((creating,), timeout=context.deadline)
    if not creating.done():
        creating.cancel()
        raise _unanswered(device) from cause
    creating.result()  # or its refusal: the device of this UUID may be somebody else's by now
    await _take_back(device, context, cause)


async def _create_all(
    devices: Sequence[DeviceRecord], context: Context, told: ResultCallback
) -> list[int]:
    """Write to ``create`` for several, and learn the outcome of each, whatever happens to us.

    :return: Those that are there and cannot be opened yet; the others have been told of.
    """
    machine = context.machine
    lines = [sysfs.creation(machine, d.parent, d.type, d.uuid) for d in devices]
    unready: list[int] = []
    refused: list[int] = []
    lost: list[int] = []

    def written(index: int, result: WriteResult) -> None:
        if result.outcome is Outcome.UNKNOWN:
            lost.append(index)
        elif result.errno:
            told(index, False)
            refused.append(index)
        elif missing(machine, devices[index].uuid) is None:
            told(index, True)
        else:
            unready.append(index)

    batch = machine.writer.batch(lines, written, lane=devices[0].parent)
    cause = await _written(batch, context, told)
    if lost := sorted({*lost, *batch.unknown}):
        raise _unanswered(devices[lost[0]]) from cause
    if isinstance(cause, TimeoutError):
        raise _late(devices[0], context) from None
    if cause is not None:
        raise cause
    if refused:
        first, *others = (_refusal(devices[i], batch.results[i], machine) for i in refused)
        for other in others:
            first.add_note(f"also: {other}")
        raise first
    return unready


def _refusal(device: DeviceRecord, result: WriteResult | None, machine: Machine) -> MdoError:
    number = result.errno if result else 0
    return sysfs.refusal(machine, device.parent, device.type, device.uuid, number)


async def _written(
    batch: WriteBatch, context: Context, told: ResultCallback
) -> BaseException | None:
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
    for index, result in enumerate(batch.results):
        if result is None and index not in batch.unknown:
            told(index, False)
    return cause


async def _answered(batch: WriteBatch, deadline: float) -> None:
    """Wait for the end of a batch.

    :raise TimeoutError: One of its writes took longer than ``deadline``, in seconds.
    """
    while not batch.ended.done():
        await asyncio.wait((batch.ended,), timeout=max(deadline - batch.longest, 0))
        if not batch.ended.done() and batch.longest >= deadline:
            raise TimeoutError


def _unanswered(device: DeviceRecord) -> UnsettledError:
    return UnsettledError(
        f"the driver of {device.parent} has not answered for mdev {device.uuid}: it may still "
        "appear",
        "mdo recover removes it then",
    )


def _late(device: DeviceRecord, context: Context) -> DeadlineError:
    return DeadlineError(
        f"{device.type} on {device.parent} was not created within {context.deadline:g} s",
        "give it a longer --deadline, and see the kernel log",
    )


async def _settled(device: DeviceRecord, context: Context) -> None:
    """Wait until no creation is under way that may be of this device.

    One that was given up, or whose command was killed, goes on in the kernel.
    """
    end = time.monotonic() + context.deadline
    while who := await find_creators(context.machine, device.parent, device.type):
        if time.monotonic() >= end:
            raise UnsettledError(
                f"mdev {device.uuid} may still appear: the driver of {device.parent} has not "
                f"answered {', '.join(map(str, who))}",
                "mdo recover removes it then",
            )
        await asyncio.sleep(_LOOK_SECONDS)


async def _set_up(device: DeviceRecord, context: Context) -> None:
    if device.params:
        await _set_params(device, context)
    joins = [] if device.group is None else [(GROUP_FILE, str(device.group))]
    if GROUP_FILE in dict(device.attributes):
        joins = []  # it stands where it is to be written
    for name, value in (*device.attributes, *joins):
        if name == GROUP_FILE:
            group = parse_uuid(value)
            await join(context.machine, device.uuid, group, device.parent)
        else:
            await set_attribute(device.uuid, name, value, context)


async def _set_params(device: DeviceRecord, context: Context) -> None:
    for name in sysfs.PARAMS_FILES:
        if await sysfs.write_file(context.machine, device.uuid, name, device.params):
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
    if sysfs.leads_out(context.machine, uuid, name):
        raise RequestError(
            f"{name!r} of mdev {uuid} leads out of its directory", "name a file of the mdev itself"
        )
    if not await sysfs.write_file(context.machine, uuid, name, value):
        files = sysfs.writable_files(context.machine, uuid)
        shown = ", ".join(files[:_LISTED]) + (", …" if len(files) > _LISTED else "")
        raise HostError(
            f"the driver of mdev {uuid} has no file {name}",
            f"files that can be set: {shown or 'none'}",
        )


async def _take_back(device: DeviceRecord, context: Context, cause: BaseException) -> None:
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
            await wait_until(
                context.machine, lambda: sysfs.directory(context.machine, uuid) is None
            )
    except TimeoutError:
        raise DeadlineError(
            f"mdev {uuid} is still being removed after {context.deadline:g} s",
            "the kernel waits until whoever has it open closes it",
        ) from None


async def _removed(uuid: UUID, context: Context) -> None:
    try:
        await sysfs.remove(context.machine, uuid, context.deadline)
    except UnknownError:
        return
    except DeadlineError as error:
        found = sysfs.read_mdev(context.machine, uuid)
        who = () if found is None else (await find_holders(context.machine, (found,))).of(uuid)
        if not who:
            raise
        raise DeadlineError(
            f"mdev {uuid} was not removed within {context.deadline:g} s: held by "
            + ", ".join(map(str, who)),
            error.hint,
        ) from None


async def _remove_all(  # noqa: C901
    uuids: Sequence[UUID], files: Sequence[str], context: Context, told: ResultCallback
) -> None:
    """Write to the ``remove`` files of several that are there and that nobody holds."""
    lines = [(file, b"1") for file in files]
    lingering: list[int] = []
    refused: list[int] = []

    def written(index: int, result: WriteResult) -> None:
        if result.outcome is Outcome.UNKNOWN:
            lingering.append(index)
        elif result.errno not in sysfs.REMOVING:
            told(index, False)
            refused.append(index)
        elif Path(files[index]).parent.exists():
            lingering.append(index)
        else:
            told(index, True)

    lane = Path(files[0]).parent.parent.name
    batch = context.machine.writer.batch(lines, written, lane=lane, accepted=sysfs.REMOVING)
    cause = await _written(batch, context, told)
    for index in (*lingering, *sorted(batch.unknown)):
        # it says who has it, if it does not go
        try:
            await _finish(_removed(uuids[index], context))
        except DeadlineError as error:
            raise UnsettledError(error.message, error.hint) from cause
        told(index, True)
    if isinstance(cause, asyncio.CancelledError):
        raise cause
    if refused:
        result = batch.results[refused[0]]
        raise sysfs.not_removed(uuids[refused[0]], result.errno if result else 0)
    for index, result in enumerate(batch.results):
        if result is None and index not in batch.unknown:
            raise DeadlineError(
                f"mdev {uuids[index]} was not removed: others before it took longer than "
                f"{context.deadline:g} s",
                "try again",
            )
