# SPDX-License-Identifier: GPL-2.0-or-later
"""Creates mediated devices, launches QEMU guests with them and drives their hotplug.

What ``mdo`` does, as a library (docs/library.md)::

    import mdev_orchestrator as mdo

    async with mdo.open() as machine:
        device = await machine.create("mvgpu-12")

A name is imported when it is first used: a program that only scans the host does not load QEMU's
protocol.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mdev_orchestrator.capacity.planner import Plan
    from mdev_orchestrator.engine.adopt import Adopted
    from mdev_orchestrator.engine.attach import Attached
    from mdev_orchestrator.engine.diff import Changes
    from mdev_orchestrator.engine.executor import StepEvent, StepEventKind
    from mdev_orchestrator.engine.probe import Probed
    from mdev_orchestrator.engine.records import DeviceRecord, GuestRecord, Managed, SpecRecord
    from mdev_orchestrator.engine.recovery import Recovered
    from mdev_orchestrator.engine.restore import PoweredDown, Restored
    from mdev_orchestrator.errors import (
        BusyError,
        CapacityError,
        CommandError,
        DeadlineError,
        HostError,
        MdoError,
        Outcome,
        QemuError,
        RequestError,
        UnknownError,
        UuidError,
    )
    from mdev_orchestrator.host.events import Event, MdevEvent, NodeEvent, ParentEvent, Rescan
    from mdev_orchestrator.library import OpenMachine
    from mdev_orchestrator.library import open_machine as open  # noqa: A004 - mdo.open()
    from mdev_orchestrator.model import Host, Mdev, MdevType, Parent, StartGroup
    from mdev_orchestrator.qemu.process import Ended, RunningGuest
    from mdev_orchestrator.qemu.status import Report
    from mdev_orchestrator.spec import Document, GuestConfig, Spec, load, parse

__version__ = "0.1.0"

_PLACES = {
    "Adopted": "engine.adopt",
    "Attached": "engine.attach",
    "BusyError": "errors",
    "CapacityError": "errors",
    "Changes": "engine.diff",
    "CommandError": "errors",
    "DeadlineError": "errors",
    "DeviceRecord": "engine.records",
    "Document": "spec",
    "Ended": "qemu.process",
    "Event": "host.events",
    "GuestConfig": "spec",
    "GuestRecord": "engine.records",
    "Host": "model",
    "HostError": "errors",
    "Managed": "engine.records",
    "Mdev": "model",
    "MdevEvent": "host.events",
    "MdevType": "model",
    "MdoError": "errors",
    "NodeEvent": "host.events",
    "OpenMachine": "library",
    "Outcome": "errors",
    "Parent": "model",
    "ParentEvent": "host.events",
    "Plan": "capacity.planner",
    "PoweredDown": "engine.restore",
    "Probed": "engine.probe",
    "QemuError": "errors",
    "Recovered": "engine.recovery",
    "Report": "qemu.status",
    "RequestError": "errors",
    "Rescan": "host.events",
    "Restored": "engine.restore",
    "RunningGuest": "qemu.process",
    "Spec": "spec",
    "SpecRecord": "engine.records",
    "StartGroup": "model",
    "StepEvent": "engine.executor",
    "StepEventKind": "engine.executor",
    "UnknownError": "errors",
    "UuidError": "errors",
    "load": "spec",
    "open": "library",
    "parse": "spec",
}

__all__ = [
    "Adopted",
    "Attached",
    "BusyError",
    "CapacityError",
    "Changes",
    "CommandError",
    "DeadlineError",
    "DeviceRecord",
    "Document",
    "Ended",
    "Event",
    "GuestConfig",
    "GuestRecord",
    "Host",
    "HostError",
    "Managed",
    "Mdev",
    "MdevEvent",
    "MdevType",
    "MdoError",
    "NodeEvent",
    "OpenMachine",
    "Outcome",
    "Parent",
    "ParentEvent",
    "Plan",
    "PoweredDown",
    "Probed",
    "QemuError",
    "Recovered",
    "Report",
    "RequestError",
    "Rescan",
    "Restored",
    "RunningGuest",
    "Spec",
    "SpecRecord",
    "StartGroup",
    "StepEvent",
    "StepEventKind",
    "UnknownError",
    "UuidError",
    "load",
    "open",
    "parse",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401 - whatever the name stands for
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"{__name__}.{_PLACES[name]}")
    return getattr(module, "open_machine" if name == "open" else name)
