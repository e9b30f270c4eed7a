# SPDX-License-Identifier: GPL-2.0-or-later
"""Writes the man pages, ``mdo.1``, ``mdo-create.1`` and so on, of the commands as they are.

``python -m mdev_orchestrator.cli.manpages DIRECTORY`` is for packages of the program.
Commands of plugins have pages too, if their packages are installed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mdev_orchestrator import __version__
from mdev_orchestrator.cli import tree

EXIT_STATUS = (
    ("0", "Done."),
    ("1", "The kernel or the system said no."),
    ("2", "What was asked cannot be done as asked."),
    ("3", "QEMU did not start, died, or answered nonsense."),
    ("4", "Something did not happen within its deadline."),
    ("5", "The host lacks something; mdo doctor says what."),
    ("70", "A bug in mdo."),
    ("74", "Standard output cannot be written; the message names what was made."),
    ("129, 130, 143", "Ended by SIGHUP, ctrl-C or SIGTERM, after undoing what was half done."),
    ("141", "The reader of standard output has gone."),
)
ENVIRONMENT = (
    ("MDO_DEBUG", "If set, errors come with a traceback."),
    ("MDO_STATE_DIR", "Directory for the journal and for guests."),
    ("MDO_CACHE_DIR", "Directory for what can be built again."),
)

LONG = 1000
"""More characters than a summary has: none is cut short."""


def write(directory: Path) -> list[Path]:
    """Write all pages; gives their paths.

    :raise OSError: One cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for name, text in pages():
        path = directory / f"{name}.1"
        path.write_text(text, encoding="utf-8")
        written.append(path)
    return written


def pages() -> Iterator[tuple[str, str]]:
    """The name and the text of each page: one a command, and one a group of commands."""
    program = tree.root()
    with program.make_context("mdo", [], resilient_parsing=True) as context:
        yield from _pages(program, context)


def _pages(command: Any, context: Any) -> Iterator[tuple[str, str]]:  # noqa: ANN401 - click's
    names = command.list_commands(context) if hasattr(command, "list_commands") else []
    below = [(name, command.get_command(context, name)) for name in names]
    yield context.command_path.replace(" ", "-"), _page(command, context, below)
    for name, child in below:
        with child.make_context(name, [], parent=context, resilient_parsing=True) as inner:
            yield from _pages(child, inner)


def _page(command: Any, context: Any, below: list[tuple[str, Any]]) -> str:  # noqa: ANN401
    path = context.command_path
    title = path.replace(" ", "-")
    paragraphs = [" ".join(text.split()) for text in (command.help or "").split("\n\n")]
    summary = command.get_short_help_str(LONG).rstrip(".")
    usage = " ".join(command.collect_usage_pieces(context))
    arguments, options = _records(command, context)
    parts = [
        f'.TH "{_text(title.upper())}" "1" "" "mdo {__version__}" "mdo"',
        *_section("NAME", [rf"{_text(title)} \- {_text(summary)}"]),
        *_section("SYNOPSIS", [rf"\fB{_text(path)}\fR {_text(usage)}"]),
        *_section("DESCRIPTION", _joined(map(_text, paragraphs), ".PP")),
        *_section("ARGUMENTS", _list(arguments)),
        *_section("OPTIONS", _list(options)),
        *_section(
            "COMMANDS", _list((name, child.get_short_help_str(LONG)) for name, child in below)
        ),
    ]
    if context.parent is None:
        parts += _section("EXIT STATUS", _list(EXIT_STATUS))
        parts += _section("ENVIRONMENT", _list(ENVIRONMENT))
    others = [f"{title}-{name}" for name, _ in below]
    if context.parent is not None:
        others.insert(0, context.parent.command_path.replace(" ", "-"))
    parts += _section("SEE ALSO", [", ".join(rf"\fB{_text(name)}\fR(1)" for name in others)])
    return "\n".join(parts) + "\n"


Record = tuple[str, str]
"""How something is written, and what it does."""


def _records(command: Any, context: Any) -> tuple[list[Record], list[Record]]:  # noqa: ANN401
    """The arguments and the options of a command."""
    found: tuple[list[Record], list[Record]] = [], []
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record is not None:
            found[parameter.param_type_name == "option"].append(record)
    return found


def _section(title: str, lines: Iterable[str]) -> list[str]:
    lines = list(lines)
    return [f".SH {title}", *lines] if lines else []


def _list(records: Iterable[Record]) -> Iterator[str]:
    for name, what in records:
        yield ".TP"
        yield rf"\fB{_text(name)}\fR"
        yield _text(" ".join(what.split()))


def _joined(lines: Iterable[str], between: str) -> Iterator[str]:
    for number, line in enumerate(lines):
        if number:
            yield between
        yield line


def _text(text: str) -> str:
    """A text as roff has it: nothing in it is a request or an escape."""
    text = text.replace("\\", r"\e").replace("-", r"\-")
    text = text.replace("\u2026", "...").replace('"', r"\(dq")
    return rf"\&{text}" if text.startswith((".", "'")) else text


if __name__ == "__main__":
    for page in write(Path(sys.argv[1])):
        sys.stdout.write(f"{page}\n")
