# SPDX-License-Identifier: GPL-2.0-or-later
"""``mdo doctor``."""

from __future__ import annotations

from typing import Annotated

import typer

from mdev_orchestrator.cli import output
from mdev_orchestrator.errors import HostError
from mdev_orchestrator.host.doctor import QEMU, examine


def doctor(
    *,
    qemu: Annotated[str, typer.Option(help="QEMU binary to look at.")] = QEMU,
    json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """Look at modules, nodes, permissions and QEMU; every fault is shown with its remedy."""
    findings = output.run(examine(output.host_root(), qemu))
    if json:
        output.emit_json({"findings": findings})
    else:
        output.emit_table(
            "Findings",
            ("level", "subject", "finding", "remedy"),
            [(f.level, f.subject, f.message, f.remedy) for f in findings],
        )
    if any(finding.level == "fault" for finding in findings):
        raise typer.Exit(HostError.exit_code)
