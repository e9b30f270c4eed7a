# SPDX-License-Identifier: GPL-2.0-or-later
"""An observer that raises at every event changes nothing: not what is done, nor what is undone."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from campaign import specs
from campaign.command import Ended, mdo
from campaign.conftest import Tally
from campaign.works import WORKS
from campaign.world import Foreign, Look, clear, differences, look
from lab import vfio
from mdev_orchestrator.engine.executor import Execution, StepEvent, StepEventKind
from mdev_orchestrator.errors import Outcome

ERRORS: dict[str, Callable[[], Exception]] = {
    "a bug": lambda: RuntimeError("an observer's bug"),
    "a closed pipe": lambda: BrokenPipeError(32, "Broken pipe"),
}


def raising(error: Callable[[], Exception]) -> Callable[[], None]:
    """A change of the program: every observer raises at every event."""

    def observe(_: StepEvent) -> None:
        raise error()

    def change() -> None:
        emit = Execution.emit

        def emitting(
            self: Execution, kind: StepEventKind, number: int, outcome: Outcome | None = None
        ) -> None:
            self.observe = observe
            emit(self, kind, number, outcome)

        Execution.emit = emitting  # type: ignore[method-assign]

    return change


def events(ended: Ended) -> int:
    """How many events of steps there were."""
    kinds = {*StepEventKind}
    return sum(point.split()[0] in kinds for point in ended.points)


def last_line(ended: Ended) -> str:
    """The error, without the numbers of IOMMU groups."""
    return re.sub(r"group \d+", "group N", ended.err.splitlines()[-1])


@pytest.mark.usefixtures("empty")
@pytest.mark.parametrize("name", list(WORKS))
@pytest.mark.parametrize("what", list(ERRORS))
def test_what_is_done(place: Path, others: Foreign, tally: Tally, name: str, what: str) -> None:
    work = WORKS[name]
    whole = work.whole(place, others)
    work.prepare(place, others)
    ended = mdo(*work.command(place), change=raising(ERRORS[what]))
    left = differences(whole, look(others), shape=True)
    left += [] if ended.status == 0 else [str(ended)]
    where = f"{what} at each of {events(ended)} events"
    assert tally.count(f"{name}: observer raises", left, where) == []
    assert events(ended) > 1
    clear(others)


@pytest.mark.parametrize("what", list(ERRORS))
def test_what_is_undone(place: Path, others: Foreign, empty: Look, tally: Tally, what: str) -> None:
    last = specs.KNOWN["three"][1]
    spec = specs.known(place)
    with vfio.fault("open", f"errno=5 times=-1 uuid={last}"):
        silent = mdo("apply", spec)
        ended = mdo("apply", spec, change=raising(ERRORS[what]))
    left = differences(empty, look(others))
    if (ended.status, last_line(ended)) != (silent.status, last_line(silent)):
        left.append(f"with an observer that does not raise: {silent}; with one that does: {ended}")
    where = f"{what} at each of {events(ended)} events, {last} cannot be opened"
    assert tally.count("undone apply: observer raises", left, where) == []
    assert any(point.startswith("undone") for point in ended.points), ended.points
