# SPDX-License-Identifier: GPL-2.0-or-later
"""Says what this host lacks to use mdevs, and how to mend it. QEMU is in ``qemu.doctor``."""

from __future__ import annotations

import grp
import os
import pwd
from collections.abc import Iterator
from typing import Literal

from msgspec import Struct

from mdev_orchestrator.host import dkms, iommu
from mdev_orchestrator.machine import Machine
from mdev_orchestrator.model import Host

Level = Literal["ok", "warning", "fault"]

VFIO_REMEDY = "modprobe vfio_iommu_type1"


class Finding(Struct, frozen=True):
    """One thing that was checked.

    :ivar level: ``fault`` when something cannot work, ``warning`` when it works less.
    :ivar subject: What was checked.
    :ivar remedy: A command or a sentence; empty when there is nothing to mend.
    """

    level: Level
    subject: str
    message: str
    remedy: str = ""


def examine(machine: Machine, host: Host) -> tuple[Finding, ...]:
    """Check modules, parents, nodes and permissions. Raises nothing for what it finds.

    :param host: The host as it was scanned.
    """
    return (
        _user(),
        *_mdev(machine, host),
        *_vfio(machine),
        *_nodes(machine, host),
        _kvm(machine),
    )


def _user() -> Finding:
    user = os.geteuid()
    try:
        name = pwd.getpwuid(user).pw_name
        groups = ", ".join(sorted(grp.getgrgid(number).gr_name for number in os.getgroups()))
    except KeyError:  # a container need not have them
        name, groups = str(user), ", ".join(map(str, os.getgroups()))
    return Finding(
        "ok", "user", f"this is {name}, in the groups {groups}" if user else "this is root"
    )


def _mdev(machine: Machine, host: Host) -> Iterator[Finding]:
    level: Level = "warning" if host.parents else "fault"
    drivers = [Finding(level, *lack) for lack in dkms.lacking(machine)]
    if not host.mdev_bus:
        yield Finding("fault", "mdev", "the kernel has no mdev bus", _module(machine, "mdev"))
        yield from drivers
        return
    yield Finding("ok", "mdev", "the mdev bus is there")
    yield from drivers
    if not host.parents and not drivers:
        yield Finding("fault", "parents", "no device offers mdevs", "modprobe the vendor's driver")
        return
    for parent in host.parents:
        free = sum(1 for type_ in parent.types if type_.available_instances)
        yield Finding("ok", parent.name, f"{len(parent.types)} types, {free} with instances left")
    damaged = [
        (name, damage)
        for name, damages in (
            *((p.name, p.damage) for p in host.parents),
            *((f"{t.parent} {t.id}", t.damage) for p in host.parents for t in p.types),
            *((str(m.uuid), m.damage) for m in host.mdevs),
            ("mdev bus", host.damage),
        )
        for damage in damages
    ]
    for name, damage in damaged:
        yield Finding("warning", name, damage, "the vendor's driver is at fault; see dmesg")
    creates = [
        p.path / "mdev_supported_types" / t.id / "create" for p in host.parents for t in p.types
    ]
    if denied := next((path for path in creates if not os.access(path, os.W_OK)), None):
        yield Finding("fault", "create", f"no permission to write {denied}", "run mdo as root")
    elif creates:
        yield Finding("ok", "create", "mdevs may be created")


def _vfio(machine: Machine) -> Iterator[Finding]:
    lack = iommu.lack_of_iommufd(machine)
    iommufd, container = (machine.root / iommu.HOST_NODES[k] for k in ("iommufd", "container"))
    if lack is None:
        yield Finding("ok", "iommufd", f"{iommufd} opens")
    elif iommufd.exists():
        yield Finding("warning", "iommufd", f"{lack[0]}: guests use the container", lack[1])
    else:
        yield Finding("ok", "iommufd", f"no {iommufd}: guests use the container")
    # without the type 1 driver the node is there and no container can be set up
    module = machine.root / "sys/module/vfio_iommu_type1"
    level: Level = "fault" if lack else "warning"
    if not container.exists():
        remedy = _module(machine, "vfio_iommu_type1")
        yield Finding(level, "vfio", f"{container} is not there", remedy)
    elif not iommu.may_open(container):
        remedy = f"chmod 0666 {container}"
        yield Finding(level, "vfio", f"no permission to open {container}", remedy)
    elif not module.exists():
        yield Finding(level, "vfio", "vfio_iommu_type1 is not loaded", VFIO_REMEDY)
    else:
        yield Finding("ok", "vfio", f"{container} opens")
    if (machine.root / "sys/bus/mdev").exists() and not (machine.root / "sys/module/vfio").exists():
        yield Finding("warning", "vfio", "the vfio module is not loaded", "modprobe vfio")


def _nodes(machine: Machine, host: Host) -> Iterator[Finding]:
    """Devices that this process cannot open: a fault if in no way, else a warning."""
    kinds = iommu.kinds(machine)
    for mdev in host.mdevs:
        lacks = [iommu.lack_of_node(machine, mdev.uuid, kind) for kind in kinds]
        level: Level = "warning" if None in lacks else "fault"
        for lack in lacks:
            if lack is not None:
                yield Finding(level, str(mdev.uuid), *lack)


def _kvm(machine: Machine) -> Finding:
    node = machine.root / "dev/kvm"
    if not node.exists():
        return Finding(
            "warning", "kvm", "no /dev/kvm: guests are emulated", "modprobe kvm_intel or kvm_amd"
        )
    if not iommu.may_open(node):
        return Finding("warning", "kvm", f"no permission to open {node}", "adduser $USER kvm")
    # that it opens does not prove that guests boot; only booting one does
    return Finding("ok", "kvm", f"{node} opens")


def _module(machine: Machine, name: str) -> str:
    """How to get a module: load it, or first a kernel that has it."""
    if iommu.module_is_known(machine, name):
        return f"modprobe {name}"
    return (
        f"kernel {os.uname().release} has no module {name} here: "
        "apt-get install linux-image-amd64 and boot it, or try make demo in a checkout"
    )
