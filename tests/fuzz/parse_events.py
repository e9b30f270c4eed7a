# SPDX-License-Identifier: GPL-2.0-or-later
"""Lines from elsewhere: a uevent, the command line of a process, a message of L1's agent."""

from mdev_orchestrator.host import events, holders
from mdev_orchestrator.lab import wire


def one(data: bytes) -> None:
    """The input: ``KEY=VALUE`` ended by zero bytes, as the kernel sends them, or such arguments."""
    words = [word.decode("utf-8", "surrogateescape") for word in data.split(b"\0")]
    pairs = (word.partition("=") for word in words)
    event = events.interpret({key: value for key, equals, value in pairs if equals})
    if isinstance(event, events.MdevEvent):
        assert event.state in {None, "online", "offline"}
    if isinstance(event, events.NodeEvent):
        assert event.node.startswith("/dev/")
    name = holders.guest_name(words)
    assert name is None or name
    _wire(data)


def _wire(data: bytes) -> None:
    """However the bytes are cut, the same messages come out, and each can be encoded again."""
    whole = list(wire.Lines().feed(data))
    lines = wire.Lines()
    assert [m for byte in data for m in lines.feed(bytes([byte]))] == whole
    for session, verb, payload in whole:
        assert wire.decode(wire.encode(session, verb, payload)) == (session, verb, payload)
