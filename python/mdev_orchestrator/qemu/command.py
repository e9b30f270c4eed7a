# SPDX-License-Identifier: GPL-2.0-or-later
"""From a :class:`GuestSpec` to QEMU's argument vector. Pure: no I/O, no host knowledge.

What a guest looks like
=======================

* ``q35``, nothing but what is asked for (``-nodefaults -no-user-config -display none``).
* One pcie-root-port per PCI mdev and as many free ones as ``hotplug_ports`` asks for: a PCIe
  device cannot be hot-plugged into the root complex itself, and ports cannot be added later.
  Their ids are ``port0``, ``port1``… The mdevs on the command line take the first ones. Eight
  ports share one slot of the root bus, as libvirt places them too. They take slots from the middle
  of the bus upwards (:data:`FIRST_SLOT`): QEMU gives a device without an address, such as a disk,
  a network card or a VGA adapter, the lowest free slot, and it does so before it comes to a port.
* Every port asks the firmware for a window of ``hotplug_window`` bytes of 64-bit prefetchable
  memory, so that a device with a large memory aperture fits without moving its neighbours. It asks
  for more if the windows of all ports together are less than :data:`WINDOWS`.
* An mdev is a device with the id ``mdev-UUID``, opened by ``sysfsdev``. vfio-ccw and vfio-ap
  devices are not PCI and sit on no port.
* With ``iommufd`` all mdevs refer to one object (:data:`IOMMUFD_ID`), which has ``/dev/iommu``
  open, and QEMU opens the device's own node. Without, it opens the group's, and a container.
* Four listening sockets are handed over as open descriptors: ``qmp`` (changes), ``query``
  (questions, so that a listing need not wait for an unplug that takes a minute), ``watch`` (events,
  for a client that stays connected) and ``console`` (first serial port, whose output is kept in a
  log as well). A monitor is an object where QEMU has that type, and made by ``-mon`` elsewhere.
* Firmware is QEMU's own choice, SeaBIOS on q35; or UEFI: two flash chips, the code read-only and
  the guest's own variables.
* ``-uuid`` always: NVIDIA's host plugin reads it from the command line, and it is how a later
  command knows that a process is this guest.

Strings of users
================

QEMU splits many option values at commas and reads a doubled comma as one. :func:`escape` doubles
them, so a file called ``disk,readonly=off`` stays a file. No value stands where QEMU would take
``KEY=VALUE`` for a key, none is an argument by itself, and no shell reads any of them. Names of
guests go into directories as well and are checked against a pattern instead. Only ``extra`` is
passed on as it stands.

Windows
=======

An AMD processor uses the last 12 GiB of the first TiB for HyperTransport, and QEMU lists them as
reserved. SeaBIOS, from 1.16.3 on, puts the ports' windows at the top of the address space, as the
processor's address bits say: with QEMU's default processor, 40 bits, this is the reserved range. It
sees that, and then goes down by as much as all windows need, once. If that is less than 12 GiB, the
windows are still in the range, and Linux cannot use them: a device that is hot-plugged gets no
addresses.

Acceleration
============

``auto`` names both KVM and TCG, in this order, and QEMU takes the first that initialises: only
QEMU knows whether KVM can carry this machine. It cannot know whether a guest will then *boot*:
where ``/dev/kvm`` opens but hangs guests, ask for ``tcg``.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Literal, cast, get_args
from uuid import UUID

from msgspec import Struct

from mdev_orchestrator.errors import RequestError
from mdev_orchestrator.model import IommuChoice
from mdev_orchestrator.spec import GuestSettings
from mdev_orchestrator.spec.sizes import MIB
from mdev_orchestrator.spec.structures import MAX_CPUS, MAX_PORTS

Accel = Literal["auto", "kvm", "tcg"]

GIB = 1 << 30
PORTS_PER_SLOT = 8
IOMMUFD_ID = "iommufd0"
"""The id of the object that has ``/dev/iommu`` open."""
FIRST_SLOT = 0x0F
"""Slots 1 to 14 are left to devices without an address; 0x1f is the chipset's own on q35."""

WINDOWS = 16 * GIB
"""Least sum of the ports' windows: the 12 GiB that firmware has to avoid (see *Windows*), and
what it may lose by aligning. Address space costs a guest no memory."""

MONITOR = "monitor-qmp"
"""Type of the object that is a monitor for programs; QEMUs that have it warn of ``-mon``."""

NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,39}")
PCIE_MACHINES = re.compile(r"(pc-)?q35(-.*)?|virt(-.*)?")
_DRIVER = re.compile(r"[a-z0-9][a-z0-9-]*")

REFUSED = {
    "daemonize": "QEMU would fork, and the process that mdo has started and watches would end",
    "uuid": "the guest has one already, by which mdo knows its process; take --uuid",
    "chroot": "QEMU could not open the directory of an mdev that is attached later",
}
"""Arguments that break what mdo relies on, and why; without the dashes."""
_REFUSED = re.compile(f"--?({'|'.join(REFUSED)})")  # QEMU takes an option with one dash or two


class GuestMdev(Struct, frozen=True):
    """An mdev that a guest gets on its command line or by hotplug.

    :ivar path: Its directory in sysfs; QEMU opens the device by it.
    :ivar device_api: What the kernel says in the type's ``device_api``; QEMU's drivers carry the
        same names (``vfio-pci``, ``vfio-ccw``, ``vfio-ap``).
    """

    uuid: UUID
    path: Path
    device_api: str = "vfio-pci"

    @property
    def device_id(self) -> str:
        """The id of its device in QEMU."""
        return device_id(self.uuid)


class GuestSpec(GuestSettings, frozen=True, kw_only=True):
    """All that is needed to start a guest.

    The format of a disk is never probed: a guest that writes a qcow2 header into its raw disk could
    otherwise name a file of the host.

    :ivar iommu: How its mdevs are opened. ``auto``, which :func:`engine.guest_ops.launch` decides,
        is the container here.
    """

    uuid: UUID
    mdevs: tuple[GuestMdev, ...] = ()


class Flash(Struct, frozen=True):
    """The two flash chips that UEFI is in.

    :ivar code: Image of the firmware, which is never written.
    :ivar variables: Image of the variables: a guest's own, or those that a new one begins with.
    """

    code: Path
    code_format: str
    variables: Path
    variables_format: str


class Sockets(Struct, frozen=True):
    """Numbers of the listening sockets that QEMU inherits, and where the console's log goes."""

    qmp: int
    query: int
    watch: int
    console: int
    console_log: Path


def device_id(uuid: UUID) -> str:
    """The id of an mdev's device in QEMU: an id must begin with a letter, a UUID may not."""
    return f"mdev-{uuid}"


def port_id(number: int) -> str:
    """The id of a root port, and of the bus behind it."""
    return f"port{number}"


def parse_accel(text: str) -> Accel:
    """Read the name of an accelerator.

    :raise RequestError: It is none.
    """
    for name in get_args(Accel):
        if text == name:
            return cast(Accel, name)
    raise RequestError(f"{text!r} is no accelerator", f"use {', '.join(get_args(Accel))}")


def parse_iommu(text: str) -> IommuChoice:
    """Read how devices shall be opened.

    :raise RequestError: It is no such way.
    """
    for name in get_args(IommuChoice):
        if text == name:
            return cast(IommuChoice, name)
    raise RequestError(f"{text!r} is no kind of IOMMU", f"use {', '.join(get_args(IommuChoice))}")


def escape(value: object) -> str:
    """Return a value such that QEMU's option parser takes all of it as one value."""
    return str(value).replace(",", ",,")


def option(first: str, **values: object) -> str:
    """Join an option's leading word and its properties; underscores in names become dashes."""
    parts = [escape(first)]
    for key, value in values.items():
        text = ("off", "on")[value] if isinstance(value, bool) else escape(value)
        parts.append(f"{key.replace('_', '-')}={text}")
    return ",".join(parts)


def check_name(name: str) -> str:
    """Return ``name`` if a guest may be called so.

    :raise RequestError: It may not.
    """
    if not NAME_PATTERN.fullmatch(name):
        raise RequestError(
            f"{name!r} cannot be the name of a guest",
            "use up to 40 letters, digits, '_', '.' and '-', a letter or digit first",
        )
    return name


def has_ports(spec: GuestSpec) -> bool:
    """Whether the machine takes pcie-root-ports at all; s390x, for one, does not."""
    return PCIE_MACHINES.fullmatch(spec.machine) is not None


def ports_in_use(spec: GuestSpec) -> int:
    """How many root ports the mdevs of the command line take."""
    return sum(mdev.device_api == "vfio-pci" for mdev in spec.mdevs) if has_ports(spec) else 0


def check(spec: GuestSpec) -> None:
    """Check whatever QEMU would refuse with words that do not help, or take for something else.

    :raise RequestError: The first fault found.
    """
    check_name(spec.name)
    label = f"guest {spec.name}"
    if spec.memory < MIB or spec.memory % MIB:
        raise RequestError(f"{label}: memory of {int(spec.memory)} bytes is no multiple of 1 MiB")
    if not 1 <= spec.cpus <= MAX_CPUS:
        raise RequestError(f"{label}: {spec.cpus} CPUs; give 1 to {MAX_CPUS}")
    if spec.hotplug_ports < 0 or ports_in_use(spec) + spec.hotplug_ports > MAX_PORTS:
        raise RequestError(
            f"{label}: {spec.hotplug_ports} hotplug ports; "
            f"with those of its mdevs give 0 to {MAX_PORTS}"
        )
    if spec.hotplug_window < MIB or spec.hotplug_window.bit_count() != 1:
        raise RequestError(
            f"{label}: hotplug window of {int(spec.hotplug_window)} bytes; "
            "give a power of two of at least 1 MiB"
        )
    if (spec.initrd or spec.append) and not spec.kernel:
        raise RequestError(f"{label}: an initrd or kernel parameters need a kernel")
    if spec.uefi_variables and not spec.uefi:
        raise RequestError(f"{label}: UEFI variables need UEFI", "add --uefi, or uefi = true")
    parse_accel(spec.accel)
    for word in spec.extra:
        if found := _REFUSED.fullmatch(word):
            why = REFUSED[found[1]]
            raise RequestError(f"{label}: QEMU's argument {word} cannot be used: {why}")
    _check_mdevs(spec, label)
    strings = [spec.append, spec.disk_format, spec.machine, spec.qemu, *spec.extra]
    strings += map(str, (spec.kernel, spec.initrd, spec.disk, spec.firmware, spec.uefi_variables))
    strings += (str(mdev.path) for mdev in spec.mdevs)
    if any("\0" in string for string in strings):
        raise RequestError(f"{label}: a zero byte cannot be passed to a program")


def _check_mdevs(spec: GuestSpec, label: str) -> None:
    for mdev in spec.mdevs:
        if not _DRIVER.fullmatch(mdev.device_api):
            raise RequestError(
                f"{label}: mdev {mdev.uuid} has device_api {mdev.device_api!r}, "
                "which names no device of QEMU"
            )
    if len({mdev.uuid for mdev in spec.mdevs}) != len(spec.mdevs):
        raise RequestError(f"{label}: the same mdev is given twice")


def root_port(number: int, window: int) -> list[str]:
    """``-device`` for one root port. Chassis and slot numbers only have to be unique."""
    slot, function = divmod(number, PORTS_PER_SLOT)
    properties: dict[str, object] = {
        "id": port_id(number),
        "bus": "pcie.0",
        "addr": f"{FIRST_SLOT + slot:#04x}.{function}",
        "chassis": number + 1,
        "slot": number + 1,
        "pref64_reserve": window,
    }
    if function == 0:
        properties["multifunction"] = True
    return ["-device", option("pcie-root-port", **properties)]


def port_window(spec: GuestSpec) -> int:
    """Return the bytes of 64-bit memory that each port reserves, a power of two."""
    ports = ports_in_use(spec) + spec.hotplug_ports
    least = -(-WINDOWS // max(ports, 1))
    return max(int(spec.hotplug_window), 1 << (least - 1).bit_length())


def accelerators(accel: Accel) -> list[str]:
    """``-accel`` options, in the order in which QEMU shall try them."""
    return [
        word
        for name in (("kvm", "tcg") if accel == "auto" else (accel,))
        for word in ("-accel", name)
    ]


def boot_arguments(spec: GuestSpec) -> list[str]:
    """What the guest boots from."""
    argv: list[str] = []
    if spec.kernel:
        argv += ["-kernel", str(spec.kernel)]
    if spec.initrd:
        argv += ["-initrd", str(spec.initrd)]
    if spec.append:
        argv += ["-append", spec.append]
    if spec.disk:
        argv += [
            "-drive",
            option("if=none", id="disk0", format=spec.disk_format, file=spec.disk),
            "-device",
            option("virtio-blk", drive="disk0"),
        ]
    return argv


def monitor_arguments(name: str, descriptor: int, *, by_object: bool) -> list[str]:
    """One monitor for programs, on a listening socket."""
    return [
        "-chardev",
        option("socket", id=name, fd=descriptor, server=True, wait=False),
        *(
            ("-object", option(MONITOR, id=f"monitor-{name}", chardev=name))
            if by_object
            else ("-mon", option(f"chardev={name}", mode="control"))
        ),
    ]


def flash_arguments(flash: Flash) -> list[str]:
    """The flash chips, by which QEMU boots whatever firmware is in the first."""
    code = option("if=pflash", unit=0, format=flash.code_format, readonly=True, file=flash.code)
    variables = option("if=pflash", unit=1, format=flash.variables_format, file=flash.variables)
    return ["-drive", code, "-drive", variables]


def guest_argv(
    spec: GuestSpec,
    sockets: Sockets,
    *,
    flash: Flash | None = None,
    objects: Collection[str] = (),
) -> list[str]:
    """Return QEMU's whole argument vector, program first.

    :param flash: What UEFI is in, for a guest that boots by it.
    :param objects: Types of objects that QEMU makes on request, as far as they are known.
    :raise RequestError: The specification is faulty, see :func:`check`.
    """
    check(spec)
    argv = [
        spec.qemu,
        "-name",
        option(f"guest={spec.name}", debug_threads=True),
        "-uuid",
        str(spec.uuid),
        "-machine",
        f"type={escape(spec.machine)}",  # without the key, a machine called smm=off would be one
        *accelerators(spec.accel),
        "-m",
        f"{spec.memory // MIB}M",
        "-smp",
        str(spec.cpus),
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
    ]
    if spec.firmware:
        argv += ["-L", str(spec.firmware)]
    monitors = {"qmp": sockets.qmp, "query": sockets.query, "watch": sockets.watch}
    for name, descriptor in monitors.items():
        argv += monitor_arguments(name, descriptor, by_object=MONITOR in objects)
    argv += [
        "-chardev",
        option(
            "socket",
            id="console",
            fd=sockets.console,
            server=True,
            wait=False,
            logfile=sockets.console_log,
        ),
        "-serial",
        "chardev:console",
    ]
    if flash:
        argv += flash_arguments(flash)
    argv += boot_arguments(spec)
    if has_ports(spec):
        for number in range(ports_in_use(spec) + spec.hotplug_ports):
            argv += root_port(number, port_window(spec))
    port = 0
    by_iommufd = spec.iommu == "iommufd" and spec.mdevs
    if by_iommufd:
        argv += ["-object", option("iommufd", id=IOMMUFD_ID)]
    for mdev in spec.mdevs:
        properties: dict[str, object] = {"id": mdev.device_id, "sysfsdev": mdev.path}
        if by_iommufd:
            properties["iommufd"] = IOMMUFD_ID
        if mdev.device_api == "vfio-pci" and has_ports(spec):
            properties["bus"] = port_id(port)
            port += 1
        argv += ["-device", option(mdev.device_api, **properties)]
    return [*argv, *spec.extra]
