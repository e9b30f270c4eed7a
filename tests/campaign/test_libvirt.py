# SPDX-License-Identifier: GPL-2.0-or-later
"""Devices of domains that libvirt runs: given and taken by ``mdo``, which is killed at every point.

Needs libvirt and its Python binding: ``tools/setup libvirt``. One domain boots and uses what it is
given; the others never run a line of their own, and let a device go without being asked.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from campaign import specs
from campaign.command import Change, at, mdo
from campaign.conftest import Tally
from campaign.test_crash import campaign
from campaign.works import UUIDS, Command, create, done, half_done, recovered
from campaign.world import Foreign, Look, clear, denials, differences, look
from lab import vfio
from mdev_lab import l2, libvirtd
from mdev_orchestrator.interop import libvirt as interop

pytestmark = pytest.mark.skipif(
    not libvirtd.is_installed() or shutil.which("virsh") is None, reason="tools/setup libvirt"
)
pytest.importorskip("libvirt", reason="tools/setup libvirt")

NAME = "of libvirt"
"""Not a name that a guest of mdo could have."""
SMALL = "mvgpu-128M"
PORTS = 4
DOMAIN = """<domain type='{accel}' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
<name>{name}</name><memory unit='MiB'>{memory}</memory><vcpu>1</vcpu>
<os><type arch='x86_64' machine='q35'>hvm</type>
<kernel>{kernel}</kernel><initrd>{initrd}</initrd><cmdline>{append}</cmdline></os>
<features><acpi/></features>
<devices><emulator>{qemu}</emulator>
<controller type='pci' model='pcie-root'/>
{ports}
<controller type='usb' model='none'/>
<memballoon model='none'/>
<serial type='pty'/>
</devices>
<qemu:commandline>{extra}</qemu:commandline></domain>
"""
HOSTDEV = """<hostdev mode='subsystem' type='mdev' model='vfio-pci'>
<source><address uuid='{uuid}'/></source></hostdev>"""
GUEST_SECONDS = "180"


def virsh(*words: str) -> str:
    return subprocess.run(["virsh", *words], check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="session")
def libvirt(place: Path) -> subprocess.Popen[bytes]:
    """``libvirtd``, until L1 ends."""
    return libvirtd.start(place)


@contextlib.contextmanager
def domain(place: Path, others: Foreign, *, boots: bool = False) -> Iterator[int]:
    """A domain of libvirt's that runs; gives the process id of its QEMU."""
    extra = () if boots else specs.EXTRA[1:]
    file = place / "domain.xml"
    file.write_text(
        DOMAIN.format(
            accel="kvm" if Path("/dev/kvm").exists() else "qemu",
            name=NAME,
            memory=256 if boots else 16,
            kernel=os.environ["MDO_LAB_KERNEL"],
            initrd=os.environ["MDO_LAB_INITRD"],
            append=l2.APPEND,
            qemu=shutil.which("qemu-system-x86_64"),
            ports="<controller type='pci' model='pcie-root-port'/>\n" * PORTS,
            extra="".join(f"<qemu:arg value='{word}'/>" for word in extra),
        )
    )
    virsh("create", str(file), *([] if boots else ["--paused"]))
    pid = int(Path(f"/run/libvirt/qemu/{NAME}.pid").read_text())
    others.company.add(pid)
    try:
        yield pid
    finally:
        virsh("destroy", NAME)
        others.company.discard(pid)


def listed() -> dict[str | None, dict[str, Any]]:
    """What ``mdo guest list`` shows, by name."""
    guests = json.loads(done("guest", "list", "--json").out)["guests"]
    return {guest["name"]: guest for guest in guests}


def given_back(place: Path) -> None:
    """Take all devices out of the domain, without any of the code that is tested."""
    end = time.monotonic() + 60
    while uuids := re.findall(r"<address uuid='([^']*)'", virsh("dumpxml", NAME)):
        assert time.monotonic() < end, uuids
        file = place / "hostdev.xml"
        file.write_text(HOSTDEV.format(uuid=uuids[0]))
        virsh("detach-device", NAME, str(file), "--live")


@pytest.mark.usefixtures("libvirt", "empty")
def test_a_guest_of_libvirts(place: Path, others: Foreign) -> None:
    """It gets a new device, which it takes; it gives it back, and all is as it was."""
    with domain(place, others, boots=True) as pid:
        before = look(others)
        guest = listed()[NAME]
        assert (guest["manager"], guest["pid"], guest["mdevs"]) == ("libvirt", pid, [])
        stranger = listed()["foreign"]
        assert (stranger["manager"], stranger["pid"]) == (None, others.pid)

        words = ("attach", NAME, SMALL, "--wait-guest", "--deadline", GUEST_SECONDS, "--json")
        attached = json.loads(done(*words).out)
        uuid = attached["uuid"]
        assert (attached["device"], attached["taken"], attached["created"]) == (
            "hostdev0",
            True,
            True,
        )
        assert uuid in virsh("dumpxml", NAME)
        assert [mdev["uuid"] for mdev in listed()[NAME]["mdevs"]] == [uuid]

        refused = mdo("attach", NAME, uuid)
        assert (refused.status, "has mdev" in refused.err) == (2, True), refused
        refused = mdo("remove", uuid)
        assert (refused.status, f"held by libvirt domain {NAME}" in refused.err) == (2, True)

        done("detach", NAME, uuid, "--deadline", GUEST_SECONDS)
        assert uuid not in virsh("dumpxml", NAME)
        assert vfio.get(uuid, "online") == "0"
        refused = mdo("detach", NAME, uuid)
        assert (refused.status, "it has: none" in refused.err) == (2, True), refused

        done("attach", NAME, uuid)
        done("remove", "--detach", uuid, "--deadline", GUEST_SECONDS)
        assert differences(before, look(others)) == []


@pytest.mark.usefixtures("libvirt", "empty")
def test_the_command_that_the_remedy_names(place: Path, others: Foreign) -> None:
    """Without the binding a user can do it by virsh; the message says how."""

    def no_binding() -> None:
        interop.is_installed = lambda: False

    with domain(place, others):
        done(*create(UUIDS[0]))
        for verb in ("attach", "detach"):
            refused = mdo(verb, NAME, UUIDS[0], change=no_binding)
            assert refused.status == 5, refused
            command = refused.err.partition("; or: ")[2]
            subprocess.run(["sh", "-c", command], check=True)
            assert (UUIDS[0] in virsh("dumpxml", NAME)) == (verb == "attach")


WORKS: dict[str, tuple[list[Command], Command]] = {
    "attach to a domain": (
        [create(UUIDS[0])],
        ("attach", NAME, UUIDS[0], "--deadline", "20"),
    ),
    "attach a new device to a domain": ([], ("attach", NAME, SMALL, "--deadline", "20")),
    "detach from a domain": (
        [create(UUIDS[0]), ("attach", NAME, UUIDS[0])],
        ("detach", NAME, UUIDS[0], "--deadline", "20"),
    ),
    "remove from a domain": (
        [create(*UUIDS[:2]), ("attach", NAME, UUIDS[0]), ("attach", NAME, UUIDS[1])],
        ("remove", "--detach", "--deadline", "20", *UUIDS[:2]),
    ),
}


@pytest.mark.usefixtures("libvirt", "empty")
@pytest.mark.parametrize("name", list(WORKS))
def test_killed(place: Path, others: Foreign, tally: Tally, name: str) -> None:
    before, command = WORKS[name]

    def prepare() -> Look:
        given_back(place)
        clear(others)
        for words in before:
            done(*words)
        return look(others)

    with domain(place, others):
        was = prepare()
        done(*command)
        whole = look(others)
        assert differences(was, whole) != []

        def judge(was: Look, now: Look) -> list[str]:
            return half_done(was, whole, now)

        assert campaign(name, command, prepare, judge, others, tally) == []
        given_back(place)
        clear(others)


def stopped_when_asked(pid: int, *, killed: bool = False) -> Change:
    """Stop libvirt when it is connected to and is about to be asked for a change.

    It reads the request when it goes on. The undo is not stopped again: libvirt is still.

    :param killed: Whether the command is killed a second later.
    """

    def change() -> None:
        begin = interop._Begun.begin
        asking: list[str] = []

        def begun(self: interop._Begun) -> None:
            begin(self)
            if asking:
                os.kill(pid, signal.SIGSTOP)
                if killed:
                    threading.Timer(1, os.kill, (os.getpid(), signal.SIGKILL)).start()

        def noted(name: str) -> None:
            method = getattr(interop, name)

            async def wrapped(*arguments: Any) -> None:  # noqa: ANN401
                asking.append(name)
                await method(*arguments)

            setattr(interop, name, wrapped)

        interop._Begun.begin = begun  # type: ignore[method-assign]
        noted("attach_device")
        noted("detach_device")

    return change


@pytest.mark.usefixtures("empty")
@pytest.mark.parametrize("killed", [False, True], ids=["", "and mdo killed"])
@pytest.mark.parametrize("name", list(WORKS))
def test_libvirt_stopped(
    libvirt: subprocess.Popen[bytes],
    place: Path,
    others: Foreign,
    tally: Tally,
    name: str,
    killed: bool,
) -> None:
    """libvirt does not answer when it is asked for a change, and does as asked later."""
    before, command = WORKS[name]
    with domain(place, others):
        for words in before:
            done(*words)
        was = look(others)
        done(*command)
        whole = look(others)
        given_back(place)
        clear(others)
        for words in before:
            done(*words)
        words = tuple("4" if word == "20" else word for word in command)
        try:
            ended = mdo(*words, change=stopped_when_asked(libvirt.pid, killed=killed))
        finally:
            os.kill(libvirt.pid, signal.SIGCONT)
        left = denials(ended.err, was, lambda: look(others))
        if killed:
            assert ended.killed, ended
        else:
            assert ended.status == 4, ended
            assert "it may do so yet" in ended.err
            assert "mdo recover tries again to undo it" in ended.err
        left += recovered() + half_done(was, whole, look(others))
        where = "killed when it was asked" if killed else str(ended)
        assert tally.count(f"{name}: libvirt stopped", left, where) == []
        given_back(place)
        clear(others)


@pytest.mark.usefixtures("empty")
def test_libvirt_stopped_before_it_is_asked(
    libvirt: subprocess.Popen[bytes], place: Path, others: Foreign, tally: Tally
) -> None:
    """What was never asked for has had no effect: nothing is left to libvirt."""
    with domain(place, others):
        was = look(others)
        stop = at("before attach_device", lambda: os.kill(libvirt.pid, signal.SIGSTOP))
        try:
            ended = mdo("attach", NAME, SMALL, "--deadline", "4", hook=stop)
            left = differences(was, look(others))
        finally:
            os.kill(libvirt.pid, signal.SIGCONT)
        assert (ended.status, "all was undone" in ended.err) == (4, True), ended
        assert tally.count("libvirt stopped before it is asked", left, str(ended)) == []


@pytest.mark.usefixtures("empty")
def test_libvirt_killed_while_qemu_opens_the_device(
    libvirt: subprocess.Popen[bytes], place: Path, others: Foreign, tally: Tally
) -> None:
    """QEMU then has a device that no libvirt knows of: only the domain's end takes it out."""

    def die_when(struck: Callable[[], str]) -> None:
        while "hits=0" in struck():
            time.sleep(0.1)
        libvirt.kill()
        libvirt.wait()

    with domain(place, others):
        done(*create(UUIDS[0]))
        was = look(others)
        with vfio.fault("open", f"delay_ms=8000 uuid={UUIDS[0]}") as struck:
            watch = threading.Thread(target=die_when, args=(struck,))
            watch.start()
            ended = mdo("attach", NAME, UUIDS[0])
            watch.join()
            time.sleep(10)
        libvirtd.start(place)
        assert (ended.status, "it is not known whether" in ended.err) == (3, True), ended
        assert "could not undo" in ended.err
        left = denials(ended.err, was, lambda: look(others))
        again = mdo("recover")
        assert (again.status, f"virsh destroy '{NAME}'" in again.err) == (1, True), again
    left += recovered() + differences(was, look(others))
    assert tally.count("libvirt killed while QEMU opens the device", left, str(ended)) == []
    clear(others)
