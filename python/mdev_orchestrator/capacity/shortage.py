# SPDX-License-Identifier: GPL-2.0-or-later
"""The one error for devices of a type that do not fit. Pure: no I/O."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mdev_orchestrator.capacity.planner import ParentPlan, Plan, Request
from mdev_orchestrator.errors import CapacityError

_LISTED = 8  # types that fit one line


def capacity_error(answer: Plan, requests: Sequence[Request]) -> CapacityError:
    """The error for a plan that does not fit, before anything was created.

    It is about the first request that does not fit: what is left where the request names a type
    and a parent, else the planner's reason.

    A type whose count cannot be read never fits a plan (:attr:`.ParentCapacity.unreadable`), while
    the driver may well create one: a caller that can ask the driver need not plan such a type.

    :param answer: With at least one shortfall.
    :param requests: Those that were planned.
    """
    shortfall = answer.shortfalls[0]
    request = next(one for one in requests if one.key == shortfall.request)
    others = len(answer.shortfalls) - 1
    noun = "request does" if others == 1 else "requests do"
    more = f"; {others} more {noun} not fit" if others else ""
    parent = next(
        (
            one
            for one in answer.parents
            if one.capacity.name == request.parent and request.type_id in one.capacity.types
        ),
        None,
    )
    if parent is None or request.type_id is None:
        return CapacityError(
            f"{request} do not fit: {shortfall.reason}{more}; nothing was created", shortfall.hint
        )
    type_, name = request.type_id, parent.capacity.name
    available = parent.available_before[type_]
    if available >= request.count:  # not by itself, but beside the others
        return CapacityError(
            f"{request.count} of {type_} do not fit on {name}: {shortfall.reason}{more}; "
            "nothing was created",
            shortfall.hint,
        )
    if available:
        return CapacityError(
            f"{request.count} of {type_} do not fit on {name}: {available} would{more}; "
            "nothing was created",
            f"-n {available}",
        )
    fits = _some(f"{n} of {id_}" for id_, n in parent.available_before.items() if n)
    return CapacityError(
        f"no instance of {type_} is left on {name}: in use there {_in_use(parent)}{more}; "
        "nothing was created",
        f"{fits} would fit instead" if fits else "remove a device first",
    )


def _in_use(parent: ParentPlan) -> str:
    words = [f"{n} of {type_}" for type_, n in parent.used_before.items() if n]
    if parent.capacity.unseen:
        words.append(f"{parent.capacity.unseen} being removed")
    return _some(words) or "nothing"


def _some(words: Iterable[str]) -> str:
    listed = list(words)
    more = len(listed) - _LISTED
    return ", ".join(listed[:_LISTED]) + (f" and {more} more" if more > 0 else "")
