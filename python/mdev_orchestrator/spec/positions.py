# SPDX-License-Identifier: GPL-2.0-or-later
"""Finds the line of each key of a TOML or JSON text, and where the text ceases to be one.

The parsers tell neither the lines of keys nor, in a stable form, the place of a fault. The reader
here knows just enough of both languages to follow the keys. It stops where it expects something
else; the parser decides whether the text is right. It also refuses what the parsers would take
quadratic time or the whole stack for.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NoReturn

import msgspec
from msgspec import Struct

from mdev_orchestrator.errors import RequestError
from mdev_orchestrator.spec.messages import Place, fault

MAX_DEPTH = 16
"""Of tables and lists in each other, and of the parts of a dotted key."""

Kind = Literal["toml", "json"]


class Statement(Struct, frozen=True):
    """One header or one key with its value, in TOML.

    :ivar value: Offset of the value; ``None`` for a header.
    :ivar end: Offset behind it.
    """

    start: int
    value: int | None
    end: int


class Layout(Struct, frozen=True):
    """What stands where in a text.

    :ivar lines: The line of each key; of as many as can be found in a faulty text.
    :ivar statements: Of a TOML text, as far as it was read.
    :ivar stop: Offset at which something else was expected, and what; ``None`` if nothing was.
    """

    lines: Mapping[Place, int]
    statements: Sequence[Statement]
    stop: tuple[int, str] | None


def read_layout(text: str, source: str, kind: Kind) -> Layout:
    """Find out what stands where.

    :param source: What messages call the text.
    :raise RequestError: A key is given twice, or the text is nested too deep.
    """
    reader = _Reader(text, source, kind)
    stop = None
    try:
        reader.read()
    except _UnexpectedError as error:
        stop = (reader.at, error.message)
    return Layout(reader.lines, reader.statements, stop)


class _UnexpectedError(Exception):
    def __init__(self, message: str) -> None:
        self.message = message


_TOML_SPACE = re.compile(r"(?:[ \t\r\n]+|#[^\n]*)*")
_TOML_BLANKS = re.compile(r"[ \t]*")
_TOML_LINE_END = re.compile(r"[ \t]*(?:#[^\n]*)?(?:\r?\n|\Z)")
_TOML_KEY = re.compile(r"""[ \t]*("(?:[^"\\\n]|\\.)*"|'[^'\n]*'|[A-Za-z0-9_-]+)[ \t]*""")
_TOML_TEXT = re.compile(
    r'''"""(?:[^\\]|\\.)*?"{3,5}|\'\'\'.*?'{3,5}|"(?:[^"\\\n]|\\.)*"|'[^'\n]*\'''', re.DOTALL
)
_TOML_SCALAR = re.compile(r"[^,\]}\n#\"'{\[]+")
_JSON_SPACE = re.compile(r"[ \t\r\n]*")
_JSON_TEXT = re.compile(
    r'"(?:[^"\\\x00-\x1f]'
    r'|\\["\\/bfnrt]'
    r"|\\u(?:[0-9A-CEFa-cef][0-9A-Fa-f]{3}|[Dd][0-7][0-9A-Fa-f]{2})"
    r'|\\u[Dd][89ABab][0-9A-Fa-f]{2}\\u[Dd][C-Fc-f][0-9A-Fa-f]{2})*"'
)
_JSON_SCALAR = re.compile(r"true|false|null|-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")


class _Reader:
    def __init__(self, text: str, source: str, kind: Kind) -> None:
        self.text = text
        self.source = source
        self.toml = kind == "toml"
        self.at = 0
        self.lines: dict[Place, int] = {}
        self.statements: list[Statement] = []
        self.assigned: set[Place] = set()
        self.starts = [0, *(match.end() for match in re.finditer("\n", text))]

    def read(self) -> None:
        """Read the whole text.

        :raise _UnexpectedError: At ``at`` stands something else than the message says.
        """
        if self.toml:
            self._toml_document()
            return
        self._space()
        self._value((), 0)
        self._space()
        if self.at < len(self.text):
            self._expected("the end of the file")

    # ---- words ----

    def _line(self, at: int) -> int:
        return bisect_right(self.starts, at)

    def _expected(self, what: str) -> NoReturn:
        if self.at >= len(self.text):
            raise _UnexpectedError("it ends too early")
        raise _UnexpectedError(f"expected {what}")

    def _peek(self) -> str:
        return self.text[self.at : self.at + 1]

    def _take(self, *texts: str) -> str:
        found = next((text for text in texts if self.text.startswith(text, self.at)), None)
        if found is None:
            self._expected(" or ".join(map(repr, texts)))
        self.at += len(found)
        return found

    def _match(self, pattern: re.Pattern[str]) -> str | None:
        match = pattern.match(self.text, self.at)
        if match is None:
            return None
        self.at = match.end()
        return match[match.lastindex or 0]

    def _space(self) -> None:
        self._match(_TOML_SPACE if self.toml else _JSON_SPACE)

    def _mark(self, place: Place, at: int, *, length: int = 0) -> None:
        line = self._line(at)
        for end in range(length + 1, len(place) + 1):
            self.lines.setdefault(place[:end], line)

    def _too_deep(self) -> RequestError:
        return RequestError(
            f"{self.source}:{self._line(self.at)}: nested deeper than {MAX_DEPTH} levels",
            "a spec needs four",
        )

    # ---- keys ----

    def _keys(self, prefix: Place) -> Place:
        """Read a key; in TOML it may have several parts."""
        if not self.toml:
            return (*prefix, self._json_key())
        place = prefix
        while True:
            place = (*place, self._toml_key())
            if len(place) > MAX_DEPTH:
                raise self._too_deep()
            if self._peek() != ".":
                return place
            self.at += 1

    def _json_key(self) -> str:
        word = self._match(_JSON_TEXT)
        if word is None:
            self._expected("a key in double quotes")
        return str(msgspec.json.decode(word))

    def _toml_key(self) -> str:
        before = self.at
        word = self._match(_TOML_KEY)
        if word is None:
            self._expected("a key")
        if word.startswith('"') and "\\" in word:
            import tomllib

            try:
                (word,) = tomllib.loads(f"{word} = 0")
            except tomllib.TOMLDecodeError:
                self.at = before
                self._expected("a key")
            return word
        return word[1:-1] if word[0] in "\"'" else word

    # ---- TOML ----

    def _toml_document(self) -> None:
        counts: dict[Place, int] = {}
        table: Place = ()
        while True:
            self._space()
            if self.at >= len(self.text):
                return
            start, value = self.at, None
            if self._peek() == "[":
                table = self._header(counts)
            else:
                value = self._pair(table, 1)
            self.statements.append(Statement(start, value, self.at))
            if self._match(_TOML_LINE_END) is None:
                self._expected("the end of the line")

    def _header(self, counts: dict[Place, int]) -> Place:
        """Read ``[table]`` or ``[[table]]``; which table the keys below it are in."""
        at = self.at
        many = self._take("[[", "[") == "[["
        table: Place = ()
        names = self._keys(())
        for number, name in enumerate(names):
            table = (*table, name)
            last = number == len(names) - 1
            if last and many:
                counts[table] = counts.get(table, -1) + 1
            if table in counts and (many or not last):
                table = (*table, counts[table])
        self._take("]]" if many else "]")
        self._mark(table, at)
        return table

    # ---- both ----

    def _pair(self, table: Place, depth: int) -> int:
        """Read a key and its value; returns the offset of the value."""
        at = self.at
        place = self._keys(table)
        if place in self.assigned:
            raise fault(self.source, {place: self._line(at)}, place, "is given a second time")
        self.assigned.add(place)
        self._mark(place, at, length=len(table))
        if self.toml:
            self._take("=")
            self._match(_TOML_BLANKS)
        else:
            self._space()
            self._take(":")
            self._space()
        value = self.at
        self._value(place, depth)
        return value

    def _value(self, place: Place, depth: int) -> None:
        if depth > MAX_DEPTH:
            raise self._too_deep()
        match self._peek():
            case "{":
                self._members("}", lambda _: self._pair(place, depth + 1))
            case "[":
                self._members("]", lambda index: self._item((*place, index), depth + 1))
            case '"' | "'" if self.toml:
                if self._match(_TOML_TEXT) is None:
                    raise _UnexpectedError("a text is not closed")
            case '"':
                if self._match(_JSON_TEXT) is None:
                    raise _UnexpectedError("invalid text")
            case "":
                self._expected("a value")
            case _:
                self._scalar()

    def _scalar(self) -> None:
        before = self.at
        word = self._match(_TOML_SCALAR if self.toml else _JSON_SCALAR)
        # a number that no double can hold is none for JSON's parser
        if word is None or (not self.toml and word[-1].isdigit() and math.isinf(float(word))):
            self.at = before
            raise _UnexpectedError("invalid value")

    def _item(self, place: Place, depth: int) -> None:
        self._mark(place, self.at, length=len(place) - 1)
        self._value(place, depth)

    def _members(self, end: str, member: Callable[[int], object]) -> None:
        self.at += 1
        self._space()
        index = 0
        while self._peek() != end or (index and not self.toml):  # TOML lets a comma stand last
            member(index)
            index += 1
            self._space()
            if self._take(",", end) == end:
                return
            self._space()
        self.at += 1
