# SPDX-License-Identifier: GPL-2.0-or-later
"""Which process a number means: process ids are used again, start times are not."""

from __future__ import annotations

from pathlib import Path


def boot_id() -> str:
    """Which boot of the machine this is; random(4)."""
    return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()


def start_time(pid: int) -> int | None:
    """When a process began, in clock ticks since boot; field 22 of stat in proc(5).

    :return: ``None`` if there is no such process, or only its zombie.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The second field is in parentheses and may itself contain spaces and parentheses.
    fields = stat.rpartition(b")")[2].split()
    return None if fields[0] in {b"Z", b"X"} else int(fields[19])
