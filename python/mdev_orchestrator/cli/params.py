# SPDX-License-Identifier: GPL-2.0-or-later
"""Options that several commands have, and what a shell completes of names on this host."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from mdev_orchestrator.cli import output
from mdev_orchestrator.cli.context import machine
from mdev_orchestrator.errors import MdoError

Json = Annotated[
    bool,
    typer.Option(
        "--json",
        callback=output.speak_json,
        is_eager=True,
        help="One JSON document; errors are JSON too.",
    ),
]


Iommu = Annotated[
    str,
    typer.Option(
        metavar="auto|iommufd|container",
        help="How devices are opened; auto: by /dev/iommu where that can be.",
    ),
]


def seconds(help: str, *, least: float = 0.0) -> Any:  # noqa: A002, ANN401 - typer's own types
    """An option that is a number of seconds, at least ``least``."""
    return typer.Option(min=least, metavar="SECONDS", callback=_number, help=help)


def _number(value: float | None) -> float | None:
    if value is not None and math.isnan(value):  # which is not below any minimum
        raise typer.BadParameter(f"{value} is not a number")
    return value


# ---- completion: names of files, no more; an error completes nothing ----


def complete_device(incomplete: str) -> list[str]:
    """UUIDs of the devices of this host."""
    return _matching(_names("sys", "bus", "mdev", "devices"), incomplete)


def complete_parent(incomplete: str) -> list[str]:
    """Names of the parents of this host."""
    return _matching(_names("sys", "class", "mdev_bus"), incomplete)


def complete_type(incomplete: str) -> list[str]:
    """Ids of the types that some parent offers."""
    return _matching(_types(), incomplete)


def complete_device_or_type(incomplete: str) -> list[str]:
    """What ``mdo attach`` plugs."""
    return [*complete_type(incomplete), *complete_device(incomplete)]


def complete_guest(incomplete: str) -> list[str]:
    """Names of the guests of this state directory."""
    with suppress(OSError, MdoError):
        return _matching([path.name for path in machine().guests_dir.iterdir()], incomplete)
    return []


def _types() -> Iterator[str]:
    for parent in _names("sys", "class", "mdev_bus"):
        yield from _names("sys", "class", "mdev_bus", parent, "mdev_supported_types")


def _names(*directory: str) -> list[str]:
    with suppress(OSError):
        return [path.name for path in Path(machine().path(*directory)).iterdir()]
    return []


def _matching(names: Iterator[str] | list[str], incomplete: str) -> list[str]:
    return sorted({name for name in names if name.startswith(incomplete)})


ParentOfType = Annotated[
    str | None,
    typer.Option(
        metavar="PARENT",
        help="Parent, when several offer the type.",
        autocompletion=complete_parent,
    ),
]
