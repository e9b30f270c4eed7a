# SPDX-License-Identifier: GPL-2.0-or-later
"""What holds an event loop is found: computing, and blocking calls."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import pytest

from unit import loopwatch


def compute() -> None:
    end = time.thread_time() + 0.3
    while time.thread_time() < end:
        pass


@pytest.mark.parametrize("hold", [compute, lambda: time.sleep(0.4)], ids=["computes", "sleeps"])
def test_a_callback_that_takes_long_is_noted(
    hold: Callable[[], None], loop_holds: list[str]
) -> None:
    async def story() -> None:
        hold()

    with loopwatch.watch() as holds:
        asyncio.run(story())
    loop_holds.clear()
    (sentence,) = holds
    assert sentence.endswith(">")
    assert " ms in <" in sentence


def test_what_waits_for_others_is_not_noted() -> None:
    async def story() -> None:
        await asyncio.sleep(0.2)
        await asyncio.to_thread(compute)

    with loopwatch.watch() as holds:
        asyncio.run(story())
    assert holds == []
