# SPDX-License-Identifier: GPL-2.0-or-later
"""docs/library.md: every example runs on the real kernel, and leaves nothing behind.

Those that need a guest have one that has booted.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import mdev_orchestrator as mdo
from mdev_lab import l2
from unit import library_page
from unit.library_page import Example

EXAMPLES = library_page.examples()
BOOT_SECONDS = 400.0


@pytest.fixture
async def machine() -> AsyncIterator[mdo.OpenMachine]:
    async with mdo.open() as machine:
        before = (await machine.scan()).mdevs
        yield machine
        assert (await machine.scan()).mdevs == before
        assert await machine.guests() == []
        assert await machine.pending() == []


@pytest.fixture
async def guest(machine: mdo.OpenMachine) -> AsyncIterator[None]:
    """The guest of the page's examples; what it was given goes with it."""
    config = mdo.GuestConfig(
        name="render-1",
        memory=mdo.Size.read("256M"),
        kernel=Path(os.environ["MDO_LAB_KERNEL"]),
        initrd=Path(os.environ["MDO_LAB_INITRD"]),
        append=l2.APPEND,
    )
    running = await machine.start_guest(config)
    try:
        async with l2.program("render-1", running.console_socket, BOOT_SECONDS):
            yield
    finally:
        await machine.stop_guest("render-1", deadline=0, force=True)
        await machine.remove([*(await machine.managed()).devices])


@pytest.mark.parametrize("example", [e for e in EXAMPLES if e.is_program], ids=str)
def test_a_program_of_the_page(example: Example) -> None:
    example.run_program()


@pytest.mark.parametrize(
    "example", [e for e in EXAMPLES if not (e.is_program or e.needs_guest)], ids=str
)
async def test_an_example(example: Example, machine: mdo.OpenMachine) -> None:
    await example.run(machine)


@pytest.mark.usefixtures("guest")
@pytest.mark.parametrize("example", [e for e in EXAMPLES if e.needs_guest], ids=str)
async def test_an_example_with_a_guest(example: Example, machine: mdo.OpenMachine) -> None:
    await example.run(machine)
