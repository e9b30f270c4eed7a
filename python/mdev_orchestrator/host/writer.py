# SPDX-License-Identifier: GPL-2.0-or-later
"""Writes to sysfs that may block for ever, from a process that can be left behind.

``remove`` of an mdev that a guest holds blocks its writer in the kernel, uninterruptibly, until the
guest lets go; a vendor's ``create`` may take as long as it likes. A thread would not do: a process
does not end before its last thread does. So every such write is made by a child that shares
nothing with us but the file it writes.

Such a child outlives a parent that is killed, and who repairs things after that must not be
overtaken by its write. It is born with a descriptor that names its file (``O_PATH``, which opens
nothing), so ``/proc`` tells of it from its first moment.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Awaitable, Callable

Writer = Callable[[str, bytes], Awaitable[int]]
"""Takes a path and the data, gives 0 or the kernel's errno."""

_MAX_FD = 1 << 20
_UNKNOWN = 255  # no errno
_KILL_SECONDS = 1.0  # for a killed child to end, so that what it did is known; a driver may hold it


async def write_apart(path: str, data: bytes) -> int:
    """Write ``data`` to the existing file ``path`` with one ``write`` of a child process.

    Cancelling leaves the child behind: it ends when the kernel lets it, with no descriptor of ours,
    in a session of its own.

    :return: 0, or the errno of the failed ``open`` or ``write``.
    """
    return await _write(path, data, kill=False)


async def write_or_kill(path: str, data: bytes) -> int:
    """Like :func:`write_apart`, but cancelling kills the child.

    For a write that may be given up halfway, such as a start: a driver that waits killably ends it
    then.
    """
    return await _write(path, data, kill=True)


async def _write(path: str, data: bytes, *, kill: bool) -> int:
    import asyncio  # here, because who only reads the host does without it

    loop = asyncio.get_running_loop()
    outcome: asyncio.Future[int] = loop.create_future()
    try:
        mark = os.open(path, os.O_PATH)
    except OSError as error:
        return error.errno or _UNKNOWN
    try:
        # fork and not exec: the child makes a handful of system calls and takes no lock, and
        # starting an interpreter costs a hundred times as much inside an emulated machine.
        pid = os.fork()
        if pid == 0:
            _child(path, data, mark)
    finally:
        os.close(mark)
    pidfd = os.pidfd_open(pid)

    def reap() -> None:
        loop.remove_reader(pidfd)
        os.close(pidfd)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        outcome.set_result(status)

    loop.add_reader(pidfd, reap)
    try:
        return await asyncio.shield(outcome)
    except asyncio.CancelledError:
        if kill and not outcome.done():
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            await asyncio.wait((outcome,), timeout=_KILL_SECONDS)
        raise


def _child(path: str, data: bytes, mark: int) -> None:
    status = _UNKNOWN
    try:
        os.setsid()  # the terminal's ctrl-C is for the parent: it decides what to undo
        os.closerange(0, mark)
        os.closerange(mark + 1, _MAX_FD)
        os.write(os.open(path, os.O_WRONLY), data)
        status = 0
    except OSError as error:
        status = error.errno or _UNKNOWN
    finally:
        os._exit(status)
