# SPDX-License-Identifier: GPL-2.0-or-later
"""In which way a guest's devices are opened, and what is said when it cannot be the other one."""

from __future__ import annotations

from pathlib import Path
from uuid import UUID, uuid4

import pytest

from mdev_orchestrator import errors
from mdev_orchestrator.engine import guest_iommu, recovery
from mdev_orchestrator.engine.attach import attach, detach
from mdev_orchestrator.engine.executor import StepEventKind
from mdev_orchestrator.engine.guests import start_guest
from mdev_orchestrator.host import iommu
from mdev_orchestrator.machine import Machine
from mdev_orchestrator.model import IommuChoice
from mdev_orchestrator.qemu import process
from mdev_orchestrator.qemu.command import GuestMdev, GuestSpec
from mdev_orchestrator.spec import GuestConfig
from unit.engine.killed import dies_at, killed
from unit.engine.scripted import ScriptedGuest
from unit.fakesys import FakeSystem

U1, U2 = UUIDS = [UUID(f"83b8f4f2-509f-382f-3c1e-e6bfe0fa100{n}") for n in "12"]
T1, T2 = map(str, UUIDS)


@pytest.fixture
def system(system: FakeSystem) -> FakeSystem:
    """A host with iommufd, and two devices."""
    system.load_iommufd().parent("card0")
    system.type("card0", "t-1", 8)
    for text in (T1, T2):
        system.mdev("card0", "t-1", text)
    return system


@pytest.fixture
def machine(system: FakeSystem, place: Path) -> Machine:
    return Machine(system.root, state=place)


# ---- a guest that is started ----


def qemu_with(directory: Path, *properties: str) -> str:
    """A program that says which properties its vfio devices have."""
    path = directory / f"qemu-{'-'.join(properties)}"
    path.write_text("#!/bin/sh\n" + "".join(f"echo '  {name}=<str>'\n" for name in properties))
    path.chmod(0o755)
    return str(path)


def spec(qemu: str, choice: IommuChoice, *uuids: UUID) -> GuestSpec:
    bus = Path("/sys/bus/mdev/devices")
    mdevs = tuple(GuestMdev(uuid, bus / str(uuid)) for uuid in uuids)
    return GuestSpec(name="g", uuid=uuid4(), iommu=choice, qemu=qemu, mdevs=mdevs)


@pytest.fixture
def new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A QEMU that knows iommufd."""
    monkeypatch.setenv("MDO_CACHE_DIR", str(tmp_path / "cache"))
    return qemu_with(tmp_path, "sysfsdev", "iommufd")


async def chosen(machine: Machine, spec: GuestSpec) -> str:
    return await guest_iommu.for_launch(machine, spec)


async def refusal(machine: Machine, spec: GuestSpec) -> str:
    with pytest.raises(errors.HostError) as caught:
        await guest_iommu.for_launch(machine, spec)
    assert caught.value.hint.endswith("; or --iommu container")
    return caught.value.message


async def test_iommufd_where_host_device_and_qemu_have_it(machine: Machine, new: str) -> None:
    assert await chosen(machine, spec(new, "auto", U1, U2)) == "iommufd"
    assert await chosen(machine, spec(new, "container", U1)) == "container"
    assert await chosen(machine, spec(new, "auto")) == "auto"  # its first device decides
    assert await chosen(machine, spec(new, "iommufd")) == "iommufd"


async def test_a_host_without_iommufd(machine: Machine, system: FakeSystem, new: str) -> None:
    (system.root / "dev/iommu").unlink()
    assert await chosen(machine, spec(new, "auto", U1)) == "container"
    said = await refusal(machine, spec(new, "iommufd"))
    assert said.startswith("guest g cannot use iommufd: ")
    assert said.endswith("dev/iommu is not there")
    modules = system.root / "lib/modules" / iommu.os.uname().release
    modules.mkdir(parents=True)
    (modules / "modules.dep").write_text("kernel/drivers/vfio/vfio.ko.xz:\n")
    assert "has no iommufd" in await refusal(machine, spec(new, "iommufd", U1))


async def test_no_permission_for_iommufd(
    machine: Machine, new: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(iommu, "may_open", lambda path, user=None: "iommu" not in str(path))
    assert await chosen(machine, spec(new, "auto", U1)) == "container"
    with pytest.raises(errors.HostError, match=r"no permission to open .*dev/iommu") as caught:
        await guest_iommu.for_launch(machine, spec(new, "iommufd", U1))
    assert 'udev rule: KERNEL=="iommu"' in caught.value.hint


async def test_a_device_without_a_node_of_its_own(
    machine: Machine, system: FakeSystem, new: str
) -> None:
    (system.root / "dev/vfio/devices/vfio2").unlink()
    assert await chosen(machine, spec(new, "auto", U1)) == "iommufd"
    assert await chosen(machine, spec(new, "auto", U1, U2)) == "container"
    said = await refusal(machine, spec(new, "iommufd", U1, U2))
    assert f"mdev {U2}: " in said
    assert said.endswith("devices/vfio2 is not there")
    (system.bus / T2 / "vfio-dev/vfio2/dev").unlink()
    said = await refusal(machine, spec(new, "iommufd", U2))
    assert said.endswith("the kernel gives it no node of its own")


async def test_a_qemu_without_iommufd(machine: Machine, tmp_path: Path, new: str) -> None:
    old = qemu_with(tmp_path, "sysfsdev")
    assert await chosen(machine, spec(old, "auto", U1)) == "container"
    said = await refusal(machine, spec(old, "iommufd", U1))
    assert said.endswith(f"the device vfio-pci of {old} has no property iommufd")


async def test_a_start_is_refused_before_anything_is_changed(
    machine: Machine, system: FakeSystem, qemu: str
) -> None:
    config = GuestConfig(name="g", memory=64 << 20, accel="tcg", qemu=qemu, iommu="iommufd")
    (system.root / "dev/iommu").unlink()
    with pytest.raises(errors.HostError, match="this host cannot use iommufd: ") as caught:
        await start_guest(machine, config, [U1])
    assert caught.value.exit_code == 5
    assert process.list_guests(machine) == []


# ---- a device that is attached ----


async def test_the_object_comes_with_the_first_device_and_goes_with_the_last(
    machine: Machine, guest: ScriptedGuest
) -> None:
    await attach(machine, "g", T1)
    await attach(machine, "g", T2)
    assert guest.objects == {"ram0": "memory-backend-ram", "iommufd0": "iommufd"}
    assert guest.by_iommufd == {f"mdev-{uuid}": "iommufd0" for uuid in UUIDS}
    await detach(machine, "g", U1)
    assert "iommufd0" in guest.objects
    await detach(machine, "g", U2)
    assert list(guest.objects) == ["ram0"]


async def test_an_object_that_the_guest_has_already_is_used(
    machine: Machine, guest: ScriptedGuest
) -> None:
    guest.objects["theirs"] = "iommufd"
    await attach(machine, "g", T1)
    assert guest.by_iommufd == {f"mdev-{U1}": "theirs"}
    await detach(machine, "g", U1)
    assert "theirs" in guest.objects


async def test_a_device_that_qemu_refuses_leaves_no_object(
    machine: Machine, guest: ScriptedGuest
) -> None:
    guest.refuses = "no such device"
    with pytest.raises(errors.CommandError, match="no such device"):
        await attach(machine, "g", T1)
    assert list(guest.objects) == ["ram0"]


async def test_an_attach_that_is_killed_leaves_no_object(
    machine: Machine, guest: ScriptedGuest
) -> None:
    await killed(attach(machine, "g", T1, observe=dies_at(StepEventKind.ACTED)))
    assert "iommufd0" in guest.objects
    await recovery.recover(machine)
    assert not guest.has(U1)
    assert list(guest.objects) == ["ram0"]


async def test_a_guest_keeps_the_kind_that_it_has(
    machine: Machine, system: FakeSystem, guest: ScriptedGuest
) -> None:
    await attach(machine, "g", T1, iommu="container")
    await attach(machine, "g", T2)
    assert (guest.by_iommufd, list(guest.objects)) == ({}, ["ram0"])
    await detach(machine, "g", U2)
    with pytest.raises(errors.RequestError, match="guest g has its devices by container") as caught:
        await attach(machine, "g", T2, iommu="iommufd")
    assert "--iommu container" in caught.value.hint
    await detach(machine, "g", U1)
    await attach(machine, "g", T1, iommu="iommufd")
    (system.root / "dev/vfio/devices/vfio2").unlink()
    with pytest.raises(errors.HostError, match=r"guest g cannot use iommufd: .*vfio2 is not there"):
        await guest_iommu_of(machine, U2)
    with pytest.raises(errors.RequestError, match="guest g has its devices by iommufd"):
        await attach(machine, "g", T2, iommu="container")
    assert guest.has(U1)
    assert not guest.has(U2)


async def guest_iommu_of(machine: Machine, uuid: UUID) -> object:
    """Attach without waiting for a node that does not come."""
    from mdev_orchestrator.engine import guest_ops

    found = process.find_running(machine, "g")
    return await guest_ops.attach(
        machine, found, GuestMdev(uuid, Path("/sys/bus/mdev/devices") / str(uuid))
    )


async def test_a_qemu_that_does_not_know_iommufd_gets_the_container(
    machine: Machine, guest: ScriptedGuest
) -> None:
    guest.knows_iommufd = False
    with pytest.raises(errors.HostError, match="of its QEMU has no property iommufd"):
        await attach(machine, "g", T1, iommu="iommufd")
    await attach(machine, "g", T1)
    assert guest.has(U1)
    assert list(guest.objects) == ["ram0"]


async def test_what_holds_a_device_by_its_own_node_is_found(
    machine: Machine, system: FakeSystem, guest: ScriptedGuest
) -> None:
    system.process(
        41, "qemu-system-x86", ["qemu", "-name", "guest=g1"], ["/dev/vfio/devices/vfio1"]
    )
    with pytest.raises(errors.BusyError, match=r"held by guest 'g1' \(pid 41\)"):
        await attach(machine, "g", T1)
