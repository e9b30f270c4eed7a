# SPDX-License-Identifier: GPL-2.0-or-later
"""Each step fails, for each reason that it can have; all is as before, and the error says it.

The faults are real: the driver refuses (its own fault injection), a parent goes, another program
fills a pool, QEMU does not start, a guest does not let go, a disk is full. What is on the machine
after the command is compared with what was there before, whole, as in the crash campaign; but
nothing repairs in between.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from campaign import specs
from campaign.command import Ended, Hook, at, mdo
from campaign.conftest import EVERY, Tally
from campaign.works import DESTROY, done, recovered
from campaign.world import Foreign, Look, clear, denials, differences, look, small_disk
from lab import vfio

SAMPLES = os.environ.get("MDO_LAB_SAMPLES")
ALL = [uuid for uuids in specs.KNOWN.values() for uuid in uuids]


@dataclass
class Campaign:
    """Fails commands and looks what is left.

    :ivar failures: Everything that was not as it should be.
    """

    others: Foreign
    tally: Tally
    failures: list[str]

    def fails(
        self,
        what: str,
        where: str,
        command: tuple[str, ...],
        was: Look,
        *,
        status: int,
        words: tuple[str, ...],
        hook: Hook | None = None,
        ignored: tuple[str, ...] = (),
    ) -> Ended:
        """A command that must fail with a status and say certain words, and leave nothing.

        :param ignored: What may differ, since the test itself has changed it.
        """
        ended = mdo(*command, hook=hook)
        left = []
        if ended.status != status:
            left.append(f"exit status {ended.status}, not {status}: {ended}")
        error = ended.err.splitlines()[-1] if ended.err else ""
        left += [f"{word!r} is not in: {error}" for word in words if word not in error]
        now = look(self.others)
        left += denials(ended.err, was, lambda: now, ignored)
        left += differences({key: was[key] for key in was if key not in ignored}, now)
        self.failures += self.tally.count(what, left, where)
        if left:
            clear(self.others)
        return ended


@pytest.fixture
def campaign(others: Foreign, tally: Tally) -> Campaign:
    return Campaign(others, tally, [])


@pytest.mark.parametrize(
    ("point", "number", "status", "words"),
    [
        ("create", 5, 1, ("cannot create", "Input/output error")),
        ("create", 28, 2, ("cannot create", "no instance left")),
        ("open", 5, 3, ("QEMU ended",)),
        ("region", 5, 3, ("QEMU ended",)),
    ],
)
def test_the_driver_refuses_a_device(
    place: Path,
    empty: Look,
    campaign: Campaign,
    point: str,
    number: int,
    status: int,
    words: tuple[str, ...],
) -> None:
    apply = ("apply", specs.known(place))
    for uuid in ALL[::EVERY]:
        with vfio.fault(point, f"errno={number} times=-1 uuid={uuid}") as fault:
            where = f"{point} of {uuid} fails with {number}"
            campaign.fails("driver refuses", where, apply, empty, status=status, words=words)
            assert "hits=0" not in fault(), fault()
    assert campaign.failures == []


@pytest.mark.parametrize("member", [ALL[0], ALL[3], ALL[5], ALL[6]])
def test_the_driver_refuses_a_group(
    place: Path, empty: Look, campaign: Campaign, member: str
) -> None:
    apply = ("apply", specs.known(place))
    with vfio.fault("start", f"errno=28 times=-1 uuid={member}") as fault:
        group = {ALL[0]: specs.PEERS, ALL[3]: specs.PAIR}.get(member, member)
        where = f"start of {group} fails"
        campaign.fails("start fails", where, apply, empty, status=2, words=(group,))
        assert "hits=0" not in fault(), fault()
    assert campaign.failures == []


def test_the_driver_is_late(place: Path, empty: Look, campaign: Campaign) -> None:
    """Later than the deadline, and no later than the time that is left to learn the outcome."""
    apply = ("apply", specs.known(place), "--deadline", "3")
    for uuid in (ALL[0], ALL[6]):
        with vfio.fault("create", f"delay_ms=4000 uuid={uuid}"):
            words = ("was not created within 3 s", "all was undone")
            where = f"create of {uuid} takes 4 s"
            campaign.fails("driver late", where, apply, empty, status=4, words=words)
    assert campaign.failures == []


def test_the_driver_is_silent(place: Path, empty: Look, campaign: Campaign) -> None:
    """It answers when the command has ended: recover takes away what it made."""
    spec = specs.known(place)
    with vfio.fault("create", f"delay_ms=20000 uuid={ALL[6]}"):
        ended = mdo("apply", spec, "--deadline", "2")
    assert ended.status == 4, ended
    assert "may still appear" in ended.err, ended
    assert "mdo recover" in ended.err, ended
    left = denials(ended.err, empty, lambda: look(campaign.others))
    left += recovered() + differences(empty, look(campaign.others))
    campaign.failures += campaign.tally.count("driver silent", left, "create takes 20 s")
    assert campaign.failures == []


def test_a_pool_is_filled_meanwhile(place: Path, empty: Look, campaign: Campaign) -> None:
    """Another program is quicker, after it was seen that all fits."""
    apply = ("apply", specs.known(place))
    for type_ in ("128M", "256M"):

        def fill() -> None:
            with contextlib.suppress(OSError):
                for number in range(8):
                    vfio.create("igd0", "128M", f"cccccccc-0000-4000-8000-{number:012}")

        campaign.fails(
            "pool full",
            f"igd0 is filled before the first {type_} is created",
            apply,
            empty,
            status=2,
            words=("cannot create", "igd0", "no instance left", "all was undone"),
            hook=at(f"begin create mvgpu-{type_}", fill),
            ignored=("devices", "available"),
        )
        fillers = [path.name for path in vfio.MDEVS.iterdir() if path.name.startswith("cccccccc")]
        assert fillers
        for filler in fillers:
            vfio.remove(filler)
        campaign.failures += differences(empty, look(campaign.others))
    assert campaign.failures == []


def test_links_are_taken_meanwhile(place: Path, empty: Look, campaign: Campaign) -> None:
    """Another program's group takes six of the eight before ours is started."""
    spec = specs.known(place, two={"mdev": []}, three={"mdev": []})

    def take() -> None:
        taken = [vfio.create("igd0", "128M") for _ in range(4)]
        for uuid in taken:
            vfio.put(uuid, "group_uuid", "dddddddd-0000-4000-8000-000000000001")
        vfio.put(taken[0], "online", "1")

    campaign.fails(
        "links taken",
        "another program's group comes online before ours is started",
        ("apply", spec),
        empty,
        status=2,
        words=(specs.PEERS, "links", "all was undone"),
        hook=at("begin start guest one", take),
        ignored=("devices", "available", "links"),
    )
    clear(campaign.others)
    assert campaign.failures == []


@pytest.mark.skipif(SAMPLES is None, reason="needs MDO_LAB_SAMPLES")
@pytest.mark.parametrize("moment", ["begin create mtty", "done create mtty"])
def test_a_parent_goes(
    place: Path, others: Foreign, tally: Tally, empty: Look, moment: str
) -> None:
    """The driver of one device is unloaded before it is created, and when it has been."""
    subprocess.run(["insmod", f"{SAMPLES}/mtty.ko"], check=True)
    try:
        mtty = next(path.name for path in vfio.PARENTS.iterdir() if "mtty" in path.name)
        spec = specs.write(
            place / "mtty.json",
            specs.guest("one", {"type": "mvgpu-128M", "count": 2, "group": "pair"}),
            specs.guest("two", {"type": "mtty-1"}),
            specs.guest("three", {"type": "mvgpu-12"}),
        )

        def unload() -> None:
            subprocess.run(["rmmod", "mtty"], check=True)

        where = f"{mtty} goes at '{moment}'"
        words = ("mdev",) if moment.startswith("done") else ("mtty",)
        ended = mdo("apply", spec, hook=at(moment, unload))
        now = look(others)
        left = differences(empty, now) + denials(ended.err, empty, lambda: now)
        error = ended.err.splitlines()[-1]
        if ended.status != 2 or not all(word in error for word in (*words, "all was undone")):
            left.append(f"not as it should be: {ended}")
        assert tally.count("parent goes", left, where) == []
    finally:
        subprocess.run(["rmmod", "mtty"], check=False, stderr=subprocess.DEVNULL)


def test_qemu_does_not_start(place: Path, empty: Look, campaign: Campaign) -> None:
    dies = place / "dies"
    dies.write_text("#!/bin/sh\necho no wish to live >&2\nexit 7\n")
    dies.chmod(0o755)
    killed = place / "killed"
    killed.write_text("#!/bin/sh\nkill -SEGV $$\n")
    killed.chmod(0o755)
    reasons: dict[str, tuple[specs.Spec, int, tuple[str, ...]]] = {
        "bad argument": ({"extra": ["-no-such-option"]}, 3, ("no-such-option",)),
        "QEMU dies": ({"qemu": str(dies)}, 3, ("status 7", "no wish to live")),
        "QEMU is killed": ({"qemu": str(killed)}, 3, ("signal 11",)),
        "no QEMU": ({"qemu": "no-such-qemu"}, 5, ("no program no-such-qemu",)),
        "no memory": ({"memory": "64G"}, 3, ("QEMU ended",)),
    }
    for name in list(specs.KNOWN)[:: min(EVERY, 2)]:
        for reason, (change, status, words) in reasons.items():
            campaign.fails(
                "QEMU does not start",
                f"{reason}, guest {name}",
                ("apply", specs.known(place, **{name: change})),
                empty,
                status=status,
                words=(f"guest {name}" if status == 3 else "", *words),
            )
    assert campaign.failures == []


def test_a_guest_does_not_unplug(place: Path, empty: Look, campaign: Campaign) -> None:
    """It has not booted, so it answers nothing; what was plugged into it goes again."""
    silent = {"extra": ["-S"]}
    pool = {"name": "spare", "type": "mvgpu-128M"}
    other = specs.guest("other", {"type": "mvgpu-12"})
    first = specs.guest("hot", {"type": "mvgpu-128M"}, {"type": "mvgpu-256M"}, **silent)
    done("apply", specs.write(place / "first.json", first, other, pools=(pool,)))
    was = look(campaign.others)
    then = specs.guest("hot", {"type": "mvgpu-128M"}, **silent)
    more = specs.guest("new", {"type": "mvgpu-12"})
    campaign.fails(
        "guest does not unplug",
        "guest hot is asked to give up a device",
        ("apply", specs.write(place / "then.json", then, other, more)),
        was,
        status=4,
        words=("guest hot did not let go of", "all was undone"),
    )
    assert campaign.failures == []


def test_a_guest_does_not_power_down(place: Path, empty: Look, campaign: Campaign) -> None:
    done("apply", specs.known(place))
    was = look(campaign.others)
    campaign.fails(
        "guest does not power down",
        "destroy without force",
        ("destroy", "one", "--deadline", "1"),
        was,
        status=4,
        words=("did not power down within 1 s", "all was undone"),
    )
    assert campaign.failures == []


def test_a_device_is_held_at_its_removal(place: Path, empty: Look, campaign: Campaign) -> None:
    """Guests have stopped by then: they are started again."""
    pool = {"name": "spare", "type": "mvgpu-128M", "uuid": ALL[0]}
    one = specs.guest("one", {"type": "mvgpu-12", "count": 2, "group": "pair"})
    done("apply", specs.write(place / "pool.json", one, pools=(pool,)))
    with vfio.Child(ALL[0]) as holder:
        was = look(campaign.others)
        campaign.fails(
            "device held",
            "destroy of a pool that a process has open",
            DESTROY,
            was,
            status=2,
            words=(f"mdev {ALL[0]} is held by", f"pid {holder.pid}", "all was undone"),
        )
    assert campaign.failures == []


def hold(uuid: str, note: Path) -> None:
    """Open an mdev in a process of its own, which writes its pid when that is done."""
    if not os.fork():
        os.setsid()
        held = vfio.Device(uuid)
        note.write_text(str(os.getpid()))
        while held:
            time.sleep(60)
    while not note.exists() or not note.read_text():
        time.sleep(0.05)


def test_an_undo_fails_too(place: Path, empty: Look, campaign: Campaign) -> None:
    """It stands beside the first error, and recover ends it when nothing is in its way any more."""
    spec = specs.known(place)
    note = place / "held"
    late, alone = specs.KNOWN["three"]
    hook = at(f"done create mvgpu-256M on igd0: mdev {alone}", lambda: hold(alone, note))
    with vfio.fault("create", f"errno=5 delay_ms=8000 times=-1 uuid={late}"):
        ended = mdo("apply", spec, hook=hook)
    error = ended.err.splitlines()[-1]
    left = denials(ended.err, empty, lambda: look(campaign.others))
    if ended.status != 1 or "Input/output error" not in error.partition(";")[0]:
        left.append(f"the first error is not the first: {ended}")
    if "could not undo: create" not in error or f"mdev {alone} is held by" not in error:
        left.append(f"the undo that failed is not beside it: {ended}")
    os.kill(int(note.read_text()), signal.SIGKILL)
    left += recovered() + differences(empty, look(campaign.others))
    campaign.failures += campaign.tally.count("undo fails", left, f"mdev {alone} is held")
    assert campaign.failures == []


def test_the_disk_is_full(place: Path, others: Foreign, empty: Look, campaign: Campaign) -> None:
    """At every point of an apply. What cannot be written is undone; recover says so in the journal.

    The first point is before anything has been done, and the last when all has been.
    """
    spec = specs.known(place)
    points = len(done("apply", spec).points)
    done(*DESTROY)
    for number in range(1, points + 1, 3 * EVERY):
        with small_disk(place) as fill:
            was = look(others)

            def hook(_what: str, seen: int, number: int = number, fill: Any = fill) -> None:  # noqa: ANN401
                if seen == number:
                    fill()

            ended = mdo("apply", spec, hook=hook)
            now = look(others)
            bookkeeping = ("open runs", "claims", "our devices", "our guests", "our specs")
            left = differences({k: v for k, v in was.items() if k not in bookkeeping}, now)
            left += denials(ended.err, was, lambda now=now: now)
            error = ended.err.splitlines()[-1]
            if ended.status != 5 or not ("full" in error or "No space" in error):
                left.append(f"not as it should be: {ended}")
            (place / "small" / "filler").unlink()
            left += recovered() + differences(was, look(others))
            at_point = f"at point {number}, {ended.points[number - 1 : number]}"
            campaign.failures += campaign.tally.count("disk full", left, at_point)
            if left:
                clear(others)
    assert campaign.failures == []
