# SPDX-License-Identifier: GPL-2.0-or-later
"""Specs made true on the real kernel: all or none, and beside other programs that want the same."""

from __future__ import annotations

import asyncio
import shutil
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from uuid import uuid4

import pytest

from lab.machine import machine
from mdev_orchestrator.engine import guest_ops
from mdev_orchestrator.engine.apply import apply, destroy, diff
from mdev_orchestrator.engine.devices import remove_devices
from mdev_orchestrator.engine.journal import Journal
from mdev_orchestrator.engine.journal_db import read_managed
from mdev_orchestrator.errors import BusyError, CapacityError, MdoError, QemuError, RequestError
from mdev_orchestrator.host import sysfs
from mdev_orchestrator.host.holders import read_holders
from mdev_orchestrator.machine import Machine
from mdev_orchestrator.qemu import process
from mdev_orchestrator.spec import Document, parse
from mdev_orchestrator.state import private_dir

GUEST = '[[guest]]\nname = "{}"\nmemory = "64M"\naccel = "tcg"\nextra = ["-S"{}]\n'
POOL = '[[pool]]\nname = "p"\ntype = "mvgpu-128M"\ncount = {}\n'


@pytest.fixture(autouse=True)
async def given_back(tmp_path: Path) -> AsyncIterator[None]:
    """A test begins and ends with a machine without devices and guests."""
    assert sysfs.read_host(machine()).mdevs == ()
    yield
    for home in (machine(), *map(of_state, tmp_path.glob("*/"))):
        for guest in process.list_guests(home):
            await guest_ops.end(home, guest, deadline=0, force=True)
    if left := [mdev.uuid for mdev in sysfs.read_host(machine()).mdevs]:
        await remove_devices(machine(), left)
    assert {p.links_free == p.links for p in sysfs.read_host(machine()).parents} == {True}


def spec(*parts: str, name: str = "story") -> Document:
    return parse(f'name = "{name}"\n' + "\n".join(parts), name)


def of_state(place: Path) -> Machine:
    """The machine with a state directory: an orchestrator that knows nothing of any other."""
    return Machine(state=private_dir(place))


def sixteen(*extra: str) -> Document:
    """Sixteen guests with a device each; a word more on the last one's command line."""
    words = [""] * 15 + ["".join(f', "{word}"' for word in extra)]
    device = '[[guest.mdev]]\ntype = "mvgpu-11"\n'
    return spec(*(GUEST.format(f"g{n}", word) + device for n, word in enumerate(words)))


async def test_sixteen_guests_of_one_spec_start_together(tmp_path: Path) -> None:
    ours = of_state(tmp_path / "ours")
    done = await apply(ours, sixteen())
    assert len(done.steps) == 32
    guests = process.list_guests(ours)
    assert [guest.state for guest in guests] == [process.State.RUNNING] * 16
    held = read_holders(machine(), sysfs.read_host(machine()).mdevs).by_mdev
    assert Counter(len(holders) for holders in held.values()) == {1: 16}
    assert (await apply(ours, sixteen())).nothing
    await destroy(ours, "story", force=True, deadline=0)
    assert sysfs.read_host(machine()).mdevs == ()
    assert process.list_guests(ours) == []


async def test_or_none_of_them(tmp_path: Path) -> None:
    ours = of_state(tmp_path / "ours")
    with pytest.raises(QemuError, match="guest g15: QEMU ended") as caught:
        await apply(ours, sixteen("-no-such-option"))
    assert "all was undone" in caught.value.__notes__
    assert sysfs.read_host(machine()).mdevs == ()
    assert process.list_guests(ours) == []
    owned = read_managed(ours)
    assert (owned.devices, owned.guests, owned.specs) == ({}, {}, {})


async def test_two_orchestrators_and_the_last_slots(tmp_path: Path) -> None:
    """Each of the two asks for all eight: one has them, the other has nothing and knows why."""
    homes = [of_state(tmp_path / name) for name in ("left", "right")]
    done = await asyncio.gather(
        *(apply(home, spec(POOL.format(8))) for home in homes), return_exceptions=True
    )
    won = [read_managed(home).devices for home in homes]
    assert {uuid for devices in won for uuid in devices} == {
        m.uuid for m in sysfs.read_host(machine()).mdevs
    }
    lost = [one for one in done if isinstance(one, MdoError)]
    if len(lost) == 1:  # else both were refused one at the last moment, and both gave back
        assert sorted(map(len, won)) == [0, 8]
    else:
        assert won == [{}, {}]
    for error in lost:
        assert isinstance(error, CapacityError)
        assert {"all was undone", "nothing was changed"} & set(error.__notes__)
    for home in homes:
        with Journal.open(home.journal_path) as book:
            assert book.open_runs() == []


async def test_two_orchestrators_and_one_uuid(tmp_path: Path) -> None:
    uuid = uuid4()
    device = f'[[guest.mdev]]\ntype = "mvgpu-12"\nuuid = "{uuid}"\n'
    document = spec(GUEST.format("g", "") + device)
    homes = [of_state(tmp_path / name) for name in ("left", "right")]
    done = await asyncio.gather(*(apply(home, document) for home in homes), return_exceptions=True)
    lost = [one for one in done if isinstance(one, RequestError)]
    assert len(lost) == 1, done
    assert str(uuid) in lost[0].message
    (mdev,) = sysfs.read_host(machine()).mdevs
    (holder,) = read_holders(machine(), [mdev]).of(uuid)
    assert holder.guest == "g"
    running = [guest for home in homes for guest in process.list_guests(home)]
    assert [guest.alive for guest in running] == [True]


async def test_the_same_spec_twice_at_the_same_time(tmp_path: Path) -> None:
    """Ten commands on one journal make it true once."""
    ours = of_state(tmp_path / "ours")
    done = await asyncio.gather(*(apply(ours, spec(POOL.format(3))) for _ in range(10)))
    assert sorted(len(changes.steps) for changes in done) == [0] * 9 + [3]
    assert len(sysfs.read_host(machine()).mdevs) == 3


async def test_a_spec_that_another_command_changes(tmp_path: Path) -> None:
    ours = of_state(tmp_path / "ours")
    await apply(ours, spec(POOL.format(1)))
    with Journal.open(ours.journal_path) as book:
        await book.begin("apply", "story", (), ["spec:story"])
        with pytest.raises(BusyError, match=r"spec story is being changed by mdo apply story \(pr"):
            await apply(ours, spec(POOL.format(2)))


@pytest.mark.skipif(shutil.which("mdevctl") is None, reason="there is no mdevctl")
async def test_beside_mdevctl(tmp_path: Path) -> None:
    """Four of mdevctl's and eight of ours want eight slots: no device has two owners."""
    ours = of_state(tmp_path / "ours")
    theirs = [uuid4() for _ in range(4)]

    async def mdevctl() -> list[int]:
        codes = []
        for uuid in theirs:
            words = ["start", "-u", str(uuid), "-p", "igd0", "--type", "mvgpu-128M"]
            started = await asyncio.create_subprocess_exec(
                "mdevctl", *words, stderr=asyncio.subprocess.DEVNULL
            )
            codes.append(await started.wait())
        return codes

    codes, done = await asyncio.gather(
        mdevctl(), apply(ours, spec(POOL.format(8))), return_exceptions=True
    )
    assert isinstance(codes, list)
    mine = set(read_managed(ours).devices)
    here = {mdev.uuid for mdev in sysfs.read_host(machine()).mdevs}
    assert mine.isdisjoint(theirs)
    assert here == mine | {uuid for uuid, code in zip(theirs, codes, strict=True) if code == 0}
    assert len(mine) == (0 if isinstance(done, MdoError) else 8)


async def test_a_change_that_does_not_fit_beside_the_old_takes_its_place(tmp_path: Path) -> None:
    ours = of_state(tmp_path / "ours")
    await apply(ours, spec(POOL.format(8)))
    wide = '[[pool]]\nname = "p"\ntype = "mvgpu-512M"\ncount = 2\n'
    changes = await diff(ours, spec(wide))
    assert [type(p.step).__name__ for p in changes.steps] == ["Remove"] * 8 + ["Create"] * 2
    await apply(ours, spec(wide))
    assert [mdev.type_id for mdev in sysfs.read_host(machine()).mdevs] == ["mvgpu-512M"] * 2


async def test_what_is_lost_comes_back_under_its_uuid(tmp_path: Path) -> None:
    ours = of_state(tmp_path / "ours")
    await apply(ours, spec(POOL.format(3)))
    before = sysfs.read_host(machine()).mdevs
    await sysfs.remove(machine(), before[1].uuid, 10)
    await apply(ours, spec(POOL.format(3)))
    assert {mdev.uuid for mdev in sysfs.read_host(machine()).mdevs} == {
        mdev.uuid for mdev in before
    }
