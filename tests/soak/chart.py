# SPDX-License-Identifier: GPL-2.0-or-later
"""Draws what a soak has sampled: ``python -m tests.soak.chart [SAMPLES [DIRECTORY]]``.

Without arguments it draws ``build/tests/soak.json`` into ``docs``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benches import chart

ROOT = Path(__file__).resolve().parents[2]


def draw(samples: dict[str, Any], directory: Path) -> None:
    """``soak.svg`` for memory, ``soak-descriptors.svg`` for open files."""
    rows = samples["processes"].items()
    minutes = f"{samples['seconds'] / 60:.0f} minutes, {sum(samples['moves'].values())} moves"
    memory = {name: [(at, kib / 1024) for at, kib, _ in taken] for name, taken in rows}
    files = {name: [(at, number) for at, _, number in taken] for name, taken in rows}
    for name, title, unit, lines in (
        ("soak.svg", "Memory", "MiB", memory),
        ("soak-descriptors.svg", "Open files", "", files),
    ):
        text = chart.lines(f"{title} of what lives all the time: {minutes}", unit, lines)
        (directory / name).write_text(text, "utf-8")


if __name__ == "__main__":
    given = [Path(argument) for argument in sys.argv[1:]]
    source, place = (*given, *(ROOT / "build/tests/soak.json", ROOT / "docs")[len(given) :])
    draw(json.loads(source.read_text("utf-8")), place)
