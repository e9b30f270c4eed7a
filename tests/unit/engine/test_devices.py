# SPDX-License-Identifier: GPL-2.0-or-later
"""Creating and removing as one: all or none, whatever happens on the way."""

from __future__ import annotations

import asyncio
import errno
from uuid import UUID, uuid4

import pytest

from mdev_orchestrator.engine.devices import create_devices, remove_devices
from mdev_orchestrator.errors import (
    BusyError,
    CapacityError,
    DeadlineError,
    HostError,
    MdoError,
    RequestError,
    UnknownError,
    UuidError,
)
from unit.fakesys import FakeSystem

U1 = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"
U2 = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1002"
U3 = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1003"
POOL = {"igd-512M": 4, "igd-256M": 2, "igd-128M": 1}
"""Units of 128 MiB that an instance takes out of the pool of 1 GiB."""


@pytest.fixture
def igd(system: FakeSystem) -> FakeSystem:
    """The seed's integrated GPU: one pool, 8/4/2."""

    def count(system: FakeSystem) -> None:
        types = system.types("igd0")
        used = sum(
            POOL[(system.bus / uuid / "mdev_type").resolve().name] for uuid in system.uuids()
        )
        for type_, units in POOL.items():
            (types / type_ / "available_instances").write_text(f"{(8 - used) // units}\n")

    system.parent("igd0")
    for type_, units in POOL.items():
        system.type("igd0", type_, 8 // units)
    system.capacity = count
    return system


@pytest.fixture
def cards(system: FakeSystem) -> FakeSystem:
    """Two cards that offer the same type."""
    for name, free in (("card0", 16), ("card1", 9)):
        system.parent(name)
        system.type(name, "grid-11", free)
    system.type("card1", "grid-12", 8)
    return system


def counts(system: FakeSystem) -> list[str]:
    types = system.types("igd0")
    return [
        (types / type_ / "available_instances").read_text().strip()
        for type_ in ("igd-128M", "igd-256M", "igd-512M")
    ]


async def create(system: FakeSystem, *arguments: object, **options: object) -> list[str]:
    made = await create_devices(*arguments, root=system.root, **options)  # type: ignore[arg-type]
    return [str(mdev.uuid) for mdev in made]


async def test_the_seeds_example(igd: FakeSystem) -> None:
    assert counts(igd) == ["8", "4", "2"]
    large = await create(igd, "igd-512M")
    assert counts(igd) == ["4", "2", "1"]
    small = await create(igd, "igd-128M")
    assert counts(igd) == ["3", "1", "0"]
    await remove_devices(large + small, root=igd.root)
    assert counts(igd) == ["8", "4", "2"]


async def test_chosen_and_random_uuids(cards: FakeSystem) -> None:
    made = await create(cards, "grid-11", 3, parent="card0", uuids=[U2, U1])
    assert made[:2] == [U2, U1]
    assert cards.uuids() == set(made)
    assert UUID(made[2]).version == 4


async def test_as_many_as_uuids_are_given(cards: FakeSystem) -> None:
    assert await create(cards, "grid-12", uuids=[U1, U2]) == [U1, U2]


async def test_what_is_returned_is_complete(cards: FakeSystem) -> None:
    (mdev,) = await create_devices("grid-12", root=cards.root)
    assert (mdev.parent, mdev.type_id, mdev.device_api) == ("card1", "grid-12", "vfio-pci")
    assert mdev.iommu_group is not None


# ---- refused before anything is written ----


@pytest.mark.parametrize(
    ("request_", "error", "words"),
    [
        (("grid-12", 0), RequestError, "cannot create 0 devices"),
        (("grid-12", -3), RequestError, "cannot create -3 devices"),
        (("grid-12", 9), CapacityError, "9 of grid-12 do not fit on card1: 8 would"),
        (("grid-12", 10**9), CapacityError, "8 would; nothing was created (-n 8)"),
        (("grid-13",), UnknownError, "no parent offers a type 'grid-13' (did you mean grid-1"),
        (("zzz",), UnknownError, "there are grid-11, grid-12"),
        (("Name of grid-12",), UnknownError, "that is the name of grid-12"),
        (("grid-11",), UnknownError, "several parents offer grid-11: card0 (16 free), card1 (9 fr"),
    ],
)
async def test_bad_requests(
    cards: FakeSystem, request_: tuple[object, ...], error: type[MdoError], words: str
) -> None:
    with pytest.raises(error) as caught:
        await create(cards, *request_)
    assert words in str(caught.value)
    assert caught.value.exit_code == 2
    assert cards.writes == []


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"parent": "card7"}, UnknownError, "there is no parent 'card7' (did you mean card1"),
        ({"parent": "card0"}, UnknownError, "card0 does not offer grid-12 (on card1 (8 free))"),
        ({"uuids": ["nonsense"]}, UuidError, "'nonsense' is not a UUID"),
        ({"uuids": [U1, U1.upper()]}, UuidError, f"{U1} is given 2 times"),
        ({"count": 1, "uuids": [U1, U2]}, RequestError, "2 UUIDs were given for 1 devices"),
        ({"uuids": [U3]}, UuidError, "exists already under parent card0 as grid-11"),
    ],
)
async def test_bad_options(
    cards: FakeSystem, options: dict[str, object], error: type[MdoError], words: str
) -> None:
    cards.mdev("card0", "grid-11", U3)
    with pytest.raises(error) as caught:
        await create(cards, "grid-12", **options)
    assert words in str(caught.value)
    assert caught.value.exit_code == 2
    assert cards.writes == []


async def test_no_instance_left_says_what_is_in_use_and_what_fits(igd: FakeSystem) -> None:
    await create(igd, "igd-512M")
    await create(igd, "igd-128M")
    with pytest.raises(CapacityError) as caught:
        await create(igd, "igd-512M")
    text = str(caught.value)
    assert text.startswith("no instance of igd-512M is left on igd0: in use there 1 of igd-")
    assert text.endswith("nothing was created (3 of igd-128M, 1 of igd-256M would fit instead)")


async def test_a_count_that_lags_behind_a_removal_is_waited_for(cards: FakeSystem) -> None:
    count = cards.types("card1") / "grid-12" / "available_instances"
    count.write_text("0\n")
    asyncio.get_running_loop().call_later(0.15, count.write_text, "1\n")
    assert len(await create(cards, "grid-12")) == 1


async def test_a_spoilt_count_leaves_the_answer_to_the_kernel(cards: FakeSystem) -> None:
    (cards.types("card1") / "grid-12" / "available_instances").write_text("lots\n")
    cards.refuse[U1] = errno.EUSERS
    with pytest.raises(CapacityError):
        await create(cards, "grid-12", uuids=[U1])
    assert cards.writes == [("create", U1)]


async def test_a_host_without_mdev(system: FakeSystem) -> None:
    with pytest.raises(HostError, match=r"no mdev bus .*modprobe mdev") as caught:
        await create(system, "grid-11")
    assert caught.value.exit_code == 5


async def test_a_host_without_parents(system: FakeSystem) -> None:
    with pytest.raises(UnknownError, match="no device of this host offers mdevs"):
        await create(system.load_mdev(), "grid-11")


# ---- undone ----


async def test_one_refusal_undoes_the_others(cards: FakeSystem) -> None:
    cards.refuse[U2] = errno.EIO
    with pytest.raises(MdoError, match="Input/output error") as caught:
        await create(cards, "grid-12", uuids=[U1, U2, U3])
    assert cards.uuids() == set()
    assert caught.value.__notes__ == ["all was undone"]


async def test_a_failed_undo_stands_beside_the_first_error(cards: FakeSystem) -> None:
    cards.refuse |= {U2: errno.EIO, f"{U1}/remove": errno.EPERM}
    with pytest.raises(MdoError, match="Input/output error") as caught:
        await create(cards, "grid-12", uuids=[U1, U2])
    stuck, recover = caught.value.__notes__
    assert stuck.startswith(f"could not undo: create grid-12 on card1: mdev {U1}: ")
    assert "mdo recover" in recover
    assert cards.uuids() == {U1}


async def test_a_race_lost_for_a_uuid_leaves_the_winners_device(cards: FakeSystem) -> None:
    def winner_first(_name: str, uuid: str) -> None:
        if uuid == U1:
            cards.mdev("card0", "grid-11", U1)

    cards.before = winner_first
    with pytest.raises(UuidError, match="exists already under parent card0"):
        await create_devices("grid-12", uuids=[U1, U2], root=cards.root)
    assert cards.uuids() == {U1}


async def test_ctrl_c_waits_for_a_write_that_has_begun_and_undoes_it(cards: FakeSystem) -> None:
    cards.block[U2] = asyncio.Event()
    task = asyncio.ensure_future(create(cards, "grid-12", uuids=[U1, U2]))
    while ("create", U2) not in cards.writes:
        await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.wait((task,), timeout=0.05)
    assert not task.done()
    cards.block[U2].set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert cards.uuids() == set()


async def test_a_device_that_never_becomes_usable_is_undone(cards: FakeSystem) -> None:
    cards.after = lambda *_: (cards.root / "dev/vfio/1").unlink(missing_ok=True)
    with pytest.raises(DeadlineError, match=r"vfio/1 is not there"):
        await create_devices("grid-12", deadline=0.1, root=cards.root)
    assert cards.uuids() == set()


# ---- removal ----


@pytest.fixture
def held(cards: FakeSystem) -> FakeSystem:
    """One free device, and one in the hands of a guest."""
    cards.mdev("card0", "grid-11", U1)
    cards.mdev("card0", "grid-11", U2)
    cards.process(41, "qemu-system-x86", ["qemu", "-name", "guest=g1"], ["/dev/vfio/2"])
    return cards


async def test_what_a_guest_holds_is_refused_and_nothing_is_removed(held: FakeSystem) -> None:
    with pytest.raises(BusyError) as caught:
        await remove_devices([U1, U2], root=held.root)
    assert str(caught.value) == (
        f"mdev {U2} is held by guest 'g1' (pid 41) "
        f"(mdo remove --detach {U2} takes it out of the guest first)"
    )
    assert held.uuids() == {U1, U2}
    assert held.writes == []


async def test_detach_first(held: FakeSystem) -> None:
    calls: list[tuple[str, UUID]] = []

    async def detach(guest: str, uuid: UUID, deadline: float) -> None:
        calls.append((guest, uuid))
        assert str(uuid) in held.uuids()

    removed = await remove_devices([U1, U2], detach=detach, root=held.root)
    assert calls == [("g1", UUID(U2))]
    assert [str(uuid) for uuid in removed] == [U1, U2]
    assert held.uuids() == set()


async def test_a_failed_detach_leaves_the_device(held: FakeSystem) -> None:
    async def detach(guest: str, uuid: UUID, deadline: float) -> None:
        raise DeadlineError("the guest did not answer")

    with pytest.raises(DeadlineError, match="did not answer"):
        await remove_devices([U2], detach=detach, root=held.root)
    assert held.uuids() == {U1, U2}


async def test_a_holder_that_is_no_guest_cannot_be_detached(held: FakeSystem) -> None:
    held.process(9, "spdk", ["spdk"], ["/dev/vfio/1"])

    async def detach(guest: str, uuid: UUID, deadline: float) -> None:
        raise AssertionError

    with pytest.raises(BusyError, match=r"held by spdk \(pid 9\)"):
        await remove_devices([U1], detach=detach, root=held.root)


async def test_a_removal_that_blocks_names_who_came_in_between(held: FakeSystem) -> None:
    held.block[f"{U1}/remove"] = asyncio.Event()
    asyncio.get_running_loop().call_later(0.02, held.process, 9, "spdk", ["spdk"], ["/dev/vfio/1"])
    with pytest.raises(DeadlineError, match=r"within 0.2 s: held by spdk \(pid 9\)"):
        await remove_devices([U1], deadline=0.2, root=held.root)


@pytest.mark.parametrize(
    ("uuids", "words"),
    [
        (["x"], "'x' is not a UUID"),
        ([U1, U1], "given 2 times"),
        ([U1, U1[:-1] + "9"], f"did you mean {U1}?"),
        ([U1, "00000000-0000-0000-0000-000000000000"], "mdo host lists them"),
    ],
)
async def test_a_removal_that_makes_no_sense(
    cards: FakeSystem, uuids: list[str], words: str
) -> None:
    cards.mdev("card0", "grid-11", U1)
    with pytest.raises(RequestError) as caught:
        await remove_devices(uuids, root=cards.root)
    assert words in str(caught.value)
    assert cards.uuids() == {U1}


async def test_the_first_error_comes_first(cards: FakeSystem) -> None:
    for uuid in (U1, U2, U3):
        cards.mdev("card0", "grid-11", uuid)
    cards.refuse |= {f"{U1}/remove": errno.EIO, f"{U3}/remove": errno.EPERM}
    with pytest.raises(MdoError, match="Input/output error") as caught:
        await remove_devices([U1, U2, U3], root=cards.root)
    (note,) = caught.value.__notes__
    assert U3 in note
    assert cards.uuids() == {U1, U3}


# ---------------------------------------------------------------- groups and attributes


GROUP = "aaaaaaaa-1111-4222-8333-444444444444"


@pytest.fixture
def grouped(system: FakeSystem) -> FakeSystem:
    for number, name in enumerate(("card0", "card1")):
        system.parent(name)
        system.type(name, f"t-{number}", 4)
        system.groups_of(name, 3)
    return system


async def test_create_into_a_group_with_parameters(grouped: FakeSystem) -> None:
    made = await create_devices(
        "t-0",
        2,
        group=GROUP,
        attributes=[("vgpu_params", "a=1"), ("vgpu_params", "a=1,b=2")],
        root=grouped.root,
    )
    assert {mdev.group_uuid for mdev in made} == {UUID(GROUP)}
    assert {(mdev.online, mdev.params) for mdev in made} == {(False, "a=1,b=2")}
    written = [name for name, _ in grouped.writes if name != "create"]
    assert written == ["vgpu_params", "vgpu_params", "group_uuid"] * 2


async def test_the_group_may_stand_among_the_attributes(grouped: FakeSystem) -> None:
    (mdev,) = await create_devices(
        "t-0",
        attributes=[("group_uuid", GROUP), ("vgpu_params", "a=1")],
        root=grouped.root,
    )
    assert (mdev.group_uuid, mdev.params) == (UUID(GROUP), "a=1")
    assert [name for name, _ in grouped.writes] == ["create", "group_uuid", "vgpu_params"]
    with pytest.raises(RequestError, match="the start group is given twice"):
        await create_devices(
            "t-0",
            group="peers",
            attributes=[("group_uuid", GROUP)],
            root=grouped.root,
        )
    assert grouped.uuids() == {str(mdev.uuid)}


async def test_a_group_by_name_is_the_same_every_time(grouped: FakeSystem) -> None:
    found = [(await create_devices("t-0", group="peers", root=grouped.root))[0] for _ in range(2)]
    assert found[0].group_uuid == found[1].group_uuid


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("../../remove", "does not name a file of an mdev"),
        ("/etc/passwd", "does not name a file of an mdev"),
        ("a//b", "does not name a file of an mdev"),
        ("", "does not name a file of an mdev"),
        ("a/./b", "does not name a file of an mdev"),
        ("a\0b", "does not name a file of an mdev"),
        ("remove", "mdo remove removes a device"),
        ("group_uuid", "'1' is not a UUID"),
        ("online", "a device comes online when its guest starts"),
    ],
)
async def test_names_that_cannot_be_set_create_nothing(
    grouped: FakeSystem, name: str, words: str
) -> None:
    with pytest.raises(RequestError, match=words):
        await create_devices("t-0", attributes=[(name, "1")], root=grouped.root)
    assert grouped.writes == []


async def test_a_file_behind_a_link_is_not_the_mdevs(grouped: FakeSystem) -> None:
    with pytest.raises(RequestError, match="leads out of its directory"):
        await create_devices("t-0", attributes=[("mdev_type/name", "x")], root=grouped.root)
    assert grouped.uuids() == set()
    assert (grouped.types("card0") / "t-0" / "name").read_text() == "Name of t-0\n"


async def test_a_file_that_is_not_there_undoes_all(grouped: FakeSystem) -> None:
    with pytest.raises(HostError, match=r"has no file params .*can be set: vgpu_params"):
        await create_devices("t-0", 3, attributes=[("params", "1")], root=grouped.root)
    assert grouped.uuids() == set()


@pytest.mark.parametrize("value", ["a\0b", "\udcff", "x" * 5000])
async def test_a_value_fits_a_file_of_sysfs(grouped: FakeSystem, value: str) -> None:
    with pytest.raises(RequestError, match="is not text of at most 4095 bytes"):
        await create_devices("t-0", attributes=[("vgpu_params", value)], root=grouped.root)


async def test_a_group_of_another_parent_is_refused_in_words(grouped: FakeSystem) -> None:
    await create_devices("t-0", group=GROUP, root=grouped.root)
    with pytest.raises(RequestError, match=f"start group {GROUP} is on parent card0.* on card1"):
        await create_devices("t-1", group=GROUP, root=grouped.root)
    assert len(grouped.uuids()) == 1


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.EBUSY, "it is online already"),
        (errno.EINVAL, "a group is on one parent"),
        (errno.ENOSPC, "are full"),
        (errno.EIO, "Input/output error"),
    ],
)
async def test_a_driver_that_refuses_a_group_undoes_all(
    grouped: FakeSystem, number: int, words: str
) -> None:
    uuids = [str(uuid4()) for _ in range(2)]
    grouped.refuse[f"{uuids[1]}/group_uuid"] = number
    with pytest.raises(MdoError, match=words) as refusal:
        await create_devices("t-0", uuids=uuids, group=GROUP, root=grouped.root)
    assert refusal.value.__notes__ == ["all was undone"]
    assert grouped.uuids() == set()


async def test_a_driver_without_groups_says_so(system: FakeSystem) -> None:
    system.parent("card0")
    system.type("card0", "t-0", 4)
    with pytest.raises(HostError, match="card0 has no start groups"):
        await create_devices("t-0", 2, group="peers", root=system.root)
    assert system.uuids() == set()


async def test_ten_left_are_enough_for_nine(cards: FakeSystem) -> None:
    """Counts are numbers: as text, "10" comes before "9"."""
    (cards.types("card1") / "grid-12" / "available_instances").write_text("10\n")
    assert len(await create(cards, "grid-12", 9)) == 9
