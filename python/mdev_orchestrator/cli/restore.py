# SPDX-License-Identifier: GPL-2.0-or-later
"""``mdo restore``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from mdev_orchestrator.cli import output
from mdev_orchestrator.cli.options import Argument, Option

if TYPE_CHECKING:
    from mdev_orchestrator.engine.restore import Restored


def restore(
    spec: Annotated[
        list[str] | None, Argument(metavar="NAME...", help="Specs; all without any.")
    ] = None,
    *,
    wait: Annotated[
        float, Option(min=0, help="Seconds to wait for parents that are not there yet.")
    ] = 60.0,
    json: Annotated[bool, Option("--json", help="One JSON document.")] = False,
) -> int:
    """Bring back every spec that was applied: devices with their UUIDs, and guests.

    Ends with 1 if one of them could not be brought back; the others are nevertheless.
    """
    from mdev_orchestrator.engine.restore import restore as engine_restore

    done = output.run(
        engine_restore(spec or [], wait=wait, host=output.host_root(), observe=output.progress)
    )
    if json:
        output.emit_json({"specs": [_shape(one) for one in done]})
    else:
        for one in done:
            if one.changes is not None:
                count = len(one.changes.steps)
                words = f"back, {count} step{'s' * (count > 1)}" if count else "nothing to do"
                output.emit(f"{one.name}: {words}")
        if not done:
            output.emit("no spec was applied")
    for one in done:
        if one.error is not None:
            output.say_error(one.error)
    return 1 if any(one.error for one in done) else 0


def _shape(one: Restored) -> dict[str, Any]:
    from mdev_orchestrator.cli.apply import shape

    changes = None if one.changes is None else shape(one.changes)["changes"]
    return {
        "spec": one.name,
        "changes": changes,
        "error": None if one.error is None else one.error.message,
    }
