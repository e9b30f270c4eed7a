# SPDX-License-Identifier: GPL-2.0-or-later
"""``mdo guest``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from uuid import UUID

import typer

from mdev_orchestrator.cli import output
from mdev_orchestrator.cli.context import machine, run
from mdev_orchestrator.cli.params import Iommu, Json, complete_device, complete_guest, seconds
from mdev_orchestrator.cli.tree import noun

if TYPE_CHECKING:
    from mdev_orchestrator.engine.foreign import ForeignGuest
    from mdev_orchestrator.engine.restore import PoweredDown
    from mdev_orchestrator.machine import Machine
    from mdev_orchestrator.model import Host
    from mdev_orchestrator.qemu.process import RunningGuest
    from mdev_orchestrator.qemu.status import Report
    from mdev_orchestrator.qemu.stop import Ended
    from mdev_orchestrator.spec import GuestConfig

NONE = "-"
GUEST_NAME = typer.Argument(
    metavar="NAME", help="Name of the guest.", autocompletion=complete_guest
)

app = noun("List, start and stop guests, and open their consoles.")


@app.command("list")
def list_(*, json: Json = False) -> None:
    """Show all guests, with what they hold; also those that mdo did not start."""
    reports, foreign, host, names = run(_look)
    if json:
        shapes = [guest_shape(report, host, names) for report in reports]
        shapes += [foreign_shape(guest, host, names) for guest in foreign]
        output.emit_json({"guests": shapes})
        return
    rows = [_row(report, host, names) for report in reports]
    rows += [_foreign_row(guest, host, names) for guest in foreign]
    output.emit_table("Guests", HEADERS, rows, whole={"name", "mdevs"})
    for report in reports:
        if report.damage:
            output.remark(f"{report.guest.label}: {report.damage}")


async def _look(
    machine: Machine,
) -> tuple[list[Report], tuple[ForeignGuest, ...], Host, dict[UUID, str]]:
    """All guests, the host's devices, and the names of the start groups that guests hold."""
    from mdev_orchestrator.engine.foreign import foreign_guests
    from mdev_orchestrator.engine.guests import guest_reports
    from mdev_orchestrator.host.sysfs import scan

    await reclaim_groups(machine)
    reports = await guest_reports(machine)
    foreign = await foreign_guests(machine)
    host = await scan(machine)
    held = [*_plugged(reports), *(uuid for guest in foreign for uuid in guest.mdevs)]
    return reports, foreign, host, await _group_names(machine, held, host)


def _plugged(reports: Iterable[Report]) -> list[UUID]:
    return [plugged.uuid for report in reports for plugged in report.mdevs or ()]


async def reclaim_groups(machine: Machine) -> None:
    """Take offline the start groups that guests left online when they ended, and say so."""
    from mdev_orchestrator.engine import start_groups

    for group in await start_groups.reclaim_groups(machine):
        output.remark(str(group))


@app.command("start")
def start(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the guest.")],
    *,
    kernel: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Linux image to boot.")
    ] = None,
    initrd: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Its initial file system.")
    ] = None,
    append: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="Kernel parameters; console=ttyS0 if not given."),
    ] = None,
    disk: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Image of its first disk.")
    ] = None,
    disk_format: Annotated[
        str, typer.Option(metavar="FORMAT", help="Format of the image: raw, qcow2…")
    ] = "raw",
    memory: Annotated[str, typer.Option(metavar="SIZE", help="Such as 512M or 2G.")] = "512M",
    cpus: Annotated[int, typer.Option(metavar="N", help="Number of CPUs.")] = 1,
    mdev: Annotated[
        list[str] | None,
        typer.Option(
            metavar="UUID",
            help="A device it gets; may be repeated.",
            autocompletion=complete_device,
        ),
    ] = None,
    iommu: Iommu = "auto",
    hotplug_ports: Annotated[
        int, typer.Option(metavar="N", help="Root ports kept free for attach.")
    ] = 4,
    hotplug_window: Annotated[
        str, typer.Option(metavar="SIZE", help="Memory window of each port, a power of two.")
    ] = "256M",
    uuid: Annotated[
        str | None, typer.Option(metavar="UUID", help="The guest's UUID; random if not given.")
    ] = None,
    qemu: Annotated[
        str, typer.Option(envvar="MDO_QEMU", metavar="PROGRAM", help="QEMU's program.")
    ] = "qemu-system-x86_64",
    firmware: Annotated[
        Path | None,
        typer.Option(
            envvar="MDO_QEMU_FIRMWARE", metavar="DIRECTORY", help="Its firmware directory (-L)."
        ),
    ] = None,
    uefi: Annotated[
        bool, typer.Option("--uefi", help="Boot by UEFI, not by QEMU's own firmware.")
    ] = False,
    uefi_variables: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="File that keeps the UEFI variables; made if needed."),
    ] = None,
    machine_type: Annotated[
        str, typer.Option("--machine", metavar="TYPE", help="QEMU's machine type.")
    ] = "q35",
    accel: Annotated[
        str,
        typer.Option(envvar="MDO_ACCEL", metavar="auto|kvm|tcg", help="auto: KVM where QEMU can."),
    ] = "auto",
    arg: Annotated[
        list[str] | None,
        typer.Option(metavar="ARGUMENT", help="One more argument for QEMU; may be repeated."),
    ] = None,
    deadline: Annotated[float, seconds("Seconds until QEMU answers.", least=0.1)] = 60.0,
    json: Json = False,
) -> None:
    """Start a guest; it goes on running when this command ends."""
    from mdev_orchestrator.model import parse_uuid
    from mdev_orchestrator.qemu.command import parse_accel, parse_iommu
    from mdev_orchestrator.qemu.log import qemu_words
    from mdev_orchestrator.spec import GuestConfig, parse_size
    from mdev_orchestrator.spec.sizes import Size

    config = GuestConfig(
        name=name,
        uuid=parse_uuid(uuid) if uuid else None,
        memory=Size(parse_size(memory)),
        cpus=cpus,
        kernel=_absolute(kernel),
        initrd=_absolute(initrd),
        append=append if append is not None else "console=ttyS0" if kernel else "",
        disk=_absolute(disk),
        disk_format=disk_format,
        iommu=parse_iommu(iommu),
        hotplug_ports=hotplug_ports,
        hotplug_window=Size(parse_size(hotplug_window)),
        accel=parse_accel(accel),
        machine=machine_type,
        qemu=qemu,
        firmware=_absolute(firmware),
        uefi=uefi,
        uefi_variables=_absolute(uefi_variables),
        extra=tuple(arg or ()),
    )
    mdevs = [parse_uuid(text) for text in mdev or ()]
    (report,), host, names = run(lambda machine: _start(machine, config, mdevs, deadline))
    if words := qemu_words(report.guest.qemu_log):
        output.remark(f"{report.guest.label}: QEMU says: {words}")
    record = report.guest.record
    made = f"{name} runs as process {record.pid if record else NONE}"
    if json:
        output.emit_json(guest_shape(report, host, names), made=f"guest {made}")
    else:
        output.emit(made, made=f"guest {made}")


def _absolute(path: Path | None) -> Path | None:
    return None if path is None else path.absolute()


async def _start(
    machine: Machine, config: GuestConfig, mdevs: list[UUID], deadline: float
) -> tuple[list[Report], Host, dict[UUID, str]]:
    from mdev_orchestrator.engine.guests import start_guest
    from mdev_orchestrator.host.sysfs import scan
    from mdev_orchestrator.qemu.status import look

    await reclaim_groups(machine)
    guest = await start_guest(machine, config, mdevs, deadline=deadline)
    reports = [await look(guest)]
    host = await scan(machine)
    return reports, host, await _group_names(machine, _plugged(reports), host)


@app.command("stop")
def stop(
    name: Annotated[str | None, GUEST_NAME] = None,
    *,
    all_: Annotated[
        bool, typer.Option("--all", help="Every guest that runs, all at the same time.")
    ] = False,
    deadline: Annotated[float, seconds("Seconds for the guest to power down.")] = 60.0,
    force: Annotated[
        bool, typer.Option("--force", help="Then end it without asking; --deadline 0: at once.")
    ] = False,
    json: Json = False,
) -> int:
    """Power a guest down and remove its files. One that has ended is only tidied up."""
    from mdev_orchestrator.errors import RequestError

    if (name is None) != all_:
        raise RequestError("name one guest, or give --all", "mdo guest list shows the guests")
    if name is None:
        return _stop_all(deadline, force=force, json=json)
    ended = run(lambda machine: _stop(machine, name, deadline, force=force))
    if json:
        output.emit_json(
            {"name": ended.name, "how": ended.how}, made=f"guest {name} {HOW[ended.how]}"
        )
    else:
        output.emit(f"{name} {HOW[ended.how]}", made=f"guest {name} {HOW[ended.how]}")
    return 0


def _stop_all(deadline: float, *, force: bool, json: bool) -> int:
    from mdev_orchestrator.engine.restore import power_down

    ended = run(lambda machine: power_down(machine, deadline=deadline, force=force))
    if json:
        output.emit_json({"guests": [ended_shape(guest) for guest in ended]})
    else:
        for guest in ended:
            if guest.how:
                output.emit(f"{guest.name} {HOW[guest.how]}")
        if not ended:
            output.emit("no guest runs")
    return output.report_failed(guest.error for guest in ended)


def ended_shape(guest: PoweredDown) -> dict[str, Any]:
    """The documented JSON shape of one of several guests that were to be stopped."""
    return {
        "name": guest.name,
        "how": guest.how or None,
        "error": None if guest.error is None else guest.error.message,
    }


async def _stop(machine: Machine, name: str, deadline: float, *, force: bool) -> Ended:
    from mdev_orchestrator.engine.guests import stop_guest

    ended = await stop_guest(machine, name, deadline=deadline, force=force)
    await reclaim_groups(machine)
    return ended


HOW = {
    "powerdown": "powered down",
    "quit": "was ended by QEMU's quit",
    "terminated": "was ended by SIGTERM",
    "killed": "was ended by SIGKILL",
    "gone": "had ended already; its files are removed",
}


@app.command("console")
def console(
    name: Annotated[str, GUEST_NAME],
    *,
    log: Annotated[
        bool, typer.Option("--log", help="Print what the guest has printed so far, and end.")
    ] = False,
) -> None:
    """Connect the terminal to the guest's first serial port; ctrl-] ends it."""
    from mdev_orchestrator.cli.console import interact, print_log
    from mdev_orchestrator.qemu.process import find, find_running
    from mdev_orchestrator.qemu.status import check_console_free

    if log:
        print_log(find(machine(), name))
        return
    guest = find_running(machine(), name)
    run(lambda _: check_console_free(guest))
    interact(guest)


HEADERS = ("name", "manager", "state", "qemu", "pid", "memory", "cpus", "mdevs")
MDO = "mdo"


async def _group_names(machine: Machine, held: Iterable[UUID], host: Host) -> dict[UUID, str]:
    """The names of the start groups of some mdevs; reads the journal only if they have any."""
    mdevs = [host.find(uuid) for uuid in held]
    if not any(mdev and mdev.group_uuid for mdev in mdevs):
        return {}
    import asyncio

    from mdev_orchestrator.cli.host import group_names
    from mdev_orchestrator.engine.journal_db import read_managed
    from mdev_orchestrator.errors import MdoError

    try:
        return group_names(await asyncio.to_thread(read_managed, machine))
    except MdoError:
        return {}  # they are shown by their UUIDs; mdo host says why


def _row(report: Report, host: Host, names: Mapping[UUID, str]) -> tuple[str, ...]:
    record = report.guest.record
    held = NONE if report.mdevs is None else str(len(report.mdevs))
    if report.mdevs:
        held = ", ".join(sorted(_held(plugged.uuid, host, names) for plugged in report.mdevs))
    return (
        report.guest.name,
        MDO,
        str(report.state),
        report.status or NONE,
        str(record.pid) if record and report.guest.alive else NONE,
        f"{record.memory >> 20}M" if record else NONE,
        str(record.cpus) if record else NONE,
        held,
    )


def _foreign_row(guest: ForeignGuest, host: Host, names: Mapping[UUID, str]) -> tuple[str, ...]:
    held = ", ".join(_held(uuid, host, names) for uuid in guest.mdevs)
    manager = guest.manager or "none known"
    pid = str(guest.pid)
    return (guest.name or NONE, manager, _foreign_state(guest), NONE, pid, NONE, NONE, held or "0")


def _foreign_state(guest: ForeignGuest) -> str:
    from mdev_orchestrator.qemu.status import GuestState

    return str(GuestState.STOPPED if guest.stopped else GuestState.RUNNING)


def _held(uuid: UUID, host: Host, names: Mapping[UUID, str]) -> str:
    """An mdev with its state and group, as far as its driver has them."""
    mdev = host.find(uuid)
    words = [str(uuid)]
    if mdev is not None and mdev.online is not None:
        words.append("online" if mdev.online else "offline")
    if mdev is not None and mdev.group_uuid is not None:
        words.append(f"in group {names.get(mdev.group_uuid, mdev.group_uuid)}")
    return " ".join(words)


def guest_shape(report: Report, host: Host, names: Mapping[UUID, str]) -> dict[str, Any]:
    """The documented JSON shape of a guest."""
    from mdev_orchestrator.qemu.process import created

    guest, record = report.guest, report.guest.record
    return {
        "name": guest.name,
        "manager": MDO,
        "state": str(report.state),
        "status": report.status,
        "uuid": record and str(record.uuid),
        "pid": _pid(guest),
        "memory": record and record.memory,
        "cpus": record and record.cpus,
        "created": record and created(record).isoformat(timespec="seconds"),
        "mdevs": None
        if report.mdevs is None
        else [
            _mdev_shape(plugged.uuid, host, names)
            | {
                "device": plugged.device_id,
                "driver": plugged.driver,
                "port": plugged.port,
                "iommu": plugged.iommu,
            }
            for plugged in report.mdevs
        ],
        "directory": str(guest.directory),
        "damage": report.damage,
    }


def foreign_shape(guest: ForeignGuest, host: Host, names: Mapping[UUID, str]) -> dict[str, Any]:
    """The same shape for a guest that mdo did not start; what only its QEMU knows is ``None``."""
    return {
        "name": guest.name,
        "manager": guest.manager,
        "state": _foreign_state(guest),
        "status": None,
        "uuid": guest.uuid and str(guest.uuid),
        "pid": guest.pid,
        "memory": None,
        "cpus": None,
        "created": None,
        "mdevs": [_mdev_shape(uuid, host, names) for uuid in guest.mdevs],
        "directory": None,
        "damage": "",
    }


def _mdev_shape(uuid: UUID, host: Host, names: Mapping[UUID, str]) -> dict[str, Any]:
    mdev = host.find(uuid)
    return {
        "uuid": str(uuid),
        "device": None,
        "driver": None,
        "port": None,
        "iommu": None,
        "group_uuid": mdev and mdev.group_uuid and str(mdev.group_uuid),
        "group": mdev and mdev.group_uuid and names.get(mdev.group_uuid),
        "online": mdev and mdev.online,
    }


def _pid(guest: RunningGuest) -> int | None:
    return guest.record.pid if guest.record and guest.alive else None
