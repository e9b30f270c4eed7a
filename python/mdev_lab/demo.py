# SPDX-License-Identifier: GPL-2.0-or-later
"""``make demo`` on the host: a lab, the acts in it, and the rows of the closing table."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

from mdev_lab import l1
from mdev_orchestrator.errors import MdoError

MODULE_OPTIONS = "links=3"
"""Parameters of mvgpu: a second group does not fit beside the first with three links."""

ACTS = ["python", "-m", "mdev_lab.demo_acts"]


@dataclass(frozen=True, slots=True)
class Row:
    """One step of the demo: a row of the closing table."""

    step: str
    result: str
    seconds: float
    ok: bool


def demo(
    series: str, *, row: Callable[[Row], None], doing: Callable[[str], None]
) -> tuple[list[Row], int]:
    """Run the demo in a lab of its own.

    :param row: Called with each step that has ended.
    :param doing: Called with what begins.
    :return: All rows, and the exit status: 0 only if every step succeeded.
    :raise MdoError: The lab cannot be brought up, or ended early.
    """
    rows: list[Row] = []

    def ended(entry: Row) -> None:
        rows.append(entry)
        row(entry)

    rest = b""

    def listen(data: bytes) -> None:
        nonlocal rest
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            words = json.loads(line)
            if "doing" in words:
                doing(words["doing"])
            else:
                ended(Row(**words))

    started = time.monotonic()
    name = f"demo-{os.getpid()}"
    with l1.running(
        name, series=series, module_options=MODULE_OPTIONS, pci=1, progress=doing
    ) as lab:
        seconds = round(time.monotonic() - started, 2)
        ended(Row(f"bring up a lab with kernel {series}", lab.release, seconds, ok=True))
        status = l1.execute(lab, ACTS, output=listen)
    if status == 0 and not all(entry.ok for entry in rows):
        raise MdoError("a step failed and the demo ended with 0: this is a bug")
    return rows, status
