# SPDX-License-Identifier: GPL-2.0-or-later
"""What a guest's QEMU printed, for messages."""

from __future__ import annotations

from pathlib import Path

MAX_WORDS = 16384
"""Bytes of QEMU's own output that are looked at."""
LAST_LINES = 4
"""Lines of it that an error quotes."""


def qemu_words(log: Path) -> str:
    """Return what QEMU printed, on one line, the last part if it is long."""
    return "; ".join(_lines(log))


def _lines(log: Path) -> list[str]:
    """What QEMU printed, the last part if it is long."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - MAX_WORDS))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return []
    lines = (line.strip() for line in text.splitlines())
    return ["".join(c for c in line if c.isprintable()) for line in lines if line]


def last_words(log: Path, program: str) -> str:
    """What QEMU said last, without its warnings and its own name in front."""
    lines = [line.removeprefix(f"{Path(program).name}: ") for line in _lines(log)]
    reasons = [line for line in lines if not line.startswith("warning:")]
    return "; ".join((reasons or lines)[-LAST_LINES:])
