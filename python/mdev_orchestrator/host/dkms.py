# SPDX-License-Identifier: GPL-2.0-or-later
"""Why a vendor's driver that DKMS builds is not there for the kernel that runs."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from mdev_orchestrator.machine import Machine

TREE = "var/lib/dkms"
KEY = "/var/lib/dkms/mok.pub"
"""What DKMS signs modules with."""

_REGISTERS = re.compile(rb"\bmdev_register_(parent|device)\b")
"""Called by a driver whose devices offer mdevs; the second until Linux 5.19."""


class Lack(NamedTuple):
    """A driver that is not loaded.

    :ivar driver: Its name and version, as DKMS has them.
    """

    driver: str
    message: str
    remedy: str


def lacking(machine: Machine) -> Iterator[Lack]:
    """Yield each mdev driver of DKMS that is not loaded, with the reason."""
    release = os.uname().release
    modules = machine.root / "lib/modules" / release
    for source in sorted(machine.root.glob(f"{TREE}/*/*/source")):
        if not _registers(source):
            continue
        name, version = source.parts[-3:-1]
        built = source.parent.glob(f"{release}/*/module/*.ko*")
        names = sorted(path.name.partition(".")[0] for path in built)
        if any(_loaded(machine, module) for module in names or [name]):
            continue
        module = names[0] if names else name
        yield _why(machine, modules, f"{name}/{version}", module, built=bool(names))


def _why(machine: Machine, modules: Path, driver: str, module: str, *, built: bool) -> Lack:
    release = modules.name
    if built and (how := _signatures(machine)):
        return Lack(
            driver,
            f"it is not loaded, and this kernel loads signed modules only ({how}): it has to know"
            f" the key {KEY}",
            f"mokutil --import {KEY} (package mokutil), reboot and confirm the key, then"
            f" modprobe {module}",
        )
    if built:
        return Lack(driver, "it is built and not loaded", f"modprobe {module}")
    if not modules.exists():
        return Lack(
            driver,
            f"DKMS cannot build it: {modules} is not there",
            "apt-get install linux-image-amd64 linux-headers-amd64 and boot that kernel",
        )
    if not (modules / "build").exists():
        return Lack(
            driver,
            f"DKMS cannot build it: the headers of kernel {release} are not installed",
            f"apt-get install linux-headers-{release}, then modprobe {module}",
        )
    return Lack(
        driver,
        f"DKMS has not built it for kernel {release}",
        f"dkms install {driver}, then modprobe {module}",
    )


def _signatures(machine: Machine) -> str:
    """What makes the kernel refuse modules without a signature that it trusts; empty if nothing."""
    if _read(machine, "sys/module/module/parameters/sig_enforce").startswith("Y"):
        return "module.sig_enforce"
    lockdown = re.search(r"\[(integrity|confidentiality)\]", _read(machine, _LOCKDOWN))
    return f"lockdown is {lockdown[1]}, as with secure boot" if lockdown else ""


_LOCKDOWN = "sys/kernel/security/lockdown"


def _registers(source: Path) -> bool:
    try:
        return any(_REGISTERS.search(path.read_bytes()) for path in source.rglob("*.c"))
    except OSError:
        return False


def _loaded(machine: Machine, module: str) -> bool:
    return (machine.root / "sys/module" / module.replace("-", "_")).exists()


def _read(machine: Machine, path: str) -> str:
    try:
        return (machine.root / path).read_text(errors="replace")
    except OSError:
        return ""
