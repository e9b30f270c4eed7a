# SPDX-License-Identifier: GPL-2.0-or-later
"""What is there and not managed is managed afterwards, and nothing is created twice for it."""

from __future__ import annotations

import json
from pathlib import Path
from uuid import UUID

import pytest

from mdev_orchestrator.engine.adopt import adopt
from mdev_orchestrator.engine.apply import apply, destroy, diff
from mdev_orchestrator.engine.journal import open_journal
from mdev_orchestrator.engine.journal_db import read_managed
from mdev_orchestrator.engine.records import Change, GuestRecord, Managed
from mdev_orchestrator.errors import RequestError, UnknownError
from mdev_orchestrator.machine import Machine
from mdev_orchestrator.spec import Document, parse
from unit.engine.scripted import scripted_guest
from unit.fakesys import FakeSystem

U1, U2, U3 = UUIDS = [UUID(f"83b8f4f2-509f-382f-3c1e-e6bfe0fa100{n}") for n in "123"]
T1, T2, T3 = TEXTS = [str(uuid) for uuid in UUIDS]
POOL = """\
name = "lab"
[[pool]]
name = "p"
type = "t-1"
count = 3
params = "x=1"
"""


@pytest.fixture
def card(system: FakeSystem) -> FakeSystem:
    system.parent("card0")
    system.type("card0", "t-1", 8)
    system.groups_of("card0", 3)
    return system


@pytest.fixture
def short(system: FakeSystem, place: Path) -> Machine:
    """The machine with guests, whose sockets need a state directory with a short name."""
    return Machine(system.root, state=place)


def document(text: str = POOL) -> Document:
    return parse(text, "lab.toml")


def lose_journal(machine: Machine) -> None:
    for file in machine.state_dir.glob("journal.*"):
        file.unlink()
    assert read_managed(machine) == Managed()


async def test_a_guest_that_runs_replaces_the_record_of_one_that_does_not(
    card: FakeSystem, short: Machine
) -> None:
    """Of the same name and with another UUID: it was started again by hand, for instance."""
    old = GuestRecord(name="g", uuid=U3, spec="lab", devices=(U2,))
    async with open_journal(short) as journal:
        await journal.put(Change(guests={"g": old}))
    card.mdev("card0", "t-1", T1)
    async with scripted_guest(short, card, "g", U1) as guest:
        adopted = await adopt(short, ["g"])
        assert (adopted.guests, adopted.devices) == (("g",), (U1,))
        managed = read_managed(short)
        assert managed.guests["g"] == GuestRecord(name="g", uuid=guest.uuid, definition="")
        assert managed.devices[U1].owner == "guest:g"
        again = await adopt(short, ["g"])
        assert (again.guests, again.devices) == ((), ())


@pytest.mark.parametrize("names", [[], ["g"]], ids=["everything", "by-name"])
async def test_a_guest_that_is_known_stays_as_it_is(
    card: FakeSystem, short: Machine, names: list[str]
) -> None:
    async with scripted_guest(short, card) as guest:
        known = GuestRecord(name="g", uuid=guest.uuid, spec="lab", devices=(U2,))
        async with open_journal(short) as journal:
            await journal.put(Change(guests={"g": known}))
        await adopt(short, names, everything=not names)
        assert read_managed(short).guests == {"g": known}


async def test_the_devices_of_a_pool_are_found_again_when_the_journal_is_lost(
    card: FakeSystem, machine: Machine
) -> None:
    await apply(machine, document())
    lose_journal(machine)
    there = card.uuids()
    changes = await diff(machine, document())
    assert len(changes.steps) == 3  # so they must be adopted first
    adopted = await adopt(machine, [], everything=True)
    assert {str(uuid) for uuid in adopted.devices} == there
    assert all(record.adopted for record in read_managed(machine).devices.values())
    card.writes.clear()
    assert (await diff(machine, document())).steps == ()
    assert (await apply(machine, document())).steps == ()
    assert card.writes == []
    records = read_managed(machine).devices.values()
    assert {(one.spec, one.owner, one.adopted) for one in records} == {("lab", "pool:p", False)}
    await destroy(machine, "lab")
    assert card.uuids() == set()
    assert read_managed(machine) == Managed()


async def test_a_full_parent_is_enough_for_what_is_there_already(
    card: FakeSystem, machine: Machine
) -> None:
    """Devices that were made again would not fit."""
    text = POOL.replace("count = 3", "count = 8")
    await apply(machine, document(text))
    lose_journal(machine)
    await adopt(machine, [], everything=True)
    assert (await apply(machine, document(text))).steps == ()
    assert len(card.uuids()) == 8


async def test_an_adopted_device_that_is_not_as_asked_for_is_not_taken(
    card: FakeSystem, machine: Machine
) -> None:
    """And it stays: no spec says that it shall go."""
    card.mdev("card0", "t-1", T1)
    await adopt(machine, [T1])
    text = POOL.replace("count = 3", "count = 1")
    await apply(machine, document(text))
    assert len(card.uuids()) == 2
    assert read_managed(machine).devices[U1].spec is None


async def test_everything_is_what_belongs_to_no_other_program(
    card: FakeSystem, short: Machine
) -> None:
    for uuid in TEXTS:
        card.mdev("card0", "t-1", uuid)
    card.process(41, "qemu-system-x86", ["qemu", "-name", "guest=g1"], ["/dev/vfio/1"])
    defined = card.root / "etc/mdevctl.d/card0" / T2
    defined.parent.mkdir(parents=True)
    defined.write_text(json.dumps({"mdev_type": "t-1", "start": "auto", "attrs": []}))
    adopted = await adopt(short, [], everything=True)
    assert adopted.devices == (U3,)
    # by name each of them can be had
    await adopt(short, TEXTS)
    assert set(read_managed(short).devices) == set(UUIDS)


async def test_a_device_of_a_guest_belongs_to_it(card: FakeSystem, short: Machine) -> None:
    for uuid in TEXTS[:2]:
        card.mdev("card0", "t-1", uuid)
    async with scripted_guest(short, card, "g", U1):
        adopted = await adopt(short, [], everything=True)
    assert (adopted.guests, set(adopted.devices)) == (("g",), {U1, U2})
    owners = {uuid: device.owner for uuid, device in read_managed(short).devices.items()}
    assert owners == {U1: "guest:g", U2: ""}


async def test_what_cannot_be_adopted(card: FakeSystem, short: Machine) -> None:
    with pytest.raises(UnknownError, match="no guest is called g"):
        await adopt(short, ["g"])
    with pytest.raises(UnknownError, match=f"there is no mdev {U1}"):
        await adopt(short, [T1])
    (card.mdev("card0", "t-1", T1) / "mdev_type").unlink()
    with pytest.raises(RequestError, match="is being removed"):
        await adopt(short, [T1])
    async with scripted_guest(short, card) as guest:
        await guest.end()
        with pytest.raises(RequestError, match="guest g does not run"):
            await adopt(short, ["g"])
        assert (await adopt(short, [], everything=True)).guests == ()
    assert read_managed(short) == Managed()
