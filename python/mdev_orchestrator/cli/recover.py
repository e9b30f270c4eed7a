# SPDX-License-Identifier: GPL-2.0-or-later
"""``mdo recover`` and ``mdo adopt``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from mdev_orchestrator.cli import output
from mdev_orchestrator.cli.options import Argument, Option

if TYPE_CHECKING:
    from mdev_orchestrator.engine.recovery import Adopted, Recovered

JsonOption = Annotated[bool, Option("--json", help="One JSON document.")]


def recover(
    *,
    dry_run: Annotated[
        bool, Option("--dry-run", help="Say what would be done; changes nothing.")
    ] = False,
    json: JsonOption = False,
) -> int:
    """Undo or finish what a command that was killed left open.

    Ends with 1 if something could not be undone.
    """
    done = output.run(_recover(dry_run=dry_run))
    if json:
        output.emit_json({"dry_run": dry_run, "runs": [_shape(run) for run in done]})
    else:
        for run in done:
            verb = {"undo": "undone", "finish": "finished", "forget": "forgotten"}[run.way]
            count = len(run.steps)
            words = f"{count} step{'s' * (count != 1)}"
            output.emit(
                f"{run.run}: {words} to {run.way}" if dry_run else f"{run.run}: {words} {verb}"
            )
            if run.why:
                output.emit(f"  since it could not be finished: {run.why}")
            for step in run.steps:
                output.emit(f"  {step}")
        if not done:
            output.emit("nothing stands open")
    for run in done:
        for error in run.errors:
            output.say_error(error)
    return 1 if any(run.errors for run in done) else 0


async def _recover(*, dry_run: bool) -> list[Recovered]:
    from mdev_orchestrator.engine import recovery
    from mdev_orchestrator.engine.context import Context
    from mdev_orchestrator.engine.journal import Journal
    from mdev_orchestrator.engine.lifecycle import reclaim_groups
    from mdev_orchestrator.state import journal_path

    if dry_run and not journal_path().exists():
        return []
    with Journal.open() as journal:
        if dry_run:
            return recovery.pending(journal)
        done = await recovery.recover(
            journal,
            context=Context(host=output.host_root()),
            observe=output.progress,
            again=True,
        )
        for swept in await reclaim_groups(host=output.host_root()):
            output.say(str(swept))
        return done


def _shape(run: Recovered) -> dict[str, Any]:
    return {
        "command": run.run.kind,
        "title": run.run.title,
        "pid": run.run.process.pid,
        "began": run.run.began,
        "way": run.way,
        "why": run.why or None,
        "steps": list(run.steps),
        "errors": [error.message for error in run.errors],
    }


def adopt(
    what: Annotated[
        list[str] | None, Argument(metavar="GUEST|UUID...", help="Guests and devices.")
    ] = None,
    *,
    all_: Annotated[
        bool,
        Option("--all", help="All guests of this state directory, and the devices they have."),
    ] = False,
    json: JsonOption = False,
) -> None:
    """Make guests and devices ours that the journal does not know, or does not know any more."""
    from mdev_orchestrator.engine.recovery import adopt as engine_adopt
    from mdev_orchestrator.errors import RequestError

    if bool(what) == all_:
        raise RequestError("nothing to adopt was named", "name guests and UUIDs, or --all")
    done: Adopted = output.run(engine_adopt(what or [], everything=all_, host=output.host_root()))
    if json:
        output.emit_json(
            {"guests": list(done.guests), "devices": [str(uuid) for uuid in done.devices]}
        )
        return
    for name in done.guests:
        output.emit(f"guest {name} is ours")
    for uuid in done.devices:
        output.emit(f"mdev {uuid} is ours")
