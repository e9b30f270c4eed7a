# SPDX-License-Identifier: GPL-2.0-or-later
"""Runs ``mdo`` in a forked child in which a test can do something at each point of its work.

An interpreter takes seconds to start inside an emulated machine, a fork takes nothing. The child is
``mdo`` from its first line to its exit status; only the points are added. A *point* is

* an event of a step: about to act, has acted, is written down as done; the same when it is undone;
* right before and right after a run is begun, planned, taken over or ended in the journal;
* right before and right after QEMU or libvirt is told to add or to delete a device.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, NoReturn

# much of this is only what a command imports when it runs: so that the children need not
import mdev_orchestrator.cli.apply
import mdev_orchestrator.cli.create
import mdev_orchestrator.cli.guest
import mdev_orchestrator.cli.hotplug
import mdev_orchestrator.cli.recover
import mdev_orchestrator.cli.remove
import mdev_orchestrator.cli.tree
import mdev_orchestrator.engine.apply
import mdev_orchestrator.engine.attach
import mdev_orchestrator.engine.devices
import mdev_orchestrator.engine.guests
import mdev_orchestrator.engine.recovery
import mdev_orchestrator.host.events  # noqa: F401
from mdev_orchestrator.cli.main import main
from mdev_orchestrator.engine.executor import Execution, StepEventKind
from mdev_orchestrator.engine.journal import Journal
from mdev_orchestrator.errors import Outcome
from mdev_orchestrator.interop import libvirt
from mdev_orchestrator.qemu.monitor import QmpMonitor


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    :ivar status: Exit status; negative for a signal.
    :ivar points: The points that it came to, in order.
    :ivar out: Its standard output.
    :ivar err: Its standard error.
    """

    status: int
    points: tuple[str, ...]
    out: str
    err: str

    @property
    def killed(self) -> bool:
        """Whether it was killed, at the last of its points or by the clock."""
        return self.status == -signal.SIGKILL

    def __str__(self) -> str:
        where = f" at {self.points[-1]!r}" if self.killed and self.points else ""
        return f"status {self.status}{where}: {' | '.join(self.err.splitlines()[-3:])}"


Hook = Callable[[str, int], None]
"""Called at each point in the command's own process: what it is, and its number from 1."""
Change = Callable[[], None]
"""Changes the program in the command's own process, before the command begins."""


def kill_at(number: int) -> Hook:
    """SIGKILL at a point."""

    def hook(_what: str, seen: int) -> None:
        if seen == number:
            os.kill(os.getpid(), signal.SIGKILL)

    return hook


def at(beginning: str, act: Callable[[], Any]) -> Hook:
    """Do something at the first point whose name begins so."""
    acted: list[str] = []

    def hook(what: str, _number: int) -> None:
        if not acted and what.startswith(beginning):
            acted.append(what)
            act()

    return hook


def mdo(
    *arguments: str,
    hook: Hook | None = None,
    change: Change | None = None,
    after: float | None = None,
) -> Ended:
    """Run a command to its end.

    :param after: Seconds after which it is killed.
    """
    with (
        tempfile.TemporaryFile() as out,
        tempfile.TemporaryFile() as err,
        tempfile.TemporaryFile() as points,
    ):
        pid = os.fork()
        if not pid:
            _child(arguments, hook, change, (out.fileno(), err.fileno(), points.fileno()))
        if after is not None:
            time.sleep(after)
            os.kill(pid, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        texts = [_text(file.fileno()) for file in (out, err, points)]
    return Ended(status, tuple(texts[2].splitlines()), texts[0], texts[1])


LONGEST = 900
"""Seconds after which a command that hangs ends, by SIGALRM; none takes a tenth of that."""


def _text(descriptor: int) -> str:
    return os.pread(descriptor, 1 << 20, 0).decode()


def _child(
    arguments: tuple[str, ...],
    hook: Hook | None,
    change: Change | None,
    files: tuple[int, int, int],
) -> NoReturn:
    status = 99
    signal.alarm(LONGEST)
    try:
        out, err, points = files
        os.dup2(out, 1)
        os.dup2(err, 2)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 - for as long as we live
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
        if change is not None:
            change()
        _arm(_Points(points, hook))
        status = main(list(arguments))
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 98
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


class _Points:
    def __init__(self, descriptor: int, hook: Hook | None) -> None:
        self.descriptor = descriptor
        self.hook = hook
        self.seen = 0

    def reached(self, what: str) -> None:
        self.seen += 1
        os.write(self.descriptor, f"{what}\n".encode())
        if self.hook is not None:
            self.hook(what, self.seen)


DEVICE_COMMANDS = ("device_add", "device_del")
"""Commands of QMP right before and after which there are points."""


def _arm(points: _Points) -> None:
    """Make every point of this process known to ``points``."""
    emit, execute = Execution.emit, QmpMonitor.execute

    def emitting(
        self: Execution, kind: StepEventKind, number: int, outcome: Outcome | None = None
    ) -> None:
        emit(self, kind, number, outcome)
        points.reached(f"{kind} {self.planned[number].step}")

    async def executing(self: QmpMonitor, command: str, *rest: Any, **more: Any) -> Any:  # noqa: ANN401
        if command not in DEVICE_COMMANDS:
            return await execute(self, command, *rest, **more)
        points.reached(f"before {command} of {self.label}")
        value = await execute(self, command, *rest, **more)
        points.reached(f"after {command} of {self.label}")
        return value

    def marked(owner: object, name: str) -> None:
        method: Callable[..., Awaitable[Any]] = getattr(owner, name)

        async def wrapped(*args: object, **more: object) -> object:
            points.reached(f"before {name}")
            result = await method(*args, **more)
            points.reached(f"after {name}")
            return result

        setattr(owner, name, wrapped)

    Execution.emit = emitting  # type: ignore[method-assign]
    QmpMonitor.execute = executing  # type: ignore[method-assign]
    for name in ("begin", "plan", "take_over", "end"):
        marked(Journal, name)
    for name in ("attach_device", "detach_device"):
        marked(libvirt, name)
