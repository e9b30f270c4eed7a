# SPDX-License-Identifier: GPL-2.0-or-later
"""The machine that a campaign happens on: what is foreign there, and all that can be left over.

:func:`look` gives everything that a command could have changed, so that "nothing has happened" is
that two of its answers are equal. Foreign objects are there all the time: two mdevs that were not
made with ``mdo``, one of them open in a QEMU that was not started with it. mvgpu's own log tells
whether anything ever happened to them.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import time
import uuid as uuids
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from lab import vfio
from lab.machine import machine
from mdev_orchestrator.engine.journal_db import read_managed
from mdev_orchestrator.engine.records import Managed
from mdev_orchestrator.host import sysfs
from mdev_orchestrator.host.holders import Holders, read_holders
from mdev_orchestrator.model import Host, Mdev
from mdev_orchestrator.qemu import process

PATIENCE = 20.0
"""Seconds for what was killed to be gone: an emulated processor is slow."""
UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")

Look = dict[str, object]


@dataclass
class Foreign:
    """What is on the machine beside the objects of the campaign.

    :ivar uuids: mdevs that are not ours; the first is open.
    :ivar pid: The QEMU that has it open.
    :ivar since: Number in mvgpu's log from which on nothing happens to them.
    :ivar company: Further processes of the test's own; what they fork is theirs while they live.
    """

    uuids: tuple[str, ...]
    pid: int
    since: int = 0
    company: set[int] = field(default_factory=set)

    @property
    def known(self) -> set[int]:
        """Processes that are meant to be there."""
        return {self.pid, os.getpid(), *self.company}

    def look(self, host: Host, held_by: Holders) -> list[object]:
        """What must stay as it is."""
        found: list[object] = []
        for uuid in self.uuids:
            path = vfio.MDEVS / uuid
            mdev = host.find(uuids.UUID(uuid))
            if mdev is None:
                found.append(f"{uuid} is gone")
                continue
            held = sorted(one.pid for one in held_by.of(mdev.uuid))
            inode = path.resolve().stat().st_ino
            group = str(mdev.group_uuid)
            found.append([uuid, inode, mdev.iommu_group, group, mdev.online, mdev.params, held])
        found += [str(event) for event in vfio.events(self.since) if event.uuid in self.uuids]
        return found


@contextlib.contextmanager
def foreign() -> Iterator[Foreign]:
    """Two mdevs that are not managed here, one of them open in a QEMU that is not either."""
    opened = vfio.create("igd0", "128M")
    idle = vfio.create("grid0", "12")
    vfio.put(idle, "group_uuid", "5ca1ab1e-0000-4000-8000-000000000001")
    qemu = subprocess.Popen(
        [
            *("qemu-system-x86_64", "-S", "-nodefaults", "-display", "none", "-m", "16M"),
            *("-name", "foreign", "-device", f"vfio-pci,sysfsdev={vfio.MDEVS / opened}"),
        ],
        stdin=subprocess.DEVNULL,
    )
    found = Foreign((opened, idle), qemu.pid)
    try:
        end = time.monotonic() + 60
        while vfio.get(opened, "online") != "1":
            assert qemu.poll() is None, "the foreign QEMU has ended"
            assert time.monotonic() < end, "the foreign QEMU does not open its device"
            time.sleep(0.1)
        time.sleep(1)  # it touches its device once more before it is settled
        found.since = vfio.now()
        yield found
    finally:
        qemu.kill()
        qemu.wait()
        for uuid in (opened, idle):
            vfio.remove(uuid)


@contextlib.contextmanager
def small_disk(place: Path, size: str = "2M") -> Iterator[Callable[[], None]]:
    """A state directory on a disk of its own; calling what it gives fills that."""
    disk = place / "small"
    disk.mkdir()
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size},mode=700", "small", disk], check=True
    )
    before = os.environ["MDO_STATE_DIR"]
    os.environ["MDO_STATE_DIR"] = str(disk / "state")
    (disk / "state").mkdir(mode=0o700)

    def fill() -> None:
        with (disk / "filler").open("ab", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(b"x" * 4096)

    try:
        yield fill
    finally:
        os.environ["MDO_STATE_DIR"] = before
        subprocess.run(["umount", disk], check=True)
        disk.rmdir()


# ---------------------------------------------------------------- looking


@dataclass(frozen=True)
class Observed:
    """What is there at one moment.

    :ivar held: The processes that have each mdev open.
    """

    host: Host
    held: Holders
    managed: Managed
    guests: tuple[process.RunningGuest, ...]

    @classmethod
    def now(cls) -> Observed:
        """Read it."""
        host = sysfs.read_host(machine())
        held = read_holders(machine(), host.mdevs)
        return cls(host, held, read_managed(machine()), _guests())


def _place() -> Path:
    return machine().state_dir


def _guests() -> tuple[process.RunningGuest, ...]:
    return tuple(process.list_guests(machine()))


def look(others: Foreign, observed: Observed | None = None) -> Look:
    """All that a command may change, and what nothing may change.

    :param observed: What was read just now.
    """
    observed = observed or Observed.now()
    host, held, managed = observed.host, observed.held, observed.managed
    known = set(others.uuids)
    runs, claims = _open()
    return {
        "devices": [_device(mdev, held) for mdev in host.mdevs if str(mdev.uuid) not in known],
        "available": {
            f"{type_.parent}/{type_.id}": type_.available_instances
            for parent in host.parents
            for type_ in parent.types
        },
        "links": {name: vfio.links(name) for name in ("grid0", "igd0")},
        "guests": [_guest(guest) for guest in observed.guests],
        "files": _files(),
        "our devices": sorted(f"{d.uuid} {d.owner} {d.spec}" for d in managed.devices.values()),
        "our guests": sorted(f"{g.name} {g.uuid} {g.spec}" for g in managed.guests.values()),
        "our specs": sorted(managed.specs),
        "open runs": runs,
        "claims": claims,
        "strays": _strays(others, observed.guests),
        "foreign": others.look(host, held),
    }


def _device(mdev: Mdev, held_by: Holders) -> str:
    held = sorted(one.guest or one.comm for one in held_by.of(mdev.uuid))
    return (
        f"{mdev.parent} {mdev.type_id} {mdev.uuid} group={mdev.group_uuid} online={mdev.online} "
        f"params={mdev.params} held={held}"
    )


def _guest(guest: process.RunningGuest) -> str:
    return f"{guest.name} {guest.state} {guest.record.uuid if guest.record else guest.damage}"


def _files() -> list[str]:
    """What is in the directories of guests, without empty directories in these."""
    place = machine().guests_dir
    return sorted(
        str(path.relative_to(place))
        for path in place.rglob("*")
        if path.parent == place or not path.is_dir()
    )


def _open() -> tuple[list[str], list[str]]:
    """Runs that have not come to their end, and what they claim."""
    path = _place() / "journal.db"
    if not path.exists() or not path.stat().st_size:
        return [], []
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
        runs = db.execute("SELECT kind, title FROM run WHERE ended IS NULL").fetchall()
        claims = db.execute("SELECT object FROM claim").fetchall()
    return [" ".join(row) for row in runs], [object_ for (object_,) in claims]


def _strays(others: Foreign, guests: tuple[process.RunningGuest, ...]) -> list[str]:
    """Processes that should not be there: QEMUs, shells that would become one, left writers."""
    end = time.monotonic() + PATIENCE
    while True:
        known = {guest.record.pid for guest in guests if guest.record} | others.known
        found = [
            f"{pid} {line}"
            for pid, line in processes()
            if pid not in known and not (line == _OWN and parent_of(pid) in others.company)
        ]
        if not found or time.monotonic() > end:
            return found
        time.sleep(0.1)
        guests = _guests()


def _words(line: bytes) -> str:
    """What a process was started with, as much of it as makes a line."""
    return line.replace(b"\0", b" ").decode(errors="replace")[:100]


def words(pid: int) -> str:
    """What a process was started with; one that was forked has the words of its parent."""
    try:
        return _words(Path(f"/proc/{pid}/cmdline").read_bytes())
    except OSError:
        return ""


_OWN = _words(Path("/proc/self/cmdline").read_bytes())
"""What all processes look like that were forked from this one."""


_KTHREADD = 2
_KERNEL: set[str] = set()
"""Threads of the kernel, which are many."""


def processes() -> list[tuple[int, str]]:
    """QEMUs, their gates, and processes that were forked from this one."""
    found = []
    for name in os.listdir("/proc"):  # noqa: PTH208 - it is looked at thousands of times
        if not name.isdecimal() or name in _KERNEL:
            continue
        try:
            line = Path("/proc", name, "cmdline").read_bytes()
        except OSError:
            continue
        if not line and parent_of(int(name)) == _KTHREADD:
            _KERNEL.add(name)
        words = _words(line)
        if words == _OWN or b"qemu-system" in line.partition(b"\0")[0] or b"mdo-guest" in line:
            found.append((int(name), words))
    return found


def parent_of(pid: int) -> int:
    """The process that forked another; 0 for one that has gone."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def children(parent: int) -> list[int]:
    """Processes that one has forked and not collected, ended ones too."""
    path = Path(f"/proc/{parent}/task/{parent}/children")
    return [int(pid) for pid in path.read_text().split()]


def differences(wanted: Look, got: Look, *, shape: bool = False) -> list[str]:
    """What is not as it should be, each in one line.

    :param shape: Which UUIDs there are is not compared.
    """
    lines = []
    for key, value in wanted.items():
        one, other = value, got[key]
        if shape and key != "foreign":
            one, other = _shape(one), _shape(other)
        if one != other:
            lines.append(f"{key}: {_only(one, other)} wanted, {_only(other, one)} found")
    return lines


DENIAL = re.compile(
    r"nothing was (changed|created|removed|done)|no step had any effect|all was undone"
)
"""Words that deny that anything has changed by a command."""
DENIED = ("devices", "guests")
"""What they deny a change of. A device's entry names the processes that have it open: a device that
was plugged into a guest differs by that, also while its QEMU cannot be asked."""


def denials(
    text: str, was: Look, now: Callable[[], Look], ignored: Collection[str] = ()
) -> list[str]:
    """What has changed though a command's messages deny it.

    :param text: What the command has printed.
    :param was: How it was before the command.
    :param now: Looks how it is; called only if there is a denial.
    :param ignored: What the test itself has changed.
    """
    denied = DENIAL.search(text)
    keys = [key for key in DENIED if key not in ignored]
    if denied is None or not keys:
        return []
    changed = differences({key: was[key] for key in keys}, now())
    return [f"{denied[0]!r} was said, but {line}" for line in changed]


def _shape(value: object) -> object:
    """A value with all UUIDs alike, in an order that does not depend on them."""
    plain = json.loads(UUID.sub("UUID", json.dumps(value)))
    return sorted(plain) if isinstance(plain, list) else plain


def _only(one: object, other: object) -> object:
    """What one has and the other has not."""
    if isinstance(one, list) and isinstance(other, list):
        return [entry for entry in one if entry not in other] or f"{len(one)}"
    if isinstance(one, dict) and isinstance(other, dict):
        return {key: value for key, value in one.items() if other.get(key) != value}
    return one


def clear(others: Foreign) -> None:
    """Remove all that is not foreign, without any of the code that is tested."""
    for pid, _ in processes():
        if pid not in others.known:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    end = time.monotonic() + PATIENCE
    while [pid for pid, _ in processes() if pid not in others.known]:
        assert time.monotonic() < end, processes()
        time.sleep(0.05)
    for mdev in sysfs.read_host(machine()).mdevs:
        if str(mdev.uuid) not in others.uuids:
            with contextlib.suppress(FileNotFoundError):
                vfio.remove(str(mdev.uuid))
    for path in _place().iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
