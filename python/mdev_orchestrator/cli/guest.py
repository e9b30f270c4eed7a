# SPDX-License-Identifier: GPL-2.0-or-later
"""``mdo guest``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from mdev_orchestrator.cli import output
from mdev_orchestrator.cli.options import Argument, Option

if TYPE_CHECKING:
    from mdev_orchestrator.model import Host
    from mdev_orchestrator.qemu.command import GuestSpec
    from mdev_orchestrator.qemu.hotplug import Plugged
    from mdev_orchestrator.qemu.process import Ended, RunningGuest
    from mdev_orchestrator.qemu.status import Report

NONE = "-"
NameArgument = Annotated[str, Argument(metavar="NAME", help="Name of the guest.")]
JsonOption = Annotated[bool, Option("--json", help="One JSON document.")]


def list_(*, json: JsonOption = False) -> None:
    """Show all guests, with what they hold."""
    from mdev_orchestrator.host.sysfs import scan

    reports = output.run(_look_all())
    host = scan(output.host_root())
    if json:
        output.emit_json({"guests": [guest_shape(report, host) for report in reports]})
        return
    output.emit_table("Guests", HEADERS, [_row(report, host) for report in reports])
    for report in reports:
        if report.damage:
            output.say(f"{report.guest.label}: {report.damage}")


async def _look_all() -> list[Report]:
    from mdev_orchestrator.machine import Machine
    from mdev_orchestrator.qemu.process import list_guests
    from mdev_orchestrator.qemu.status import look_all

    await reclaim_groups()
    return await look_all(list_guests(Machine(output.host_root())))


async def reclaim_groups() -> None:
    """Take offline what guests that have ended left online, and say so."""
    from mdev_orchestrator.engine.lifecycle import reclaim_groups as sweep_groups

    for swept in await sweep_groups(host=output.host_root()):
        output.say(str(swept))


def start(
    name: NameArgument,
    *,
    kernel: Annotated[Path | None, Option(help="Linux image to boot.")] = None,
    initrd: Annotated[Path | None, Option(help="Its initial file system.")] = None,
    append: Annotated[
        str | None, Option(help="Kernel parameters; console=ttyS0 if not given.")
    ] = None,
    disk: Annotated[Path | None, Option(help="Image of its first disk.")] = None,
    disk_format: Annotated[str, Option(help="Format of the image: raw, qcow2…")] = "raw",
    memory: Annotated[str, Option(help="Such as 512M or 2G.")] = "512M",
    cpus: Annotated[int, Option(help="Number of CPUs.")] = 1,
    mdev: Annotated[
        list[str] | None, Option(metavar="UUID", help="A device it gets; may be repeated.")
    ] = None,
    hotplug_ports: Annotated[int, Option(help="Root ports kept free for attach.")] = 4,
    hotplug_window: Annotated[
        str, Option(help="Memory window of each port, a power of two.")
    ] = "256M",
    uuid: Annotated[str | None, Option(help="The guest's UUID; random if not given.")] = None,
    qemu: Annotated[str, Option(envvar="MDO_QEMU", help="QEMU's program.")] = "qemu-system-x86_64",
    firmware: Annotated[
        Path | None, Option(envvar="MDO_QEMU_FIRMWARE", help="Its firmware directory (-L).")
    ] = None,
    machine: Annotated[str, Option(help="QEMU's machine type.")] = "q35",
    accel: Annotated[
        str, Option(envvar="MDO_ACCEL", help="kvm, tcg, or auto: KVM where QEMU can.")
    ] = "auto",
    arg: Annotated[
        list[str] | None, Option(help="One more argument for QEMU; may be repeated.")
    ] = None,
    deadline: Annotated[float, Option(min=0.1, help="Seconds until QEMU answers.")] = 60.0,
    json: JsonOption = False,
) -> None:
    """Start a guest; it goes on running when this command ends."""
    from uuid import uuid4

    from mdev_orchestrator.model import parse_uuid
    from mdev_orchestrator.qemu.command import GuestSpec, parse_accel, parse_size
    from mdev_orchestrator.qemu.process import qemu_words

    spec = GuestSpec(
        name=name,
        uuid=parse_uuid(uuid) if uuid else uuid4(),
        memory=parse_size(memory),
        cpus=cpus,
        kernel=kernel,
        initrd=initrd,
        append=append if append is not None else "console=ttyS0" if kernel else "",
        disk=disk,
        disk_format=disk_format,
        hotplug_ports=hotplug_ports,
        hotplug_window=parse_size(hotplug_window),
        accel=parse_accel(accel),
        machine=machine,
        qemu=qemu,
        firmware=firmware,
        extra=tuple(arg or ()),
    )
    report = output.run(_start(spec, mdev or [], deadline))
    if words := qemu_words(report.guest.qemu_log):
        output.say(f"{report.guest.label}: QEMU says: {words}")
    if json:
        from mdev_orchestrator.host.sysfs import scan

        output.emit_json(guest_shape(report, scan(output.host_root())))
    else:
        record = report.guest.record
        output.emit(f"{name} runs as process {record.pid if record else NONE}")


async def _start(spec: GuestSpec, uuids: list[str], deadline: float) -> Report:
    from msgspec.structs import replace

    from mdev_orchestrator.engine.lifecycle import launch, usable_mdev
    from mdev_orchestrator.model import parse_uuid
    from mdev_orchestrator.qemu.status import look

    await reclaim_groups()
    root = output.host_root()
    mdevs = [await usable_mdev(parse_uuid(uuid), deadline, root) for uuid in uuids]
    spec = replace(spec, mdevs=tuple(mdevs))
    guest = await launch(spec, deadline=deadline, host=root)
    return await look(guest)


def stop(
    name: Annotated[str | None, Argument(metavar="NAME", help="Name of the guest.")] = None,
    *,
    all_: Annotated[
        bool, Option("--all", help="Every guest that runs, all at the same time.")
    ] = False,
    deadline: Annotated[float, Option(min=0, help="Seconds for the guest to power down.")] = 60.0,
    force: Annotated[
        bool, Option("--force", help="Then end it without asking; --deadline 0: at once.")
    ] = False,
    json: JsonOption = False,
) -> int:
    """Power a guest down and remove its files. One that has ended is only tidied up."""
    from mdev_orchestrator.errors import RequestError

    if (name is None) != all_:
        raise RequestError("name one guest, or give --all", "mdo guest list shows what there is")
    if name is None:
        return _stop_all(deadline, force=force, json=json)
    ended = output.run(_stop(name, deadline, force=force))
    if json:
        output.emit_json({"name": ended.name, "how": ended.how})
    else:
        output.emit(f"{name} {HOW[ended.how]}")
    return 0


def _stop_all(deadline: float, *, force: bool, json: bool) -> int:
    from mdev_orchestrator.engine.restore import power_down

    ended = output.run(power_down(deadline=deadline, force=force, host=output.host_root()))
    if json:
        output.emit_json(
            {
                "guests": [
                    {
                        "name": guest.name,
                        "how": guest.how or None,
                        "error": guest.error and guest.error.message,
                    }
                    for guest in ended
                ]
            }
        )
    else:
        for guest in ended:
            if guest.how:
                output.emit(f"{guest.name} {HOW[guest.how]}")
        if not ended:
            output.emit("no guest runs")
    for guest in ended:
        if guest.error is not None:
            output.say_error(guest.error)
    return 1 if any(guest.error for guest in ended) else 0


async def _stop(name: str, deadline: float, *, force: bool) -> Ended:
    from mdev_orchestrator.engine.lifecycle import end
    from mdev_orchestrator.machine import Machine
    from mdev_orchestrator.qemu.process import find

    ended = await end(
        find(Machine(output.host_root()), name),
        deadline=deadline,
        force=force,
        host=output.host_root(),
    )
    await reclaim_groups()
    return ended


HOW = {
    "powerdown": "powered down",
    "quit": "was ended by QEMU's quit",
    "terminated": "was ended by SIGTERM",
    "killed": "was ended by SIGKILL",
    "gone": "had ended already; its files are removed",
}


def console(
    name: NameArgument,
    *,
    log: Annotated[
        bool, Option("--log", help="Print what the guest has printed so far, and end.")
    ] = False,
) -> None:
    """Connect the terminal to the guest's first serial port; ctrl-] ends it."""
    from mdev_orchestrator.cli.console import interact, print_log
    from mdev_orchestrator.machine import Machine
    from mdev_orchestrator.qemu.process import find, find_running
    from mdev_orchestrator.qemu.status import check_console_free

    if log:
        print_log(find(Machine(output.host_root()), name))
        return
    guest = find_running(Machine(output.host_root()), name)
    output.run(check_console_free(guest))
    interact(guest)


HEADERS = ("name", "state", "qemu", "pid", "memory", "cpus", "mdevs")


def _row(report: Report, host: Host) -> tuple[str, ...]:
    record = report.guest.record
    held = NONE if report.mdevs is None else str(len(report.mdevs))
    if report.mdevs:
        held = ", ".join(sorted(_held(plugged, host) for plugged in report.mdevs))
    return (
        report.guest.name,
        str(report.state),
        report.status or NONE,
        str(record.pid) if record and report.guest.alive else NONE,
        f"{record.memory >> 20}M" if record else NONE,
        str(record.cpus) if record else NONE,
        held,
    )


def _held(plugged: Plugged, host: Host) -> str:
    """An mdev with its state and group, as far as its driver has them."""
    mdev = host.find(plugged.uuid)
    words = [str(plugged.uuid)]
    if mdev is not None and mdev.online is not None:
        words.append("online" if mdev.online else "offline")
    if mdev is not None and mdev.group_uuid is not None:
        words.append(f"in group {mdev.group_uuid}")
    return " ".join(words)


def guest_shape(report: Report, host: Host) -> dict[str, Any]:
    """The documented JSON shape of a guest."""
    from mdev_orchestrator.qemu.process import created

    guest, record = report.guest, report.guest.record
    return {
        "name": guest.name,
        "state": str(report.state),
        "status": report.status,
        "uuid": record and str(record.uuid),
        "pid": _pid(guest),
        "memory": record and record.memory,
        "cpus": record and record.cpus,
        "created": record and created(record).isoformat(timespec="seconds"),
        "mdevs": None
        if report.mdevs is None
        else [_plugged_shape(plugged, host) for plugged in report.mdevs],
        "directory": str(guest.directory),
        "damage": report.damage,
    }


def _plugged_shape(plugged: Plugged, host: Host) -> dict[str, Any]:
    mdev = host.find(plugged.uuid)
    return {
        "uuid": str(plugged.uuid),
        "device": plugged.device_id,
        "driver": plugged.driver,
        "port": plugged.port,
        "group_uuid": mdev and mdev.group_uuid and str(mdev.group_uuid),
        "online": mdev and mdev.online,
    }


def _pid(guest: RunningGuest) -> int | None:
    return guest.record.pid if guest.record and guest.alive else None


COMMANDS = {"list": list_, "start": start, "stop": stop, "console": console}
