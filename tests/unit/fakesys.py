# SPDX-License-Identifier: GPL-2.0-or-later
"""A machine of files: the parts of ``/sys``, ``/dev`` and ``/proc`` that the program reads.

It has the real kernel's layout, links included. The program writes to it with its own writer. One
function in the writer's children is replaced, :func:`write_file` for the one that opens and writes
a file: it hands the write to a thread of the test's process, which does what the mdev core does on
``create`` and ``remove``. Everything else is plain files, for a test to spoil as it likes.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import shutil
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol
from weakref import WeakValueDictionary

from mdev_orchestrator.model import is_uuid
from mdev_orchestrator.system import writer

API = "vfio-pci"


class Gate(Protocol):
    """A :class:`asyncio.Event` or :class:`threading.Event`; it is only asked."""

    def is_set(self) -> bool: ...


@dataclass
class FakeSystem:
    """One machine.

    What a test sets takes effect at the next write, even if the writer has its children already.
    ``before`` and ``after`` are called in the kernel's thread.
    """

    root: Path
    groups: int = 0
    iommufd: bool = False
    """Whether devices have nodes of their own, see :meth:`load_iommufd`."""
    refuse: dict[str, int] = field(default_factory=dict)
    """UUID, or ``UUID/FILE`` for another file than ``create``, to the errno that a write gives."""
    block: dict[str, Gate] = field(default_factory=dict)
    """The same to an event that the write waits for."""
    kill: dict[str, Literal["before", "after"]] = field(default_factory=dict)
    """The same to when the process that writes is killed: before the write has its effect, or after
    that and before the process can tell of it. Each does it once."""
    before: Callable[[str, str], int | None] | None = None
    """Called with the file's name and the UUID before a write has its effect; gives 0 or an errno
    to answer without an effect, or ``None`` to go on."""
    after: Callable[[str, str], object] | None = None
    """The same when it has had its effect."""
    writes: list[tuple[str, str]] = field(default_factory=list)
    opened: set[str] = field(default_factory=set)
    """UUIDs of devices that the driver believes to be open."""
    capacity: Callable[[FakeSystem], None] | None = None
    """Called after every creation and removal, to set ``available_instances``."""
    closed: bool = False
    """Whether the test is over: what blocks is let go, without effect."""

    def __post_init__(self) -> None:
        self._lock = threading.RLock()
        _kernel.serve(self)

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

    def load_iommufd(self) -> FakeSystem:
        """From now on there is ``/dev/iommu``, and devices have nodes of their own."""
        self.load_mdev()
        self.iommufd = True
        for node in ("iommu", "vfio/vfio"):
            (self.root / "dev" / node).write_text("")
        (self.root / "dev/vfio/devices").mkdir()
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
        own = f"vfio{self.groups}"
        (path / "vfio-dev" / own).mkdir(parents=True)  # a name, on kernels without the node as well
        if self.iommufd:
            (path / "vfio-dev" / own / "dev").write_text(f"511:{self.groups}\n")
            (self.root / "dev/vfio/devices" / own).write_text("")
        link(self.types(parent) / type_id / "devices" / uuid, path)
        link(self.bus / uuid, path)
        return path

    def group_of_two(self, group: str, *uuids: str) -> None:
        """Devices on a parent with three links; the first two are one start group."""
        self.parent("card0")
        self.type("card0", "t-1")
        self.groups_of("card0", 3)
        for uuid in uuids:
            self.mdev("card0", "t-1", uuid)
        for uuid in uuids[:2]:
            put(self.bus / uuid / "group_uuid", group + "\n")

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
        """What another program writes; gives 0 or the errno."""
        return await asyncio.to_thread(self.perform, path, data)

    def perform(
        self, path: str, data: bytes, pid: int = 0, peer: socket.socket | None = None
    ) -> int:
        """What the kernel does when a file is written; gives 0 or the errno.

        :param pid: The process that writes, for :attr:`kill`.
        :param peer: Its connection.
        """
        *directories, name = path.split("/")
        uuid = next((part for part in reversed(directories) if is_uuid(part)), directories[-1])
        if name == "create":
            uuid = data.decode()
        key = uuid if name == "create" else f"{uuid}/{name}"
        self.writes.append((name, uuid))
        answer = self.before(name, uuid) if self.before is not None else None
        with self._writing(pid, path) if self._blocks(key) else contextlib.nullcontext():
            while self._blocks(key):
                # a start waits killably, the mdev core's own files do not
                if self.closed or (name == "online" and _has_hung_up(peer)):
                    return errno.EINTR
                time.sleep(0.002)
            return self._go_on(name, uuid, path, data, answer, pid)

    def _go_on(
        self, name: str, uuid: str, path: str, data: bytes, answer: int | None, pid: int
    ) -> int:
        key = uuid if name == "create" else f"{uuid}/{name}"
        if self.kill.get(key) == "before":
            return self._kill(key, pid)
        if answer is None:
            with self._lock:
                answer = self.refuse.get(key) or self._effect(Path(path), data, uuid)
        if self.after is not None:
            self.after(name, uuid)
        return self._kill(key, pid) if self.kill.get(key) == "after" else answer

    def _blocks(self, key: str) -> bool:
        gate = self.block.get(key)
        return gate is not None and not gate.is_set()

    @contextlib.contextmanager
    def _writing(self, pid: int, path: str) -> Iterator[None]:
        """While a write blocks, its process is seen in ``/proc`` with the file."""
        directory = self.root / "proc" / str(pid)
        if pid and not directory.exists():
            self.process(pid, "mdo", ["mdo"], [os.path.realpath(path)])
        try:
            yield
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    def _kill(self, key: str, pid: int) -> int:
        del self.kill[key]
        os.kill(pid, signal.SIGKILL)
        return errno.EINTR

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


# ---- the kernel's thread ------------------------------------------------------------------------

_NUMBER = struct.Struct("=i")
_NOT_MINE = -1
_ADDRESS = f"\0mdo-fake-kernel-{os.getpid()}-{os.urandom(8).hex()}"
"""Known to every child of this process, since they are forked."""


def write_file(path: str, data: bytes) -> int:
    """What stands for the writer's own function in its children."""
    if "/sys/" in path:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.connect(_ADDRESS)
            connection.send(os.fsencode(path) + b"\0" + data)
            (number,) = _NUMBER.unpack(connection.recv(_NUMBER.size))
        if number != _NOT_MINE:
            return int(number)
    return real_write_file(path, data)


real_write_file = writer._write_file


class _Kernel:
    """Serves all machines of files of this process, each write in a thread of its own."""

    def __init__(self) -> None:
        self._systems: WeakValueDictionary[str, FakeSystem] = WeakValueDictionary()
        self._socket: socket.socket | None = None

    def serve(self, system: FakeSystem) -> None:
        """Answer the writes below a root from now on."""
        self._systems[os.path.realpath(system.root)] = system
        if self._socket is None:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self._socket.bind(_ADDRESS)
            self._socket.listen(64)
            threading.Thread(target=self._accept, args=(self._socket,), daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):  # a child that was killed
            path, _, data = connection.recv(1 << 16).partition(b"\0")
            credentials = connection.getsockopt(
                socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")
            )
            root = os.path.realpath(os.fsdecode(path).partition("/sys/")[0])
            system = self._systems.get(root)
            number = _NOT_MINE
            if system is not None:
                pid, _, _ = struct.unpack("3i", credentials)
                number = system.perform(os.fsdecode(path), data, pid, connection)
            connection.send(_NUMBER.pack(number))


_kernel = _Kernel()


def wait_for_orphans() -> None:
    """Wait for the writer's children of processes that this one has forked and that are killed."""
    ours = Path("/proc/self/cmdline").read_bytes()
    while any(_is_orphan(entry, ours) for entry in Path("/proc").iterdir()):
        time.sleep(0.001)


def _is_orphan(process: Path, command: bytes) -> bool:
    if not process.name.isdecimal() or int(process.name) == os.getpid():
        return False
    try:
        parent = int((process / "stat").read_bytes().rpartition(b")")[2].split()[1])
        return parent == 1 and (process / "cmdline").read_bytes() == command
    except OSError:
        return False


def _has_hung_up(peer: socket.socket | None) -> bool:
    try:
        return peer is not None and not peer.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
