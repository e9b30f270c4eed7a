# SPDX-License-Identifier: GPL-2.0-or-later
"""How parents fill, as it was observed, for later plans: ``models.json`` in the state directory.

It is a memory and no record: without it a plan may have to guess where it could know. So what is
wrong with the file is no error; it is read as far as it makes sense, and a model that the kernel's
counts contradict is not used (:func:`..capacity.models.survey`).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Mapping
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
from mdev_orchestrator.engine.context import ROOT, machine_of
from mdev_orchestrator.errors import HostError, MdoError
from mdev_orchestrator.host import sysfs
from mdev_orchestrator.model import Host
from mdev_orchestrator.state import decode, private_dir, state_dir

KEPT = 100
"""Kinds of parents that are remembered; the oldest are forgotten first."""

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


def load(place: Path | None = None) -> dict[str, Model]:
    """The models that are remembered, by kind of parent; those that make no sense are left out.

    :param place: Directory of the file; the state directory without it.
    """
    found: dict[str, Model] = {}
    try:
        entries = decode(_read((place or state_dir()) / _FILE), list[_Entry])
    except (OSError, ValueError):
        return found
    for entry in entries:
        with suppress(KeyError, msgspec.ValidationError):
            model = msgspec.convert(entry.fields, _MODELS[entry.model])
            if is_sound(model):
                found[entry.kind] = model
    return found


def capacities(host: Host, removing: Collection[UUID] = ()) -> tuple[ParentCapacity, ...]:
    """How every parent of a host fills, with all that is remembered.

    :param removing: Devices to count as gone.
    """
    return survey(host, removing, load())


def keep(found: Mapping[str, Model], place: Path | None = None) -> None:
    """Remember models, beside or instead of what is remembered.

    Of two programs that do so at the same moment one may be forgotten.

    :raise HostError: The state directory cannot be written.
    """
    directory = private_dir(place or state_dir())
    models = {kind: model for kind, model in load(directory).items() if kind not in found}
    models.update(found)
    entries = [
        _Entry(kind, model.name, msgspec.to_builtins(model)) for kind, model in models.items()
    ]
    file = directory / _FILE
    scratch = directory / f".{_FILE}.{os.getpid()}"
    try:
        scratch.write_bytes(msgspec.json.encode(entries[-KEPT:]) + b"\n")
        scratch.replace(file)
    except OSError as error:
        scratch.unlink(missing_ok=True)
        raise HostError(f"cannot write {file}: {error.strerror}") from error


def learn_from(
    before: Host, root: Path = ROOT, place: Path | None = None, *, plan: Plan | None = None
) -> None:
    """Learn from what came or went since a scan: how the counts changed by it.

    To be called after devices were created; never fails, and mostly there is nothing to learn.

    :param plan: What was to come, where that was planned: who sees it come true need not look
        further.
    """
    if plan is not None and _is_true(plan, root):
        return
    known = load(place)
    if found := learn(before, sysfs.read_host(machine_of(root)), known):
        with suppress(MdoError):
            keep(found, place)


def _is_true(plan: Plan, root: Path) -> bool:
    """Whether the counts are what a plan said, and that was no guess."""
    touched = {placement.parent for placement in plan.placements}
    return all(
        parent.capacity.confidence is not Confidence.GUESSED
        and all(
            sysfs.available_instances(machine_of(root), parent.capacity.name, type_) == count
            for type_, count in parent.available_after.items()
        )
        for parent in plan.parents
        if parent.capacity.name in touched
    )


def _read(path: Path) -> bytes:
    """A file's content if it is one, and of a size that it can have.

    :raise OSError: It is something else.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size > _LIMIT:
            raise OSError(f"{path} is no file of ours")
        return file.read()
