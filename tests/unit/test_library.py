# SPDX-License-Identifier: GPL-2.0-or-later
"""What an open machine adds to the engine; docs/library.md's examples are tests as well."""

from __future__ import annotations

import threading

import pytest

import mdev_orchestrator as mdo
from mdev_orchestrator import library
from mdev_orchestrator.errors import Outcome, UnknownError
from unit.fakesys import FakeSystem


@pytest.fixture
def opened(system: FakeSystem) -> mdo.OpenMachine:
    system.parent("card0")
    system.type("card0", "t-1", 100)
    return mdo.open(system.root, state=system.root / "state")


async def test_records_are_read_off_the_event_loop(
    opened: mdo.OpenMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite may wait for another process."""
    threads = []

    def read(_: object) -> mdo.Managed:
        threads.append(threading.current_thread())
        return mdo.Managed()

    monkeypatch.setattr(library, "read_managed", read)
    assert await opened.managed() == mdo.Managed()
    assert threads != [threading.main_thread()]


async def test_a_device_that_is_removed_as_soon_as_it_is_there(
    opened: mdo.OpenMachine, system: FakeSystem
) -> None:
    """The call is over then, all but the last look at the device."""

    def another_program(event: mdo.StepEvent) -> None:
        if event.kind is mdo.StepEventKind.DONE:
            (uuid,) = system.uuids()
            system.perform(str(system.bus / uuid / "remove"), b"1")

    async with opened:
        with pytest.raises(UnknownError, match="another program removed the mdev") as caught:
            await opened.create("t-1", observe=another_program)
    assert caught.value.outcome is Outcome.UNKNOWN


async def test_the_writer_ends_with_the_block(opened: mdo.OpenMachine, system: FakeSystem) -> None:
    async with opened:
        device = await opened.create("t-1")
        assert opened.writer._lanes
    assert not opened.writer._lanes
    assert system.uuids() == {str(device.uuid)}


async def test_it_can_be_used_again_when_it_was_closed(opened: mdo.OpenMachine) -> None:
    for _ in range(2):
        async with opened:
            device = await opened.create("t-1")
            assert await opened.remove([device.uuid]) == (device.uuid,)


async def test_what_recover_would_do_is_told_without_a_journal(opened: mdo.OpenMachine) -> None:
    async with opened:
        assert await opened.pending() == []
    assert not opened.journal_path.exists()
