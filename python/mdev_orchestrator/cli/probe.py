# SPDX-License-Identifier: GPL-2.0-or-later
"""``mdo probe``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from mdev_orchestrator.cli import output
from mdev_orchestrator.cli.context import run
from mdev_orchestrator.cli.params import Json, complete_parent
from mdev_orchestrator.engine.probe import TOGETHER, Candidates, Probed, candidates
from mdev_orchestrator.engine.probe import probe as learn
from mdev_orchestrator.errors import RequestError
from mdev_orchestrator.machine import Machine


def probe(
    parents: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PARENT...",
            help="Parents; all that have no devices if none is named.",
            autocompletion=complete_parent,
        ),
    ] = None,
    *,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    json: Json = False,
) -> None:
    """Learn how parents fill, by creating devices on them and removing them again.

    What is learned is remembered for all parents of that kind. Refuses a parent that has devices.
    """
    chosen = run(lambda machine: candidates(machine, parents or ()))
    names = [parent.name for parent in chosen.idle]
    _announce(chosen, yes=yes)
    found = run(lambda machine: _all(machine, names))
    if json:
        output.emit_json(
            {"parents": [shape(probed) for probed in found], "in_use": list(chosen.busy)}
        )
    else:
        _show(found)
    for probed in found:
        if not probed.learned and probed.created:
            output.remark(f"nothing was learned of {probed.after.name}: {probed.after.why}")


async def _all(machine: Machine, names: Sequence[str]) -> list[Probed]:
    return [await learn(machine, name) for name in names]


def _announce(chosen: Candidates, *, yes: bool) -> None:
    """Say what will happen, and ask for permission.

    :raise RequestError: Standard input is no terminal, and ``yes`` is false.
    :raise SystemExit: The answer is no.
    """
    if chosen.busy:
        output.remark(f"left out, since they have devices: {', '.join(chosen.busy)}")
    most = max(len(parent.types) for parent in chosen.idle) + TOGETHER
    names = ", ".join(parent.name for parent in chosen.idle)
    what = f"up to {most} devices will be created and removed again on each of: {names}"
    output.remark(f"{what}; use nothing of them meanwhile")
    if yes:
        return
    if not sys.stdin.isatty():
        raise RequestError("mdo probe creates and removes devices", "--yes says that it may")
    output.confirm("Go on?")


def shape(probed: Probed) -> dict[str, Any]:
    """The documented JSON shape of what was learned of a parent."""
    return {
        "name": probed.after.name,
        "model": probed.after.model.name,
        "confidence": str(probed.after.confidence),
        "why": probed.after.why,
        "before": {
            "model": probed.before.model.name,
            "confidence": str(probed.before.confidence),
        },
        "created": probed.created,
        "learned": probed.learned,
        "types": [
            {"id": type_, "holds": count} for type_, count in probed.after.remaining().items()
        ],
    }


def _show(found: Sequence[Probed]) -> None:
    output.emit_table(
        "Learned",
        ("parent", "model before", "model now", "created and removed"),
        [
            (
                probed.after.name,
                f"{probed.before.model.name} ({probed.before.confidence})",
                f"{probed.after.model.name} ({probed.after.confidence})",
                str(probed.created),
            )
            for probed in found
        ],
        whole={"parent"},
    )
