# SPDX-License-Identifier: GPL-2.0-or-later
"""The machine that is soaked, and what is told of it at the end."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from campaign.conftest import others, place  # noqa: F401 - fixtures

HERE = Path(__file__).parent
LINES: list[str] = []
"""What the soak says of itself: tools/run-tests shows these."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if "MDO_LAB" not in os.environ:
        for item in items:
            if HERE in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="needs the lab's kernel"))


@pytest.fixture
def figures() -> list[str]:
    return LINES


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for line in LINES:
        terminalreporter.write_line(f"campaign: {line}")
