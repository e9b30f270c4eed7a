# SPDX-License-Identifier: GPL-2.0-or-later
"""``mdo`` is killed before and after every single step; ``mdo recover`` then leaves all or nothing.

For each point the command runs anew, kills itself there (SIGKILL), and ``mdo recover`` runs after
it. What is then on the machine is compared with what was there before, whole: devices, counts,
links, guests, files, journal, processes, foreign objects.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest

from campaign import booted, specs
from campaign.command import Ended, at, kill_at, mdo
from campaign.conftest import EVERY, Tally
from campaign.works import DESTROY, WORKS, done, half_done, recovered
from campaign.world import Foreign, Look, clear, denials, differences, look
from lab import vfio
from lab.machine import machine
from mdev_orchestrator.engine.journal_db import read_managed

CLOCKED = 6
"""Times that a command is killed by the clock, in the middle of whatever it does."""


def campaign(
    what: str,
    command: tuple[str, ...],
    prepare: Callable[[], Look],
    judge: Callable[[Look, Look], list[str]],
    others: Foreign,
    tally: Tally,
    recover: Callable[[], list[str]] = recovered,
) -> list[str]:
    """Kill a command at every point that it has, and some times in between.

    :param prepare: Makes the machine as the command is to find it, and tells how that is.
    :param judge: What is wrong, from how it was before and how it is after ``mdo recover``.
    :param recover: Does that, and gives why it did not succeed.
    """
    failures: list[str] = []
    longest = 0.0

    def after(ended: Ended, was: Look, where: str) -> None:
        left = denials(ended.err, was, lambda: look(others))
        left += recover() + judge(was, look(others))
        failures.extend(tally.count(what, left, where))
        if left:
            clear(others)

    for number in count(1, EVERY):
        was = prepare()
        begun = time.monotonic()
        ended = mdo(*command, hook=kill_at(number))
        longest = max(longest, time.monotonic() - begun)
        if not ended.killed:
            assert ended.status == 0, ended
            break
        after(ended, was, f"killed at point {number}, {ended.points[-1]!r}")
    # not for cryptography
    clock = random.Random(2016)  # noqa: S311
    for _ in range(max(CLOCKED // EVERY, 1)):
        was = prepare()
        seconds = clock.uniform(0, longest)
        ended = mdo(*command, after=seconds)
        where = f"killed after {seconds:.2f} s, past {ended.points[-1:]}"
        after(ended, was, where)
    return failures


def die() -> None:
    """SIGKILL for the calling process."""
    os.kill(os.getpid(), signal.SIGKILL)


def nothing(was: Look, now: Look) -> list[str]:
    return differences(was, now)


def test_apply(place: Path, others: Foreign, empty: Look, tally: Tally) -> None:
    """Three guests, seven devices, two groups."""
    spec = specs.three(place)
    done("apply", spec)
    whole = look(others)
    assert len(whole["devices"]) == 7, whole
    done(*DESTROY)
    assert differences(empty, look(others)) == []

    def prepare() -> Look:
        if read_managed(machine()).specs:  # the last one was killed when all was done
            done(*DESTROY)
            assert differences(empty, look(others)) == []
        return empty

    def judge(was: Look, now: Look) -> list[str]:
        return half_done(was, whole, now)

    assert campaign("apply", ("apply", spec), prepare, judge, others, tally) == []


def test_changed(place: Path, others: Foreign, empty: Look, tally: Tally) -> None:
    """A device is detached, two are attached; a guest, a group and a pool come, a pool goes."""
    plain, before, changed = specs.plain(place), specs.before(place), specs.changed(place)
    done("apply", plain)
    done("apply", before)
    done("apply", changed)
    whole = look(others)

    def prepare() -> Look:
        now = look(others)
        if now["our specs"] and not differences(whole, now, shape=True):
            done(*DESTROY)
            now = look(others)
        if not now["our specs"]:
            done("apply", plain)
            done("apply", before)
            now = look(others)
        return now

    def judge(was: Look, now: Look) -> list[str]:
        return half_done(was, whole, now)

    assert campaign("changed apply", ("apply", changed), prepare, judge, others, tally) == []


@pytest.mark.parametrize("name", [name for name in WORKS if "apply" not in name])
def test_every_verb(place: Path, others: Foreign, empty: Look, tally: Tally, name: str) -> None:
    work = WORKS[name]
    whole = work.whole(place, others)

    def prepare() -> Look:
        return work.prepare(place, others)

    def judge(was: Look, now: Look) -> list[str]:
        return half_done(was, whole, now)

    def recover() -> list[str]:
        return work.recovered(place)

    command = work.command(place)
    assert campaign(name, command, prepare, judge, others, tally, recover) == []
    clear(others)


def test_recover_undoes(place: Path, others: Foreign, empty: Look, tally: Tally) -> None:
    """An apply was killed when all was done but not yet said; then its recovery is killed."""
    spec = specs.three(place)
    said = done("apply", spec).points.index("before end") + 1
    done(*DESTROY)

    def prepare() -> Look:
        assert mdo("apply", spec, hook=kill_at(said)).killed
        return empty

    assert campaign("recover of an apply", ("recover",), prepare, nothing, others, tally) == []


def test_recover_finishes(place: Path, others: Foreign, empty: Look, tally: Tally) -> None:
    """A destroy was killed when it had begun; then its recovery is killed."""
    spec = specs.three(place)

    def prepare() -> Look:
        done("apply", spec)
        assert mdo(*DESTROY, hook=at("begin", die)).killed  # the first step has begun
        return empty

    assert campaign("recover of a destroy", ("recover",), prepare, nothing, others, tally) == []


def test_booted_guest(place: Path, others: Foreign, empty: Look, tally: Tally) -> None:
    """A guest that runs gives up one device and is given another; it survives every crash."""
    before = booted.spec(place, "before.json", "mvgpu-128M", "mvgpu-256M")
    changed = booted.spec(place, "changed.json", "mvgpu-128M", "mvgpu-12")
    done("apply", before)
    pid = booted.answers()
    done("apply", changed)
    whole = look(others)

    def prepare() -> Look:
        done("apply", before)  # the last one was killed when all was done
        assert booted.answers() == pid
        return look(others)

    def judge(was: Look, now: Look) -> list[str]:
        if booted.answers() != pid:
            return ["it is another QEMU"]
        return half_done(was, whole, now)

    failures = campaign("booted guest", ("apply", changed), prepare, judge, others, tally)
    assert failures == []


def test_restarted_guest(place: Path, others: Foreign, empty: Look, tally: Tally) -> None:
    """A guest is powered down and started again with more memory; or it is as it was."""
    before = booted.spec(place, "before.json", "mvgpu-128M")
    larger = booted.spec(place, "larger.json", "mvgpu-128M", memory="320M")

    def prepare() -> Look:
        done("apply", before, "--restart")
        booted.answers()
        return look(others)

    def judge(was: Look, now: Look) -> list[str]:
        booted.answers()
        return differences(was, now)

    command = ("apply", larger, "--restart")
    assert campaign("restarted guest", command, prepare, judge, others, tally) == []


@pytest.mark.parametrize(
    ("fault", "object_"),
    [
        ("create", specs.KNOWN["one"][0]),
        ("create", specs.KNOWN["three"][1]),
        ("start", specs.PEERS),
        ("start", specs.KNOWN["three"][0]),
        ("open", specs.KNOWN["two"][1]),
    ],
)
def test_slow_driver(
    place: Path, others: Foreign, empty: Look, tally: Tally, fault: str, object_: str
) -> None:
    """Killed while a driver takes its time: what it was asked goes on, and recover waits for it."""
    spec = specs.known(place)

    def die_when(struck: Callable[[], str]) -> None:
        while "hits=0" in struck():
            time.sleep(0.1)
        die()

    with vfio.fault(fault, f"delay_ms=15000 uuid={object_}") as struck:
        watch = threading.Thread(target=die_when, args=(struck,), daemon=True)
        ended = mdo("apply", spec, hook=lambda _, number: watch.start() if number == 1 else None)
        assert ended.killed, ended
        left = recovered() + differences(empty, look(others))
    assert tally.count("slow driver", left, f"{fault} of {object_} takes 15 s") == []
