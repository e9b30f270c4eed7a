# SPDX-License-Identifier: GPL-2.0-or-later
"""Which process a number means: process ids are used again, start times are not.

A process that is killed goes bit by bit: its memory, and with that its command line, then its
files, thread by thread; its first thread may be a zombie while others still have what it had open.
So what it held is free when :func:`has_ended` says so, and not when something of it cannot be read
any more.
"""

from __future__ import annotations

import os
import select
from functools import cache
from pathlib import Path


@cache
def boot_id() -> str:
    """Which boot of the machine this is; random(4)."""
    return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()


def start_time(pid: int) -> int | None:
    """When a process began, in clock ticks since boot; field 22 of stat in proc(5).

    :return: ``None`` if there is no such process, or it has ended.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The second field is in parentheses and may itself contain spaces and parentheses.
    fields = stat.rpartition(b")")[2].split()
    return None if fields[0] in {b"Z", b"X"} and has_ended(pid) else int(fields[19])


def has_ended(pid: int) -> bool:
    """Whether every thread of a process has ended, collected by its parent or not."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        return bool(poll.poll(0))
    finally:
        os.close(descriptor)


def reap(children: set[int]) -> None:
    """Reap those that have ended, without waiting; they are taken out of the set."""
    for pid in [*children]:
        try:
            ended, _ = os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:  # of the process that forked us, or other code has reaped it
            ended = pid
        if ended:
            children.discard(pid)
