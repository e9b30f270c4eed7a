# SPDX-License-Identifier: GPL-2.0-or-later
"""mdevctl and mdo on one machine: they see the same devices, and take over each other's.

Runs inside the lab, with Debian's mdevctl: ``mdo lab exec python3 -m pytest tests/lab``.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest

from lab.commands import Mdo, mdevctl
from lab.machine import machine
from mdev_orchestrator.engine.devices import create_devices, remove_devices
from mdev_orchestrator.host import sysfs
from mdev_orchestrator.interop import mdevctl as interop
from mdev_orchestrator.interop.mdevctl import Definition
from mdev_orchestrator.machine import Machine
from mdev_orchestrator.model import Mdev

pytestmark = pytest.mark.skipif("MDO_LAB" not in os.environ, reason="needs the lab's kernel")

HERE = Machine()
WHERE = interop.directory(HERE)
GROUP = UUID("aaaaaaaa-1111-4222-8333-444444444444")


@pytest.fixture(autouse=True)
async def nothing_stays() -> AsyncIterator[None]:
    """No device and no definition before a test, and none after it."""
    assert sysfs.read_host(machine()).mdevs == ()
    assert interop.read(HERE) == interop.Definitions()
    yield
    if left := [mdev.uuid for mdev in sysfs.read_host(machine()).mdevs]:
        await remove_devices(machine(), left)
    for parent in WHERE.iterdir():
        if parent.name != "scripts.d":
            shutil.rmtree(parent)


def shown_by_mdevctl(*options: str) -> set[tuple[str, str, str]]:
    """UUID, parent and type of each device that ``mdevctl list`` lists."""
    return {
        (uuid, parent, described["mdev_type"])
        for parents in json.loads(mdevctl("list", "--dumpjson", *options))
        for parent, devices in parents.items()
        for device in devices
        for uuid, described in device.items()
    }


def shown_by_mdo(mdo: Mdo) -> set[tuple[str, str, str]]:
    mdevs = json.loads(mdo("host", "--json"))["mdevs"]
    return {(mdev["uuid"], mdev["parent"], mdev["type"]) for mdev in mdevs}


def listed(*options: object) -> str:
    """What mdevctl has defined, as JSON; some versions end it with a newline."""
    return mdevctl("list", "--defined", "--dumpjson", *options).rstrip()


def define(uuid: UUID, *attributes: tuple[str, str], auto: bool = False) -> Path:
    """Let mdevctl define a 128M device on igd0."""
    more = ["--auto"] if auto else []
    mdevctl("define", "--uuid", uuid, "--parent", "igd0", "--type", "mvgpu-128M", *more)
    for name, value in attributes:
        mdevctl("modify", "--uuid", uuid, f"--addattr={name}", f"--value={value}")
    return WHERE / "igd0" / str(uuid)


def the(uuid: UUID) -> Mdev:
    mdev = sysfs.read_mdev(machine(), uuid)
    assert mdev is not None
    return mdev


# ---- the same devices ----


async def test_both_show_the_same_devices(mdo: Mdo) -> None:
    theirs = [uuid4(), uuid4()]
    mdevctl("start", "--uuid", theirs[0], "--parent", "igd0", "--type", "mvgpu-256M")
    mdevctl("start", "--uuid", theirs[1], "--parent", "grid0", "--type", "mvgpu-12")
    ours = [
        *await create_devices(machine(), "mvgpu-12", 2),
        *await create_devices(machine(), "mvgpu-128M", group=str(GROUP)),
    ]
    shown = shown_by_mdo(mdo)
    assert {uuid for uuid, _, _ in shown} == {str(u) for u in theirs} | {str(m.uuid) for m in ours}
    assert shown_by_mdevctl() == shown

    mdevctl("stop", "--uuid", theirs[0])
    await remove_devices(machine(), [mdev.uuid for mdev in ours])
    assert shown_by_mdevctl() == shown_by_mdo(mdo) == {(str(theirs[1]), "grid0", "mvgpu-12")}


async def test_both_show_the_same_types(mdo: Mdo) -> None:
    await create_devices(machine(), "mvgpu-512M")
    theirs = {
        (parent, id_): (described["available_instances"], described["device_api"])
        for parents in json.loads(mdevctl("types", "--dumpjson"))
        for parent, types in parents.items()
        for type_ in types
        for id_, described in type_.items()
    }
    ours = {
        (parent["name"], type_["id"]): (type_["available_instances"], type_["device_api"])
        for parent in json.loads(mdo("host", "--json"))["parents"]
        for type_ in parent["types"]
    }
    assert theirs == ours
    assert theirs["igd0", "mvgpu-512M"] == (1, "vfio-pci")


# ---- from mdevctl to us ----


def test_what_mdevctl_defined_and_ran_runs_the_same_by_us(mdo: Mdo, tmp_path: Path) -> None:
    first, second = uuid4(), uuid4()
    attributes = (
        ("vgpu_params", "frame_rate_limiter=1"),
        ("vgpu_params", 'frame_rate_limiter=0,"x"'),  # written last, so this is what stays
        ("group_uuid", str(GROUP)),
    )
    define(first, *attributes, auto=True)
    define(second)
    mdevctl("start", "--uuid", first)
    by_them = the(first)
    assert (by_them.params, by_them.group_uuid) == (attributes[1][1], GROUP)

    spec = tmp_path / "spec.toml"
    mdo("import", "-o", spec)
    mdevctl("stop", "--uuid", first)
    for uuid in (first, second):
        mdevctl("undefine", "--uuid", uuid)
    mdo("apply", spec)
    by_us = the(first)
    assert (by_us.params, by_us.group_uuid) == (by_them.params, GROUP)
    assert (by_us.parent, by_us.type_id) == (by_them.parent, by_them.type_id)
    assert shown_by_mdevctl() == shown_by_mdo(mdo)
    assert len(shown_by_mdevctl()) == 2
    assert mdo("diff", spec, "--exit-code") == ""
    # and back: the same definitions, by way of what runs
    mdo("export", "--to", WHERE)
    assert interop.defined(HERE)[first][0].attributes == attributes
    mdo("destroy", spec)
    assert shown_by_mdevctl() == set()


def test_files_are_the_same_to_the_byte(mdo: Mdo, tmp_path: Path) -> None:
    uuids = [uuid4() for _ in range(3)]
    values = ["", "a\tb\n", 'é\u2028 "q" \\ \x01\x7f/']
    define(uuids[0], *(("vgpu_params", value) for value in values))
    define(uuids[1], auto=True)
    mdevctl("define", "--uuid", uuids[2], "--parent", "0000:86:00.0", "--type", "nvidia-12")
    before = {file: file.read_bytes() for file in WHERE.glob("*/*-*")}
    assert len(before) == 3
    spec = tmp_path / "spec.toml"
    mdo("import", "-o", spec)
    assert mdo("export", spec).rstrip() == listed()
    for file in before:
        file.unlink()
    mdo("export", spec, "--to", WHERE)
    assert {file: file.read_bytes() for file in before} == before
    assert {(file.stat().st_mode, file.stat().st_uid) for file in before} == {(0o100644, 0)}


def test_keys_of_others_are_ignored_by_mdevctl_and_kept_by_us(mdo: Mdo, tmp_path: Path) -> None:
    file = define(uuid := uuid4(), ("vgpu_params", "a=1"))
    described = json.loads(file.read_text()) | {"note": {"for": ["Anna", None, 1.10]}}
    file.write_text(json.dumps(described))
    mdevctl("start", "--uuid", uuid)
    assert the(uuid).params == "a=1"
    mdo("import", "-o", tmp_path / "spec.toml")
    file.unlink()
    mdo("export", tmp_path / "spec.toml", "--to", WHERE)
    assert json.loads(file.read_text()) == described
    assert (str(uuid), "igd0", "mvgpu-128M") in shown_by_mdevctl("--defined")


def test_a_uuid_on_two_parents(mdo: Mdo) -> None:
    define(uuid := uuid4())
    mdevctl("define", "--uuid", uuid, "--parent", "grid0", "--type", "mvgpu-12")
    assert len(shown_by_mdevctl("--defined")) == 2
    assert mdo("import", code=1) == ""
    assert 'type = "mvgpu-12"' in mdo("import", uuid, "--parent", "grid0")
    assert [it.parent for it in interop.defined(HERE)[uuid]] == ["grid0", "igd0"]


def test_a_link_is_passed_over_by_both() -> None:
    file = define(uuid := uuid4())
    file.rename(target := file.with_name("target"))
    file.symlink_to(target)
    assert shown_by_mdevctl("--defined") == set()
    read = interop.read(HERE)
    assert read.found == ()
    assert f"{uuid} is a link, which mdevctl passes over" in " ".join(map(str, read.damage))


def test_one_bad_file_hides_all_from_mdevctl_and_none_from_us() -> None:
    good = define(uuid4())
    good.with_name(str(uuid4())).write_text("{")
    mdevctl("list", "--defined", code=1)
    assert [it.uuid for it in interop.read(HERE).found] == [UUID(good.name)]
    good.with_name(str(uuid4())).write_text('{"mdev_type":"t","start":"auto","attrs":[{"a":1}]}')
    assert len(interop.read(HERE).damage) == 2


# ---- from us to mdevctl ----


@pytest.mark.parametrize("way", ["define", "write"])
async def test_what_we_ran_runs_the_same_by_mdevctl(mdo: Mdo, tmp_path: Path, way: str) -> None:
    made = await create_devices(
        machine(),
        "mvgpu-128M",
        2,
        group=str(GROUP),
        attributes=[("vgpu_params", "a=1"), ("vgpu_params", 'a=2,b="3"')],
    )
    uuids = [str(mdev.uuid) for mdev in made]
    if way == "write":
        assert len(mdo("export", *uuids, "--to", WHERE).split()) == 2
    else:
        for uuid in uuids:
            file = tmp_path / uuid
            file.write_text(mdo("export", uuid))
            mdevctl("define", "--uuid", uuid, "--parent", "igd0", "--jsonfile", file)
            # and what mdevctl made of it is what we would have written ourselves
            assert (WHERE / "igd0" / uuid).read_text() + "\n" == file.read_text()
            assert listed("--uuid", uuid) == file.read_text().rstrip()
    await remove_devices(machine(), [mdev.uuid for mdev in made])
    assert shown_by_mdevctl() == set()
    for uuid in uuids:
        mdevctl("start", "--uuid", uuid)
    for mdev in made:
        again = the(mdev.uuid)
        assert (again.parent, again.type_id) == (mdev.parent, mdev.type_id)
        assert (again.params, again.group_uuid) == ('a=2,b="3"', GROUP)
        assert again.damage == ()
    assert shown_by_mdevctl() == shown_by_mdo(mdo)
    # mdevctl runs them as defined: there is nothing to say that is not said
    assert mdo("export", *uuids, "--to", WHERE) == ""


async def test_a_spec_is_started_by_mdevctl_in_the_order_of_its_attributes(
    mdo: Mdo, tmp_path: Path
) -> None:
    spec = tmp_path / "spec.toml"
    spec.write_text(f"""
[[guest]]
name = "g"
[[guest.mdev]]
uuid = "{(first := uuid4())}"
type = "mvgpu-12"
parent = "grid0"
params = "a=0"
attributes = [["vgpu_params", "a=2"], ["vgpu_params", "a=1"]]
group = "{GROUP}"
""")
    mdo("export", spec, "--to", WHERE)
    mdevctl("start", "--uuid", first)
    assert (the(first).params, the(first).group_uuid) == ("a=1", GROUP)


async def test_another_definition_of_the_same_device_is_not_replaced(mdo: Mdo) -> None:
    file = define(uuid := uuid4(), ("vgpu_params", "a=1"))
    theirs = file.read_bytes()
    await create_devices(machine(), "mvgpu-128M", uuids=[uuid], attributes=[("vgpu_params", "a=2")])
    mdo("export", uuid, "--to", WHERE, code=2)
    assert file.read_bytes() == theirs
    mdo("export", uuid, "--to", WHERE, "--force")
    (it,) = interop.read(HERE).found
    assert it == Definition(
        uuid=uuid, parent="igd0", type="mvgpu-128M", attributes=(("vgpu_params", "a=2"),)
    )


# ---- devices of mdevctl in a spec ----


def test_a_uuid_is_enough(mdo: Mdo, tmp_path: Path) -> None:
    define(uuid := uuid4(), ("vgpu_params", "a=1"), ("group_uuid", str(GROUP)))
    spec = tmp_path / "spec.toml"
    spec.write_text(f'[[pool]]\nname = "mine"\nuuid = "{uuid}"\n')
    plan: dict[str, Any] = json.loads(mdo("plan", spec, "--json"))
    (placement,) = plan["placements"]
    assert (placement["parent"], placement["type"]) == ("igd0", "mvgpu-128M")
    mdo("apply", spec)
    made = the(uuid)
    assert (made.params, made.group_uuid) == ("a=1", GROUP)
    (device,) = json.loads(mdo("plan", spec, "--json"))["existing"]
    assert device["uuid"] == str(uuid)
    assert mdo("diff", spec, "--exit-code") == ""
    mdo("destroy", spec)
    assert shown_by_mdo(mdo) == set()


def test_what_mdevctl_runs_is_not_taken_for_ours(mdo: Mdo, tmp_path: Path) -> None:
    define(uuid := uuid4())
    mdevctl("start", "--uuid", uuid)
    mdo("import", "-o", tmp_path / "spec.toml")
    mdo("apply", tmp_path / "spec.toml", code=2)
    assert shown_by_mdevctl() == {(str(uuid), "igd0", "mvgpu-128M")}


def test_an_attribute_that_the_driver_has_not_leaves_nothing(mdo: Mdo, tmp_path: Path) -> None:
    define(uuid := uuid4(), ("vgpu_params", "a=1"), ("no_such_file", "1"))
    mdo("import", "-o", tmp_path / "spec.toml")
    mdo("apply", tmp_path / "spec.toml", code=5)
    assert sysfs.read_host(machine()).mdevs == ()
    mdevctl("start", "--uuid", uuid, code=1)
    assert sysfs.read_host(machine()).mdevs == ()
