# SPDX-License-Identifier: GPL-2.0-or-later
"""What a guest was asked for and may do yet: marks that outlive the command that asked."""

from __future__ import annotations

import time
from pathlib import Path

from mdev_orchestrator import errors
from mdev_orchestrator.errors import Outcome

ASKED = "asked"
"""A file in a guest's directory that is touched before its power button is pressed. It goes when it
is known that the guest runs on: one that is left says that the guest may power down yet."""


def still_asked(label: str, what: str, seconds: float) -> errors.DeadlineError:
    """The error for a guest that was asked for something and may do it yet.

    :param what: What it was asked to do.
    :param seconds: Until it has had its time to answer.
    """
    return errors.DeadlineError(
        f"{label} was asked to {what} and may do so yet",
        f"try again in {seconds:.0f} s",
        outcome=Outcome.UNKNOWN,
        subject=label,
    )


def time_left(mark: Path, seconds: float) -> float | None:
    """Of so many seconds since a mark was touched, those that are left; ``None`` without a mark."""
    try:
        passed = time.time() - mark.stat().st_mtime
    except FileNotFoundError:
        return None
    return min(seconds, seconds - passed)  # a clock that was set back does not prolong it
