# SPDX-License-Identifier: GPL-2.0-or-later
"""What a command acts on and how its coroutine is run: the machine, and the signals that end it."""

from __future__ import annotations

import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

from mdev_orchestrator.cli import output
from mdev_orchestrator.errors import MdoError
from mdev_orchestrator.machine import Machine

T = TypeVar("T")

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SAME_SECONDS = 1.0
"""A second signal of one kind within this time is the same interruption: ``timeout`` sends one to
its child and at once another to the whole process group."""


class InterruptionError(MdoError):
    """A signal ended the command, after what was half done was undone."""

    def __init__(self, number: int, message: str = "interrupted") -> None:
        super().__init__(message)
        self.exit_code = 128 + number


class Interruptions:
    """Tells a signal that asks the command to end from one that insists."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._since = 0.0

    def insists(self, number: int, now: float) -> bool:
        """Take notice of a signal; whether the command must end without undoing anything.

        :param now: Seconds of a monotonic clock.
        """
        if self.number is None:
            self.number, self._since = number, now
            return False
        return number != self.number or now - self._since >= SAME_SECONDS


def machine() -> Machine:
    """The host that commands act on: below ``MDO_ROOT`` if that is set."""
    return Machine(Path(os.environ.get("MDO_ROOT") or "/").absolute())


def run(work: Callable[[Machine], Awaitable[T]]) -> T:
    """Run the part of a command that takes time, on the machine, to its end.

    Ctrl-C, SIGTERM and SIGHUP cancel it, and what it does then (undo, say goodbye) is waited for.
    A second signal is not: the process ends at once, as if it were killed.

    :raise InterruptionError: A signal cancelled the coroutine, and it has ended.
    """
    import asyncio

    interruptions = Interruptions()

    async def guarded() -> T:
        loop = asyncio.get_running_loop()
        task = asyncio.current_task()

        def stop(number: int) -> None:
            first = interruptions.number is None
            if interruptions.insists(number, loop.time()):
                text = "interrupted again: stopped at once; mdo recover undoes what was begun"
                output.report(InterruptionError(number, text))
                os._exit(128 + number)
            if first and task is not None:
                task.cancel()

        for number in SIGNALS:
            loop.add_signal_handler(number, stop, number)
        host = machine()
        try:
            return await work(host)
        finally:
            await host.close()

    try:
        return asyncio.run(guarded())
    except asyncio.CancelledError as cancelled:
        if interruptions.number is None:
            raise
        error = InterruptionError(interruptions.number)
        for note in getattr(cancelled, "__notes__", ()):
            error.add_note(note)
        raise error from None
