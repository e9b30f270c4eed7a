# SPDX-License-Identifier: GPL-2.0-or-later
"""Reads single files, links and directories of sysfs, whose content is not trusted.

It comes from a vendor's driver: text is bounded, must be UTF-8 and have no control characters, and
numbers must be numbers. What is not becomes ``None`` and a sentence in a list called ``damage``.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable

TEXT_LIMIT = 64 * 1024
"""Bytes; the kernel's own limit for one sysfs file is a page."""

_PAGE = 4096
_READ = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
_COUNT_DIGITS = 10  # the kernel's counts are 32 bits wide
GONE = frozenset((errno.ENOENT, errno.ENODEV, errno.ENOTDIR))
"""Error numbers of a call on a file whose object is not there, or is going away."""


def list_names(path: str) -> list[str] | None:
    """Names in a directory, ``None`` if it cannot be listed."""
    try:
        return os.listdir(path)
    except OSError:
        return None


def printable(names: Iterable[str], damage: list[str]) -> list[str]:
    """The names that can be shown; the others, which the kernel never makes, are ``damage``."""
    fit = []
    for name in names:
        if name.isprintable():  # neither control characters nor bytes that are no UTF-8
            fit.append(name)
        else:
            damage.append(f"there is an entry with an unprintable name: {name!a}")
    return fit


def link_target(path: str) -> str:
    """Where a link leads to, as it is written in the link.

    :raise OSError: There is none, or it is no text that can be shown (EILSEQ).
    """
    target = os.readlink(path)
    if not target.isprintable():
        raise unprintable()
    return target


def unprintable() -> OSError:
    """The error of a link whose target cannot be shown."""
    return OSError(errno.EILSEQ, os.strerror(errno.EILSEQ))


def read_text(
    path: str, damage: list[str], *, optional: bool = False, empty: bool = False
) -> str | None:
    """Text of a file, stripped; ``None`` and an entry in ``damage`` if it cannot be shown.

    :param optional: That the file is not there is no damage.
    :param empty: That it is empty is no damage.
    """
    try:
        fd = os.open(path, _READ)
        try:
            data = os.read(fd, _PAGE)
            if len(data) == _PAGE:  # else it is the whole value: sysfs gives that at once
                while len(data) <= TEXT_LIMIT and (more := os.read(fd, TEXT_LIMIT)):
                    data += more
        finally:
            os.close(fd)
    except OSError as error:
        if not (optional and error.errno in GONE):
            damage.append(f"{last_part(path)} cannot be read: {os.strerror(error.errno or 0)}")
        return None
    if len(data) > TEXT_LIMIT:
        damage.append(f"{last_part(path)} is larger than {TEXT_LIMIT // 1024} KiB")
        return None
    try:
        text = data.decode().strip()
    except UnicodeDecodeError:
        damage.append(f"{last_part(path)} is not UTF-8")
        return None
    if not text and not empty:
        damage.append(f"{last_part(path)} is empty")
        return None
    if not text.isprintable() and any(
        not line.isprintable() for line in text.replace("\t", " ").split("\n")
    ):
        damage.append(f"{last_part(path)} contains control characters")
        return None
    return text


def last_part(path: str) -> str:
    """The last part of a path or of what a link reads."""
    return path.rpartition("/")[2]


def parse_count(text: str) -> int:
    """A count as the kernel prints it: decimal digits, 32 bits.

    :raise ValueError: It is anything else; the message completes "the file …".
    """
    if len(text) < _COUNT_DIGITS and text.isascii() and text.isdecimal():
        return int(text)
    digits = text.removeprefix("-")
    if not (digits.isascii() and digits.isdecimal()):
        raise ValueError(f"is not a number: {shown(text)}")
    if digits != text:
        raise ValueError(f"is negative: {shown(text)}")
    if len(digits.lstrip("0")) > _COUNT_DIGITS or int(digits) >= 1 << 32:
        raise ValueError(f"is too large: {shown(text)}")
    return int(digits)


def shown(text: str) -> str:
    """The beginning of a text that is not trusted, for a message."""
    limit = 40
    return ascii(text if len(text) <= limit else text[:limit] + "...")
