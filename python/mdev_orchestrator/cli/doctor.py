# SPDX-License-Identifier: GPL-2.0-or-later
"""``mdo doctor``."""

from __future__ import annotations

from typing import Annotated

import typer

from mdev_orchestrator.cli import output
from mdev_orchestrator.cli.context import run
from mdev_orchestrator.cli.params import Json
from mdev_orchestrator.engine import foreign
from mdev_orchestrator.errors import HostError
from mdev_orchestrator.host import doctor as host_doctor
from mdev_orchestrator.host.doctor import Finding
from mdev_orchestrator.host.sysfs import scan
from mdev_orchestrator.machine import Machine
from mdev_orchestrator.qemu import doctor as qemu_doctor


def doctor(
    *,
    qemu: Annotated[
        str | None,
        typer.Option(metavar="PROGRAM", help="QEMU binary to examine instead of those here."),
    ] = None,
    json: Json = False,
) -> int:
    """Look at modules, nodes, permissions and QEMU; every fault is shown with its remedy."""
    findings = run(lambda machine: _examine(machine, qemu))
    if json:
        output.emit_json({"findings": findings})
    else:
        output.emit_table(
            "Findings",
            ("level", "subject", "finding", "remedy"),
            [(f.level, f.subject, f.message, f.remedy) for f in findings],
            whole={"level", "subject"},
        )
    faulty = any(finding.level == "fault" for finding in findings)
    return HostError.exit_code if faulty else 0


async def _examine(machine: Machine, qemu: str | None) -> list[Finding]:
    host = await scan(machine)
    found = list(host_doctor.examine(machine, host))
    for program in [qemu] if qemu else [qemu_doctor.QEMU, *_built()]:
        found += await qemu_doctor.examine(program, host.mdevs)
    return [*found, *foreign.examine(machine)]


def _built() -> list[str]:
    """The QEMUs of ``mdo qemu build``."""
    from mdev_orchestrator.qemu_build import builds, patches

    found = [builds.find(series) for series in patches.series_known()]
    return [str(build.binary) for build in found if build]
