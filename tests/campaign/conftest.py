# SPDX-License-Identifier: GPL-2.0-or-later
"""What both campaigns share: a machine with strangers on it, and a count of what is left over."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from campaign import world
from lab.kernel_log import KernelLog

EVERY = int(os.environ.get("MDO_TEST_EVERY", "1"))
"""Only every so-many-th point is tried: ``MDO_TEST_EVERY=5`` for a short campaign."""


HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if "MDO_LAB" not in os.environ:
        for item in items:
            if HERE in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="needs the lab's kernel"))


@dataclass
class Tally:
    """What a campaign has tried, and what it has found."""

    tried: dict[str, int] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)

    def count(self, what: str, left: list[str], where: str) -> list[str]:
        """One more was tried; gives what is left over, each with where that was."""
        self.tried[what] = self.tried.get(what, 0) + 1
        found = [f"{what}, {where}: {line}" for line in left]
        self.left += found
        # a campaign takes many minutes
        verdict = "LEFT OVER" if found else "nothing left over"
        print(f"{what}: {where}: {verdict}", flush=True)  # noqa: T201
        for line in found:
            print(f"LEFT OVER: {line}", flush=True)  # noqa: T201
        return found


TALLY = Tally()


@pytest.fixture(scope="session")
def place() -> Iterator[Path]:
    """A state directory of our own, in memory."""
    path = Path("/run/mdo-campaign")
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(mode=0o700)
    os.environ["MDO_STATE_DIR"] = str(path / "state")
    (path / "state").mkdir(mode=0o700)
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="session")
def others(place: Path) -> Iterator[world.Foreign]:
    """The strangers, all the time."""
    with world.foreign() as found:
        yield found


@pytest.fixture
def empty(others: world.Foreign) -> Iterator[world.Look]:
    """The machine with nothing of ours on it, before and after; and a kernel that is content."""
    log = KernelLog()
    world.clear(others)
    yield world.look(others)
    world.clear(others)
    complaints = log.complaints()
    log.close()
    assert complaints == []


@pytest.fixture
def tally() -> Tally:
    return TALLY


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The figures."""
    for what, number in TALLY.tried.items():
        terminalreporter.write_line(f"campaign: {what}: {number}")
    if TALLY.tried:
        total = sum(TALLY.tried.values())
        terminalreporter.write_line(f"campaign: {total} points, {len(TALLY.left)} leftovers")
