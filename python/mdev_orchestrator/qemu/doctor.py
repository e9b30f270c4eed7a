# SPDX-License-Identifier: GPL-2.0-or-later
"""What a QEMU binary lacks to use this host's mdevs, and the command that mends it."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator

from mdev_orchestrator.host.doctor import Finding
from mdev_orchestrator.model import Mdev
from mdev_orchestrator.qemu import features
from mdev_orchestrator.system.children import run_child

QEMU = "qemu-system-x86_64"
REMEDY = "apt-get install --no-install-recommends qemu-system-x86"

_DEADLINE = 20.0  # seconds for one run of QEMU; inside an emulated machine it takes some
_VERSION = re.compile(r"version (\d+(?:\.\d+)+)")
_VFIO_PCI = re.compile(r'^name "vfio-pci"', re.MULTILINE)


async def examine(qemu: str = QEMU, mdevs: Iterable[Mdev] = ()) -> tuple[Finding, ...]:
    """Ask a QEMU binary what it is and what it can do. Raises nothing for what it finds.

    :param qemu: Its name or path.
    :param mdevs: Those of the host: some need that QEMU can start groups.
    """
    path = shutil.which(qemu)
    if path is None:
        return (Finding("fault", "qemu", f"no program {qemu}", REMEDY),)
    version, devices = await asyncio.gather(
        _output(path, "-version"), _output(path, "-machine", "none", "-device", "help")
    )
    if version is None or devices is None:
        return (Finding("fault", "qemu", f"{path} did not answer within {_DEADLINE:g} s", REMEDY),)
    found = tuple(judge(path, version, devices))
    if any(finding.level == "fault" for finding in found):
        return found
    properties = await features.properties(path, "vfio-pci")
    says = "it has no iommufd: its guests use the container"
    if features.IOMMUFD in properties:
        says = "it has iommufd"
    return (*found, Finding("ok", "qemu", says), judge_start(features.START in properties, mdevs))


def judge(path: str, version: str, devices: str) -> Iterator[Finding]:
    """What the output of ``-version`` and ``-device help`` says of a QEMU binary."""
    number = _VERSION.search(version)
    if number is None:
        said = next(iter(version.splitlines()), "nothing")
        yield Finding("fault", "qemu", f"{path} is no QEMU: it says {said[:80]!r}", REMEDY)
        return
    yield Finding("ok", "qemu", f"{path} is version {number[1]}")
    if _VFIO_PCI.search(devices) is None:
        yield Finding("fault", "qemu", f"{path} has no device vfio-pci", REMEDY)
    else:
        yield Finding("ok", "qemu", "it has the device vfio-pci")


def judge_start(starts: bool, mdevs: Iterable[Mdev]) -> Finding:
    """Whether a QEMU brings start groups online by itself, and for the devices of which parents.

    A device without ``online`` does not count: its driver starts it in the open, whatever QEMU can
    do.
    """
    counted = Counter(mdev.parent for mdev in mdevs if mdev.online is not None)
    parents = ", ".join(f"{parent} ({count})" for parent, count in sorted(counted.items()))
    if starts:
        here = f", here those of the devices of {parents}" if counted else ""
        return Finding("ok", "qemu", f"it has {features.START}: it starts groups by itself{here}")
    if not counted:
        return Finding("ok", "qemu", f"it has no {features.START}, and no device here needs it")
    return Finding(
        "warning",
        "qemu",
        f"it has no {features.START}: the devices of {parents} come online only for guests that mdo"
        " starts, or if their driver sees to it",
        "mdo qemu build makes one that has it",
    )


async def _output(*command: str) -> str | None:
    """What a program prints, ``None`` if it does not end in time; it is killed then."""
    try:
        ended = await run_child(*command, deadline=_DEADLINE, with_errors=True)
    except OSError as error:
        return f"cannot be run: {os.strerror(error.errno or 0)}"
    return None if ended is None else ended.output
