# SPDX-License-Identifier: GPL-2.0-or-later
"""The first process of L1: runs the commands that the host sends.

The initramfs starts it with the host's Python. It imports only the standard library, because every
import takes a tenth of a second under emulation. One worker process serves each virtio serial port,
so that a client that does not read blocks no other. Process 1 reaps, and restarts workers.
"""

import contextlib
import fcntl
import json
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios

from mdev_lab import wire

PORTS = "/sys/class/virtio-ports"
PORT_PREFIX = "mdo.exec."
GRACE_SECONDS = 2.0


def ports() -> list[str]:
    """Return the device nodes of the ports for commands."""
    found = []
    for entry in sorted(os.listdir(PORTS)):  # noqa: PTH208 - pathlib costs an import here
        with open(f"{PORTS}/{entry}/name") as file:  # noqa: PTH123
            if file.read().startswith(PORT_PREFIX):
                found.append(f"/dev/{entry}")
    return found


class Command:
    """A child process in a session of its own, with pipes or a terminal."""

    def __init__(
        self, argv: list[str], cwd: str, env: dict[str, str], tty: list[int] | None
    ) -> None:
        if tty is None:
            child_in, self.stdin = os.pipe()
            self.stdout, child_out = os.pipe()
            self.stderr, child_err = os.pipe()
        else:
            master, slave = pty.openpty()
            self.stdin = self.stdout = master
            self.stderr = -1
            self.resize(*tty)
            child_in = child_out = child_err = slave
        executable = find_executable(argv[0], cwd, env)
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.setsid()
                if tty is not None:
                    fcntl.ioctl(child_in, termios.TIOCSCTTY, 0)
                for number, descriptor in enumerate((child_in, child_out, child_err)):
                    os.dup2(descriptor, number)
                os.closerange(3, 256)
                os.chdir(cwd)
                os.execve(executable, argv, env)  # noqa: S606 - no shell is the point
            except OSError as error:
                os.write(2, f"lab: {argv[0]}: {error.strerror}\n".encode())
            finally:
                os._exit(127)
        for descriptor in {child_in, child_out, child_err}:
            os.close(descriptor)
        self.pidfd = os.pidfd_open(self.pid)
        self.status: int | None = None
        os.set_blocking(self.stdin, tty is not None)
        self.pending = b""
        self.input_ended = False

    def flush_input(self) -> bool:
        """Write as much input as the command takes now; return whether some is left."""
        try:
            while self.pending:
                self.pending = self.pending[os.write(self.stdin, self.pending) :]
        except BlockingIOError:
            return True
        except OSError:  # the command has closed its input: no error
            self.pending = b""
        if self.input_ended and self.stdin not in {-1, self.stdout}:
            os.close(self.stdin)
            self.stdin = -1
        return False

    def resize(self, rows: int, columns: int) -> None:
        """Set the terminal's size."""
        fcntl.ioctl(self.stdin, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def kill(self, number: int) -> None:
        """Send a signal to the command's process group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def wait(self) -> int:
        """Wait for the command; return its exit status as a shell would: 128 + N after signal N."""
        if self.status is None:
            code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            self.status = 128 - code if code < 0 else code
        return self.status

    def close(self) -> None:
        """End the command if it still runs, and close all descriptors."""
        if self.status is None:
            self.kill(signal.SIGHUP)
            self.kill(signal.SIGTERM)
            if not select.select([self.pidfd], [], [], GRACE_SECONDS)[0]:
                self.kill(signal.SIGKILL)
            self.wait()
        for descriptor in {self.stdin, self.stdout, self.stderr, self.pidfd} - {-1}:
            os.close(descriptor)


def find_executable(name: str, cwd: str, env: dict[str, str]) -> str:
    """Return the path of a program, found as a shell would find it."""
    if "/" in name:
        return os.path.join(cwd, name)  # noqa: PTH118
    for directory in env.get("PATH", os.defpath).split(":"):
        candidate = f"{directory}/{name}"
        if os.access(candidate, os.X_OK):
            return candidate
    raise FileNotFoundError(2, "command not found", name)


class Worker:
    """Serves one port, one session after another."""

    def __init__(self, path: str) -> None:
        self.port = os.open(path, os.O_RDWR | os.O_NONBLOCK)
        self.lines = wire.Lines()
        self.session = ""
        self.command: Command | None = None
        self.epoll = select.epoll()
        # Edge-triggered: without a client the port reads as "at its end" all the time.
        self.epoll.register(self.port, select.EPOLLIN | select.EPOLLET)

    def run(self) -> None:
        """Serve for ever."""
        while True:
            for descriptor, _ in self.epoll.poll():
                if descriptor == self.port:
                    self.read_port()
                elif self.command is not None:
                    self.read_command(descriptor)

    def send(self, verb: str, payload: bytes = b"") -> None:
        """Write one line; blocks this worker while the client does not read."""
        data = wire.encode(self.session, verb, payload)
        while data:
            try:
                data = data[os.write(self.port, data) :]
            except BlockingIOError:
                select.select([], [self.port], [])

    def read_port(self) -> None:
        """Handle what the client sent; no data means that it has disconnected."""
        while True:
            try:
                data = os.read(self.port, 65536)
            except BlockingIOError:
                return
            if not data:
                self.end()
                return
            for session, verb, payload in self.lines.feed(data):
                self.handle(session, verb, payload)

    def handle(self, session: str, verb: str, payload: bytes) -> None:
        """Handle one line."""
        if verb == "hello":
            self.end()
            self.session = session
            self.send("ready")
        elif session != self.session:
            return
        elif verb == "exec":
            self.start(payload)
        elif self.command is None:
            return
        elif verb == "in":
            self.feed(self.command, payload)
        elif verb == "signal":
            self.command.kill(int(payload))
        elif verb == "size":
            rows, columns = payload.split()
            self.command.resize(int(rows), int(columns))

    def start(self, payload: bytes) -> None:
        """Start a command, or answer why it cannot be started."""
        try:
            request = json.loads(payload)
            self.command = Command(
                request["argv"], request["cwd"], {**os.environ, **request["env"]}, request["tty"]
            )
        except OSError as error:
            self.send("fail", f"{error.filename or 'exec'}: {error.strerror}".encode())
            return
        for descriptor in {self.command.stdout, self.command.stderr, self.command.pidfd} - {-1}:
            self.epoll.register(descriptor, select.EPOLLIN)

    def feed(self, command: Command, payload: bytes) -> None:
        """Pass standard input on, now or when the command reads."""
        if command.stdin == -1:
            return
        descriptor, waited = command.stdin, bool(command.pending)
        command.pending += payload
        command.input_ended |= not payload
        waits = command.flush_input()
        if waits and not waited:
            self.epoll.register(descriptor, select.EPOLLOUT)
        elif waited and not waits and command.stdin != -1:
            self.epoll.unregister(descriptor)

    def read_command(self, descriptor: int) -> None:
        """Handle an event of the command: output, room for input, or its end."""
        command = self.command
        if command is None:
            return
        if descriptor == command.pidfd:
            status = command.wait()
            self.drain(command)
            self.end()
            self.send("exit", str(status).encode())
        elif descriptor == command.stdin != command.stdout:
            if not command.flush_input() and command.stdin != -1:
                self.epoll.unregister(descriptor)
        elif not self.forward(command, descriptor):
            self.epoll.unregister(descriptor)

    def forward(self, command: Command, descriptor: int) -> bool:
        """Pass one piece of output on; return False at its end."""
        try:
            data = os.read(descriptor, wire.CHUNK)
        except OSError:  # a terminal that no process has open
            data = b""
        if data:
            self.send("out" if descriptor == command.stdout else "err", data)
        return bool(data)

    def drain(self, command: Command) -> None:
        """Pass on what is left in the pipes, without waiting for the command's children."""
        for descriptor in (command.stdout, command.stderr):
            while (
                descriptor != -1
                and select.select([descriptor], [], [], 0)[0]
                and self.forward(command, descriptor)
            ):
                pass

    def end(self) -> None:
        """End the session's command, if there is one."""
        if self.command is None:
            return
        for descriptor in (self.command.stdout, self.command.stderr, self.command.pidfd):
            with contextlib.suppress(OSError, ValueError):
                self.epoll.unregister(descriptor)
        self.command.close()
        self.command = None


def spawn(path: str) -> int:
    """Fork the worker of one port."""
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        try:
            Worker(path).run()
        finally:
            os._exit(1)
    return pid


def main() -> None:
    """Run the commands that set L1 up, then serve until the machine ends."""
    for argv in json.loads(sys.argv[1]):
        result = subprocess.run(argv, check=False, capture_output=True, text=True)
        if result.returncode:
            sys.stderr.write(f"lab: {' '.join(argv)}: {result.stderr}")
    workers = {spawn(path): path for path in ports()}
    while True:
        pid, _ = os.wait()
        if pid in workers:
            path = workers.pop(pid)
            workers[spawn(path)] = path


if __name__ == "__main__":
    main()
