# SPDX-License-Identifier: GPL-2.0-or-later
"""A place for guests, a QEMU, and a guest whose QEMU is a script."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from mdev_orchestrator.machine import Machine
from unit.engine.scripted import ScriptedGuest, scripted_guest
from unit.fakesys import FakeSystem
from unit.qemu.conftest import place, qemu

__all__ = ["place", "qemu"]


@pytest.fixture
async def guest(machine: Machine, system: FakeSystem) -> AsyncIterator[ScriptedGuest]:
    """A guest of the test's machine."""
    async with scripted_guest(machine, system) as guest:
        yield guest
