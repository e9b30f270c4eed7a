# SPDX-License-Identifier: GPL-2.0-or-later
"""The charts are drawn to scale: what is read back from the file is what was asked for."""

import math
from xml.etree import ElementTree as ET

import pytest
from benches import chart

SVG = "{http://www.w3.org/2000/svg}"


def drawn(text: str) -> ET.Element:
    return ET.fromstring(text)  # noqa: S314 - made by us


def texts(root: ET.Element) -> list[str]:
    return [element.text or "" for element in root.iter(f"{SVG}text")]


def test_a_bar_is_as_long_as_the_logarithm_of_its_ratio() -> None:
    root = drawn(chart.bars("t", {"create": {"ours": 100, "theirs": 10}, "stop": {"ours": 0.1}}))
    lengths = [float(bar.get("width", "0")) for bar in root.iter(f"{SVG}rect")]
    assert lengths[0] == pytest.approx(2 * lengths[1], abs=0.1)
    assert lengths[2] == pytest.approx(lengths[1], abs=0.1)
    assert {"create", "stop", "ours", "theirs", "100", "10", "0.1"} <= set(texts(root))


def test_bars_to_the_left_of_one_are_ratios_below_it() -> None:
    root = drawn(chart.bars("t", {"work": {"slower": 3, "faster": 1 / 3}}))
    (base,) = (
        float(line.get("x1", "0"))
        for line in root.iter(f"{SVG}line")
        if line.get("class") == "base"
    )
    slower, faster = root.iter(f"{SVG}rect")
    assert float(slower.get("x", "0")) == pytest.approx(base, abs=0.1)
    assert float(faster.get("x", "0")) + float(faster.get("width", "0")) == pytest.approx(
        base, abs=0.1
    )


def test_a_way_has_one_colour_in_all_groups() -> None:
    root = drawn(chart.bars("t", {"one": {"a": 2, "b": 3}, "two": {"b": 4}}))
    colours = [bar.get("fill") for bar in root.iter(f"{SVG}rect")]
    assert colours[1] == colours[2] != colours[0]


def test_all_samples_lie_on_the_page_in_their_order() -> None:
    samples = [(0.0, 0.0), (60.0, 12.0), (3600.0, 7.0)]
    root = drawn(chart.lines("memory", "MB", {"qemu": samples, "service": [(0.0, 1.0)]}))
    width, height = map(float, root.get("viewBox", "").split()[2:])
    line, _ = root.iter(f"{SVG}polyline")
    points = [tuple(map(float, point.split(","))) for point in line.get("points", "").split()]
    assert all(0 < x < width and 0 < y < height for x, y in points)
    assert [x for x, _ in points] == sorted(x for x, _ in points)
    zero, high, end = (y for _, y in points)
    assert (zero - end) / (zero - high) == pytest.approx(7 / 12, abs=0.01)
    assert {"qemu", "service", "0 MB", "0 min", "60 min"} <= set(texts(root))


@pytest.mark.parametrize("samples", [[], [(0.0, 0.0)]])
def test_nothing_to_draw_is_still_a_page(samples: list[tuple[float, float]]) -> None:
    drawn(chart.lines("t", "MB", {"a": samples}))
    drawn(chart.bars("t", {}))


@pytest.mark.parametrize("span", [0.003, 1, 7, 12, 99, 1e6])
def test_an_axis_has_round_steps_and_not_too_many(span: float) -> None:
    step = chart._step(span, 4)
    assert 1 <= span / step <= 4 + 1e-9
    assert round(step / 10 ** math.floor(math.log10(step) + 1e-9)) in {1, 2, 5}
