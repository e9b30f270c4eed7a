# SPDX-License-Identifier: GPL-2.0-or-later
"""One creation, one removal, and what the kernel's refusals become."""

from __future__ import annotations

import asyncio
import errno
import shutil
import threading
from typing import Literal
from uuid import UUID

import pytest

from mdev_orchestrator import errors
from mdev_orchestrator.errors import Outcome
from mdev_orchestrator.host import sysfs
from mdev_orchestrator.machine import Machine
from unit.fakesys import FakeSystem

U1 = UUID("83b8f4f2-509f-382f-3c1e-e6bfe0fa1001")


@pytest.fixture
def card(system: FakeSystem) -> FakeSystem:
    system.parent("card0")
    system.type("card0", "t-1", 2)
    system.parent("card1")
    system.type("card1", "t-1", 2)
    return system


async def test_create_then_remove(card: FakeSystem, machine: Machine) -> None:
    await sysfs.create(machine, "card0", "t-1", U1)
    assert card.uuids() == {str(U1)}
    await sysfs.remove(machine, U1, 1)
    assert card.uuids() == set()


@pytest.mark.parametrize(
    ("number", "error", "words"),
    [
        (errno.EINVAL, errors.MdoError, "does not accept it"),
        (errno.EUSERS, errors.CapacityError, "no instance left (available_instances reads 2)"),
        (errno.ENOSPC, errors.CapacityError, "no instance left"),
        (errno.ENODEV, errors.UnknownError, "going away"),
        (errno.EACCES, errors.HostError, "run as root"),
        (errno.EROFS, errors.HostError, "remount,rw"),
        (
            errno.EIO,
            errors.MdoError,
            "Input/output error (the driver's own words are in the kernel log",
        ),
    ],
)
async def test_refusals_of_the_kernel(
    card: FakeSystem, number: int, error: type[errors.MdoError], words: str, machine: Machine
) -> None:
    card.refuse[str(U1)] = number
    with pytest.raises(error) as caught:
        await sysfs.create(machine, "card0", "t-1", U1)
    assert type(caught.value) is error
    assert caught.value.outcome is Outcome.NO_EFFECT
    assert (caught.value.errno, caught.value.subject) == (number, f"mdev {U1}")
    assert words in str(caught.value)


@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_creation_whose_writer_is_killed_is_unknown_and_no_refusal(
    card: FakeSystem, machine: Machine, when: Literal["before", "after"]
) -> None:
    card.kill[str(U1)] = when
    with pytest.raises(
        errors.MdoError, match=r"was killed; whether mdev .* was created is not"
    ) as caught:
        await sysfs.create(machine, "card0", "t-1", U1)
    assert (caught.value.outcome, caught.value.errno) == (Outcome.UNKNOWN, None)
    assert "mdo recover" in caught.value.hint
    assert card.uuids() == ({str(U1)} if when == "after" else set())


@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_removal_whose_writer_is_killed_is_unknown_and_no_refusal(
    card: FakeSystem, machine: Machine, when: Literal["before", "after"]
) -> None:
    card.mdev("card0", "t-1", str(U1))
    card.kill[f"{U1}/remove"] = when
    with pytest.raises(
        errors.MdoError, match=r"was killed; whether mdev .* was removed is not"
    ) as caught:
        await sysfs.remove(machine, U1, 5)
    assert caught.value.outcome is Outcome.UNKNOWN


async def test_a_taken_uuid_names_the_parent_that_has_it(
    card: FakeSystem, machine: Machine
) -> None:
    card.mdev("card1", "t-1", str(U1))
    with pytest.raises(errors.UuidError, match="exists already under parent card1 as t-1"):
        await sysfs.create(machine, "card0", "t-1", U1)


@pytest.mark.parametrize("name", ["", ".", "..", "../../etc", "a\0b"])
async def test_a_name_cannot_lead_out_of_sysfs(
    card: FakeSystem, name: str, machine: Machine
) -> None:
    with pytest.raises(errors.UnknownError):
        await sysfs.create(machine, name, "t-1", U1)
    with pytest.raises(errors.UnknownError):
        await sysfs.create(machine, "card0", name, U1)
    assert card.writes == []


async def test_what_is_not_there_cannot_be_removed(card: FakeSystem, machine: Machine) -> None:
    with pytest.raises(errors.UnknownError, match="there is no mdev"):
        await sysfs.remove(machine, U1, 1)


async def test_a_removal_that_blocks_ends_at_its_deadline(
    card: FakeSystem, machine: Machine
) -> None:
    card.mdev("card0", "t-1", str(U1))
    card.block[f"{U1}/remove"] = asyncio.Event()
    with pytest.raises(errors.DeadlineError, match="ends the removal by itself") as caught:
        await sysfs.remove(machine, U1, 0.2)
    assert caught.value.outcome is Outcome.UNKNOWN


@pytest.mark.parametrize("answer", [0, errno.ENOENT, errno.ENODEV])
async def test_a_removal_that_another_program_has_begun_is_waited_for(
    card: FakeSystem, answer: int, machine: Machine
) -> None:
    device = card.mdev("card0", "t-1", str(U1))

    def begun(_name: str, uuid: str) -> int:
        (card.bus / uuid).unlink()  # the kernel takes the link away first
        threading.Timer(0.1, shutil.rmtree, [device]).start()
        return answer

    card.before = begun
    await sysfs.remove(machine, U1, 5)
    assert not device.exists()


async def test_what_is_being_created_is_not_removed_before_it_is_there(
    card: FakeSystem, machine: Machine
) -> None:
    device = card.mdev("card0", "t-1", str(U1))
    link = (device / "mdev_type").readlink()
    (device / "mdev_type").unlink()
    removing = asyncio.ensure_future(sysfs.remove(machine, U1, 5))
    await asyncio.sleep(0.1)
    assert card.writes == []
    (device / "mdev_type").symlink_to(link)
    await removing
    assert [name for name, _ in card.writes] == ["remove"]


async def test_what_is_being_created_and_never_there_is_said(
    card: FakeSystem, machine: Machine
) -> None:
    (card.mdev("card0", "t-1", str(U1)) / "mdev_type").unlink()
    with pytest.raises(errors.DeadlineError, match="it is still being created") as caught:
        await sysfs.remove(machine, U1, 0.1)
    assert caught.value.outcome is Outcome.NO_EFFECT
    assert card.writes == []


async def test_optional_files_of_a_device(card: FakeSystem, machine: Machine) -> None:
    path = card.mdev("card0", "t-1", str(U1))
    assert sysfs.read_file(machine, U1, "online") is None
    assert not await sysfs.write_file(machine, U1, "online", "1")
    (path / "online").write_text("0\n")
    assert await sysfs.write_file(machine, U1, "online", "1")
    assert sysfs.read_file(machine, U1, "online") == "1"
    card.refuse[f"{U1}/online"] = errno.ENOSPC
    with pytest.raises(errors.MdoError, match="refused '1' for online"):
        await sysfs.write_file(machine, U1, "online", "1")
