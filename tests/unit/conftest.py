# SPDX-License-Identifier: GPL-2.0-or-later
"""What the unit tests share."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from unit.fakesys import FakeSystem

# builds and emulated machines run beside the tests: slowness says nothing about the code
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")


@pytest.fixture(autouse=True)
def _own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees the journal or the guests of whoever runs it."""
    monkeypatch.setenv("MDO_STATE_DIR", str(tmp_path / "state"))


@pytest.fixture
def system(tmp_path: Path) -> FakeSystem:
    """A machine without mdev; a test adds what it needs."""
    return FakeSystem(tmp_path)
