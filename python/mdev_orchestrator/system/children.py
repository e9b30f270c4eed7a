# SPDX-License-Identifier: GPL-2.0-or-later
"""Child processes that run to their end: for their output, for their exit status, or into a log."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mdev_orchestrator.errors import HostError, MdoError

Argv = Sequence[str | Path]

#: Matches the line in a failed program's output that is shown as the cause.
CAUSE = re.compile(r"\berror\b|not found|^E: ", re.IGNORECASE)

#: Programs for administrators, such as depmod, that a plain user's PATH lacks.
_ADMIN_PATH = "/usr/sbin:/sbin"


def run(argv: Argv, *, cwd: Path | None = None, data: str | None = None) -> str:
    """Run a program to its end and return its standard output.

    Blocks: not for coroutines.

    :param data: Its standard input; it is the caller's own if ``None``.
    :raise HostError: It is not installed.
    :raise MdoError: Its exit status is not 0; quotes the first line of its output that looks like
        the cause, or else the last one.
    """
    done = _run(argv, cwd, data)
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()
        causes = [line for line in lines if CAUSE.search(line)]
        raise MdoError(f"{' '.join(map(str, argv))} failed: {(causes or lines[-1:])[0]}")
    return done.stdout


def succeeds(argv: Argv, *, cwd: Path | None = None, data: str | None = None) -> bool:
    """Run a program as :func:`run` does and return whether its exit status is 0.

    :raise HostError: It is not installed.
    """
    return _run(argv, cwd, data).returncode == 0


def _run(argv: Argv, cwd: Path | None, data: str | None) -> subprocess.CompletedProcess[str]:
    path = f"{os.environ.get('PATH', os.defpath)}:{_ADMIN_PATH}"
    try:
        return subprocess.run(
            argv,
            cwd=cwd,
            input=data,
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PATH": path, "LC_ALL": "C.UTF-8"},
        )
    except FileNotFoundError as error:
        raise HostError(f"{argv[0]} is not installed") from error


def run_logged(
    task: str,
    argv: Argv,
    log: Path,
    *,
    speaker: str,
    cwd: Path | None = None,
    on_line: Callable[[bytes], None] = lambda _: None,
) -> None:
    """Run a program to its end with all of its output appended to a log.

    Blocks: not for coroutines. The program is terminated if an exception ends the wait.

    :param task: What the program does, for the error: ``building QEMU``.
    :param speaker: What the error calls the source of the quoted line: ``the compiler``.
    :param on_line: Called with each line of the output.
    :raise MdoError: Its exit status is not 0; quotes the cause from the log.
    """
    with (
        log.open("ab") as out,
        subprocess.Popen(
            argv, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ) as process,
    ):
        try:
            for line in process.stdout or ():
                out.write(line)
                on_line(line)
        except BaseException:
            process.terminate()
            raise
    if process.returncode:
        lines = log.read_text(errors="replace").strip().splitlines() or ["no output"]
        causes = [line for line in lines if CAUSE.search(line) and "-Werror" not in line[:9]]
        raise MdoError(
            f"{task} failed: {speaker} said: {(causes or lines)[-1].strip()}", f"see {log}"
        )


@dataclass(frozen=True, slots=True)
class Ended:
    """A child that has ended by itself.

    :ivar status: Its exit status, or minus the number of the signal that ended it.
    :ivar output: What it printed.
    """

    status: int
    output: str


async def run_child(*argv: str, deadline: float, with_errors: bool = False) -> Ended | None:
    """Run a program without standard input, in a session of its own, and return how it ended.

    :param deadline: Seconds.
    :param with_errors: Whether ``output`` has the standard error too; it is dropped otherwise.
    :return: ``None`` if the deadline passed and the program was killed.
    :raise OSError: It cannot be started.
    """
    process = await asyncio.create_subprocess_exec(
        *argv,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT if with_errors else asyncio.subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        async with asyncio.timeout(deadline):
            output, _ = await process.communicate()
    except TimeoutError:
        return None
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    return Ended(process.returncode or 0, output.decode(errors="replace"))
