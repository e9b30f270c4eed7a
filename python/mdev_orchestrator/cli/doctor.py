# SPDX-License-Identifier: GPL-2.0-or-later
"""``mdo doctor``."""

from __future__ import annotations

from typing import Annotated

from mdev_orchestrator.cli import output
from mdev_orchestrator.cli.options import Option
from mdev_orchestrator.errors import HostError
from mdev_orchestrator.host import doctor as host_doctor
from mdev_orchestrator.host.doctor import Finding
from mdev_orchestrator.host.sysfs import read_host
from mdev_orchestrator.machine import Machine
from mdev_orchestrator.qemu import doctor as qemu_doctor


def doctor(
    *,
    qemu: Annotated[str, Option(help="QEMU binary to look at.")] = qemu_doctor.QEMU,
    json: Annotated[bool, Option("--json", help="One JSON document.")] = False,
) -> int:
    """Look at modules, nodes, permissions and QEMU; every fault is shown with its remedy."""
    findings = output.run(_examine(qemu))
    if json:
        output.emit_json({"findings": findings})
    else:
        output.emit_table(
            "Findings",
            ("level", "subject", "finding", "remedy"),
            [(f.level, f.subject, f.message, f.remedy) for f in findings],
        )
    faulty = any(finding.level == "fault" for finding in findings)
    return HostError.exit_code if faulty else 0


async def _examine(qemu: str) -> list[Finding]:
    root = output.host_root()
    machine = Machine(root)
    host = read_host(machine)
    return [*host_doctor.examine(machine, host), *await qemu_doctor.examine(qemu, host.mdevs)]
