# SPDX-License-Identifier: GPL-2.0-or-later
r"""The protocol between the lab's client and its agent.

One virtio serial port carries one command at a time. Both sides write lines of three words::

    SESSION VERB PAYLOAD\n

SESSION is a random word of the client. A line with another word was meant for an earlier client and
is dropped, as is a line that is malformed. PAYLOAD is base64, ``-`` if empty.

=========  ========  ==================================================================
verb       from      payload
=========  ========  ==================================================================
``hello``  client    nothing; the agent answers ``ready``
``exec``   client    JSON: ``argv``, ``cwd``, ``env``, ``tty`` (null or [rows, columns])
``in``     client    bytes for standard input; empty ends it
``signal`` client    number of a signal for the command's process group
``size``   client    ``ROWS COLUMNS`` of the terminal
``ready``  agent     nothing
``out``    agent     bytes from standard output (or the terminal)
``err``    agent     bytes from standard error
``exit``   agent     exit status as a number; 128 + N after signal N
``fail``   agent     why the command could not be run, as text
=========  ========  ==================================================================

The agent imports this module, so it must be quick to import.
"""

from binascii import Error as Base64Error
from binascii import a2b_base64, b2a_base64
from collections.abc import Iterator

#: Longer lines are dropped: no side writes one, as payloads are cut at CHUNK bytes.
MAX_LINE = 256 * 1024
CHUNK = 32 * 1024


def encode(session: str, verb: str, payload: bytes = b"") -> bytes:
    """Return one line, ready to be written."""
    body = b2a_base64(payload, newline=False) if payload else b"-"
    return b"%s %s %s\n" % (session.encode(), verb.encode(), body)


def decode(line: bytes) -> tuple[str, str, bytes] | None:
    """Return session, verb and payload of one line; ``None`` if it is malformed."""
    words = line.split()
    if len(words) != 3:  # noqa: PLR2004 - the three words of the format above
        return None
    try:
        payload = b"" if words[2] == b"-" else a2b_base64(words[2], strict_mode=True)
        return words[0].decode("ascii"), words[1].decode("ascii"), payload
    except (Base64Error, UnicodeDecodeError):
        return None


class Lines:
    """Cuts a stream of bytes into decoded lines."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[tuple[str, str, bytes]]:
        """Return the lines that ``data`` completes, without malformed and overlong ones."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > MAX_LINE:
            self._rest = b""
        for line in lines:
            if (message := decode(line)) is not None:
                yield message
