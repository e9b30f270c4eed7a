# SPDX-License-Identifier: GPL-2.0-or-later
"""What the benches say of what they measured, and where it goes in the docs."""

import json
from importlib import metadata
from pathlib import Path

import pytest
from benches import bench, publish

RESULT = {
    "name": "work",
    "rounds": 3,
    "bases": ["C", "virsh"],
    "ways": ["library", "C", "virsh"],
    "seconds": {
        "create": {"C": [0.2, 9.0, 0.1], "library": [0.4, 0.5, 0.3]},
        "start": {"library": [1.0, 2.0], "virsh": [3.0, 3.0]},
    },
    "taken": {
        "date": "d",
        "machine": "L1",
        "processors": 1,
        "load": [0.5, 2],
        "versions": {"X": "1"},
    },
}


def test_a_table_has_medians_and_ratios_to_the_first_base_that_did_the_work() -> None:
    lines = bench.table(RESULT).splitlines()
    assert lines[0] == "| | C | virsh | library |"
    assert lines[2] == "| create | 200 ms (1) |  | 400 ms (2) |"
    assert lines[3] == "| start |  | 3.00 s (1) | 1.50 s (0.5) |"
    assert "3 rounds" in lines[5]
    assert "load 0.5 to 2.0" in lines[6]


def test_each_way_has_its_turn_in_each_round_and_the_warm_one_does_not_count() -> None:
    figures = bench.Figures("x", 4, ("a",))
    order = []
    for way in figures.turns("what", "abc"):
        order.append(way)
        figures.note("work", way, 1.0)
    assert all(sorted(order[at : at + 3]) == ["a", "b", "c"] for at in range(0, 15, 3))
    assert len(order) == 15
    assert figures.seconds == {"work": dict.fromkeys(order, [1.0] * 4)}
    assert figures.ways == ["a", "b", "c"]


def test_what_fails_is_not_timed() -> None:
    figures = bench.Figures("x", 1, ("a",))
    with pytest.raises(RuntimeError), figures.timed("work", "a"):
        raise RuntimeError
    assert figures.seconds == {}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (61.0, "61.0 s"),
        (123.4, "123 s"),
        (0.0123, "12.3 ms"),
        (4.56e-6, "4.56 µs"),
        (3e-8, "30 ns"),
    ],
)
def test_a_time_has_three_digits(seconds: float, text: str) -> None:
    assert bench.span(seconds) == text


def test_a_table_goes_to_its_own_place_in_the_page() -> None:
    page = "".join(
        f"{text}\n<!-- table: {name} -->\n{text}\n<!-- end of table -->\n"
        for name, text in (("x", "one"), ("y", "two"))
    )
    assert publish.with_table(page, "x", "new \\1") == page.replace("->\none", "->\nnew \\1")
    assert publish.with_table(page, "z", "new") == page


def test_what_was_found_is_drawn_and_the_base_is_not() -> None:
    found = RESULT | {"seconds": {"attach": {"C": [1.0], "library": [2.0]}, "other": {"C": [1.0]}}}
    drawn = publish.drawing({"guests": found})
    assert "attach, times C" in drawn
    assert ">library<" in drawn
    assert ">C<" not in drawn


def test_a_result_is_read_as_it_was_written(tmp_path: Path) -> None:
    bench.write(tmp_path / "bench/x.json", RESULT)
    assert json.loads((tmp_path / "bench/x.json").read_text()) == RESULT


def test_a_bench_that_is_interrupted_keeps_the_rows_that_it_has_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "RESULTS", tmp_path)
    monkeypatch.setattr(bench, "VERSIONS", {})
    figures = bench.Figures("x", 2, ("a",))
    with pytest.raises(KeyboardInterrupt):
        measure(figures)
    result = json.loads((tmp_path / "x.json").read_text())
    assert result["seconds"] == {"first": {"a": [1.0] * 2, "b": [1.0] * 2}}
    page = publish.with_table(PLACE, "x", bench.table(result))
    assert "| first | 1.00 s (1) | 1.00 s (1) |" in page
    assert "interrupted" in page
    figures.report()
    assert "interrupted" not in bench.table(json.loads((tmp_path / "x.json").read_text()))


PLACE = "<!-- table: x -->\n<!-- end of table -->\n"


def measure(figures: bench.Figures) -> None:
    """Two rows, of which the second is interrupted in its last round."""
    for row in ("first", "second"):
        for way in figures.turns(row, "ab"):
            figures.note(row, way, 1.0)
            if len(figures.seconds.get("second", {}).get("a", ())) == 2:
                raise KeyboardInterrupt


def test_what_mdo_needs_is_installed_here_and_not_what_other_systems_need() -> None:
    names = bench.needed("mdev-orchestrator")
    assert {"typer", "rich", "msgspec"} <= names
    assert all(metadata.files(name) for name in names)
