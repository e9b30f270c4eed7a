# SPDX-License-Identifier: GPL-2.0-or-later
"""For as long as it is let, everything happens to a host, and nothing is ever left over.

``MDO_TEST_SECONDS`` says how long, ``MDO_TEST_SEED`` what happens. The samples of the processes
that live all the time are left in ``build/tests/soak.json``.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.errors import FlakyStrategyDefinition
from hypothesis.stateful import run_state_machine_as_test

from campaign import world
from campaign.world import Foreign
from lab.kernel_log import KernelLog
from soak import moves
from soak.samples import Samples
from soak.worker import Worker

SECONDS = float(os.environ.get("MDO_TEST_SECONDS", "3600"))
SEED = int(os.environ.get("MDO_TEST_SEED", "1"))
EPISODES = 9
"""Of one run of hypothesis, which begins each with the simplest that there is."""
STEPS = 100
"""Moves of an episode."""
SAMPLES = Path(__file__).resolve().parents[2] / "build" / "tests" / "soak.json"


@pytest.fixture
def arena(place: Path, others: Foreign) -> Iterator[moves.Arena]:
    with contextlib.ExitStack() as stack:
        fill = stack.enter_context(world.small_disk(place, "16M"))
        world.clear(others)
        worker = Worker()
        stack.callback(worker.end)
        seen = place / "watch.jsonl"
        watch = subprocess.Popen(
            [sys.executable, "-m", "mdev_orchestrator.cli.main", "watch", "--json"],
            stdout=stack.enter_context(seen.open("ab")),
        )
        stack.callback(watch.wait)
        stack.callback(watch.kill)
        others.company = {worker.pid, watch.pid}
        while not seen.stat().st_size:
            assert watch.poll() is None, "mdo watch has ended"
            time.sleep(0.1)
        log = KernelLog()
        stack.callback(log.close)
        found = moves.Arena(
            place=place,
            others=others,
            fill=fill,
            worker=worker,
            watch=watch,
            seen=seen,
            samples=Samples({"library": worker.pid, "mdo watch": watch.pid}),
            log=log,
            end=time.monotonic() + SECONDS,
            empty=world.look(others),
        )
        moves.ARENA[:] = [found]
        yield found
        moves.ARENA.clear()
        world.clear(others)
        others.company = set()


def test_soak(arena: moves.Arena, figures: list[str]) -> None:
    how = settings(
        max_examples=EPISODES,
        stateful_step_count=STEPS,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )
    try:
        for number in itertools.count():
            episodes = type("Soak", (moves.Soak,), {})
            run_state_machine_as_test(seed(SEED * 1000 + number)(episodes), settings=how)
    except (moves.OverError, FlakyStrategyDefinition):
        if not arena.over:
            raise
    finally:
        report(arena, figures)
    samples = arena.samples
    wrong = [line for name in samples.taken for line in samples.verdict(name)]
    assert wrong + samples.objects_verdict() == []


def report(arena: moves.Arena, figures: list[str]) -> None:
    """The figures."""
    total, seconds = sum(arena.moves.values()), time.monotonic() - arena.samples.began
    lines = [
        f"seed {SEED}: {total} moves in {arena.episodes} episodes and {seconds:.0f} s",
        f"{arena.checked} invariants checked, in {arena.looking:.0f} s of the time",
        *(
            f"{number} x {kind}: {arena.seconds[kind] / number:.2f} s each"
            for kind, number in arena.moves.most_common()
        ),
        *(arena.samples.line(name) for name in arena.samples.taken),
        arena.samples.objects_line(),
    ]
    figures += lines
    for what, number in sorted(arena.outcomes.items()):
        moves.tell(f"{number} {what}")
    SAMPLES.parent.mkdir(parents=True, exist_ok=True)
    arena.samples.write(
        SAMPLES, seed=SEED, seconds=round(seconds), episodes=arena.episodes, moves=arena.moves
    )
