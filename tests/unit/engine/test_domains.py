# SPDX-License-Identifier: GPL-2.0-or-later
"""Devices of domains that libvirt runs: given and taken through libvirt, all or nothing.

libvirt's binding is one of files here; tests/campaign/test_libvirt.py has the real one.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Iterator
from uuid import UUID

import pytest

from mdev_orchestrator import errors
from mdev_orchestrator.cli.main import main
from mdev_orchestrator.engine import domain_ops, foreign, recovery
from mdev_orchestrator.engine.attach import attach, detach
from mdev_orchestrator.engine.devices import create_devices, remove_devices
from mdev_orchestrator.engine.executor import StepEventKind
from mdev_orchestrator.engine.foreign import foreign_guests
from mdev_orchestrator.errors import Outcome
from mdev_orchestrator.interop import libvirt as interop
from mdev_orchestrator.machine import Machine
from mdev_orchestrator.qemu import hotplug
from unit.engine.killed import dies_at, killed
from unit.fakelibvirt import DOMAIN, NAME, PID, FakeLibvirt
from unit.fakesys import FakeSystem

U1 = UUID("83b8f4f2-509f-382f-3c1e-e6bfe0fa1001")
U2 = UUID("83b8f4f2-509f-382f-3c1e-e6bfe0fa1002")
TYPE = "t-1"


@pytest.fixture
def libvirt(system: FakeSystem, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeLibvirt]:
    system.parent("card0")
    system.type("card0", TYPE)
    system.mdev("card0", TYPE, str(U1))
    system.mdev("card0", TYPE, str(U2))
    found = FakeLibvirt(system)
    monkeypatch.setitem(sys.modules, "libvirt", found)
    monkeypatch.setattr(interop, "is_installed", lambda: True)
    yield found
    for event in found.stuck.values():
        event.set()


async def test_a_domain_is_seen_as_what_it_is(
    libvirt: FakeLibvirt, system: FakeSystem, machine: Machine
) -> None:
    system.process(9, "qemu-system-x86", ["qemu", "-name", "other"], ["/dev/vfio/2"])
    (system.root / "proc/9/stat").write_text("9 (qemu) T 1")
    await attach(machine, NAME, U1)
    system.process(10, "spdk", ["spdk"], ["/dev/vfio/1"])
    other, domain = await foreign_guests(machine)
    assert (other.name, other.manager, other.mdevs, other.stopped) == ("other", None, (U2,), True)
    assert (domain.name, domain.manager, domain.mdevs) == (NAME, "libvirt", (U1,))
    assert (domain.uuid, domain.pid, domain.stopped) == (DOMAIN, PID, False)


async def test_a_pid_file_that_was_left_is_no_domain(
    libvirt: FakeLibvirt, system: FakeSystem, machine: Machine
) -> None:
    (system.root / "run/libvirt/qemu/gone.pid").write_text("77")
    (system.root / "run/libvirt/qemu/odd.pid").write_text("what")
    system.process(77, "bash", ["bash"], [])
    assert [guest.name for guest in await foreign_guests(machine)] == [NAME]


async def test_there_and_back(libvirt: FakeLibvirt, system: FakeSystem, machine: Machine) -> None:
    done = await attach(machine, NAME, TYPE)
    assert (done.device_id, done.port, done.created) == ("hostdev0", None, True)
    assert libvirt.devices == [str(done.uuid)]
    await detach(machine, NAME, done.uuid, remove=True)
    assert (libvirt.devices, system.uuids()) == ([], {str(U1), str(U2)})
    assert libvirt.addresses[0].startswith("qemu+unix:///system?socket=")


async def test_libvirt_opens_a_device_by_its_group(
    libvirt: FakeLibvirt, machine: Machine, system: FakeSystem
) -> None:
    """On a host with iommufd too: a domain's device needs no node of its own."""
    with pytest.raises(errors.RequestError, match="opens devices by their group") as caught:
        await attach(machine, NAME, U1, iommu="iommufd")
    assert caught.value.hint == "--iommu container, or without it"
    system.load_iommufd()
    await attach(machine, NAME, U1)
    assert libvirt.devices == [str(U1)]


async def test_a_removal_takes_it_out(libvirt: FakeLibvirt, machine: Machine) -> None:
    await attach(machine, NAME, U1)
    await attach(machine, NAME, U2)
    with pytest.raises(errors.BusyError, match=f"held by libvirt domain {NAME}"):
        await remove_devices(machine, [U1])
    await remove_devices(machine, [U1, U2], detach=True)
    assert libvirt.devices == []


async def test_what_cannot_be_asked_for(libvirt: FakeLibvirt, machine: Machine) -> None:
    with pytest.raises(errors.UnknownError, match="it has: none"):
        await detach(machine, NAME, U1)
    await attach(machine, NAME, U1)
    with pytest.raises(errors.RequestError, match=f"has mdev {U1} already"):
        await attach(machine, NAME, U1)
    with pytest.raises(errors.UnknownError, match="no guest is called web"):
        await attach(machine, "web", U1)
    assert libvirt.calls == [f"attach {U1}"]


async def test_one_that_another_process_has(
    libvirt: FakeLibvirt, system: FakeSystem, machine: Machine
) -> None:
    system.process(10, "spdk", ["spdk"], ["/dev/vfio/1"])
    with pytest.raises(errors.BusyError, match="held by spdk"):
        await attach(machine, NAME, U1)
    assert libvirt.calls == []


async def test_refused(libvirt: FakeLibvirt, system: FakeSystem, machine: Machine) -> None:
    libvirt.refusal = "internal error: error getting device from group 3: Input/output error"
    with pytest.raises(errors.QemuError) as caught:
        await attach(machine, NAME, TYPE)
    assert caught.value.outcome is Outcome.NO_EFFECT
    assert "dmesg" in caught.value.hint
    assert caught.value.__notes__ == ["all was undone"]
    assert system.uuids() == {str(U1), str(U2)}
    assert await recovery.pending(machine) == []


async def test_the_connection_breaks_when_it_is_attached(
    libvirt: FakeLibvirt, system: FakeSystem, machine: Machine
) -> None:
    libvirt.refusal, libvirt.broken = "End of file while reading data", True
    with pytest.raises(errors.QemuError, match="not known whether libvirt did attach") as caught:
        await attach(machine, NAME, TYPE)
    assert caught.value.outcome is Outcome.UNKNOWN
    assert caught.value.__notes__ == ["all was undone"]
    assert (libvirt.devices, system.uuids()) == ([], {str(U1), str(U2)})


async def test_libvirt_cannot_be_reached(
    libvirt: FakeLibvirt, system: FakeSystem, machine: Machine
) -> None:
    libvirt.down = True
    with pytest.raises(errors.HostError, match="libvirt cannot be reached") as caught:
        await attach(machine, NAME, TYPE)
    assert caught.value.outcome is Outcome.NO_EFFECT
    assert system.uuids() == {str(U1), str(U2)}


@pytest.mark.parametrize("name", ["open", "XMLDesc"])
async def test_libvirt_hangs_before_it_is_told(
    libvirt: FakeLibvirt, system: FakeSystem, machine: Machine, name: str
) -> None:
    libvirt.stuck[name] = threading.Event()
    with pytest.raises(errors.DeadlineError) as caught:
        await attach(machine, NAME, U1, deadline=0.3)
    assert caught.value.outcome is Outcome.NO_EFFECT
    assert caught.value.__notes__ == ["nothing was changed"]
    libvirt.stuck[name].set()
    await asyncio.sleep(0.1)
    assert libvirt.calls == []


async def test_libvirt_hangs_when_it_is_told(
    libvirt: FakeLibvirt,
    system: FakeSystem,
    machine: Machine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The outcome is unknown, the undo cannot be made either; later libvirt does as it was told."""
    monkeypatch.setattr(domain_ops, "LOOK_SECONDS", 0.5)
    libvirt.stuck = {"attach": threading.Event()}

    def hang() -> None:
        while not libvirt.addresses[1:]:
            time.sleep(0.01)
        libvirt.stuck["XMLDesc"] = libvirt.stuck["attach"]

    threading.Thread(target=hang).start()
    with pytest.raises(errors.DeadlineError) as caught:
        await attach(machine, NAME, U1, deadline=1.0)
    assert caught.value.outcome is Outcome.UNKNOWN
    assert "it may do so yet" in caught.value.message
    assert any("could not undo" in note for note in caught.value.__notes__)
    libvirt.stuck["attach"].set()
    await asyncio.sleep(0.2)
    assert libvirt.devices == [str(U1)]
    (recovered,) = await recovery.recover(machine)
    assert (recovered.way, recovered.errors) == ("undo", ())
    assert libvirt.devices == []


@pytest.mark.parametrize("kind", [StepEventKind.BEGIN, StepEventKind.ACTED])
async def test_killed(
    libvirt: FakeLibvirt, system: FakeSystem, machine: Machine, kind: StepEventKind
) -> None:
    """The child has a libvirt of its own: what it did is done here again."""
    await killed(attach(machine, NAME, U1, observe=dies_at(kind)))
    libvirt.devices = [str(U1)] if kind is StepEventKind.ACTED else []
    libvirt.show()
    await recovery.recover(machine)
    assert libvirt.devices == []
    assert libvirt.calls == [f"detach {U1}"]


async def test_a_guest_that_does_not_let_go(
    libvirt: FakeLibvirt, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hotplug, "OBEY_SECONDS", 1.0)
    await attach(machine, NAME, U1)
    libvirt.keeps = True
    with pytest.raises(errors.DeadlineError, match="it still has it") as caught:
        await detach(machine, NAME, U1, deadline=0.5)
    assert caught.value.outcome is Outcome.UNKNOWN
    assert libvirt.devices == [str(U1)]
    assert await recovery.pending(machine) == []


async def test_the_domain_ends_before_an_undo(
    libvirt: FakeLibvirt, system: FakeSystem, machine: Machine
) -> None:
    await killed(attach(machine, NAME, U1, observe=dies_at(StepEventKind.BEGIN)))
    (system.root / f"run/libvirt/qemu/{NAME}.pid").unlink()
    (recovered,) = await recovery.recover(machine)
    assert recovered.errors == ()


async def test_without_libvirt_an_undo_looks_at_open_files(
    libvirt: FakeLibvirt, machine: Machine
) -> None:
    await killed(attach(machine, NAME, U1, observe=dies_at(StepEventKind.BEGIN)))
    libvirt.down = True
    libvirt.devices = [str(U1)]
    libvirt.show()
    (recovered,) = await recovery.recover(machine)
    assert "libvirt cannot be reached" in recovered.errors[0].message
    libvirt.devices = []
    libvirt.show()
    (recovered,) = await recovery.recover(machine)
    assert recovered.errors == ()


def test_without_the_binding(
    libvirt: FakeLibvirt,
    system: FakeSystem,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MDO_ROOT", str(system.root))
    monkeypatch.setattr(interop, "is_installed", lambda: False)
    assert main(["attach", NAME, str(U1)]) == 5
    said = capsys.readouterr().err
    assert said.startswith(
        "mdo: libvirt domain web 1: libvirt's Python binding is not there; nothing was changed"
    )
    assert said.endswith(
        "or: echo \"<hostdev mode='subsystem' type='mdev' model='vfio-pci'><source>"
        f"<address uuid='{U1}'/></source></hostdev>\" | "
        f"virsh attach-device --live 'web 1' /proc/self/fd/0\n"
    )
    assert libvirt.calls == []


def test_only_the_libvirt_of_this_host(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine()
    assert interop.uri(machine) == "qemu:///system"
    here = "qemu+unix:///system?socket=/run/other"
    monkeypatch.setenv(interop.URI, here)
    assert interop.uri(machine) == here
    for other in ("qemu+ssh://other/system", "qemu:///session"):
        monkeypatch.setenv(interop.URI, other)
        assert interop.uri(machine) == "qemu:///system"


def test_the_doctor_names_the_binding(
    libvirt: FakeLibvirt,
    system: FakeSystem,
    machine: Machine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert foreign.examine(machine) == ()
    (system.root / "run/libvirt/libvirt-sock").touch()
    assert [finding.level for finding in foreign.examine(machine)] == ["ok"]
    monkeypatch.setattr(interop, "is_installed", lambda: False)
    (finding,) = foreign.examine(machine)
    assert (finding.level, "python3-libvirt" in finding.remedy) == ("warning", True)


async def test_libvirt_goes_after_it_has_attached(libvirt: FakeLibvirt, machine: Machine) -> None:
    """That it cannot be asked then does not mean that nothing was done."""

    def go(verb: str) -> None:
        libvirt.down = verb == "attach"

    libvirt.after = go
    with pytest.raises(errors.HostError) as caught:
        await attach(machine, NAME, U1)
    assert caught.value.outcome is Outcome.UNKNOWN
    libvirt.down = False
    await recovery.recover(machine)
    assert libvirt.devices == []


async def test_no_such_domain(libvirt: FakeLibvirt, machine: Machine) -> None:
    with pytest.raises(errors.UnknownError, match="libvirt has no domain"):
        await interop.devices(machine, interop.Domain(NAME, U1, PID), 1.0)


async def test_create_is_left_alone(libvirt: FakeLibvirt, machine: Machine) -> None:
    """A domain that runs is no reason for any other command to ask libvirt."""
    await create_devices(machine, TYPE)
    assert libvirt.addresses == []
