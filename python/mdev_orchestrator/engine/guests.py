# SPDX-License-Identifier: GPL-2.0-or-later
"""Starts, stops and shows guests: ``mdo guest``."""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID, uuid4

from mdev_orchestrator.engine.context import Context
from mdev_orchestrator.engine.executor import Observer, PlannedStep, attempt, ignore
from mdev_orchestrator.engine.guest_ops import usable_mdev
from mdev_orchestrator.engine.journal import ClaimedError
from mdev_orchestrator.engine.journal_db import JournalError
from mdev_orchestrator.engine.operation import Operation, Plan, perform
from mdev_orchestrator.engine.records import GuestRecord, Managed
from mdev_orchestrator.engine.start_groups import reclaim_groups
from mdev_orchestrator.engine.steps import Launch, Stop
from mdev_orchestrator.errors import RequestError
from mdev_orchestrator.machine import Machine
from mdev_orchestrator.qemu import process, status
from mdev_orchestrator.qemu.process import RunningGuest
from mdev_orchestrator.qemu.start import START_SECONDS
from mdev_orchestrator.qemu.status import Report
from mdev_orchestrator.qemu.stop import STOP_SECONDS, Ended
from mdev_orchestrator.spec import GuestConfig, to_json


async def start_guest(
    machine: Machine,
    config: GuestConfig,
    mdevs: Sequence[UUID] = (),
    *,
    uuid: UUID | None = None,
    deadline: float = START_SECONDS,
    observe: Observer = ignore,
) -> RunningGuest:
    """Start a guest; it goes on running when the caller ends. It belongs to no spec.

    :param mdevs: The devices on its command line, in order.
    :param uuid: The guest's own; that of ``config`` or a random one without it.
    :param deadline: Seconds until QEMU must answer.
    :raise RequestError: The configuration is faulty, or an mdev is named twice.
    :raise BusyError: The guest runs already, or another process has one of the devices open.
    :raise UnknownError: One of the devices is not there.
    :raise HostError: The configuration wants iommufd, and the host or QEMU does not have it.
    :raise QemuError: QEMU did not start; the message has its own words.
    :raise MdoError: A start group did not come online; all was undone.
    """
    if len(set(mdevs)) != len(mdevs):
        raise RequestError(f"guest {config.name}: the same mdev is given twice")
    record = GuestRecord(
        name=config.name,
        uuid=uuid or config.uuid or uuid4(),
        definition=to_json(config),
    )

    async def look(_: Managed) -> Plan[None]:
        for mdev in mdevs:
            await usable_mdev(machine, mdev, deadline, config.iommu)
        step = Launch(guest=record, devices=tuple(mdevs), deadline=deadline, unrecorded=True)
        return Plan(None, [PlannedStep(step)])

    operation = Operation(kind="start", title=config.name, look=look)
    await perform(operation, Context(machine), observe=observe)
    return process.find(machine, config.name)


async def stop_guest(
    machine: Machine,
    name: str,
    *,
    deadline: float = STOP_SECONDS,
    force: bool = False,
) -> Ended:
    """End a guest, and stop the start groups that came online for it.

    It is not undone: a guest that did not power down in time may do so later, and is not started
    again. A journal that cannot be written, on a full disk for instance, does not prevent it.

    :param deadline: Seconds for it to power down; 0 with ``force`` does not ask it.
    :param force: End a guest that does not power down in time, also one that another command
        changes just now.
    :raise UnknownError: There is no such guest.
    :raise DeadlineError: It did not power down; it still runs.
    :raise BusyError: Another command changes it.
    """
    found = process.find(machine, name)
    uuid = UUID(int=0) if found.record is None else found.record.uuid
    record = GuestRecord(name=name, uuid=uuid)
    step = Stop(guest=record, force=force, deadline=deadline, unrecorded=True)
    context = Context(machine)

    async def look(_: Managed) -> Plan[None]:
        return Plan(None, [PlannedStep(step)])

    operation = Operation(kind="stop", title=name, look=look, ends_things=True, is_undone=False)
    try:
        await perform(operation, context)
    except (JournalError, ClaimedError) as error:
        if isinstance(error, ClaimedError) and not force:
            raise
        if name not in context.ended and (result := await attempt(step, context)).error is not None:
            raise result.error from error
    return context.ended.get(name) or Ended(name, "gone")


async def show_guest(machine: Machine, name: str) -> Report:
    """Look at one guest, and ask its QEMU.

    :raise UnknownError: There is no such guest.
    """
    return await status.look(process.find(machine, name))


async def guest_reports(machine: Machine) -> list[Report]:
    """Look at all guests of the state directory, by name; stops groups that have no user first.

    A QEMU that does not answer within five seconds is reported as not answering.
    """
    await reclaim_groups(machine)
    return await status.look_all(process.list_guests(machine))
