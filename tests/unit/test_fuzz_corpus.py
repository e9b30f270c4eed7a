# SPDX-License-Identifier: GPL-2.0-or-later
"""The fuzzers' inputs, once each and without a fuzzer: what it has found stays mended."""

from pathlib import Path

import pytest

from fuzz import harness

INPUTS = [
    pytest.param(name, file, id=f"{name}-{file.name}")
    for name in harness.names()
    for file in sorted((harness.CORPUS / name).iterdir())
]


@pytest.mark.parametrize(("name", "file"), INPUTS)
def test_parser_takes_or_refuses_it(name: str, file: Path) -> None:
    harness.load(name)(file.read_bytes())


def test_every_parser_has_a_corpus() -> None:
    assert {name for name, _ in (param.values for param in INPUTS)} == {*harness.names()}
