# SPDX-License-Identifier: GPL-2.0-or-later
"""Runs a command in L1 and passes its input, output, signals and exit status through."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import select
import signal
import socket
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from mdev_lab import wire
from mdev_orchestrator.errors import BusyError, DeadlineError, MdoError

Output = Callable[[bytes], None]

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)


class Session:
    """One exec port, held by this process alone until it is closed."""

    def __init__(self, directory: Path) -> None:
        """Take the first free port of a lab.

        :param directory: The lab's.
        :raise BusyError: All ports are in use.
        :raise MdoError: The lab does not answer.
        """
        self.word = secrets.token_hex(8)
        self.lines = wire.Lines()
        for path in sorted(directory.glob("exec-*.sock")):
            self._lock = path.with_suffix(".lock").open("w")
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._lock.close()
                continue
            self.socket = socket.socket(socket.AF_UNIX)
            try:
                connect(self.socket, path)
            except OSError as error:
                self.close()
                raise MdoError(f"lab {directory.name} does not answer: {error.strerror}") from error
            return
        raise BusyError(
            f"lab {directory.name} runs as many commands as it has ports", "wait for one to end"
        )

    def close(self) -> None:
        """Free the port; the agent ends a command that still runs on it."""
        self.socket.close()
        self._lock.close()

    def send(self, verb: str, payload: bytes = b"") -> None:
        """Write one line."""
        self.socket.sendall(wire.encode(self.word, verb, payload))

    def receive(self) -> Iterator[tuple[str, bytes]]:
        """Read once, and return verb and payload of each line of this session.

        :raise MdoError: The lab has ended.
        """
        try:
            data = self.socket.recv(65536)
        except ConnectionError:
            data = b""
        if not data:
            raise MdoError("the lab ended while the command ran", "see its console.log")
        for word, verb, payload in self.lines.feed(data):
            if word == self.word:
                yield verb, payload

    def wait_ready(self, seconds: float, alive: Callable[[], None] = lambda: None) -> None:
        """Wait until the agent answers.

        :param alive: Called about once a second; raises if the lab has ended.
        :raise DeadlineError: No answer within ``seconds``.
        """
        self.send("hello")
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if select.select([self.socket], [], [], min(left, 1.0))[0] and any(
                verb == "ready" for verb, _ in self.receive()
            ):
                return
            alive()
        raise DeadlineError(f"the lab's agent did not answer within {seconds:.0f} s")


def connect(sock: socket.socket, path: Path) -> None:
    """Connect to a socket by a short path: its address holds 108 bytes at most."""
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        sock.connect(f"/proc/self/fd/{directory}/{path.name}")
    finally:
        os.close(directory)


@contextlib.contextmanager
def raw_terminal(active: bool) -> Iterator[None]:
    """Put the terminal into raw mode for the block, so that every key is passed on."""
    if not active:
        yield
        return
    saved = termios.tcgetattr(0)
    tty.setraw(0)
    try:
        yield
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, saved)


@contextlib.contextmanager
def signals_as_bytes() -> Iterator[int]:
    """Give a descriptor from which each signal that is to be passed on reads as one byte."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    numbers = (*FORWARDED, signal.SIGWINCH)
    old_wakeup = signal.set_wakeup_fd(writer)
    old = {number: signal.signal(number, lambda *_: None) for number in numbers}
    try:
        yield reader
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(old_wakeup)
        os.close(reader)
        os.close(writer)


def run(
    directory: Path,
    argv: Sequence[str],
    *,
    cwd: str,
    env: dict[str, str],
    terminal: bool = False,
    ready_seconds: float = 10.0,
    output: Output | None = None,
) -> int:
    """Run a command in a lab with this process's standard streams.

    :param directory: The lab's directory.
    :param terminal: Whether the command gets a terminal; for interactive use.
    :param output: Called with what the command prints, instead of this process's standard output.
    :return: Its exit status, 128 + N after signal N, 127 when it could not be run.
    :raise MdoError: The lab ended, does not answer or has no free port.
    """
    session = Session(directory)
    try:
        session.wait_ready(ready_seconds)
        size = list(os.get_terminal_size(0))[::-1] if terminal else None
        with raw_terminal(terminal), signals_as_bytes() as signals:
            request = {"argv": list(argv), "cwd": cwd, "env": env, "tty": size}
            session.send("exec", json.dumps(request).encode())
            return _relay(session, signals, terminal, output or _to_stdout)
    finally:
        session.close()


def _relay(session: Session, signals: int, terminal: bool, output: Output) -> int:
    sources = [session.socket.fileno(), signals, 0]
    while True:
        for source in select.select(sources, [], [])[0]:
            if source == signals:
                for number in os.read(signals, 64):
                    if number != signal.SIGWINCH:
                        session.send("signal", str(number).encode())
                    elif terminal:
                        columns, rows = os.get_terminal_size(0)
                        session.send("size", f"{rows} {columns}".encode())
            elif source == 0:
                data = _read_input()
                session.send("in", data)
                if not data:
                    sources.remove(0)
            else:
                status = _answer(session, output)
                if status is not None:
                    return status


def _read_input() -> bytes:
    """Read a piece of standard input; empty at its end, or if it is closed."""
    try:
        return os.read(0, wire.CHUNK)
    except OSError:
        return b""


def _to_stdout(data: bytes) -> None:
    _write(sys.stdout.fileno(), data)


def _answer(session: Session, output: Output) -> int | None:
    """Read once and pass output on; return the exit status if the command has ended."""
    for verb, payload in session.receive():
        if verb == "out":
            output(payload)
        elif verb == "err":
            _write(sys.stderr.fileno(), payload)
        elif verb == "exit":
            return int(payload)
        elif verb == "fail":
            _write(sys.stderr.fileno(), b"mdo: " + payload + b"\n")
            return 127
    return None


def _write(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]
