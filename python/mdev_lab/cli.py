# SPDX-License-Identifier: GPL-2.0-or-later
"""``mdo lab``: the nested machine.

The entry point ``lab`` of the group ``mdev_orchestrator.commands`` leads to :data:`app`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mdev_orchestrator.cli import output
from mdev_orchestrator.cli.params import Json
from mdev_orchestrator.cli.tree import noun

if TYPE_CHECKING:
    from mdev_lab.demo import Row

Name = Annotated[str, typer.Option("--name", metavar="NAME", help="Which lab; several can be up.")]
Series = Annotated[
    str,
    typer.Option(
        "--kernel",
        metavar="SERIES",
        help="Kernel series of L1: 6.12; 6.1 or 7.3, as Debian has it; 6.12-debug with checkers.",
    ),
]
Memory = Annotated[str, typer.Option(metavar="SIZE", help="Memory of L1.")]
Options = Annotated[
    str,
    typer.Option(
        "--mvgpu",
        metavar="PARAMETERS",
        help="Parameters of the driver, for instance 'igd_parents=4'.",
    ),
]
Pci = Annotated[
    int,
    typer.Option(
        "--pci",
        min=0,
        max=2,
        metavar="N",
        help="Parents of each kind that are PCI functions, up to 2; the others are left out.",
    ),
]
Iommufd = Annotated[
    bool,
    typer.Option("--iommufd", help="Build VFIO with iommufd, which Debian's kernels lack."),
]
Command = Annotated[
    list[str],
    typer.Argument(metavar="COMMAND...", help="The command and its arguments."),
]

OTHERS_WORDS = {"allow_interspersed_args": False}
"""Settings of a command that runs another: what follows the other's name is not read."""

app = noun("A nested machine to try everything in.")


def _progress(line: str) -> None:
    output.write_error(f"lab: {line}\n")


@contextmanager
def _signals_unwind() -> Iterator[None]:
    """End the block by an exception on SIGTERM and SIGHUP, so that the lab ends with it."""
    import signal

    def unwind(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    old = {number: signal.signal(number, unwind) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


@app.command("up")
def up(
    name: Name = "default",
    series: Series = "6.12",
    memory: Memory = "4G",
    mvgpu: Options = "",
    pci: Pci = 0,
    iommufd: Iommufd = False,
    systemd: Annotated[
        Path | None,
        typer.Option(metavar="DISK", help="L1 boots systemd; what is written stays in this file."),
    ] = None,
) -> None:
    """Bring a lab up; it stays until 'mdo lab down'."""
    from mdev_lab import l1

    lab = l1.up(
        name,
        series=series,
        memory=memory,
        module_options=mvgpu,
        pci=pci,
        iommufd=iommufd,
        disk=systemd,
        progress=_progress,
    )
    output.emit(f"lab {lab.name} is up with kernel {lab.release}")


@app.command("exec", context_settings=OTHERS_WORDS)
def execute(
    command: Command,
    name: Name = "default",
    tty: Annotated[bool, typer.Option("--tty", "-t", help="Give it a terminal.")] = False,
) -> int:
    """Run a command inside; input, output, signals and exit status pass through."""
    from mdev_lab import l1, labs

    return l1.execute(labs.find(name), command, terminal=tty)


@app.command("run", context_settings=OTHERS_WORDS)
def run(
    command: Command,
    name: Name = "run",
    series: Series = "6.12",
    memory: Memory = "4G",
    mvgpu: Options = "",
    pci: Pci = 0,
    iommufd: Iommufd = False,
) -> int:
    """Run one command in a lab of its own, which ends with it."""
    from mdev_lab import l1

    with (
        _signals_unwind(),
        l1.running(
            name,
            series=series,
            memory=memory,
            module_options=mvgpu,
            pci=pci,
            iommufd=iommufd,
            progress=_progress,
        ) as lab,
    ):
        return l1.execute(lab, command)


@app.command("shell")
def shell(name: Name = "default") -> int:
    """Open a shell inside."""
    from mdev_lab import l1, labs

    return l1.execute(labs.find(name), ["bash", "-i"], terminal=sys.stdin.isatty())


@app.command("status")
def status(json: Json = False) -> None:
    """List the labs that are up."""
    from dataclasses import asdict

    from mdev_lab import labs

    found = labs.find_all()
    if json:
        rows = [asdict(lab) | {"directory": lab.directory} for lab in found]
        output.emit_json({"labs": rows})
        return
    output.emit_table(
        "Labs",
        ("name", "kernel", "accel", "pid", "directory"),
        [(lab.name, lab.release, lab.accel, str(lab.pid), str(lab.directory)) for lab in found],
        whole={"name", "kernel"},
    )
    if not found:
        output.remark("no lab is up")


@app.command("down")
def down(
    name: Name = "default",
    every: Annotated[bool, typer.Option("--all", help="Every lab.")] = False,
) -> None:
    """End a lab; a second time does nothing."""
    from mdev_lab import labs

    chosen = labs.find_all() if every else [labs.lookup(name)]
    for lab in chosen:
        if lab is not None:
            labs.down(lab)


@app.command("demo")
def demo(
    series: Series = "6.12",
    json: Json = False,
    svg: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write the closing table as a picture.")
    ] = None,
) -> int:
    """Run the main job from end to end in a lab of its own, and show the result of each step."""
    from mdev_lab.demo import demo as run_demo

    def ended(row: Row) -> None:
        mark = "ok" if row.ok else "FAILED"
        output.write_error(f"{mark:>6}  {row.seconds:6.1f} s  {row.step}: {row.result}\n")

    def doing(line: str) -> None:
        output.write_error(f"   ...            {line}\n")

    with _signals_unwind():
        rows, status = run_demo(series, row=ended, doing=doing)
    if json:
        output.emit_json({"kernel": series, "ok": status == 0, "steps": rows})
    else:
        output.emit_table("What was done", HEADERS, [_cells(row) for row in rows])
    if svg:
        _draw(rows, svg)
    return status


HEADERS = ("step", "result", "seconds", "")


def _cells(row: Row) -> tuple[str, str, str, str]:
    return row.step, row.result, f"{row.seconds:.1f}", "ok" if row.ok else "FAILED"


def _draw(rows: list[Row], target: Path) -> None:
    from io import StringIO

    from rich.console import Console
    from rich.table import Table

    table = Table(*HEADERS)
    for row in rows:
        table.add_row(*_cells(row))
    console = Console(record=True, width=120, file=StringIO())
    console.print(table)
    console.save_svg(str(target), title="make demo")
