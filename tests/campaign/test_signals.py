# SPDX-License-Identifier: GPL-2.0-or-later
"""Interrupted, mdo undoes what it did and says so; interrupted again, it stops at once.

Real processes and real signals, which each sends to itself when it has come to a point. A signal
that comes twice within a moment is one: ``timeout`` sends it to its child and to the process group.
What follows a second one is a crash like any other: ``mdo recover`` undoes it.
"""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest

from campaign import specs
from campaign.command import Hook, mdo
from campaign.conftest import EVERY, Tally
from campaign.works import DESTROY, done, recovered
from campaign.world import Foreign, Look, clear, denials, differences, look

SIGNALS = [(signal.SIGINT, 130), (signal.SIGTERM, 143)]
MOMENTS = ("begin create mvgpu-256M", "done create mvgpu-12", "begin start", "done start")


def send(number: int, moment: str, *, then: int | None = None) -> Hook:
    """A signal to the command itself at the first point that begins so.

    :param then: Another signal a moment later.
    """
    sent: list[str] = []

    def hook(what: str, _number: int) -> None:
        if not sent and what.startswith(moment):
            sent.append(what)
            os.kill(os.getpid(), number)
            if then is not None:
                threading.Timer(0.05, os.kill, (os.getpid(), then)).start()

    return hook


@pytest.mark.parametrize("twice", [False, True], ids=["once", "twice in a moment"])
@pytest.mark.parametrize(("number", "status"), SIGNALS)
def test_an_apply_is_undone(
    place: Path, others: Foreign, empty: Look, tally: Tally, number: int, status: int, twice: bool
) -> None:
    spec = specs.known(place)
    failures = []
    for moment in MOMENTS[::EVERY]:
        ended = mdo("apply", spec, hook=send(number, moment, then=number if twice else None))
        now = look(others)
        left = differences(empty, now) + denials(ended.err, empty, lambda: now)  # noqa: B023
        if (ended.status, ended.err.splitlines()[-1]) != (
            status,
            "mdo: interrupted; all was undone",
        ):
            left.append(f"not as it should be: {ended}")
        where = f"signal {number}{' twice' * twice} at '{moment}'"
        failures += tally.count("interrupted", left, where)
        if left:
            clear(others)
    assert failures == []


@pytest.mark.parametrize(
    ("number", "then"), [(signal.SIGINT, signal.SIGTERM), (signal.SIGTERM, signal.SIGINT)]
)
def test_another_one_is_at_once(
    place: Path, others: Foreign, empty: Look, tally: Tally, number: int, then: int
) -> None:
    spec = specs.known(place)
    failures = []
    for moment in MOMENTS[::EVERY]:
        ended = mdo("apply", spec, hook=send(number, moment, then=then))
        words = "mdo: interrupted again: stopped at once; mdo recover undoes what was begun"
        left = recovered() + differences(empty, look(others))
        if (ended.status, ended.err.splitlines()[-1]) != (128 + then, words):
            left.append(f"not as it should be: {ended}")
        failures += tally.count(
            "interrupted twice", left, f"signals {number} and {then} at '{moment}'"
        )
        if left:
            clear(others)
    assert failures == []


@pytest.mark.parametrize(("number", "status"), SIGNALS)
def test_a_destroy_that_waits_for_guests(
    place: Path, others: Foreign, empty: Look, tally: Tally, number: int, status: int
) -> None:
    """They do not power down, and it would wait for a minute."""
    done("apply", specs.known(place))
    was = look(others)
    ended = mdo("destroy", "one", "--deadline", "60", hook=send(number, "begin stop"))
    now = look(others)
    left = differences(was, now) + denials(ended.err, was, lambda: now)
    if ended.status != status or "mdo: interrupted; " not in ended.err:
        left.append(f"not as it should be: {ended}")
    assert tally.count("interrupted", left, f"signal {number} in a destroy") == []
    done(*DESTROY)
