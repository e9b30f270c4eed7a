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
    from mdev_orchestrator.capacity.models import ParentCapacity
    from mdev_orchestrator.capacity.planner import ParentPlan, Placement, Plan, Policy, Shortfall
    from mdev_orchestrator.engine.adopt import Adopted
    from mdev_orchestrator.engine.attach import Attached
    from mdev_orchestrator.engine.device_requests import Existing
    from mdev_orchestrator.engine.diff import Changes, Preview
    from mdev_orchestrator.engine.executor import Observer, PlannedStep, StepEvent, StepEventKind
    from mdev_orchestrator.engine.foreign import ForeignGuest
    from mdev_orchestrator.engine.journal import Run
    from mdev_orchestrator.engine.placement import MisfitError
    from mdev_orchestrator.engine.probe import Probed
    from mdev_orchestrator.engine.records import (
        Change,
        DeviceRecord,
        GuestRecord,
        Managed,
        SpecRecord,
    )
    from mdev_orchestrator.engine.recovery import Recovered
    from mdev_orchestrator.engine.restore import PoweredDown, Restored
    from mdev_orchestrator.engine.steps import (
        AnyStep,
        Attach,
        AttachDomain,
        Create,
        Detach,
        DetachDomain,
        Launch,
        Remove,
        Stop,
    )
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
    from mdev_orchestrator.machine import Machine
    from mdev_orchestrator.model import Host, Mdev, MdevType, Parent, StartGroup
    from mdev_orchestrator.qemu.hotplug import Plugged
    from mdev_orchestrator.qemu.process import ProcessRecord, RunningGuest
    from mdev_orchestrator.qemu.status import GuestState, Report
    from mdev_orchestrator.qemu.stop import Ended
    from mdev_orchestrator.spec import (
        Document,
        GuestConfig,
        GuestMdev,
        Pool,
        Size,
        Spec,
        load,
        parse,
    )

__version__ = "0.1.0"

_PLACES = {
    "Adopted": "engine.adopt",
    "AnyStep": "engine.steps",
    "Attach": "engine.steps",
    "AttachDomain": "engine.steps",
    "Attached": "engine.attach",
    "BusyError": "errors",
    "CapacityError": "errors",
    "Change": "engine.records",
    "Changes": "engine.diff",
    "CommandError": "errors",
    "Create": "engine.steps",
    "DeadlineError": "errors",
    "Detach": "engine.steps",
    "DetachDomain": "engine.steps",
    "DeviceRecord": "engine.records",
    "Document": "spec",
    "Ended": "qemu.stop",
    "Event": "host.events",
    "Existing": "engine.device_requests",
    "ForeignGuest": "engine.foreign",
    "GuestConfig": "spec",
    "GuestMdev": "spec",
    "GuestRecord": "engine.records",
    "GuestState": "qemu.status",
    "Host": "model",
    "HostError": "errors",
    "Launch": "engine.steps",
    "Machine": "machine",
    "Managed": "engine.records",
    "Mdev": "model",
    "MdevEvent": "host.events",
    "MdevType": "model",
    "MdoError": "errors",
    "MisfitError": "engine.placement",
    "NodeEvent": "host.events",
    "Observer": "engine.executor",
    "OpenMachine": "library",
    "Outcome": "errors",
    "Parent": "model",
    "ParentCapacity": "capacity.models",
    "ParentEvent": "host.events",
    "ParentPlan": "capacity.planner",
    "Placement": "capacity.planner",
    "Plan": "capacity.planner",
    "PlannedStep": "engine.executor",
    "Plugged": "qemu.hotplug",
    "Policy": "capacity.planner",
    "Pool": "spec",
    "PoweredDown": "engine.restore",
    "Preview": "engine.diff",
    "Probed": "engine.probe",
    "ProcessRecord": "qemu.process",
    "QemuError": "errors",
    "Recovered": "engine.recovery",
    "Remove": "engine.steps",
    "Report": "qemu.status",
    "RequestError": "errors",
    "Rescan": "host.events",
    "Restored": "engine.restore",
    "Run": "engine.journal",
    "RunningGuest": "qemu.process",
    "Shortfall": "capacity.planner",
    "Size": "spec",
    "Spec": "spec",
    "SpecRecord": "engine.records",
    "StartGroup": "model",
    "StepEvent": "engine.executor",
    "StepEventKind": "engine.executor",
    "Stop": "engine.steps",
    "UnknownError": "errors",
    "UuidError": "errors",
    "load": "spec",
    "open": "library",
    "parse": "spec",
}

__all__ = [
    "Adopted",
    "AnyStep",
    "Attach",
    "AttachDomain",
    "Attached",
    "BusyError",
    "CapacityError",
    "Change",
    "Changes",
    "CommandError",
    "Create",
    "DeadlineError",
    "Detach",
    "DetachDomain",
    "DeviceRecord",
    "Document",
    "Ended",
    "Event",
    "Existing",
    "ForeignGuest",
    "GuestConfig",
    "GuestMdev",
    "GuestRecord",
    "GuestState",
    "Host",
    "HostError",
    "Launch",
    "Machine",
    "Managed",
    "Mdev",
    "MdevEvent",
    "MdevType",
    "MdoError",
    "MisfitError",
    "NodeEvent",
    "Observer",
    "OpenMachine",
    "Outcome",
    "Parent",
    "ParentCapacity",
    "ParentEvent",
    "ParentPlan",
    "Placement",
    "Plan",
    "PlannedStep",
    "Plugged",
    "Policy",
    "Pool",
    "PoweredDown",
    "Preview",
    "Probed",
    "ProcessRecord",
    "QemuError",
    "Recovered",
    "Remove",
    "Report",
    "RequestError",
    "Rescan",
    "Restored",
    "Run",
    "RunningGuest",
    "Shortfall",
    "Size",
    "Spec",
    "SpecRecord",
    "StartGroup",
    "StepEvent",
    "StepEventKind",
    "Stop",
    "UnknownError",
    "UuidError",
    "load",
    "open",
    "parse",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401 - each name has a type of its own
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"{__name__}.{_PLACES[name]}")
    return getattr(module, "open_machine" if name == "open" else name)
