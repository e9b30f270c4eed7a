# SPDX-License-Identifier: GPL-2.0-or-later
"""The driver in each of its ways to start, outermost; then the QEMUs; then fresh mdevs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from lab import vfio
from lab.conftest import kernel_log, make
from matrix import machines
from matrix.machines import Version

__all__ = ["kernel_log", "make"]

HERE = Path(__file__).parent
DRIVERS = {
    "implicit": {"implicit_start": 1, "has_online": 1},
    "explicit": {"implicit_start": 0, "has_online": 1},
    "no-online": {"implicit_start": 1, "has_online": 0},
}
LINKS = 3


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "long: minutes of it; one kernel is enough")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if "MDO_LAB" not in os.environ:
        for item in items:
            if HERE in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="needs the lab's kernel"))


@pytest.fixture(scope="session", params=list(DRIVERS))
def driver(request: pytest.FixtureRequest) -> Iterator[str]:
    """``explicit-2`` is the explicit one with two links."""
    kind, found, links = request.param.rpartition("-") if "-" in request.param else ("", "", "")
    if not (found and links.isdigit()):
        kind, links = request.param, LINKS
    with vfio.loaded(links=int(links), **DRIVERS[kind]):
        yield kind


@pytest.fixture(params=[machines.STOCK, "10.0", "10.2"])
def version(request: pytest.FixtureRequest) -> Version:
    found = machines.versions().get(request.param)
    if found is None:
        pytest.skip(f"MDO_TEST_QEMU names no {request.param}")
    return found


@pytest.fixture
def group_of(make: Callable[..., list[str]], driver: str) -> Callable[[int], list[str]]:
    """Fresh mdevs in one start group, if they are more than one and the driver knows groups."""

    def factory(count: int) -> list[str]:
        return make(count, str(uuid4()) if count > 1 and driver != "no-online" else "")

    return factory
