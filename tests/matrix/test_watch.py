# SPDX-License-Identifier: GPL-2.0-or-later
"""What the patched QEMUs tell of their mdevs is in ``mdo watch``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from cells import cells
from guests import refused

from lab import vfio
from lab.vfio import get
from matrix.cell import DRIVERS, Cell
from matrix.machines import PATCHED, Orchestrated
from mdev_orchestrator.errors import MdoError

Until = Callable[..., list[dict[str, Any]]]


@contextmanager
def watching() -> Iterator[Until]:
    """``mdo watch``; calling gives all events until one that has these values."""
    with subprocess.Popen(
        [sys.executable, "-m", "mdev_orchestrator.cli.main", "watch", "--json"],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    ) as process:
        assert process.stdout

        def until(**values: object) -> list[dict[str, Any]]:
            found = []
            for line in process.stdout or ():
                found.append(json.loads(line))
                if values.items() <= found[-1].items():
                    return found
            raise AssertionError(f"it ended before {values}: {found}")

        until(event="rescan")
        try:
            yield until
        finally:
            process.terminate()


class Watch(Cell):
    @cells(driver=DRIVERS, qemu=PATCHED)
    def test_a_start_a_refusal_and_a_stop(self) -> None:
        uuids = self.group(2)
        with watching() as until:
            with Orchestrated(self.version) as qemu:
                until(event="guest", action="watched", guest="matrix")
                if self.grouped:
                    self.group_is_told(qemu, uuids, until)
                else:  # what cannot be read does not change
                    for uuid in uuids:
                        qemu.plug(uuid)
                        qemu.unplug(uuid)
            rest = until(event="guest", action="unwatched", guest="matrix")
        assert [event["action"] for event in rest if event["event"] == "guest"] == ["unwatched"]

    def group_is_told(self, qemu: Orchestrated, uuids: list[str], until: Until) -> None:
        told = {"event": "guest", "action": "change", "guest": "matrix", "parent": "igd0"}
        told["group_uuid"] = get(uuids[0], "group_uuid")
        with vfio.fault("start", "errno=5"), refused(MdoError, "Input/output error"):
            qemu.plug(uuids[0])
        refusal = until(**told, old_state="offline", state="offline")[-1]
        assert "Input/output error" in refusal["reason"], refusal
        for uuid in uuids:
            qemu.plug(uuid)
            up = until(**told, uuid=uuid, old_state="offline", state="online")[-1]
            assert "reason" not in up
        for uuid in uuids:
            qemu.unplug(uuid)
        until(**told, uuid=uuids[-1], old_state="online", state="offline")
