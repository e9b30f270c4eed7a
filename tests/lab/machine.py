# SPDX-License-Identifier: GPL-2.0-or-later
"""The machine that tests inside a lab work on: the lab itself."""

from __future__ import annotations

import os
from functools import cache

from mdev_orchestrator.machine import Machine


def machine() -> Machine:
    """The machine, with the state directory that ``MDO_STATE_DIR`` names now."""
    return _machine(os.environ.get("MDO_STATE_DIR"))


@cache
def _machine(state: str | None) -> Machine:
    return Machine(state=state)
