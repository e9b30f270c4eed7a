# SPDX-License-Identifier: GPL-2.0-or-later
"""Lines between the lab's client and its agent."""

from hypothesis import given
from hypothesis import strategies as st

from mdev_lab import wire

words = st.text("abcdefghijklmnopqrstuvwxyz0123456789", min_size=1, max_size=16)


@given(words, words, st.binary(max_size=4096))
def test_what_is_encoded_is_decoded(session: str, verb: str, payload: bytes) -> None:
    assert wire.decode(wire.encode(session, verb, payload)) == (session, verb, payload)


@given(st.binary(max_size=300))
def test_noise_is_dropped_or_three_words(noise: bytes) -> None:
    message = wire.decode(noise)
    assert message is None or len(message) == 3


@given(st.lists(st.tuples(words, words, st.binary(max_size=64)), max_size=8), st.data())
def test_lines_are_found_wherever_the_stream_is_cut(
    messages: list[tuple[str, str, bytes]], data: st.DataObject
) -> None:
    stream = b"".join(wire.encode(*message) for message in messages)
    lines = wire.Lines()
    found: list[tuple[str, str, bytes]] = []
    while stream:
        size = data.draw(st.integers(1, len(stream)))
        found += lines.feed(stream[:size])
        stream = stream[size:]
    assert found == messages


def test_what_a_client_that_went_away_left_is_dropped() -> None:
    lines = wire.Lines()
    torn = wire.encode("old", "out", b"half of it")[7:]
    assert list(lines.feed(torn + wire.encode("new", "ready"))) == [("new", "ready", b"")]


def test_a_line_without_end_does_not_fill_memory() -> None:
    lines = wire.Lines()
    for _ in range(40):
        assert list(lines.feed(b"x" * 65536)) == []
    assert list(lines.feed(b"\n" + wire.encode("s", "exit", b"0"))) == [("s", "exit", b"0")]
