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
_OBJECT = re.compile(r"^  ([a-z0-9_-]+)$", re.MULTILINE)
_OBJECTS = ("-object", "help")
_CACHE = "qemu-properties.json"
_MAX_ENTRIES = 64


class _Property(msgspec.Struct, frozen=True):
    """ObjectPropertyInfo of QMP."""

    name: str


class _Entry(msgspec.Struct, frozen=True):
    """What one binary answered, and how to tell that it is still the same one."""

    path: str
    inode: int
    size: int
    mtime: int
    question: str
    names: list[str]

    def is_of(self, other: _Entry) -> bool:
        """Whether both are the answer of the same binary to the same question."""
        return msgspec.structs.replace(self, names=other.names) == other


async def properties(qemu: str, driver: str, *, deadline: float = PROBE_SECONDS) -> frozenset[str]:
    """Names of the properties that a QEMU binary's device model has (``-device DRIVER,help``).

    The answer is kept in the cache directory until the binary is another: its path, inode, size or
    time changes. A binary that does not answer has none that could be used.

    :param qemu: Path of the program.
    :param deadline: Seconds.
    """
    if not _DRIVER.fullmatch(driver):
        return frozenset()
    return await _answer(qemu, ("-device", f"{driver},help"), _PROPERTY, deadline)


async def object_types(qemu: str, *, deadline: float = PROBE_SECONDS) -> frozenset[str]:
    """Types of objects that a QEMU binary makes on request (``-object help``), kept likewise.

    :param qemu: Path of the program.
    :param deadline: Seconds.
    """
    return await _answer(qemu, _OBJECTS, _OBJECT, deadline)


async def _answer(
    qemu: str, question: tuple[str, ...], pattern: re.Pattern[str], deadline: float
) -> frozenset[str]:
    """The names in a binary's answer to a question, which is asked once."""
    key = _key(qemu, " ".join(question))
    if key is None:
        return frozenset()
    known = _read()
    for entry in known:
        if entry.is_of(key):
            return frozenset(entry.names)
    text = await _ask(qemu, question, deadline)
    if text is None:
        return frozenset()
    found = sorted(set(pattern.findall(text)))
    fresh = msgspec.structs.replace(key, names=found)
    _write([fresh, *known][:_MAX_ENTRIES])
    return frozenset(found)


async def has_property(qmp: QmpMonitor, driver: str, name: str) -> bool:
    """Whether a device model of the running QEMU has a property (``device-list-properties``)."""
    try:
        found = await qmp.execute("device-list-properties", list[_Property], {"typename": driver})
    except CommandError:
        return False  # no such device model: plugging it will say so
    return any(entry.name == name for entry in found)


def _key(qemu: str, question: str) -> _Entry | None:
    path = Path(qemu).resolve()
    try:
        status = path.stat()
    except OSError:
        return None
    return _Entry(str(path), status.st_ino, status.st_size, status.st_mtime_ns, question, [])


async def _ask(qemu: str, question: tuple[str, ...], deadline: float) -> str | None:
    try:
        ended = await run_child(qemu, *question, deadline=deadline)
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
