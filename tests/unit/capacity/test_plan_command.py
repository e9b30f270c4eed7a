# SPDX-License-Identifier: GPL-2.0-or-later
"""``mdo plan`` as a user meets it: a spec file, a machine of files, a table or JSON."""

from __future__ import annotations

import json
import os
from pathlib import Path
from uuid import UUID

import pytest

from mdev_orchestrator.cli.main import main
from unit.capacity import drivers
from unit.fakesys import FakeSystem

U1 = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"
U2 = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1002"
GROUP = "aaaaaaaa-1111-4222-8333-444444444444"
SPEC = """\
[[guest]]
name = "render-1"

[[guest.mdev]]
framebuffer = ">=200M"
count = 2
group = "peers"

[[pool]]
name = "spare"
type = "mvgpu-512M"
"""


@pytest.fixture
def machine(system: FakeSystem, monkeypatch: pytest.MonkeyPatch) -> FakeSystem:
    """Two igd parents, 128M of the first in use."""
    driver = drivers.igd()
    for name in ("igd0", "igd1"):
        system.parent(name)
        driver.devices = [(UUID(U1), "mvgpu-128M")] if name == "igd0" else []
        for type_ in driver.parent().types:
            path = system.type(
                name,
                type_.id,
                type_.available_instances,
                name=f"{type_.name}\n",
                description=f"{type_.description}\n",
            )
            (path / "attributes").mkdir()
            for file, text in type_.attributes.items():
                (path / "attributes" / file).write_text(text + "\n")
    system.mdev("igd0", "mvgpu-128M", U1)
    monkeypatch.setenv("MDO_ROOT", str(system.root))
    return system


def mdo_plan(machine: FakeSystem, text: str, *options: str) -> int:
    path = machine.root / "spec.toml"
    path.write_text(text)
    return main(["plan", str(path), *options])


def test_a_plan_that_fits(machine: FakeSystem, capsys: pytest.CaptureFixture[str]) -> None:
    assert mdo_plan(machine, SPEC) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert said.out == (
        "FOR         GROUP  TYPE        PARENT  DEVICES\n"
        "render-1    peers  mvgpu-256M  igd0    2\n"
        "pool spare         mvgpu-512M  igd1    1\n"
        "\n"
        "PARENT  TYPE        USED    FREE    MODEL\n"
        "igd0    mvgpu-128M  1       7 -> 3  shared pool (known)\n"
        "igd0    mvgpu-256M  0 -> 2  3 -> 1  shared pool (known)\n"
        "igd0    mvgpu-512M  0       1 -> 0  shared pool (known)\n"
        "igd1    mvgpu-128M  0       8 -> 4  shared pool (known)\n"
        "igd1    mvgpu-256M  0       4 -> 2  shared pool (known)\n"
        "igd1    mvgpu-512M  0 -> 1  2 -> 1  shared pool (known)\n"
    )


def test_its_json(machine: FakeSystem, capsys: pytest.CaptureFixture[str]) -> None:
    assert mdo_plan(machine, SPEC, "--json", "--policy", "spread") == 0
    answer = json.loads(capsys.readouterr().out)
    assert set(answer) == {
        *("fits", "proven", "policy", "existing", "placements", "shortfalls", "parents"),
    }
    assert (answer["fits"], answer["proven"], answer["policy"]) == (True, True, "spread")
    assert answer["placements"][0] == {
        "request": "guest[0].mdev[0]",
        "guest": "render-1",
        "pool": None,
        "group": "peers",
        "parent": "igd1",
        "type": "mvgpu-256M",
    }
    igd0 = answer["parents"][0]
    assert (igd0["name"], igd0["model"], igd0["confidence"]) == ("igd0", "shared pool", "known")
    assert igd0["types"][2] == {
        "id": "mvgpu-512M",
        "used_before": 0,
        "used_after": 1,
        "available_before": 1,
        "available_after": 0,
    }


def test_a_plan_that_does_not_fit(machine: FakeSystem, capsys: pytest.CaptureFixture[str]) -> None:
    assert mdo_plan(machine, SPEC + "count = 4\n") == 2
    said = capsys.readouterr()
    assert said.err == (
        f"mdo: {machine.root}/spec.toml:9: pool[0]: 4 asked for, 2 fit: "
        "only 3 can be created on igd0, igd1 \u2014 ask for 3\n"
    )
    assert "DOES NOT" not in said.out
    assert "only 3 can be created" in said.out
    assert mdo_plan(machine, SPEC + "count = 4\n", "--json") == 2
    (shortfall,) = json.loads(capsys.readouterr().out)["shortfalls"]
    assert (shortfall["asked"], shortfall["placed"], shortfall["pool"]) == (4, 2, "spare")


def contents(root: Path) -> dict[Path, bytes | None]:
    """Every file and what is in it; ``create`` and its like are for root to write, not to read."""
    files = (path for path in root.rglob("*") if path.is_file())
    return {path: path.read_bytes() if os.access(path, os.R_OK) else None for path in files}


def test_nothing_is_changed(machine: FakeSystem) -> None:
    before = contents(machine.root)
    mdo_plan(machine, SPEC)
    (machine.root / "spec.toml").unlink()
    assert before == contents(machine.root)


def test_a_guess_is_said(machine: FakeSystem, capsys: pytest.CaptureFixture[str]) -> None:
    machine.parent("card0")
    machine.type("card0", "acme-a", 3)
    machine.type("card0", "acme-b", 5)
    assert mdo_plan(machine, '[[pool]]\nname = "p"\ntype = "acme-a"\n') == 0
    assert capsys.readouterr().err.startswith("mdo: what remains on card0 is a guess: ")


def test_a_spec_that_is_wrong(machine: FakeSystem, capsys: pytest.CaptureFixture[str]) -> None:
    assert mdo_plan(machine, "") == 2
    assert capsys.readouterr().err.startswith(f"mdo: {machine.root}/spec.toml is empty")


def test_a_host_without_parents(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    system = FakeSystem(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MDO_ROOT", str(tmp_path))
        assert mdo_plan(system, SPEC) == 2
    assert "there is no parent" in capsys.readouterr().err


# ---- devices that are there already ----


def one(text: str) -> str:
    return '[[guest]]\nname = "a"\nmdev = [\n' + text + "\n]\n"


def ours(machine: FakeSystem, *uuids: str) -> None:
    """Make existing devices ours."""
    machine.load_mdev()
    assert main(["adopt", *uuids]) == 0


def test_a_device_that_exists_is_taken(
    machine: FakeSystem, capsys: pytest.CaptureFixture[str]
) -> None:
    ours(machine, U1)
    capsys.readouterr()
    text = one(f'{{uuid = "{U1}"}}, {{type = "mvgpu-128M"}}')
    assert mdo_plan(machine, text, "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert [device["uuid"] for device in answer["existing"]] == [U1]
    assert [placement["parent"] for placement in answer["placements"]] == ["igd0"]
    assert mdo_plan(machine, text) == 0
    assert f"exists: {U1}" in capsys.readouterr().out


def test_a_group_goes_to_the_device_of_it_that_exists(
    machine: FakeSystem, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.groups_of("igd0", 8)
    (machine.mdev("igd0", "mvgpu-256M", U2) / "group_uuid").write_text(GROUP)
    ours(machine, U2)
    capsys.readouterr()
    text = one(f'{{uuid = "{U2}", group = "g"}}, {{type = "mvgpu-128M", group = "g"}}')
    assert mdo_plan(machine, text, "--json", "--policy", "spread") == 0
    answer = json.loads(capsys.readouterr().out)
    assert [placement["parent"] for placement in answer["placements"]] == ["igd0"]


@pytest.mark.parametrize(
    ("device", "message"),
    [
        (f'{{uuid="{U2}"}}', f"there is no device {U2}, and nothing says of what type"),
        (f'{{uuid="{U1}", type="mvgpu-512M"}}', "exists as mvgpu-128M, not as mvgpu-512M"),
        (f'{{uuid="{U1}", parent="igd1"}}', "exists on igd0, not on igd1"),
        (f'{{uuid="{U1}", framebuffer=">1G"}}', "which has not framebuffer >1G"),
        (f'{{uuid="{U1}", group="g"}}, {{uuid="{U2}", group="g"}}', "group g is across parents"),
        (f'{{uuid="{U1}", group="g"}}', "is not in the start group of group g"),
        (f'{{uuid="{U1}"}}', "exists and is not ours"),
    ],
)
def test_a_device_that_is_not_as_the_spec_says(
    machine: FakeSystem, device: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if message.startswith("group g"):
        for parent, uuid in (("igd0", U1), ("igd1", U2)):
            if parent == "igd1":
                machine.mdev(parent, "mvgpu-128M", uuid)
            machine.groups_of(parent, 8)
            put_group(machine, uuid)
        ours(machine, U1, U2)
    elif "not ours" not in message:
        ours(machine, U1)
    capsys.readouterr()
    assert mdo_plan(machine, one(device)) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"mdo: {machine.root}/spec.toml:4: guest[0].mdev[")
    assert message in said


def put_group(machine: FakeSystem, uuid: str) -> None:
    (machine.bus / uuid / "group_uuid").write_text(GROUP)
