# SPDX-License-Identifier: GPL-2.0-or-later
"""Random requests, and what a plan for them must be.

For parents of any make: the arithmetic of :mod:`.drivers`, or those of the kernel that runs
(``tests/lab/test_planner.py``).
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Protocol

from mdev_orchestrator.capacity.planner import Plan, Request
from mdev_orchestrator.spec import Condition, SizeCondition
from unit.capacity.drivers import Texts


class Parent(Protocol):
    """What creates devices."""

    @property
    def name(self) -> str: ...

    @property
    def texts(self) -> Mapping[str, Texts]: ...

    @property
    def used(self) -> Counter[str]:
        """How many devices of each type exist."""

    def left(self, used: Counter[str], type_: str) -> int:
        """How many more of a type it would take where ``used`` exist; 1 may stand for more."""

    def counts(self) -> dict[str, int]:
        """What it says that is left of each type."""

    def create(self, type_: str) -> bool:
        """Whether it took one."""


def wishes(rng: random.Random, parents: Sequence[Parent]) -> list[Request]:
    types = sorted({type_ for parent in parents for type_ in parent.texts})
    conditions: list[tuple[tuple[str, Condition], ...]] = [
        (("framebuffer", SizeCondition(text)),)
        for text in (">=256M", "<=16M", ">=512M, <2G", ">1M")
    ]

    def wish(number: int) -> Request:
        by_type = rng.random() < 0.7
        return Request(
            key=f"r{number}",
            type_id=rng.choice(types) if by_type else None,
            conditions=() if by_type else rng.choice(conditions),
            count=rng.choice([1, 1, 1, 2, 2, 3, 4]),
            group=rng.choice([None, None, "g", "h"]),
            parent=rng.choice(parents).name if rng.random() < 0.15 else None,
        )

    return [wish(number) for number in range(rng.randint(1, 4))]


SIZES = {"M": 1 << 20, "G": 1 << 30}


def _framebuffer(texts: Texts) -> int | None:
    _, description, files = texts
    if "framebuffer" in files:
        return int(files["framebuffer"])
    words = (description or "").split()
    return int(words[2]) << 20 if words[-2:] == ["video", "memory"] else None


def accepts(request: Request, driver: Parent, type_: str) -> bool:
    if request.parent not in {None, driver.name} or request.type_id not in {None, type_}:
        return False
    size = _framebuffer(driver.texts[type_])
    return all(size is not None and wanted.holds(size) for _, wanted in request.conditions)


def exhaustive(  # noqa: C901 - plain loops, easy to believe
    requests: list[Request], parents: Sequence[Parent]
) -> bool:
    """Whether all fit: every device of every request on every type of every parent.

    Asks the drivers' own arithmetic and none of the planner's.
    """
    units = [request for request in requests for _ in range(request.count)]
    units.sort(key=lambda unit: (unit.group or "", unit.key))
    left: dict[tuple[int, tuple[tuple[str, int], ...], str], int] = {}
    failed: set[object] = set()

    def free(index: int, used: Counter[str], type_: str) -> int:
        key = (index, tuple(sorted(used.items())), type_)
        if key not in left:
            left[key] = parents[index].left(used, type_)
        return left[key]

    def go(number: int, state: tuple[Counter[str], ...], group: int | None) -> bool:
        if number == len(units):
            return True
        unit = units[number]
        if unit.group is None or number == 0 or units[number - 1].group != unit.group:
            group = None
        key = (number, tuple(tuple(sorted(used.items())) for used in state), group)
        if key in failed:
            return False
        for index, driver in enumerate(parents):
            if group not in {None, index}:
                continue
            for type_ in driver.texts:
                if accepts(unit, driver, type_) and free(index, state[index], type_) > 0:
                    more = (*state[:index], state[index] + Counter([type_]), *state[index + 1 :])
                    if go(number + 1, more, index if unit.group is not None else None):
                        return True
        failed.add(key)
        return False

    return go(0, tuple(driver.used for driver in parents), None)


def check(requests: list[Request], parents: Sequence[Parent], answer: Plan) -> None:
    """The placements are what was asked for, and the drivers take them."""
    by_name = {driver.name: driver for driver in parents}
    by_key = {request.key: request for request in requests}
    homes: dict[str, set[str]] = {}
    for placement in answer.placements:
        driver = by_name[placement.parent]
        request = by_key[placement.request]
        assert accepts(request, driver, placement.type_id)
        assert driver.create(placement.type_id), "the driver refused what the plan promised"
        if request.group is not None:
            homes.setdefault(request.group, set()).add(placement.parent)
    assert all(len(home) == 1 for home in homes.values())
    placed = Counter(placement.request for placement in answer.placements)
    short = {shortfall.request for shortfall in answer.shortfalls}
    for request in requests:
        assert (placed[request.key] < request.count) == (request.key in short)
        if request.group is not None and request.key in short:
            assert placed[request.key] == 0
    for parent in answer.parents:
        assert parent.available_after == by_name[parent.capacity.name].counts()
