# SPDX-License-Identifier: GPL-2.0-or-later
"""Interrupted, mdo undoes what it did and says so; interrupted twice, it stops at once.

Real processes and real signals, which each sends to itself when it has come to a point.
What follows a second signal is a crash like any other: ``mdo recover`` undoes it.
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
from campaign.test_crash import DESTROY, done, recovered
from campaign.world import Foreign, Look, clear, differences, look

SIGNALS = [(signal.SIGINT, 130), (signal.SIGTERM, 143)]
MOMENTS = ("begin create mvgpu-256M", "done create mvgpu-12", "begin start", "done start")


def send(number: int, moment: str, *, again: bool = False) -> Hook:
    """A signal to ourselves at the first point that begins so, and once more a moment later."""
    sent: list[str] = []

    def hook(what: str, _number: int) -> None:
        if not sent and what.startswith(moment):
            sent.append(what)
            os.kill(os.getpid(), number)
            if again:
                threading.Timer(0.05, os.kill, (os.getpid(), number)).start()

    return hook


@pytest.mark.parametrize(("number", "status"), SIGNALS)
def test_an_apply_is_undone(
    place: Path, others: Foreign, empty: Look, tally: Tally, number: int, status: int
) -> None:
    spec = specs.known(place)
    failures = []
    for moment in MOMENTS[::EVERY]:
        ended = mdo("apply", spec, hook=send(number, moment))
        left = differences(empty, look(others))
        if (ended.status, ended.err.splitlines()[-1]) != (
            status,
            "mdo: interrupted; all was undone",
        ):
            left.append(f"not as it should be: {ended}")
        failures += tally.count("interrupted", left, f"signal {number} at '{moment}'")
        if left:
            clear(others)
    assert failures == []


@pytest.mark.parametrize(("number", "status"), SIGNALS)
def test_twice_is_at_once(
    place: Path, others: Foreign, empty: Look, tally: Tally, number: int, status: int
) -> None:
    spec = specs.known(place)
    failures = []
    for moment in MOMENTS[::EVERY]:
        ended = mdo("apply", spec, hook=send(number, moment, again=True))
        words = "mdo: interrupted again: stopped at once; mdo recover undoes what was begun"
        left = recovered() + differences(empty, look(others))
        if (ended.status, ended.err.splitlines()[-1]) != (status, words):
            left.append(f"not as it should be: {ended}")
        failures += tally.count("interrupted twice", left, f"signal {number} at '{moment}'")
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
    left = differences(was, look(others))
    if ended.status != status or "mdo: interrupted; " not in ended.err:
        left.append(f"not as it should be: {ended}")
    assert tally.count("interrupted", left, f"signal {number} in a destroy") == []
    done(*DESTROY)
