# SPDX-License-Identifier: GPL-2.0-or-later
"""What fits: how parents fill, and where requests go. Pure functions over one scan of the host.

>>> from mdev_orchestrator.capacity import Request, plan, survey
>>> from mdev_orchestrator.host.sysfs import scan
>>> answer = plan([Request("mine", "mvgpu-12", count=2, group="peers")], survey(scan()))
>>> answer.fits, [placement.parent for placement in answer.placements]  # doctest: +SKIP
(True, ['grid0', 'grid0'])
"""

from mdev_orchestrator.capacity.models import (
    Confidence,
    Look,
    ParentCapacity,
    infer,
    kind_of,
    look,
    observe,
    survey,
)
from mdev_orchestrator.capacity.planner import (
    Placement,
    Plan,
    Request,
    Shortfall,
    plan,
)

__all__ = [
    "Confidence",
    "Look",
    "ParentCapacity",
    "Placement",
    "Plan",
    "Request",
    "Shortfall",
    "infer",
    "kind_of",
    "look",
    "observe",
    "plan",
    "survey",
]
