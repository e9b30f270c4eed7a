# SPDX-License-Identifier: GPL-2.0-or-later
"""What the unit tests share."""

from __future__ import annotations

import importlib
import os
import pkgutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import pyudev  # noqa: F401 - see _import_all
import qemu.qmp  # noqa: F401 - likewise
from hypothesis import HealthCheck, settings

import mdev_orchestrator
from mdev_orchestrator.machine import Machine
from mdev_orchestrator.system import writer
from unit import fakesys, loopwatch
from unit.fakesys import FakeSystem

# builds and emulated machines run beside the tests: slowness says nothing about the code
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")


@pytest.fixture(autouse=True)
def _own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees the journal or the guests of the user that runs it."""
    monkeypatch.setenv("MDO_STATE_DIR", str(tmp_path / "state"))


@pytest.fixture(autouse=True)
def loop_holds() -> Iterator[list[str]]:
    """Fail a test in which a callback holds the event loop; not in an emulated machine.

    A test that does so on purpose clears the list. On a machine with several times more to do than
    it has processors, what holds a callback cannot be told apart from the others' work.
    """
    if os.environ.get("MDO_LAB"):
        yield []
        return
    with loopwatch.watch() as holds:
        yield holds
    if holds and os.getloadavg()[0] < 2 * (os.cpu_count() or 1):
        pytest.fail("the event loop was held: " + "; ".join(holds), pytrace=False)


@pytest.fixture(autouse=True)
def _fake_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the writer writes below the root of a :class:`FakeSystem` goes to that."""
    monkeypatch.setattr(writer, "_write_file", fakesys.write_file)


@pytest.fixture
def system(tmp_path: Path) -> Iterator[FakeSystem]:
    """A machine without mdev; a test adds what it needs."""
    system = FakeSystem(tmp_path)
    yield system
    system.closed = True


@pytest.fixture
def machine(system: FakeSystem, tmp_path: Path) -> Machine:
    """The handle of :func:`system`; its writer's children end when they are idle."""
    return Machine(system.root, state=tmp_path / "state")


def _import_all() -> None:
    """Import what commands import when they need it, so that no test pays for it on its loop."""
    for module in pkgutil.walk_packages(mdev_orchestrator.__path__, "mdev_orchestrator."):
        if not module.name.startswith("mdev_orchestrator.lab"):
            importlib.import_module(module.name)


_import_all()
