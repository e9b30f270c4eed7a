# SPDX-License-Identifier: GPL-2.0-or-later
"""Puts what the benches found into the docs: tables into ``docs/benchmarks.md``, and the chart.

A table stands in the page between ``<!-- table: NAME -->`` and ``<!-- end of table -->``, where
NAME is the bench's. One that has not run, or has no such place, leaves the page as it is.
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import bench
import chart

PAGE, CHART = bench.ROOT / "docs/benchmarks.md", bench.ROOT / "docs/benchmarks.svg"
#: What is drawn of each bench; the tables have all.
DRAWN = {
    "devices": ("64 created", "64 removed", "64 of 5 ms created"),
    "guests": ("attach", "taken", "detach", "start", "booted", "4 together", "16 together"),
    "host_scan": ("256 listed", "4096 listed"),
    "registers": ("register read", "configuration read", "1 MiB written"),
}


def with_table(page: str, name: str, table: str) -> str:
    """The page with the table of a bench in its place."""
    place = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end of table -->)", re.DOTALL)
    return place.sub(lambda found: f"{found[1]}{table}\n{found[2]}", page)


def drawing(results: dict[str, Any]) -> str:
    """The chart of what was found."""
    groups = {}
    for name, works in DRAWN.items():
        found = bench.middles(results[name]) if name in results else {}
        for work in works:
            ways = found.get(work, {})
            if len(ways) > 1:
                base = bench.base(results[name], ways)
                ratios = {way: ways[way] / ways[base] for way in ways if way != base}
                groups[f"{work}, times {base}"] = ratios
    return chart.bars("How many times as long: less is better", groups)


def main() -> int:
    """Read all results, write page and chart."""
    files = sorted(bench.RESULTS.glob("*.json"))
    results = {file.stem: json.loads(file.read_text()) for file in files}
    page = PAGE.read_text()
    for name, result in results.items():
        page = with_table(page, name, bench.table(result))
    CHART.write_text(drawing(results))
    PAGE.write_text(with_table(page, "chart", f"![Ours beside others]({CHART.name})"))
    print(f"{PAGE} and {CHART} are those of {', '.join(results)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
