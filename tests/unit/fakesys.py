# SPDX-License-Identifier: GPL-2.0-or-later
"""A machine of files: the parts of ``/sys``, ``/dev`` and ``/proc`` that the project looks at.

It has the real kernel's layout, links included. :meth:`FakeSystem.write` stands in for the writer
and does what the mdev core does on ``create`` and ``remove``; everything else is plain files, for a
test to spoil as it likes.
"""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

API = "vfio-pci"


@dataclass
class FakeSystem:
    root: Path
    groups: int = 0
    refuse: dict[str, int] = field(default_factory=dict)
    """UUID or ``UUID/remove`` to the errno that a write for it fails with."""
    block: dict[str, asyncio.Event] = field(default_factory=dict)
    """The same to an event that the write waits for."""
    writes: list[tuple[str, str]] = field(default_factory=list)
    opened: set[str] = field(default_factory=set)
    """UUIDs of devices that the driver believes to be open."""
    capacity: Callable[[FakeSystem], None] | None = None
    """Called after every creation and removal, to set ``available_instances``."""

    @property
    def bus(self) -> Path:
        return self.root / "sys/bus/mdev/devices"

    @property
    def parents(self) -> Path:
        return self.root / "sys/class/mdev_bus"

    def load_mdev(self) -> FakeSystem:
        self.bus.mkdir(parents=True, exist_ok=True)
        self.parents.mkdir(parents=True, exist_ok=True)
        (self.root / "dev/vfio").mkdir(parents=True, exist_ok=True)
        (self.root / "proc").mkdir(exist_ok=True)
        return self

    def parent(self, name: str, bus: str = "virtual/fake") -> Path:
        self.load_mdev()
        path = self.root / "sys/devices" / bus / name
        (path / "mdev_supported_types").mkdir(parents=True)
        link(self.parents / name, path)
        return path

    def groups_of(self, parent: str, links: int) -> FakeSystem:
        """From now on devices of this parent have start groups, as kernel/ABI.rst has them."""
        for name in ("p2p_links", "p2p_links_free"):
            put(self.parents / parent / name, f"{links}\n")
        return self

    def type(self, parent: str, id_: str, available: object = 4, **files: str | bytes) -> Path:
        path = self.types(parent) / id_
        (path / "devices").mkdir(parents=True)
        (path / "create").write_text("")
        (path / "create").chmod(0o200)
        values: dict[str, str | bytes] = {
            "available_instances": f"{available}\n",
            "device_api": f"{API}\n",
            "name": f"Name of {id_}\n",
            **files,
        }
        for name, value in values.items():
            put(path / name, value)
        return path

    def types(self, parent: str) -> Path:
        return (self.parents / parent).resolve() / "mdev_supported_types"

    def mdev(self, parent: str, type_id: str, uuid: str) -> Path:
        path = (self.parents / parent).resolve() / uuid
        path.mkdir()
        (path / "remove").write_text("")
        if (self.parents / parent / "p2p_links").exists():
            for name, value in (("group_uuid", "\n"), ("online", "0\n"), ("vgpu_params", "\n")):
                put(path / name, value)
        link(path / "mdev_type", self.types(parent) / type_id)
        self.groups += 1
        group = self.root / "sys/kernel/iommu_groups" / str(self.groups)
        group.mkdir(parents=True)
        link(path / "iommu_group", group)
        (self.root / "dev/vfio" / str(self.groups)).write_text("")
        link(self.types(parent) / type_id / "devices" / uuid, path)
        link(self.bus / uuid, path)
        return path

    def process(self, pid: int, comm: str, command: list[str], opens: list[str]) -> Path:
        path = self.root / "proc" / str(pid)
        (path / "fd").mkdir(parents=True)
        (path / "comm").write_text(comm + "\n")
        (path / "cmdline").write_text("".join(f"{word}\0" for word in command))
        for number, target in enumerate(opens):
            (path / "fd" / str(number)).symlink_to(target)
        return path

    def uuids(self) -> set[str]:
        return {path.name for path in self.bus.iterdir()} if self.bus.exists() else set()

    async def write(self, path: str, data: bytes) -> int:
        """What the kernel does; see :data:`mdev_orchestrator.system.writer.Writer`."""
        name = path.rpartition("/")[2]
        uuid = data.decode() if name == "create" else path.split("/")[-2]
        key = uuid if name == "create" else f"{uuid}/{name}"
        self.writes.append((name, uuid))
        if key in self.block:
            await self.block[key].wait()
        await asyncio.sleep(0)
        return self.refuse.get(key) or self._effect(Path(path), data, uuid)

    def _effect(self, file: Path, data: bytes, uuid: str) -> int:
        if not file.exists():
            return errno.ENOENT
        if file.name == "create":
            return self._create(file.parent, uuid)
        if file.name == "remove":
            return self._remove(uuid)
        if (file.parent.resolve().parent / "p2p_links").exists():
            if file.name == "online":
                return self._online(uuid, on=data == b"1")
            if (file.parent / "online").read_text() == "1\n":
                return errno.EBUSY
        file.write_bytes(data)
        return 0

    def members(self, uuid: str) -> list[Path]:
        """Directories of the start group of a device."""
        path = (self.bus / uuid).resolve()
        group = (path / "group_uuid").read_text().strip()
        same = [p for p in path.parent.glob("*/group_uuid") if p.read_text().strip() == group]
        return [p.parent for p in same] if group else [path]

    def _online(self, uuid: str, *, on: bool) -> int:
        members = self.members(uuid)
        if (members[0] / "online").read_text() == f"{on:d}\n":
            return 0
        if not on and self.opened & {path.name for path in members}:
            return errno.EBUSY
        free = members[0].parent / "p2p_links_free"
        asked = len(members) * (len(members) - 1) // 2
        left = int(free.read_text()) + (-asked if on else asked)
        if left < 0:
            return errno.ENOSPC
        free.write_text(f"{left}\n")
        for path in members:
            (path / "online").write_text(f"{on:d}\n")
        return 0

    def _create(self, type_: Path, uuid: str) -> int:
        if uuid in self.uuids():
            return errno.EEXIST
        if int((type_ / "available_instances").read_text()) < 1:
            return errno.EUSERS
        self.mdev(type_.parent.parent.name, type_.name, uuid)
        self._count(type_, -1)
        return 0

    def _remove(self, uuid: str) -> int:
        path = (self.bus / uuid).resolve()
        type_ = (path / "mdev_type").resolve()
        (self.bus / uuid).unlink()
        (type_ / "devices" / uuid).unlink()
        shutil.rmtree(path)
        self._count(type_, +1)
        return 0

    def _count(self, type_: Path, change: int) -> None:
        if self.capacity is not None:
            self.capacity(self)
            return
        file = type_ / "available_instances"
        file.write_text(f"{int(file.read_text()) + change}\n")


def link(path: Path, target: Path) -> None:
    """A relative link, as sysfs has them."""
    path.symlink_to(os.path.relpath(target, path.parent))


def put(path: Path, value: str | bytes) -> None:
    path.write_bytes(value.encode() if isinstance(value, str) else value)
