# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest as a process: what is recorded of it, and how it is found again.

A guest outlives the command that started it. All that later commands know is in a directory of its
own, ``guests/NAME`` below the state directory (mode 0700)::

    record.json    what was started: pid, start time, UUID, command line (see ProcessRecord)
    qmp.sock       monitor for changes        query.sock     monitor for questions
    watch.sock     monitor for events         qemu.log       what QEMU itself printed
    console.sock   first serial port          console.log    what the guest printed there
    started/       start groups that came online for this guest, one file each (see engine)
    uefi-vars.fd   UEFI variables of a guest that has no file of its own for them

Nothing there is believed before it is checked: a process is the guest only if it has the recorded
pid *and* the recorded start time, in the boot that was recorded, *and* the guest's ``-uuid`` on
its command line. Signals go through a pidfd that was opened before these checks, so they can never
reach a process that got the number later.

The directory has a lock (flock), which is held while the guest is started (:mod:`.start`) and while
the directory is removed (:mod:`.guest_dir`). For what a script in QEMU's place does, a guest whose
process has ended is looked for by its ``-uuid`` and the path of its console log (:func:`_strays`)
before its directory is believed to be free.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import socket
from collections.abc import Iterator
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated
from uuid import UUID

import msgspec
from msgspec import Struct

from mdev_orchestrator import errors
from mdev_orchestrator.errors import Outcome
from mdev_orchestrator.machine import Machine
from mdev_orchestrator.model import IommuChoice
from mdev_orchestrator.qemu.command import (
    NAME_PATTERN,
    check_name,
    escape,
)
from mdev_orchestrator.state import decode
from mdev_orchestrator.system.directory_lock import is_locked
from mdev_orchestrator.system.files import write_atomic
from mdev_orchestrator.system.processes import boot_id, has_ended, reap, start_time
from mdev_orchestrator.system.waiting import readable, run_to_completion

MAX_PID = 1 << 22
MAX_TIME = 253402300799.0
"""The last second that has a date."""
KILL_SECONDS = 15.0
"""For the kernel to end a process after SIGKILL."""
RECORD = "record.json"
QMP = "qmp.sock"
QUERY = "query.sock"
WATCH = "watch.sock"
CONSOLE = "console.sock"
CONSOLE_LOG = "console.log"
QEMU_LOG = "qemu.log"
STARTED = "started"
UEFI_VARIABLES = "uefi-vars.fd"


class State(StrEnum):
    """What is known of a guest without asking its QEMU."""

    STARTING = "starting"
    RUNNING = "running"
    GONE = "gone"
    """Its process has ended; its directory is still there."""
    DAMAGED = "damaged"
    """Its record cannot be used."""


class ProcessRecord(msgspec.Struct, frozen=True):
    """``record.json``: what was started.

    :ivar pid: Process id of QEMU.
    :ivar start_time: Clock ticks after boot at which the process began (proc(5), field 22 of stat).
    :ivar boot_id: Which boot of the host that was.
    :ivar created: Seconds since the epoch.
    :ivar mdevs: Those of the command line; what was plugged later only QEMU knows.
    :ivar iommu: How the guest's devices are opened: ``auto`` if it had none when it was started.
    :ivar ready: Its monitor has answered once.
    """

    name: str
    uuid: UUID
    pid: Annotated[int, msgspec.Meta(gt=1, le=MAX_PID)]
    start_time: int
    boot_id: str
    created: Annotated[float, msgspec.Meta(ge=0, le=MAX_TIME)]
    argv: list[str]
    mdevs: list[UUID]
    memory: int
    cpus: int
    iommu: IommuChoice = "auto"
    ready: bool = False
    version: int = 1


class RunningGuest(Struct, frozen=True):
    """One guest as found on disk and in the process table.

    :ivar record: ``None`` if it cannot be read, then ``damage`` says why.
    """

    name: str
    directory: Path
    state: State
    record: ProcessRecord | None = None
    damage: str = ""

    @property
    def label(self) -> str:
        """How messages name it."""
        return f"guest {self.name}"

    @property
    def qmp_socket(self) -> Path:
        """Monitor for commands that change something; one client at a time."""
        return self.directory / QMP

    @property
    def query_socket(self) -> Path:
        """Monitor for questions; one client at a time, each for a moment."""
        return self.directory / QUERY

    @property
    def watch_socket(self) -> Path:
        """Monitor for events; one client at a time, for as long as it likes."""
        return self.directory / WATCH

    @property
    def console_socket(self) -> Path:
        """The first serial port."""
        return self.directory / CONSOLE

    @property
    def console_log(self) -> Path:
        """All that the guest printed on its first serial port."""
        return self.directory / CONSOLE_LOG

    @property
    def qemu_log(self) -> Path:
        """What QEMU itself printed."""
        return self.directory / QEMU_LOG

    @property
    def started(self) -> Path:
        """Directory of the start groups that came online for this guest; need not be there."""
        return self.directory / STARTED

    @property
    def alive(self) -> bool:
        """Whether there is a process that was checked to be this guest."""
        return self.state in {State.STARTING, State.RUNNING} and self.record is not None


def list_guests(machine: Machine) -> list[RunningGuest]:
    """Return all guests of the machine's state directory, by name; damaged ones too."""
    root = machine.guests_dir
    reap(children)  # a process that lives long would have a zombie of each
    try:
        names = sorted(
            entry.name
            for entry in os.scandir(root)
            if entry.is_dir(follow_symlinks=False) and NAME_PATTERN.fullmatch(entry.name)
        )
    except FileNotFoundError:
        return []
    except OSError as error:
        raise errors.HostError(
            f"cannot read {root}: {error.strerror}", errno=error.errno
        ) from error
    found = (look(root / name) for name in names)
    return [guest for guest in found if guest]


def find(machine: Machine, name: str) -> RunningGuest:
    """Return the guest called ``name``, in whatever state.

    :raise UnknownError: There is none.
    """
    check_name(name)
    if guest := look(machine.guests_dir / name):
        return guest
    known = ", ".join(guest.name for guest in list_guests(machine))
    raise errors.UnknownError(
        f"no guest is called {name}",
        f"there are: {known}" if known else "",
        subject=f"guest {name}",
    )


def find_running(machine: Machine, name: str) -> RunningGuest:
    """Return the guest called ``name`` if its process is alive.

    :raise UnknownError: There is no such guest.
    :raise RequestError: It does not run.
    """
    guest = find(machine, name)
    if not guest.alive:
        what = guest.damage if guest.state is State.DAMAGED else "its process has ended"
        force = "--force " if guest.state is State.DAMAGED else ""
        raise errors.RequestError(
            f"{guest.label} does not run: {what}",
            f"mdo guest stop {force}{name} removes what it left",
            subject=guest.label,
        )
    return guest


def look(directory: Path) -> RunningGuest | None:
    """Read one guest's directory; ``None`` if it is not there (any more)."""
    name = directory.name
    try:
        record = read_record(directory)
    except FileNotFoundError:
        if not directory.is_dir():
            return None
        state = State.STARTING if is_locked(directory) else State.DAMAGED
        return RunningGuest(name, directory, state, damage="no record: its start was cut short")
    except OSError as error:
        damage = f"{RECORD} cannot be read: {error.strerror}"
        return RunningGuest(name, directory, State.DAMAGED, damage=damage)
    except ValueError as error:
        return RunningGuest(name, directory, State.DAMAGED, damage=f"{RECORD} is damaged: {error}")
    if not is_guest(record):
        return RunningGuest(name, directory, State.GONE, record)
    return RunningGuest(name, directory, State.RUNNING if record.ready else State.STARTING, record)


def read_record(directory: Path) -> ProcessRecord:
    """Read and check a record.

    :raise ValueError: It is none of this guest's.
    :raise OSError: It cannot be read.
    """
    record = decode((directory / RECORD).read_bytes(), ProcessRecord)
    if record.name != directory.name:
        raise ValueError(f"it is of guest {record.name!r}")
    return record


async def write_record(directory: Path, record: ProcessRecord) -> None:
    """Replace the record, on the disk; to its end even when the caller is cancelled."""
    data = msgspec.json.format(msgspec.json.encode(record)) + b"\n"
    await run_to_completion(asyncio.to_thread(write_atomic, directory / RECORD, data))


def is_guest(record: ProcessRecord) -> bool:
    """Whether the recorded process is alive and still the one that was recorded."""
    if record.boot_id != boot_id() or start_time(record.pid) != record.start_time:
        return False
    try:
        arguments = Path(f"/proc/{record.pid}/cmdline").read_bytes().split(b"\0")
    except (FileNotFoundError, ProcessLookupError):
        return False
    if arguments == [b""]:  # its memory has gone, which is the first thing to go when it ends
        return not has_ended(record.pid)
    pairs = itertools.pairwise(arguments)
    return (b"-uuid", str(record.uuid).encode()) in pairs


@contextlib.contextmanager
def pidfd(record: ProcessRecord) -> Iterator[int | None]:
    """A pidfd of the guest's process, or ``None`` if it has ended.

    Opened first and checked afterwards: what passes the check is what the descriptor holds.
    """
    try:
        descriptor = os.pidfd_open(record.pid)
    except ProcessLookupError:
        yield None
        return
    try:
        yield descriptor if is_guest(record) else None
    finally:
        collect_status(descriptor)
        os.close(descriptor)


def collect_status(descriptor: int) -> int | None:
    """Collect the exit status if the process is a child of ours and has ended."""
    try:
        result = os.waitid(os.P_PIDFD, descriptor, os.WEXITED | os.WNOHANG)
    except ChildProcessError:
        return None
    if result is None:
        return None
    children.discard(result.si_pid)
    return result.si_status if result.si_code == os.CLD_EXITED else -result.si_status


children: set[int] = set()
"""QEMUs that this process has started, whose exit status has not been collected."""


async def await_end(descriptor: int, seconds: float | None) -> bool:
    """Wait until the process behind a pidfd ends; whether it did in time."""
    try:
        async with asyncio.timeout(seconds):
            await readable(descriptor)
    except TimeoutError:
        return False
    return True


async def wait_ended(guest: RunningGuest, seconds: float | None = None) -> bool:
    """Wait until the guest's process has ended; whether it has, within ``seconds``."""
    if guest.record is None:
        return True
    with pidfd(guest.record) as descriptor:
        return descriptor is None or await await_end(descriptor, seconds)


def is_stopped(guest: RunningGuest) -> bool:
    """Whether the guest's process is stopped, by SIGSTOP or a debugger: it answers nothing then."""
    return guest.record is not None and is_process_stopped(guest.record.pid)


def is_process_stopped(pid: int, proc: str = "/proc") -> bool:
    """Whether a process is stopped, by SIGSTOP or a debugger."""
    try:
        stat = Path(proc, str(pid), "stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(b")")[2].split()[0] in {b"T", b"t"}


def send_signal(process: int, number: signal.Signals) -> None:
    """Send a signal to the process behind a pidfd; one that has ended gets none."""
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(process, number)


async def kill(descriptor: int) -> bool:
    """SIGKILL, and wait for the end, past a cancellation; whether the process has ended."""
    send_signal(descriptor, signal.SIGKILL)
    ended = await run_to_completion(await_end(descriptor, KILL_SECONDS))
    collect_status(descriptor)
    return ended


def _strays(machine: Machine, directory: Path, uuid: UUID | None) -> list[int]:
    """Processes that run with a guest's console log, and its ``-uuid`` if that is known.

    It reads the command line of every process, so it is for a thread.
    """
    try:
        names = [entry.name for entry in os.scandir(machine.path("proc"))]
    except OSError:
        return []
    pids = filter(str.isdecimal, names)
    return [int(pid) for pid in pids if _is_stray(machine, pid, directory, uuid)]


def _is_stray(machine: Machine, pid: str, directory: Path, uuid: UUID | None) -> bool:
    try:
        line = Path(machine.path("proc", pid, "cmdline")).read_bytes()
    except OSError:
        return False
    arguments = line.split(b"\0")
    log = os.fsencode(f"logfile={escape(directory / CONSOLE_LOG)}")
    if not any(argument.endswith(log) for argument in arguments):
        return False
    pairs = itertools.pairwise(arguments)
    return uuid is None or (b"-uuid", str(uuid).encode()) in pairs


async def find_strays(machine: Machine, guest: RunningGuest) -> list[int]:
    """Return the QEMUs that run as this guest although its recorded process has ended.

    :return: Their process ids.
    """
    uuid = guest.record.uuid if guest.record else None
    return await asyncio.to_thread(_strays, machine, guest.directory, uuid)


async def kill_strays(
    machine: Machine, directory: Path, uuid: UUID | None, *, patience: float = 0
) -> tuple[list[int], list[int]]:
    """End the QEMUs that :func:`_strays` finds.

    :param patience: Seconds to wait for each to end by itself.
    :return: Those that there were, and those that do not end.
    """
    found = await asyncio.to_thread(_strays, machine, directory, uuid)
    left = []
    for pid in found:
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            if not _is_stray(machine, str(pid), directory, uuid):
                continue
            if not await await_end(descriptor, patience) and not await kill(descriptor):
                left.append(pid)
        finally:
            os.close(descriptor)
    return found, left


def runs_on(guest: RunningGuest, strays: list[int]) -> errors.BusyError:
    """The error for a guest whose recorded process has ended, and that runs as others."""
    pids = ", ".join(map(str, strays))
    was = f"process {guest.record.pid}" if guest.record else "its process"
    return errors.BusyError(
        f"{guest.label}: {was} has ended, but a QEMU of it runs on as process {pids}",
        f"mdo guest stop --force {guest.name} ends it",
        outcome=Outcome.NO_EFFECT,
        subject=guest.label,
    )


def has_started(guest: RunningGuest) -> bool:
    """Whether there are start groups that came online for this guest and were not stopped."""
    # one that is only being written down has not begun to come online
    return any(guest.started.glob("*.json"))


def created(record: ProcessRecord) -> datetime:
    """When the guest was started."""
    return datetime.fromtimestamp(record.created, UTC)


def is_listening(path: Path) -> bool:
    """Whether some process holds the listening end: the kernel refuses a connection otherwise."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as sock:
        try:
            sock.connect(str(path))
        except BlockingIOError:
            return True
        except OSError:
            return False
    return True
