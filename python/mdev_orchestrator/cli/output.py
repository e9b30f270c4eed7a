# SPDX-License-Identifier: GPL-2.0-or-later
"""What every command needs to run and to speak.

Results go to standard output, everything else to standard error. Imports that take time stand in
the functions that need them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mdev_orchestrator.errors import MdoError, one_line

if TYPE_CHECKING:
    from mdev_orchestrator.engine.executor import StepEvent

T = TypeVar("T")

USAGE_ERROR = 2
INTERRUPTED = 130
BROKEN_PIPE = 141

_RICH_ROWS = 200  # more than that nobody reads as a drawn table, and drawing takes seconds


def host_root() -> Path:
    """Directory in which ``sys``, ``dev`` and ``proc`` stand: ``/``, or what ``MDO_ROOT`` says."""
    return Path(os.environ.get("MDO_ROOT") or "/").absolute()


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a command's coroutine to its end.

    Ctrl-C, SIGTERM and SIGHUP cancel it, and what it does then (undo, say goodbye) is waited for.
    A second one is not: the program ends at that moment, like one that is killed.
    """
    import asyncio
    import signal

    received: list[int] = []

    async def guarded() -> T:
        loop = asyncio.get_running_loop()
        task = asyncio.current_task()

        def stop(number: int) -> None:
            received.append(number)
            if len(received) > 1:
                say("interrupted again: stopped at once; mdo recover undoes what was begun")
                os._exit(128 + number)
            if task is not None:
                task.cancel()

        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, stop, number)
        return await coroutine

    try:
        return asyncio.run(guarded())
    except asyncio.CancelledError as error:
        if not received:
            raise
        say("; ".join(("interrupted", *getattr(error, "__notes__", ()))))
        raise SystemExit(128 + received[0]) from None


def emit(text: str) -> None:
    """Print a result at once. A reader that has gone ends the program quietly."""
    try:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        # what is still buffered must not be tried again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(BROKEN_PIPE) from None


def emit_json(value: object) -> None:
    """Print one JSON document on one line: built-in types, structs, UUIDs and paths."""
    import msgspec

    emit(msgspec.json.encode(value, enc_hook=str).decode())


def emit_table(title: str, headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table: drawn on a terminal, plain aligned columns with nothing cut off elsewhere.

    Without rows nothing is printed.
    """
    if not rows:
        return
    if sys.stdout.isatty() and len(rows) <= _RICH_ROWS:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(title=title, title_justify="left", title_style="bold")
        for header in headers:
            table.add_column(header, overflow="fold")
        for row in rows:
            table.add_row(*map(Text, row))
        Console().print(table)
        return
    widths = [max(map(len, column)) for column in zip(headers, *rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (tuple(header.upper() for header in headers), *rows)
    ]
    emit("\n".join(lines))


def say(text: str) -> None:
    """Tell the user something that is no result: one line on standard error."""
    with suppress(BrokenPipeError):
        sys.stderr.write(f"mdo: {one_line(text)}\n")
        sys.stderr.flush()


def confirm(question: str) -> None:
    """Ask on standard error; whatever is not yes ends the program with 1.

    :raise SystemExit: The answer is no, or there is none.
    """
    sys.stderr.write(f"{question} [y/N]: ")
    sys.stderr.flush()
    answer = sys.stdin.readline()
    if answer.strip().lower() not in {"y", "yes"}:
        if not answer.endswith("\n"):
            sys.stderr.write("\n")
        raise SystemExit(1)


def progress(event: StepEvent) -> None:
    """Tell of a step that is done or undone; an observer of the engine."""
    words = {"done": "", "undone": "undone: ", "stuck": "could not undo: "}.get(event.kind)
    if words is not None:
        say(f"[{event.number + 1}/{event.total}] {words}{event.step}")


def say_error(error: MdoError) -> None:
    """Print an error as one line: what happened, what could not be undone, what to do."""
    message = "; ".join((error.message, *getattr(error, "__notes__", ())))
    say(f"{message} \u2014 {error.hint}" if error.hint else message)
