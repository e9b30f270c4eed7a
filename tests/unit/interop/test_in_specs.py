# SPDX-License-Identifier: GPL-2.0-or-later
"""A spec that gives the UUID of a device that mdevctl has defined, from asked to true."""

from __future__ import annotations

from uuid import UUID

import msgspec
import pytest

from mdev_orchestrator.engine.diff import Changes, diff
from mdev_orchestrator.engine.records import DeviceRecord, Managed
from mdev_orchestrator.engine.snapshot import ObservedState
from mdev_orchestrator.engine.steps import Create, Remove
from mdev_orchestrator.errors import RequestError
from mdev_orchestrator.host.sysfs import read_host
from mdev_orchestrator.interop import mdevctl
from mdev_orchestrator.interop.mdevctl import Definition
from mdev_orchestrator.machine import Machine
from mdev_orchestrator.spec import Document, parse
from unit.fakesys import FakeSystem

U1 = UUID("83b8f4f2-509f-382f-3c1e-e6bfe0fa1001")
GROUP = UUID("aaaaaaaa-1111-4222-8333-444444444444")
DEFINED = Definition(
    uuid=U1,
    parent="igd0",
    type="mvgpu-128M",
    attributes=(("vgpu_params", "a=1"), ("vgpu_params", "a=2"), ("group_uuid", str(GROUP))),
)
POOL = f'name = "s"\n[[pool]]\nname = "p"\nuuid = "{U1}"\n'
GUEST = f'name = "s"\n[[guest]]\nname = "g"\nmdev = [{{uuid = "{U1}"}}]\n'


@pytest.fixture
def machine(system: FakeSystem) -> FakeSystem:
    for parent in ("igd0", "igd1"):
        system.parent(parent)
        system.type(parent, "mvgpu-128M", 8)
        system.groups_of(parent, 3)
    mdevctl.write(Machine(system.root), [DEFINED])
    return system


def run(machine: FakeSystem, group: UUID | None = GROUP, parent: str = "igd0") -> None:
    path = machine.mdev(parent, "mvgpu-128M", str(U1))
    (path / "group_uuid").write_text("\n" if group is None else f"{group}\n")


def changes(machine: FakeSystem, document: Document, *ours: DeviceRecord) -> Changes:
    managed = Managed(devices={device.uuid: device for device in ours})
    handle = Machine(machine.root)
    state = ObservedState(read_host(handle), managed, {}, mdevctl.defined(handle))
    return diff(document, state)


def made(found: Changes) -> DeviceRecord:
    (device,) = [step.step.device for step in found.steps if isinstance(step.step, Create)]
    return device


def test_a_pools_device_is_made_as_defined(machine: FakeSystem) -> None:
    device = made(changes(machine, parse(POOL)))
    assert (device.uuid, device.parent, device.type) == (U1, "igd0", "mvgpu-128M")
    assert device.attributes == DEFINED.attributes


def test_a_guests_device_joins_the_group_that_is_defined(machine: FakeSystem) -> None:
    device = made(changes(machine, parse(GUEST)))
    assert device.attributes == DEFINED.attributes[:2]
    assert device.group == GROUP


@pytest.mark.parametrize("text", [POOL, GUEST])
def test_once_made_there_is_nothing_to_make(machine: FakeSystem, text: str) -> None:
    device = made(changes(machine, parse(text)))
    run(machine)
    again = changes(machine, parse(text), device)
    assert [step.step for step in again.steps if isinstance(step.step, Create)] == []
    assert again.change.devices == {}


def test_what_mdevctl_has_forgotten_stays_as_it_was_made(machine: FakeSystem) -> None:
    device = made(changes(machine, parse(POOL)))
    (mdevctl.directory(Machine(machine.root)) / "igd0" / str(U1)).unlink()
    assert made(changes(machine, parse(POOL), device)) == device  # after a reboot
    run(machine)
    again = changes(machine, parse(POOL), device)
    assert (again.steps, again.change.devices) == ((), {})


@pytest.mark.parametrize("text", [POOL, GUEST])
def test_a_definition_that_was_changed_is_for_the_next_time(machine: FakeSystem, text: str) -> None:
    device = made(changes(machine, parse(text)))
    for attribute in (("vgpu_params", "a=3"), ("x", "1")):
        modified = msgspec.structs.replace(DEFINED, attributes=(attribute,))
        mdevctl.write(Machine(machine.root), [modified], force=True)
        after_a_reboot = made(changes(machine, parse(text), device))
        assert after_a_reboot.attributes == (attribute,)
        assert after_a_reboot.group is None
    run(machine)
    again = changes(machine, parse(text), device)
    assert [it.step for it in again.steps if isinstance(it.step, Create | Remove)] == []


@pytest.mark.parametrize("group", [GROUP, None])
def test_a_guest_borrows_a_device_that_mdevctl_runs(
    machine: FakeSystem, group: UUID | None
) -> None:
    run(machine, group)
    found = changes(machine, parse(GUEST))
    assert [step.step for step in found.steps if isinstance(step.step, Create)] == []
    assert [device.uuid for device in found.existing] == [U1]
    with pytest.raises(RequestError, match=f"device {U1} exists and is not ours"):
        changes(machine, parse(POOL))


def test_it_is_not_borrowed_when_it_is_another(machine: FakeSystem) -> None:
    run(machine, parent="igd1")
    with pytest.raises(RequestError, match=rf"mdev\[0\].uuid: .*{U1}.* is not ours"):
        changes(machine, parse(GUEST))


def test_of_several_definitions_the_spec_must_choose(machine: FakeSystem) -> None:
    other = msgspec.structs.replace(DEFINED, parent="igd1")
    mdevctl.write(Machine(machine.root), [other])
    with pytest.raises(RequestError, match=r"uuid: mdevctl defines .* on igd0 and on igd1"):
        changes(machine, parse(POOL))
    assert made(changes(machine, parse(POOL + 'parent = "igd1"\n'))).parent == "igd1"
