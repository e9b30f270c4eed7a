# SPDX-License-Identifier: GPL-2.0-or-later
"""Plans beside the kernel: what fits is never refused, what does not fit is never accepted.

Over parents of mvgpu, and of the kernel's three samples where ``MDO_LAB_SAMPLES`` names them. Every
creation is a real one. That something does not fit is shown by trying: every device of every
request on every type of every parent, with no question to a model.
"""

from __future__ import annotations

import os
import platform
import random
from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from lab import vfio
from lab.parents import Parent, all_drivers
from mdev_orchestrator.capacity.models import survey
from mdev_orchestrator.capacity.planner import plan
from mdev_orchestrator.host import sysfs
from mdev_orchestrator.machine import Machine
from mdev_orchestrator.model import Host
from unit.capacity.cases import check, exhaustive, wishes

pytestmark = pytest.mark.skipif("MDO_LAB" not in os.environ, reason="needs the lab's kernel")

CASES = 50 if platform.release().startswith("6.1.") else 200


@pytest.fixture(scope="module", autouse=True)
def drivers() -> Iterator[None]:
    with all_drivers(grid_parents=2, igd_parents=2):
        yield


def decide(rng: random.Random, everywhere: list[Parent]) -> bool:
    """One case; whether it fits."""
    parents = rng.sample(everywhere, rng.randint(1, 3))
    for parent in parents:
        parent.occupy(rng)
    there = [device for parent in parents for device in parent.devices]
    gone = rng.sample(there, min(len(there), rng.choice([0, 0, 0, 1, 3])))
    host = sysfs.read_host(Machine())
    names = {parent.name for parent in parents}
    chosen = Host(tuple(p for p in host.parents if p.name in names), host.mdevs)
    found = survey(chosen, removing=[m.uuid for m in host.mdevs if str(m.uuid) in dict(gone)])
    requests = wishes(rng, parents)
    answer = plan(requests, found, rng.choice(["pack", "spread"]))
    for parent in parents:
        for uuid, _ in parent.devices:
            if uuid in dict(gone):
                parent.remove(uuid)
    assert answer.proven
    if not answer.fits:
        before = [parent.used for parent in parents]
        assert not exhaustive(requests, parents), "the kernel takes what the plan says does not fit"
        for parent, used in zip(parents, before, strict=True):
            parent.become(used)
    check(requests, parents, answer)
    return answer.fits


def test_plans_are_as_the_kernel_decides() -> None:
    parents = [Parent(parent.name) for parent in sysfs.read_host(Machine()).parents]
    decided: Counter[bool] = Counter()

    @settings(
        max_examples=CASES,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(st.randoms(use_true_random=False))
    def compare(rng: random.Random) -> None:
        try:
            fits = decide(rng, parents)
        finally:
            for parent in parents:
                parent.become(Counter())  # which compares the counts with those of the beginning
        assert not list(vfio.MDEVS.iterdir())
        decided[fits] += 1

    compare()
    assert decided.total() >= CASES
    assert min(decided[True], decided[False]) > CASES // 5, f"too easy or too hard: {decided}"
