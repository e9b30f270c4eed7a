# SPDX-License-Identifier: GPL-2.0-or-later
"""The fixture that fails a test in which a callback holds the event loop."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from unit import loopwatch

HELD = loopwatch.LIMIT * 1.2

pytestmark = pytest.mark.skipif("MDO_LAB" in os.environ, reason="an emulated machine is slow")


def compute() -> None:
    begin = time.thread_time()
    while time.thread_time() - begin < HELD:
        pass


def block() -> None:
    time.sleep(HELD)


@pytest.mark.parametrize("hold", [block, compute])
async def test_a_callback_that_holds_the_loop_is_named(loop_holds: list[str], hold: object) -> None:
    asyncio.get_running_loop().call_soon(hold)  # type: ignore[arg-type]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    (said,) = loop_holds
    assert str(getattr(hold, "__name__", "")) in said
    loop_holds.clear()


async def test_a_coroutine_that_holds_the_loop_is_named(loop_holds: list[str]) -> None:
    async def blocking() -> None:
        block()

    await asyncio.create_task(blocking())
    (said,) = loop_holds
    assert "blocking" in said
    loop_holds.clear()


async def test_waiting_and_threads_do_not_hold_it(loop_holds: list[str]) -> None:
    await asyncio.sleep(HELD)
    await asyncio.to_thread(block)
    assert loop_holds == []


async def test_the_time_of_other_processes_and_of_the_collector_does_not_count(
    loop_holds: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    queued = {"own": 0.0, "others": 0.0}
    monkeypatch.setattr(loopwatch, "_queued", lambda: queued["own"])
    monkeypatch.setattr(loopwatch._OtherThreads, "queued", lambda _: queued["others"])

    def preempted() -> None:
        block()
        queued["own"] += HELD  # what the kernel would say

    def collecting() -> None:
        for callback in gc.callbacks[-1:]:
            callback("start", {})
            block()
            callback("stop", {})

    def starting_a_thread() -> None:
        block()
        queued["others"] += HELD

    for call in (preempted, collecting, starting_a_thread):
        asyncio.get_running_loop().call_soon(call)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert loop_holds == []


def test_it_fails_the_test(pytestconfig: pytest.Config, tmp_path: Path) -> None:
    """In a run of its own, with the fixture of this one."""
    (tmp_path / "test_it.py").write_text(
        f"import time\nasync def test_good(): pass\nasync def test_bad(): time.sleep({HELD})\n"
    )
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "unit.conftest"),
            *("-c", str(pytestconfig.inipath), str(tmp_path / "test_it.py")),
        ],
        cwd=pytestconfig.rootpath,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 1, done.stdout
    assert "::test_bad - Failed: the event loop was held" in done.stdout
    assert "2 passed, 1 error" in done.stdout
