# SPDX-License-Identifier: GPL-2.0-or-later
"""Plans beside the kernel: what fits is never refused, what does not fit is never accepted.

Over parents of mvgpu, and of the kernel's three samples where ``MDO_LAB_SAMPLES`` names them. Every
creation is a real one. That something does not fit is shown by trying: every device of every
request on every type of every parent, with no question to a model.
"""

from __future__ import annotations

import errno
import os
import platform
import random
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from lab import vfio
from mdev_orchestrator.capacity.models import survey
from mdev_orchestrator.capacity.planner import plan
from mdev_orchestrator.host import sysfs
from mdev_orchestrator.model import Host
from unit.capacity.cases import check, exhaustive, wishes
from unit.capacity.drivers import Texts

pytestmark = pytest.mark.skipif("MDO_LAB" not in os.environ, reason="needs the lab's kernel")

SAMPLES = os.environ.get("MDO_LAB_SAMPLES")
DRIVERS = ("mtty", "mdpy", "mbochs") if SAMPLES else ()
CASES = 50 if platform.release().startswith("6.1.") else 200
FULL = {errno.ENOSPC, errno.EUSERS}


@pytest.fixture(scope="module", autouse=True)
def drivers() -> Iterator[None]:
    with vfio.loaded(grid_parents=2, igd_parents=2):
        for name in DRIVERS:
            subprocess.run(["insmod", Path(SAMPLES or "") / f"{name}.ko"], check=True)
        try:
            yield
        finally:
            for name in DRIVERS:
                subprocess.run(["rmmod", name], check=True)


class Parent:
    """One of the kernel's, in the shape of :class:`unit.capacity.cases.Parent`."""

    def __init__(self, name: str) -> None:
        (found,) = (parent for parent in sysfs.scan().parents if parent.name == name)
        self.name = name
        self.texts: dict[str, Texts] = {
            type_.id: (type_.name, type_.description, type_.attributes) for type_ in found.types
        }
        self.directory = vfio.PARENTS / name / "mdev_supported_types"
        self.devices: list[tuple[str, str]] = []
        self.said = {frozenset(): self.counts()}

    @property
    def used(self) -> Counter[str]:
        return Counter(type_ for _, type_ in self.devices)

    def counts(self) -> dict[str, int]:
        return {
            type_: int((self.directory / type_ / "available_instances").read_text())
            for type_ in self.texts
        }

    def create(self, type_: str) -> bool:
        uuid = str(uuid4())
        try:
            vfio.poke(self.directory / type_ / "create", uuid)
        except OSError as error:
            if error.errno not in FULL:
                raise
            return False
        self.devices.append((uuid, type_))
        self.said.setdefault(frozenset(self.used.items()), self.counts())
        return True

    def remove(self, uuid: str) -> None:
        """Remove a device, and wait until the driver counts as it did before such a one was made.

        The core gives an instance back when the last reference goes, which may be a moment later.
        """
        vfio.poke(vfio.MDEVS / uuid / "remove", "1")
        self.devices = [device for device in self.devices if device[0] != uuid]
        expected = self.said.get(frozenset(self.used.items()))
        deadline = time.monotonic() + 5
        while expected is not None and (counts := self.counts()) != expected:
            assert time.monotonic() < deadline, (self.name, self.used, counts, expected)
            time.sleep(0.001)

    def become(self, used: Counter[str]) -> None:
        """Have just so many devices of each type."""
        for uuid, type_ in reversed(self.devices):
            if self.used[type_] > used[type_]:
                self.remove(uuid)
        for type_, count in (used - self.used).items():
            for _ in range(count):
                assert self.create(type_), "what fitted in one order does not in another"

    def left(self, used: Counter[str], type_: str) -> int:
        """Whether it takes one more, found out by asking for it."""
        self.become(used)
        taken = self.create(type_)
        if taken:
            self.remove(self.devices[-1][0])
        return int(taken)

    def occupy(self, rng: random.Random) -> None:
        """Create some devices, up to all that fit, and remove a few of them."""
        types = sorted(self.texts)
        for _ in range(rng.choice([0, 1, 3, 6, 12])):
            if not self.create(rng.choice(types)):
                types = [type_ for type_, left in self.counts().items() if left]
                if not types:
                    break
        for uuid, _ in rng.sample(self.devices, min(len(self.devices), rng.randrange(4))):
            self.remove(uuid)


def decide(rng: random.Random, everywhere: list[Parent]) -> bool:
    """One case; whether it fits."""
    parents = rng.sample(everywhere, rng.randint(1, 3))
    for parent in parents:
        parent.occupy(rng)
    there = [device for parent in parents for device in parent.devices]
    gone = rng.sample(there, min(len(there), rng.choice([0, 0, 0, 1, 3])))
    host = sysfs.scan()
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


def test_plans_are_as_the_kernel_decides(record_property: Callable[[str, object], None]) -> None:
    parents = [Parent(parent.name) for parent in sysfs.scan().parents]
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
    record_property("cases that fit", decided[True])
    record_property("cases that do not", decided[False])
    assert decided.total() >= CASES
    assert min(decided[True], decided[False]) > CASES // 5, "too easy or too hard to tell anything"
