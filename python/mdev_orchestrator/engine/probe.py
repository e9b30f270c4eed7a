# SPDX-License-Identifier: GPL-2.0-or-later
"""Learns how a parent fills, by creating devices on it while nobody uses it, and removing them.

One device of each type by itself shows what it takes from the others. Then they are put together,
the most demanding types first, until the parent is full or enough was seen: that shows whether what
was learned from each holds for all. The model that explains every count is remembered
(:mod:`.model_cache`) for all parents of that kind.

Every device is removed again, whatever happens. All of them stand in the journal before the first
is made, in a run that is never finished, only undone: by the probe, or by who finds it open.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from difflib import get_close_matches
from itertools import cycle, islice
from pathlib import Path
from uuid import uuid4

from msgspec import Struct

from mdev_orchestrator.capacity.models import (
    Confidence,
    ParentCapacity,
    TypeCounts,
    count_types,
    kind_of,
    observe,
    survey,
)
from mdev_orchestrator.engine import executor, model_cache, steps
from mdev_orchestrator.engine.context import Context
from mdev_orchestrator.engine.journal import Entry, Journal, Progress, Run
from mdev_orchestrator.engine.journal_db import DeviceRecord
from mdev_orchestrator.engine.recovery import recover
from mdev_orchestrator.engine.steps import Create
from mdev_orchestrator.errors import BusyError, CapacityError, DeadlineError, UnknownError
from mdev_orchestrator.host import sysfs
from mdev_orchestrator.model import Host, Parent

TOGETHER = 16
"""Devices that are put together at most."""
SETTLE_SECONDS = 5.0
"""For the driver to count as it should after a device was made or removed."""

_LISTED = 4


class Candidates(Struct, frozen=True):
    """What can be probed.

    :ivar idle: Parents that have no device.
    :ivar busy: Those that were left out because they have.
    """

    idle: tuple[Parent, ...]
    busy: tuple[str, ...] = ()


class Probed(Struct, frozen=True):
    """What a probe has found.

    :ivar before: What was believed of the parent.
    :ivar after: What is believed now.
    :ivar created: Devices that were created, and removed again.
    """

    before: ParentCapacity
    after: ParentCapacity
    created: int

    @property
    def learned(self) -> bool:
        """Whether its model is sure now and was remembered."""
        return self.after.confidence is Confidence.OBSERVED


async def candidates(
    names: Sequence[str], context: Context, *, journal: Path | None = None
) -> Candidates:
    """Choose parents to probe, after what an earlier command left open has been undone.

    :param names: Parents; all that have no devices if there is none.
    :raise UnknownError: There is no such parent.
    :raise BusyError: One that is named has devices, or all have.
    :raise HostError: The journal cannot be used.
    """
    with Journal.open(journal) as book:
        await recover(book, context=context)
    return choose(sysfs.scan(context.host), names)


def choose(host: Host, names: Sequence[str]) -> Candidates:
    """The same for one scan of the host, without a look at the journal."""
    parents = {parent.name: parent for parent in host.parents}
    if not parents:
        raise UnknownError(
            "no device of this host offers mdevs", "load the vendor's driver; see mdo doctor"
        )
    for name in names:
        if name not in parents:
            close = get_close_matches(name, parents, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are {_some(list(parents))}"
            raise UnknownError(f"there is no parent {name}", hint)
        if devices := _devices_of(host, name):
            raise BusyError(
                f"parent {name} has devices: {_some(devices)}",
                "probe it when it has none: mdo remove removes a device",
            )
    busy = tuple(name for name in parents if _devices_of(host, name))
    if len(busy) == len(parents):
        raise BusyError(
            f"every parent has devices: {_some(busy)}", "probe one when it has none; see mdo host"
        )
    wanted = dict.fromkeys(names or [name for name in parents if name not in busy])
    return Candidates(tuple(parents[name] for name in wanted), () if names else busy)


async def probe(
    parent: str, context: Context, *, journal: Path | None = None, place: Path | None = None
) -> Probed:
    """Learn how one parent fills.

    Where it offers one type only there is nothing to learn, and nothing is created.

    :param place: Directory of what is remembered; the state directory without it.
    :raise BusyError: It has devices, or somebody created one meanwhile.
    :raise CapacityError: It has none, and yet says that none can be created.
    :raise MdoError: The driver refused; every device was removed again, but for those that the
        notes name.
    """
    host = sysfs.scan(context.host)
    (found,) = choose(host, [parent]).idle
    (believed,) = survey(Host((found,)), learned=model_cache.load(place))
    if believed.confidence is Confidence.CERTAIN:
        return Probed(believed, believed, 0)
    idle = count_types(host, parent)
    if idle is None:
        raise BusyError(f"parent {parent} has a device on its way", "try again when it has settled")
    with Journal.open(journal) as book:
        async with _trial(book, found, idle, context) as trial:
            await trial.alone()
            await trial.together()
        await trial.settled(idle)
    now = observe(believed, [*trial.looks, idle])
    result = Probed(believed, now, trial.created)
    if result.learned:
        model_cache.keep({kind_of(found): now.model}, place)
    return result


@asynccontextmanager
async def _trial(
    book: Journal, parent: Parent, idle: TypeCounts, context: Context
) -> AsyncIterator[_Trial]:
    """A run of the journal, with all devices that may be made; undone at the end."""
    alone = [type_ for type_, left in idle.left.items() if left]
    if not alone:
        raise CapacityError(
            f"parent {parent.name} has no devices, and its driver offers none",
            "see the kernel log (dmesg)",
        )
    demanding = sorted(alone, key=lambda type_: idle.left[type_] or 0)
    creates = [
        Create(device=DeviceRecord(uuid=uuid4(), parent=parent.name, type=type_))
        for type_ in (*alone, *islice(cycle(demanding), TOGETHER))
    ]
    run = await book.begin(
        "probe",
        parent.name,
        [Entry(number, steps.encode(create)) for number, create in enumerate(creates)],
        {f"parent:{parent.name}"}.union(*(create.claims for create in creates)),
    )
    trial = _Trial(book, run, creates, context, idle, [idle], dict(idle.used))

    async def undo(cause: BaseException | None) -> None:
        stuck = await executor.undo(book, run, book.steps(run), context)
        for error in stuck:
            if cause is None:
                raise error
            cause.add_note(error.message)
        if cause is not None and not stuck:
            cause.add_note("every device was removed again")

    cause: BaseException | None = None
    try:
        yield trial
    except (Exception, asyncio.CancelledError) as error:
        cause = error
        raise
    finally:
        # a second interruption ends this too, and leaves the run to whoever recovers it
        await asyncio.shield(asyncio.ensure_future(undo(cause)))


class _Trial(Struct):
    """Devices that are made on a parent, and what is seen of it meanwhile.

    :ivar creates: Those that are made by themselves, then the ``TOGETHER`` others.
    """

    book: Journal
    run: Run
    creates: Sequence[Create]
    context: Context
    idle: TypeCounts
    looks: list[TypeCounts]
    used: dict[str, int]
    created: int = 0

    async def alone(self) -> None:
        """One device of each type, by itself."""
        for number in range(len(self.creates) - TOGETHER):
            await self._make(number)
            await self._take_back(number)

    async def together(self) -> None:
        """As many devices as fit, up to a number."""
        for number in range(len(self.creates) - TOGETHER, len(self.creates)):
            if self.looks[-1].left[self.creates[number].device.type]:
                await self._make(number)

    async def _make(self, number: int) -> None:
        create = self.creates[number]
        await self.book.note(self.run, Progress.ACTING, [number], change=create.intent)
        await create.make(self.context)
        self.created += 1
        await self.book.note(self.run, Progress.DONE, [number], change=create.outcome)
        self.used[create.device.type] += 1
        self.looks.append(await self.settled(TypeCounts(self.used, {})))

    async def _take_back(self, number: int) -> None:
        remove = self.creates[number].inverse()
        await self.book.note(self.run, Progress.UNDOING, [number], change=remove.intent)
        await remove.make(self.context)
        await self.book.note(self.run, Progress.UNDONE, [number], change=remove.outcome)
        self.used[remove.device.type] -= 1
        self.looks.append(await self.settled(self.idle))

    async def settled(self, expected: TypeCounts) -> TypeCounts:
        """Wait until the parent is as it should be, and give what is seen of it then.

        No event tells when a driver has given an instance back.

        :raise BusyError: It has a device that is not ours.
        :raise DeadlineError: It is still not so.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + SETTLE_SECONDS
        parent = self.run.title
        ours = {create.device.uuid for create in self.creates}
        while True:
            host = sysfs.scan(self.context.host)
            for mdev in host.mdevs:
                if mdev.parent == parent and mdev.uuid not in ours:
                    raise BusyError(
                        f"somebody created device {mdev.uuid} on parent {parent} while it was "
                        "probed; nothing was learned",
                        "try again when nobody uses it",
                    )
            seen = count_types(host, parent)
            if seen is not None and _as_expected(seen, expected):
                return TypeCounts(dict(seen.used), seen.left)
            if loop.time() >= end:
                raise DeadlineError(
                    f"parent {parent} does not count as it should: {_difference(seen, expected)}",
                    "see the kernel log (dmesg)",
                )
            await asyncio.sleep(0.02)


def _as_expected(seen: TypeCounts, expected: TypeCounts) -> bool:
    """Whether it has just these devices, and those counts that are known beforehand."""
    return seen.used == expected.used and expected.left.items() <= seen.left.items()


def _difference(seen: TypeCounts | None, expected: TypeCounts) -> str:
    if seen is None:
        return "a device is on its way"
    for what, now, then in (
        ("exist", seen.used, expected.used),
        ("can be created", seen.left, expected.left),
    ):
        for type_, n in then.items():
            if now.get(type_) != n:
                return f"{now.get(type_)} of {type_} {what}, and it should be {n}"
    return "nothing differs any more"


def _devices_of(host: Host, parent: str) -> list[str]:
    return [str(mdev.uuid) for mdev in host.mdevs if mdev.parent == parent]


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
