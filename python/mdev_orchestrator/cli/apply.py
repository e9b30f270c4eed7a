# SPDX-License-Identifier: GPL-2.0-or-later
"""``mdo apply``, ``mdo diff`` and ``mdo destroy``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from mdev_orchestrator.cli import output
from mdev_orchestrator.cli.context import run
from mdev_orchestrator.cli.params import Json, seconds
from mdev_orchestrator.cli.plan import Policy, policy_of
from mdev_orchestrator.spec import load

if TYPE_CHECKING:
    from mdev_orchestrator.engine.diff import Changes

SpecArgument = Annotated[
    str, typer.Argument(metavar="SPEC", help="TOML or JSON file, - for stdin.")
]
PolicyOption = Annotated[
    Policy,
    typer.Option(metavar="pack|spread", help="Fill parents one after the other, or all alike."),
]


def apply(
    spec: SpecArgument,
    *,
    restart: Annotated[
        bool, typer.Option("--restart", help="Restart guests where a change needs it.")
    ] = False,
    force: Annotated[
        bool,
        typer.Option("--force", help="End guests that must stop and do not power down in time."),
    ] = False,
    policy: PolicyOption = Policy.PACK,
    deadline: Annotated[
        float | None,
        seconds("Seconds for each step; a device has 30 and a guest 60 if not given.", least=0.1),
    ] = None,
    json: Json = False,
) -> None:
    """Make a spec true, all of it or nothing; where it is true already, do nothing."""
    from mdev_orchestrator.engine.apply import apply as engine_apply

    document = load(spec)
    changes = run(
        lambda machine: engine_apply(
            machine,
            document,
            policy=policy_of(policy),
            restart=restart,
            force=force,
            deadline=deadline,
            observe=output.progress,
        )
    )
    _result(changes, json=json, word="applied")


def diff(
    spec: SpecArgument,
    *,
    policy: PolicyOption = Policy.PACK,
    exit_code: Annotated[
        bool, typer.Option("--exit-code", help="End with 1 if there is something to do.")
    ] = False,
    json: Json = False,
) -> int:
    """Show what apply would do; changes nothing."""
    from mdev_orchestrator.engine.apply import diff as engine_diff

    document = load(spec)
    changes = run(lambda machine: engine_diff(machine, document, policy=policy_of(policy)))
    if json:
        output.emit_json(shape(changes))
    else:
        for planned in changes.steps:
            output.emit(str(planned.step))
        for name, why in changes.restarts.items():
            output.remark(f"guest {name} needs a restart: {why}")
        if not changes.steps:
            output.remark(f"{changes.name}: nothing to do")
    return 1 if exit_code and changes.steps else 0


def destroy(
    spec: Annotated[
        str, typer.Argument(metavar="SPEC|NAME", help="The file, or the name that it was given.")
    ],
    *,
    force: Annotated[
        bool, typer.Option("--force", help="End guests that do not power down in time.")
    ] = False,
    deadline: Annotated[float, seconds("Seconds for a guest to power down.")] = 60.0,
    json: Json = False,
) -> None:
    """Remove the guests and devices of a spec."""
    from mdev_orchestrator.engine.apply import destroy as engine_destroy

    name = _name(spec)
    changes = run(
        lambda machine: engine_destroy(
            machine, name, force=force, deadline=deadline, observe=output.progress
        )
    )
    _result(changes, json=json, word="destroyed")


def _name(spec: str) -> str:
    """The name of a spec that is given by it, or by its file."""
    from pathlib import Path

    if "/" in spec or spec == "-" or Path(spec).suffix in {".toml", ".json"}:
        return load(spec).name
    return spec


def _result(changes: Changes, *, json: bool, word: str) -> None:
    count = len(changes.steps)
    made = f"{changes.name}: {word}, {count} step{'s' * (count > 1)}" if count else ""
    if json:
        output.emit_json(shape(changes), made=made)
    else:
        output.emit(made or f"{changes.name}: nothing to do", made=made)


def shape(changes: Changes) -> dict[str, Any]:
    """The documented JSON shape of changes."""
    from mdev_orchestrator.engine.steps import Attach, Create, Detach, Launch, Remove, Stop

    def step(number: int) -> dict[str, Any]:
        planned = changes.steps[number]
        done = planned.step
        device = done.device if isinstance(done, Create | Remove) else None
        guest = done.guest.name if isinstance(done, Launch | Stop | Attach | Detach) else None
        uuid = device.uuid if device is not None else getattr(done, "uuid", None)
        return {
            "do": type(done).__name__.lower(),
            "guest": guest,
            "uuid": None if uuid is None else str(uuid),
            "type": device.type if device is not None else None,
            "parent": device.parent if device is not None else None,
            "needs": list(planned.needs),
        }

    return {
        "spec": changes.name,
        "changes": [step(number) for number in range(len(changes.steps))],
        "restarts": [{"guest": name, "reason": why} for name, why in changes.restarts.items()],
    }
