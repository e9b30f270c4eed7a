# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest as a process: start it, find it again, stop it.

A guest outlives the command that started it. All that later commands know stands in a directory
of its own, ``guests/NAME`` below the state directory (mode 0700)::

    record.json    what was started: pid, start time, UUID, command line (see Record)
    qmp.sock       monitor for changes        query.sock     monitor for looking
    watch.sock     monitor for events         qemu.log       what QEMU itself printed
    console.sock   first serial port          console.log    what the guest printed there
    started/       start groups that came online for this guest, one file each (see engine)

Nothing there is believed before it is checked: a process is the guest only if it has the recorded
pid *and* the recorded start time, in the boot that was recorded, *and* the guest's ``-uuid`` on
its command line. Signals go through a pidfd that was opened before these checks, so they can never
reach a process that got the number later.

The directory is claimed by ``mkdir`` and a lock (flock) on it, which whoever starts the guest or
removes the directory holds meanwhile. QEMU is forked behind a gate: a shell that waits for one line
before it becomes QEMU. The record is on disk before that line is sent, so there is no moment at
which a starter that is killed leaves a QEMU that nobody can find; and if it dies before, the shell
reads end of file and ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import itertools
import os
import select
import shutil
import signal
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any
from uuid import UUID

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from mdev_orchestrator.errors import (
    BusyError,
    DeadlineError,
    HostError,
    MdoError,
    QemuError,
    RequestError,
    UnknownError,
)
from mdev_orchestrator.host.service import scope
from mdev_orchestrator.machine import Machine
from mdev_orchestrator.qemu.command import (
    NAME_PATTERN,
    GuestSpec,
    Sockets,
    check,
    check_name,
    guest_argv,
)
from mdev_orchestrator.qemu.remedies import remedy
from mdev_orchestrator.state import decode, private_dir, state_dir
from mdev_orchestrator.system.processes import boot_id, has_ended, reap, start_time

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
KILL_SECONDS = 15.0
LOCK_SECONDS = 10.0
MAX_SUN_PATH = 107
MAX_PID = 1 << 22
MAX_TIME = 253402300799.0
"""The last second that has a date."""
MAX_WORDS = 16384
"""Bytes of QEMU's own output that are looked at."""

RECORD = "record.json"
QMP = "qmp.sock"
QUERY = "query.sock"
WATCH = "watch.sock"
CONSOLE = "console.sock"
CONSOLE_LOG = "console.log"
QEMU_LOG = "qemu.log"
STARTED = "started"
ASKED = "asked"
"""A file in a guest's directory that is touched before its power button is pressed, and goes when
whoever waits for it gives up: one that is left is of somebody who was interrupted."""

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


class Record(msgspec.Struct, frozen=True):
    """``record.json``: what was started.

    :ivar pid: Process id of QEMU.
    :ivar start_time: Clock ticks after boot at which the process began (proc(5), field 22 of stat).
    :ivar boot_id: Which boot of the host that was.
    :ivar created: Seconds since the epoch.
    :ivar mdevs: Those of the command line; what was plugged later only QEMU knows.
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
    ready: bool = False
    version: int = 1


class RunningGuest(Struct, frozen=True):
    """One guest as found on disk and in the process table.

    :ivar record: ``None`` if it cannot be read, then ``damage`` says why.
    """

    name: str
    directory: Path
    state: State
    record: Record | None = None
    damage: str = ""

    @property
    def label(self) -> str:
        """How messages name it."""
        return f"guest {self.name}"

    @property
    def qmp_socket(self) -> Path:
        """Monitor for whatever changes something; one client at a time."""
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


def guests_dir() -> Path:
    """Directory with one directory per guest; not created here."""
    return state_dir() / "guests"


def list_guests(root: Path | None = None) -> list[RunningGuest]:
    """Return all guests of this state directory, by name; damaged ones too."""
    root = root or guests_dir()
    reap(_children)  # who lives long would have a zombie of each
    try:
        names = sorted(
            entry.name
            for entry in os.scandir(root)
            if entry.is_dir(follow_symlinks=False) and NAME_PATTERN.fullmatch(entry.name)
        )
    except FileNotFoundError:
        return []
    except OSError as error:
        raise HostError(f"cannot read {root}: {error.strerror}") from error
    found = (_look(root / name) for name in names)
    return [guest for guest in found if guest]


def find(name: str, root: Path | None = None) -> RunningGuest:
    """Return the guest called ``name``, in whatever state.

    :raise UnknownError: There is none.
    """
    check_name(name)
    root = root or guests_dir()
    if guest := _look(root / name):
        return guest
    known = ", ".join(guest.name for guest in list_guests(root))
    raise UnknownError(f"no guest is called {name}", f"there are: {known}" if known else "")


def find_running(name: str, root: Path | None = None) -> RunningGuest:
    """Return the guest called ``name`` if its process is alive.

    :raise UnknownError: There is no such guest.
    :raise RequestError: It does not run.
    """
    guest = find(name, root)
    if not guest.alive:
        what = guest.damage if guest.state is State.DAMAGED else "its process has ended"
        raise RequestError(f"{guest.label} does not run: {what}", f"mdo guest stop {name}")
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


def _read_record(directory: Path) -> Record:
    """Read and check a record.

    :raise ValueError: It is none of this guest's.
    :raise OSError: It cannot be read.
    """
    record = decode((directory / RECORD).read_bytes(), Record)
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


def _is_guest(record: Record) -> bool:
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
def _pidfd(record: Record) -> Iterator[int | None]:
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
"""QEMUs that this process has started, whose exit status nobody has collected."""


async def _ended(descriptor: int, seconds: float | None) -> bool:
    """Wait until the process behind a pidfd ends; whether it did in time."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_reader(descriptor, ended.set)
    try:
        async with asyncio.timeout(seconds):
            await ended.wait()
    except TimeoutError:
        return False
    finally:
        loop.remove_reader(descriptor)
    return True


async def wait_ended(guest: RunningGuest, seconds: float | None = None) -> bool:
    """Wait until the guest's process has ended; whether it has, within ``seconds``."""
    if guest.record is None:
        return True
    with _pidfd(guest.record) as descriptor:
        return descriptor is None or await _ended(descriptor, seconds)


def _kill_now(descriptor: int) -> None:
    """SIGKILL and wait, without the event loop: this runs while a task is being cancelled."""
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(descriptor, signal.SIGKILL)
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    poll.poll(KILL_SECONDS * 1000)
    _reap(descriptor)


# ---------------------------------------------------------------- starting


@contextlib.contextmanager
def _claim(name: str, root: Path) -> Iterator[Path]:
    """Create the guest's directory and hold its lock; remove it if the block fails."""
    directory = private_dir(root) / name
    while True:
        try:
            directory.mkdir(mode=0o700)
        except FileExistsError:
            _clear_way(name, directory)
            continue
        except OSError as error:
            raise HostError(f"cannot create {directory}: {error.strerror}") from error
        try:
            descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except FileNotFoundError:
            continue  # somebody took it for a remnant before it was locked
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if not _is_same(descriptor, directory):
                continue
            try:
                yield directory
            except BaseException:
                left = _look(directory)
                # else the kernel holds it even after SIGKILL, or a group is still to be stopped
                if left and not left.alive and not has_started(left):
                    shutil.rmtree(directory, ignore_errors=True)
                raise
            return
        finally:
            _release(descriptor)


def _is_same(descriptor: int, directory: Path) -> bool:
    try:
        status = directory.lstat()
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(descriptor), status)


def _clear_way(name: str, directory: Path) -> None:
    """Remove what an ended guest of this name left, or say why that cannot be done."""
    guest = _look(directory)
    if guest is None:
        return
    if guest.state is State.GONE:
        remove(guest)
    elif guest.alive and guest.record:
        raise BusyError(
            f"{guest.label} runs already, as process {guest.record.pid}",
            f"mdo guest stop {name}, or take another name",
        )
    elif guest.state is State.STARTING:
        raise BusyError(f"{guest.label} is being started by somebody else", "take another name")
    else:
        raise RequestError(f"{guest.label}: {guest.damage}", f"mdo guest stop --force {name}")


def remove(guest: RunningGuest) -> None:
    """Remove the directory of a guest whose process has ended. Nothing to do is no error.

    :raise BusyError: Somebody else is starting or removing it.
    :raise RequestError: A start group of it has not been stopped.
    """
    try:
        with _descriptor(guest.directory) as descriptor:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not _is_same(descriptor, guest.directory):
                return
            if has_started(guest):
                raise RequestError(
                    f"{guest.label} has ended, and a start group of it may still be online",
                    f"mdo guest stop {guest.name} stops it",
                )
            _remove_tree(guest.directory)
    except BlockingIOError:
        raise BusyError(f"{guest.label} is being started or removed by somebody else") from None
    except FileNotFoundError:
        return
    except OSError as error:
        raise HostError(f"cannot remove {guest.directory}: {error.strerror}") from error


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
    """Keep others from tidying up after a guest while the block gives it something.

    :raise BusyError: Somebody is tidying up, and does not end.
    :raise RequestError: The guest has gone meanwhile.
    """
    with contextlib.ExitStack() as stack:
        try:
            descriptor = stack.enter_context(_descriptor(guest.directory))
        except FileNotFoundError:
            raise RequestError(f"{guest.label} has gone") from None
        await _lock(descriptor, fcntl.LOCK_SH, guest, LOCK_SECONDS)
        if not _is_same(descriptor, guest.directory):
            raise RequestError(f"{guest.label} has gone")
        yield


async def _lock(descriptor: int, kind: int, guest: RunningGuest, seconds: float) -> None:
    """Wait for a lock that others hold for a moment; the kernel has no event for that."""
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    while True:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if loop.time() >= end:
                raise BusyError(
                    f"{guest.label} is being started, changed or removed by somebody else",
                    "try again",
                ) from None
            await asyncio.sleep(0.05)
        else:
            return


@contextlib.asynccontextmanager
async def tidying(guest: RunningGuest, seconds: float = LOCK_SECONDS) -> AsyncIterator[bool]:
    """Hold the lock of a guest's directory: nobody starts, removes or gives it anything meanwhile.

    :param seconds: To wait for the lock.
    :return: Whether its process is alive.
    :raise BusyError: Somebody else has the lock, and keeps it.
    :raise FileNotFoundError: The directory has gone.
    """
    with _descriptor(guest.directory) as descriptor:
        await _lock(descriptor, fcntl.LOCK_EX, guest, seconds)
        if not _is_same(descriptor, guest.directory):
            raise FileNotFoundError(guest.directory)
        try:
            record = _read_record(guest.directory)
        except FileNotFoundError:
            yield False  # whoever began to start it has ended, and its gate with it
        except (OSError, ValueError):
            yield _is_listening(guest.qmp_socket)
        else:
            yield _is_guest(record)


def _listen(path: Path) -> socket.socket:
    """Bind and listen, so that the socket is there before QEMU is, and only for its owner."""
    if len(os.fsencode(path)) > MAX_SUN_PATH:
        raise HostError(
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
        raise HostError(f"cannot listen on {path}: {error.strerror}") from error
    return sock


def _write_record(directory: Path, record: Record) -> None:
    """Replace the record as a whole: a reader sees the old one or the new one."""
    scratch = directory / f"{RECORD}.new"
    with scratch.open("wb") as file:
        file.write(msgspec.json.format(msgspec.json.encode(record)) + b"\n")
        file.flush()
        os.fsync(file.fileno())
    scratch.rename(directory / RECORD)


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
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - MAX_WORDS))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return ""
    lines = (line.strip() for line in text.splitlines())
    return "; ".join("".join(c for c in line if c.isprintable()) for line in lines if line)


def _program(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise HostError(f"there is no program {name}", "apt install qemu-system-x86, or --qemu")
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
            raise RequestError(f"guest {spec.name}: its {field} {path} {why}")
        changes[field] = path.absolute()
    return replace(spec, **changes)


async def start(
    spec: GuestSpec,
    *,
    deadline: float = START_SECONDS,
    root: Path | None = None,
    around: Around | None = None,
) -> RunningGuest:
    """Start a guest and return once its monitor answers.

    It does not start the mdevs that it gives: ``engine.lifecycle.launch`` does.

    Whatever goes wrong, cancellation included, ends the process and removes its files.

    :param deadline: Seconds until the monitor must have answered.
    :param root: Where guests live; :func:`guests_dir` if not given.
    :param around: Entered when the guest's directory is claimed and before QEMU begins, left when
        QEMU answers or has been ended.
    :raise RequestError: The specification is faulty; a :exc:`BusyError` if the guest runs already.
    :raise QemuError: QEMU ended or broke the protocol; the message carries its own words, the hint
        its command line.
    :raise DeadlineError: The monitor did not answer in time.
    :raise HostError: No QEMU, or no place for its files.
    """
    check(spec)
    spec = _absolute(spec)
    with _claim(spec.name, root or guests_dir()) as directory:
        async with around(directory) if around else contextlib.nullcontext():
            try:
                return await _start(spec, directory, deadline)
            except OSError as error:
                why = error.strerror or str(error)
                raise HostError(
                    f"guest {spec.name} was not started: {why}", f"its files go to {directory}"
                ) from error


async def _start(spec: GuestSpec, directory: Path, deadline: float) -> RunningGuest:
    with contextlib.ExitStack() as stack:
        qmp, query, watch, console = listeners = [
            stack.enter_context(_listen(directory / name)) for name in (QMP, QUERY, WATCH, CONSOLE)
        ]
        sockets = Sockets(
            qmp=qmp.fileno(),
            query=query.fileno(),
            watch=watch.fileno(),
            console=console.fileno(),
            console_log=directory / CONSOLE_LOG,
        )
        argv = guest_argv(spec, sockets)
        numbers = [listener.fileno() for listener in listeners]
        pid, opener = _spawn(scope(Machine(), spec.name) + argv, numbers, directory / QEMU_LOG)
        stack.callback(os.close, opener)
        process = os.pidfd_open(pid)
        stack.callback(os.close, process)
        try:
            record = Record(
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
            )
            _write_record(directory, record)
            os.write(opener, b"\n")
            for listener in listeners:
                listener.close()  # so that a connection fails as soon as QEMU is gone
            await _until_ready(directory, spec.name, process, argv, deadline)
            record = msgspec.structs.replace(record, ready=True)
            _write_record(directory, record)
        except BaseException:
            _kill_now(process)
            raise
        _children.add(pid)  # from now on nobody waits for its status
    return RunningGuest(spec.name, directory, State.RUNNING, record)


async def _until_ready(
    directory: Path, name: str, process: int, argv: list[str], deadline: float
) -> None:
    """Return once QEMU answers at its monitor; raise with its own words if it ends instead."""
    label = f"guest {name}"
    asking = asyncio.ensure_future(_ask(directory / QMP, label, deadline))
    dying = asyncio.ensure_future(_ended(process, None))
    try:
        await asyncio.wait((asking, dying), return_when=asyncio.FIRST_COMPLETED)
        if asking.done() and isinstance(asking.exception(), QemuError):
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
    if isinstance(failure, DeadlineError):
        words = qemu_words(directory / QEMU_LOG)
        raise DeadlineError(
            f"{label}: QEMU's monitor did not answer within {deadline:g} s"
            + (words and f": {words}"),
            _run_as(argv),
        ) from failure
    if isinstance(failure, MdoError):
        raise _failed(label, failure.message, directory, argv) from failure
    if failure is not None:
        raise failure


async def _ask(path: Path, label: str, deadline: float) -> None:
    from mdev_orchestrator.qemu import monitor

    async with monitor.connect(path, label, deadline=deadline) as qmp:
        await qmp.execute("query-status", dict[str, object], deadline=deadline)


def _status(status: int) -> str:
    return f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"


def _run_as(argv: list[str]) -> str:
    import shlex

    return f"it was run as: {shlex.join(argv)}"


def _failed(label: str, what: str, directory: Path, argv: list[str]) -> QemuError:
    words = qemu_words(directory / QEMU_LOG)
    hints = [remedy(words), _run_as(argv)]
    return QemuError(
        f"{label}: QEMU {what}: {words or 'it said nothing'}", "; ".join(filter(None, hints))
    )


# ---------------------------------------------------------------- stopping


async def stop(
    guest: RunningGuest,
    *,
    deadline: float = STOP_SECONDS,
    force: bool = False,
    release: Release | None = None,
) -> Ended:
    """End a guest and remove its directory.

    Asks it to power down and waits. Only with ``force``, and at the deadline: QEMU's ``quit``, then
    SIGTERM, then SIGKILL. A guest that has ended already only has its directory removed.

    :param deadline: Seconds for the guest to power down; 0 with ``force`` does not ask it.
    :param release: Called when the process has ended and before the directory is removed.
    :raise DeadlineError: The guest did not power down; it still runs, and nothing was removed.
    :raise RequestError: Its record is damaged and ``force`` was not given.
    """
    if guest.record is None:
        return await _stop_damaged(guest, force=force, release=release)
    how = "gone"
    with _pidfd(guest.record) as process:
        if process is not None:
            how = await _end(guest, process, deadline, force=force)
    if release:
        await release(guest)
    with contextlib.suppress(BusyError):  # whoever starts or stops it too removes it
        remove(guest)
    return Ended(guest.name, how)


def time_left(mark: Path, seconds: float) -> float | None:
    """Of so many seconds since a mark was touched, those that are left; ``None`` without a mark."""
    try:
        passed = time.time() - mark.stat().st_mtime
    except FileNotFoundError:
        return None
    return min(seconds, seconds - passed)  # a clock that was set back makes nobody wait for longer


async def await_pending_shutdown(guest: RunningGuest) -> bool:
    """Wait whether a guest ends because somebody asked it to; ``False`` at once if nobody did.

    A button cannot be taken back: who comes after one that was killed while he waited, or undoes
    what he did, must know whether the guest will run on.
    """
    asked = guest.directory / ASKED
    left = time_left(asked, OBEY_SECONDS)
    if left is None:
        return False
    if await wait_ended(guest, left):
        return True
    asked.unlink(missing_ok=True)
    return False


async def _end(guest: RunningGuest, process: int, deadline: float, *, force: bool) -> str:
    """Escalate until the process has ended; return what it took."""
    from mdev_orchestrator.qemu import monitor

    loop = asyncio.get_running_loop()
    end = loop.time() + deadline
    refusal = ""
    while not refusal and (left := end - loop.time()) > 0:
        with contextlib.suppress(OSError):  # on a full disk it is stopped all the same
            (guest.directory / ASKED).touch()
        try:
            async with (
                asyncio.timeout(left),
                monitor.connect(guest.qmp_socket, guest.label, deadline=left) as qmp,
            ):
                await qmp.execute("system_powerdown", object)
        except (MdoError, TimeoutError) as error:
            refusal = str(error)
        # one that boots does not feel its button yet
        patience = 1 if refusal else PRESS_AGAIN_SECONDS
        if await _ended(process, max(min(end - loop.time(), patience), 0)):
            return "powerdown"
    if not force:
        (guest.directory / ASKED).unlink(missing_ok=True)
        raise DeadlineError(
            f"{guest.label} did not power down within {deadline:g} s"
            + (refusal and f": {refusal}"),
            f"it still runs; mdo guest stop --force {guest.name} ends it without asking",
        )
    try:
        async with monitor.connect(guest.qmp_socket, guest.label, deadline=2) as qmp:
            await qmp.quit(deadline=2)
        if await _ended(process, 5):
            return "quit"
    except MdoError:
        pass  # what it cannot be told it is made to do
    for number, how in ((signal.SIGTERM, "terminated"), (signal.SIGKILL, "killed")):
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(process, number)
        if await _ended(process, KILL_SECONDS if number == signal.SIGKILL else 3):
            return how
    raise DeadlineError(
        f"{guest.label}: process {guest.record.pid if guest.record else '?'} does not end "
        f"{KILL_SECONDS:g} s after SIGKILL",
        "the kernel holds it, perhaps in a driver; see dmesg",
    )


async def _stop_damaged(guest: RunningGuest, *, force: bool, release: Release | None) -> Ended:
    """End what can only be reached by its monitor, then remove its directory."""
    from mdev_orchestrator.qemu import monitor

    if not force:
        raise RequestError(
            f"{guest.label}: {guest.damage}",
            f"mdo guest stop --force {guest.name} ends whatever answers at its monitor",
        )
    how = "gone"
    if _is_listening(guest.qmp_socket):
        async with monitor.connect(guest.qmp_socket, guest.label) as qmp:
            await qmp.quit()
        how = "quit"
    if release:
        await release(guest)
    remove(guest)
    return Ended(guest.name, how)


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


def created(record: Record) -> datetime:
    """When the guest was started."""
    return datetime.fromtimestamp(record.created, UTC)
