# SPDX-License-Identifier: GPL-2.0-or-later
"""The processes that have a device open."""

from __future__ import annotations

from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mdev_orchestrator.host.holders import guest_name, read_holders
from mdev_orchestrator.host.sysfs import read_host
from mdev_orchestrator.machine import Machine
from unit.fakesys import FakeSystem, link

U1 = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"
U2 = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1002"
U3 = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1003"


@pytest.fixture
def two(system: FakeSystem) -> FakeSystem:
    system.parent("p")
    system.type("p", "t")
    system.mdev("p", "t", U1)
    system.mdev("p", "t", U2)
    return system


def found(system: FakeSystem, uuid: str) -> list[str]:
    held = read_holders(Machine(system.root), read_host(Machine(system.root)).mdevs)
    return [str(holder) for holder in held.of(UUID(uuid))]


def test_no_process_has_it(two: FakeSystem) -> None:
    two.process(7, "sh", ["sh"], ["/dev/null", "/dev/vfio/vfio"])
    assert found(two, U1) == found(two, U2) == []


def test_a_guest_by_its_name(two: FakeSystem) -> None:
    command = ["qemu-system-x86_64", "-name", "guest=render-1,debug-threads=on", "-m", "1G"]
    two.process(41, "qemu-system-x86", command, ["/dev/vfio/vfio", "/dev/vfio/2"])
    assert found(two, U1) == []
    assert found(two, U2) == ["guest 'render-1' (pid 41)"]


def test_any_other_process_by_its_short_name(two: FakeSystem) -> None:
    two.process(9, "spdk", ["spdk"], ["/dev/vfio/1"])
    assert found(two, U1) == ["spdk (pid 9)"]


def test_a_holder_of_the_newer_character_device(two: FakeSystem) -> None:
    two.load_iommufd().mdev("p", "t", U3)
    two.process(5, "qemu", ["qemu", "-name", "g"], ["/dev/iommu", "/dev/vfio/devices/vfio3"])
    two.process(6, "spdk", ["spdk"], ["/dev/vfio/vfio", "/dev/vfio/3"])
    assert found(two, U3) == ["guest 'g' (pid 5)", "spdk (pid 6)"]
    assert found(two, U1) == []


def test_a_process_that_only_names_a_node_does_not_hold_it(two: FakeSystem) -> None:
    """udev has such a descriptor of every new node for a moment."""
    worker = two.process(3, "(udev-worker)", ["udev"], ["/dev/vfio/1", "/dev/vfio/2"])
    (worker / "fdinfo").mkdir()
    (worker / "fdinfo" / "0").write_text("pos:\t0\nflags:\t012000000\nmnt_id:\t26\n")
    (worker / "fdinfo" / "1").write_text("pos:\t0\nflags:\t02100002\nmnt_id:\t26\n")
    assert found(two, U1) == []
    assert found(two, U2) == ["(udev-worker) (pid 3)"]


def test_a_process_that_ends_meanwhile(two: FakeSystem) -> None:
    link(two.root / "proc" / "77", two.root / "nowhere")
    assert found(two, U1) == []


def test_a_command_line_cannot_spoil_the_terminal(two: FakeSystem) -> None:
    two.process(5, "q\x1b[2J", ["q", "-name", "a\x1b[2Jb"], ["/dev/vfio/1"])
    assert "\x1b" not in found(two, U1)[0]


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ([], None),
        (["qemu", "-name"], None),
        (["qemu", "-name", ""], None),
        (["qemu", "-name", "plain"], "plain"),
        (["qemu", "-name", "plain,process=x"], "plain"),
        (["qemu", "-name", "debug-threads=on,guest=late"], "late"),
        (["qemu", "-name", "guest=a,,b"], "a,b"),
        (["qemu", "--name", "guest=two"], "two"),
        (["qemu", "-name", "one", "-name", "two"], "two"),
        (["qemu", "-name", "process=x"], None),
    ],
)
def test_the_name_that_qemu_was_given(arguments: list[str], name: str | None) -> None:
    assert guest_name(arguments) == name


@given(st.text(min_size=1).filter(lambda text: "\0" not in text))
def test_every_name_survives_qemus_quoting(name: str) -> None:
    assert (
        guest_name(["qemu", "-name", f"guest={name.replace(',', ',,')},debug-threads=on"]) == name
    )


@given(st.lists(st.text()))
def test_no_command_line_is_too_odd(arguments: list[str]) -> None:
    guest_name(arguments)
