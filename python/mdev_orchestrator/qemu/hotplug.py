# SPDX-License-Identifier: GPL-2.0-or-later
"""Attach and detach one device of a running guest.

The truth about what is plugged where is QEMU's object tree (QOM), not ``query-pci``, which is empty
behind every port until the guest's firmware has numbered the buses:

* ``/machine/peripheral`` and ``/machine/peripheral-anon`` list the devices, with and without id;
* ``/machine/peripheral/PORT/PORT`` is the bus of a root port, its ``child[N]`` are the occupants;
* a vfio device has a property ``sysfsdev``: the directory that it was opened by, and in QEMUs that
  know iommufd a property ``iommufd``: the path of the object that it uses, if it uses one.

**Plugged** means that QEMU has realised the device: it is open and on its bus, and the guest has
had a hotplug interrupt. It says nothing about the guest.

**Taken** (``wait_guest``) means that the guest has numbered the bus, given every memory BAR an
address (an I/O BAR, if the device has no other), and switched their decoding on. A driver's probe
does that first, with any vendor and any guest, and it can be seen from outside; firmware does it
too for a device that is there when it runs. A guest without a driver for the device assigns
addresses but leaves decoding off: that device is not taken. QEMU has no event for it, so
``query-pci`` is asked, often at first and then a few times a second.

**Detached** means ``DEVICE_DELETED``: QEMU has closed the device. ``device_del`` only asks the
guest. A guest without an operating system never answers, and a question from before it booted may
be lost, so the question is repeated; the guest may also refuse (``DEVICE_UNPLUG_GUEST_ERROR``). The
question cannot be taken back. While it is open there is a mark in the guest's directory, and a mark
that is left says that the guest may let go yet.

A guest's devices are opened in one way. QEMU would open one by a container and another by iommufd,
but then each of the two has all of the guest's memory mapped. The iommufd object is there while a
device uses it: it is added before the first and deleted after the last. One that no device uses,
left behind by a command that was killed, has no file open, and the next device uses it.

What is known of ``device_add`` and ``device_del`` after an error is the error's outcome. After an
unknown one, :func:`await_pending_unplug` finds out, by the monitor that the command was sent to
(see :mod:`mdev_orchestrator.qemu.monitor`).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING
from uuid import UUID

import msgspec
from msgspec import Struct, field

from mdev_orchestrator import errors
from mdev_orchestrator.errors import Outcome
from mdev_orchestrator.host.iommu import has_iommufd
from mdev_orchestrator.machine import Machine
from mdev_orchestrator.model import IommuKind, parse_uuid
from mdev_orchestrator.qemu import features
from mdev_orchestrator.qemu.command import IOMMUFD_ID, GuestMdev, device_id
from mdev_orchestrator.qemu.pending import ASKED, still_asked, time_left
from mdev_orchestrator.qemu.process import RunningGuest, find_running
from mdev_orchestrator.qemu.remedies import remedy
from mdev_orchestrator.spec.sizes import format_size
from mdev_orchestrator.system.waiting import run_to_completion

if TYPE_CHECKING:
    from mdev_orchestrator.qemu.monitor import Events, QmpMonitor

ATTACH_SECONDS = 30.0
DETACH_SECONDS = 60.0
QUERY_SECONDS = 5.0
ASK_AGAIN_SECONDS = 10.0
"""Longer than the five seconds in which a second press of a PCIe attention button takes the first
one back; QEMU refuses to press it earlier anyway."""
OBEY_SECONDS = 30.0
"""For a guest to let go after it was last asked to: nothing tells that it is about to."""
LAST_LOOK_SECONDS = 1.0
"""Beyond the deadline of a detach, to see whether the device has gone: an event may be lost."""
LOOK_SECONDS = 0.2
FIRST_LOOK_SECONDS = 0.02

PERIPHERAL = "/machine/peripheral"
ANONYMOUS = "/machine/peripheral-anon"
OBJECTS = "/objects"
PORT_TYPE = "pcie-root-port"
ROM_BAR = 6
FOUR_GIB = 1 << 32


class _Property(msgspec.Struct, frozen=True):
    """ObjectPropertyInfo of QMP."""

    name: str
    type: str


class _Region(msgspec.Struct, frozen=True):
    """PciMemoryRegion of QMP. ``address`` is -1 as long as it decodes nothing."""

    bar: int
    type: str
    size: int
    address: int
    prefetch: bool = False
    mem_type_64: bool = False


class _Range(msgspec.Struct, frozen=True):
    """PciMemoryRange of QMP: a window of a bridge; ``limit`` is below ``base`` if it is closed."""

    base: int = 0
    limit: int = -1

    def __str__(self) -> str:
        return f"{self.base:#x}-{self.limit:#x}" if self.limit > self.base else "closed"


class _BridgeBus(msgspec.Struct, frozen=True):
    """PciBusInfo of QMP."""

    number: int
    memory_range: _Range = _Range()
    prefetchable_range: _Range = _Range()


class _Bridge(msgspec.Struct, frozen=True):
    bus: _BridgeBus
    devices: list[_PciDevice] = []


class _PciDevice(msgspec.Struct, frozen=True):
    """PciDeviceInfo of QMP, what is needed of it."""

    qdev_id: str
    regions: list[_Region]
    pci_bridge: _Bridge | None = None


class PciBus(msgspec.Struct, frozen=True):
    """PciInfo of QMP: what ``query-pci`` gives for each root bus."""

    devices: list[_PciDevice]


class Device(Struct, frozen=True):
    """What to plug: a QEMU device model, its properties, and whether it needs a root port."""

    id: str
    driver: str
    properties: Mapping[str, object] = field(default_factory=dict)
    needs_port: bool = True


class Port(Struct, frozen=True):
    """A PCIe root port.

    :ivar occupant: Kind of the device in it, ``None`` if it is free.
    """

    id: str
    occupant: str | None


class Plugged(Struct, frozen=True):
    """An mdev that a guest has, as QEMU tells.

    :ivar device_id: Its id in QEMU; ``None`` for a device that was given none.
    :ivar port: The bus it sits on.
    :ivar iommufd: Id of the object that it uses; ``None`` if it was opened by a container.
    """

    uuid: UUID
    driver: str
    path: str
    device_id: str | None
    port: str | None
    iommufd: str | None = None

    @property
    def iommu(self) -> IommuKind:
        """How it was opened."""
        return "container" if self.iommufd is None else "iommufd"


# ---------------------------------------------------------------- what is there


async def _children(qmp: QmpMonitor, path: str) -> dict[str, str]:
    """Names and types of the devices below ``path``."""
    found = await qmp.execute("qom-list", list[_Property], {"path": path})
    return {
        entry.name: entry.type[len("child<") : -1]
        for entry in found
        if entry.type.startswith("child<")
    }


async def _property(qmp: QmpMonitor, path: str, name: str) -> str | None:
    """A string property; ``None`` if object or property is not there (any more)."""
    try:
        return await qmp.execute("qom-get", str, {"path": path, "property": name})
    except errors.CommandError:
        return None


async def ports(qmp: QmpMonitor) -> tuple[Port, ...]:
    """Return the root ports that have an id, in their order, and what is in them."""
    names = _port_names(await _children(qmp, PERIPHERAL))
    return tuple([Port(name, await _occupant(qmp, name)) for name in names])


def _port_names(children: Mapping[str, str]) -> list[str]:
    return [name for name, kind in sorted(children.items(), key=_natural) if kind == PORT_TYPE]


async def _occupant(qmp: QmpMonitor, port: str) -> str | None:
    bus = await qmp.execute("qom-list", list[_Property], {"path": f"{PERIPHERAL}/{port}/{port}"})
    inside = next((entry.type for entry in bus if entry.name.startswith("child[")), None)
    return inside and inside.removeprefix("link<").removesuffix(">")


def _natural(item: tuple[str, str]) -> tuple[int, str]:
    return len(item[0]), item[0]


async def mdevs(qmp: QmpMonitor) -> tuple[Plugged, ...]:
    """Return the mdevs that a guest has now, in no particular order."""
    found = []
    for directory in (PERIPHERAL, ANONYMOUS):
        for name, kind in (await _children(qmp, directory)).items():
            if not kind.startswith("vfio-"):
                continue
            path = await _property(qmp, f"{directory}/{name}", "sysfsdev")
            try:
                uuid = parse_uuid(PurePosixPath(path or "").name)
            except errors.RequestError:
                continue  # a whole device of the host, no mdev
            bus = await _property(qmp, f"{directory}/{name}", "parent_bus")
            used = await _property(qmp, f"{directory}/{name}", features.IOMMUFD)
            found.append(
                Plugged(
                    uuid=uuid,
                    driver=kind,
                    path=path or "",
                    device_id=name if directory == PERIPHERAL else None,
                    port=PurePosixPath(bus).name if bus else None,
                    iommufd=PurePosixPath(used).name if used else None,
                )
            )
    return tuple(found)


async def mdevs_of(guest: RunningGuest, *, deadline: float = QUERY_SECONDS) -> tuple[Plugged, ...]:
    """Like :func:`mdevs`, by a connection of its own to the monitor for questions.

    It waits for no attach or detach, so it is of no use after one with an unknown outcome.

    :param deadline: Seconds for the whole.
    :raise QemuError: QEMU cannot be reached or answers nonsense.
    :raise DeadlineError: It does not answer in time.
    """
    from mdev_orchestrator.qemu.monitor import connect

    end = _end_of(deadline)
    async with connect(guest.query_socket, guest.label, deadline=None, end=end) as qmp:
        return await mdevs(qmp)


def _end_of(deadline: float) -> float:
    """When so many seconds have passed, in the event loop's time."""
    return asyncio.get_running_loop().time() + deadline


@contextmanager
def _known(outcome: Outcome) -> Iterator[None]:
    """Say of the act before the block what is known, in errors that leave the block."""
    try:
        yield
    except errors.MdoError as error:
        error.outcome = outcome
        raise


async def _id_of(qmp: QmpMonitor, uuid: UUID) -> str:
    """The id that an mdev has in a QEMU that holds it.

    :raise UnknownError: The guest does not have it.
    :raise RequestError: It was given no id, and so cannot be unplugged.
    """
    usual = device_id(uuid)
    path = await _property(qmp, f"{PERIPHERAL}/{usual}", "sysfsdev")
    if PurePosixPath(path or "").name == str(uuid):
        return usual
    held = {plugged.uuid: plugged for plugged in await mdevs(qmp)}
    if uuid not in held:
        has = ", ".join(sorted(map(str, held))) or "none"
        raise errors.UnknownError(
            f"{qmp.label} has no mdev {uuid}", f"it has: {has}", subject=f"mdev {uuid}"
        )
    found = held[uuid].device_id
    if found is None:
        raise errors.RequestError(
            f"{qmp.label}: mdev {uuid} has no id in QEMU, so it cannot be unplugged",
            "stop the guest",
        )
    return found


# ---------------------------------------------------------------- attach


def device_for(mdev: GuestMdev, iommufd: str | None = None) -> Device:
    """The device that opens an mdev.

    :param iommufd: Id of the object that it uses.
    """
    properties = {"sysfsdev": str(mdev.path)}
    if iommufd is not None:
        properties[features.IOMMUFD] = iommufd
    return Device(
        id=mdev.device_id,
        driver=mdev.device_api,
        properties=properties,
        needs_port=mdev.device_api == "vfio-pci",
    )


@asynccontextmanager
async def iommufd_object(machine: Machine, qmp: QmpMonitor) -> AsyncIterator[str]:
    """The id of the guest's iommufd object, which is added if it has none.

    One that was added is deleted if the block fails, unless a device may use it.

    :raise CommandError: QEMU has no such objects.
    """
    there = await _children(qmp, OBJECTS)
    for name, kind in there.items():
        if kind == features.IOMMUFD:
            yield name
            return
    await qmp.execute("object-add", object, {"qom-type": features.IOMMUFD, "id": IOMMUFD_ID})
    try:
        yield IOMMUFD_ID
    except errors.MdoError as error:
        if error.outcome is Outcome.NO_EFFECT:
            await drop_iommufd(machine, qmp)
        raise


async def drop_iommufd(machine: Machine, qmp: QmpMonitor) -> None:
    """Delete the iommufd object of a guest that has no device for it, if that can be done."""
    if not has_iommufd(machine):
        return  # then it has none
    with contextlib.suppress(errors.MdoError):  # QEMU refuses while a device uses it
        if IOMMUFD_ID in await _children(qmp, OBJECTS):
            await qmp.execute("object-del", object, {"id": IOMMUFD_ID})


async def plug_by(
    qmp: QmpMonitor, device: Device, end: float, *, wait_guest: bool = False
) -> str | None:
    """Plug a device in by a connection to a guest's ``qmp.sock``.

    :param end: When this has ended, in the event loop's time.
    :param wait_guest: Return only when the guest has *taken* the device.
    :return: The id of the port that it sits in, if it is a PCI device.
    :raise RequestError: No port is free, or the guest has such a device already.
    :raise CommandError: QEMU refused it; with its own words and what to do.
    :raise QemuError: The connection ended, or QEMU accepted the device but does not list it: the
        outcome is unknown.
    :raise DeadlineError: QEMU did not answer in time: the outcome is unknown. Or the guest has not
        taken the device in time: it is plugged (the outcome is "done"), and the message says so.
    """
    with qmp.until(end):
        with errors.before_acting():
            there = await _children(qmp, PERIPHERAL)
            if device.id in there:
                raise errors.RequestError(f"{qmp.label} has {device.id} already", subject=qmp.label)
            arguments: dict[str, object] = {
                "driver": device.driver,
                "id": device.id,
                **device.properties,
            }
            port = None
            if device.needs_port:
                port = await _free_port(qmp, _port_names(there))
                # only slot 0 of a PCIe link leads anywhere
                arguments |= {"bus": port, "addr": "0"}
        await _add(qmp, device, arguments)
        with _known(Outcome.UNKNOWN):
            if device.id not in await _children(qmp, PERIPHERAL):
                raise errors.QemuError(f"{qmp.label}: QEMU took {device.id}, but does not list it")
    if wait_guest:
        with _known(Outcome.DONE):
            await _until_taken(qmp, device.id, end)
    return port


async def _free_port(qmp: QmpMonitor, names: Sequence[str]) -> str:
    for name in names:
        if await _occupant(qmp, name) is None:
            return name
    state = f"all {len(names)} root ports are taken" if names else "it has no root port"
    raise errors.RequestError(
        f"{qmp.label} has no room for another device: {state}",
        "detach one, or start it with more --hotplug-ports",
    )


async def _add(qmp: QmpMonitor, device: Device, arguments: Mapping[str, object]) -> None:
    """Run ``device_add``, to its end even when the caller is cancelled.

    A cancellation carries a note then, unless QEMU has refused the device.
    """
    there = "may have"

    async def adding() -> None:
        nonlocal there
        try:
            await qmp.execute("device_add", object, arguments, deadline=None)
        except errors.CommandError:
            there = ""
            raise
        there = "has"

    try:
        await run_to_completion(adding())
    except asyncio.CancelledError as error:
        if there:
            error.add_note(f"{qmp.label} {there} {device.id} by now; mdo detach takes it back")
        raise
    except errors.CommandError as error:
        if error.description.startswith("Duplicate device ID"):
            raise errors.RequestError(
                f"{qmp.label} has {device.id} already",
                outcome=Outcome.NO_EFFECT,
                subject=qmp.label,
            ) from error
        error.subject = qmp.label
        error.hint = remedy(error.description)
        raise


async def wait_taken(guest: RunningGuest, uuid: UUID, deadline: float = ATTACH_SECONDS) -> None:
    """Return when the guest has taken an mdev that is plugged.

    :param deadline: Seconds for the whole.
    :raise DeadlineError: It has not; the device stays plugged, and the outcome of the attach is
        "done".
    """
    from mdev_orchestrator.qemu.monitor import connect

    end = _end_of(deadline)
    with _known(Outcome.DONE):
        async with connect(guest.qmp_socket, guest.label, deadline=None, end=end) as qmp:
            await _until_taken(qmp, device_id(uuid), end)


async def _until_taken(qmp: QmpMonitor, device: str, end: float) -> None:
    """Return when the guest has taken the device."""
    with qmp.events(("DEVICE_DELETED",), lambda data: data.get("device") == device) as events:

        async def look() -> list[PciBus]:
            with qmp.until(end):
                return await qmp.execute("query-pci", list[PciBus])

        async def wait(seconds: float) -> None:
            if await events.next(seconds):
                raise errors.QemuError(
                    f"{qmp.label}: {device} was unplugged while waiting for the guest"
                )

        see = "the guest may still boot or lack a driver; see mdo guest console, or detach"
        await until_taken(qmp.label, device, end, look, wait, see)


async def until_taken(
    label: str,
    device: str,
    end: float,
    look: Callable[[], Awaitable[list[PciBus]]],
    wait: Callable[[float], Awaitable[None]],
    hint: str,
) -> None:
    """Return when a guest has taken a device, however its QEMU is asked.

    :param label: How messages name the guest.
    :param device: The id of the device in QEMU.
    :param end: When this has ended, in the event loop's time.
    :param look: Asks ``query-pci``, until then.
    :param wait: Waits for so many seconds.
    :param hint: What to do about a guest that does not take it.
    :raise DeadlineError: It has not taken it, and may or may not do so yet.
    """
    loop = asyncio.get_running_loop()
    pause = FIRST_LOOK_SECONDS
    buses: list[PciBus] = []
    found = None
    while (left := end - loop.time()) > 0:
        try:
            buses = await look()
        except errors.DeadlineError:
            if buses:
                break  # the last question came too late to be answered
            raise
        found = next((one for one in _functions(buses) if one[0].qdev_id == device), None)
        if found and taken(found[0].regions):
            return
        await wait(min(pause, left))
        pause = min(1.5 * pause, LOOK_SECONDS)
    if found and found[1] and (homeless := without_place(found[0].regions, found[1].bus)):
        bars = " and ".join(f"BAR {bar.bar} ({format_size(bar.size)})" for bar in homeless)
        windows = f"{found[1].bus.memory_range} and {found[1].bus.prefetchable_range}"
        raise errors.DeadlineError(
            f"{label} could not give {bars} of {device} an address: the memory windows of its "
            f"port are {windows}; it stays plugged",
            "start the guest with a larger --hotplug-window; its own log may say more",
            subject=label,
        )
    raise errors.DeadlineError(
        f"{label} has not taken {device} in time; it stays plugged",
        hint,
        subject=label,
    )


def _functions(buses: Sequence[PciBus]) -> Iterator[tuple[_PciDevice, _Bridge | None]]:
    """All functions of a ``query-pci`` answer, and the bridges that they are behind."""
    pending: list[tuple[_PciDevice, _Bridge | None]]
    pending = [(device, None) for bus in buses for device in bus.devices]
    while pending:
        device, bridge = pending.pop()
        yield device, bridge
        if (own := device.pci_bridge) is not None:
            pending += [(behind, own) for behind in own.devices]


def taken(regions: Sequence[_Region]) -> bool:
    """Whether every BAR that matters has an address and decodes it."""
    bars = [region for region in regions if region.bar != ROM_BAR]
    memory = [region for region in bars if region.type == "memory"]
    return all(region.address != -1 for region in memory or bars)


def without_place(regions: Sequence[_Region], bus: _BridgeBus) -> list[_Region]:
    """Return the memory BARs of a device that the guest has given no address and cannot.

    If others have one, decoding is on, and the guest has given up on these. If none has, these are
    the BARs that do not fit into the windows of the port.

    :param bus: The bus in front of the port, with the port's windows.
    """
    memory = [one for one in regions if one.type == "memory" and one.bar != ROM_BAR]
    missing = [one for one in memory if one.address == -1]
    if len(missing) < len(memory):
        return missing
    ends = {window: window.base for window in (bus.prefetchable_range, bus.memory_range)}
    left = []
    for bar in sorted(missing, key=lambda one: -one.size):
        for window, end in ends.items():
            start = -(-end // bar.size) * bar.size
            if _may_be_in(bar, window, bus) and start + bar.size - 1 <= window.limit:
                ends[window] = start + bar.size
                break
        else:
            left.append(bar)
    return left


def _may_be_in(bar: _Region, window: _Range, bus: _BridgeBus) -> bool:
    if window is bus.prefetchable_range:
        return bar.prefetch and (bar.mem_type_64 or window.limit < FOUR_GIB)
    return True


# ---------------------------------------------------------------- detach


async def detach(
    machine: Machine, guest_name: str, uuid: UUID, deadline: float = DETACH_SECONDS
) -> None:
    """Take an mdev out of a running guest and return when QEMU has closed it.

    :param deadline: Seconds for the whole.
    :raise UnknownError: There is no such guest, or it has no such mdev.
    :raise RequestError: The mdev has no id in QEMU.
    :raise BusyError: The guest refused.
    :raise DeadlineError: The guest did not let go in time. Its outcome is unknown if the guest was
        asked: it may let go yet, and the mark in its directory says so.
    :raise QemuError: QEMU cannot be reached, refused, or ended meanwhile.
    """
    from mdev_orchestrator.qemu.monitor import connect

    end = _end_of(deadline)
    with errors.before_acting():
        guest = find_running(machine, guest_name)
    async with connect(guest.qmp_socket, guest.label, deadline=None, end=end) as qmp:
        with errors.before_acting():
            try:
                device = await _id_of(qmp, uuid)
            except errors.UnknownError:
                _mark(guest, uuid).unlink(missing_ok=True)  # if it was asked, it has let go
                await drop_iommufd(machine, qmp)
                raise
        mark = _mark(guest, uuid)
        with asking(mark):
            await _unplug(qmp, device, end, deadline, mark)
        await drop_iommufd(machine, qmp)


def _mark(guest: RunningGuest, uuid: UUID) -> Path:
    """Touched when a guest is asked to let go of an mdev."""
    return guest.directory / f"{ASKED}-{uuid}"


def _leave(mark: Path) -> None:
    with contextlib.suppress(OSError):  # on a full disk it is unplugged all the same
        mark.touch()


@contextmanager
def asking(mark: Path) -> Iterator[None]:
    """Take a mark away when no question is open any more: the guest has answered, or refused.

    It stays after an interruption and after an unknown outcome.
    """
    try:
        yield
    except errors.MdoError as error:
        if error.outcome is Outcome.NO_EFFECT:
            mark.unlink(missing_ok=True)
        raise
    mark.unlink(missing_ok=True)


async def await_pending_unplug(
    guest: RunningGuest, uuid: UUID, *, deadline: float = OBEY_SECONDS + QUERY_SECONDS
) -> bool:
    """Whether a guest has an mdev, and will keep it; for use after an unknown outcome as well.

    It asks by ``qmp.sock``, so a ``device_add`` or ``device_del`` that was sent before has ended
    when QEMU answers. If a detach left its mark, the guest's answer is waited for.

    :param deadline: Seconds for the whole; QEMU has to greet within
        :data:`~mdev_orchestrator.qemu.monitor.GREETING_SECONDS` of them.
    :raise QemuError: QEMU cannot be reached, or ended meanwhile.
    :raise DeadlineError: QEMU did not answer in time; or the time was over before
        :data:`OBEY_SECONDS` had passed since the guest was asked, and it may let go yet.
    """
    from mdev_orchestrator.qemu.monitor import connect

    mark, end = _mark(guest, uuid), _end_of(deadline)
    async with connect(guest.qmp_socket, guest.label, end=end) as qmp:
        held = {plugged.uuid: plugged for plugged in await mdevs(qmp)}
        kept = uuid in held
        left = time_left(mark, OBEY_SECONDS)
        if left is None:
            return kept
        device = held[uuid].device_id if kept else None
        if device is not None and left > 0:
            kept = await _keeps(qmp, device, left, end)
    mark.unlink(missing_ok=True)
    return kept


async def _keeps(qmp: QmpMonitor, device_id: str, seconds: float, end: float) -> bool:
    """Whether a guest that was asked to let go keeps a device.

    :param seconds: For its answer; it keeps the device if it has not answered then.
    :param end: When this has ended, in the event loop's time.
    :raise DeadlineError: That was too early to know.
    """
    patience = min(seconds, end - asyncio.get_running_loop().time())
    with _answers(qmp, device_id) as events:
        if device_id not in await _children(qmp, PERIPHERAL):
            return False
        try:
            if await _gone(qmp, device_id, events, patience):
                return False
        except errors.BusyError:
            return True
    if patience < seconds:
        raise still_asked(qmp.label, f"let go of {device_id}", seconds - patience)
    return device_id in await _children(qmp, PERIPHERAL)


def _answers(qmp: QmpMonitor, device_id: str) -> contextlib.AbstractContextManager[Events]:
    """What a guest may answer when it is asked to let go."""
    names = ("DEVICE_DELETED", "DEVICE_UNPLUG_GUEST_ERROR")
    return qmp.events(names, lambda data: data.get("device") == device_id)


async def _unplug(
    qmp: QmpMonitor, device_id: str, end: float, deadline: float, mark: Path | None = None
) -> None:
    """Ask the guest to let go of a device, again and again, until it has answered."""
    loop = asyncio.get_running_loop()
    with _answers(qmp, device_id) as events, qmp.until(end):
        pending = await _ask_to_let_go(qmp, device_id, mark)
        while pending and (left := end - loop.time()) > 0:
            if await _gone(qmp, device_id, events, min(left, ASK_AGAIN_SECONDS)):
                return
            if left <= ASK_AGAIN_SECONDS:
                break
            with _known(Outcome.UNKNOWN):  # whatever becomes of this question, the first is open
                pending = await _ask_to_let_go(qmp, device_id, mark)
    has = "it still has the device"
    try:
        with qmp.until(loop.time() + LAST_LOOK_SECONDS):
            if device_id not in await _children(qmp, PERIPHERAL):
                return
    except errors.MdoError:
        has = "QEMU does not say whether it still has the device"
    raise errors.DeadlineError(
        f"{qmp.label} did not let go of {device_id} within {deadline:g} s; {has}",
        "a guest answers only when it has booted; try again, or stop the guest",
        outcome=Outcome.UNKNOWN,
        subject=qmp.label,
    )


async def _ask_to_let_go(qmp: QmpMonitor, device_id: str, mark: Path | None) -> bool:
    """Run ``device_del``; whether there is anything to wait for."""
    if mark is not None:
        _leave(mark)
    try:
        await qmp.execute("device_del", object, {"id": device_id}, deadline=None)
    except errors.CommandError as error:
        if error.qmp_class == "DeviceNotFound":
            return False  # it went between two questions
        if "in the process of unplug" not in error.description:
            raise
    return True


async def _gone(qmp: QmpMonitor, device_id: str, events: Events, seconds: float) -> bool:
    """Wait for the guest's answer to ``device_del``; whether the device has gone.

    :raise BusyError: The guest refuses.
    """
    with _known(Outcome.UNKNOWN):
        event = await events.next(seconds)
    if event is None:
        return False
    if event.event == "DEVICE_UNPLUG_GUEST_ERROR":
        raise errors.BusyError(
            f"{qmp.label} refuses to let go of {device_id}",
            "stop using it in the guest and try again",
            outcome=Outcome.NO_EFFECT,
            subject=qmp.label,
        )
    return True
