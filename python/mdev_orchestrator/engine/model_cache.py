# SPDX-License-Identifier: GPL-2.0-or-later
"""Keeps the observed capacity models of parents for later plans, in ``models.json``.

The file is in the state directory. It is a cache: without it a plan may have to guess. So a fault
of the file is no error: what can be read of it is used, and :func:`..capacity.models.survey` does
not use a model that the kernel's counts contradict.
"""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import UUID

import msgspec

from mdev_orchestrator.capacity.models import (
    Confidence,
    Homogeneous,
    Independent,
    Model,
    ParentCapacity,
    ParentCounter,
    SharedPool,
    is_sound,
    learn,
    survey,
)
from mdev_orchestrator.capacity.planner import Plan
from mdev_orchestrator.errors import HostError, MdoError
from mdev_orchestrator.host import sysfs
from mdev_orchestrator.machine import Machine
from mdev_orchestrator.model import Host
from mdev_orchestrator.state import decode, private_dir
from mdev_orchestrator.system.files import write_atomic

KEPT = 100
"""Kinds of parents in the cache; the oldest go first."""

_FILE = "models.json"
_LIMIT = 1 << 20  # bytes
_MODELS: dict[str, type[Model]] = {
    model.name: model for model in (Independent, SharedPool, Homogeneous, ParentCounter)
}


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One kind of parent (:func:`..capacity.models.kind_of`) and its model, by name and fields."""

    kind: str
    model: str
    fields: dict[str, Any]


def load(machine: Machine) -> dict[str, Model]:
    """Read the models, by kind of parent; entries that cannot be used are left out."""
    found: dict[str, Model] = {}
    try:
        entries = decode(_read(machine.state_dir / _FILE), list[_Entry])
    except (OSError, ValueError):
        return found
    for entry in entries:
        with suppress(KeyError, msgspec.ValidationError):
            model = msgspec.convert(entry.fields, _MODELS[entry.model])
            if is_sound(model):
                found[entry.kind] = model
    return found


def capacities(
    machine: Machine,
) -> Callable[[Host, Collection[UUID]], tuple[ParentCapacity, ...]]:
    """Return a function that finds the capacity of all parents of a host with the cached models.

    It takes the host, and the devices to count as removed.
    """
    models = load(machine)
    return lambda host, removing: survey(host, removing, models)


def keep(machine: Machine, found: Mapping[str, Model]) -> None:
    """Add models to the cache, in place of those of the same kinds.

    When two processes do so at the same moment, the models of one may be lost.

    :raise HostError: The state directory cannot be written.
    """
    directory = private_dir(machine.state_dir)
    models = {kind: model for kind, model in load(machine).items() if kind not in found}
    models.update(found)
    entries = [
        _Entry(kind, model.name, msgspec.to_builtins(model)) for kind, model in models.items()
    ]
    file = directory / _FILE
    try:
        write_atomic(file, msgspec.json.encode(entries[-KEPT:]) + b"\n", sync=False)
    except OSError as error:
        raise HostError(f"cannot write {file}: {error.strerror}") from error


async def learn_from(machine: Machine, before: Host, *, plan: Plan | None = None) -> None:
    """Learn how the counts changed by the devices that were created or removed since a scan.

    Never fails.

    :param before: The scan.
    :param plan: The plan of what was created since. If the counts are as it says, there is nothing
        to learn, and nothing is scanned.
    """
    if plan is not None and await asyncio.to_thread(_is_true, machine, plan):
        return
    after = await sysfs.scan(machine)
    with suppress(MdoError):
        await asyncio.to_thread(_learn, machine, before, after)


def _learn(machine: Machine, before: Host, after: Host) -> None:
    if found := learn(before, after, load(machine)):
        keep(machine, found)


def _is_true(machine: Machine, plan: Plan) -> bool:
    """Whether the counts are what a plan says, and it was no guess."""
    touched = {placement.parent for placement in plan.placements}
    return all(
        parent.capacity.confidence is not Confidence.GUESSED
        and all(
            sysfs.available_instances(machine, parent.capacity.name, type_) == count
            for type_, count in parent.available_after.items()
        )
        for parent in plan.parents
        if parent.capacity.name in touched
    )


def _read(path: Path) -> bytes:
    """Read a file.

    :raise OSError: It is no regular file, or too large.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size > _LIMIT:
            raise OSError(f"{path} is no regular file, or too large")
        return file.read()
