# SPDX-License-Identifier: GPL-2.0-or-later
"""Every QEMU with every driver: started before the first access, stopped after the last release.

Runs inside the lab, see docs/qemu.md.
"""

from __future__ import annotations

from cells import cells

from lab import vfio
from lab.vfio import links
from matrix import checks
from matrix.cell import DRIVERS, QEMUS, Cell


class Table(Cell):
    @cells(driver=DRIVERS, qemu=QEMUS, plug=("cold", "hot"), count=(1, 2, 3))
    def test_online_before_the_first_access(self, plug: str, count: int) -> None:
        uuids = self.group(count)
        since = vfio.now()
        with self.start(*(uuids if plug == "cold" else ())) as qemu:
            if plug == "hot":
                for uuid in uuids:
                    qemu.plug(uuid)
            pids = checks.started_before_opened(uuids, since, as_group=self.grouped)
            if qemu.orchestrated:
                assert qemu.pid not in pids
            else:
                assert pids == {qemu.pid}
            assert checks.online(uuids) == {True}
            assert links() == self.links - self.cost(count)
            if self.version.patched:
                shown = qemu.command("query-vfio-mdevs")
                assert [mdev["uuid"] for mdev in shown] == uuids
                by, state = ("qemu", "online") if self.grouped else ("driver", "unknown")
                assert {mdev["started-by"] for mdev in shown} == {by}
                assert {mdev["state"] for mdev in shown} == {state}
                assert {tuple(mdev["missing"]) for mdev in shown} == {()}
            if plug == "hot":
                for uuid in uuids:
                    assert not self.grouped or checks.online(uuids) == {True}
                    qemu.unplug(uuid)
            else:
                qemu.quit()
                qemu.ended()
                if qemu.orchestrated:
                    qemu.reclaim()
            assert checks.online(uuids) == {False}
            assert links() == self.links
            checks.closed_before_stopped(uuids, since, as_group=self.grouped)
        checks.given_back(uuids, self.links)
