# SPDX-License-Identifier: GPL-2.0-or-later
"""One tree of errors.

Whatever goes wrong on purpose is a :class:`MdoError`: one line that says what happened and to
which object, a hint that says what to do, and the exit code that the command line ends with::

    MdoError                 1   the kernel or the system said no
    ├── RequestError         2   what was asked cannot be: bad input, unknown, does not fit, held
    │   ├── UuidError            a UUID that is none, or is taken
    │   ├── UnknownError         a type, parent, mdev or guest that is not there, or not just one
    │   ├── CapacityError        no instance left
    │   └── BusyError            held by a guest or by another process
    ├── QemuError            3   QEMU did not start, died, or answered nonsense
    │   └── CommandError         QEMU refused a command of its monitor
    ├── DeadlineError        4   something did not happen in time
    └── HostError            5   the host lacks something: module, node, permission, program

Anything else that reaches the command line is a bug and is reported as one.

What is known of an act that failed is the error's :class:`Outcome`, which is set where the kernel
or QEMU answers. The class of an error says what the user can do about it and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum


class Outcome(StrEnum):
    """What is known of an act on the machine when it has ended."""

    DONE = "done"
    """The kernel or QEMU said so, and reading back agrees."""
    NO_EFFECT = "no effect"
    """A known errno of the write, or an error reply of QMP to that very command."""
    UNKNOWN = "unknown"
    """Anything else: a deadline, a hang-up, a killed helper, a reply that makes no sense."""


def one_line(text: str) -> str:
    """Make one line of a text, without characters that would control a terminal.

    Messages quote files, drivers and QEMU. A line's end becomes a space, any other character that
    cannot be shown is written as in Python's literals.
    """
    text = " ".join(text.splitlines())
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class MdoError(Exception):
    """A failure that a user can act on.

    :ivar message: What happened and to which object; one line.
    :ivar hint: What to do about it; one line; may be empty.
    :ivar outcome: What is known of the act that failed; ``None`` if no act had to do with it.
    :ivar subject: The object, such as ``mdev UUID`` or ``guest NAME``; may be empty.
    :ivar errno: The kernel's error number; ``None`` if the kernel gave none.
    :ivar details: What helps to find the cause and is too long for a message, such as QEMU's whole
        command line; may be empty.
    """

    exit_code = 1

    def __init__(
        self,
        message: str,
        hint: str = "",
        *,
        outcome: Outcome | None = None,
        subject: str = "",
        errno: int | None = None,
        details: str = "",
    ) -> None:
        self.message = one_line(message)
        self.hint = one_line(hint)
        self.outcome = outcome
        self.subject = subject
        self.errno = errno
        self.details = details
        super().__init__(self.message)

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


@contextmanager
def before_acting() -> Iterator[None]:
    """Mark errors that leave the block as having had no effect: no act has begun yet."""
    try:
        yield
    except MdoError as error:
        error.outcome = Outcome.NO_EFFECT
        raise


class RequestError(MdoError):
    """What was asked cannot be done as asked."""

    exit_code = 2


class UuidError(RequestError):
    """A UUID is malformed, given twice, or already in use."""


class UnknownError(RequestError):
    """An object that was named is not there, or the name fits several."""


class CapacityError(RequestError):
    """The host has not enough instances left."""


class BusyError(RequestError):
    """Another process holds the object, for instance a running guest."""


class QemuError(MdoError):
    """QEMU failed to start, ended early, or broke the protocol."""

    exit_code = 3


class CommandError(QemuError):
    """QEMU refused a command, so the command had no effect.

    :ivar command: The command's name.
    :ivar qmp_class: QMP's class of the error, for instance ``DeviceNotFound``.
    :ivar description: QEMU's own words.
    """

    def __init__(
        self, message: str, hint: str = "", *, command: str, qmp_class: str, description: str
    ) -> None:
        super().__init__(message, hint, outcome=Outcome.NO_EFFECT)
        self.command = command
        self.qmp_class = qmp_class
        self.description = description


class DeadlineError(MdoError):
    """Something did not happen within its deadline."""

    exit_code = 4


class HostError(MdoError):
    """The host lacks something that is needed."""

    exit_code = 5
