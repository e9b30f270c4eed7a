# SPDX-License-Identifier: GPL-2.0-or-later
"""How messages name a key of a spec and the line that it stands on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

from mdev_orchestrator.errors import RequestError

Place: TypeAlias = tuple[str | int, ...]
"""A key of the file: ``("guest", 0, "mdev", 1, "count")``."""


def key(place: Place) -> str:
    """A key as messages name it: ``guest[0].mdev[1].count``. Indices begin with 0."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)
    return text.removeprefix(".")


def fault(
    source: str, lines: Mapping[Place, int], place: Place, message: str, hint: str = ""
) -> RequestError:
    """The error for something that is wrong with a key.

    :param source: What messages call the file.
    :param lines: The line of each key; of one that is not there the nearest key around it counts.
    """
    around = place
    while around and around not in lines:
        around = around[:-1]
    where = f"{source}:{lines[around]}" if around in lines else source
    what = f"{where}: {key(place)}: {message}" if place else f"{where}: {message}"
    return RequestError(" ".join(what.split()), hint)
