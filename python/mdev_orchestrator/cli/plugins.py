# SPDX-License-Identifier: GPL-2.0-or-later
"""Groups of commands that other installed distributions add to ``mdo``.

Each is an entry point: its name is the group's, and it leads to a module with ``COMMANDS``, the
function of each command, and ``TEXT``, what the group is for. The only one so far is ``lab`` of the
distribution ``mdev-lab``, which tools/setup installs in a checkout.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points

from mdev_orchestrator.cli.options import Group
from mdev_orchestrator.errors import HostError

ENTRY_POINTS = "mdev_orchestrator.commands"


def installed() -> dict[str, str]:
    """Return what each installed group is for, by the group's name."""
    return {point.name: _load(point).text for point in entry_points(group=ENTRY_POINTS)}


def find(name: str) -> Group | None:
    """Return the group that ``mdo NAME`` calls; ``None`` if no distribution adds it.

    :raise HostError: It is the lab's, which is not installed.
    """
    for point in entry_points(group=ENTRY_POINTS, name=name):
        return _load(point)
    if name == "lab":
        raise HostError("mdo lab needs a checkout of the project", "run it from there: make setup")
    return None


def _load(point: EntryPoint) -> Group:
    module = point.load()
    return Group(module.COMMANDS, f"mdo {point.name}", module.TEXT)
