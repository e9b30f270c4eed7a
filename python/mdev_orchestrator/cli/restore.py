# SPDX-License-Identifier: GPL-2.0-or-later
"""``mdo restore``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from mdev_orchestrator.cli import output
from mdev_orchestrator.cli.context import run
from mdev_orchestrator.cli.params import Json, seconds

if TYPE_CHECKING:
    from mdev_orchestrator.engine.restore import Restored


def restore(
    spec: Annotated[
        list[str] | None, typer.Argument(metavar="NAME...", help="Specs; all if none is named.")
    ] = None,
    *,
    wait: Annotated[float, seconds("Seconds to wait for parents that are not there yet.")] = 60.0,
    json: Json = False,
) -> int:
    """Bring back every spec that was applied: devices with their UUIDs, and guests.

    Ends with 1 if one of them could not be brought back; the others are nevertheless.
    """
    from mdev_orchestrator.engine.restore import restore as engine_restore

    done = run(
        lambda machine: engine_restore(machine, spec or [], wait=wait, observe=output.progress)
    )
    if json:
        output.emit_json({"specs": [shape(one) for one in done]})
    else:
        for one in done:
            if one.changes is not None:
                count = len(one.changes.steps)
                words = f"back, {count} step{'s' * (count > 1)}" if count else "nothing to do"
                output.emit(f"{one.name}: {words}")
        if not done:
            output.emit("no spec was applied")
    return output.report_failed(one.error for one in done)


def shape(one: Restored) -> dict[str, Any]:
    """The documented JSON shape of a spec that was to be restored."""
    from mdev_orchestrator.cli.apply import shape as changes_shape

    changes = None if one.changes is None else changes_shape(one.changes)["changes"]
    return {
        "spec": one.name,
        "changes": changes,
        "error": None if one.error is None else one.error.message,
    }
