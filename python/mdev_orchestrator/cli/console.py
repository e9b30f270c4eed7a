# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest's first serial port on this terminal."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import sys
import termios
import tty
from collections.abc import Iterator
from typing import TYPE_CHECKING

from mdev_orchestrator.cli import output
from mdev_orchestrator.errors import HostError, MdoError, RequestError

if TYPE_CHECKING:
    from mdev_orchestrator.qemu.process import RunningGuest

ESCAPE = b"\x1d"  # ctrl-]
CHUNK = 1 << 16


def print_log(guest: RunningGuest) -> None:
    """Copy what the guest has printed to standard output.

    :raise MdoError: There is no log, or it cannot be read.
    """
    try:
        with guest.console_log.open("rb") as file:
            while chunk := file.read(CHUNK):
                output.emit_bytes(chunk)
    except OSError as error:
        raise MdoError(f"{guest.label} has no console log: {error.strerror}") from error


def interact(guest: RunningGuest) -> None:
    """Pass keys to the guest and its output back, until ctrl-] or the guest ends.

    :raise RequestError: This is no terminal.
    :raise HostError: The console cannot be reached.
    """
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise RequestError(
            "the console needs a terminal", f"mdo guest console --log {guest.name} prints the log"
        )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        try:
            sock.connect(str(guest.console_socket))
        except OSError as error:
            raise HostError(f"{guest.label}: cannot reach its console: {error.strerror}") from error
        output.say(f"connected to {guest.label}; ctrl-] ends")
        with _raw(sys.stdin.fileno()):
            copy(sock, sys.stdin.fileno(), sys.stdout.fileno())
    output.say("\ndisconnected")


@contextlib.contextmanager
def _raw(terminal: int) -> Iterator[None]:
    before = termios.tcgetattr(terminal)
    try:
        tty.setraw(terminal)
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)


def copy(sock: socket.socket, keys: int, screen: int) -> None:
    """Copy in both directions until either side ends or ctrl-] is typed."""
    while True:
        ready, _, _ = select.select([sock.fileno(), keys], [], [])
        if sock.fileno() in ready:
            data = sock.recv(CHUNK)
            if not data:
                return
            while data:
                data = data[os.write(screen, data) :]
        if keys in ready:
            typed, escape, _ = os.read(keys, CHUNK).partition(ESCAPE)
            sock.sendall(typed)
            if escape or not typed:
                return
