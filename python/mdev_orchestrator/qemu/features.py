# SPDX-License-Identifier: GPL-2.0-or-later
"""What a QEMU can do: asked of the binary or of the running process, never read from a version."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from mdev_orchestrator.errors import CommandError, MdoError
from mdev_orchestrator.state import cache_dir, decode
from mdev_orchestrator.system.children import run_child
from mdev_orchestrator.system.files import write_atomic

if TYPE_CHECKING:
    from mdev_orchestrator.qemu.monitor import QmpMonitor

START = "mdev-start"
"""The property of a vfio device in a QEMU that starts groups by itself (docs/qemu.md)."""

IOMMUFD = "iommufd"
"""The property of a vfio device in a QEMU that can open it by ``/dev/iommu``. Its value is the id
of an object whose type has the same name."""

PROBE_SECONDS = 30.0
_DRIVER = re.compile(r"[a-z0-9][a-z0-9-]*")
_PROPERTY = re.compile(r"^  ([a-z0-9_-]+)=", re.MULTILINE)
_CACHE = "qemu-properties.json"
_MAX_ENTRIES = 64


class _Property(msgspec.Struct, frozen=True):
    """ObjectPropertyInfo of QMP."""

    name: str


class _Entry(msgspec.Struct, frozen=True):
    """What one binary answered, and how to tell that it is still the same one."""

    path: str
    size: int
    mtime: int
    driver: str
    properties: list[str]

    def is_of(self, other: _Entry) -> bool:
        """Whether both are about the same binary and driver."""
        return (self.path, self.size, self.mtime, self.driver) == (
            other.path,
            other.size,
            other.mtime,
            other.driver,
        )


async def properties(qemu: str, driver: str, *, deadline: float = PROBE_SECONDS) -> frozenset[str]:
    """Names of the properties that a QEMU binary's device model has (``-device DRIVER,help``).

    The answer is kept in the cache directory until the binary's path, size or time changes. A
    binary that does not answer has none that could be used.

    :param qemu: Path of the program.
    :param deadline: Seconds.
    """
    if not _DRIVER.fullmatch(driver):
        return frozenset()
    key = _key(qemu, driver)
    if key is None:
        return frozenset()
    known = _read()
    for entry in known:
        if entry.is_of(key):
            return frozenset(entry.properties)
    text = await _ask(qemu, driver, deadline)
    if text is None:
        return frozenset()
    found = sorted(set(_PROPERTY.findall(text)))
    fresh = msgspec.structs.replace(key, properties=found)
    _write([fresh, *known][:_MAX_ENTRIES])
    return frozenset(found)


async def has_property(qmp: QmpMonitor, driver: str, name: str) -> bool:
    """Whether a device model of the running QEMU has a property (``device-list-properties``)."""
    try:
        found = await qmp.execute("device-list-properties", list[_Property], {"typename": driver})
    except CommandError:
        return False  # no such device model: plugging it will say so
    return any(entry.name == name for entry in found)


def _key(qemu: str, driver: str) -> _Entry | None:
    path = Path(qemu).resolve()
    try:
        status = path.stat()
    except OSError:
        return None
    return _Entry(str(path), status.st_size, status.st_mtime_ns, driver, [])


async def _ask(qemu: str, driver: str, deadline: float) -> str | None:
    try:
        ended = await run_child(qemu, "-device", f"{driver},help", deadline=deadline)
    except OSError:
        return None
    return ended.output if ended is not None and ended.status == 0 else None


def _read() -> list[_Entry]:
    try:
        return decode((cache_dir() / _CACHE).read_bytes(), list[_Entry])
    except (OSError, ValueError):
        return []


def _write(entries: list[_Entry]) -> None:
    """Keep the answers if that can be done; without them the binary is asked again."""
    path = cache_dir() / _CACHE
    with contextlib.suppress(OSError, MdoError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, msgspec.json.encode(entries), sync=False)
