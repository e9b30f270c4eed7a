# SPDX-License-Identifier: GPL-2.0-or-later
"""The machine that a campaign happens on: who else is there, and all that can be left over.

:func:`look` tells everything that a command could have changed, so that "nothing has happened" is
that two of its answers are equal. Foreign parties are there all the time: two mdevs that nobody
made with ``mdo``, one of them open in a QEMU that nobody started with it. mvgpu's own log tells
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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lab import vfio
from mdev_orchestrator.engine.store import read_owned
from mdev_orchestrator.host import sysfs
from mdev_orchestrator.host.holders import holders
from mdev_orchestrator.model import Mdev
from mdev_orchestrator.qemu import process
from mdev_orchestrator.state import journal_path, state_dir

PATIENCE = 20.0
"""Seconds for what was killed to be gone: an emulated processor is slow."""
UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")

Look = dict[str, object]


@dataclass
class Foreign:
    """Who else is on the machine.

    :ivar uuids: mdevs that are not ours; the first is open.
    :ivar pid: The QEMU that has it open.
    :ivar since: Number in mvgpu's log from which on nothing happens to them.
    """

    uuids: tuple[str, ...]
    pid: int
    since: int = 0

    def look(self) -> list[object]:
        """What must stay as it is."""
        found: list[object] = []
        for uuid in self.uuids:
            path = vfio.MDEVS / uuid
            mdev = next((one for one in sysfs.scan().mdevs if str(one.uuid) == uuid), None)
            if mdev is None:
                found.append(f"{uuid} is gone")
                continue
            held = sorted(one.pid for one in holders((mdev,)).of(mdev.uuid))
            inode = path.resolve().stat().st_ino
            group = str(mdev.group_uuid)
            found.append([uuid, inode, mdev.iommu_group, group, mdev.online, mdev.params, held])
        found += [str(event) for event in vfio.events(self.since) if event.uuid in self.uuids]
        return found


@contextlib.contextmanager
def foreign() -> Iterator[Foreign]:
    """Two mdevs of somebody else, one of them open in his QEMU."""
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


# ---------------------------------------------------------------- looking


def look(others: Foreign) -> Look:
    """All that a command may change, and what nothing may change."""
    host = sysfs.scan()
    known = set(others.uuids)
    owned = read_owned()
    return {
        "devices": [_device(mdev) for mdev in host.mdevs if str(mdev.uuid) not in known],
        "available": {
            f"{type_.parent}/{type_.id}": type_.available_instances
            for parent in host.parents
            for type_ in parent.types
        },
        "links": {name: vfio.links(name) for name in ("grid0", "igd0")},
        "guests": [_guest(guest) for guest in process.list_guests()],
        "files": _files(),
        "our devices": sorted(f"{d.uuid} {d.owner} {d.spec}" for d in owned.devices.values()),
        "our guests": sorted(f"{g.name} {g.uuid} {g.spec}" for g in owned.guests.values()),
        "our specs": sorted(owned.specs),
        "open runs": _rows("SELECT kind, title FROM run WHERE ended IS NULL"),
        "claims": _rows("SELECT object FROM claim"),
        "strays": _strays(others),
        "foreign": others.look(),
    }


def _device(mdev: Mdev) -> str:
    held = sorted(one.guest or one.comm for one in holders((mdev,)).of(mdev.uuid))
    return (
        f"{mdev.parent} {mdev.type_id} {mdev.uuid} group={mdev.group_uuid} online={mdev.online} "
        f"params={mdev.params} held={held}"
    )


def _guest(guest: process.Guest) -> str:
    return f"{guest.name} {guest.state} {guest.record.uuid if guest.record else guest.damage}"


def _files() -> list[str]:
    """What stands in the directories of guests."""
    place = process.guests_dir()
    return sorted(str(path.relative_to(place)) for path in place.rglob("*"))


def _rows(query: str) -> list[str]:
    if not journal_path().exists():
        return []
    with contextlib.closing(sqlite3.connect(f"file:{journal_path()}?mode=ro", uri=True)) as db:
        return [" ".join(map(str, row)) for row in db.execute(query)]


def _strays(others: Foreign) -> list[str]:
    """Processes that nobody knows: QEMUs, shells that would become one, writers left behind."""
    end = time.monotonic() + PATIENCE
    while True:
        known = {guest.record.pid for guest in process.list_guests() if guest.record}
        found = [
            f"{pid} {line}"
            for pid, line in processes()
            if pid not in known and pid not in {others.pid, os.getpid()}
        ]
        if not found or time.monotonic() > end:
            return found
        time.sleep(0.1)


def processes() -> list[tuple[int, str]]:
    """QEMUs, their gates, and processes that were forked from this one."""
    own = Path("/proc/self/cmdline").read_bytes()
    found = []
    for directory in Path("/proc").iterdir():
        if not directory.name.isdecimal():
            continue
        try:
            line = (directory / "cmdline").read_bytes()
        except OSError:
            continue
        if line == own or b"qemu-system" in line.partition(b"\0")[0] or b"mdo-guest" in line:
            words = line.replace(b"\0", b" ").decode(errors="replace")[:100]
            found.append((int(directory.name), words))
    return found


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
        if pid not in {others.pid, os.getpid()}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    end = time.monotonic() + PATIENCE
    while [pid for pid, _ in processes() if pid not in {others.pid, os.getpid()}]:
        assert time.monotonic() < end, processes()
        time.sleep(0.05)
    for mdev in sysfs.scan().mdevs:
        if str(mdev.uuid) not in others.uuids:
            with contextlib.suppress(FileNotFoundError):
                vfio.remove(str(mdev.uuid))
    for path in state_dir().iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
