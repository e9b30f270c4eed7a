# SPDX-License-Identifier: GPL-2.0-or-later
"""From TOML or JSON text to plain values: tables, lists, texts, numbers.

The parsers decide what is right. What is wrong is found out here, since their messages change.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping

import msgspec

from mdev_orchestrator.errors import RequestError
from mdev_orchestrator.spec.messages import Place
from mdev_orchestrator.spec.positions import Kind, Layout, read_layout


def read_text(text: str, source: str, kind: Kind) -> tuple[object, Mapping[Place, int]]:
    """Read a text; also gives the line of each of its keys.

    :param source: What messages call the text.
    :raise RequestError: It is not TOML or JSON, a key is given twice, or it is nested too deep.
    """
    layout = read_layout(text, source, kind)
    try:
        return _parse(text, kind), layout.lines
    except (ValueError, RecursionError):
        line, what = _explain(text, kind, layout)
        raise RequestError(f"{source}:{line}: not valid {kind.upper()}: {what}") from None


def _parse(text: str, kind: Kind) -> object:
    if kind == "json":
        return msgspec.json.decode(text)
    import tomllib  # most commands read no TOML

    return tomllib.loads(text)


def _explain(text: str, kind: Kind, layout: Layout) -> tuple[int, str]:
    """The line and the reason of the first fault of a text that the parser refuses."""
    at, what = layout.stop or (len(text), "it cannot be read")
    if kind == "toml":
        at, what = _refused_statement(text, layout) or (at, what)
    return text.count("\n", 0, at) + 1, what


def _refused_statement(text: str, layout: Layout) -> tuple[int, str] | None:
    """The first whole statement that the parser refuses: all before it is right by itself."""
    statements = layout.statements
    first = bisect_left(
        range(len(statements)),
        True,
        key=lambda number: not _is_toml(text[: statements[number].end]),
    )
    if first == len(statements):
        return None
    found = statements[first]
    if found.value is not None and not _is_toml("x = " + text[found.value : found.end]):
        return found.start, "invalid value"
    return found.start, "this key or table cannot stand here"


def _is_toml(text: str) -> bool:
    try:
        _parse(text, "toml")
    except (ValueError, RecursionError):
        return False
    return True
