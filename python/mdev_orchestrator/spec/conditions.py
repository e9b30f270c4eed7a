# SPDX-License-Identifier: GPL-2.0-or-later
"""Conditions on the attributes of types: ``>=512M``, ``>256M, <=1G``, or one exact value."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

from mdev_orchestrator.errors import RequestError
from mdev_orchestrator.spec.sizes import (
    RESOLUTION_PATTERN,
    SIZE_PATTERN,
    parse_resolution,
    parse_size,
    quoted,
)

_OPERATORS: Mapping[str, Callable[[Any, Any], bool]] = {
    ">=": lambda have, want: have >= want,
    "<=": lambda have, want: have <= want,
    "!=": lambda have, want: have != want,
    "==": lambda have, want: have == want,
    "=": lambda have, want: have == want,
    ">": lambda have, want: have > want,
    "<": lambda have, want: have < want,
}
_LIMIT = 100  # characters; the pattern takes quadratic time
_TERM = re.compile(r"\s*(>=|<=|!=|==|=|>|<)?\s*([^<>=!,]+?)\s*")
_COUNT = re.compile(r"[0-9]{1,9}")


class Condition(str):
    """What an attribute of a type must be.

    Its text is the condition as the user wrote it.
    """

    __slots__ = ("terms",)
    terms: tuple[tuple[str, Any], ...]
    _pattern: ClassVar[str]
    _example: ClassVar[str]

    def __new__(cls, text: str) -> Self:
        """Read a condition.

        :raise RequestError: It is none.
        """
        self = super().__new__(cls, text)
        if len(text) > _LIMIT:
            raise RequestError(f"{quoted(text)} is longer than {_LIMIT} characters")
        terms = []
        for part in text.split(","):
            match = _TERM.fullmatch(part)
            if match is None:
                raise RequestError(
                    f"{quoted(text)} is no condition", f"write it like {cls._example}"
                )
            terms.append((match[1] or "==", cls.parse_value(match[2])))
        self.terms = tuple(terms)
        return self

    @classmethod
    def parse_value(cls, text: str) -> Any:  # noqa: ANN401 - an int or a resolution, by class
        """Read what stands after an operator.

        :raise RequestError: It is something else.
        """
        if _COUNT.fullmatch(text.strip()) is None:
            raise RequestError(f"{quoted(text)} is no count")
        return int(text)

    @classmethod
    def read(cls, value: object) -> Condition:
        """Read what a file may hold: text, or a whole number for exactly that.

        :raise RequestError: It is something else.
        """
        if isinstance(value, (int, str)) and not isinstance(value, bool):
            return cls(str(value))
        raise RequestError(f"must be a condition, like {cls._example}")

    @classmethod
    def json_schema(cls) -> Mapping[str, Any]:
        """How an editor can check it."""
        term = rf"\s*(>=|<=|!=|==|=|>|<)?\s*{cls._pattern}\s*"
        return {"type": ["string", "integer"], "pattern": rf"^{term}(,{term})*$"}

    def holds(self, value: Any) -> bool:  # noqa: ANN401 - an int or a resolution, by class
        """Whether a value meets all terms."""
        return all(_OPERATORS[operator](value, wanted) for operator, wanted in self.terms)


class SizeCondition(Condition):
    """A condition on an amount of memory."""

    __slots__ = ()
    _pattern = SIZE_PATTERN
    _example = ">=512M"

    @classmethod
    def parse_value(cls, text: str) -> int:
        """Read bytes, see :func:`parse_size`."""
        return parse_size(text)


class CountCondition(Condition):
    """A condition on a whole number."""

    __slots__ = ()
    _pattern = r"[0-9]{1,9}"
    _example = ">=1"


class ResolutionCondition(Condition):
    """A condition on a resolution; ``>=`` and its like hold for width and height together."""

    __slots__ = ()
    _pattern = RESOLUTION_PATTERN
    _example = ">=1920x1200"

    @classmethod
    def parse_value(cls, text: str) -> tuple[int, int]:
        """Read width and height, see :func:`parse_resolution`."""
        return parse_resolution(text)

    def holds(self, value: Any) -> bool:  # noqa: ANN401 - what Condition says
        """Whether a resolution (width, height) meets all terms."""
        for operator, wanted in self.terms:
            both = [_OPERATORS[operator](*pair) for pair in zip(value, wanted, strict=True)]
            if not (any(both) if operator == "!=" else all(both)):
                return False
        return True
