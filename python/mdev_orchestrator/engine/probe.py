# SPDX-License-Identifier: GPL-2.0-or-later
"""Learns how a parent fills, by creating devices on it while it has none, and removing them.

One device of each type by itself shows what it takes from the others. Then they are put together,
the most demanding types first, until the parent is full or enough was seen: that shows whether what
was learned from each holds for all. The model that explains every count is remembered
(:mod:`.model_cache`) for all parents of that kind.

Every device is removed again, whatever happens. All of them are in the journal before the first is
created, in a run that is never finished, only undone: by the probe, or by recovery.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from difflib import get_close_matches
from itertools import cycle, islice
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
from mdev_orchestrator.engine import model_cache, steps
from mdev_orchestrator.engine.context import DEADLINE, Context
from mdev_orchestrator.engine.executor import Execution, PlannedStep, claims_of
from mdev_orchestrator.engine.journal import Entry, Journal, open_journal
from mdev_orchestrator.engine.records import DeviceRecord
from mdev_orchestrator.engine.recovery import recover_abandoned
from mdev_orchestrator.engine.steps import Create
from mdev_orchestrator.errors import (
    BusyError,
    CapacityError,
    DeadlineError,
    MdoError,
    UnknownError,
)
from mdev_orchestrator.host import sysfs
from mdev_orchestrator.machine import Machine
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


async def candidates(machine: Machine, names: Sequence[str]) -> Candidates:
    """Choose parents to probe, after what an earlier command left open has been undone.

    :param names: Parents; all that have no devices if there is none.
    :raise UnknownError: There is no such parent.
    :raise BusyError: One that is named has devices, or all have.
    :raise HostError: The journal cannot be used.
    """
    async with open_journal(machine) as journal:
        await recover_abandoned(journal, Context(machine))
    return choose(await sysfs.scan(machine), names)


def choose(host: Host, names: Sequence[str]) -> Candidates:
    """The same for one scan of the host, without reading the journal."""
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


async def probe(machine: Machine, parent: str, *, deadline: float = DEADLINE) -> Probed:
    """Learn how one parent fills.

    Where it offers one type only there is nothing to learn, and nothing is created.

    :param deadline: Seconds for each device.
    :raise BusyError: It has devices, or another program created one meanwhile.
    :raise CapacityError: It has none, and yet says that none can be created.
    :raise MdoError: The driver refused; every device was removed again, but for those that the
        notes name.
    """
    context = Context(machine, deadline)
    host = await sysfs.scan(machine)
    (found,) = choose(host, [parent]).idle
    (believed,) = survey(Host((found,)), learned=model_cache.load(machine))
    if believed.confidence is Confidence.CERTAIN:
        return Probed(believed, believed, 0)
    idle = count_types(host, parent)
    if idle is None:
        raise BusyError(f"parent {parent} has a device on its way", "try again when it has settled")
    async with open_journal(machine) as journal:
        async with _trial(journal, found, idle, context) as trial:
            await trial.alone()
            await trial.together()
        await trial.settled(idle)
    now = observe(believed, [*trial.samples, idle])
    result = Probed(believed, now, trial.created)
    if result.learned:
        model_cache.keep(machine, {kind_of(found): now.model})
    return result


@asynccontextmanager
async def _trial(
    journal: Journal, parent: Parent, idle: TypeCounts, context: Context
) -> AsyncIterator[_Trial]:
    """A run of the journal, with all devices that may be created; undone at the end."""
    alone = [type_ for type_, left in idle.left.items() if left]
    if not alone:
        raise CapacityError(
            f"parent {parent.name} has no devices, and its driver offers none",
            "see the kernel log (dmesg)",
        )
    demanding = sorted(alone, key=lambda type_: idle.left[type_] or 0)
    planned = [
        PlannedStep(Create(device=DeviceRecord(uuid=uuid4(), parent=parent.name, type=type_)))
        for type_ in (*alone, *islice(cycle(demanding), TOGETHER))
    ]
    run = await journal.begin(
        "probe",
        parent.name,
        [Entry(n, steps.encode(entry.step)) for n, entry in enumerate(planned)],
        claims_of(planned),
    )
    execution = Execution(journal, run, planned, context)
    trial = _Trial(execution, idle, [idle], dict(idle.used))
    cause: BaseException | None = None
    try:
        yield trial
    except (Exception, asyncio.CancelledError) as error:
        cause = error
        raise
    finally:
        # a second interruption ends this too, and leaves the run to recovery
        await asyncio.shield(asyncio.ensure_future(_undo(execution, cause)))


async def _undo(execution: Execution, cause: BaseException | None) -> None:
    """Remove every device again.

    :raise MdoError: One could not be removed, and there is no other error.
    """
    closed = await execution.undo_all(cause or MdoError("the probe is over"))
    if cause is None and execution.stuck:
        raise execution.stuck[0]
    if cause is not None and closed:
        cause.add_note("every device was removed again")


class _Trial(Struct):
    """Devices that are created on a parent, and what is seen of it meanwhile.

    :ivar execution: Its steps create the devices that are alone, then the ``TOGETHER`` others.
    """

    execution: Execution
    idle: TypeCounts
    samples: list[TypeCounts]
    used: dict[str, int]
    created: int = 0

    @property
    def devices(self) -> list[DeviceRecord]:
        """All devices that may be created."""
        planned = self.execution.planned
        return [entry.step.device for entry in planned if isinstance(entry.step, Create)]

    async def alone(self) -> None:
        """One device of each type, by itself."""
        for number in range(len(self.devices) - TOGETHER):
            await self._create(number)
            await self._remove(number)

    async def together(self) -> None:
        """As many devices as fit, up to a number."""
        devices = self.devices
        for number in range(len(devices) - TOGETHER, len(devices)):
            if self.samples[-1].left[devices[number].type]:
                await self._create(number)

    async def _create(self, number: int) -> None:
        await self.execution.do_one(number)
        self.created += 1
        self.used[self.devices[number].type] += 1
        self.samples.append(await self.settled(TypeCounts(self.used, {})))

    async def _remove(self, number: int) -> None:
        await self.execution.undo_one(number)
        self.used[self.devices[number].type] -= 1
        self.samples.append(await self.settled(self.idle))

    async def settled(self, expected: TypeCounts) -> TypeCounts:
        """Wait until the parent is as it should be, and give what is seen of it then.

        No event tells when a driver has given an instance back.

        :raise BusyError: It has a device of another program.
        :raise DeadlineError: It is still not so.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + SETTLE_SECONDS
        parent = self.execution.run.title
        created = {device.uuid for device in self.devices}
        while True:
            host = await sysfs.scan(self.execution.context.machine)
            for mdev in host.mdevs:
                if mdev.parent == parent and mdev.uuid not in created:
                    raise BusyError(
                        f"another program created device {mdev.uuid} on parent {parent} while "
                        "it was probed; nothing was learned",
                        "try again when it has no devices",
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
