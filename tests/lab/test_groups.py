# SPDX-License-Identifier: GPL-2.0-or-later
"""Start groups: all or none, one owner, and everything given back however it ends.

Runs inside the lab, without QEMU: ``mdo lab exec python3 -m pytest tests/lab/test_groups.py``.
"""

from __future__ import annotations

import errno
import os
import random
import select
import signal
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from lab import vfio
from lab.kernel_log import KernelLog
from lab.test_driver import refused
from lab.vfio import MV, Child, Device, Make, Uevents, get, links, put, refusal

pytestmark = pytest.mark.skipif("MDO_LAB" not in os.environ, reason="needs the lab's kernel")

LINKS = 8


@pytest.fixture
def group() -> str:
    return str(uuid4())


@pytest.fixture(scope="module", autouse=True)
def eight_links() -> Iterator[None]:
    """Whatever the lab was brought up with."""
    with vfio.loaded(links=LINKS):
        yield


def online(uuids: list[str]) -> list[str]:
    return [get(uuid, "online") for uuid in uuids]


def names(since: int) -> list[str]:
    return [event.event for event in vfio.events(since)]


def pattern(seed: int, length: int) -> int:
    """CRC-32 of what FILL leaves."""
    words = (((seed + i * MV["FILL_STEP"]) & 0xFFFFFFFF) for i in range(length // 4))
    return zlib.crc32(b"".join(word.to_bytes(4, "little") for word in words))


@pytest.mark.parametrize(("members", "asked"), [(1, 0), (2, 1), (3, 3), (4, 6)])
def test_a_group_of_n_takes_a_link_for_every_pair(
    make: Make, group: str, members: int, asked: int
) -> None:
    uuids = make(members, group)
    assert links() == LINKS
    with Device(uuids[-1]):
        assert online(uuids) == ["1"] * members
        assert links() == LINKS - asked
        assert {get(uuid, "group_links") for uuid in uuids} == {str(asked)}
        assert {get(uuid, "group_owner") for uuid in uuids} == {str(os.getpid())}
    assert online(uuids) == ["0"] * members
    assert links() == LINKS


def test_all_members_are_online_before_any_is_touched(make: Make, group: str) -> None:
    uuids = make(3, group)
    since = vfio.now()
    devices = [Device(uuid) for uuid in uuids]
    for device in reversed(devices):
        device.read("STATE")
    for device in devices:
        device.close()
    log = vfio.events(since)
    assert names(since) == [
        *("started", "started", "started", "opened", "opened", "opened"),
        *("accessed", "accessed", "accessed"),
        *("closed", "closed", "closed", "stopped", "stopped", "stopped"),
    ]
    assert {event.uuid for event in log[:3]} == set(uuids)
    assert {event.group for event in log[:3]} == {group}
    assert [event.value for event in log if event.event == "accessed"] == [1, 1, 1]


def test_one_link_too_few_commits_nothing(make: Make, group: str, kernel_log: KernelLog) -> None:
    first, second = make(4, str(uuid4())), make(3, group)
    with Child(*first):
        assert links() == 2
        since = vfio.now()
        with refused(errno.ENOSPC):
            Device(second[0])
        with refused(errno.ENOSPC):
            put(second[1], "online", "1")
        assert online(second) == ["0"] * 3
        assert online(first) == ["1"] * 4
        assert links() == 2
        assert [(e.event, e.value) for e in vfio.events(since)] == [("refused", -errno.ENOSPC)] * 2
        assert get(second[2], "group_error") == "3 members, 3 links asked, 2 of 8 left on igd0"
        assert get(second[2], "group_owner") == "0"
        (line, _) = [line for line in kernel_log.lines() if "does not start" in line]
        assert f"group {group} does not start: 3 members, 3 links asked, 2 of 8 left" in line
        assert line.partition("members:")[2].split() == second
    with Device(second[0]):
        assert links() == LINKS - 3
        assert get(second[0], "group_error") == ""


def test_a_smaller_group_still_fits(make: Make, group: str) -> None:
    first, second = make(4, str(uuid4())), make(3, group)
    with Child(*first):
        put(second[2], "group_uuid", "")
        with Device(second[0]):
            assert online(second) == ["1", "1", "0"]
            assert links() == 1


def test_links_are_those_of_one_parent(make: Make, group: str) -> None:
    first, second = make(4, group), make(4, str(uuid4()), type_="13")
    with Device(first[0]), Device(second[0]):
        assert (links("igd0"), links("grid0")) == (2, 2)


def test_a_group_has_one_parent(make: Make, group: str) -> None:
    make(1, group)
    (uuid,) = make(type_="13")
    with refused(errno.EINVAL):
        put(uuid, "group_uuid", group)
    assert get(uuid, "group_uuid") == ""


def test_a_group_has_one_owner(make: Make, group: str, kernel_log: KernelLog) -> None:
    first, second, third = make(3, group)
    with Child(first) as owner:
        with refused(errno.EBUSY):
            Device(second)
        assert refusal(third) == errno.EBUSY
        assert get(third, "group_owner") == str(owner.pid)
        assert any(
            f"belongs to process {owner.pid}: refused to process {os.getpid()}" in line
            for line in kernel_log.lines()
        )
    with Device(second):
        assert get(first, "group_owner") == str(os.getpid())


def test_threads_are_one_process(make: Make, group: str) -> None:
    first, second = make(2, group)
    opened = []
    with Device(first):
        thread = threading.Thread(target=lambda: opened.append(Device(second)))
        thread.start()
        thread.join()
        opened[0].close()


def test_what_was_passed_on_keeps_the_group(make: Make, group: str) -> None:
    """The opener counts and not the user: its descriptors hold the group when it is gone."""
    first, second = make(2, group)
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        device = Device(first)
        if os.fork():
            os.write(write, b"x")
            os._exit(0)
        os.close(read)
        signal.pause()
        device.close()
    assert os.read(read, 1) == b"x"
    os.waitpid(pid, 0)
    (heir,) = [int(p.name) for p in Path("/proc").glob("[0-9]*") if holds(p)]
    with refused(errno.EBUSY):
        Device(second)
    assert online([first, second]) == ["1", "1"]
    os.kill(heir, signal.SIGKILL)
    assert eventually(lambda: online([first, second]) == ["0", "0"])
    with Device(second):
        pass
    os.close(read)
    os.close(write)


def holds(process: Path) -> bool:
    """Whether a process has a VFIO device open."""
    try:
        return any("vfio-device" in str(fd.readlink()) for fd in (process / "fd").iterdir())
    except OSError:
        return False


def eventually(condition: Callable[[], bool], seconds: float = 10) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGABRT])
def test_however_the_owner_ends(make: Make, group: str, number: int) -> None:
    uuids = make(3, group)
    child = Child(*uuids)
    assert child.failed == 0
    assert links() == LINKS - 3
    child.end(number)
    assert online(uuids) == ["0"] * 3
    assert links() == LINKS
    with Device(uuids[0]):
        assert links() == LINKS - 3


def test_a_failed_open_of_a_later_member_leaves_the_others(make: Make, group: str) -> None:
    first, second = make(2, group)
    with Device(first) as device:
        with vfio.fault("open", f"errno={errno.EIO}"), refused(errno.EIO):
            Device(second)
        assert device.read("STATE") == MV["STATE_ONLINE"]
        with Device(second):
            pass
        assert online([first, second]) == ["1", "1"]
    assert links() == LINKS


def test_membership_is_fixed_while_online(make: Make, group: str) -> None:
    first, second = make(2, group)
    with Device(first):
        for uuid in (first, second):
            for text in ("", str(uuid4()), group):
                with refused(errno.EBUSY):
                    put(uuid, "group_uuid", text)
        with refused(errno.EBUSY):
            put(second, "online", "0")
        put(second, "online", "1")


def test_no_newcomer_by_default(make: Make, group: str) -> None:
    first, second = make(1, group)[0], make()[0]
    with Device(first):
        with refused(errno.EBUSY):
            put(second, "group_uuid", group)
        assert get(second, "group_uuid") == ""
    put(second, "group_uuid", group)


def test_newcomers_take_their_links_when_they_join(kernel_log: KernelLog, group: str) -> None:
    with vfio.loaded(links=4, group_hotplug=1):
        uuids = [vfio.create("igd0", "128M") for _ in range(4)]
        for uuid in uuids[:2]:
            put(uuid, "group_uuid", group)
        with Device(uuids[0]) as device:
            since = vfio.now()
            put(uuids[2], "group_uuid", group)
            assert names(since) == ["grouped", "started"]
            assert online(uuids) == ["1", "1", "1", "0"]
            assert links() == 1
            assert len(device.members()) == 3
            with refused(errno.ENOSPC):
                put(uuids[3], "group_uuid", group)
            assert get(uuids[3], "group_uuid") == ""
            joins = f"{uuids[3]} joins, 3 links asked, 1 of 4 left on igd0"
            assert get(uuids[0], "group_error") == joins
            assert refusal(uuids[2]) == errno.EBUSY
            with Device(uuids[2]) as newcomer:
                slot = newcomer.members()[uuids[0]]
                assert device.run("FILL", dst=0, len=4096, seed=1) == 0
                assert newcomer.run("PEER_COPY", peer=slot, src=0, dst=0, len=4096) == 0
                assert newcomer.crc(4096) == pattern(1, 4096)
            vfio.remove(uuids[2])
            assert links() == 3
            put(uuids[3], "group_uuid", group)
            assert links() == 1
        assert links() == 4
        for uuid in (uuids[0], uuids[1], uuids[3]):
            vfio.remove(uuid)


def test_started_by_online_it_has_no_owner(make: Make, group: str) -> None:
    first, second = make(2, group)
    put(first, "online", "1")
    put(second, "online", "1")
    assert online([first, second]) == ["1", "1"]
    assert (links(), get(first, "group_owner")) == (LINKS - 1, "0")
    with Child(second) as child:
        assert child.failed == 0
        assert get(first, "group_owner") == str(child.pid)
    # implicit start: the final release stops, whichever process has started
    assert online([first, second]) == ["0", "0"]
    put(first, "online", "1")
    put(second, "online", "0")
    put(second, "online", "0")
    assert links() == LINKS


def test_removal_of_a_member(make: Make, group: str) -> None:
    uuids = make(4, group)
    put(uuids[0], "online", "1")
    assert links() == 2
    since = vfio.now()
    vfio.remove(uuids[1])
    assert names(since) == ["stopped", "removed"]
    assert online([uuids[0], uuids[2], uuids[3]]) == ["1"] * 3
    assert (links(), get(uuids[0], "group_links")) == (5, "3")
    with Device(uuids[2]) as device:
        assert device.members() == {uuids[0]: 0, uuids[2]: 2, uuids[3]: 3}
        vfio.remove(uuids[3])
        vfio.remove(uuids[0])
        assert device.members() == {uuids[2]: 2}
        assert links() == LINKS


def test_everybody_is_told(make: Make, group: str) -> None:
    first, second = make(2, group)
    uevents = Uevents()
    fd = os.open(vfio.MDEVS / first / "online", os.O_RDONLY)
    try:
        assert os.read(fd, 2) == b"0\n"
        with Device(second):
            assert sorted(uevents.states()) == sorted([(first, "online"), (second, "online")])
            assert notified(fd)
            assert os.pread(fd, 2, 0) == b"1\n"
            assert not notified(fd)
        assert sorted(uevents.states()) == sorted([(first, "offline"), (second, "offline")])
        assert notified(fd)
    finally:
        os.close(fd)
        uevents.close()


def notified(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLPRI | select.POLLERR)
    events = poll.poll(0)
    return bool(events) and bool(events[0][1] & select.POLLPRI)


def test_a_copy_from_a_peer(make: Make, group: str) -> None:
    first, second, third = make(3, group)
    length = 300 << 10
    with Device(first) as one, Device(second) as two:
        slots = one.members()
        assert slots == two.members()
        assert [slots[u] for u in (first, second, third)] == [0, 1, 2]
        assert (one.read("SLOT"), two.read("SLOT"), one.read("MEMBERS")) == (0, 1, 3)
        assert one.read("FEATURES") & MV["FEATURE_PEER"]
        assert one.run("FILL", dst=0, len=length, seed=5) == 0
        assert two.run("PEER_COPY", peer=slots[first], src=0, dst=0, len=length) == 0
        assert two.crc(length) == pattern(5, length)
        assert two.run("PEER_COPY", peer=slots[first], src=8, dst=4, len=0) == 0
        for peer in (slots[second], slots[third], 3, 16, 0xFFFFFFFF):  # itself, closed, none
            assert two.run("PEER_COPY", peer=peer, src=0, dst=0, len=4) == MV["ERR_PEER"]
        size = 128 << 20
        for src, dst, n in (
            (size, 0, 4),
            (0, size - 4, 8),
            (2**64 - 4, 0, 8),
            (0, 4, 2**64 - 4),
        ):
            code = two.run("PEER_COPY", peer=slots[first], src=src, dst=dst, len=n)
            assert code == MV["ERR_RANGE"]


def test_a_peer_of_another_size(make: Make, group: str) -> None:
    (large,), (small,) = make(1, group, type_="256M"), make(1, group)
    with Device(large) as one, Device(small) as two:
        slot = two.members()[large]
        at = 200 << 20
        assert one.run("FILL", dst=at, len=4096, seed=0) == 0
        assert two.run("PEER_COPY", peer=slot, src=at, dst=0, len=4096) == 0
        assert one.run("CHECKSUM", src=at, len=4096) == 0
        assert two.crc(4096) == one.read("RESULT")
        back = one.members()[small]
        assert one.run("PEER_COPY", peer=back, src=at, dst=0, len=4096) == MV["ERR_RANGE"]


def test_no_copy_across_groups(make: Make) -> None:
    first, second, alone = make(1, str(uuid4())) + make(1, str(uuid4())) + make(1)
    with Device(first) as one, Device(second), Device(alone) as three:
        assert one.members() == {first: 0}
        for device in (one, three):
            for slot in range(MV["GROUP_SLOTS"]):
                assert device.run("PEER_COPY", peer=slot, src=0, dst=0, len=4) == MV["ERR_PEER"]


def test_two_that_copy_from_each_other(make: Make, group: str) -> None:
    first, second = make(2, group)
    length = 16 << 20
    with Device(first) as one, Device(second) as two:
        for _ in range(3):
            one.ring("PEER_COPY", peer=1, src=0, dst=0, len=length)
            two.ring("PEER_COPY", peer=0, src=0, dst=0, len=length)
            for device in (one, two):
                while device.read("STATUS") & MV["STATUS_BUSY"]:
                    time.sleep(0.001)
                assert device.read("STATUS") == MV["STATUS_DONE"]


def test_a_peer_that_goes_in_the_middle_of_a_copy(make: Make, group: str) -> None:
    first, second, third = make(3, group)
    length = 128 << 20
    with Device(first) as one:
        with Device(second):
            one.ring("PEER_COPY", peer=1, src=0, dst=0, len=length)
        while (status := one.read("STATUS")) & MV["STATUS_BUSY"]:
            time.sleep(0.001)
        assert status >> MV["STATUS_CODE_SHIFT"] == MV["ERR_PEER"]
        # reset of the copying one, and removal of the other, meanwhile
        with Device(third) as three:
            one.ring("PEER_COPY", peer=2, src=0, dst=0, len=length)
            three.reset()
            assert one.read("STATUS") & MV["STATUS_BUSY"]
            one.reset()
            assert one.read("STATUS") == 0
            one.ring("PEER_COPY", peer=2, src=0, dst=0, len=length)
        vfio.remove(third)
        while one.read("STATUS") & MV["STATUS_BUSY"]:
            time.sleep(0.001)


def test_a_slow_start_holds_up_its_own_group_only(make: Make, group: str) -> None:
    slow, other = make(2, group), make(2, str(uuid4()))
    slowly = vfio.fault("start", f"delay_ms=2000 uuid={group}")
    with slowly as state, Child(*slow, wait=False) as child:
        assert eventually(lambda: "hits=1" in state())
        began = time.monotonic()
        assert online(slow) == ["0", "0"]
        for name, text in (("online", "0"), ("group_uuid", ""), ("vgpu_params", "x")):
            with refused(errno.EBUSY):
                put(slow[1], name, text)
        with refused(errno.EBUSY):
            Device(slow[1])
        with Device(other[0]):
            assert online(other) == ["1", "1"]
        assert links() == LINKS
        assert time.monotonic() - began < 2, "held up"
        put(slow[1], "online", "1")  # waits for the start that is under way
        assert online(slow) == ["1", "1"]
        assert child.result() == 0


@pytest.fixture(scope="class")
def explicit() -> Iterator[None]:
    with vfio.loaded(links=LINKS, implicit_start=0):
        yield


@pytest.mark.usefixtures("explicit")
class TestExplicit:
    """``implicit_start=0``: QEMU and the orchestrator do what others leave to the driver."""

    def test_what_is_offline_cannot_be_opened(
        self, make: Make, group: str, kernel_log: KernelLog
    ) -> None:
        first, second = make(2, group)
        for uuid in (first, second):
            with refused(errno.ENXIO):
                Device(uuid)
        assert get(first, "group_owner") == "0"
        assert any("offline: write 1 to its 'online'" in line for line in kernel_log.lines())

    def test_the_final_release_leaves_it_online(self, make: Make, group: str) -> None:
        uuids = make(3, group)
        put(uuids[0], "online", "1")
        since = vfio.now()
        child = Child(*uuids)
        assert child.failed == 0
        with refused(errno.EBUSY):
            put(uuids[0], "online", "0")
        child.end(signal.SIGKILL)
        assert "stopped" not in names(since)
        assert online(uuids) == ["1"] * 3
        assert (links(), get(uuids[0], "group_owner")) == (LINKS - 3, "0")
        with Device(uuids[1]):  # free for another process meanwhile
            pass
        put(uuids[2], "online", "0")
        assert (online(uuids), links()) == (["0"] * 3, LINKS)

    def test_a_removal_gives_back_what_was_not_stopped(self, make: Make, group: str) -> None:
        uuids = make(2, group)
        put(uuids[0], "online", "1")
        assert links() == LINKS - 1
        for uuid in uuids:
            vfio.remove(uuid)
        assert links() == LINKS


def test_a_random_schedule(make: Make) -> None:
    """Opens, starts, stops and kills of two groups: no link lost, no group stuck."""
    rng = random.Random(20)  # noqa: S311 - a schedule and no secret
    groups = [make(3, str(uuid4())), make(4, str(uuid4()))]
    children: list[Child] = []
    for _ in range(120):
        members = rng.choice(groups)
        deed = rng.randrange(5)
        if deed <= 1 and len(children) < 4:
            chosen = rng.sample(members, rng.randint(1, len(members)))
            children.append(Child(*chosen, wait=rng.random() < 0.5))
        elif deed == 2 and children:
            children.pop(rng.randrange(len(children))).end(signal.SIGKILL)
        elif deed >= 3:
            try:
                put(rng.choice(members), "online", str(rng.randrange(2)))
            except OSError as error:
                assert error.errno in {errno.EBUSY, errno.ENOSPC}  # noqa: PT017
        used = sum(int(get(members[0], "group_links")) for members in groups)
        assert links() + used == LINKS or children
    for child in children:
        child.end(signal.SIGKILL)
    for members in groups:
        put(members[0], "online", "0")
        with Child(*members) as child:
            assert child.failed == 0
    assert links() == LINKS
