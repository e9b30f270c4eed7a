# SPDX-License-Identifier: GPL-2.0-or-later
"""Every QEMU with every driver: started before the first access, stopped after the last release.

The driver's log is the proof. Runs inside the lab, see docs/qemu.md.
"""

from __future__ import annotations

import pytest

from lab import vfio
from lab.vfio import links
from matrix import checks
from matrix.checks import Make
from matrix.conftest import LINKS
from matrix.machines import Direct, Version, machine

EXPECTED = {"implicit": "qemu", "explicit": "qemu", "no-online": "driver"}


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("plug", ["cold", "hot"])
def test_online_before_the_first_access(
    driver: str, version: Version, plug: str, count: int, group_of: Make
) -> None:
    uuids = group_of(count)
    as_group = driver != "no-online"
    since = vfio.now()
    with machine(version, driver)(version, *(uuids if plug == "cold" else ())) as qemu:
        if plug == "hot":
            for uuid in uuids:
                qemu.plug(uuid)
        elif isinstance(qemu, Direct):
            assert qemu.qmp, qemu.words()
        pids = checks.started_before_opened(uuids, since, as_group=as_group)
        if qemu.orchestrated:
            assert qemu.pid not in pids
        else:
            assert pids == {qemu.pid}
        assert checks.online(uuids) == ({"1"} if as_group else set())
        assert links() == LINKS - (count * (count - 1) // 2 if as_group else 0)
        if version.patched:
            shown = qemu.command("query-vfio-mdevs")
            assert [mdev["uuid"] for mdev in shown] == uuids
            assert {mdev["started-by"] for mdev in shown} == {EXPECTED[driver]}
            assert {mdev["state"] for mdev in shown} == {"online" if as_group else "unknown"}
            assert {tuple(mdev["missing"]) for mdev in shown} == {()}
        if plug == "hot":
            for uuid in uuids:
                assert checks.online(uuids) == ({"1"} if as_group else set())
                qemu.unplug(uuid)
        else:
            qemu.quit()
            qemu.ended()
            qemu.sweep(*(uuids if qemu.orchestrated else ()))
        assert checks.online(uuids) == ({"0"} if as_group else set())
        assert links() == LINKS
        checks.closed_before_stopped(uuids, since, as_group=as_group)
    checks.given_back(uuids, LINKS)
