# SPDX-License-Identifier: GPL-2.0-or-later
"""The L2 guest: the files that it boots from, and a client of the program in it.

It boots a kernel and an initramfs with busybox, ``mvgpu-uio.ko`` and ``guest/mvgpu-guest.c``, a
program that answers commands on the serial console, one a line (``guest/README.rst``).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
import sys
import tempfile
from array import array
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from mdev_lab import initramfs
from mdev_lab.checkout import ROOT
from mdev_lab.client import connect
from mdev_lab.kernel_modules import digest
from mdev_lab.kernels import Kernel
from mdev_orchestrator.errors import DeadlineError, MdoError, QemuError
from mdev_orchestrator.state import cache_dir
from mdev_orchestrator.system.children import run
from mdev_orchestrator.system.files import locked
from mdev_orchestrator.system.progress import Progress

#: Kernel command line. Under emulation it makes the boot quick: little output on the serial port,
#: no mitigations, no calibration.
APPEND = "console=ttyS0 quiet panic=-1 mitigations=off tsc=reliable random.trust_cpu=on"

#: Prefix of each answer of the guest's program; the rest of the line is JSON.
MARK = b"@mvgpu "
MAX_LINE = 64 * 1024
PING_SECONDS = 2.0
BOOT_SECONDS = 300.0
"""It takes 13 s on a quiet machine; beside six other labs on two processors 120 s were seen."""


def image(kernel: Kernel, modules: Path, progress: Progress = lambda _: None) -> Path:
    """Build the guest's initramfs once for each kernel, driver and program; return its path.

    :param modules: Directory with ``mvgpu-uio.ko``.
    :raise MdoError: It cannot be built.
    """
    source = Path(__file__).parent / "guest"
    header = ROOT / "kernel" / "mvgpu.h"
    driver = modules / "mvgpu-uio.ko"
    files = [source / name for name in ("init", "modules.txt", "mvgpu-guest.c")]
    target = cache_dir() / "guests" / f"{kernel.release}-{digest([*files, header, driver])}.img"
    with locked(target):
        if not target.exists():
            progress("building the guest's initramfs")
            with tempfile.TemporaryDirectory(dir=target.parent) as work:
                program = Path(work) / "mvgpu-guest"
                flags = ["-static", "-O2", "-Wall", "-Wextra", "-Werror", f"-I{header.parent}"]
                run(["gcc", *flags, "-o", program, source / "mvgpu-guest.c"])
                initramfs.build(
                    target,
                    init=(source / "init").read_text(),
                    kernel=kernel,
                    modules=(source / "modules.txt").read_text().split(),
                    files={"bin/mvgpu-guest": program, "modules/mvgpu-uio.ko": driver},
                )
    return target


def constants() -> dict[str, int]:
    """Return the numbers of the driver's interface, from ``kernel/mvgpu.h``."""
    text = (ROOT / "kernel" / "mvgpu.h").read_text()
    found = re.findall(r"^#define (MVGPU_\w+)\s+(0x[0-9a-f]+|\d+)\b", text, re.MULTILINE)
    return {name: int(value, 0) for name, value in found}


def pattern(seed: int, length: int) -> bytes:
    """Return the ``length`` bytes that mvgpu's command FILL writes to a framebuffer."""
    step = constants()["MVGPU_FILL_STEP"]
    words = array("I", ((seed + index * step) & 0xFFFFFFFF for index in range(length // 4)))
    if sys.byteorder == "big":
        words.byteswap()
    return words.tobytes()


class Program:
    """A connection to the program in a guest, over the guest's console."""

    def __init__(
        self, name: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.name = name
        self._reader = reader
        self._writer = writer

    async def ask(self, command: str, seconds: float = 60.0) -> dict[str, Any]:
        """Send one command and wait for its answer.

        :param command: As ``guest/README.rst`` describes, without the newline.
        :raise DeadlineError: No answer within ``seconds``.
        :raise QemuError: The guest ended.
        :raise MdoError: The command failed; quotes the program.
        """
        verb = command.partition(" ")[0]
        try:
            async with asyncio.timeout(seconds):
                answer = await self._exchange(command, {verb})
        except TimeoutError:
            raise DeadlineError(
                f"guest {self.name} did not answer '{command}' within {seconds:g} s"
            ) from None
        except ConnectionError as error:
            raise QemuError(f"guest {self.name} ended: {error.strerror}") from error
        if not answer["ok"]:
            raise MdoError(f"guest {self.name}: '{command}': {answer['error']}")
        return answer

    async def ready(self, seconds: float) -> None:
        """Wait until the program answers, whether the guest is booting or has been up for long.

        A guest loses its input until its serial driver has started, so the question is repeated.

        :raise DeadlineError: No answer within ``seconds``.
        """
        try:
            async with asyncio.timeout(seconds):
                while True:
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(PING_SECONDS):
                            await self._exchange("ping", {"ping", "ready"})
                            return
        except TimeoutError:
            raise DeadlineError(
                f"the program in guest {self.name} did not answer within {seconds:g} s",
                f"'mdo guest console {self.name} --log' shows how far it came",
            ) from None

    async def _exchange(self, command: str, verbs: set[str]) -> dict[str, Any]:
        self._writer.write(command.encode() + b"\n")
        await self._writer.drain()
        while (answer := await self._answer())["cmd"] not in verbs:
            pass
        return answer

    async def _answer(self) -> dict[str, Any]:
        while line := await self._reader.readline():
            _, found, text = line.partition(MARK)
            if not found:
                continue
            with contextlib.suppress(ValueError):
                answer = json.loads(text)
                if isinstance(answer, dict) and {"ok", "cmd"} <= answer.keys():
                    return answer
        raise QemuError(f"guest {self.name} ended while it was being asked")


@contextlib.asynccontextmanager
async def program(
    name: str, console: Path, seconds: float = BOOT_SECONDS
) -> AsyncIterator[Program]:
    """Connect to the program in a guest, and wait until it answers.

    :param console: The guest's console socket.
    :raise DeadlineError: No answer within ``seconds``.
    """
    sock = socket.socket(socket.AF_UNIX)
    connect(sock, console)
    reader, writer = await asyncio.open_unix_connection(sock=sock, limit=MAX_LINE)
    try:
        found = Program(name, reader, writer)
        await found.ready(seconds)
        yield found
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
