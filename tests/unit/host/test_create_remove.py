# SPDX-License-Identifier: GPL-2.0-or-later
"""One creation, one removal, and what the kernel's refusals become."""

from __future__ import annotations

import asyncio
import errno
import shutil
from uuid import UUID

import pytest

from mdev_orchestrator.errors import (
    CapacityError,
    DeadlineError,
    HostError,
    MdoError,
    UnknownError,
    UuidError,
)
from mdev_orchestrator.host import sysfs
from unit.fakesys import FakeSystem

U1 = UUID("83b8f4f2-509f-382f-3c1e-e6bfe0fa1001")


@pytest.fixture
def card(system: FakeSystem) -> FakeSystem:
    system.parent("card0")
    system.type("card0", "t-1", 2)
    system.parent("card1")
    system.type("card1", "t-1", 2)
    return system


async def test_create_then_remove(card: FakeSystem) -> None:
    await sysfs.create("card0", "t-1", U1, card.root, write=card.write)
    assert card.uuids() == {str(U1)}
    await sysfs.remove(U1, 1, card.root, write=card.write)
    assert card.uuids() == set()


@pytest.mark.parametrize(
    ("number", "error", "words"),
    [
        (errno.EINVAL, MdoError, "does not accept it"),
        (errno.EUSERS, CapacityError, "no instance left (available_instances reads 2)"),
        (errno.ENOSPC, CapacityError, "no instance left"),
        (errno.ENODEV, UnknownError, "going away"),
        (errno.EACCES, HostError, "run as root"),
        (errno.EROFS, HostError, "remount,rw"),
        (errno.EIO, MdoError, "Input/output error (the driver's own words are in the kernel log"),
    ],
)
async def test_refusals_of_the_kernel(
    card: FakeSystem, number: int, error: type[MdoError], words: str
) -> None:
    card.refuse[str(U1)] = number
    with pytest.raises(error) as caught:
        await sysfs.create("card0", "t-1", U1, card.root, write=card.write)
    assert type(caught.value) is error
    assert words in str(caught.value)


async def test_a_taken_uuid_names_the_parent_that_has_it(card: FakeSystem) -> None:
    card.mdev("card1", "t-1", str(U1))
    with pytest.raises(UuidError, match="exists already under parent card1 as t-1"):
        await sysfs.create("card0", "t-1", U1, card.root, write=card.write)


@pytest.mark.parametrize("name", ["", ".", "..", "../../etc", "a\0b"])
async def test_a_name_cannot_lead_out_of_sysfs(card: FakeSystem, name: str) -> None:
    with pytest.raises(UnknownError):
        await sysfs.create(name, "t-1", U1, card.root, write=card.write)
    with pytest.raises(UnknownError):
        await sysfs.create("card0", name, U1, card.root, write=card.write)
    assert card.writes == []


async def test_what_is_not_there_cannot_be_removed(card: FakeSystem) -> None:
    with pytest.raises(UnknownError, match="there is no mdev"):
        await sysfs.remove(U1, 1, card.root, write=card.write)


async def test_a_removal_that_blocks_ends_at_its_deadline(card: FakeSystem) -> None:
    card.mdev("card0", "t-1", str(U1))
    card.block[f"{U1}/remove"] = asyncio.Event()
    with pytest.raises(DeadlineError, match="ends the removal by itself"):
        await sysfs.remove(U1, 0.05, card.root, write=card.write)


@pytest.mark.parametrize("answer", [0, errno.ENOENT, errno.ENODEV])
async def test_a_removal_begun_by_somebody_else_is_waited_for(
    card: FakeSystem, answer: int
) -> None:
    device = card.mdev("card0", "t-1", str(U1))

    async def late(_path: str, _data: bytes) -> int:
        (card.bus / str(U1)).unlink()  # the kernel takes the link away first
        asyncio.get_running_loop().call_later(0.1, shutil.rmtree, device)
        return answer

    await sysfs.remove(U1, 5, card.root, write=late)
    assert not device.exists()


async def test_what_is_being_created_is_not_removed_before_it_is_there(card: FakeSystem) -> None:
    device = card.mdev("card0", "t-1", str(U1))
    link = (device / "mdev_type").readlink()
    (device / "mdev_type").unlink()
    removing = asyncio.ensure_future(sysfs.remove(U1, 5, card.root, write=card.write))
    await asyncio.sleep(0.1)
    assert card.writes == []
    (device / "mdev_type").symlink_to(link)
    await removing
    assert [name for name, _ in card.writes] == ["remove"]


async def test_what_is_being_created_and_never_there_is_said(card: FakeSystem) -> None:
    (card.mdev("card0", "t-1", str(U1)) / "mdev_type").unlink()
    with pytest.raises(DeadlineError, match="it is still being created"):
        await sysfs.remove(U1, 0.1, card.root, write=card.write)
    assert card.writes == []


async def test_optional_files_of_a_device(card: FakeSystem) -> None:
    path = card.mdev("card0", "t-1", str(U1))
    assert sysfs.read_file(U1, "online", card.root) is None
    assert not await sysfs.write_file(U1, "online", "1", card.root, write=card.write)
    (path / "online").write_text("0\n")
    assert await sysfs.write_file(U1, "online", "1", card.root, write=card.write)
    assert sysfs.read_file(U1, "online", card.root) == "1"
    card.refuse[f"{U1}/online"] = errno.ENOSPC
    with pytest.raises(MdoError, match="refused '1' for online"):
        await sysfs.write_file(U1, "online", "1", card.root, write=card.write)
