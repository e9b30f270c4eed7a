# SPDX-License-Identifier: GPL-2.0-or-later
"""mvgpu's types as the demo and the tests use them, and the counts of their instances."""

from __future__ import annotations

from mdev_orchestrator.host import sysfs
from mdev_orchestrator.machine import Machine
from mdev_orchestrator.model import Host, Mdev
from mdev_orchestrator.qemu.command import GuestMdev
from mdev_orchestrator.system.waiting import poll_until

#: Of grid parents: all devices of a parent are of one type.
GRID_TYPE = "mvgpu-12"
#: The types that read 0 while a device of :data:`GRID_TYPE` exists.
GRID_OTHERS = {f"mvgpu-{number}" for number in range(11, 19)} - {GRID_TYPE}
#: Of igd parents: all types share one pool of memory.
IGD_TYPE = "mvgpu-512M"
#: The smallest type of igd parents, for devices of one start group.
PEER_TYPE = "mvgpu-128M"

SETTLE_SECONDS = 1.0


def counts(host: Host) -> dict[str, int | None]:
    """Return the available instances of each type."""
    return {type_.id: type_.available_instances for p in host.parents for type_ in p.types}


async def settled(machine: Machine, wanted: dict[str, int | None]) -> dict[str, int | None]:
    """Return the counts as soon as they are ``wanted``, or as they are after a second.

    The kernel gives an instance back shortly after the write to ``remove``, without an event.
    """
    await poll_until(lambda: counts(sysfs.read_host(machine)) == wanted, SETTLE_SECONDS)
    return counts(await sysfs.scan(machine))


def as_guest_mdev(mdev: Mdev) -> GuestMdev:
    """Return what QEMU's command line needs of an mdev."""
    return GuestMdev(mdev.uuid, mdev.path, mdev.device_api or "vfio-pci")
