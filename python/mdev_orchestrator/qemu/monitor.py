# SPDX-License-Identifier: GPL-2.0-or-later
"""QMP with deadlines, typed replies, and what is known of a command that failed.

A monitor serves one client at a time and does not even greet the next one, so a connection that
is not greeted in time is reported as a busy monitor.

Errors, and the :class:`~mdev_orchestrator.errors.Outcome` of the command:

* the monitor cannot be reached, does not greet or does not negotiate in time: ``NO_EFFECT``,
  because no command was sent;
* QEMU understood the command and refused it (:exc:`CommandError`): ``NO_EFFECT``;
* no reply in time, a connection that ends, a reply that makes no sense: ``UNKNOWN``. QEMU may have
  run the command, or may run it later.

**How to find out.** A new connection to the *same* socket is served after the commands of the
earlier one: QEMU runs the commands of a monitor one after the other, and when a client goes it
drops those that it has not begun, before it greets the next client. So the answer to a question on
a new connection to ``qmp.sock`` comes when a ``device_add`` that was sent there before has ended or
has been dropped. A question on another monitor may overtake it.

One :func:`connect` is one connection with a client of its own: after an end of file a qemu.qmp
client cannot be used again.
"""

from __future__ import annotations

import asyncio
import logging
import math
import socket
import textwrap
import traceback
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from qemu.qmp import ExecuteError, QMPClient, QMPError, Runstate, StateError
from qemu.qmp.events import EventListener
from qemu.qmp.message import Message

from mdev_orchestrator.errors import CommandError, DeadlineError, Outcome, QemuError
from mdev_orchestrator.system.waiting import readable, run_to_completion

T = TypeVar("T")

GREETING_SECONDS = 10.0
REPLY_SECONDS = 10.0
CLOSE_SECONDS = 1.0
RETRY_SECONDS = 0.05
MAX_EVENTS = 64
"""Events that wait to be looked at; a listener hears one device's, so a flood is a fault."""

# qemu.qmp logs what it also raises; without a handler, logging would print it twice.
logging.getLogger("qemu.qmp").addHandler(logging.NullHandler())


class QmpEvent(msgspec.Struct, frozen=True):
    """One asynchronous message of QEMU."""

    event: str
    data: dict[str, Any] = {}


class _Listener(EventListener):
    """A listener with no history and a bounded queue; qemu.qmp's own grow without end."""

    overflow = False

    async def put(self, event: Message) -> None:
        if not self.accept(event):
            return
        if self._queue.qsize() >= MAX_EVENTS:
            self.overflow = True
            return
        self._queue.put_nowait(event)


class Events:
    """The events that a :meth:`QmpMonitor.events` block asked for."""

    def __init__(self, monitor: QmpMonitor, listener: _Listener) -> None:
        self._monitor = monitor
        self._listener = listener

    async def next(self, deadline: float) -> QmpEvent | None:
        """Return the next event, or ``None`` if there was none within ``deadline`` seconds.

        :raise QemuError: The connection ended, or events came faster than they were looked at.
        """
        if self._listener.overflow:
            raise QemuError(f"{self._monitor.label}: more than {MAX_EVENTS} events at once")
        getting = asyncio.ensure_future(self._listener.get())
        ending = asyncio.ensure_future(self._monitor.ended())
        try:
            async with asyncio.timeout(max(deadline, 0)):
                await asyncio.wait((getting, ending), return_when=asyncio.FIRST_COMPLETED)
        except TimeoutError:
            if not getting.done():
                return None
        finally:
            getting.cancel()
            ending.cancel()
            await asyncio.wait((getting, ending))
        if getting.cancelled():
            raise QemuError(
                f"{self._monitor.label}: the monitor hung up while waiting for an event"
            )
        return _convert(dict(getting.result()), QmpEvent, "an event", self._monitor.label)


class QmpMonitor:
    """An open connection to a guest's QEMU. Made by :func:`connect`.

    :ivar label: How messages name it, for instance ``guest render-1``.
    :ivar end: When a command is given up at the latest, in the event loop's time.
    """

    def __init__(
        self, client: QMPClient, sock: socket.socket, label: str, end: float = math.inf
    ) -> None:
        self._client = client
        self._sock = sock
        self.label = label
        self.end = end

    @contextmanager
    def until(self, end: float) -> Iterator[None]:
        """Give up commands inside the block at ``end``, in the event loop's time."""
        before, self.end = self.end, end
        try:
            yield
        finally:
            self.end = before

    async def execute(
        self,
        command: str,
        reply: type[T],
        arguments: Mapping[str, object] | None = None,
        *,
        deadline: float | None = REPLY_SECONDS,
    ) -> T:
        """Run a command and return its value as ``reply``, any type that msgspec converts to.

        :param deadline: Seconds to wait for the reply, but not beyond :attr:`end`; ``None`` for
            no other limit than that.
        :raise CommandError: QEMU refused it, so it had no effect.
        :raise QemuError: The connection ended, or the value is no ``reply``.
        :raise DeadlineError: There was no reply in time; or no time was left to send it.
        """
        left = self.end - asyncio.get_running_loop().time()
        seconds = left if deadline is None else min(deadline, left)
        if seconds <= 0:
            raise DeadlineError(
                f"{self.label}: no time was left for {command}",
                "try again with a longer deadline",
                outcome=Outcome.NO_EFFECT,
                subject=self.label,
            )
        try:
            async with asyncio.timeout(None if seconds == math.inf else seconds):
                value = await self._client.execute(command, arguments)
        except TimeoutError:
            raise DeadlineError(
                f"{self.label}: no reply to {command} within {seconds:.3g} s",
                "QEMU may be stopped, or busy; whether the command took effect is not known",
                outcome=Outcome.UNKNOWN,
                subject=self.label,
            ) from None
        except ExecuteError as error:
            raise CommandError(
                f"{self.label}: {command}: {error.error.error.desc}",
                command=command,
                qmp_class=error.error_class,
                description=error.error.error.desc,
            ) from error
        except QMPError as error:
            unsent = isinstance(error, StateError)  # the connection had ended before
            cause = _cause(await _close(self._client, self._sock))
            _forget_frames(error)
            raise QemuError(
                f"{self.label}: {command}: {cause}",
                outcome=Outcome.NO_EFFECT if unsent else Outcome.UNKNOWN,
                subject=self.label,
            ) from error
        return _convert(value, reply, command, self.label)

    async def quit(self, *, deadline: float = REPLY_SECONDS) -> None:
        """Have QEMU end at once. Its hanging up instead of a reply is the expected answer.

        :raise DeadlineError: It did neither.
        """
        try:
            await self.execute("quit", object, deadline=deadline)
        except CommandError:
            raise
        except QemuError:
            if self._client.runstate is Runstate.RUNNING:
                raise

    @contextmanager
    def events(
        self, names: Iterable[str], match: Callable[[Mapping[str, object]], bool]
    ) -> Iterator[Events]:
        """Listen for events of these names whose data ``match`` likes, while the block runs."""

        def accepts(event: Message) -> bool:
            data = event.get("data")
            return match(data if isinstance(data, dict) else {})

        listener = _Listener(names, accepts)
        with self._client.listen(listener):
            yield Events(self, listener)

    async def ended(self) -> None:
        """Return when the connection is no longer usable."""
        while self._client.runstate is Runstate.RUNNING:
            await self._client.runstate_changed()


def _cause(error: BaseException | None) -> str:
    """Return a phrase for what a connection died of."""
    while isinstance(inner := getattr(error, "exc", None), BaseException):
        error = inner
    if error is None or isinstance(error, EOFError):
        return "the monitor hung up"
    if isinstance(error, OSError):
        return error.strerror or str(error)
    text = str(error).splitlines()
    return f"the answer is no QMP: {text[0] if text and text[0] else type(error).__name__}"


def _convert(value: object, wanted: type[T], what: str, label: str) -> T:
    try:
        return msgspec.convert(value, wanted)
    except msgspec.ValidationError as error:
        shown = textwrap.shorten(repr(value), 80, placeholder=" ...")
        raise QemuError(
            f"{label}: {what} answered something odd: {error}: {shown}",
            outcome=Outcome.UNKNOWN,
            subject=label,
        ) from error


async def _open(path: Path, label: str) -> socket.socket:
    """Connect and wait for the greeting; closes the socket if there is none.

    QEMU lets some clients wait beside the one that it serves. For room in that queue the kernel
    has no event (a blocking connect could not be cancelled), so it is tried again.

    The greeting is waited for here and not by qemu.qmp: until it comes there is only a socket,
    which can be given up at any moment, as often as the caller is cancelled.
    """
    while True:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            sock.connect(str(path))
            await readable(sock.fileno())
        except BlockingIOError:
            sock.close()
            await asyncio.sleep(RETRY_SECONDS)
        except OSError as error:
            sock.close()
            raise QemuError(
                f"{label}: cannot reach its monitor: {error.strerror or error}",
                outcome=Outcome.NO_EFFECT,
                subject=label,
                errno=error.errno,
            ) from error
        except BaseException:
            sock.close()
            raise
        else:
            return sock


class _Client(QMPClient):
    """A client that can follow one whose command QEMU is still running.

    QEMU sends a reply to the client that it has when the command ends. So a client that comes after
    one that gave up gets that one's reply first, and qemu.qmp would take it for the reply to
    ``qmp_capabilities``: an error would end the connection. All commands but that one have an id.

    It does not write every message into a log that nothing keeps: the library's own puts it into
    words for that first, which takes longer than to send it.
    """

    async def _recv(self) -> Message:
        while True:
            message = await super()._recv()
            negotiating = self.greeting is not None and self.runstate is Runstate.CONNECTING
            if not negotiating or message.get("id") is None:
                return message

    def _cb_outbound(self, msg: Message) -> Message:
        return msg

    def _cb_inbound(self, msg: Message) -> Message:
        return msg


async def _close(client: QMPClient, sock: socket.socket) -> BaseException | None:
    """Disconnect, hard after a second, and return whatever the connection had died of."""

    def hang_up() -> None:
        try:
            sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # it is closed already, which is all that is wanted

    guard = asyncio.get_running_loop().call_later(CLOSE_SECONDS, hang_up)
    try:
        await run_to_completion(client.disconnect())
    except Exception as error:  # noqa: BLE001 - whatever the reader or the writer died of
        _forget_frames(error)
        return error.with_traceback(None)  # this frame names the client, and cannot be emptied yet
    finally:
        guard.cancel()
    return None


def _forget_frames(error: BaseException) -> None:
    """Empty the frames that an error of qemu.qmp has passed.

    They name the error, or the tasks that died of it, and it names them: circles, which a process
    that lives long would keep, one for each guest that ends, until Python looks for such.
    """
    traceback.clear_frames(error.__traceback__)


@asynccontextmanager
async def connect(
    path: Path, label: str, *, deadline: float | None = GREETING_SECONDS, end: float = math.inf
) -> AsyncIterator[QmpMonitor]:
    """Connect to the monitor that listens on the Unix socket ``path``.

    :param label: How messages name it.
    :param deadline: Seconds for greeting and negotiation, but not beyond ``end``; ``None`` for no
        other limit than that: another client may hold the connection for long.
    :param end: When all that the connection is used for is given up, in the event loop's time.
    :raise QemuError: No process listens there, or what answers is no QMP.
    :raise DeadlineError: It did not greet in time.
    """
    client = _Client()
    client.events.event_filter = lambda _event: False  # it would keep every event for ever
    left = end - asyncio.get_running_loop().time()
    seconds = left if deadline is None else min(deadline, left)
    try:
        async with asyncio.timeout(None if seconds == math.inf else max(seconds, 0)):
            sock = await _open(path, label)
            await _greet(client, sock, label)
    except TimeoutError:
        raise DeadlineError(
            f"{label}: its monitor did not answer within {max(seconds, 0):.3g} s",
            "another program may hold the connection, or QEMU is stopped; try again",
            outcome=Outcome.NO_EFFECT,
            subject=label,
        ) from None
    try:
        yield QmpMonitor(client, sock, label, end)
    finally:
        await _close(client, sock)


async def _greet(client: QMPClient, sock: socket.socket, label: str) -> None:
    """Read the greeting and negotiate. Closes the socket if that fails."""
    try:
        await client.connect(sock)
    except (QMPError, EOFError, OSError) as error:
        # The latter two are what it finds when it is given up at the moment of a hang-up.
        raise QemuError(
            f"{label}: {_cause(error)}", outcome=Outcome.NO_EFFECT, subject=label
        ) from error
    except AssertionError as error:
        # It hung up right after the greeting, and qemu.qmp asserts that it did not.
        cause = _cause(await _close(client, sock))
        raise QemuError(f"{label}: {cause}", outcome=Outcome.NO_EFFECT, subject=label) from error
    finally:
        if client.runstate is Runstate.IDLE:
            sock.close()
