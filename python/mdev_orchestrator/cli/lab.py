# SPDX-License-Identifier: GPL-2.0-or-later
"""``mdo lab``: the nested machine."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="The nested machine that runs everything for real.")

Name = Annotated[str, typer.Option("--name", help="Which lab; several can be up.")]
Series = Annotated[str, typer.Option("--kernel", help="Kernel series of L1: 6.12 or 6.1.")]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]
Memory = Annotated[str, typer.Option(help="Memory of L1.")]
Options = Annotated[
    str, typer.Option("--mvgpu", help="Parameters of the driver, for instance 'igd_parents=4'.")
]


def _progress(line: str) -> None:
    sys.stderr.write(f"lab: {line}\n")


@app.command()
def up(
    name: Name = "default",
    series: Series = "6.12",
    memory: Memory = "4G",
    mvgpu: Options = "",
) -> None:
    """Bring a lab up; it stays until 'mdo lab down'."""
    from mdev_orchestrator.lab import machine

    lab = machine.up(name, series=series, memory=memory, module_options=mvgpu, progress=_progress)
    sys.stdout.write(f"lab {lab.name} is up with kernel {lab.release}\n")


@app.command(
    "exec", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False}
)
def execute(
    command: Annotated[list[str], typer.Argument(help="The command and its arguments.")],
    name: Name = "default",
    tty: Annotated[bool, typer.Option("--tty", "-t", help="Give it a terminal.")] = False,
) -> None:
    """Run a command inside; input, output, signals and exit status pass through."""
    from mdev_orchestrator.lab import machine

    raise typer.Exit(machine.execute(machine.find(name), command, terminal=tty))


@app.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
def run(
    command: Annotated[list[str], typer.Argument(help="The command and its arguments.")],
    name: Name = "run",
    series: Series = "6.12",
    memory: Memory = "4G",
    mvgpu: Options = "",
) -> None:
    """Run one command in a lab of its own, which ends with it."""
    from mdev_orchestrator.lab import machine

    with machine.running(
        name, series=series, memory=memory, module_options=mvgpu, progress=_progress
    ) as lab:
        status = machine.execute(lab, command)
    raise typer.Exit(status)


@app.command()
def shell(name: Name = "default") -> None:
    """Open a shell inside."""
    from mdev_orchestrator.lab import machine

    raise typer.Exit(
        machine.execute(machine.find(name), ["bash", "-i"], terminal=sys.stdin.isatty())
    )


@app.command()
def status(json: Json = False) -> None:
    """List the labs that are up."""
    from dataclasses import asdict

    from mdev_orchestrator.lab import machine

    labs = machine.labs()
    if json:
        from json import dumps

        rows = [asdict(lab) | {"directory": str(lab.directory)} for lab in labs]
        sys.stdout.write(dumps({"labs": rows}) + "\n")
        return
    for lab in labs:
        sys.stdout.write(f"{lab.name}  {lab.release}  {lab.accel}  pid {lab.pid}\n")
    if not labs:
        sys.stdout.write("no lab is up\n")


@app.command()
def down(
    name: Name = "default",
    every: Annotated[bool, typer.Option("--all", help="Every lab.")] = False,
) -> None:
    """End a lab; a second time does nothing."""
    from mdev_orchestrator.lab import machine

    for lab in machine.labs():
        if every or lab.name == name:
            machine.down(lab)
