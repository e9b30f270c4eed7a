# SPDX-License-Identifier: GPL-2.0-or-later
"""The host as one scan shows it, whatever stands in the files."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mdev_orchestrator.errors import UuidError
from mdev_orchestrator.host.sysfs import read_host, read_mdev
from mdev_orchestrator.host.values import TEXT_LIMIT, parse_count
from mdev_orchestrator.machine import Machine
from mdev_orchestrator.model import MdevType, natural_key, parse_uuid
from unit.fakesys import FakeSystem, link

U1 = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"
U2 = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1002"


def only_type(system: FakeSystem) -> MdevType:
    return read_host(Machine(system.root)).parents[0].types[0]


def test_a_host_without_mdev_is_empty_and_says_so(tmp_path: Path) -> None:
    host = read_host(Machine(tmp_path))
    assert (host.parents, host.mdevs, host.mdev_bus) == ((), (), False)


def test_a_host_with_mdev_but_no_vendor_driver(system: FakeSystem) -> None:
    host = read_host(Machine(system.load_mdev().root))
    assert (host.parents, host.mdevs, host.mdev_bus) == ((), (), True)


def test_parents_types_and_devices(system: FakeSystem, machine: Machine) -> None:
    real = system.parent("0000:86:00.0", bus="pci0000:80")
    system.type("0000:86:00.0", "nvidia-11", 16, description="num_heads=2, framebuffer=512M\n")
    system.mdev("0000:86:00.0", "nvidia-11", U1)

    host = read_host(machine)

    (parent,) = host.parents
    assert (parent.name, parent.path, parent.damage) == ("0000:86:00.0", real, ())
    assert parent.types == (
        MdevType(
            id="nvidia-11",
            parent="0000:86:00.0",
            name="Name of nvidia-11",
            available_instances=16,
            device_api="vfio-pci",
            description="num_heads=2, framebuffer=512M",
        ),
    )
    (mdev,) = host.mdevs
    assert mdev.uuid == UUID(U1)
    assert mdev.path == system.bus / U1
    assert (mdev.parent, mdev.type_id, mdev.device_api) == ("0000:86:00.0", "nvidia-11", "vfio-pci")
    assert mdev.iommu_group == 1
    assert mdev.damage == ()


def test_without_types_everything_else_is_there(system: FakeSystem, machine: Machine) -> None:
    system.parent("card0")
    system.type("card0", "t-1", 1)
    system.mdev("card0", "t-1", U1)
    whole, rest = read_host(machine), read_host(machine, types=False)
    assert [parent.types for parent in rest.parents] == [()]
    assert [(m.uuid, m.type_id, m.iommu_group, m.device_api) for m in rest.mdevs] == [
        (m.uuid, m.type_id, m.iommu_group, None) for m in whole.mdevs
    ]


def test_order_is_that_of_people(system: FakeSystem, machine: Machine) -> None:
    for parent in ("card10", "card9"):
        system.parent(parent)
        for type_ in ("t-10", "t-9"):
            system.type(parent, type_)
    system.mdev("card10", "t-9", U1)
    system.mdev("card9", "t-9", U2)
    host = read_host(machine)
    assert [parent.name for parent in host.parents] == ["card9", "card10"]
    assert [type_.id for type_ in host.parents[0].types] == ["t-9", "t-10"]
    assert [str(mdev.uuid) for mdev in host.mdevs] == [U2, U1]


def test_name_and_description_are_optional(system: FakeSystem) -> None:
    system.parent("p")
    (system.type("p", "t") / "name").unlink()
    type_ = only_type(system)
    assert (type_.name, type_.description, type_.damage) == (None, None, ())


def test_the_vendors_own_files_are_attributes(system: FakeSystem) -> None:
    system.parent("p")
    path = system.type("p", "t", heads="2\n")
    (path / "attributes").mkdir()
    (path / "attributes" / "framebuffer").write_text("536870912\n")
    (path / "attributes" / "heads").write_text("other\n")
    (path / "attributes" / "trigger").write_text("")
    (path / "attributes" / "trigger").chmod(0o200)
    assert only_type(system).attributes == {
        "heads": "2",
        "framebuffer": "536870912",
        "attributes/heads": "other",
    }


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b"\n", "is empty"),
        (b"many\n", "is not a number: 'many'"),
        (b"-1\n", "is negative"),
        (b"9" * 5000, "is too large"),
        (b"4294967296\n", "is too large"),
        ("\u0663\n".encode(), "is not a number"),
        (b"\xff\xfe\n", "is not UTF-8"),
        (b"1" * (TEXT_LIMIT + 1), "is larger than 64 KiB"),
        (b"1\x1b[2J", "contains control characters"),
    ],
)
def test_a_spoilt_count_damages_its_type_and_no_other(
    system: FakeSystem, content: bytes, reason: str, machine: Machine
) -> None:
    system.parent("p")
    (system.type("p", "bad") / "available_instances").write_bytes(content)
    system.type("p", "good", 10)

    bad, good = read_host(machine).parents[0].types

    assert bad.available_instances is None
    assert [reason in damage for damage in bad.damage] == [True]
    assert (good.available_instances, good.damage) == (10, ())


@pytest.mark.parametrize("file", ["name", "description", "device_api"])
@pytest.mark.parametrize("content", [b"", b"\xff", b"\x1b]0;owned\x07", b"a" * (TEXT_LIMIT + 1)])
def test_a_spoilt_text_damages_its_type(system: FakeSystem, file: str, content: bytes) -> None:
    system.parent("p")
    (system.type("p", "t") / file).write_bytes(content)
    type_ = only_type(system)
    assert getattr(type_, file) is None
    assert len(type_.damage) == 1
    assert type_.damage[0].startswith(file)
    assert type_.available_instances == 4


def test_a_missing_count_is_damage(system: FakeSystem) -> None:
    system.parent("p")
    (system.type("p", "t") / "available_instances").unlink()
    assert "available_instances cannot be read: No such file" in only_type(system).damage[0]


def test_a_parent_whose_link_leads_nowhere_is_damaged(system: FakeSystem, machine: Machine) -> None:
    shutil.rmtree(system.parent("gone"))
    system.parent("here")
    system.type("here", "t")
    gone, here = read_host(machine).parents
    assert "No such file" in gone.damage[0]
    assert (here.damage, len(here.types)) == ((), 1)


def test_a_device_whose_link_leads_nowhere_is_damaged(system: FakeSystem, machine: Machine) -> None:
    system.parent("p")
    system.type("p", "t")
    shutil.rmtree(system.mdev("p", "t", U1))
    system.mdev("p", "t", U2)
    gone, here = read_host(machine).mdevs
    assert gone.damage == ("its link leads nowhere",)
    assert (here.type_id, here.damage) == ("t", ())


def test_a_device_that_has_no_type_link_yet_is_no_damage(
    system: FakeSystem, machine: Machine
) -> None:
    system.parent("p")
    system.type("p", "t")
    (system.mdev("p", "t", U1) / "mdev_type").unlink()
    (mdev,) = read_host(machine).mdevs
    assert (mdev.type_id, mdev.device_api, mdev.damage) == (None, None, ())


def test_a_device_without_an_iommu_group(system: FakeSystem, machine: Machine) -> None:
    system.parent("p")
    system.type("p", "t")
    (system.mdev("p", "t", U1) / "iommu_group").unlink()
    (mdev,) = read_host(machine).mdevs
    assert (mdev.iommu_group, mdev.nodes, mdev.damage) == (None, {}, ())


def test_a_device_with_a_node_of_its_own(system: FakeSystem, machine: Machine) -> None:
    system.load_iommufd().parent("p")
    system.type("p", "t")
    path = system.mdev("p", "t", U1)
    (mdev,) = read_host(machine).mdevs
    assert mdev == read_mdev(machine, UUID(U1))
    assert mdev.cdev == "vfio1"
    assert mdev.nodes == {"iommufd": "/dev/vfio/devices/vfio1", "container": "/dev/vfio/1"}
    (path / "vfio-dev/vfio1/dev").unlink()  # a kernel whose VFIO has no such nodes
    (mdev,) = read_host(machine).mdevs
    assert list(mdev.nodes) == ["container"]


def test_an_iommu_group_that_is_no_number_is_damage(system: FakeSystem, machine: Machine) -> None:
    system.parent("p")
    system.type("p", "t")
    link = system.mdev("p", "t", U1) / "iommu_group"
    link.unlink()
    link.symlink_to("../../../../kernel/iommu_groups/seven")
    (mdev,) = read_host(machine).mdevs
    assert mdev.damage == ("iommu_group is not a number: 'seven'",)


def test_a_device_whose_removal_waits_is_shown_and_found(
    system: FakeSystem, machine: Machine
) -> None:
    system.parent("p")
    system.type("p", "t")
    path = system.mdev("p", "t", U1)
    system.mdev("p", "t", U2)
    (system.bus / U1).unlink()
    (path / "mdev_type").unlink()
    (path / "remove").unlink()

    leaving, here = read_host(machine).mdevs

    assert (leaving.path, leaving.parent, leaving.iommu_group) == (path, "p", 1)
    assert leaving.damage == (
        "it is being removed, and the kernel waits for the process that has it open",
    )
    assert read_mdev(machine, UUID(U1)) == leaving
    assert here.damage == ()


def test_a_device_that_is_held_is_found_when_its_parent_has_lost_its_links(
    system: FakeSystem, machine: Machine
) -> None:
    """As while a PCI function is unbound that a guest has a device of."""
    system.parent("0000:86:00.0", bus="pci0000:80")
    system.type("0000:86:00.0", "t")
    path = system.mdev("0000:86:00.0", "t", U1)
    for group, device in (("1", path), ("2", system.root / "sys/devices/pci0000:80/0000:86:01.0")):
        (system.root / "sys/class/vfio" / group).mkdir(parents=True)
        devices = system.root / "sys/kernel/iommu_groups" / group / "devices"
        devices.mkdir(parents=True)
        link(devices / device.name, device)
    (system.bus / U1).unlink()
    (path / "mdev_type").unlink()
    (system.parents / "0000:86:00.0").unlink()

    host = read_host(machine)

    (leaving,) = host.mdevs
    assert (host.parents, host.damage) == ((), ())
    assert (leaving.path, leaving.parent, leaving.iommu_group) == (path, "0000:86:00.0", 1)
    assert leaving.damage == (
        "it is being removed, and the kernel waits for the process that has it open",
    )
    assert read_mdev(machine, UUID(U1)) == leaving
    assert read_mdev(machine, UUID(U2)) is None


@pytest.mark.parametrize(
    ("text", "node", "damage"),
    [
        ("-1\n", None, ()),
        ("0\n", 0, ()),
        ("1\n", 1, ()),
        ("x\n", None, ("numa_node is not a number: 'x'",)),
    ],
)
def test_the_numa_node_of_a_parent(
    system: FakeSystem, machine: Machine, text: str, node: int | None, damage: tuple[str, ...]
) -> None:
    (system.parent("p") / "numa_node").write_text(text)
    (parent,) = read_host(machine).parents
    assert (parent.numa_node, parent.damage) == (node, damage)


def test_a_device_that_is_no_uuid_is_reported_beside_the_others(
    system: FakeSystem, machine: Machine
) -> None:
    system.parent("p")
    system.type("p", "t")
    system.mdev("p", "t", "not-a-uuid")
    system.mdev("p", "t", U1)
    host = read_host(machine)
    assert [str(mdev.uuid) for mdev in host.mdevs] == [U1]
    assert host.damage == ("'not-a-uuid' on the mdev bus is not a UUID",)


def test_a_device_of_a_parent_that_is_going_away_is_still_shown(
    system: FakeSystem, machine: Machine
) -> None:
    system.parent("p")
    system.type("p", "t")
    system.mdev("p", "t", U1)
    (system.parents / "p").unlink()
    (mdev,) = read_host(machine).mdevs
    assert (mdev.parent, mdev.type_id, mdev.device_api) == ("p", "t", None)


def test_names_that_cannot_be_shown_are_reported_and_not_shown(
    system: FakeSystem, machine: Machine
) -> None:
    system.parent("p")
    system.parent("p\x1b[2J")
    system.type("p", "t", **{"bad\n": "1"})
    (system.types("p") / os.fsdecode(b"\xff")).mkdir()
    host = read_host(machine)
    (parent,) = host.parents
    assert [type_.id for type_ in parent.types] == ["t"]
    assert host.damage == (r"there is an entry with an unprintable name: 'p\x1b[2J'",)
    assert parent.damage == (r"there is an entry with an unprintable name: '\udcff'",)
    assert parent.types[0].damage == (r"there is an entry with an unprintable name: 'bad\n'",)


@given(st.integers(0, 2**32 - 1))
def test_every_count_of_the_kernel_is_read(number: int) -> None:
    assert parse_count(str(number)) == number


@given(st.text())
def test_a_count_is_digits_or_an_error(text: str) -> None:
    try:
        number = parse_count(text)
    except ValueError:
        return
    assert 0 <= number < 2**32
    assert text.isascii()
    assert str(number) == text.lstrip("0") or number == 0


@given(st.uuids())
def test_every_uuid_is_read(uuid: UUID) -> None:
    assert parse_uuid(str(uuid)) == uuid
    assert parse_uuid(str(uuid).upper()) == uuid


@given(st.text() | st.from_regex(r"[0-9a-f{}:-]{30,40}"))
def test_what_is_no_uuid_is_refused_on_one_line(text: str) -> None:
    try:
        assert str(parse_uuid(text)) == text.lower()
    except UuidError as error:
        line = str(error)
    else:
        return
    assert len(line) < 300
    assert "\n" not in line


@given(st.permutations(["t-1", "t-2", "t-10", "t-10a", "u", "1", "10", "9"]))
def test_natural_order(names: list[str]) -> None:
    assert sorted(names, key=natural_key) == ["1", "9", "10", "t-1", "t-2", "t-10", "t-10a", "u"]


@given(st.binary(max_size=200))
def test_no_file_content_escapes_the_scan(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    system = FakeSystem(tmp_path_factory.mktemp("sys"))
    system.parent("p")
    path = system.type("p", "t")
    for file in ("name", "available_instances", "device_api", "description"):
        (path / file).write_bytes(content)
    type_ = only_type(system)
    for text in (type_.name, type_.description, type_.device_api):
        assert text is None or "\x1b" not in text
