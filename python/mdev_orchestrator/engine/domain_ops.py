# SPDX-License-Identifier: GPL-2.0-or-later
"""The steps that give a libvirt domain an mdev and take it back, through libvirt.

libvirt is asked for a change and then asked what the domain has: its word that nothing was done is
not believed alone. When it does not answer, or has gone in the middle of a change, the outcome is
unknown, and an undo finds out: a detach waits in libvirt for the attach before it.

A start group is started by its driver or by the domain's QEMU, never by mdo: the end of the domain,
when the group is to be stopped, is libvirt's affair.
"""

from __future__ import annotations

import asyncio
import contextlib
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from uuid import UUID

import msgspec

from mdev_orchestrator import errors
from mdev_orchestrator.engine import foreign, start_groups
from mdev_orchestrator.engine.context import Context
from mdev_orchestrator.engine.step import Step
from mdev_orchestrator.errors import Outcome
from mdev_orchestrator.host import sysfs
from mdev_orchestrator.interop import libvirt
from mdev_orchestrator.interop.libvirt import Domain
from mdev_orchestrator.machine import Machine
from mdev_orchestrator.qemu import hotplug
from mdev_orchestrator.qemu.pending import ASKED, still_asked, time_left
from mdev_orchestrator.qemu.remedies import remedy
from mdev_orchestrator.state import private_dir
from mdev_orchestrator.system.waiting import run_to_completion

LOOK_SECONDS = 10.0
"""For libvirt to say what a domain has."""
_POLL_SECONDS = 0.5
_DOMAINS = "domains"
"""Directory below the state directory with marks: touched when a guest is asked to let go."""


# ---------------------------------------------------------------- steps


class _DomainStep(Step, frozen=True):
    """Changes the mdevs of a domain that runs.

    :ivar domain: Its name, for messages.
    :ivar domain_uuid: Its UUID, by which it is found.
    """

    domain: str
    domain_uuid: UUID
    uuid: UUID
    device_api: str = "vfio-pci"

    @property
    def claims(self) -> tuple[str, ...]:
        return (f"domain:{self.domain_uuid}", f"mdev:{self.uuid}")


class AttachDomain(_DomainStep, frozen=True, tag="attach-domain"):
    """Give a domain an mdev."""

    deadline: float = hotplug.ATTACH_SECONDS
    undo_deadline: float = hotplug.DETACH_SECONDS

    def __str__(self) -> str:
        """What it does."""
        return f"attach mdev {self.uuid} to libvirt domain {self.domain}"

    async def act(self, context: Context) -> None:  # noqa: D102
        machine, seconds = context.machine, context.seconds(self.deadline)
        with errors.before_acting():
            found = await foreign.running_domain(machine, self.domain_uuid)
            if found is None:
                if context.repairing:
                    _mark(machine, self.domain_uuid, self.uuid).unlink(missing_ok=True)
                    return  # one that has ended has no devices to give back
                raise errors.RequestError(
                    f"libvirt domain {self.domain} does not run",
                    f"virsh start {shlex.quote(self.domain)}",
                )
            if context.repairing and await _keeps(machine, found, self.uuid, seconds):
                return
        name = await attach(machine, found, self.uuid, self.device_api, deadline=seconds)
        context.names[self.uuid] = name

    def inverse(self) -> DetachDomain:
        """What undoes it."""
        return DetachDomain(
            domain=self.domain,
            domain_uuid=self.domain_uuid,
            uuid=self.uuid,
            device_api=self.device_api,
            deadline=self.undo_deadline,
        )


class DetachDomain(_DomainStep, frozen=True, tag="detach-domain"):
    """Take an mdev out of a domain.

    :ivar named: A user named the device: that the domain does not have it is an error.
    """

    deadline: float = hotplug.DETACH_SECONDS
    named: bool = False

    def __str__(self) -> str:
        """What it does."""
        return f"detach mdev {self.uuid} from libvirt domain {self.domain}"

    async def act(self, context: Context) -> None:  # noqa: D102
        with errors.before_acting():
            found = await foreign.running_domain(context.machine, self.domain_uuid)
        if found is None:
            _mark(context.machine, self.domain_uuid, self.uuid).unlink(missing_ok=True)
            return
        await detach(
            context.machine,
            found,
            self.uuid,
            self.device_api,
            deadline=self.deadline,
            may_lack=context.repairing or not self.named,
        )

    def inverse(self) -> AttachDomain:
        """What undoes it."""
        return AttachDomain(
            domain=self.domain,
            domain_uuid=self.domain_uuid,
            uuid=self.uuid,
            device_api=self.device_api,
            undo_deadline=self.deadline,
        )


# ---------------------------------------------------------------- what they do


async def attach(
    machine: Machine, domain: Domain, uuid: UUID, device_api: str, *, deadline: float
) -> str:
    """Give a domain an mdev; it is not part of the domain's configuration.

    :param deadline: Seconds for the whole.
    :return: What QEMU calls the device.
    :raise BusyError: Another process has it open, or a member of its group.
    :raise RequestError: The domain has it already.
    :raise QemuError: libvirt or QEMU refused it.
    :raise MdoError: As of :mod:`mdev_orchestrator.interop.libvirt`.
    """
    end = _end_of(deadline)
    with errors.before_acting(), _explained(domain, uuid, device_api, "attach"):
        found = await sysfs.scan(machine, types=False)
        for group in start_groups.groups_of(found, [uuid]):
            held = await start_groups.holders_of(machine, [group], found)
            start_groups.check_users(group, held, domain.pid)
        if uuid in await libvirt.devices(machine, domain, _left(end)):
            raise errors.RequestError(
                f"{domain.label} has mdev {uuid} already", subject=domain.label
            )
    xml = libvirt.hostdev(uuid, device_api)
    try:
        # to its end even when the caller is cancelled: it cannot be taken back
        await run_to_completion(libvirt.attach_device(machine, domain, xml, _left(end)))
    except errors.MdoError as error:
        error.hint = remedy(error.message) or error.hint
        # of what was never sent there is no doubt
        refused = isinstance(error, errors.QemuError) and error.outcome is Outcome.NO_EFFECT
        if refused and await _may_have(machine, domain, uuid):
            error.outcome = Outcome.UNKNOWN
        raise
    try:
        has = await libvirt.devices(machine, domain, LOOK_SECONDS)
    except errors.MdoError as error:
        error.outcome = Outcome.UNKNOWN
        raise
    if uuid not in has:
        raise errors.QemuError(
            f"{domain.label}: libvirt took mdev {uuid}, but does not list it",
            outcome=Outcome.UNKNOWN,
            subject=domain.label,
        )
    return has[uuid]


async def _may_have(machine: Machine, domain: Domain, uuid: UUID) -> bool:
    """Whether a domain has an mdev, as far as anything says so: libvirt, or an open file."""
    if await _has_open(machine, domain, uuid):
        return True
    try:
        return uuid in await libvirt.devices(machine, domain, LOOK_SECONDS)
    except errors.MdoError:
        return True


async def _has_open(machine: Machine, domain: Domain, uuid: UUID) -> bool:
    found = await sysfs.scan(machine, types=False)
    held = await start_groups.holders_of(machine, start_groups.groups_of(found, [uuid]), found)
    return any(holder.pid == domain.pid for holder in held.of(uuid))


async def detach(
    machine: Machine,
    domain: Domain,
    uuid: UUID,
    device_api: str,
    *,
    deadline: float,
    may_lack: bool = False,
) -> None:
    """Take an mdev out of a domain; returns when QEMU has closed it.

    :param deadline: Seconds for the whole; the guest is asked again every ten.
    :param may_lack: That the domain does not have it is no error. libvirt is asked to detach it all
        the same: an attach of which the outcome is unknown may be under way there.
    :raise UnknownError: The domain does not have it.
    :raise QemuError: The guest, QEMU or libvirt refused.
    :raise DeadlineError: The guest did not let go in time, and may do so yet.
    :raise MdoError: As of :mod:`mdev_orchestrator.interop.libvirt`.
    """
    end = _end_of(deadline)
    with errors.before_acting(), _explained(domain, uuid, device_api, "detach"):
        try:
            seconds = min(_left(end), LOOK_SECONDS)
            has: Mapping[UUID, str] = await libvirt.devices(machine, domain, seconds)
        except errors.HostError:
            # without libvirt nothing is under way
            if may_lack and not await _has_open(machine, domain, uuid):
                return
            raise
        if uuid not in has and not may_lack:
            _mark(machine, domain.uuid, uuid).unlink(missing_ok=True)
            raise errors.UnknownError(
                f"{domain.label} has no mdev {uuid}",
                f"it has: {', '.join(sorted(map(str, has))) or 'none'}",
                subject=f"mdev {uuid}",
            )
    with hotplug.asking(_mark(machine, domain.uuid, uuid)):
        await _let_go(machine, domain, uuid, device_api, end, deadline)


async def _let_go(
    machine: Machine, domain: Domain, uuid: UUID, device_api: str, end: float, deadline: float
) -> None:
    """Have the guest asked, again and again, until libvirt does not list the device any more."""
    loop = asyncio.get_running_loop()
    xml = libvirt.hostdev(uuid, device_api)
    asked = False
    while (left := end - loop.time()) > 0:
        _touch(machine, domain, uuid)
        refusal: errors.MdoError | None = None
        try:
            await run_to_completion(libvirt.detach_device(machine, domain, xml, left))
        except errors.MdoError as error:
            if not isinstance(error, errors.QemuError) or error.outcome is not Outcome.NO_EFFECT:
                if asked:  # whatever becomes of this question, the first is open
                    error.outcome = Outcome.UNKNOWN
                raise
            refusal = error
        again = loop.time() + hotplug.ASK_AGAIN_SECONDS
        try:
            if await _gone(machine, domain, uuid, min(end, again) if refusal is None else 0):
                return
        except errors.MdoError as error:
            error.outcome = Outcome.UNKNOWN
            raise
        if refusal is not None and "in the process of unplug" not in refusal.message:
            if asked:
                refusal.outcome = Outcome.UNKNOWN
            if uuid not in await libvirt.devices(machine, domain, LOOK_SECONDS):
                raise errors.QemuError(
                    f"{domain.label}: its QEMU has mdev {uuid} open, and libvirt does not list it",
                    f"virsh destroy {shlex.quote(domain.name)} ends the domain, then mdo recover",
                    outcome=Outcome.UNKNOWN,
                    subject=domain.label,
                )
            raise refusal
        asked = True
        await asyncio.sleep(max(min(again, end) - loop.time(), 0))
    raise errors.DeadlineError(
        f"{domain.label} did not let go of mdev {uuid} within {deadline:g} s; it still has it",
        "a guest answers only when it has booted; try again, or virsh destroy "
        + shlex.quote(domain.name),
        outcome=Outcome.UNKNOWN,
        subject=domain.label,
    )


async def _gone(machine: Machine, domain: Domain, uuid: UUID, end: float) -> bool:
    """Wait until a domain does not have an mdev any more; at least one look."""
    loop = asyncio.get_running_loop()
    while True:
        has = await libvirt.devices(machine, domain, LOOK_SECONDS)
        if uuid not in has and not await _has_open(machine, domain, uuid):
            return True
        if loop.time() + _POLL_SECONDS >= end:
            return False
        await asyncio.sleep(_POLL_SECONDS)


async def _keeps(machine: Machine, domain: Domain, uuid: UUID, deadline: float) -> bool:
    """Whether a domain has an mdev, and will keep it; waits for the answer of a guest that was
    asked to let go.

    :param deadline: Seconds.
    :raise DeadlineError: They were over before the guest had its time to answer.
    """
    mark = _mark(machine, domain.uuid, uuid)
    left = time_left(mark, hotplug.OBEY_SECONDS)
    patience = max(min(left or 0, deadline), 0)
    kept = not await _gone(machine, domain, uuid, _end_of(patience))
    if kept and left is not None and patience < left:
        raise still_asked(domain.label, f"let go of mdev {uuid}", left - patience)
    mark.unlink(missing_ok=True)
    return kept


async def wait_taken(machine: Machine, domain: Domain, device: str, deadline: float) -> None:
    """Return when the guest of a domain has taken a device.

    :param device: What QEMU calls it.
    :param deadline: Seconds.
    :raise DeadlineError: It has not; the device stays plugged.
    """
    end = _end_of(deadline)

    async def look() -> list[hotplug.PciBus]:
        command = '{"execute": "query-pci"}'
        text = await libvirt.monitor_command(machine, domain, command, _left(end))
        try:
            return msgspec.json.decode(text, type=_Answer).answer
        except msgspec.MsgspecError as error:
            raise errors.QemuError(f"{domain.label}: QEMU's answer makes no sense") from error

    try:
        await hotplug.until_taken(
            domain.label,
            device,
            end,
            look,
            lambda seconds: asyncio.sleep(max(seconds, _POLL_SECONDS)),
            "the guest may still boot or lack a driver; see virsh console "
            + shlex.quote(domain.name),
        )
    except errors.MdoError as error:
        error.outcome = Outcome.DONE
        raise


class _Answer(msgspec.Struct, frozen=True, rename={"answer": "return"}):
    """What QEMU answers to ``query-pci``."""

    answer: list[hotplug.PciBus]


# ---------------------------------------------------------------- helpers


@contextlib.contextmanager
def _explained(domain: Domain, uuid: UUID, device_api: str, verb: str) -> Iterator[None]:
    """Without the binding the remedy is virsh's command."""
    try:
        yield
    except errors.HostError as error:
        if not libvirt.is_installed():
            command = libvirt.virsh(verb, domain.name, uuid, device_api)
            error.hint = f"{error.hint}; or: {command}"
        raise


def _mark(machine: Machine, domain: UUID, uuid: UUID) -> Path:
    return machine.state_dir / _DOMAINS / f"{ASKED}-{domain}-{uuid}"


def _touch(machine: Machine, domain: Domain, uuid: UUID) -> None:
    mark = _mark(machine, domain.uuid, uuid)
    private_dir(mark.parent)
    with contextlib.suppress(OSError):  # on a full disk it is detached all the same
        mark.touch()


def _end_of(deadline: float) -> float:
    """When so many seconds have passed, in the event loop's time."""
    return asyncio.get_running_loop().time() + deadline


def _left(end: float) -> float:
    return max(end - asyncio.get_running_loop().time(), 0.1)
