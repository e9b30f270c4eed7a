# SPDX-License-Identifier: GPL-2.0-or-later
"""A small VFIO user for tests, and what mvgpu shows in sysfs and debugfs.

A program opens an mdev by its group's node and its UUID, and reads and writes regions at offsets
that the device tells. Numbers are those of ``linux/vfio.h``; registers come from the driver's own
``mvgpu.h``.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import fcntl
import itertools
import os
import re
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self
from uuid import uuid4

MDEVS = Path("/sys/bus/mdev/devices")
PARENTS = Path("/sys/class/mdev_bus")
DEBUG = Path("/sys/kernel/debug/mvgpu")
HEADER = Path(__file__).resolve().parents[2] / "kernel" / "mvgpu.h"

SET_IOMMU, SET_CONTAINER, GET_DEVICE_FD = 0x3B66, 0x3B68, 0x3B6A
GET_REGION_INFO, DEVICE_RESET = 0x3B6C, 0x3B6F
TYPE1 = 1
PR_SET_PDEATHSIG = 1
REGS, FB, CONFIG = 0, 2, 7

#: The numbers of ``mvgpu.h`` without their prefix: ``MV["REG_MAGIC"]``.
MV = {
    name: int(value, 0)
    for name, value in re.findall(
        r"^#define MVGPU_(\w+)\s+(0x[0-9a-f]+|\d+)\b", HEADER.read_text(), re.MULTILINE
    )
}


class Device:
    """An open mdev.

    :cvar held: UUIDs that this process has open.
    :raise OSError: The open was refused; nothing stays open.
    """

    held: ClassVar[set[str]] = set()

    def __init__(self, uuid: str) -> None:
        self.uuid = uuid
        number = (MDEVS / uuid / "iommu_group").readlink().name
        with contextlib.ExitStack() as stack:
            self.container = self._open(stack, "/dev/vfio/vfio")
            group = self._open(stack, f"/dev/vfio/{number}")
            fcntl.ioctl(group, SET_CONTAINER, array.array("i", [self.container]))
            fcntl.ioctl(self.container, SET_IOMMU, TYPE1)
            # bytes would come back as bytes, and the descriptor be lost
            self.fd = fcntl.ioctl(group, GET_DEVICE_FD, bytearray(uuid.encode() + b"\0"))
            stack.callback(os.close, self.fd)
            self.held.add(uuid)
            stack.callback(self.held.discard, uuid)
            self._open_files = stack.pop_all()

    @staticmethod
    def _open(stack: contextlib.ExitStack, path: str) -> int:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        stack.callback(os.close, fd)
        return fd

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of it; more than once does no harm."""
        self._open_files.close()

    def offset(self, region: int) -> int:
        """Where a region starts in the file."""
        info = bytearray(struct.pack("=IIIIQQ", 32, 0, region, 0, 0, 0))
        fcntl.ioctl(self.fd, GET_REGION_INFO, info)
        return struct.unpack("=IIIIQQ", info)[5]

    def read(self, name: str) -> int:
        """A register by its name in ``mvgpu.h`` without ``MVGPU_REG_``."""
        return self.word(MV[f"REG_{name}"])

    def word(self, at: int) -> int:
        """The 32 bits at an offset in BAR 0."""
        return struct.unpack("<I", os.pread(self.fd, 4, self.offset(REGS) + at))[0]

    def write(self, name: str, value: int, size: int = 4) -> None:
        """Set a register, or two by the name of the lower one."""
        data = value.to_bytes(size, "little")
        os.pwrite(self.fd, data, self.offset(REGS) + MV[f"REG_{name}"])

    def reset(self) -> None:
        fcntl.ioctl(self.fd, DEVICE_RESET)

    def ring(self, command: str, **registers: int) -> None:
        """Set ``src``, ``dst``, ``len``, ``seed`` or ``peer``, and ring the doorbell."""
        for name, value in registers.items():
            wide = name in {"src", "dst", "len"}
            self.write(f"{name.upper()}_LO" if wide else name.upper(), value, 8 if wide else 4)
        self.write("COMMAND", MV[f"CMD_{command}"])

    def run(self, command: str, **registers: int) -> int:
        """Ring, and wait for the end: the error code, 0 for none."""
        self.ring(command, **registers)
        while (status := self.read("STATUS")) & MV["STATUS_BUSY"]:
            time.sleep(0.001)
        return (status & MV["STATUS_CODE_MASK"]) >> MV["STATUS_CODE_SHIFT"]

    def crc(self, length: int) -> int:
        """The device's own checksum of the start of its framebuffer."""
        assert self.run("CHECKSUM", src=0, len=length) == 0
        return self.read("RESULT")

    def members(self) -> dict[str, int]:
        """Slots of the start group's members by their UUID, as a guest sees them."""
        start, size = MV["REG_GROUP"], MV["GROUP_SLOTS"] * MV["GROUP_STRIDE"]
        raw = os.pread(self.fd, size, self.offset(REGS) + start)
        found = {}
        for slot in range(MV["GROUP_SLOTS"]):
            text = raw[slot * 16 : slot * 16 + 16].hex()
            if int(text, 16):
                uuid = "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))
                found[uuid] = slot
        return found


class Child:
    """A process that opens mdevs one after the other, then holds them until it is ended.

    :ivar failed: errno of the first open that failed, and 0 when all are open.
    """

    def __init__(self, *uuids: str, wait: bool = True) -> None:
        read, write = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            _child(uuids, write)
        os.close(write)
        self._pipe = read
        self._alive = True
        self.failed = self.result() if wait else None

    def result(self) -> int:
        """Wait until it has opened what it was told to; -1 when it was killed before."""
        data = os.read(self._pipe, 4)
        self.failed = int.from_bytes(data, "little") if data else -1
        return self.failed

    def end(self, number: int = signal.SIGTERM) -> None:
        """End it by a signal; when this returns, the kernel has released all that it held."""
        if self._alive:
            os.kill(self.pid, number)
            os.waitpid(self.pid, 0)
            os.close(self._pipe)
            self._alive = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end(signal.SIGKILL)


def _child(uuids: tuple[str, ...], pipe: int) -> None:
    # what the parent has open is not ours to hold, and without it we have no reason to be
    os.closerange(3, pipe)
    os.closerange(pipe + 1, 4096)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    held, error = [], 0
    try:
        for uuid in uuids:
            held.append(Device(uuid))
            held[-1].read("MAGIC")
    except OSError as failure:
        error = failure.errno or 1
    os.write(pipe, error.to_bytes(4, "little"))
    while True:
        signal.pause()


def refusal(*uuids: str) -> int | None:
    """errno that another process gets when it opens them."""
    with Child(*uuids) as child:
        return child.failed


@dataclass(frozen=True)
class Event:
    """A line of the driver's log."""

    sequence: int
    ns: int
    event: str
    uuid: str
    group: str
    pid: int
    value: int


def events(since: int = 0) -> list[Event]:
    """The driver's log from a sequence number on."""
    lines = (line.split() for line in reversed((DEBUG / "log").read_text().splitlines()))
    late = itertools.takewhile(lambda line: int(line[0]) >= since, lines)
    found = [Event(int(a), int(b), c, d, e, int(f), int(g)) for a, b, c, d, e, f, g in late]
    return found[::-1]


def now() -> int:
    """The sequence number that the next event will have."""
    log = events()
    return log[-1].sequence + 1 if log else 0


def create(parent: str, type_: str, uuid: str | None = None) -> str:
    """An mdev; its UUID."""
    uuid = uuid or str(uuid4())
    path = PARENTS / parent / "mdev_supported_types" / f"mvgpu-{type_}" / "create"
    poke(path, uuid)
    deadline = time.monotonic() + 10
    node = Path("/dev/vfio", (MDEVS / uuid / "iommu_group").readlink().name)
    while not node.exists():
        assert time.monotonic() < deadline
        time.sleep(0.001)
    return uuid


def remove(uuid: str) -> None:
    """Remove an mdev that no process has open; else this would wait for itself."""
    assert uuid not in Device.held
    poke(MDEVS / uuid / "remove", "1")


Make = Callable[..., list[str]]
"""``make(count=1, group="", *, type_="128M")``: fresh mdevs, in a start group if one is given."""


@contextlib.contextmanager
def factory() -> Iterator[Make]:
    """Makes mdevs; what is left of them goes at the end, and every link must be free then."""
    made: list[str] = []

    def make(count: int = 1, group: str = "", *, type_: str = "128M") -> list[str]:
        parent = "igd0" if type_.endswith("M") else "grid0"
        new = [create(parent, type_) for _ in range(count)]
        made.extend(new)
        if group:
            for uuid in new:
                put(uuid, "group_uuid", group)
        return new

    before = links("igd0"), links("grid0")
    try:
        yield make
    finally:
        for uuid in made:
            with contextlib.suppress(FileNotFoundError):
                remove(uuid)
    assert (links("igd0"), links("grid0")) == before


def get(uuid: str, name: str) -> str:
    return (MDEVS / uuid / name).read_text().removesuffix("\n")


def put(uuid: str, name: str, text: str) -> None:
    """Write an attribute, with a newline as echo does.

    :raise OSError: The driver's answer.
    """
    poke(MDEVS / uuid / name, text + "\n")


def poke(path: Path, text: str) -> None:
    """Write once: Python's own files try again on closing what has failed before."""
    fd = os.open(path, os.O_WRONLY)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def links(parent: str = "igd0") -> int:
    """Links that are left."""
    return int((PARENTS / parent / "p2p_links_free").read_text())


@contextlib.contextmanager
def fault(point: str, text: str) -> Iterator[Callable[[], str]]:
    """A fault while the block lasts; calling what it gives reads the fault back."""
    path = DEBUG / "fault" / point
    poke(path, text)
    try:
        yield path.read_text
    finally:
        poke(path, "\n")


class Uevents:
    """``MVGPU_STATE`` of the kernel's change events from now on."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, 15)
        self._socket.bind((0, 1))
        self._socket.settimeout(0)

    def close(self) -> None:
        self._socket.close()

    def states(self) -> list[tuple[str, str]]:
        """UUID and new state of each mdev, in order; the kernel sends before a write returns."""
        found = []
        with contextlib.suppress(BlockingIOError):
            while True:
                head, *rest = self._socket.recv(8192).decode().split("\0")
                values = dict(item.split("=", 1) for item in rest if "=" in item)
                if head.startswith("change@") and "MVGPU_STATE" in values:
                    assert values["SUBSYSTEM"] == "mdev"
                    found.append((head.rpartition("/")[2], values["MVGPU_STATE"]))
        return found


@contextlib.contextmanager
def loaded(**parameters: int) -> Iterator[None]:
    """The driver loaded with other parameters; with its former ones again afterwards."""
    settings = Path("/sys/module/mvgpu/parameters")
    before = {path.name: path.read_text().strip() for path in settings.iterdir()}
    load(**parameters)
    try:
        yield
    finally:
        load(**before)


def load(**parameters: object) -> None:
    """Load the driver anew, unloading it first if it is there.

    :raise subprocess.CalledProcessError: It refuses the parameters; it is not loaded then.
    """
    if Path("/sys/module/mvgpu").exists():
        subprocess.run(["rmmod", "mvgpu"], check=True)
    module = Path(os.environ["MDO_LAB_MODULES"], "mvgpu.ko")
    options = [f"{name}={value}" for name, value in parameters.items()]
    subprocess.run(["insmod", module, *options], check=True, capture_output=True)
