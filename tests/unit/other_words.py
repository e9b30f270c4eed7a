# SPDX-License-Identifier: GPL-2.0-or-later
"""Libraries whose errors say the same in other words: no message may depend on theirs."""

from __future__ import annotations

import tomllib
from collections.abc import Callable

import msgspec
import pytest

WORDS = "d'autres mots - at `$.guest[7].ailleurs` (octet 9)"


def reword(patch: pytest.MonkeyPatch) -> None:
    """Let msgspec and tomllib say all that they say in other words."""
    for module, name in ((msgspec, "convert"), (msgspec.json, "decode"), (tomllib, "loads")):
        patch.setattr(module, name, _reworded(getattr(module, name)))


def _reworded(function: Callable[..., object]) -> Callable[..., object]:
    def call(*arguments: object, **options: object) -> object:
        try:
            return function(*arguments, **options)
        except ValueError as error:  # msgspec's and tomllib's own errors are of this class
            raise type(error)(WORDS) from None

    return call
