# SPDX-License-Identifier: GPL-2.0-or-later
"""The labs on this machine: their records, and the directories of those that have ended.

A lab is a directory below the state directory with the record of one QEMU process in it. The
process is identified by its id and start time. Each command that lists labs removes the directories
of those whose process has ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import shutil
import signal
from dataclasses import asdict, dataclass, field
from pathlib import Path

from mdev_orchestrator.errors import BusyError, HostError, RequestError, UnknownError
from mdev_orchestrator.state import decode, private_dir, state_dir
from mdev_orchestrator.system.files import write_atomic
from mdev_orchestrator.system.processes import start_time

RECORD = "lab.json"
"""File with the :class:`Lab`."""
STARTER = "starter"
"""File with id and start time of the process that brings the lab up."""
STOP_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Lab:
    """One lab, as its record says.

    :ivar accel: ``tcg`` or ``kvm``.
    :ivar start_time: Of the QEMU process, in clock ticks since boot (``/proc/PID/stat``).
    :ivar created: Seconds since the epoch.
    :ivar files: Paths of built files for commands in L1, by the environment variable that names
        each.
    :ivar iommufd: Whether it has ``/dev/iommu``.
    :ivar ready: Whether its agent has answered. Until then it belongs to the command that brings it
        up.
    """

    name: str
    pid: int
    start_time: int
    release: str
    accel: str
    created: float
    files: dict[str, str] = field(default_factory=dict)
    iommufd: bool = False
    ready: bool = True

    @property
    def directory(self) -> Path:
        """The directory of its sockets and logs."""
        return labs_dir() / self.name

    @property
    def alive(self) -> bool:
        """Whether its process still runs."""
        return start_time(self.pid) == self.start_time


def labs_dir() -> Path:
    """Return the directory of all labs."""
    return state_dir() / "labs"


def check_name(name: str) -> str:
    """Return ``name`` if a lab can be called so.

    :raise RequestError: It cannot.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,31}", name):
        raise RequestError(
            f"'{name}' cannot name a lab", "use up to 32 letters, digits, '.', '_' and '-'"
        )
    return name


def find_all() -> list[Lab]:
    """Return every lab that runs, and remove the directories of those that have ended.

    A lab whose record is damaged is left out and kept; :func:`find` reports it.
    """
    found = []
    for directory in sorted(labs_dir().glob("*/")):
        with contextlib.suppress(FileNotFoundError):  # another command removed it
            inode = directory.stat().st_ino
            if (directory / RECORD).exists():
                lab = _read(directory)
                alive = lab is None or lab.alive
                if lab and lab.alive and lab.ready:
                    found.append(lab)
                elif lab and lab.alive and not _starter_runs(directory):
                    down(lab)  # the command that brought it up was killed
            else:
                alive = _starter_runs(directory)
            if not alive:
                remove_directory(directory, inode)
    return found


def _starter_runs(directory: Path) -> bool:
    """Whether the command that brings a lab up still runs."""
    try:
        pid, began = map(int, (directory / STARTER).read_text().split())
    except (ValueError, OSError):
        pid, began = 0, 0
    return start_time(pid) == began


def _read(directory: Path) -> Lab | None:
    """Read a lab's record; ``None`` if it is damaged."""
    try:
        lab = decode((directory / RECORD).read_bytes(), Lab)
    except ValueError:
        return None
    return lab if lab.name == directory.name else None


def lookup(name: str) -> Lab | None:
    """Return the running lab of a name, or ``None``.

    :raise HostError: Its record is damaged.
    """
    for lab in find_all():
        if lab.name == name:
            return lab
    directory = labs_dir() / check_name(name)
    if (directory / RECORD).exists():
        raise HostError(
            f"the record of lab {name} is damaged",
            f"end its QEMU if one runs, and delete {directory}",
        )
    return None


def find(name: str) -> Lab:
    """Return the running lab of a name.

    :raise UnknownError: There is none.
    :raise HostError: Its record is damaged.
    """
    if (lab := lookup(name)) is None:
        raise UnknownError(f"no lab '{name}' is up", f"start it with 'mdo lab up --name {name}'")
    return lab


def remove_directory(directory: Path, inode: int | None = None) -> None:
    """Remove a lab's directory.

    :param inode: Inode of the directory to remove. Another command may have brought up a lab of
        that name since: so the directory is moved aside first, and back if the inode differs.
    """
    aside = directory.with_name(f".{directory.name.lstrip('.')}.{os.getpid()}")
    try:
        directory.rename(aside)
    except OSError:  # it is removed already
        return
    if inode is not None and aside.stat().st_ino != inode:
        aside.rename(directory)
        return
    shutil.rmtree(aside, ignore_errors=True)


def claim(directory: Path) -> None:
    """Make a lab's directory with the file :data:`STARTER` in it, at once.

    :raise BusyError: It exists: another command brings that lab up.
    """
    draft = directory.with_name(f".{directory.name}.{os.getpid()}")
    private_dir(draft)
    (draft / STARTER).write_text(f"{os.getpid()} {start_time(os.getpid())}\n")
    try:
        draft.rename(directory)
    except OSError as error:
        shutil.rmtree(draft)
        raise BusyError(
            f"lab {directory.name} is being brought up by another command", "wait for it"
        ) from error


def down(lab: Lab) -> None:
    """End a lab and remove its directory. What was written to the checkout is on the disk."""
    with contextlib.suppress(ProcessLookupError):
        pidfd = os.pidfd_open(lab.pid)
        try:
            for number in (signal.SIGTERM, signal.SIGKILL):
                if lab.alive:
                    signal.pidfd_send_signal(pidfd, number)
                    select.select([pidfd], [], [], STOP_SECONDS)
        finally:
            os.close(pidfd)
    with contextlib.suppress(ChildProcessError):  # an earlier command started it
        os.waitpid(lab.pid, os.WNOHANG)
    remove_directory(lab.directory)


def write_record(directory: Path, lab: Lab) -> None:
    """Replace the record of a lab."""
    write_atomic(directory / RECORD, json.dumps(asdict(lab)).encode(), sync=False)
