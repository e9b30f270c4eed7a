# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMU does not answer in time when it is told to add or to delete a device, and does so later.

It is stopped (SIGSTOP) right before it gets the command, and goes on when ``mdo`` has ended. Or it
waits in the open of the device, in the driver, for longer than the deadline. What has become of the
command is not known then, so nothing may be said to be unchanged, and ``mdo recover`` finds out.
"""

from __future__ import annotations

import asyncio
import os
import signal
from itertools import count
from pathlib import Path

import pytest

from campaign import specs
from campaign.command import DEVICE_COMMANDS, Hook, mdo
from campaign.conftest import EVERY, Tally
from campaign.works import UUIDS, WORKS, Work, create, half_done, start
from campaign.world import Foreign, Look, clear, denials, look
from lab import vfio
from lab.machine import machine
from mdev_orchestrator.qemu import hotplug, process

ANSWER_SECONDS = 120.0
"""For a QEMU that goes on to answer."""

STOPPED = {
    name: WORKS[name]
    for name in (
        *("attach", "attach a new device", "detach", "detach and remove"),
        *("remove from a guest", "changed apply"),
    )
}
STOPPED["changed apply"] = Work(
    STOPPED["changed apply"].before,
    lambda place: ("apply", specs.changed(place), "--deadline", "5"),
)


def is_told(point: str) -> bool:
    """Whether QEMU is about to be told to add or to delete a device."""
    return point.startswith(tuple(f"before {command} " for command in DEVICE_COMMANDS))


def stop_at(number: int) -> Hook:
    """SIGSTOP for the QEMU that gets the so-many-th command about a device."""
    seen: list[str] = []

    def hook(what: str, _: int) -> None:
        if is_told(what):
            seen.append(what)
            if len(seen) == number:
                record = process.find(machine(), what.rsplit(maxsplit=1)[-1]).record
                assert record is not None
                os.kill(record.pid, signal.SIGSTOP)

    return hook


def stopped_guests() -> list[process.RunningGuest]:
    """The guests whose QEMU is stopped."""
    return [
        guest
        for guest in process.list_guests(machine())
        if guest.alive and guest.record is not None and state_of(guest.record.pid) == "T"
    ]


def state_of(pid: int) -> str:
    """A process's state, as the kernel abbreviates it; empty for one that has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def go_on(guests: list[process.RunningGuest]) -> None:
    """SIGCONT for some guests, and wait until they have done what they were told meanwhile."""
    for guest in guests:
        assert guest.record is not None
        os.kill(guest.record.pid, signal.SIGCONT)
    for guest in guests:
        asyncio.run(hotplug.mdevs_of(guest, deadline=ANSWER_SECONDS))


@pytest.mark.parametrize("name", list(STOPPED))
def test_stopped(place: Path, others: Foreign, empty: Look, tally: Tally, name: str) -> None:
    work = STOPPED[name]
    whole = work.whole(place, others)
    failures = []
    for number in count(1, EVERY):
        was = work.prepare(place, others)
        ended = mdo(*work.command(place), hook=stop_at(number))
        guests = stopped_guests()
        if not guests:
            assert ended.status == 0, ended
            break
        left = denials(ended.err, was, lambda: look(others))
        go_on(guests)
        left += denials(ended.err, was, lambda: look(others))  # what was late is there by now
        if ended.status == 0:
            left.append("it succeeded without an answer of QEMU")
        left += work.recovered(place)
        left += half_done(was, whole, look(others))
        told = [point for point in ended.points if is_told(point)]
        if left:
            left.append(str(ended))
        where = f"stopped at command {number}, {told[number - 1]!r}"
        failures += tally.count(f"{name}: QEMU stopped", left, where)
    clear(others)
    assert failures == []


def hot(place: Path, name: str, *uuids: str) -> str:
    """A spec of one guest with these devices."""
    devices: list[specs.Spec] = [{"type": "mvgpu-128M", "uuid": uuid} for uuid in uuids]
    return specs.write(place / f"{name}.json", specs.guest("hot", *devices))


SLOW: dict[str, tuple[Work, str]] = {
    "attach": (WORKS["attach"], UUIDS[0]),
    "apply that attaches two, the first": (
        Work(
            lambda place: [("apply", hot(place, "less", UUIDS[0]))],
            lambda place: ("apply", hot(place, "more", *UUIDS[:3]), "--deadline", "3"),
        ),
        UUIDS[1],
    ),
    "apply that attaches two, the second": (
        Work(
            lambda place: [("apply", hot(place, "less", UUIDS[0]))],
            lambda place: ("apply", hot(place, "more", *UUIDS[:3]), "--deadline", "3"),
        ),
        UUIDS[2],
    ),
    "guest start": (
        Work(
            lambda _: [create(*UUIDS[:2])],
            lambda _: (*start(*UUIDS[:2]), "--deadline", "3"),
        ),
        UUIDS[1],
    ),
}


@pytest.mark.parametrize("seconds", [8, 75], ids=["late", "later than the undo"])
@pytest.mark.parametrize("name", list(SLOW))
def test_the_open_takes_longer_than_the_deadline(
    place: Path, others: Foreign, empty: Look, tally: Tally, name: str, seconds: int
) -> None:
    work, uuid = SLOW[name]
    whole = work.whole(place, others)
    was = work.prepare(place, others)
    with vfio.fault("open", f"delay_ms={seconds * 1000} uuid={uuid}") as fault:
        ended = mdo(*work.command(place))
        left = denials(ended.err, was, lambda: look(others))
        assert "hits=0" not in fault(), fault()
    for guest in process.list_guests(machine()):
        if guest.alive:
            asyncio.run(hotplug.mdevs_of(guest, deadline=ANSWER_SECONDS))
    left += denials(ended.err, was, lambda: look(others))
    if ended.status == 0:
        left.append("it succeeded without an answer of QEMU")
    left += work.recovered(place)
    left += half_done(was, whole, look(others))
    if left:
        left.append(str(ended))
    where = f"open of {uuid} takes {seconds} s"
    assert tally.count(f"{name}: open late", left, where) == []
    clear(others)
