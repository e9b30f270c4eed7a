# SPDX-License-Identifier: GPL-2.0-or-later
"""Builds that take minutes: how far they are while they run, and why they failed."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from mdev_orchestrator.errors import MdoError
from mdev_orchestrator.lab.debian import CAUSE, Progress

PROGRESS_SECONDS = 15.0
"""Between two words about how far it is."""


def run_build(
    what: str,
    command: Sequence[str],
    log: Path,
    progress: Progress,
    how_far: Callable[[bytes], str],
) -> None:
    """Run a program to its end, with all that it prints added to a log.

    :param what: What it builds, for an error.
    :param how_far: Takes each line that it prints, and gives words for ``progress``; none if the
        line tells nothing.
    :raise MdoError: It failed.
    """
    last = time.monotonic()
    with (
        log.open("ab") as out,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process,
    ):
        try:
            for line in process.stdout or ():
                out.write(line)
                if (words := how_far(line)) and time.monotonic() - last > PROGRESS_SECONDS:
                    last = time.monotonic()
                    progress(words)
        except BaseException:
            process.terminate()
            raise
    if process.returncode:
        raise failure(what, "the compiler", log)


def failure(what: str, who: str, log: Path) -> MdoError:
    """What a log says about why it failed, in one line."""
    lines = log.read_text(errors="replace").strip().splitlines() or ["no output"]
    causes = [line.strip() for line in lines if CAUSE.search(line) and "-Werror" not in line[:9]]
    return MdoError(
        f"building {what} failed: {who} said: {(causes or lines)[-1].strip()}", f"see {log}"
    )
