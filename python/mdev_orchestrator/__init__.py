# SPDX-License-Identifier: GPL-2.0-or-later
"""Creates mediated devices, launches QEMU guests with them and drives their hotplug.

What ``mdo`` does, as a library (docs/library.md)::

    import asyncio
    import mdev_orchestrator as mdo

    changes = asyncio.run(mdo.apply(mdo.load("lab.toml")))

Nothing is imported before it is asked for: who only scans the host does not load QEMU's protocol.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mdev_orchestrator.engine.apply import apply, destroy, diff
    from mdev_orchestrator.engine.attach import attach, detach
    from mdev_orchestrator.engine.devices import create_devices, remove_devices
    from mdev_orchestrator.engine.recovery import adopt
    from mdev_orchestrator.engine.restore import power_down, restore
    from mdev_orchestrator.errors import MdoError
    from mdev_orchestrator.host.events import events
    from mdev_orchestrator.host.sysfs import scan
    from mdev_orchestrator.spec import load, parse

__version__ = "0.1.0"

_PLACES = {
    "MdoError": "errors",
    "adopt": "engine.recovery",
    "apply": "engine.apply",
    "attach": "engine.attach",
    "create_devices": "engine.devices",
    "destroy": "engine.apply",
    "detach": "engine.attach",
    "diff": "engine.apply",
    "events": "host.events",
    "load": "spec",
    "parse": "spec",
    "power_down": "engine.restore",
    "remove_devices": "engine.devices",
    "restore": "engine.restore",
    "scan": "host.sysfs",
}

__all__ = [
    "MdoError",
    "adopt",
    "apply",
    "attach",
    "create_devices",
    "destroy",
    "detach",
    "diff",
    "events",
    "load",
    "parse",
    "power_down",
    "remove_devices",
    "restore",
    "scan",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401 - whatever the name stands for
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
