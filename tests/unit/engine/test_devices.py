# SPDX-License-Identifier: GPL-2.0-or-later
"""Creating and removing as one: all or none, whatever happens on the way."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from mdev_orchestrator import errors
from mdev_orchestrator.engine import journal_db, recovery
from mdev_orchestrator.engine.devices import create_devices, remove_devices
from mdev_orchestrator.engine.executor import StepEventKind
from mdev_orchestrator.engine.journal import open_journal
from mdev_orchestrator.engine.journal_db import read_managed
from mdev_orchestrator.engine.operation import Operation
from mdev_orchestrator.engine.records import Change, DeviceRecord
from mdev_orchestrator.machine import Machine
from unit.engine.broken_journals import Breaker, full_disk, locked, read_only, read_only_mount
from unit.engine.killed import dies_at, killed
from unit.engine.scripted import scripted_guest
from unit.fakesys import FakeSystem

U1, U2, U3 = UUIDS = [UUID(f"83b8f4f2-509f-382f-3c1e-e6bfe0fa100{n}") for n in "123"]
T1, T2, T3 = TEXTS = [str(uuid) for uuid in UUIDS]
POOL = {"igd-512M": 4, "igd-256M": 2, "igd-128M": 1}
"""Units of 128 MiB that an instance takes out of the pool of 1 GiB."""
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs a second user")


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


async def create(machine: Machine, *arguments: object, **options: object) -> list[UUID]:
    made = await create_devices(machine, *arguments, **options)  # type: ignore[arg-type]
    return [mdev.uuid for mdev in made]


async def test_the_seeds_example(igd: FakeSystem, machine: Machine) -> None:
    assert counts(igd) == ["8", "4", "2"]
    large = await create(machine, "igd-512M")
    assert counts(igd) == ["4", "2", "1"]
    small = await create(machine, "igd-128M")
    assert counts(igd) == ["3", "1", "0"]
    await remove_devices(machine, large + small)
    assert counts(igd) == ["8", "4", "2"]


async def test_chosen_and_random_uuids(cards: FakeSystem, machine: Machine) -> None:
    made = await create(machine, "grid-11", 3, parent="card0", uuids=[U2, U1])
    assert made[:2] == [U2, U1]
    assert cards.uuids() == set(map(str, made))
    assert made[2].version == 4


async def test_as_many_as_uuids_are_given(cards: FakeSystem, machine: Machine) -> None:
    assert await create(machine, "grid-12", uuids=[U1, U2]) == [U1, U2]


async def test_what_is_returned_is_complete(cards: FakeSystem, machine: Machine) -> None:
    (mdev,) = await create_devices(machine, "grid-12")
    assert (mdev.parent, mdev.type_id, mdev.device_api) == ("card1", "grid-12", "vfio-pci")
    assert mdev.iommu_group is not None


# ---- refused before anything is written ----


@pytest.mark.parametrize(
    ("request_", "error", "words"),
    [
        (("grid-12", 0), errors.RequestError, "cannot create 0 devices"),
        (("grid-12", -3), errors.RequestError, "cannot create -3 devices"),
        (("grid-12", 9), errors.CapacityError, "9 of grid-12 do not fit on card1: 8 would"),
        (("grid-12", 4096), errors.CapacityError, "8 would; nothing was created (-n 8)"),
        (
            ("grid-12", 10**9),
            errors.RequestError,
            "cannot create 1000000000 devices (ask for 1 to 4096)",
        ),
        (
            ("grid-13",),
            errors.UnknownError,
            "no parent offers a type 'grid-13' (did you mean grid-1",
        ),
        (("zzz",), errors.UnknownError, "there are grid-11, grid-12"),
        (("Name of grid-12",), errors.UnknownError, "that is the name of grid-12"),
        (
            ("grid-11",),
            errors.UnknownError,
            "several parents offer grid-11: card0 (16 free), card1 (9 fr",
        ),
    ],
)
async def test_bad_requests(
    cards: FakeSystem,
    machine: Machine,
    request_: tuple[object, ...],
    error: type[errors.MdoError],
    words: str,
) -> None:
    with pytest.raises(error) as caught:
        await create(machine, *request_)
    assert words in str(caught.value)
    assert caught.value.exit_code == 2
    assert cards.writes == []


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (
            {"parent": "card7"},
            errors.UnknownError,
            "there is no parent 'card7' (did you mean card1",
        ),
        (
            {"parent": "card0"},
            errors.UnknownError,
            "card0 does not offer grid-12 (on card1 (8 free))",
        ),
        ({"uuids": [U1, U1]}, errors.UuidError, f"{U1} is given 2 times"),
        ({"count": 1, "uuids": [U1, U2]}, errors.RequestError, "2 UUIDs were given for 1 devices"),
        ({"uuids": [U3]}, errors.UuidError, "exists already under parent card0 as grid-11"),
    ],
)
async def test_bad_options(
    cards: FakeSystem,
    machine: Machine,
    options: dict[str, object],
    error: type[errors.MdoError],
    words: str,
) -> None:
    cards.mdev("card0", "grid-11", T3)
    with pytest.raises(error) as caught:
        await create(machine, "grid-12", **options)
    assert words in str(caught.value)
    assert caught.value.exit_code == 2
    assert cards.writes == []


async def test_no_instance_left_says_what_is_in_use_and_what_fits(
    igd: FakeSystem, machine: Machine
) -> None:
    await create(machine, "igd-512M")
    await create(machine, "igd-128M")
    with pytest.raises(errors.CapacityError) as caught:
        await create(machine, "igd-512M")
    text = str(caught.value)
    assert text.startswith("no instance of igd-512M is left on igd0: in use there 1 of igd-")
    assert text.endswith("nothing was created (3 of igd-128M, 1 of igd-256M would fit instead)")


async def test_a_count_that_lags_behind_a_removal_is_waited_for(
    cards: FakeSystem, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mdev_orchestrator.engine.operation.GRACE_SECONDS", 20)
    count = cards.types("card1") / "grid-12" / "available_instances"
    count.write_text("0\n")
    asyncio.get_running_loop().call_later(0.15, count.write_text, "1\n")
    assert len(await create(machine, "grid-12")) == 1


async def test_a_spoilt_count_leaves_the_answer_to_the_kernel(
    cards: FakeSystem, machine: Machine
) -> None:
    (cards.types("card1") / "grid-12" / "available_instances").write_text("lots\n")
    cards.refuse[T1] = errno.EUSERS
    with pytest.raises(errors.CapacityError):
        await create(machine, "grid-12", uuids=[U1])
    assert cards.writes == [("create", T1)]


async def test_a_host_without_mdev(system: FakeSystem, machine: Machine) -> None:
    with pytest.raises(errors.HostError, match=r"no mdev bus .*modprobe mdev") as caught:
        await create(machine, "grid-11")
    assert caught.value.exit_code == 5


async def test_a_host_without_parents(system: FakeSystem, machine: Machine) -> None:
    system.load_mdev()
    with pytest.raises(errors.UnknownError, match="no device of this host offers mdevs"):
        await create(machine, "grid-11")


# ---- undone ----


async def test_one_refusal_undoes_the_others(cards: FakeSystem, machine: Machine) -> None:
    cards.refuse[T2] = errno.EIO
    with pytest.raises(errors.MdoError, match="Input/output error") as caught:
        await create(machine, "grid-12", uuids=[U1, U2, U3])
    assert cards.uuids() == set()
    assert caught.value.__notes__ == ["all was undone"]


async def test_a_failed_undo_stands_beside_the_first_error(
    cards: FakeSystem, machine: Machine
) -> None:
    cards.refuse |= {T2: errno.EIO, f"{U1}/remove": errno.EPERM}

    def before(_: str, uuid: str) -> None:
        while uuid == T2 and T1 not in cards.uuids():  # a busy machine has two children write them
            time.sleep(0.01)

    cards.before = before
    with pytest.raises(errors.MdoError, match="Input/output error") as caught:
        await create(machine, "grid-12", uuids=[U1, U2])
    stuck, recover = caught.value.__notes__
    assert stuck.startswith(f"could not undo: create grid-12 on card1: mdev {U1}: ")
    assert "mdo recover" in recover
    assert cards.uuids() == {T1}


async def test_a_race_lost_for_a_uuid_leaves_the_winners_device(
    cards: FakeSystem, machine: Machine
) -> None:
    def winner_first(_name: str, uuid: str) -> None:
        if uuid == T1:
            cards.mdev("card0", "grid-11", T1)

    cards.before = winner_first
    with pytest.raises(errors.UuidError, match="exists already under parent card0"):
        await create_devices(machine, "grid-12", uuids=[U1, U2])
    assert cards.uuids() == {T1}


async def test_ctrl_c_waits_for_a_write_that_has_begun_and_undoes_it(
    cards: FakeSystem, machine: Machine
) -> None:
    cards.block[T2] = asyncio.Event()
    task = asyncio.ensure_future(create(machine, "grid-12", uuids=[U1, U2]))
    while ("create", T2) not in cards.writes:
        await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.wait((task,), timeout=0.05)
    assert not task.done()
    cards.block[T2].set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert cards.uuids() == set()


async def test_a_device_that_never_becomes_usable_is_undone(
    cards: FakeSystem, machine: Machine
) -> None:
    cards.after = lambda *_: (cards.root / "dev/vfio/1").unlink(missing_ok=True)
    with pytest.raises(errors.DeadlineError, match=r"vfio/1 is not there"):
        await create_devices(machine, "grid-12", deadline=0.7)
    assert cards.uuids() == set()


# ---- removal ----


def managed(machine: Machine) -> set[UUID]:
    return set(read_managed(machine).devices)


async def closed(machine: Machine) -> bool:
    """Whether no run stands open."""
    async with open_journal(machine) as journal:
        return journal.open_runs() == []


@pytest.fixture
def held(cards: FakeSystem) -> FakeSystem:
    """One free device, and one in the hands of a guest that mdo did not start."""
    cards.mdev("card0", "grid-11", T1)
    cards.mdev("card0", "grid-11", T2)
    cards.process(41, "qemu-system-x86", ["qemu", "-name", "guest=g1"], ["/dev/vfio/2"])
    return cards


@pytest.fixture
def three(cards: FakeSystem) -> FakeSystem:
    """Three devices of another program."""
    for uuid in TEXTS:
        cards.mdev("card0", "grid-11", uuid)
    return cards


@pytest.fixture
def short(system: FakeSystem, place: Path) -> Machine:
    """The machine with guests, whose sockets need a state directory with a short name."""
    return Machine(system.root, state=place)


async def test_nothing_to_remove_is_no_error(cards: FakeSystem, machine: Machine) -> None:
    assert await remove_devices(machine, []) == ()
    assert await remove_devices(machine, [], detach=True) == ()
    assert cards.writes == []


async def test_what_is_managed_is_not_any_more_when_it_is_removed(
    cards: FakeSystem, machine: Machine
) -> None:
    made = await create(machine, "grid-12", 3)
    assert managed(machine) == set(made)
    assert await remove_devices(machine, made[:2]) == tuple(made[:2])
    assert managed(machine) == {made[2]}
    assert cards.uuids() == {str(made[2])}


async def test_what_a_guest_holds_is_refused_and_nothing_is_removed(
    held: FakeSystem, machine: Machine
) -> None:
    with pytest.raises(errors.BusyError, match=rf"^mdev {U2} is held by guest 'g1' \(pid 41\)"):
        await remove_devices(machine, UUIDS[:2])
    assert held.uuids() == {T1, T2}
    assert held.writes == []


async def test_a_guest_of_mdo_is_detached_from_if_that_is_wanted(
    three: FakeSystem, short: Machine
) -> None:
    async with scripted_guest(short, three, "g", U2) as guest:
        with pytest.raises(errors.BusyError) as caught:
            await remove_devices(short, UUIDS[:2])
        assert caught.value.hint == f"mdo remove --detach {U2} takes it out of the guest first"
        assert three.writes == []
        assert await remove_devices(short, UUIDS[:2], detach=True) == tuple(UUIDS[:2])
        assert guest.asked == ["device_del"]
    assert three.uuids() == {T3}
    assert await closed(short)


async def test_a_failed_detach_leaves_all_devices(three: FakeSystem, short: Machine) -> None:
    async with scripted_guest(short, three, "g", U2) as guest:
        guest.on_detach = "refuses"
        with pytest.raises(errors.BusyError, match="guest g refuses to let go"):
            await remove_devices(short, UUIDS[:2], detach=True)
        assert guest.has(U2)
    assert three.uuids() == set(TEXTS)
    assert await closed(short)


async def test_a_device_that_stays_is_plugged_in_again(three: FakeSystem, short: Machine) -> None:
    three.refuse[f"{T2}/remove"] = errno.EIO
    async with scripted_guest(short, three, "g", U2) as guest:
        with pytest.raises(errors.MdoError, match="Input/output error") as caught:
            await remove_devices(short, [U2], detach=True)
        assert caught.value.__notes__ == ["all was undone"]
        assert guest.has(U2)
        assert guest.asked == ["device_del", "device_add"]


async def test_a_holder_that_is_no_guest_cannot_be_detached(
    held: FakeSystem, machine: Machine
) -> None:
    held.process(9, "spdk", ["spdk"], ["/dev/vfio/1"])
    with pytest.raises(errors.BusyError, match=r"held by spdk \(pid 9\) .*end that process first"):
        await remove_devices(machine, [U1], detach=True)
    with pytest.raises(
        errors.BusyError, match=r"held by guest 'g1' .*mdo did not start that guest"
    ):
        await remove_devices(machine, [U2], detach=True)
    assert held.writes == []


async def test_a_removal_that_blocks_names_the_process_that_came_in_between(
    held: FakeSystem, machine: Machine
) -> None:
    held.block[f"{T1}/remove"] = asyncio.Event()

    def before(name: str, _: str) -> None:
        if name == "remove":
            held.process(9, "spdk", ["spdk"], ["/dev/vfio/1"])

    held.before = before
    with pytest.raises(errors.DeadlineError, match=r"within 0.3 s: held by spdk \(pid 9\)"):
        await remove_devices(machine, [U1], deadline=0.3)


@pytest.mark.parametrize(
    ("uuids", "words"),
    [
        ([U1, U1], "given 2 times"),
        ([U1, UUID(T1[:-1] + "9")], f"did you mean {U1}?"),
        ([U1, UUID(int=0)], "mdo host lists them"),
    ],
)
async def test_a_removal_that_makes_no_sense(
    cards: FakeSystem, machine: Machine, uuids: Sequence[UUID], words: str
) -> None:
    cards.mdev("card0", "grid-11", T1)
    with pytest.raises(errors.RequestError) as caught:
        await remove_devices(machine, uuids)
    assert words in str(caught.value)
    assert cards.uuids() == {T1}


async def test_when_one_stays_the_others_are_created_again(
    three: FakeSystem, machine: Machine
) -> None:
    """And what is not managed here stays so."""
    three.refuse[f"{T2}/remove"] = errno.EIO
    with pytest.raises(
        errors.MdoError, match=f"cannot remove mdev {U2}: Input/output error"
    ) as caught:
        await remove_devices(machine, UUIDS)
    assert caught.value.__notes__ == ["all was undone"]
    assert caught.value.subject == f"mdev {U2}"
    assert three.uuids() == set(TEXTS)
    assert managed(machine) == set()
    assert await closed(machine)


async def test_what_else_was_refused_stands_beside_the_first_error(
    three: FakeSystem, machine: Machine
) -> None:
    gate = threading.Event()
    three.block |= {f"{T1}/remove": gate, f"{T2}/remove": gate}

    def before(_: str, uuid: str) -> None:
        if uuid == T2:  # both are under way
            gate.set()

    three.before = before
    three.refuse |= {f"{T1}/remove": errno.EIO, f"{T2}/remove": errno.EPERM}
    with pytest.raises(errors.MdoError, match=f"mdev {U1}: Input/output error") as caught:
        await remove_devices(machine, UUIDS)
    assert caught.value.__notes__[0].startswith(f"also: cannot remove mdev {U2}: Operation not")
    assert three.uuids() == set(TEXTS)


async def test_what_is_created_again_is_as_it_was(grouped: FakeSystem, machine: Machine) -> None:
    """Its group and its parameters too, whether it is managed or not."""
    own = await create(machine, "t-0", group=GROUP, attributes=[("vgpu_params", "a=1")])
    for uuid, text in ((T1, "b=2"), (T2, "")):
        path = grouped.mdev("card0", "t-0", uuid)
        (path / "group_uuid").write_text(f"{GROUP}\n")
        (path / "vgpu_params").write_text(f"{text}\n")
    grouped.refuse[f"{T2}/remove"] = errno.EIO
    with pytest.raises(errors.MdoError, match="Input/output error"):
        await remove_devices(machine, [*own, U1, U2])
    texts = {
        uuid: [(grouped.bus / uuid / file).read_text().strip() for file in ("group_uuid", PARAMS)]
        for uuid in grouped.uuids()
    }
    assert texts == {str(own[0]): [GROUP, "a=1"], T1: [GROUP, "b=2"], T2: [GROUP, ""]}
    assert managed(machine) == set(own)


@pytest.mark.parametrize("when", ["at the first", "at the last"])
async def test_a_cancelled_removal_leaves_all_devices(
    three: FakeSystem, machine: Machine, when: str
) -> None:
    """Not some of them, as many as were gone by then."""
    await take_over(machine, U1)
    blocked = T1 if when == "at the first" else T3
    gate = three.block[f"{blocked}/remove"] = asyncio.Event()
    work = asyncio.ensure_future(remove_devices(machine, UUIDS))
    while ("remove", blocked) not in three.writes:
        await asyncio.sleep(0.01)
    work.cancel()
    await asyncio.wait((work,), timeout=0.1)
    assert not work.done()  # the kernel has not answered
    gate.set()
    with pytest.raises(asyncio.CancelledError) as caught:
        await work
    assert caught.value.__notes__ == ["all was undone"]
    assert three.uuids() == set(TEXTS)
    assert managed(machine) == {U1}
    assert await closed(machine)


async def take_over(machine: Machine, *uuids: UUID) -> None:
    """Have devices managed."""
    records = {uuid: DeviceRecord(uuid=uuid, parent="card0", type="grid-11") for uuid in uuids}
    async with open_journal(machine) as journal:
        await journal.put(Change(devices=records))


async def test_a_device_that_another_command_is_at_work_at_is_not_removed(
    three: FakeSystem, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(Operation.__init__.__kwdefaults__, "wait", 0.3)
    async with open_journal(machine) as journal:
        run = await journal.begin("attach", f"g {U2}", (), [f"mdev:{U2}"])
        with pytest.raises(
            errors.BusyError, match=f"mdev {U2} is being changed by mdo attach g {U2}"
        ):
            await remove_devices(machine, UUIDS)
        assert three.writes == []
        await journal.end(run, "done")
    await remove_devices(machine, UUIDS)
    assert three.uuids() == set()


async def test_a_device_of_a_creation_under_way_is_not_removed(
    cards: FakeSystem, machine: Machine
) -> None:
    """It is waited for, and what is there then is removed."""
    gate = cards.block[T2] = asyncio.Event()
    creating = asyncio.ensure_future(create(machine, "grid-12", uuids=[U1, U2]))
    while T1 not in cards.uuids():
        await asyncio.sleep(0.01)
    removing = asyncio.ensure_future(remove_devices(machine, [U1]))
    await asyncio.sleep(0.3)
    assert ("remove", T1) not in cards.writes
    gate.set()
    await creating
    await removing
    assert cards.uuids() == {T2}


async def test_a_removal_that_was_killed_is_finished(three: FakeSystem, machine: Machine) -> None:
    await take_over(machine, U1)

    await killed(remove_devices(machine, UUIDS, observe=dies_at(StepEventKind.ACTED)))
    (done,) = await recovery.recover(machine)
    assert (done.way, done.errors) == ("finish", ())
    assert three.uuids() == set()
    assert managed(machine) == set()
    assert await closed(machine)


# ---- a journal that cannot be written ----


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (full_disk, "cannot be written"),
        pytest.param(read_only, "see its permissions and those of its directory", marks=needs_root),
        pytest.param(read_only_mount, "mounted read-only (mount it for writing", marks=needs_root),
        (locked, "is locked by another process"),
    ],
)
async def test_nothing_is_removed_when_the_journal_cannot_be_written(
    three: FakeSystem,
    machine: Machine,
    monkeypatch: pytest.MonkeyPatch,
    broken: Breaker,
    words: str,
) -> None:
    await take_over(machine, U1)
    monkeypatch.setattr(journal_db, "LOCK_SECONDS", 0.2)
    with broken(machine), pytest.raises(errors.HostError) as caught:
        await remove_devices(machine, UUIDS)
    assert words in str(caught.value)
    assert three.writes == []
    assert three.uuids() == set(TEXTS)


# ---------------------------------------------------------------- groups and attributes


GROUP = "aaaaaaaa-1111-4222-8333-444444444444"
PARAMS = "vgpu_params"


@pytest.fixture
def grouped(system: FakeSystem) -> FakeSystem:
    for number, name in enumerate(("card0", "card1")):
        system.parent(name)
        system.type(name, f"t-{number}", 4)
        system.groups_of(name, 3)
    return system


async def test_create_into_a_group_with_parameters(grouped: FakeSystem, machine: Machine) -> None:
    made = await create_devices(
        machine,
        "t-0",
        2,
        group=GROUP,
        attributes=[("vgpu_params", "a=1"), ("vgpu_params", "a=1,b=2")],
    )
    assert {mdev.group_uuid for mdev in made} == {UUID(GROUP)}
    assert {(mdev.online, mdev.params) for mdev in made} == {(False, "a=1,b=2")}
    written = [name for name, _ in grouped.writes if name != "create"]
    assert written == ["vgpu_params", "vgpu_params", "group_uuid"] * 2


async def test_the_group_may_stand_among_the_attributes(
    grouped: FakeSystem, machine: Machine
) -> None:
    (mdev,) = await create_devices(
        machine, "t-0", attributes=[("group_uuid", GROUP), ("vgpu_params", "a=1")]
    )
    assert (mdev.group_uuid, mdev.params) == (UUID(GROUP), "a=1")
    assert [name for name, _ in grouped.writes] == ["create", "group_uuid", "vgpu_params"]
    with pytest.raises(errors.RequestError, match="the start group is given twice"):
        await create_devices(machine, "t-0", group="peers", attributes=[("group_uuid", GROUP)])
    assert grouped.uuids() == {str(mdev.uuid)}


async def test_a_group_by_name_is_the_same_every_time(
    grouped: FakeSystem, machine: Machine
) -> None:
    found = [(await create_devices(machine, "t-0", group="peers"))[0] for _ in range(2)]
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
    grouped: FakeSystem, machine: Machine, name: str, words: str
) -> None:
    with pytest.raises(errors.RequestError, match=words):
        await create_devices(machine, "t-0", attributes=[(name, "1")])
    assert grouped.writes == []


async def test_a_file_behind_a_link_is_not_the_mdevs(grouped: FakeSystem, machine: Machine) -> None:
    with pytest.raises(errors.RequestError, match="leads out of its directory"):
        await create_devices(machine, "t-0", attributes=[("mdev_type/name", "x")])
    assert grouped.uuids() == set()
    assert (grouped.types("card0") / "t-0" / "name").read_text() == "Name of t-0\n"


async def test_a_file_that_is_not_there_undoes_all(grouped: FakeSystem, machine: Machine) -> None:
    with pytest.raises(errors.HostError, match=r"has no file params .*can be set: vgpu_params"):
        await create_devices(machine, "t-0", 3, attributes=[("params", "1")])
    assert grouped.uuids() == set()


@pytest.mark.parametrize("value", ["a\0b", "\udcff", "x" * 5000])
async def test_a_value_fits_a_file_of_sysfs(
    grouped: FakeSystem, machine: Machine, value: str
) -> None:
    with pytest.raises(errors.RequestError, match="is not text of at most 4095 bytes"):
        await create_devices(machine, "t-0", attributes=[("vgpu_params", value)])


async def test_a_group_of_another_parent_is_refused_in_words(
    grouped: FakeSystem, machine: Machine
) -> None:
    await create_devices(machine, "t-0", group=GROUP)
    with pytest.raises(
        errors.RequestError, match=f"start group {GROUP} is on parent card0.* on card1"
    ):
        await create_devices(machine, "t-1", group=GROUP)
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
    grouped: FakeSystem, machine: Machine, number: int, words: str
) -> None:
    uuids = [uuid4() for _ in range(2)]
    grouped.refuse[f"{uuids[1]}/group_uuid"] = number
    with pytest.raises(errors.MdoError, match=words) as refusal:
        await create_devices(machine, "t-0", uuids=uuids, group=GROUP)
    assert refusal.value.__notes__ == ["all was undone"]
    assert grouped.uuids() == set()


async def test_a_driver_without_groups_says_so(system: FakeSystem, machine: Machine) -> None:
    system.parent("card0")
    system.type("card0", "t-0", 4)
    with pytest.raises(errors.HostError, match="card0 has no start groups"):
        await create_devices(machine, "t-0", 2, group="peers")
    assert system.uuids() == set()


async def test_ten_left_are_enough_for_nine(cards: FakeSystem, machine: Machine) -> None:
    """Counts are numbers: as text, "10" comes before "9"."""
    (cards.types("card1") / "grid-12" / "available_instances").write_text("10\n")
    assert len(await create(machine, "grid-12", 9)) == 9
