# SPDX-License-Identifier: GPL-2.0-or-later
"""Parents that are PCI functions, as real cards are: bound, used, unbound, pulled and plugged.

Runs inside any lab: ``mdo lab exec python3 -m pytest tests/lab/test_pci.py``.
"""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from lab import libvirt, vfio
from lab.cards import GRID, IGD, PCI, SECOND_IGD, bind, bound, claimed, unbind
from lab.commands import Mdo, mdevctl
from lab.kernel_log import KernelLog
from lab.libvirt import virsh
from lab.machine import machine
from lab.vfio import Child, Device
from mdev_orchestrator.host import sysfs
from mdev_orchestrator.interop import mdevctl as interop

pytestmark = pytest.mark.skipif("MDO_LAB" not in os.environ, reason="needs the lab's kernel")

TYPES = "mdev_supported_types"


def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    """Wait for something that no event tells of."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def left(parent: str) -> dict[str, int]:
    """What the kernel says of a parent's types."""
    types = (vfio.PARENTS / parent / TYPES).iterdir()
    return {path.name: int((path / "available_instances").read_text()) for path in types}


def exists(uuid: str) -> bool:
    return (vfio.MDEVS / uuid).exists()


# ---- the driver -----------------------------------------------------------------------------


def test_a_function_is_a_parent_as_a_card_is(kernel_log: KernelLog) -> None:
    """The seed's path is there, and what mvgpu's own parents have is there, too."""
    with claimed(GRID, IGD):
        assert left(GRID).keys() == left("grid0").keys()
        assert left(IGD) == {"mvgpu-128M": 8, "mvgpu-256M": 4, "mvgpu-512M": 2}
        for name in (GRID, IGD):
            assert (PCI / "devices" / name / TYPES).is_dir()
            real = (vfio.PARENTS / name).resolve()
            assert real == Path("/sys/devices/pci0000:00", name)
            assert vfio.links(name) == vfio.links()
            assert (real / TYPES / "mvgpu-12/attributes/num_heads").exists() == (name == GRID)
        uuid = vfio.create(IGD, "512M")
        assert (vfio.MDEVS / uuid).resolve() == Path("/sys/devices/pci0000:00", IGD, uuid)
        assert left(IGD) == {"mvgpu-128M": 4, "mvgpu-256M": 2, "mvgpu-512M": 1}
        assert left("igd0")["mvgpu-512M"] == 2
        with Device(uuid) as device:
            assert device.read("PERSONALITY") == 2
            assert device.run("FILL", dst=0, len=4096, seed=1) == 0
        vfio.remove(uuid)
        assert left(IGD)["mvgpu-512M"] == 2


def test_two_cards_have_links_and_groups_of_their_own(kernel_log: KernelLog) -> None:
    with claimed(IGD, SECOND_IGD):
        first, second = vfio.create(IGD, "128M"), vfio.create(IGD, "128M")
        stranger = vfio.create(SECOND_IGD, "128M")
        group = str(uuid4())
        for uuid in (first, second):
            vfio.put(uuid, "group_uuid", group)
        with pytest.raises(OSError, match="Invalid argument"):
            vfio.put(stranger, "group_uuid", group)
        all_links = vfio.links(SECOND_IGD)
        vfio.put(first, "online", "1")
        assert (vfio.links(IGD), vfio.links(SECOND_IGD)) == (all_links - 1, all_links)
        vfio.put(first, "online", "0")
        assert vfio.links(IGD) == all_links


def test_unbinding_removes_what_no_process_has_open(kernel_log: KernelLog) -> None:
    with claimed(IGD):
        before = left(IGD)
        uuids = [vfio.create(IGD, "128M") for _ in range(3)]
        for uuid in uuids[:2]:
            vfio.put(uuid, "group_uuid", "6f9619ff-8b86-d011-b42d-00c04fc964ff")
        vfio.put(uuids[0], "online", "1")
        assert unbind(IGD).wait(30) == 0
        assert not any(map(exists, uuids))
        assert not (PCI / "devices" / IGD / TYPES).exists()
        assert not (vfio.PARENTS / IGD).exists()
        bind(IGD)
        assert left(IGD) == before
        assert vfio.links(IGD) == int((PCI / "devices" / IGD / "p2p_links").read_text())


def test_unbinding_waits_for_the_process_that_has_a_device_open(kernel_log: KernelLog) -> None:
    """Nothing new can be made meanwhile, and the user notices nothing."""
    with claimed(IGD):
        held, idle = vfio.create(IGD, "128M"), vfio.create(IGD, "128M")
        types = PCI / "devices" / IGD / TYPES
        with Child(held) as user:
            waiting = unbind(IGD)
            until(lambda: not exists(held) or not exists(idle))
            assert not (vfio.PARENTS / IGD).exists()
            with pytest.raises(OSError, match=r".") as caught:
                vfio.poke(types / "mvgpu-128M/create", str(uuid4()))
            assert caught.value.errno in {errno.ENODEV, errno.ENOENT}
            waiting.kill()  # which does not end the removal
            time.sleep(0.5)
            assert (waiting.poll(), user.failed) == (None, 0)
        waiting.wait(30)
        assert not exists(held)
        assert not exists(idle)


def test_functions_come_and_go_and_leave_nothing(kernel_log: KernelLog) -> None:
    def seen() -> object:
        return left(GRID), left(IGD), sorted(path.name for path in vfio.PARENTS.iterdir())

    with claimed(GRID, IGD):
        before = seen()
        for _ in range(20):
            vfio.create(IGD, "128M")
            assert unbind(IGD).wait(30) == 0
            bind(IGD)
        for _ in range(5):  # a card that is pulled and plugged; it is taken without a word
            uuid = vfio.create(GRID, "12")
            vfio.poke(PCI / "devices" / GRID / "remove", "1")
            assert not exists(uuid)
            assert not (PCI / "devices" / GRID).exists()
            vfio.poke(PCI / "rescan", "1")
            until(lambda: bound(GRID))
        assert seen() == before
        assert list(vfio.MDEVS.iterdir()) == []


def test_the_module_goes_with_its_functions(kernel_log: KernelLog) -> None:
    """It is refused while a device is open, and takes idle ones along."""
    with claimed(GRID, IGD):
        uuid = vfio.create(IGD, "128M")
        with Child(uuid):
            done = subprocess.run(["rmmod", "mvgpu"], check=False, capture_output=True, text=True)
            assert done.returncode != 0
            assert re.search("in use", done.stderr)
        with vfio.loaded(grid_parents=0, igd_parents=0):
            assert not exists(uuid)
            assert sorted(path.name for path in vfio.PARENTS.iterdir()) == [GRID, IGD]
        assert bound(IGD)


# ---- mdo ------------------------------------------------------------------------------------

GUEST = f"""
name = "cards"
[[guest]]
name = "player"
memory = "64M"
accel = "tcg"
extra = ["-S"]
[[guest.mdev]]
type = "mvgpu-512M"
parent = "{IGD}"
[[pool]]
name = "spare"
type = "mvgpu-12"
parent = "{GRID}"
count = 2
"""


@pytest.fixture
def spec(mdo: Mdo, tmp_path: Path) -> Iterator[Path]:
    """A guest with a device of one card, which is halted, and two spare devices of another."""
    file = tmp_path / "cards.toml"
    file.write_text(GUEST)
    with claimed(GRID, IGD):
        mdo("apply", file)
        yield file
        if "cards" in mdo("guest", "list") or sysfs.read_host(machine()).mdevs:
            mdo("destroy", "cards", "--force", "--deadline", "0")
    assert sysfs.read_host(machine()).mdevs == ()


def test_mdo_uses_cards_by_their_addresses(mdo: Mdo, spec: Path) -> None:
    shape = json.loads(mdo("host", "--json"))
    cards = {parent["name"]: parent for parent in shape["parents"]}
    assert cards[IGD]["path"] == f"/sys/devices/pci0000:00/{IGD}"
    assert cards[IGD]["numa_node"] is None  # the lab has one node
    assert (cards[IGD]["links"], cards[GRID]["links_free"]) == (8, 8)
    used = {(m["parent"], m["type"], m["for"]) for m in shape["mdevs"]}
    assert used == {(IGD, "mvgpu-512M", "guest:player"), (GRID, "mvgpu-12", "pool:spare")}
    (holder,) = (h for m in shape["mdevs"] for h in m["holders"])
    assert holder["guest"] == "player"
    assert IGD in mdo("host")

    (uuid,) = mdo("create", "mvgpu-512M", "--parent", IGD).split()
    mdo("create", "mvgpu-128M", "--parent", IGD, code=2)
    assert f"do not fit on {IGD}" in mdo.errors or f"left on {IGD}" in mdo.errors
    mdo("attach", "player", uuid)
    assert len(json.loads(mdo("host", "--json"))["mdevs"]) == 4
    mdo("detach", "player", uuid, "--deadline", "1", code=4)  # a halted guest does not answer


def test_a_card_is_unbound_under_a_guest(mdo: Mdo, spec: Path) -> None:
    """``mdo`` shows what waits for the guest, and the card goes when the guest has ended."""
    (mdev,) = (m for m in sysfs.read_host(machine()).mdevs if m.parent == IGD)
    waiting = unbind(IGD)
    until(lambda: not mdev.path.exists())

    shape = json.loads(mdo("host", "--json"))
    assert IGD not in {parent["name"] for parent in shape["parents"]}
    (going,) = (m for m in shape["mdevs"] if m["uuid"] == str(mdev.uuid))
    assert (going["parent"], going["holders"][0]["guest"]) == (IGD, "player")
    assert "it is being removed" in going["damage"][0]
    mdo("remove", mdev.uuid, code=2)
    assert "is held by guest 'player'" in mdo.errors
    mdo("create", "mvgpu-128M", "--parent", IGD, code=2)
    assert f"there is no parent '{IGD}'" in mdo.errors

    mdo("guest", "stop", "player", "--force", "--deadline", "0")
    assert waiting.wait(30) == 0
    assert str(mdev.uuid) not in mdo("host")
    assert f"mdev {mdev.uuid} of spec cards is lost" in mdo.errors

    bind(IGD)
    mdo("apply", spec)


# ---- mdevctl and libvirt --------------------------------------------------------------------


def test_mdevctl_and_mdo_see_the_same_cards(mdo: Mdo, tmp_path: Path) -> None:
    with claimed(GRID, IGD):
        (theirs,) = json.loads(mdevctl("types", "--parent", IGD, "--dumpjson"))
        offered = {id_: t["available_instances"] for d in theirs[IGD] for id_, t in d.items()}
        assert offered == left(IGD)
        uuid = str(uuid4())
        mdevctl("start", "--uuid", uuid, "--parent", IGD, "--type", "mvgpu-256M")
        assert f"{uuid} {IGD} mvgpu-256M" in mdevctl("list")
        (mine,) = json.loads(mdo("host", "--json"))["mdevs"]
        assert (mine["uuid"], mine["parent"], mine["owner"]) == (uuid, IGD, "foreign")

        definition = tmp_path / "definition.json"
        definition.write_text(mdo("export", uuid))
        mdevctl("define", "--uuid", uuid, "--parent", IGD, "--jsonfile", definition)
        assert [it.parent for it in interop.defined(machine())[UUID(uuid)]] == [IGD]
        assert f'parent = "{IGD}"' in mdo("import", uuid)
        mdevctl("stop", "--uuid", uuid)
        mdevctl("start", "--uuid", uuid)
        assert f"{uuid} {IGD} mvgpu-256M" in mdevctl("list")
        mdevctl("undefine", "--uuid", uuid)
        mdevctl("stop", "--uuid", uuid)
        assert not exists(uuid)


def test_libvirt_lists_cards_and_makes_devices_on_them(mdo: Mdo, tmp_path: Path) -> None:
    """libvirt knows mdev parents by their bus: those that are on none it does not list."""
    uuid, file = uuid4(), tmp_path / "device.xml"
    file.write_text(NODEDEV.format(parent=libvirt.name_of(IGD), type="mvgpu-128M", uuid=uuid))
    node = f"mdev_{uuid}_{IGD}".replace("-", "_").replace(":", "_").replace(".", "_")
    with claimed(GRID, IGD), libvirt.running(tmp_path):
        cards = virsh("nodedev-list", "--cap", "mdev_types").split()
        assert cards == [libvirt.name_of(GRID), libvirt.name_of(IGD)]
        described = virsh("nodedev-dumpxml", libvirt.name_of(IGD))
        for type_, count in left(IGD).items():
            assert f"<type id='{type_}'>" in described
            assert f"<availableInstances>{count}</availableInstances>" in described

        virsh("nodedev-create", file)
        assert virsh("nodedev-list", "--cap", "mdev").split() == [node]
        (made,) = json.loads(mdo("host", "--json"))["mdevs"]
        assert (made["uuid"], made["parent"], made["type"]) == (str(uuid), IGD, "mvgpu-128M")
        virsh("nodedev-destroy", node)
        assert not exists(str(uuid))

        virsh("nodedev-define", file)
        assert virsh("nodedev-list", "--cap", "mdev", "--inactive").split() == [node]
        virsh("nodedev-start", node)
        assert exists(str(uuid))
        assert f'parent = "{IGD}"' in mdo("import", uuid)
        virsh("nodedev-destroy", node)
        virsh("nodedev-undefine", node)

        (ours,) = mdo("create", "mvgpu-12", "--parent", GRID).split()
        assert ours.replace("-", "_") in virsh("nodedev-list", "--cap", "mdev")
        mdo("remove", ours)
    assert list(vfio.MDEVS.iterdir()) == []


NODEDEV = """<device><parent>{parent}</parent>
<capability type='mdev'><type id='{type}'/><uuid>{uuid}</uuid></capability></device>
"""
