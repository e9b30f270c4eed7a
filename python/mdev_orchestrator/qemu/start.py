# SPDX-License-Identifier: GPL-2.0-or-later
"""Starts a guest's QEMU.

The directory is claimed by ``mkdir`` and a lock (flock) on it. QEMU is forked behind a gate: a
shell that waits for one line before it becomes QEMU. The record is on disk before that line is
sent, so at no moment does a starter that is killed leave a QEMU that cannot be found; and if the
starter dies before, the shell reads end of file and ends.

A program that forks QEMU and ends itself breaks this contract: the recorded process has ended, and
a QEMU runs on. Arguments that have QEMU do so are refused (:func:`.command.check`).
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import shutil
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

import msgspec
from msgspec.structs import replace

from mdev_orchestrator import errors
from mdev_orchestrator.errors import Outcome
from mdev_orchestrator.host.service import scope
from mdev_orchestrator.machine import Machine
from mdev_orchestrator.qemu import features
from mdev_orchestrator.qemu.command import (
    GuestSpec,
    Sockets,
    check,
    guest_argv,
)
from mdev_orchestrator.qemu.firmware import find_uefi, prepare_flash
from mdev_orchestrator.qemu.guest_dir import remove
from mdev_orchestrator.qemu.log import last_words
from mdev_orchestrator.qemu.process import (
    CONSOLE,
    CONSOLE_LOG,
    QEMU_LOG,
    QMP,
    QUERY,
    UEFI_VARIABLES,
    WATCH,
    ProcessRecord,
    RunningGuest,
    State,
    await_end,
    children,
    collect_status,
    find_strays,
    has_started,
    kill,
    kill_strays,
    look,
    runs_on,
    write_record,
)
from mdev_orchestrator.qemu.remedies import remedy
from mdev_orchestrator.state import private_dir
from mdev_orchestrator.system.directory_lock import LOCK_SECONDS, is_same, lock, opened
from mdev_orchestrator.system.processes import boot_id, start_time
from mdev_orchestrator.system.waiting import run_to_completion

Around = Callable[[Path], contextlib.AbstractAsyncContextManager[object]]
"""Takes a guest's directory; what must be true before QEMU begins, and is undone if it fails."""
START_SECONDS = 60.0
MAX_SUN_PATH = 107
# $0 is shown by ps while the gate is closed. The shell becomes QEMU, with the same pid.
GATE = 'cd / && read -r _ && exec "$@" </dev/null'


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
            left = look(directory)
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
                descriptor = attempt.enter_context(opened(directory))
            except FileNotFoundError:
                continue  # another process took it for a remnant before it was locked
            await lock(descriptor, fcntl.LOCK_EX, f"guest {name}", LOCK_SECONDS)
            if is_same(descriptor, directory):
                stack.push(attempt.pop_all())
                return directory


async def _clear_way(machine: Machine, name: str, directory: Path) -> None:
    """Remove what an ended guest of this name left, or say why that cannot be done."""
    guest = look(directory)
    if guest is None:
        return
    if guest.state is State.GONE:
        if strays := await find_strays(machine, guest):
            raise runs_on(guest, strays)
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


async def start_qemu(
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
                memory=int(spec.memory),
                cpus=spec.cpus,
                iommu=spec.iommu,
            )
            await write_record(directory, record)
            os.write(opener, b"\n")
            for listener in listeners:
                listener.close()  # so that a connection fails as soon as QEMU is gone
            await _until_ready(label, directory, process, argv, began, deadline)
            record = msgspec.structs.replace(record, ready=True)
            await write_record(directory, record)
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
        children.add(pid)  # from now on nothing waits for its status
    return RunningGuest(spec.name, directory, State.RUNNING, record)


async def _end_all(
    machine: Machine, process: int, directory: Path, uuid: UUID
) -> tuple[bool, bool]:
    """End the process that was started, and what it has left behind.

    :return: Whether all have ended, and whether there was more than the one process.
    """
    ended = await kill(process)
    found, left = await kill_strays(machine, directory, uuid)
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
    dying = asyncio.ensure_future(await_end(process, None))
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
        status = collect_status(process)
        raise _failed(label, "ended" if status is None else _status(status), directory, argv)
    if isinstance(failure, errors.DeadlineError):
        words = last_words(directory / QEMU_LOG, argv[0])
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
    words = last_words(directory / QEMU_LOG, argv[0])
    return errors.QemuError(
        f"{label}: QEMU {what}: {words or 'it said nothing'}",
        remedy(words) or "--debug shows how QEMU was run",
        details=_run_as(argv),
    )
