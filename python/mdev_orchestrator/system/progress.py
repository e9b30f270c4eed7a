# SPDX-License-Identifier: GPL-2.0-or-later
"""How far a task is that takes seconds or minutes, told to its caller in lines of text."""

from __future__ import annotations

import time
from collections.abc import Callable

#: Takes a line for the user.
Progress = Callable[[str], None]

SECONDS = 15.0
"""Between two lines of a task that goes on."""


def throttled(progress: Progress, seconds: float = SECONDS) -> Progress:
    """Pass on a line only if ``seconds`` have gone by since the last one, or since this call."""
    last = time.monotonic()

    def passed_on(line: str) -> None:
        nonlocal last
        if time.monotonic() - last > seconds:
            last = time.monotonic()
            progress(line)

    return passed_on
