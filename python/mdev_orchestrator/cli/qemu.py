# SPDX-License-Identifier: GPL-2.0-or-later
"""``mdo qemu``: a QEMU with our patches."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mdev_orchestrator.cli import output
from mdev_orchestrator.cli.params import Json
from mdev_orchestrator.cli.tree import noun

Series = Annotated[
    str, typer.Option("--series", metavar="SERIES", help="Series of QEMU: 10.0 or 10.2.")
]


app = noun("Build a QEMU that starts and stops groups itself.")


@app.command("build")
def build(
    series: Series = "10.0",
    source: Annotated[
        Path | None,
        typer.Option(
            metavar="DIRECTORY", help="A source tree to take instead of Debian's; it is copied."
        ),
    ] = None,
    jobs: Annotated[
        int, typer.Option(min=0, metavar="N", help="Compilers at a time; 0: one a processor.")
    ] = 0,
) -> None:
    """Fetch, patch and build a series; quick when only our files have changed."""
    from mdev_orchestrator.qemu_build import builds

    def progress(line: str) -> None:
        output.write_error(f"qemu {series}: {line}\n")

    done = builds.build(series, source=source, jobs=jobs, progress=progress)
    output.emit(str(done.binary))


@app.command("list")
def list_(
    json: Json = False,
) -> None:
    """List the series that there are patches for, and what is built of them."""
    from mdev_orchestrator.qemu_build import builds, patches

    rows = []
    for series in patches.series_known():
        done = builds.find(series)
        rows.append(
            {
                "series": series,
                "built": done is not None,
                "current": done is not None and done.digest == builds.digest(series),
                "version": done.version if done else None,
                "binary": str(done.binary) if done else None,
                "firmware": str(done.firmware) if done else None,
            }
        )
    if json:
        output.emit_json({"qemus": rows})
        return
    states = {(False, False): "not built", (True, False): "out of date", (True, True): "built"}
    output.emit_table(
        "QEMU",
        ("series", "state", "version", "binary"),
        [
            (
                str(row["series"]),
                states[bool(row["built"]), bool(row["current"])],
                str(row["version"] or "-"),
                str(row["binary"] or "-"),
            )
            for row in rows
        ],
        whole={"series", "version"},
    )


@app.command("export")
def export(
    directory: Annotated[
        Path, typer.Argument(metavar="DIRECTORY", help="Where to write the patches.")
    ],
    series: Series = "10.0",
) -> None:
    """Write the complete series, new files included, for 'git am' or quilt."""
    from mdev_orchestrator.qemu_build import patches

    for path in patches.export(series, directory):
        output.emit(str(path))
