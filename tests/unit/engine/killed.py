# SPDX-License-Identifier: GPL-2.0-or-later
"""Commands that are killed in the middle."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine
from typing import Any

from mdev_orchestrator.engine.executor import Observer, StepEvent, StepEventKind

STATUS = 9


def dies_at(kind: StepEventKind, number: int = 0) -> Observer:
    """An observer that ends its process when something happens to a step."""

    def observe(event: StepEvent) -> None:
        if (event.kind, event.number) == (kind, number):
            os._exit(STATUS)

    return observe


async def killed(command: Coroutine[Any, Any, object]) -> None:
    """Run a command in a child process, whose observer ends it before it comes to its end."""
    if not (pid := os.fork()):
        try:
            asyncio.run(command)
        finally:
            os._exit(1)
    command.close()
    _, status = await asyncio.to_thread(os.waitpid, pid, 0)
    assert os.waitstatus_to_exitcode(status) == STATUS
