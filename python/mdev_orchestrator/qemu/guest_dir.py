# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest's directory: what is done to it under its lock."""

from __future__ import annotations

import contextlib
import fcntl
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

from mdev_orchestrator import errors
from mdev_orchestrator.qemu.process import (
    RunningGuest,
    has_started,
    is_guest,
    is_listening,
    read_record,
)
from mdev_orchestrator.system.directory_lock import LOCK_SECONDS, is_same, lock, opened


def remove(guest: RunningGuest) -> None:
    """Remove the directory of a guest whose process has ended. Nothing to do is no error.

    :raise BusyError: Another process is starting or removing it.
    :raise RequestError: A start group of it has not been stopped.
    """
    try:
        with opened(guest.directory) as descriptor:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not is_same(descriptor, guest.directory):
                return
            if has_started(guest):
                raise errors.RequestError(
                    f"{guest.label} has ended, and a start group of it may still be online",
                    f"mdo guest stop {guest.name} stops it",
                )
            _remove_tree(guest.directory)
    except BlockingIOError:
        raise errors.BusyError(
            f"{guest.label} is being started or removed by another process",
            "try again",
            subject=guest.label,
        ) from None
    except FileNotFoundError:
        return
    except OSError as error:
        raise errors.HostError(
            f"cannot remove {guest.directory}: {error.strerror}", errno=error.errno
        ) from error


def _remove_tree(directory: Path) -> None:
    """Remove a directory; a QEMU that is just ending removes its sockets there meanwhile."""
    while directory.exists():
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(directory)


@contextlib.asynccontextmanager
async def attaching(guest: RunningGuest) -> AsyncIterator[None]:
    """Keep other processes from tidying up after a guest while the block gives it something.

    :raise BusyError: Another process is tidying up, and does not end.
    :raise RequestError: The guest has gone meanwhile.
    """
    with contextlib.ExitStack() as stack:
        try:
            descriptor = stack.enter_context(opened(guest.directory))
        except FileNotFoundError:
            raise errors.RequestError(f"{guest.label} has gone") from None
        await lock(descriptor, fcntl.LOCK_SH, guest.label, LOCK_SECONDS)
        if not is_same(descriptor, guest.directory):
            raise errors.RequestError(f"{guest.label} has gone")
        yield


@contextlib.asynccontextmanager
async def tidying(guest: RunningGuest, seconds: float = LOCK_SECONDS) -> AsyncIterator[bool]:
    """Hold the lock of a guest's directory: it is not started, removed or given anything meanwhile.

    :param seconds: To wait for the lock.
    :return: Whether its process is alive.
    :raise BusyError: Another process has the lock, and keeps it.
    :raise FileNotFoundError: The directory has gone.
    """
    with opened(guest.directory) as descriptor:
        await lock(descriptor, fcntl.LOCK_EX, guest.label, seconds)
        if not is_same(descriptor, guest.directory):
            raise FileNotFoundError(guest.directory)
        try:
            record = read_record(guest.directory)
        except FileNotFoundError:
            yield False  # its starter has ended, and its gate with it
        except (OSError, ValueError):
            yield is_listening(guest.qmp_socket)
        else:
            yield is_guest(record)
