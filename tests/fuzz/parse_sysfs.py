# SPDX-License-Identifier: GPL-2.0-or-later
"""The host as a vendor's driver shows it: any text in any file, any name, any link."""

import os
import shutil
from pathlib import Path
from uuid import UUID

import msgspec

from fuzz import harness
from mdev_orchestrator.capacity.models import count_types, survey
from mdev_orchestrator.cli.host import shape
from mdev_orchestrator.errors import MdoError
from mdev_orchestrator.host import sysfs
from mdev_orchestrator.host.groups import explain
from mdev_orchestrator.host.holders import Holders
from mdev_orchestrator.machine import Machine
from mdev_orchestrator.model import Host, MdevType

ROOT = harness.scratch()
MACHINE = Machine(ROOT)
DEV = "0f0f9c0e-6f2c-4a5e-8d5b-0a5a1d3a9a11"
PARENT = "sys/devices/virtual/v/p0"
TYPE = f"{PARENT}/mdev_supported_types/v-1"
BUS = "sys/bus/mdev/devices"
CLASS = "sys/class/mdev_bus"
#: First letters of a record's name: where its file is. After a ``>`` it is a link, not a file.
PLACES = {"t": TYPE, "a": f"{TYPE}/attributes", "p": PARENT, "m": f"{PARENT}/{DEV}"}
PLACES |= {"n": f"{PARENT}/{DEV}/nvidia", "b": BUS, "c": CLASS, "o": f"{PARENT}/{DEV}/vfio-dev"}
PLACES |= {"s": f"{PARENT}/mdev_supported_types"}
LINKS = {
    f"{BUS}/{DEV}": f"../../../devices/virtual/v/p0/{DEV}",
    f"{CLASS}/p0": "../../devices/virtual/v/p0",
}


def one(data: bytes) -> None:
    """The input: records ``PLACE NAME`` with the contents of a file, ``PLACE >NAME`` of a link."""
    for directory in PLACES.values():
        (ROOT / directory).mkdir(parents=True, exist_ok=True)
    try:
        for name, target in LINKS.items():
            (ROOT / name).symlink_to(target)
        for what, text in harness.records(data):
            _put(what, text)
        _look()
    finally:
        shutil.rmtree(ROOT / "sys")


def _put(what: str, text: bytes) -> None:
    place, _, name = what.partition(" ")
    link = name.startswith(">")
    name = name.removeprefix(">")
    if place not in PLACES or "/" in name or "\0" in name or name in {"", ".", ".."}:
        return
    path = ROOT / PLACES[place] / name
    try:
        if not link:
            path.write_bytes(text)
        elif not text.startswith(b"/") and b".." not in text.split(b"/")[1:]:
            path.unlink(missing_ok=True)
            path.symlink_to(os.fsdecode(text))
    except (OSError, ValueError):
        return  # what no file system takes no kernel shows


def _look() -> None:
    found = sysfs.read_host(MACHINE)
    for text in _texts(found):
        harness.check_shown([text])
    written = msgspec.json.encode(shape(found, Holders(), None))
    assert msgspec.json.decode(written)["mdev_bus"] is True
    survey(found)
    for parent in found.parents:
        count_types(found, parent.name)
    for group in found.groups:
        explain(MACHINE, group)
    uuid = UUID(DEV)
    sysfs.read_mdev(MACHINE, uuid)
    sysfs.vfio_nodes(MACHINE, uuid)
    for name in sysfs.writable_files(MACHINE, uuid):
        sysfs.leads_out(MACHINE, uuid, name)
        try:
            sysfs.read_file(MACHINE, uuid, name)
        except MdoError as error:
            harness.check_message(error)


def _texts(found: Host) -> list[str | None]:
    """All that is shown of a scan."""
    texts: list[str | None] = [*found.damage]
    for parent in found.parents:
        texts += [parent.name, *parent.damage]
        for type_ in parent.types:
            texts += _type(type_)
    for mdev in found.mdevs:
        texts += [mdev.parent, mdev.type_id, mdev.params, mdev.device_api, *mdev.damage]
        texts.append(Path(mdev.path).name)
    return texts


def _type(type_: MdevType) -> list[str | None]:
    count = type_.available_instances
    assert count is None or 0 <= count < 1 << 32
    shown = [type_.id, type_.name, type_.device_api, type_.description, *type_.damage]
    return [*shown, *type_.attributes, *type_.attributes.values()]
