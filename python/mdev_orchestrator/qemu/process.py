# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest as a process: start it, find it again, stop it.

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

The directory is claimed by ``mkdir`` and a lock (flock) on it, which is held while the guest is
started and while the directory is removed. QEMU is forked behind a gate: a shell that waits for one
line before it becomes QEMU. The record is on disk before that line is sent, so at no moment does a
starter that is killed leave a QEMU that cannot be found; and if the starter dies before, the shell
reads end of file and ends.

A program that forks QEMU and ends itself breaks this contract: the recorded process has ended, and
a QEMU runs on. Arguments that have QEMU do so are refused (:func:`command.check`). For what a
script in QEMU's place does, a guest whose process has ended is looked for by its ``-uuid`` and the
path of its console log (:func:`_strays`) before its directory is believed to be free.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import itertools
import os
import shutil
import signal
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from datetime import UTC, datetime
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any
from uuid import UUID

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from mdev_orchestrator import errors
from mdev_orchestrator.errors import Outcome
from mdev_orchestrator.host.service import scope
from mdev_orchestrator.machine import Machine
from mdev_orchestrator.model import IommuChoice
from mdev_orchestrator.qemu import features
from mdev_orchestrator.qemu.command import (
    NAME_PATTERN,
    GuestSpec,
    Sockets,
    check,
    check_name,
    escape,
    guest_argv,
)
from mdev_orchestrator.qemu.firmware import find_uefi, prepare_flash
from mdev_orchestrator.qemu.remedies import remedy
from mdev_orchestrator.state import decode, private_dir
from mdev_orchestrator.system.files import write_atomic
from mdev_orchestrator.system.processes import boot_id, has_ended, reap, start_time
from mdev_orchestrator.system.waiting import readable, run_to_completion

Around = Callable[[Path], contextlib.AbstractAsyncContextManager[object]]
"""Takes a guest's directory; what must be true before QEMU begins, and is undone if it fails."""

Release = Callable[["RunningGuest"], Awaitable[None]]
"""Gives back what a guest had whose process has ended."""

START_SECONDS = 60.0
STOP_SECONDS = 60.0
PRESS_AGAIN_SECONDS = 10.0
"""Between two presses of a guest's power button."""
OBEY_SECONDS = 30.0
"""For a guest to end after its button was pressed: nothing tells that it is about to."""
REFUSED_SECONDS = 1.0
"""For a guest to end whose monitor could not be reached: it may be ending already."""
QUIT_SECONDS = 2.0
"""For QEMU to end by ``quit``, connecting to its monitor included."""
TERM_SECONDS = 3.0
"""For QEMU to end by SIGTERM."""
KILL_SECONDS = 15.0
"""For the kernel to end a process after SIGKILL."""
LOCK_SECONDS = 10.0
MAX_SUN_PATH = 107
MAX_PID = 1 << 22
MAX_TIME = 253402300799.0
"""The last second that has a date."""
MAX_WORDS = 16384
"""Bytes of QEMU's own output that are looked at."""
LAST_LINES = 4
"""Lines of it that an error quotes."""

RECORD = "record.json"
QMP = "qmp.sock"
QUERY = "query.sock"
WATCH = "watch.sock"
CONSOLE = "console.sock"
CONSOLE_LOG = "console.log"
QEMU_LOG = "qemu.log"
STARTED = "started"
UEFI_VARIABLES = "uefi-vars.fd"
ASKED = "asked"
"""A file in a guest's directory that is touched before its power button is pressed. It goes when it
is known that the guest runs on: one that is left says that the guest may power down yet."""

# $0 is shown by ps while the gate is closed. The shell becomes QEMU, with the same pid.
GATE = 'cd / && read -r _ && exec "$@" </dev/null'


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


class Ended(Struct, frozen=True):
    """How :func:`stop` ended a guest.

    :ivar how: ``powerdown``, ``quit``, ``terminated``, ``killed``, or ``gone`` if it was already.
    """

    name: str
    how: str


# ---------------------------------------------------------------- finding


def list_guests(machine: Machine) -> list[RunningGuest]:
    """Return all guests of the machine's state directory, by name; damaged ones too."""
    root = machine.guests_dir
    reap(_children)  # a process that lives long would have a zombie of each
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
    found = (_look(root / name) for name in names)
    return [guest for guest in found if guest]


def find(machine: Machine, name: str) -> RunningGuest:
    """Return the guest called ``name``, in whatever state.

    :raise UnknownError: There is none.
    """
    check_name(name)
    if guest := _look(machine.guests_dir / name):
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


def _look(directory: Path) -> RunningGuest | None:
    """Read one guest's directory; ``None`` if it is not there (any more)."""
    name = directory.name
    try:
        record = _read_record(directory)
    except FileNotFoundError:
        if not directory.is_dir():
            return None
        state = State.STARTING if _is_locked(directory) else State.DAMAGED
        return RunningGuest(name, directory, state, damage="no record: its start was cut short")
    except OSError as error:
        damage = f"{RECORD} cannot be read: {error.strerror}"
        return RunningGuest(name, directory, State.DAMAGED, damage=damage)
    except ValueError as error:
        return RunningGuest(name, directory, State.DAMAGED, damage=f"{RECORD} is damaged: {error}")
    if not _is_guest(record):
        return RunningGuest(name, directory, State.GONE, record)
    return RunningGuest(name, directory, State.RUNNING if record.ready else State.STARTING, record)


def _read_record(directory: Path) -> ProcessRecord:
    """Read and check a record.

    :raise ValueError: It is none of this guest's.
    :raise OSError: It cannot be read.
    """
    record = decode((directory / RECORD).read_bytes(), ProcessRecord)
    if record.name != directory.name:
        raise ValueError(f"it is of guest {record.name!r}")
    return record


def _is_locked(directory: Path) -> bool:
    try:
        with _descriptor(directory) as descriptor:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


@contextlib.contextmanager
def _descriptor(directory: Path) -> Iterator[int]:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        yield descriptor
    finally:
        _release(descriptor)


def _release(descriptor: int) -> None:
    """Give a lock back at once: a writer that is forked at this moment shares the descriptor."""
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


def _is_guest(record: ProcessRecord) -> bool:
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


# ---------------------------------------------------------------- processes


@contextlib.contextmanager
def _pidfd(record: ProcessRecord) -> Iterator[int | None]:
    """A pidfd of the guest's process, or ``None`` if it has ended.

    Opened first and checked afterwards: what passes the check is what the descriptor holds.
    """
    try:
        descriptor = os.pidfd_open(record.pid)
    except ProcessLookupError:
        yield None
        return
    try:
        yield descriptor if _is_guest(record) else None
    finally:
        _reap(descriptor)
        os.close(descriptor)


def _reap(descriptor: int) -> int | None:
    """Collect the exit status if the process is a child of ours and has ended."""
    try:
        result = os.waitid(os.P_PIDFD, descriptor, os.WEXITED | os.WNOHANG)
    except ChildProcessError:
        return None
    if result is None:
        return None
    _children.discard(result.si_pid)
    return result.si_status if result.si_code == os.CLD_EXITED else -result.si_status


_children: set[int] = set()
"""QEMUs that this process has started, whose exit status has not been collected."""


async def _ended(descriptor: int, seconds: float | None) -> bool:
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
    with _pidfd(guest.record) as descriptor:
        return descriptor is None or await _ended(descriptor, seconds)


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


async def _kill(descriptor: int) -> bool:
    """SIGKILL, and wait for the end, past a cancellation; whether the process has ended."""
    _signal(descriptor, signal.SIGKILL)
    ended = await run_to_completion(_ended(descriptor, KILL_SECONDS))
    _reap(descriptor)
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


async def _kill_strays(
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
            if not await _ended(descriptor, patience) and not await _kill(descriptor):
                left.append(pid)
        finally:
            os.close(descriptor)
    return found, left


# ---------------------------------------------------------------- starting


@contextlib.asynccontextmanager
async def _claim(machine: Machine, name: str) -> AsyncIterator[Path]:
    """Create the guest's directory and hold its lock; remove it if the block fails.

    It stays if something of the guest is still there: its process, because the kernel holds it
    even after SIGKILL, or a group that has to be stopped.
    """
    with errors.before_acting(), contextlib.ExitStack() as claiming:
        directory = await _claimed(machine, name, claiming)
        stack = claiming.pop_all()
    with stack:
        try:
            yield directory
        except BaseException:
            left = _look(directory)
            if left and not left.alive and not has_started(left):
                shutil.rmtree(directory, ignore_errors=True)
            raise


async def _claimed(machine: Machine, name: str, stack: contextlib.ExitStack) -> Path:
    """Create the guest's directory and lock it, until the stack is closed."""
    directory = private_dir(machine.guests_dir) / name
    while True:
        try:
            directory.mkdir(mode=0o700)
        except FileExistsError:
            await _clear_way(machine, name, directory)
            continue
        except OSError as error:
            raise errors.HostError(
                f"cannot create {directory}: {error.strerror}", errno=error.errno
            ) from error
        with contextlib.ExitStack() as attempt:
            try:
                descriptor = attempt.enter_context(_descriptor(directory))
            except FileNotFoundError:
                continue  # another process took it for a remnant before it was locked
            await _lock(descriptor, fcntl.LOCK_EX, f"guest {name}", LOCK_SECONDS)
            if _is_same(descriptor, directory):
                stack.push(attempt.pop_all())
                return directory


def _is_same(descriptor: int, directory: Path) -> bool:
    try:
        status = directory.lstat()
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(descriptor), status)


async def _clear_way(machine: Machine, name: str, directory: Path) -> None:
    """Remove what an ended guest of this name left, or say why that cannot be done."""
    guest = _look(directory)
    if guest is None:
        return
    if guest.state is State.GONE:
        if strays := await find_strays(machine, guest):
            raise _runs_on(guest, strays)
        remove(guest)
    elif guest.alive and guest.record:
        raise errors.BusyError(
            f"{guest.label} runs already, as process {guest.record.pid}",
            f"mdo guest stop {name}, or take another name",
            subject=guest.label,
        )
    elif guest.state is State.STARTING:
        raise errors.BusyError(
            f"{guest.label} is being started by another process",
            "take another name",
            subject=guest.label,
        )
    else:
        raise errors.RequestError(
            f"{guest.label}: {guest.damage}",
            f"mdo guest stop --force {name}",
            subject=guest.label,
        )


def _runs_on(guest: RunningGuest, strays: list[int]) -> errors.BusyError:
    pids = ", ".join(map(str, strays))
    was = f"process {guest.record.pid}" if guest.record else "its process"
    return errors.BusyError(
        f"{guest.label}: {was} has ended, but a QEMU of it runs on as process {pids}",
        f"mdo guest stop --force {guest.name} ends it",
        outcome=Outcome.NO_EFFECT,
        subject=guest.label,
    )


def remove(guest: RunningGuest) -> None:
    """Remove the directory of a guest whose process has ended. Nothing to do is no error.

    :raise BusyError: Another process is starting or removing it.
    :raise RequestError: A start group of it has not been stopped.
    """
    try:
        with _descriptor(guest.directory) as descriptor:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not _is_same(descriptor, guest.directory):
                return
            if has_started(guest):
                raise errors.RequestError(
                    f"{guest.label} has ended, and a start group of it may still be online",
                    f"mdo guest stop {guest.name} stops it",
                )
            _remove_tree(guest.directory)
    except BlockingIOError:
        raise errors.BusyError(
            f"{guest.label} is being started or removed by another process",
            "try again",
            subject=guest.label,
        ) from None
    except FileNotFoundError:
        return
    except OSError as error:
        raise errors.HostError(
            f"cannot remove {guest.directory}: {error.strerror}", errno=error.errno
        ) from error


def _remove_tree(directory: Path) -> None:
    """Remove a directory; a QEMU that is just ending removes its sockets there meanwhile."""
    while directory.exists():
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(directory)


def has_started(guest: RunningGuest) -> bool:
    """Whether there are start groups that came online for this guest and were not stopped."""
    # one that is only being written down has not begun to come online
    return any(guest.started.glob("*.json"))


@contextlib.asynccontextmanager
async def attaching(guest: RunningGuest) -> AsyncIterator[None]:
    """Keep other processes from tidying up after a guest while the block gives it something.

    :raise BusyError: Another process is tidying up, and does not end.
    :raise RequestError: The guest has gone meanwhile.
    """
    with contextlib.ExitStack() as stack:
        try:
            descriptor = stack.enter_context(_descriptor(guest.directory))
        except FileNotFoundError:
            raise errors.RequestError(f"{guest.label} has gone") from None
        await _lock(descriptor, fcntl.LOCK_SH, guest.label, LOCK_SECONDS)
        if not _is_same(descriptor, guest.directory):
            raise errors.RequestError(f"{guest.label} has gone")
        yield


async def _lock(descriptor: int, kind: int, label: str, seconds: float) -> None:
    """Wait for a lock that another process holds for a moment; the kernel has no event for that."""
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    while True:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if loop.time() >= end:
                raise errors.BusyError(
                    f"{label} is being started, changed or removed by another process",
                    "try again",
                    subject=label,
                ) from None
            await asyncio.sleep(0.05)
        else:
            return


@contextlib.asynccontextmanager
async def tidying(guest: RunningGuest, seconds: float = LOCK_SECONDS) -> AsyncIterator[bool]:
    """Hold the lock of a guest's directory: it is not started, removed or given anything meanwhile.

    :param seconds: To wait for the lock.
    :return: Whether its process is alive.
    :raise BusyError: Another process has the lock, and keeps it.
    :raise FileNotFoundError: The directory has gone.
    """
    with _descriptor(guest.directory) as descriptor:
        await _lock(descriptor, fcntl.LOCK_EX, guest.label, seconds)
        if not _is_same(descriptor, guest.directory):
            raise FileNotFoundError(guest.directory)
        try:
            record = _read_record(guest.directory)
        except FileNotFoundError:
            yield False  # its starter has ended, and its gate with it
        except (OSError, ValueError):
            yield _is_listening(guest.qmp_socket)
        else:
            yield _is_guest(record)


def _listen(path: Path) -> socket.socket:
    """Bind and listen, so that the socket is there before QEMU is, and only for its owner."""
    if len(os.fsencode(path)) > MAX_SUN_PATH:
        raise errors.HostError(
            f"the socket path {path} has more than {MAX_SUN_PATH} bytes",
            "set MDO_STATE_DIR to a shorter directory",
        )
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        os.fchmod(sock.fileno(), 0o600)  # it has this mode from the moment that it has a name
        sock.bind(str(path))
        sock.listen(8)
    except OSError as error:
        sock.close()
        raise errors.HostError(f"cannot listen on {path}: {error.strerror}") from error
    return sock


async def _write_record(directory: Path, record: ProcessRecord) -> None:
    """Replace the record, on the disk; to its end even when the caller is cancelled."""
    data = msgspec.json.format(msgspec.json.encode(record)) + b"\n"
    await run_to_completion(asyncio.to_thread(write_atomic, directory / RECORD, data))


def _spawn(argv: list[str], inherit: list[int], log: Path) -> tuple[int, int]:
    """Fork QEMU behind its gate; return its pid and the descriptor that opens the gate.

    posix_spawn, not subprocess: QEMU shall outlive this process, and a Popen object insists on
    being waited for.
    """
    gate, opener = os.pipe()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        actions: list[Any] = [
            (os.POSIX_SPAWN_DUP2, gate, 0),
            (os.POSIX_SPAWN_DUP2, output, 1),
            (os.POSIX_SPAWN_DUP2, output, 2),
            # Onto itself: glibc takes the close-on-exec flag off, in the child only.
            *((os.POSIX_SPAWN_DUP2, descriptor, descriptor) for descriptor in inherit),
        ]
        pid = os.posix_spawn(
            "/bin/sh",
            ["sh", "-c", GATE, "mdo-guest", *argv],
            os.environ,
            file_actions=actions,
            setsid=True,
            setsigmask=(),
            setsigdef=(signal.SIGPIPE, signal.SIGINT, signal.SIGTERM),
        )
    except BaseException:
        os.close(opener)
        raise
    finally:
        os.close(gate)
        os.close(output)
    return pid, opener


def qemu_words(log: Path) -> str:
    """Return what QEMU printed, on one line, the last part if it is long."""
    return "; ".join(_lines(log))


def _lines(log: Path) -> list[str]:
    """What QEMU printed, the last part if it is long."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - MAX_WORDS))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return []
    lines = (line.strip() for line in text.splitlines())
    return ["".join(c for c in line if c.isprintable()) for line in lines if line]


def _last_words(log: Path, program: str) -> str:
    """What QEMU said last, without its warnings and its own name in front."""
    lines = [line.removeprefix(f"{Path(program).name}: ") for line in _lines(log)]
    reasons = [line for line in lines if not line.startswith("warning:")]
    return "; ".join((reasons or lines)[-LAST_LINES:])


def _program(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise errors.HostError(
            f"there is no program {name}", "apt install qemu-system-x86, or --qemu"
        )
    return str(Path(path).absolute())


def _absolute(spec: GuestSpec) -> GuestSpec:
    """Make paths absolute (QEMU runs in /) and see that what shall be read can be."""
    changes: dict[str, Path | str] = {"qemu": _program(spec.qemu)}
    for field in ("kernel", "initrd", "disk", "firmware"):
        path: Path | None = getattr(spec, field)
        if path is None:
            continue
        if not os.access(path, os.R_OK):
            why = "cannot be read" if path.exists() else "does not exist"
            raise errors.RequestError(f"guest {spec.name}: its {field} {path} {why}")
        changes[field] = path.absolute()
    if spec.uefi_variables:
        changes["uefi_variables"] = spec.uefi_variables.absolute()
    return replace(spec, **changes)


async def start(
    machine: Machine,
    spec: GuestSpec,
    *,
    deadline: float = START_SECONDS,
    around: Around | None = None,
) -> RunningGuest:
    """Start a guest and return once its monitor answers.

    It does not start the groups of its mdevs: ``around`` is for that.

    Whatever goes wrong, cancellation included, ends the process and removes its files. The outcome
    of an error is unknown only if a process could not be ended.

    :param deadline: Seconds for the whole, what ``around`` does before included.
    :param around: Entered when the guest's directory is claimed and before QEMU begins, left when
        QEMU answers or has been ended.
    :raise RequestError: The specification is faulty; a :exc:`BusyError` if the guest runs already.
    :raise QemuError: QEMU ended or broke the protocol; the message carries its own words, the
        details its command line.
    :raise DeadlineError: The monitor did not answer in time.
    :raise HostError: No QEMU, or no place for its files.
    """
    began = asyncio.get_running_loop().time()
    with errors.before_acting():
        check(spec)
        spec = _absolute(spec)
        uefi = await asyncio.to_thread(find_uefi, machine, spec) if spec.uefi else None
        # a program that does not answer this question may answer at its monitor
        objects = await features.object_types(spec.qemu, deadline=deadline / 4)
    async with (
        _claim(machine, spec.name) as directory,
        around(directory) if around else contextlib.nullcontext(),
    ):
        flash = None
        if uefi:
            variables = spec.uefi_variables or directory / UEFI_VARIABLES
            flash = await asyncio.to_thread(prepare_flash, uefi, variables, f"guest {spec.name}")
        argv = partial(guest_argv, spec, flash=flash, objects=objects)
        return await _start(machine, spec, argv, directory, began, deadline)


async def _start(
    machine: Machine,
    spec: GuestSpec,
    argv_for: Callable[[Sockets], list[str]],
    directory: Path,
    began: float,
    deadline: float,
) -> RunningGuest:
    label = f"guest {spec.name}"
    with contextlib.ExitStack() as stack:
        try:
            qmp, query, watch, console = listeners = [
                stack.enter_context(_listen(directory / name))
                for name in (QMP, QUERY, WATCH, CONSOLE)
            ]
            sockets = Sockets(
                qmp=qmp.fileno(),
                query=query.fileno(),
                watch=watch.fileno(),
                console=console.fileno(),
                console_log=directory / CONSOLE_LOG,
            )
            argv = argv_for(sockets)
            numbers = [listener.fileno() for listener in listeners]
            pid, opener = _spawn(scope(machine, spec.name) + argv, numbers, directory / QEMU_LOG)
        except OSError as error:
            raise _not_started(label, directory, error) from error
        stack.callback(os.close, opener)
        process = os.pidfd_open(pid)
        stack.callback(os.close, process)
        try:
            record = ProcessRecord(
                name=spec.name,
                uuid=spec.uuid,
                pid=pid,
                start_time=start_time(pid) or 0,
                boot_id=boot_id(),
                created=round(time.time(), 3),
                argv=argv,
                mdevs=[mdev.uuid for mdev in spec.mdevs],
                memory=spec.memory,
                cpus=spec.cpus,
                iommu=spec.iommu,
            )
            await _write_record(directory, record)
            os.write(opener, b"\n")
            for listener in listeners:
                listener.close()  # so that a connection fails as soon as QEMU is gone
            await _until_ready(label, directory, process, argv, began, deadline)
            record = msgspec.structs.replace(record, ready=True)
            await _write_record(directory, record)
        except BaseException as error:
            failure = _not_started(label, directory, error) if isinstance(error, OSError) else error
            gone, forked = await run_to_completion(_end_all(machine, process, directory, spec.uuid))
            if isinstance(failure, errors.MdoError):
                failure.subject = label
                failure.outcome = Outcome.NO_EFFECT if gone else Outcome.UNKNOWN
                if forked:
                    failure.hint = (
                        "a program in QEMU's place has to exec QEMU, not start QEMU beside itself"
                    )
            if not gone:
                failure.add_note(f"a QEMU of {label} does not end even by SIGKILL; see dmesg")
            if failure is not error:
                raise failure from error
            raise
        _children.add(pid)  # from now on nothing waits for its status
    return RunningGuest(spec.name, directory, State.RUNNING, record)


async def _end_all(
    machine: Machine, process: int, directory: Path, uuid: UUID
) -> tuple[bool, bool]:
    """End the process that was started, and what it has left behind.

    :return: Whether all have ended, and whether there was more than the one process.
    """
    ended = await _kill(process)
    found, left = await _kill_strays(machine, directory, uuid)
    return ended and not left, bool(found)


def _not_started(label: str, directory: Path, error: OSError) -> errors.HostError:
    return errors.HostError(
        f"{label} was not started: {error.strerror or error}",
        f"its files go to {directory}",
        outcome=Outcome.NO_EFFECT,
        subject=label,
        errno=error.errno,
    )


async def _until_ready(
    label: str, directory: Path, process: int, argv: list[str], began: float, deadline: float
) -> None:
    """Return once QEMU answers at its monitor; raise with its own words if it ends instead.

    :param began: When the deadline of so many seconds began, in the event loop's time.
    """
    asking = asyncio.ensure_future(_ask(directory / QMP, label, began + deadline))
    dying = asyncio.ensure_future(_ended(process, None))
    try:
        await asyncio.wait((asking, dying), return_when=asyncio.FIRST_COMPLETED)
        if asking.done() and isinstance(asking.exception(), errors.QemuError):
            # A QEMU that dies hangs up first. Its status and words are worth a moment.
            await asyncio.wait((dying,), timeout=1)
    finally:
        for task in (asking, dying):
            task.cancel()
        await asyncio.wait((asking, dying))
    failure = None if asking.cancelled() else asking.exception()
    if not dying.cancelled():
        status = _reap(process)
        raise _failed(label, "ended" if status is None else _status(status), directory, argv)
    if isinstance(failure, errors.DeadlineError):
        words = _last_words(directory / QEMU_LOG, argv[0])
        raise errors.DeadlineError(
            f"{label}: QEMU's monitor did not answer within {deadline:g} s"
            + (words and f": {words}"),
            "give it a longer --deadline, or see with --debug how it was run",
            details=_run_as(argv),
        ) from failure
    if isinstance(failure, errors.MdoError):
        raise _failed(label, failure.message, directory, argv) from failure
    if failure is not None:
        raise failure


async def _ask(path: Path, label: str, end: float) -> None:
    from mdev_orchestrator.qemu import monitor

    async with monitor.connect(path, label, deadline=None, end=end) as qmp:
        await qmp.execute("query-status", dict[str, object], deadline=None)


def _status(status: int) -> str:
    return f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"


def _run_as(argv: list[str]) -> str:
    import shlex

    return f"QEMU was run as: {shlex.join(argv)}"


def _failed(label: str, what: str, directory: Path, argv: list[str]) -> errors.QemuError:
    words = _last_words(directory / QEMU_LOG, argv[0])
    return errors.QemuError(
        f"{label}: QEMU {what}: {words or 'it said nothing'}",
        remedy(words) or "--debug shows how QEMU was run",
        details=_run_as(argv),
    )


# ---------------------------------------------------------------- stopping


async def stop(
    machine: Machine,
    guest: RunningGuest,
    *,
    deadline: float = STOP_SECONDS,
    force: bool = False,
    release: Release | None = None,
) -> Ended:
    """End a guest and remove its directory.

    Asks it to power down and waits. Only with ``force``, and at the deadline: QEMU's ``quit``, then
    SIGTERM, then SIGKILL. That takes at most :data:`QUIT_SECONDS`, :data:`TERM_SECONDS` and
    :data:`KILL_SECONDS` beyond the deadline. A QEMU that is stopped (SIGSTOP) obeys none but the
    last: with ``force`` it gets SIGKILL at once. A guest that has ended already only has its
    directory removed.

    :param deadline: Seconds for the guest to power down; 0 with ``force`` does not ask it.
    :param release: Called when the process has ended and before the directory is removed.
    :raise DeadlineError: The guest did not power down; it still runs, and nothing was removed. The
        outcome is unknown if its button was pressed: it may power down yet.
    :raise BusyError: Its process has ended, but another one runs as this guest, and ``force`` was
        not given.
    :raise RequestError: Its record is damaged and ``force`` was not given.
    """
    if guest.record is None:
        how = await _end_damaged(machine, guest, force=force)
    else:
        how = "gone"
        with _pidfd(guest.record) as process:
            if process is not None:
                how = await _end(guest, process, deadline, force=force)
        if how == "gone" and (strays := await find_strays(machine, guest)):
            if not force:
                raise _runs_on(guest, strays)
            await _end_strays(machine, guest)
            how = "killed"
    if release:
        await release(guest)
    # another process that starts or stops it removes it
    with contextlib.suppress(errors.BusyError):
        remove(guest)
    return Ended(guest.name, how)


def still_asked(label: str, what: str, seconds: float) -> errors.DeadlineError:
    """The error for a guest that was asked for something and may do it yet.

    :param what: What it was asked to do.
    :param seconds: Until it has had its time to answer.
    """
    return errors.DeadlineError(
        f"{label} was asked to {what} and may do so yet",
        f"try again in {seconds:.0f} s",
        outcome=Outcome.UNKNOWN,
        subject=label,
    )


def time_left(mark: Path, seconds: float) -> float | None:
    """Of so many seconds since a mark was touched, those that are left; ``None`` without a mark."""
    try:
        passed = time.time() - mark.stat().st_mtime
    except FileNotFoundError:
        return None
    return min(seconds, seconds - passed)  # a clock that was set back does not prolong it


async def await_pending_shutdown(guest: RunningGuest, *, deadline: float = OBEY_SECONDS) -> bool:
    """Wait whether a guest ends whose button was pressed; ``False`` at once if it was not.

    A press cannot be taken back: after a stop that was interrupted or has an unknown outcome, only
    this tells whether the guest will run on.

    :param deadline: Seconds to wait.
    :raise DeadlineError: They were over before :data:`OBEY_SECONDS` had passed since the press, and
        the guest may power down yet.
    """
    asked = guest.directory / ASKED
    left = time_left(asked, OBEY_SECONDS)
    if left is None:
        return False
    if await wait_ended(guest, max(min(left, deadline), 0)):
        return True
    if deadline < left:
        raise still_asked(guest.label, "power down", left - deadline)
    asked.unlink(missing_ok=True)
    return False


async def _end(guest: RunningGuest, process: int, deadline: float, *, force: bool) -> str:
    """Escalate until the process has ended; return what it took."""
    loop = asyncio.get_running_loop()
    end = loop.time() + deadline
    asked = guest.directory / ASKED
    trouble: errors.MdoError | None = None
    pressed = asked.exists()  # by an earlier command
    while trouble is None and end > loop.time() and not (force and is_stopped(guest)):
        with contextlib.suppress(OSError):  # on a full disk it is stopped all the same
            asked.touch()
        try:
            await _press(guest, end)
        except errors.MdoError as error:
            trouble = error
        pressed = pressed or trouble is None or trouble.outcome is not Outcome.NO_EFFECT
        # a guest that boots does not feel its button yet
        patience = PRESS_AGAIN_SECONDS if trouble is None else REFUSED_SECONDS
        if await _ended(process, max(min(end - loop.time(), patience), 0)):
            return "powerdown"
    if force:
        return await _force(guest, process)
    if not pressed:
        asked.unlink(missing_ok=True)
    raise errors.DeadlineError(
        f"{guest.label} did not power down within {deadline:g} s{_why(guest, trouble)}",
        f"it still runs; mdo guest stop --force {guest.name} ends it without asking",
        outcome=Outcome.UNKNOWN if pressed else Outcome.NO_EFFECT,
        subject=guest.label,
    )


def _why(guest: RunningGuest, trouble: errors.MdoError | None) -> str:
    """Why a guest did not power down, as the end of a message; empty if there is nothing to say."""
    if guest.record and is_stopped(guest):
        pid = guest.record.pid
        return f": its QEMU is stopped (SIGSTOP); kill -CONT {pid} lets it go on"
    return f": {str(trouble).removeprefix(f'{guest.label}: ')}" if trouble else ""


async def _press(guest: RunningGuest, end: float) -> None:
    """Press the guest's power button."""
    from mdev_orchestrator.qemu import monitor

    async with monitor.connect(guest.qmp_socket, guest.label, deadline=None, end=end) as qmp:
        await qmp.execute("system_powerdown", object)


async def _force(guest: RunningGuest, process: int) -> str:
    """End a guest's process without asking the guest; return what it took."""
    if not is_stopped(guest):
        if await _quit(guest, process):
            return "quit"
        _signal(process, signal.SIGTERM)
        if await _ended(process, TERM_SECONDS):
            return "terminated"
    if await _kill(process):
        return "killed"
    raise _does_not_end(guest, guest.record.pid if guest.record else "?")


def _does_not_end(guest: RunningGuest, pid: int | str) -> errors.MdoError:
    return errors.DeadlineError(
        f"{guest.label}: process {pid} does not end {KILL_SECONDS:g} s after SIGKILL",
        "the kernel holds it, perhaps in a driver; see dmesg",
        outcome=Outcome.UNKNOWN,
        subject=guest.label,
    )


async def _quit(guest: RunningGuest, process: int) -> bool:
    """Have QEMU end by itself; whether it has."""
    from mdev_orchestrator.qemu import monitor

    loop = asyncio.get_running_loop()
    end = loop.time() + QUIT_SECONDS
    with contextlib.suppress(errors.MdoError):  # a QEMU that does not answer is killed
        async with monitor.connect(guest.qmp_socket, guest.label, end=end) as qmp:
            await qmp.quit()
    return await _ended(process, max(end - loop.time(), 0))


def _signal(process: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(process, number)


async def _end_strays(machine: Machine, guest: RunningGuest, patience: float = 0) -> None:
    """End the QEMUs that run as a guest without being its recorded process."""
    uuid = guest.record.uuid if guest.record else None
    _, left = await _kill_strays(machine, guest.directory, uuid, patience=patience)
    if left:
        raise _does_not_end(guest, left[0])


async def _end_damaged(machine: Machine, guest: RunningGuest, *, force: bool) -> str:
    """End a guest whose record does not say which process it is; return what it took."""
    from mdev_orchestrator.qemu import monitor

    if not force:
        raise errors.RequestError(
            f"{guest.label}: {guest.damage}",
            f"mdo guest stop --force {guest.name} ends the QEMU that uses its directory",
            outcome=Outcome.NO_EFFECT,
            subject=guest.label,
        )
    how = "gone"
    if _is_listening(guest.qmp_socket):
        how = "quit"
        with contextlib.suppress(errors.MdoError):  # a QEMU that does not answer is killed
            end = asyncio.get_running_loop().time() + QUIT_SECONDS
            async with monitor.connect(guest.qmp_socket, guest.label, end=end) as qmp:
                await qmp.quit()
        await _end_strays(machine, guest, patience=TERM_SECONDS)
    elif await find_strays(machine, guest):
        await _end_strays(machine, guest)
        how = "killed"
    return how


def _is_listening(path: Path) -> bool:
    """Whether some process holds the listening end: the kernel refuses a connection otherwise."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as sock:
        try:
            sock.connect(str(path))
        except BlockingIOError:
            return True
        except OSError:
            return False
    return True


def created(record: ProcessRecord) -> datetime:
    """When the guest was started."""
    return datetime.fromtimestamp(record.created, UTC)
