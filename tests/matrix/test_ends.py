# SPDX-License-Identifier: GPL-2.0-or-later
"""Every way to end, every QEMU: afterwards offline, links back, the group free for others."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from lab import vfio
from lab.vfio import KernelLog, get, links, put, refusal
from matrix import checks
from matrix.checks import Make
from matrix.conftest import LINKS
from matrix.machines import (
    Direct,
    Machine,
    Orchestrated,
    QmpError,
    Version,
    machine,
)
from mdev_orchestrator.errors import MdoError
from mdev_orchestrator.qemu import process

NOWHERE = "/sys/bus/mdev/devices/00000000-0000-4000-8000-000000000000"
BAD = ("-device", f"vfio-pci,sysfsdev={NOWHERE}")
both_drivers = pytest.mark.parametrize("driver", ["implicit", "explicit"], indirect=True)
patched = pytest.mark.parametrize("version", ["10.0", "10.2"], indirect=True)


def uncaught(number: int) -> bool:
    """Whether nothing of QEMU's runs after a signal."""
    return number in {signal.SIGKILL, signal.SIGABRT}


def unplug_all(qemu: Machine, uuids: list[str]) -> None:
    for uuid in uuids:
        qemu.unplug(uuid)
    assert checks.online(uuids) == {"0"}
    qemu.plug(uuids[0])
    qemu.unplug(uuids[0])


def fail_a_hot_plug(qemu: Machine, uuids: list[str]) -> None:
    """A device that cannot be realized leaves those of before as they are."""
    with pytest.raises(QmpError, match="no such host device"):
        qemu.command("device_add", driver="vfio-pci", id="bad", sysfsdev=NOWHERE, bus="port3")
    assert checks.online(uuids) == {"1"}
    for uuid in uuids:
        qemu.unplug(uuid)


def by(number: int) -> Callable[[Machine, list[str]], None]:
    def send(qemu: Machine, uuids: list[str]) -> None:
        qemu.signal(number)
        qemu.ended()

    return send


def quit_(qemu: Machine, uuids: list[str]) -> None:
    qemu.quit()
    qemu.ended()


ENDS = {
    "quit": quit_,
    "device_del": unplug_all,
    "failed-hot-plug": fail_a_hot_plug,
    "SIGTERM": by(signal.SIGTERM),
    "SIGINT": by(signal.SIGINT),
    "SIGKILL": by(signal.SIGKILL),
    "SIGABRT": by(signal.SIGABRT),
}


@both_drivers
@pytest.mark.parametrize("how", list(ENDS))
def test_however_it_ends(driver: str, version: Version, how: str, group_of: Make) -> None:
    uuids = group_of(2)
    since = vfio.now()
    hot = how in {"device_del", "failed-hot-plug"}
    with machine(version, driver)(version, *(() if hot else uuids)) as qemu:
        if hot:
            for uuid in uuids:
                qemu.plug(uuid)
        assert checks.online(uuids) == {"1"}
        assert links() == LINKS - 1
        ENDS[how](qemu, uuids)
        left = driver == "explicit" and (
            how in {"SIGKILL", "SIGABRT"} or (not version.patched and not hot)
        )
        assert checks.online(uuids) == ({"1"} if left else {"0"})
        assert links() == LINKS - left
        if left:
            assert {get(uuid, "group_owner") for uuid in uuids} == {"0"}
            qemu.sweep(*uuids)
        if how != "device_del":
            checks.closed_before_stopped(uuids, since, as_group=True)
        checks.given_back(uuids, LINKS)


@both_drivers
def test_a_later_device_that_cannot_be_realized(
    driver: str, version: Version, group_of: Make
) -> None:
    """The command line's last device is bad: QEMU ends, and the group is not left online."""
    uuids = group_of(2)
    since = vfio.now()
    if machine(version, driver) is Orchestrated:
        with pytest.raises(MdoError, match="no such host device"):
            Orchestrated(version, *uuids, extra=BAD)
    else:
        with Direct(version, *uuids, extra=BAD) as qemu:
            assert qemu.qmp is None
            assert "no such host device" in qemu.words()
    assert checks.history(uuids[0], since)["opened"]
    checks.closed_before_stopped(uuids, since, as_group=True)
    checks.given_back(uuids, LINKS)


@both_drivers
def test_a_member_that_cannot_be_opened(driver: str, version: Version, group_of: Make) -> None:
    """The second open of a group fails: the first is closed, and the group stopped."""
    uuids = group_of(2)
    with vfio.fault("open", f"errno=5 times=-1 uuid={uuids[1]}"):
        if machine(version, driver) is Orchestrated:
            with pytest.raises(MdoError, match="Input/output error"):
                Orchestrated(version, *uuids)
        else:
            with Direct(version, *uuids) as qemu:
                assert qemu.qmp is None
                assert "Input/output error" in qemu.words()
    checks.given_back(uuids, LINKS)


LAUNCHER = """
import sys, time
from matrix.machines import Orchestrated, versions
qemu = Orchestrated(versions()[sys.argv[1]], *sys.argv[2:])
print("up", flush=True)
time.sleep(3600)
"""


@both_drivers
def test_a_launcher_that_is_killed(driver: str, version: Version, group_of: Make) -> None:
    """The guest outlives it and keeps its group; the next command finds both."""
    uuids = group_of(2)
    since = vfio.now()
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, version.name, *uuids],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdout=subprocess.PIPE,
    )
    assert launcher.stdout
    with launcher.stdout:
        assert launcher.stdout.readline() == b"up\n"
        launcher.kill()
        launcher.wait()
    with Orchestrated(version, guest=process.find("matrix")) as qemu:
        qemu.sweep()
        assert checks.online(uuids) == {"1"}, "it was taken from a guest that runs"
        assert links() == LINKS - 1
        qemu.kill()
        assert checks.online(uuids) == ({"1"} if driver == "explicit" else {"0"})
        qemu.sweep()
        assert process.list_guests() == [] or checks.online(uuids) == {"0"}
        checks.closed_before_stopped(uuids, since, as_group=True)
        checks.given_back(uuids, LINKS)


@pytest.fixture
def booted(driver: str, version: Version, group_of: Make) -> Iterator[tuple[Direct, list[str]]]:
    uuids = group_of(2)
    starts_itself = driver == "explicit" and not version.patched
    if starts_itself:
        put(uuids[0], "online", "1")
    with Direct(version, *uuids, boots=True) as qemu:
        assert qemu.qmp, qemu.words()
        qemu.until_booted()
        yield qemu, uuids


@pytest.mark.parametrize("driver", ["explicit"], indirect=True)
def test_a_guest_that_powers_off(
    driver: str, version: Version, booted: tuple[Direct, list[str]]
) -> None:
    qemu, uuids = booted
    assert checks.online(uuids) == {"1"}
    qemu.command("system_powerdown")
    printed = qemu.drain()
    assert qemu.ended() == 0, printed[-1000:]
    if not version.patched:
        qemu.sweep(*uuids)
    checks.given_back(uuids, LINKS)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("driver", ["implicit-2", "explicit-2"], indirect=True)
@pytest.mark.parametrize("plug", ["cold", "hot"])
def test_one_link_too_few(
    driver: str, version: Version, plug: str, group_of: Make, kernel_log: KernelLog
) -> None:
    """Three members need three links and there are two: nothing happens, and it is said why."""
    uuids = group_of(3)
    group = get(uuids[0], "group_uuid")
    since = vfio.now()
    if machine(version, driver) is Orchestrated:
        if plug == "cold":
            with pytest.raises(MdoError) as refused:
                Orchestrated(version, *uuids)
        else:
            with Orchestrated(version) as qemu, pytest.raises(MdoError) as refused:
                qemu.plug(uuids[0])
        words = str(refused.value)
    elif plug == "cold":
        with Direct(version, *uuids) as qemu:
            assert qemu.qmp is None
            words = qemu.words()
    else:
        with Direct(version) as qemu:
            with pytest.raises(QmpError) as failed:
                qemu.plug(uuids[0])
            words = str(failed.value)
            assert qemu.running
            if version.patched:
                assert qemu.command("query-vfio-mdevs") == []
    names = [event.event for event in vfio.events(since)]
    assert set(names) == {"refused"}, "something was committed or opened"
    assert checks.online(uuids) == {"0"}
    assert links() == 2
    if version.patched or driver == "explicit":
        for word in (group, *uuids, "3 links asked", "2 of 2 left"):
            assert word in words, words
    else:  # stock QEMU: the kernel's log is all there is
        said = [line for line in kernel_log.lines() if "does not start" in line]
        assert any("3 links asked, 2 of 2 left" in line for line in said)
    if version.patched:
        assert f"cannot start group {group}" in words
        assert "No space left on device" in words
    for uuid in uuids[1:]:
        put(uuid, "group_uuid", "")
    checks.given_back(uuids[:1], 2)


@both_drivers
@patched
def test_a_member_that_nobody_attached(driver: str, version: Version, group_of: Make) -> None:
    uuids = group_of(3)
    with Direct(version, *uuids[:2]) as qemu:
        assert qemu.qmp is None
        words = qemu.words()
    group = get(uuids[0], "group_uuid")
    said = f"its start group {group} is not complete: this machine has no device for {uuids[2]}"
    assert said in words, words
    checks.given_back(uuids, LINKS)


@both_drivers
@patched
def test_a_hot_plugged_group_shows_what_is_missing(
    driver: str, version: Version, group_of: Make
) -> None:
    uuids = group_of(3)
    with Direct(version) as qemu:
        for number, uuid in enumerate(uuids, 1):
            qemu.plug(uuid)
            for mdev in qemu.command("query-vfio-mdevs"):
                assert sorted(mdev["missing"]) == sorted(uuids[number:])
    qemu.sweep(*uuids)
    checks.given_back(uuids, LINKS)


@both_drivers
@patched
@pytest.mark.parametrize("plug", ["cold", "hot"])
def test_a_member_that_another_process_holds(
    driver: str, version: Version, plug: str, group_of: Make
) -> None:
    first, second = uuids = group_of(2)
    if driver == "explicit":
        put(first, "online", "1")
    with vfio.Child(first) as holder:
        assert holder.failed == 0
        if plug == "cold":
            with Direct(version, *uuids) as qemu:
                assert qemu.qmp is None
                words = qemu.words()
        else:
            with Direct(version) as qemu, pytest.raises(QmpError) as failed:
                qemu.plug(second)
            words = str(failed.value)
        assert f"its group belongs to process {holder.pid}" in words, words
        assert checks.online(uuids) == {"1"}, "taken from its holder"
    if driver == "explicit":
        put(first, "online", "0")
    assert refusal(first) == (0 if driver == "implicit" else 6)
    checks.given_back(uuids, LINKS)
