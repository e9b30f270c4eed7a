# SPDX-License-Identifier: GPL-2.0-or-later
"""Amounts of memory and resolutions as users and vendors write them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

from mdev_orchestrator.errors import RequestError

MIB = 1 << 20

SIZE_PATTERN = r"[0-9]{1,15} ?[KMGTkmgt]?(i?[Bb])?"
RESOLUTION_PATTERN = r"[0-9]{1,6} ?x ?[0-9]{1,6}"

_SIZE = re.compile(r"([0-9]{1,15}) ?([KMGT]?)(?:i?B)?", re.IGNORECASE | re.ASCII)
_SHIFT = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}
_SIZE_LIMIT = 1 << 63
_RESOLUTION = re.compile(r"([0-9]{1,6}) ?x ?([0-9]{1,6})")
_SHOWN = 40  # characters of a value in a message


def quoted(value: object) -> str:
    """A value as messages quote it; the end of a long one is left out."""
    text = str(value)
    return repr(text if len(text) <= _SHOWN else text[:_SHOWN] + "...")


def parse_size(text: str) -> int:
    """Read an amount of memory: ``512M``, ``2G``, ``128 MB``; powers of 1024.

    :return: Bytes, less than 2**63.
    :raise RequestError: It is something else.
    """
    match = _SIZE.fullmatch(text.strip())
    size = _SIZE_LIMIT if match is None else int(match[1]) << _SHIFT[match[2].upper()]
    if size >= _SIZE_LIMIT:
        raise RequestError(f"{quoted(text)} is no amount of memory", "write it like 512M or 2G")
    return size


def format_size(size: int) -> str:
    """Write an amount of memory as users do: ``64M``, ``1G``; bytes where no unit divides it.

    :param size: Bytes.
    """
    for letter in "TGMK":
        shift = _SHIFT[letter]
        if size and size % (1 << shift) == 0:
            return f"{size >> shift}{letter}"
    return str(size)


def parse_resolution(text: str) -> tuple[int, int]:
    """Read a resolution, ``1920x1200``.

    :return: Width and height, pixels.
    :raise RequestError: It is something else.
    """
    match = _RESOLUTION.fullmatch(text.strip())
    if match is None:
        raise RequestError(f"{quoted(text)} is no resolution", "write it like 1920x1200")
    return int(match[1]), int(match[2])


class Size(int):
    """Bytes; in a file a whole number, or text such as ``512M``.

    ``str`` writes it as :func:`format_size` does.
    """

    json_schema: ClassVar[Mapping[str, Any]] = {
        "type": ["integer", "string"],
        "minimum": 0,
        "pattern": f"^{SIZE_PATTERN}$",
    }

    def __str__(self) -> str:
        return format_size(int(self))

    @classmethod
    def read(cls, value: object) -> Size:
        """Read what a file may hold.

        :raise RequestError: It is something else.
        """
        if isinstance(value, int) and not isinstance(value, bool):
            if not 0 <= value < _SIZE_LIMIT:
                raise RequestError(f"{value} is no amount of memory")
            return cls(value)
        if isinstance(value, str):
            return cls(parse_size(value))
        raise RequestError("must be an amount of memory, like 512M or 2G")
