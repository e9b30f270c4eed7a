# SPDX-License-Identifier: GPL-2.0-or-later
"""Guests that open their devices by ``/dev/iommu`` and the devices' own nodes.

Runs inside a lab that has them: ``mdo lab run --iommufd -- pytest tests/lab/test_iommufd.py``. Most
QEMUs run with ``-S``, so that nothing boots; one guest boots and uses its device.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from msgspec.structs import replace

from lab import vfio
from lab.machine import machine
from lab.test_permissions import CODE, OTHER_USER
from lab.test_startstop import (  # noqa: F401 - fixtures
    LINKS,
    QEMU,
    driver,
    explicit,
    free,
    given_back,
    guest_mdev,
    in_order,
    make,
    patched,
    quit_,
    spec,
    states,
)
from mdev_lab import l2
from mdev_orchestrator import errors
from mdev_orchestrator.engine import guest_ops
from mdev_orchestrator.engine.attach import attach, detach
from mdev_orchestrator.engine.guests import start_guest
from mdev_orchestrator.host import doctor, sysfs
from mdev_orchestrator.host.holders import read_holders
from mdev_orchestrator.model import IommuKind, Mdev
from mdev_orchestrator.qemu import features, hotplug, process, status
from mdev_orchestrator.qemu.monitor import connect
from mdev_orchestrator.qemu.process import RunningGuest
from mdev_orchestrator.spec import GuestConfig
from mdev_orchestrator.system.waiting import poll_until

pytestmark = pytest.mark.skipif(
    "MDO_LAB" not in os.environ or not Path("/dev/iommu").exists(),
    reason="needs a lab with iommufd",
)

NATIVE = ("-S", "-global", "ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off")
"""Arguments of a halted QEMU whose guest lets go of a device at once."""
GUEST_SECONDS = 300.0
FILL_BYTES = 256 << 10


@pytest.fixture(scope="module")
def links() -> Iterator[None]:
    """The driver with as many links as :func:`given_back` expects."""
    with vfio.loaded(links=LINKS):
        yield


def opened(guest: RunningGuest) -> set[str]:
    """The nodes of VFIO that a guest's QEMU has open."""
    return {path for path in files(pid_of(guest)) if path.startswith(("/dev/vfio", "/dev/iommu"))}


def files(pid: int) -> set[str]:
    """All that a process has open."""
    found = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            found.add(str(link.readlink()))
    return found


def nodes(kind: IommuKind, *mdevs: Mdev) -> set[str]:
    """All nodes of VFIO that a guest with these devices has open."""
    shared = {"iommufd": "/dev/iommu", "container": "/dev/vfio/vfio"}
    return {shared[kind], *(mdev.nodes[kind] for mdev in mdevs)}


def holders(mdev: Mdev) -> list[str]:
    return [str(holder) for holder in read_holders(machine(), (mdev,)).of(mdev.uuid)]


async def objects(guest: RunningGuest) -> set[str]:
    async with connect(guest.qmp_socket, guest.label) as qmp:
        return set(await hotplug._children(qmp, "/objects")) & {"iommufd0"}


# ---- the host ----


async def test_a_device_is_ready_when_its_own_node_is(links: None) -> None:
    (mdev,) = await make(1, None)
    assert mdev == sysfs.read_mdev(machine(), mdev.uuid)
    assert mdev.cdev is not None
    for node in mdev.nodes.values():
        assert stat.S_ISCHR(Path(node).stat().st_mode)
        assert os.access(node, os.R_OK | os.W_OK)
    shape = json.loads(mdo("host", "--json").stdout)
    assert [found["cdev"] for found in shape["mdevs"]] == [mdev.cdev]


async def test_a_process_that_has_the_node_open_is_found(links: None) -> None:
    (mdev,) = await make(1, None)
    descriptor = os.open(mdev.nodes["iommufd"], os.O_RDWR)
    (holder,) = holders(mdev)
    assert holder.endswith(f"(pid {os.getpid()})")
    os.close(descriptor)
    assert holders(mdev) == []


async def test_the_doctor_knows_the_nodes(links: None) -> None:
    (mdev,) = await make(1, None)
    found = doctor.examine(machine(), await sysfs.scan(machine()))
    assert {finding.level for finding in found} == {"ok"}
    assert any(f.message == "/dev/iommu opens" for f in found)
    with hidden(Path(mdev.nodes["iommufd"])):
        found = doctor.examine(machine(), await sysfs.scan(machine()))
        (finding,) = (finding for finding in found if finding.level != "ok")
        assert (finding.level, finding.subject) == ("warning", str(mdev.uuid))
        assert finding.message == f"{mdev.nodes['iommufd']} is not there"
        assert "udevadm trigger -s vfio-dev" in finding.remedy


# ---- guests ----


def pid_of(guest: RunningGuest) -> int:
    assert guest.record is not None
    return guest.record.pid


async def test_the_container_when_it_is_asked_for(links: None, patched: dict[str, Any]) -> None:  # noqa: F811
    mdevs = await make(2)
    guest = await guest_ops.launch(machine(), replace(spec(*mdevs), iommu="container", **patched))
    assert opened(guest) == nodes("container", *mdevs)


async def test_the_object_is_there_while_a_device_uses_it(
    links: None,
    patched: dict[str, Any],  # noqa: F811
) -> None:
    first, second = await make(2, None)
    guest = await guest_ops.launch(machine(), replace(spec(), **patched, extra=NATIVE))
    assert await objects(guest) == set()
    await attach(machine(), "g", first.uuid)
    await attach(machine(), "g", second.uuid)
    assert opened(guest) == nodes("iommufd", first, second)
    assert await objects(guest) == {"iommufd0"}
    await detach(machine(), "g", first.uuid)
    assert opened(guest) == nodes("iommufd", second)
    await detach(machine(), "g", second.uuid)
    assert (opened(guest), await objects(guest)) == (set(), set())
    with vfio.fault("open", "errno=5"), pytest.raises(errors.QemuError, match="Input/output"):
        await attach(machine(), "g", first.uuid)
    assert (opened(guest), await objects(guest)) == (set(), set())


async def test_a_guest_keeps_its_kind(links: None, patched: dict[str, Any]) -> None:  # noqa: F811
    first, second = await make(2, None)
    guest = await guest_ops.launch(machine(), replace(spec(first), **patched, iommu="container"))
    with pytest.raises(errors.RequestError, match="guest g has its devices by container"):
        await attach(machine(), "g", second.uuid, iommu="iommufd")
    await attach(machine(), "g", second.uuid)
    assert opened(guest) == nodes("container", first, second)


# ---- what is missing ----


async def test_a_qemu_without_iommufd(links: None) -> None:
    assert features.IOMMUFD not in await features.properties(QEMU, "vfio-pci")
    (mdev,) = await make(1, None)
    guest = await guest_ops.launch(machine(), spec(mdev))
    assert opened(guest) == nodes("container", mdev)
    await guest_ops.end(machine(), guest, deadline=0, force=True)
    done = mdo("guest", "start", "g", "--mdev", str(mdev.uuid), "--iommu", "iommufd")
    assert done.returncode == 5
    assert one_line(done.stderr).startswith(
        f"mdo: guest g cannot use iommufd: the device vfio-pci of {QEMU} has no property iommufd"
    )
    assert process.list_guests(machine()) == []


async def test_a_node_that_is_not_there(links: None, patched: dict[str, Any]) -> None:  # noqa: F811
    (mdev,) = await make(1, None)
    with hidden(Path(mdev.nodes["iommufd"])):
        guest = await guest_ops.launch(machine(), replace(spec(mdev), **patched))
        assert opened(guest) == nodes("container", mdev)
        await guest_ops.end(machine(), guest, deadline=0, force=True)
        with pytest.raises(errors.HostError, match=f"{mdev.nodes['iommufd']} is not there"):
            await guest_ops.launch(machine(), replace(spec(mdev), **patched, iommu="iommufd"))
    with hidden(Path("/dev/iommu")):
        guest = await guest_ops.launch(machine(), replace(spec(mdev), **patched))
        assert opened(guest) == nodes("container", mdev)
        await guest_ops.end(machine(), guest, deadline=0, force=True)
        done = mdo("guest", "start", "g", "--mdev", str(mdev.uuid), "--iommu", "iommufd")
        assert done.returncode == 5
        assert "this host cannot use iommufd: /dev/iommu is not there" in one_line(done.stderr)


async def test_a_user_without_permission(
    links: None,
    patched: dict[str, Any],  # noqa: F811
) -> None:
    (mdev,) = await make(1, None)
    own, group = (Path(mdev.nodes[kind]) for kind in ("iommufd", "container"))
    place = Path(tempfile.mkdtemp())  # pytest's own directories and the cache are root's
    place.chmod(0o755)
    qemu = shutil.copy(patched["qemu"], place)
    firmware = shutil.copytree(patched["firmware"], place / "firmware", symlinks=True)
    state = place / "s"
    state.mkdir(mode=0o700)
    os.chown(state, OTHER_USER, OTHER_USER)

    def start(choice: str) -> subprocess.CompletedProcess[str]:
        options = ("--qemu", str(qemu), "--firmware", str(firmware))
        options += ("--accel", "tcg", "--memory", "64M", "--arg=-S", "--iommu", choice)
        return mdo(
            "guest", "start", "u", "--mdev", str(mdev.uuid), *options, state=state, user=OTHER_USER
        )

    def stop() -> None:
        arguments = ("guest", "stop", "u", "--force", "--deadline", "0")
        assert mdo(*arguments, state=state, user=OTHER_USER).returncode == 0

    with allowed(group):
        done = start("auto")
        assert (done.returncode, done.stderr) == (0, "")
        assert holders(mdev)[0].startswith("guest 'u'")
        assert used(mdev) == {str(group)}
        stop()
        done = start("iommufd")
        assert done.returncode == 5
        assert "this host cannot use iommufd: no permission to open /dev/iommu" in one_line(
            done.stderr
        )
        assert 'KERNEL=="iommu"' in done.stderr
        with allowed(Path("/dev/iommu")), allowed(own):
            done = start("auto")
            assert (done.returncode, done.stderr) == (0, "")
            assert used(mdev) == {str(own)}
            stop()
    shutil.rmtree(place)


def used(mdev: Mdev) -> set[str]:
    """The nodes of a device that any process has open."""
    pids = [holder.pid for holder in read_holders(machine(), (mdev,)).of(mdev.uuid)]
    return set().union(*map(files, pids)) & set(mdev.nodes.values())


# ---- start groups ----


@pytest.mark.parametrize("plug", ["cold", "hot"])
async def test_a_group_is_started_before_it_is_opened(
    driver: str,  # noqa: F811
    patched: dict[str, Any],  # noqa: F811
    plug: str,
) -> None:
    """The driver opens a device when it is bound to iommufd, not when its node is opened."""
    mdevs = await make(2, None if driver == "no online" else "peers")
    since = vfio.now()
    guest = await guest_ops.launch(
        machine(), replace(spec(*(mdevs if plug == "cold" else ())), **patched)
    )
    if plug == "hot":
        assert opened(guest) == set()
        for mdev in mdevs:
            await guest_ops.attach(machine(), guest, guest_mdev(mdev))
    assert opened(guest) == nodes("iommufd", *mdevs)
    assert {tuple(holders(mdev)) for mdev in mdevs} == {(f"guest 'g' (pid {pid_of(guest)})",)}
    report = await status.look(guest)
    assert [plugged.iommu for plugged in report.mdevs or ()] == ["iommufd", "iommufd"]
    await quit_(guest)
    assert await process.wait_ended(guest, 20)
    assert states(*mdevs) <= {False, None}
    assert free() == LINKS
    for members in [mdevs] if driver != "no online" else [(mdev,) for mdev in mdevs]:
        in_order(members, since)


async def test_an_mdev_is_recognised_by_a_passed_descriptor(
    explicit: None,  # noqa: F811
    patched: dict[str, Any],  # noqa: F811
    tmp_path: Path,
) -> None:
    first, second = await make(2)
    own = [os.open(mdev.nodes["iommufd"], os.O_RDWR) for mdev in (first, second)]
    command = [patched["qemu"], "-L", patched["firmware"], "-M", "q35", "-accel", "tcg"]
    command += [
        "-S",
        "-nodefaults",
        "-display",
        "none",
        "-qmp",
        f"unix:{tmp_path}/q,server,wait=off",
    ]
    command += ["-object", "iommufd,id=iommufd0"]
    for number, fd in enumerate(own):
        command += ["-device", f"vfio-pci,id=d{number},fd={fd},iommufd=iommufd0"]
    with subprocess.Popen(command, pass_fds=own) as program:
        for fd in own:
            os.close(fd)
        assert await poll_until(lambda: (tmp_path / "q").exists() or program.poll(), 60)
        async with connect(tmp_path / "q", "a QEMU") as qmp:
            found = await qmp.execute("query-vfio-mdevs", list[dict[str, object]])
            assert {str(mdev["uuid"]) for mdev in found} == {str(first.uuid), str(second.uuid)}
            assert {(mdev["state"], mdev["started-by"]) for mdev in found} == {("online", "qemu")}
            assert states(first, second) == {True}
            await qmp.quit()
        assert await poll_until(lambda: program.poll() is not None, 60)
    assert states(first, second) == {False}


# ---- a guest that boots ----


async def test_a_booted_guest_uses_a_device_that_is_plugged_in(
    links: None,
    patched: dict[str, Any],  # noqa: F811
) -> None:
    (mdev,) = await make(1, None)
    config = GuestConfig(
        name="g",
        memory=256 << 20,  # type: ignore[arg-type]
        kernel=Path(os.environ["MDO_LAB_KERNEL"]),
        initrd=Path(os.environ["MDO_LAB_INITRD"]),
        append=l2.APPEND,
        **patched,
    )
    guest = await start_guest(machine(), config, deadline=GUEST_SECONDS)
    async with l2.program("g", guest.console_socket, GUEST_SECONDS) as program:
        await attach(
            machine(), "g", mdev.uuid, iommu="iommufd", wait_guest=True, deadline=GUEST_SECONDS
        )
        assert opened(guest) == nodes("iommufd", mdev)
        await program.ask(f"wait {mdev.uuid} {GUEST_SECONDS:.0f}", GUEST_SECONDS + 10)
        answer = await program.ask(f"use {mdev.uuid} 2016 {FILL_BYTES} msi", GUEST_SECONDS)
        assert UUID(answer["uuid"]) == mdev.uuid
        assert answer["crc32"] == zlib.crc32(l2.pattern(2016, FILL_BYTES))
        assert answer["irqs"] == 4
        await detach(machine(), "g", mdev.uuid, deadline=GUEST_SECONDS)
        assert opened(guest) == set()


# ---- helpers ----


def mdo(
    *arguments: str, state: Path | None = None, user: int | None = None
) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ)
    if state is not None:
        environment |= {"MDO_STATE_DIR": str(state), "MDO_CACHE_DIR": str(state / "cache")}
    return subprocess.run(
        [sys.executable, "-c", CODE, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        user=user,
        group=user,
        extra_groups=None if user is None else [],
    )


def one_line(text: str) -> str:
    (line,) = text.splitlines()
    return line


@contextmanager
def hidden(node: Path) -> Iterator[None]:
    """A node that is not there while the block lasts."""
    aside = node.with_name(f".{node.name}")
    node.rename(aside)
    try:
        yield
    finally:
        aside.rename(node)


@contextmanager
def allowed(node: Path) -> Iterator[None]:
    """A node that every user may open while the block lasts."""
    before = stat.S_IMODE(node.stat().st_mode)
    node.chmod(0o666)
    try:
        yield
    finally:
        node.chmod(before)
