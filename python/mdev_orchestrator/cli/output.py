# SPDX-License-Identifier: GPL-2.0-or-later
"""How a command speaks: results on standard output, everything else on standard error.

A result that cannot be written is an error that names what was made. What goes to standard error is
best effort: a full disk or a closed descriptor there never ends a command and never undoes one.
"""

from __future__ import annotations

import io
import os
import stat
import sys
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TextIO

from mdev_orchestrator.errors import CommandError, MdoError, one_line

if TYPE_CHECKING:
    from mdev_orchestrator.engine.executor import StepEvent
    from mdev_orchestrator.interop.domain_xml import LeftOut

USAGE_ERROR = 2
INTERNAL_ERROR = 70  # EX_SOFTWARE of sysexits.h
BROKEN_PIPE = 141

_DRAWN_ROWS = 200
"""A longer table is printed plain: drawing it takes seconds."""
_NARROWEST = 10
"""Columns that a cell of words keeps in a drawn table; a longer word in it is broken."""


class OutputError(MdoError):
    """Standard output cannot be written."""

    exit_code = 74  # EX_IOERR of sysexits.h


class _Mode:
    """How this process speaks.

    :ivar json: Errors and remarks are JSON documents, one a line.
    """

    json = False


def speak_json(on: bool) -> bool:
    """Choose whether errors and remarks are JSON documents; gives ``on``, for an option's value."""
    _Mode.json = on
    return on


# ---- the descriptors ----


def prepare() -> None:
    """Put ``/dev/null`` where standard input or error is closed, and check standard output.

    A file that is opened later must not become descriptor 0, 1 or 2: it would be read or written as
    the terminal. Names of a vendor's types may be in any encoding, so nothing here fails on one.

    :raise OutputError: Standard output is closed or full, so that a result would be lost.
    """
    lost = sys.stdout is None  # Python found its descriptor closed
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # the lowest that is free: this one
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    if sys.stdin is None:
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 - the process's own
    if sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    if lost:
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        raise OutputError(
            "standard output is closed; nothing was done", ">/dev/null throws it away"
        )
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    _check_stdout()


def _check_stdout() -> None:
    """Write nothing to standard output: what is full or only readable says so.

    :raise OutputError: It does.
    """
    try:
        descriptor = sys.stdout.fileno()
    except OSError:
        return  # a caller's own stream
    try:
        if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):  # an empty message is a message
            os.write(descriptor, b"")
    except OSError as error:
        _discard(sys.stdout)
        raise OutputError(f"{_unwritable(error)}; nothing was done") from error


def _unwritable(error: Exception) -> str:
    return f"standard output cannot be written: {getattr(error, 'strerror', None) or error}"


def _discard(stream: TextIO) -> None:
    """Let what is still in a stream's buffer go nowhere: the interpreter writes it at its end."""
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


# ---- results ----


def emit(text: str, *, made: str = "") -> None:
    """Print a result at once.

    :param made: What the command has made, for the error if it cannot be printed.
    :raise OutputError: It cannot be printed.
    :raise SystemExit: Its reader has gone, which is no error.
    """
    _write(f"{text}\n", made)


def emit_bytes(data: bytes) -> None:
    """Print what a guest or a program wrote, as it is.

    :raise OutputError: It cannot be printed.
    :raise SystemExit: Its reader has gone, which is no error.
    """
    _write(data, "")


def _write(data: str | bytes, made: str) -> None:
    try:
        if isinstance(data, bytes):
            sys.stdout.buffer.write(data)
        else:
            sys.stdout.write(data)
        sys.stdout.flush()
    except BrokenPipeError:
        _discard(sys.stdout)
        if made:
            remark(f"{made}; the reader of standard output has gone")
        raise SystemExit(BROKEN_PIPE) from None
    except (OSError, ValueError) as error:
        _discard(sys.stdout)
        hint = "mdo host and mdo guest list show what there is" if made else ""
        message = "; ".join(filter(None, (made, _unwritable(error))))
        raise OutputError(message, hint, errno=getattr(error, "errno", None)) from error


def emit_json(value: object, *, made: str = "") -> None:
    """Print one JSON document on one line: built-in types, structs, UUIDs and paths.

    :param made: As of :func:`emit`.
    """
    import msgspec

    emit(msgspec.json.encode(value, enc_hook=str).decode(), made=made)


def emit_table(
    title: str,
    headers: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    whole: Collection[str] = (),
) -> None:
    """Print a table: drawn on a terminal, plain aligned columns with nothing cut off elsewhere.

    Where a terminal is too narrow for that, each row is a few lines. Without rows nothing is
    printed.

    :param whole: Headers of the columns with identifiers: no line breaks one.
    """
    if not rows:
        return
    if sys.stdout.isatty() and len(rows) <= _DRAWN_ROWS:
        from rich.console import Console

        console = Console()
        with console.capture() as capture:
            draw(console, title, headers, rows, whole)
        emit(capture.get().rstrip("\n"))
        return
    widths = [max(map(len, column)) for column in zip(headers, *rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (tuple(header.upper() for header in headers), *rows)
    ]
    emit("\n".join(lines))


def draw(
    console: Any,  # noqa: ANN401 - rich.console.Console, which is imported only to draw
    title: str,
    headers: Sequence[str],
    rows: Sequence[Sequence[str]],
    whole: Collection[str] = (),
) -> None:
    """Draw a table as wide as the console, or each row as lines if identifiers do not fit."""
    from rich.table import Table
    from rich.text import Text

    least = [
        max(_longest(cell, whole=header in whole) for cell in (header, *column))
        for header, *column in zip(headers, *rows, strict=True)
    ]
    room = console.width - 3 * len(least) - 1  # a border and two blanks each
    if sum(least) > room:
        console.print(Text(title, style="bold"))
        _stack(console, headers, rows)
        return
    most = [max(map(len, column)) for column in zip(headers, *rows, strict=True)]
    table = Table(title=title, title_justify="left", title_style="bold")
    for header, width in zip(headers, _widths(least, most, room), strict=True):
        table.add_column(header, overflow="fold", width=width)
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)


def _widths(least: Sequence[int], most: Sequence[int], room: int) -> list[int]:
    """The widths of columns: what each needs at least, then what those with the least wish want.

    rich shrinks the widest columns first, and those are the identifiers.
    """
    widths = list(least)
    spare = room - sum(least)
    for number in sorted(range(len(most)), key=lambda number: most[number] - least[number]):
        more = min(spare, max(most[number] - least[number], 0))
        widths[number] += more
        spare -= more
    return widths


def _longest(cell: str, *, whole: bool) -> int:
    """Columns that a cell needs at least: its longest word, if it must not be broken."""
    longest = max(map(len, cell.split()), default=0)
    return longest if whole else min(longest, _NARROWEST)


def _stack(console: Any, headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:  # noqa: ANN401
    width = max(map(len, headers))
    for row in rows:
        mark = "\u2022"
        for header, cell in zip(headers, row, strict=True):
            if cell:
                # the terminal breaks a line that is too long, and copies it whole
                console.out(f"{mark} {header:{width}}  {cell}", highlight=False)
                mark = " "


# ---- everything else ----


def write_error(text: str) -> None:
    """Write to standard error if that can be done."""
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except (OSError, ValueError):
        _discard(sys.stderr)


def say(text: str) -> None:
    """Write one line to standard error, as it is in either mode."""
    write_error(f"mdo: {one_line(text)}\n")


def remark(text: str) -> None:
    """Tell the user something that is neither a result nor an error."""
    if _Mode.json:
        _document({"remark": one_line(text)})
    else:
        say(text)


def left_out(part: LeftOut) -> None:
    """Tell of a part of a domain that its spec does not say."""
    if _Mode.json:
        from msgspec import structs

        _document({"left_out": structs.asdict(part)})
    else:
        say(str(part))


def report(error: MdoError) -> None:
    """Print an error as one line: what happened, what could not be undone, what to do."""
    if _Mode.json:
        _document({"error": shape(error)})
        return
    message = "; ".join((error.message, *_notes(error)))
    say(f"{message} \u2014 {error.hint}" if error.hint else message)


def report_failed(errors: Iterable[MdoError | None]) -> int:
    """Print the error of each object that has one; the exit code of a command on several."""
    failed = [error for error in errors if error is not None]
    for error in failed:
        report(error)
    return 1 if failed else 0


def shape(error: MdoError) -> dict[str, Any]:
    """The documented JSON shape of an error."""
    return {
        "kind": type(error).__name__,
        "message": error.message,
        "hint": error.hint or None,
        "exit_code": error.exit_code,
        "subject": error.subject or None,
        "errno": error.errno,
        "qmp_class": error.qmp_class if isinstance(error, CommandError) else None,
        "outcome": None if error.outcome is None else str(error.outcome),
        "notes": [one_line(note) for note in _notes(error)],
        "details": error.details or None,
    }


def _notes(error: BaseException) -> Iterable[str]:
    return getattr(error, "__notes__", ())


def _document(value: object) -> None:
    import msgspec

    write_error(msgspec.json.encode(value).decode() + "\n")


def trace(error: BaseException) -> None:
    """Print the traceback of an error, and its details."""
    import traceback

    write_error("".join(traceback.format_exception(error)))
    if isinstance(error, MdoError) and error.details:
        write_error(f"{one_line(error.details)}\n")


def progress(event: StepEvent) -> None:
    """Tell of a step that is done or undone; an observer of the engine."""
    words = {"done": "", "undone": "undone: ", "stuck": "could not undo: "}.get(event.kind)
    if words is not None and not _Mode.json:
        say(f"[{event.number + 1}/{event.total}] {words}{event.step}")


def confirm(question: str) -> None:
    """Ask on standard error; whatever is not yes ends the program with 1.

    :raise SystemExit: The answer is no, or there is none.
    """
    write_error(f"{question} [y/N]: ")
    answer = sys.stdin.readline()
    if answer.strip().lower() not in {"y", "yes"}:
        if not answer.endswith("\n"):
            write_error("\n")
        raise SystemExit(1)
