# SPDX-License-Identifier: GPL-2.0-or-later
"""What the unit tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from unit.fakesys import FakeSystem


@pytest.fixture
def system(tmp_path: Path) -> FakeSystem:
    """A machine without mdev; a test adds what it needs."""
    return FakeSystem(tmp_path)
