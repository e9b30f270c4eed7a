# SPDX-License-Identifier: GPL-2.0-or-later
"""A lock on a directory that another process may remove or make again meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from mdev_orchestrator import errors

LOCK_SECONDS = 10.0


@contextlib.contextmanager
def opened(directory: Path) -> Iterator[int]:
    """A descriptor of a directory for the block, at whose end its lock is given back."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        yield descriptor
    finally:
        _release(descriptor)


def _release(descriptor: int) -> None:
    """Give a lock back at once: a writer that is forked at this moment shares the descriptor."""
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


def is_locked(directory: Path) -> bool:
    """Whether another process has the lock for itself."""
    try:
        with opened(directory) as descriptor:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def is_same(descriptor: int, directory: Path) -> bool:
    """Whether the descriptor still is of what has this name."""
    try:
        status = directory.lstat()
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(descriptor), status)


async def lock(descriptor: int, kind: int, label: str, seconds: float) -> None:
    """Wait for a lock that another process holds for a moment; the kernel has no event for that."""
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    while True:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if loop.time() >= end:
                raise errors.BusyError(
                    f"{label} is being started, changed or removed by another process",
                    "try again",
                    subject=label,
                ) from None
            await asyncio.sleep(0.05)
        else:
            return
