# SPDX-License-Identifier: GPL-2.0-or-later
"""``mdo plan``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Annotated, Any, Literal

import typer

from mdev_orchestrator.capacity.models import Confidence
from mdev_orchestrator.capacity.planner import ParentPlan, Plan
from mdev_orchestrator.cli import output
from mdev_orchestrator.cli.context import run
from mdev_orchestrator.cli.params import Json
from mdev_orchestrator.engine.apply import preview
from mdev_orchestrator.engine.device_requests import Existing
from mdev_orchestrator.engine.placement import MisfitError
from mdev_orchestrator.spec import Document, GuestMdev, key, load


class Policy(StrEnum):
    """How devices are placed where several parents offer the type."""

    PACK = "pack"
    SPREAD = "spread"


def policy_of(policy: Policy) -> Literal["pack", "spread"]:
    """The planner's word for a policy."""
    return "spread" if policy is Policy.SPREAD else "pack"


def plan(
    spec: Annotated[str, typer.Argument(metavar="SPEC", help="TOML or JSON file, - for stdin.")],
    *,
    policy: Annotated[
        Policy,
        typer.Option(metavar="pack|spread", help="Fill parents one after the other, or all alike."),
    ] = Policy.PACK,
    json: Json = False,
) -> None:
    """Show where the devices of a spec would go and what capacity would remain; changes nothing.

    Ends with 0 when all fit, with 2 when not.
    """
    document = load(spec)
    error: MisfitError | None = None
    try:
        found = run(lambda machine: preview(machine, document, policy=policy_of(policy)))
    except MisfitError as misfit:
        error, answer, existing = misfit, misfit.plan, misfit.existing
    else:
        answer, existing = found.plan, found.existing
    if json:
        output.emit_json(shape(document, existing, answer))
    else:
        _show(document, existing, answer)
    _say_doubts(answer)
    if error is not None:
        raise error


def shape(document: Document, existing: Sequence[Existing], answer: Plan) -> dict[str, Any]:
    """The documented JSON shape of a plan."""
    owners = _owners(document)
    return {
        "fits": answer.fits,
        "proven": answer.proven,
        "policy": answer.policy,
        "existing": [
            {
                "request": device.request,
                **owners[device.request],
                "uuid": str(device.uuid),
                "parent": device.parent,
                "type": device.type_id,
            }
            for device in existing
        ],
        "placements": [
            {
                "request": placement.request,
                **owners[placement.request],
                "parent": placement.parent,
                "type": placement.type_id,
            }
            for placement in answer.placements
        ],
        "shortfalls": [
            {
                "request": shortfall.request,
                **owners[shortfall.request],
                "asked": shortfall.asked,
                "placed": shortfall.placed,
                "reason": shortfall.reason,
                "hint": shortfall.hint,
            }
            for shortfall in answer.shortfalls
        ],
        "parents": [_parent_shape(parent) for parent in answer.parents],
    }


def _parent_shape(parent: ParentPlan) -> dict[str, Any]:
    capacity = parent.capacity
    return {
        "name": capacity.name,
        "model": capacity.model.name,
        "confidence": str(capacity.confidence),
        "why": capacity.why,
        "types": [
            {
                "id": type_,
                "used_before": parent.used_before[type_],
                "used_after": parent.used_after[type_],
                "available_before": _known(parent, type_, parent.available_before),
                "available_after": _known(parent, type_, parent.available_after),
            }
            for type_ in capacity.types
        ],
    }


def _known(parent: ParentPlan, type_: str, numbers: Mapping[str, int]) -> int | None:
    return None if type_ in parent.capacity.unreadable else numbers[type_]


def _owners(document: Document) -> dict[str, dict[str, str | None]]:
    """For each request the guest or pool that it is for, and its group."""
    return {
        key(place): {
            "guest": owner if isinstance(devices, GuestMdev) else None,
            "pool": None if isinstance(devices, GuestMdev) else owner,
            "group": devices.group if isinstance(devices, GuestMdev) else None,
        }
        for place, owner, devices in document.spec.devices()
    }


def _show(document: Document, existing: Sequence[Existing], answer: Plan) -> None:
    owners = _owners(document)

    def words(request: str) -> tuple[str, str]:
        owner = owners[request]
        name = owner["guest"] or f"pool {owner['pool']}"
        return name, owner["group"] or ""

    placed = Counter(
        (*words(placement.request), placement.type_id, placement.parent)
        for placement in answer.placements
    )
    there = [
        (*words(device.request), device.type_id, device.parent, f"exists: {device.uuid}")
        for device in existing
    ]
    output.emit_table(
        "Devices" if answer.fits else "Devices that would fit",
        ("for", "group", "type", "parent", "devices"),
        there + [(*where, str(count)) for where, count in placed.items()],
        whole={"for", "type", "parent", "devices"},
    )
    if placed or there:
        output.emit("")
    output.emit_table(
        "Does not fit",
        ("for", "group", "asked", "placed", "reason", "remedy"),
        [
            (*words(s.request), str(s.asked), str(s.placed), s.reason, s.hint)
            for s in answer.shortfalls
        ],
        whole={"for"},
    )
    if answer.shortfalls:
        output.emit("")
    output.emit_table(
        "Capacity",
        ("parent", "type", "used", "free", "model"),
        [
            (
                parent.capacity.name,
                type_,
                _change(parent.used_before[type_], parent.used_after[type_]),
                _change(
                    _known(parent, type_, parent.available_before),
                    _known(parent, type_, parent.available_after),
                ),
                f"{parent.capacity.model.name} ({parent.capacity.confidence})",
            )
            for parent in answer.parents
            for type_ in parent.capacity.types
        ],
        whole={"parent", "type"},
    )


def _change(before: int | None, after: int | None) -> str:
    if before is None or after is None:
        return "?"
    return str(before) if before == after else f"{before} -> {after}"


def _say_doubts(answer: Plan) -> None:
    """Name the parents of which the answer is a guess."""
    used = {placement.parent for placement in answer.placements}
    for parent in answer.parents:
        capacity = parent.capacity
        if capacity.name in used and capacity.confidence is Confidence.GUESSED:
            output.remark(f"what remains on {capacity.name} is a guess: {capacity.why}")
