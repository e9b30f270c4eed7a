# SPDX-License-Identifier: GPL-2.0-or-later
"""Charts for the docs, as SVG that is read on a dark page as well as on a light one.

Two kinds: ``bars`` for ratios, ``lines`` for what was sampled over time. Both return the text of a
file that stands alone. Lengths are in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from xml.etree import ElementTree as ET

WIDTH = 760
LEFT, RIGHT, TOP = 150, 70, 44
ROW, GAP = 18, 12  # height of a bar's row, and what parts two groups
HEIGHT = 240  # of the area of lines
MARK = 110  # width of one entry of the legend
# readable on both pages, and for people with colour blindness (Okabe and Ito, 2008)
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9")
STYLE = """
svg { background: #ffffff; font: 12px sans-serif; fill: #1f2328; }
.title { font-weight: bold; font-size: 14px; }
.quiet { fill: #59636e; }
.grid { stroke: #d1d9e0; }
.base { stroke: #59636e; }
@media (prefers-color-scheme: dark) {
  svg { background: #0d1117; fill: #f0f6fc; }
  .quiet { fill: #9198a1; }
  .grid { stroke: #3d444d; }
  .base { stroke: #9198a1; }
}
"""


def bars(title: str, groups: Mapping[str, Mapping[str, float]]) -> str:
    """Ratios as bars from 1 on a logarithmic axis.

    :param groups: For each work the ratio of each way, all above 0. A way has the same colour in
        all groups.
    """
    ratios = [ratio for group in groups.values() for ratio in group.values()]
    low, high = min([1.0, *ratios]), max([1.0, *ratios])
    first, last = math.floor(math.log10(low)), max(1, math.ceil(math.log10(high)))
    scale = (WIDTH - LEFT - RIGHT) / (last - first)
    rows = len(ratios) * ROW + len(groups) * (ROW + GAP)
    root = _page(title, TOP + rows + 2 * ROW)

    def place(ratio: float) -> float:
        return LEFT + (math.log10(ratio) - first) * scale

    for exponent in range(first, last + 1):
        x = place(10.0**exponent)
        _line(root, x, TOP, x, TOP + rows, "base" if exponent == 0 else "grid")
        _text(root, x, TOP + rows + ROW, f"{10.0**exponent:g}", "quiet", "middle")
    ways = dict.fromkeys(way for group in groups.values() for way in group)
    colours = dict(zip(ways, _colours(), strict=False))
    y = TOP
    for work, group in groups.items():
        y += ROW
        _text(root, 10, y, work, "work")
        y += GAP // 2
        for way, ratio in group.items():
            begin, end = sorted((place(1), place(ratio)))
            _text(root, LEFT - 8, y + ROW - 5, way, "quiet", "end")
            _add(root, "rect", x=begin, y=y + 2, width=max(end - begin, 1.5), height=ROW - 4,
                 fill=colours[way])  # fmt: skip
            _text(root, end + 5, y + ROW - 5, f"{ratio:.3g}")
            y += ROW
        y += GAP // 2
    return _file(root)


def lines(title: str, unit: str, series: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """What was sampled over time, a line for each process, from 0 upwards.

    :param unit: Of the values, and written beside the axis.
    :param series: Samples of each: seconds since the beginning, and the value, 0 or more.
    """
    samples = [sample for line in series.values() for sample in line]
    seconds = max([1.0, *(at for at, _ in samples)])
    step, minute_step = _step(max([1e-9, *(v for _, v in samples)]), 4), _step(seconds / 60, 8)
    top = step * math.ceil(max([1e-9, *(v for _, v in samples)]) / step)
    per_row = (WIDTH - 20) // MARK
    begin = TOP + ROW * math.ceil(len(series) / per_row)
    root = _page(title, begin + HEIGHT + 2 * ROW)
    across = WIDTH - LEFT - RIGHT

    def place(at: float, value: float) -> tuple[float, float]:
        return LEFT + at / seconds * across, begin + HEIGHT * (1 - value / top)

    for number in range(round(top / step) + 1):
        _, y = place(0, number * step)
        _line(root, LEFT, y, LEFT + across, y, "grid" if number else "base")
        _text(root, LEFT - 8, y + 4, f"{number * step:g} {unit}", "quiet", "end")
    for number in range(int(seconds / 60 / minute_step + 1e-9) + 1):
        x, _ = place(number * minute_step * 60, 0)
        text = f"{number * minute_step:g} min"
        _text(root, x, begin + HEIGHT + ROW, text, "quiet", "middle")
    for number, ((name, line), colour) in enumerate(zip(series.items(), _colours(), strict=False)):
        x, y = 10 + number % per_row * MARK, TOP + number // per_row * ROW
        _add(root, "rect", x=x, y=y - 6, width=14, height=4, fill=colour)
        _text(root, x + 19, y, name)
        points = " ".join("{:.1f},{:.1f}".format(*place(*sample)) for sample in line)
        _add(root, "polyline", points=points, fill="none", stroke=colour, stroke_width=1.5)
    return _file(root)


def _colours() -> Iterator[str]:
    while True:
        yield from COLOURS


def _step(span: float, most: int) -> float:
    """The least of 1, 2, 5, 10, 20… that divides a span into at most so many parts."""
    power = 10.0 ** math.floor(math.log10(span / most))
    return next(power * n for n in (1, 2, 5, 10) if power * n * most >= span * (1 - 1e-9))


def _page(title: str, height: float) -> ET.Element:
    root = ET.Element("svg", xmlns="http://www.w3.org/2000/svg", role="img")
    root.set("viewBox", f"0 0 {WIDTH} {height:g}")
    ET.SubElement(root, "title").text = title
    ET.SubElement(root, "style").text = STYLE
    _text(root, 10, 22, title, "title")
    return root


def _text(
    root: ET.Element, x: float, y: float, text: str, kind: str = "", anchor: str = ""
) -> None:
    element = _add(root, "text", x=x, y=y)
    element.text = text
    for name, value in (("class", kind), ("text-anchor", anchor)):
        if value:
            element.set(name, value)


def _line(root: ET.Element, x1: float, y1: float, x2: float, y2: float, kind: str) -> None:
    _add(root, "line", x1=x1, y1=y1, x2=x2, y2=y2).set("class", kind)


def _add(root: ET.Element, tag: str, **attributes: float | str) -> ET.Element:
    element = ET.SubElement(root, tag)
    for name, value in attributes.items():
        text = value if isinstance(value, str) else f"{value:.1f}".removesuffix(".0")
        element.set(name.replace("_", "-"), text)
    return element


def _file(root: ET.Element) -> str:
    ET.indent(root)
    return "<!-- SPDX-License-Identifier: GPL-2.0-or-later -->\n" + (
        ET.tostring(root, encoding="unicode") + "\n"
    )
