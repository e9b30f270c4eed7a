# SPDX-License-Identifier: GPL-2.0-or-later
"""``make demo`` from the host's side: a lab, the story told in it, and a closing table."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

from mdev_orchestrator.errors import MdoError
from mdev_orchestrator.lab import machine

MODULE_OPTIONS = "links=3"
"""So few links that a second group does not fit beside the first."""

STORY = ["python", "-m", "mdev_orchestrator.lab.story"]


@dataclass(frozen=True, slots=True)
class Row:
    """One step as the closing table shows it."""

    step: str
    result: str
    seconds: float
    ok: bool


def demo(
    series: str, *, row: Callable[[Row], None], doing: Callable[[str], None]
) -> tuple[list[Row], int]:
    """Run the demo in a lab of its own.

    :param row: ResultCallback of each step that has ended.
    :param doing: ResultCallback what begins.
    :return: All rows, and the exit status: 0 only when every step did what was promised.
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
    with machine.running(name, series=series, module_options=MODULE_OPTIONS, progress=doing) as lab:
        seconds = round(time.monotonic() - started, 2)
        ended(Row(f"bring up a lab with kernel {series}", lab.release, seconds, ok=True))
        status = machine.execute(lab, STORY, output=listen)
    if status == 0 and not all(entry.ok for entry in rows):
        raise MdoError("the story ended well with a step that failed: this is a bug")
    return rows, status
