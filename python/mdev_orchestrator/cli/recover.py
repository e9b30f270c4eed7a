# SPDX-License-Identifier: GPL-2.0-or-later
"""``mdo recover`` and ``mdo adopt``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mdev_orchestrator.cli import output
from mdev_orchestrator.cli.context import run
from mdev_orchestrator.cli.params import Json

if TYPE_CHECKING:
    from mdev_orchestrator.engine.recovery import Recovered
    from mdev_orchestrator.machine import Machine

DONE = {"undo": "undone", "finish": "finished", "close": "closed", "forget": "forgotten"}


def recover(
    *,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done; changes nothing.")
    ] = False,
    json: Json = False,
) -> int:
    """Undo or finish what a command that was killed left open.

    Ends with 1 if something could not be undone.
    """
    done = run(lambda machine: _recover(machine, dry_run=dry_run))
    if json:
        output.emit_json({"dry_run": dry_run, "runs": [shape(recovered) for recovered in done]})
    else:
        for recovered in done:
            _show(recovered, dry_run=dry_run)
        if not done:
            output.emit("nothing is open")
    return output.report_failed(error for recovered in done for error in recovered.errors)


async def _recover(machine: Machine, *, dry_run: bool) -> list[Recovered]:
    from mdev_orchestrator.cli.guest import reclaim_groups
    from mdev_orchestrator.engine import recovery

    if dry_run:
        return await recovery.pending(machine)
    done = await recovery.recover(machine, observe=output.progress)
    await reclaim_groups(machine)
    return done


def _show(recovered: Recovered, *, dry_run: bool) -> None:
    verb = f"to {recovered.way}" if dry_run else DONE[recovered.way]
    if recovered.steps or not recovered.stuck:
        output.emit(f"{recovered.run}: {_count(recovered.steps)} {verb}")
    if recovered.why:
        output.emit(f"  since it could not be finished: {recovered.why}")
    for step in recovered.steps:
        output.emit(f"  {step}")
    if recovered.stuck:
        output.emit(f"{recovered.run}: {_count(recovered.stuck)} could not be {verb}")
    for step in recovered.stuck:
        output.emit(f"  {step}")


def _count(steps: Sequence[str]) -> str:
    return f"{len(steps)} step{'s' * (len(steps) != 1)}"


def shape(recovered: Recovered) -> dict[str, Any]:
    """The documented JSON shape of a run that was recovered."""
    return {
        "command": recovered.run.kind,
        "title": recovered.run.title,
        "pid": recovered.run.process.pid,
        "began": recovered.run.began,
        "way": recovered.way,
        "why": recovered.why or None,
        "steps": list(recovered.steps),
        "stuck": list(recovered.stuck),
        "errors": [error.message for error in recovered.errors],
    }


def adopt(
    what: Annotated[
        list[str] | None,
        typer.Argument(metavar="GUEST|UUID...", help="Guests and devices."),
    ] = None,
    *,
    all_: Annotated[
        bool,
        typer.Option(
            "--all",
            help="All guests of this state directory with their devices, and every device that no "
            "process has open and mdevctl does not define.",
        ),
    ] = False,
    json: Json = False,
) -> None:
    """Take over guests and devices that the journal does not know (any more)."""
    from mdev_orchestrator.engine.adopt import adopt as engine_adopt
    from mdev_orchestrator.errors import RequestError

    if what and all_:
        raise RequestError("--all and names exclude each other", "give the names, or only --all")
    if not what and not all_:
        raise RequestError("nothing to adopt was named", "name guests and UUIDs, or --all")
    done = run(lambda machine: engine_adopt(machine, what or [], everything=all_))
    guests = [f"guest {name} is ours" for name in done.guests]
    devices = [f"mdev {uuid} is ours" for uuid in done.devices]
    made = ", ".join((*guests, *devices))
    if json:
        shape = {"guests": list(done.guests), "devices": [str(uuid) for uuid in done.devices]}
        output.emit_json(shape, made=made)
    elif made:
        output.emit("\n".join((*guests, *devices)), made=made)
