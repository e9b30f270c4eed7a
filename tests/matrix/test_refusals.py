# SPDX-License-Identifier: GPL-2.0-or-later
"""What must not begin: nothing is committed then, and it is said why."""

from __future__ import annotations

import subprocess

from cells import cells
from guests import refused

from lab import vfio
from lab.vfio import get, links, put, refusal
from matrix import checks
from matrix.cell import GROUPING, QEMUS, Cell
from matrix.machines import PATCHED, SECONDS, Direct
from mdev_orchestrator.errors import MdoError, QemuError

PLUGS = ("cold", "hot")


class TooFewLinks(Cell):
    """Three members need three links and there are two."""

    links = 2

    @cells(driver=GROUPING, qemu=QEMUS, plug=PLUGS)
    def test_one_link_too_few(self, plug: str) -> None:
        uuids = self.group(3)
        group = get(uuids[0], "group_uuid")
        since = vfio.now()
        if plug == "cold":
            with refused(MdoError) as failure:
                self.start(*uuids)
        else:
            with self.start() as qemu:
                with refused(MdoError) as failure:
                    qemu.plug(uuids[0])
                if self.version.patched:
                    assert qemu.command("query-vfio-mdevs") == []
        events = {event.event for event in vfio.events(since)}
        assert events == {"refused"}, "something was committed or opened"
        assert checks.online(uuids) == {False}
        assert links() == self.links
        reason = "3 links asked, 2 of 2 left"
        if self.version.patched or self.by_launcher:
            for word in (group, *uuids, reason):
                assert word in failure.text, failure.text
        else:  # the kernel's log is all that there is
            said = [line for line in self.kernel_log.lines() if "does not start" in line]
            assert any(reason in line for line in said), said
        if self.version.patched:
            assert f"cannot start group {group}" in failure.text
            assert "No space left on device" in failure.text
        for uuid in uuids[1:]:
            put(uuid, "group_uuid", "")
        checks.given_back(uuids[:1], self.links)


class Refusals(Cell):
    """What only the patched QEMUs know to refuse, or to show."""

    @cells(driver=GROUPING, qemu=PATCHED)
    def test_a_member_that_was_not_attached(self) -> None:
        uuids = self.group(3)
        group = get(uuids[0], "group_uuid")
        with refused(
            QemuError,
            f"its start group {group} is not complete: this machine has no device for {uuids[2]}",
        ):
            Direct(self.version, *uuids[:2])
        checks.given_back(uuids, self.links)

    @cells(driver=GROUPING, qemu=PATCHED)
    def test_a_hot_plugged_group_shows_what_is_missing(self) -> None:
        uuids = self.group(3)
        with Direct(self.version) as qemu:
            for number, uuid in enumerate(uuids, 1):
                qemu.plug(uuid)
                for mdev in qemu.command("query-vfio-mdevs"):
                    assert sorted(mdev["missing"]) == sorted(uuids[number:])
        qemu.reclaim(*uuids)
        checks.given_back(uuids, self.links)

    @cells(driver=GROUPING, qemu=PATCHED, plug=PLUGS)
    def test_a_member_that_another_process_holds(self, plug: str) -> None:
        first, second = uuids = self.group(2)
        if self.driver == "explicit":
            put(first, "online", "1")
        with vfio.Child(first) as holder:
            assert holder.failed == 0
            words = f"its group belongs to process {holder.pid}"
            if plug == "cold":
                with refused(QemuError, words):
                    Direct(self.version, *uuids)
            else:
                with Direct(self.version) as qemu, refused(QemuError, words):
                    qemu.plug(second)
            assert checks.online(uuids) == {True}, "taken from its holder"
        if self.driver == "explicit":
            put(first, "online", "0")
        assert refusal(first) == (0 if self.driver == "implicit" else 6)
        checks.given_back(uuids, self.links)

    @cells(driver=GROUPING, qemu=PATCHED)
    def test_a_device_that_is_removed_is_asked_for(self) -> None:
        """QEMU says so and asks the guest; one that has not booted lets go at once."""
        first, second = uuids = self.group(2)
        with Direct(self.version) as qemu:
            for uuid in uuids:
                qemu.plug(uuid)
            with refused(OSError, "Device or resource busy"):
                put(first, "group_uuid", "")
            qemu.qmp.events.clear()
            with subprocess.Popen(["sh", "-c", f"echo 1 > {vfio.MDEVS / first}/remove"]) as remover:
                told = qemu.qmp.wait("VFIO_MDEV_STATE_CHANGED", lambda data: data["uuid"] == first)
                qemu.qmp.wait("DEVICE_DELETED", lambda data: data.get("device") == f"mdev-{first}")
                assert remover.wait(SECONDS) == 0
            assert told["data"]["reason"] == "the driver asks for the device back"
            assert not (vfio.MDEVS / first).exists()
            assert checks.online([second]) == {True}
            qemu.unplug(second)
        checks.given_back([second], self.links)
