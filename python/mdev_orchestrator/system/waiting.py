# SPDX-License-Identifier: GPL-2.0-or-later
"""Waits on the event loop: for a condition that sends no event, and past a cancellation."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")


async def poll_until(check: Callable[[], bool], seconds: float, *, every: float = 0.05) -> bool:
    """Call ``check`` until it returns true; for conditions that send no event.

    :param seconds: Time limit; the condition is checked once even if this is 0.
    :param every: Seconds between two calls.
    :return: Whether the condition became true in time.
    """
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    while not check():
        left = end - loop.time()
        if left <= 0:
            return False
        await asyncio.sleep(min(every, left))
    return True


async def readable(descriptor: int) -> None:
    """Return when there is something to read from a descriptor, or its other end has gone.

    A pidfd is readable when its process has ended.
    """
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(descriptor, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(descriptor)


async def run_to_completion(work: Awaitable[T], *, patience: float | None = None) -> T:
    """Wait for ``work`` to end, even if the caller is cancelled meanwhile.

    The cancellation is raised again when the work has ended; the result of the work is lost then,
    and so is its exception. A second cancellation is not waited for.

    :param patience: Seconds to go on waiting after a cancellation; ``None`` for no limit. When
        they have passed, the work is cancelled.
    """
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        if not task.done():
            await asyncio.wait((task,), timeout=patience)
        if not task.done():
            task.cancel()
            await asyncio.wait((task,))
        if not task.cancelled():
            task.exception()  # retrieved: the cancellation is what the caller gets
        raise
