# SPDX-License-Identifier: GPL-2.0-or-later
"""Start groups as sysfs shows them, and their start and stop."""

from __future__ import annotations

import asyncio
import errno
from typing import Literal
from uuid import UUID, uuid5

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mdev_orchestrator import errors
from mdev_orchestrator.errors import Outcome
from mdev_orchestrator.host import groups, sysfs
from mdev_orchestrator.machine import Machine
from mdev_orchestrator.model import GROUP_NAMESPACE, Mdev, group_uuid, is_uuid
from unit.fakesys import FakeSystem, put

A, B, C = (f"0000000{n}-1111-4222-8333-444444444444" for n in "123")
GROUP = "aaaaaaaa-1111-4222-8333-444444444444"


@pytest.fixture
def pair(system: FakeSystem) -> FakeSystem:
    """Two devices of one group and one of none, on a parent with three links."""
    system.group_of_two(GROUP.upper(), A, B, C)
    return system


def mdev(system: FakeSystem, uuid: str) -> Mdev:
    found = sysfs.read_host(Machine(system.root)).find(UUID(uuid))
    assert found is not None
    assert found == sysfs.read_mdev(Machine(system.root), UUID(uuid))
    return found


def test_a_scan_shows_groups_states_and_links(pair: FakeSystem, machine: Machine) -> None:
    put(pair.bus / C / "vgpu_params", "a=1,b=2\n")
    host = sysfs.read_host(machine)
    [group] = host.groups
    assert (group.parent, group.uuid, group.online) == ("card0", UUID(GROUP), False)
    assert group.members == (UUID(A), UUID(B))
    assert host.group_of(mdev(pair, B)) == group
    single = host.group_of(mdev(pair, C))
    assert (single.uuid, single.members, single.online) == (None, (UUID(C),), False)
    assert mdev(pair, C).params == "a=1,b=2"
    assert (host.parents[0].links, host.parents[0].links_free) == (3, 3)


def test_a_driver_without_the_files_is_no_damage(system: FakeSystem, machine: Machine) -> None:
    system.parent("card0")
    system.type("card0", "t-1")
    for uuid in (A, B):
        system.mdev("card0", "t-1", uuid)
    host = sysfs.read_host(machine)
    for found in host.mdevs:
        assert (found.group_uuid, found.online, found.params) == (None, None, None)
        assert found.damage == ()
    assert host.groups == ()
    assert (host.parents[0].links, host.parents[0].damage) == (None, ())


def test_a_device_that_is_being_made_does_not_hide_the_files_of_others(
    pair: FakeSystem, machine: Machine
) -> None:
    for name in ("group_uuid", "online", "vgpu_params", "mdev_type"):
        (pair.bus / A / name).unlink()
    host = sysfs.read_host(machine)
    assert [found.online for found in host.mdevs] == [None, False, False]


def test_parameters_of_another_vendor(system: FakeSystem, machine: Machine) -> None:
    system.parent("card0")
    system.type("card0", "t-1")
    path = system.mdev("card0", "t-1", A)
    (path / "nvidia").mkdir()
    put(path / "nvidia/vgpu_params", "x=1\n")
    assert mdev(system, A).params == "x=1"
    assert sysfs.writable_files(machine, UUID(A)) == ("nvidia/vgpu_params",)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("online", "yes\n", "online is neither 0 nor 1: 'yes'"),
        ("online", "", "online is empty"),
        ("group_uuid", "peers\n", "group_uuid is not a UUID: 'peers'"),
        ("group_uuid", b"\xff\n", "group_uuid is not UTF-8"),
    ],
)
def test_nonsense_in_one_file_is_damage(
    pair: FakeSystem, name: str, text: str | bytes, words: str
) -> None:
    put(pair.bus / A / name, text)
    found = mdev(pair, A)
    assert found.damage == (words,)
    assert mdev(pair, B).damage == ()


async def test_start_and_stop(pair: FakeSystem, machine: Machine) -> None:
    group = sysfs.read_host(machine).groups[0]
    await groups.start(machine, group, 5)
    assert sysfs.read_host(machine).groups[0].online is True
    assert sysfs.read_host(machine).parents[0].links_free == 2
    await groups.start(machine, group, 5)  # already so
    pair.opened.add(B)
    assert await groups.stop(machine, UUID(A), 5) is False
    pair.opened.clear()
    assert await groups.stop(machine, UUID(A), 5) is True
    assert await groups.stop(machine, UUID(int=5), 5) is True
    assert sysfs.read_host(machine).groups[0].online is False


async def test_what_is_offline_needs_no_permission_to_be_stopped(
    pair: FakeSystem, machine: Machine
) -> None:
    pair.refuse[f"{A}/online"] = errno.EACCES
    assert await groups.stop(machine, UUID(A), 5) is True
    put(pair.bus / A / "online", "1\n")
    with pytest.raises(errors.HostError, match="does not go offline: Permission denied"):
        await groups.stop(machine, UUID(A), 5)


async def test_links_that_lack_are_told(pair: FakeSystem, machine: Machine) -> None:
    put(pair.parents / "card0" / "p2p_links_free", "0\n")
    group = sysfs.read_host(machine).groups[0]
    with pytest.raises(errors.CapacityError) as refusal:
        await groups.start(machine, group, 5)
    assert str(refusal.value) == (
        f"start group {GROUP} on card0 does not come online: No space left on device; its 2 "
        f"members are {A}, {B}; 1 links asked, 0 of 3 left (stop a guest that has a group on "
        "card0, or make this one smaller)"
    )
    put(pair.bus / A / "group_error", "the hardware is tired\n")
    with pytest.raises(errors.CapacityError, match="the driver says: the hardware is tired"):
        await groups.start(machine, group, 5)


@pytest.mark.parametrize(
    ("number", "kind", "words"),
    [
        (errno.EBUSY, errors.BusyError, "another process has or starts it"),
        (errno.EACCES, errors.HostError, r"online \(mode 0\d{3}, of user \d+\)"),
        (errno.EIO, errors.MdoError, "Input/output error"),
    ],
)
async def test_refusals_in_words(
    pair: FakeSystem, number: int, kind: type[errors.MdoError], words: str, machine: Machine
) -> None:
    pair.refuse[f"{A}/online"] = number
    group = sysfs.read_host(machine).groups[0]
    with pytest.raises(kind, match=words) as caught:
        await groups.start(machine, group, 5)
    assert (caught.value.outcome, caught.value.errno) == (Outcome.NO_EFFECT, number)


async def test_a_silent_driver_costs_the_deadline(pair: FakeSystem, machine: Machine) -> None:
    pair.block[f"{A}/online"] = asyncio.Event()
    group = sysfs.read_host(machine).groups[0]
    with pytest.raises(
        errors.DeadlineError, match=rf"{GROUP} on card0 did not come online within 0.05 s"
    ) as caught:
        await groups.start(machine, group, 0.05)
    assert caught.value.outcome is Outcome.UNKNOWN
    with pytest.raises(errors.DeadlineError, match="did not go offline"):
        await groups.stop(machine, UUID(A), 0.05)


@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_start_whose_writer_is_killed_is_unknown_and_no_refusal(
    pair: FakeSystem, machine: Machine, when: Literal["before", "after"]
) -> None:
    pair.kill[f"{A}/online"] = when
    group = sysfs.read_host(machine).groups[0]
    with pytest.raises(
        errors.MdoError, match=rf"was killed; whether start group {GROUP}"
    ) as caught:
        await groups.start(machine, group, 5)
    assert (caught.value.outcome, caught.value.errno) == (Outcome.UNKNOWN, None)
    pair.kill[f"{A}/online"] = when
    with pytest.raises(
        errors.MdoError, match=rf"was killed; whether mdev {A} is offline"
    ) as caught:
        await groups.stop(machine, UUID(A), 5)
    assert caught.value.outcome is Outcome.UNKNOWN
    pair.kill[f"{C}/group_uuid"] = when
    with pytest.raises(
        errors.MdoError, match=rf"was killed; whether mdev {C} is in start"
    ) as caught:
        await groups.join(machine, UUID(C), UUID(GROUP), "card0")
    assert caught.value.outcome is Outcome.UNKNOWN


async def test_the_driver_is_asked_what_it_knows(pair: FakeSystem, machine: Machine) -> None:
    group = sysfs.read_host(machine).groups[0]
    assert groups.explain(machine, group) == ""
    put(pair.bus / A / "group_owner", "42\n")
    assert groups.explain(machine, group) == (
        f"start group {GROUP} on card0: it belongs to process 42"
    )


def test_a_name_is_a_uuid_of_version_5() -> None:
    assert group_uuid("peers") == uuid5(GROUP_NAMESPACE, "peers")
    assert str(group_uuid("peers")) == "634d178b-91e2-54a1-8314-a9065ceb99b4"
    assert group_uuid(GROUP.upper()) == UUID(GROUP)


@given(st.text(max_size=80))
def test_a_group_is_a_uuid_a_name_or_refused_in_one_line(text: str) -> None:
    error = None
    try:
        found = group_uuid(text)
    except errors.RequestError as refusal:
        error = refusal
    if error is None:
        assert found.int
    else:
        assert not is_uuid(text) or not UUID(text).int
        assert len(str(error).splitlines()) == 1
