# SPDX-License-Identifier: GPL-2.0-or-later
"""``mdo import`` and ``mdo export`` as a user meets them, on a machine of files."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from uuid import UUID

import pytest

from mdev_orchestrator.cli.main import main
from mdev_orchestrator.engine.journal import Journal
from mdev_orchestrator.engine.records import Change, DeviceRecord
from mdev_orchestrator.interop import mdevctl
from mdev_orchestrator.interop.mdevctl import Definition
from mdev_orchestrator.machine import Machine as Handle
from mdev_orchestrator.spec import load
from unit.fakesys import FakeSystem

U1 = UUID("83b8f4f2-509f-382f-3c1e-e6bfe0fa1001")
U2 = UUID("83b8f4f2-509f-382f-3c1e-e6bfe0fa1002")
U3 = UUID("83b8f4f2-509f-382f-3c1e-e6bfe0fa1003")
GROUP = "aaaaaaaa-1111-4222-8333-444444444444"
FIRST = Definition(
    uuid=U1,
    parent="igd0",
    type="mvgpu-128M",
    start="auto",
    attributes=(("vgpu_params", "a=1"), ("vgpu_params", "a=2"), ("group_uuid", GROUP)),
    extra='{"note":"for Anna"}',
)
SECOND = Definition(uuid=U2, parent="grid0", type="mvgpu-12")


class Machine:
    """The machine of files, and the two commands on it."""

    def __init__(self, system: FakeSystem, capsys: pytest.CaptureFixture[str]) -> None:
        self.system = system
        self.handle = Handle(system.root, state=system.root / "state")
        self.where = mdevctl.directory(self.handle)
        self.capsys = capsys
        self.err = ""

    def mdo(self, *arguments: str, code: int = 0) -> str:
        assert main(arguments) == code
        shown = self.capsys.readouterr()
        self.err = shown.err
        return shown.out


@pytest.fixture
def machine(
    system: FakeSystem, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Machine:
    monkeypatch.setenv("MDO_ROOT", str(system.root))
    monkeypatch.setenv("MDO_STATE_DIR", str(system.root / "state"))
    system.parent("igd0")
    system.type("igd0", "mvgpu-128M")
    system.parent("grid0")
    system.type("grid0", "mvgpu-12")
    return Machine(system, capsys)


def test_a_definition_as_a_spec(machine: Machine) -> None:
    mdevctl.write(machine.handle, [FIRST, SECOND])
    assert machine.mdo("import", str(U1)) == (
        f"""\
[[pool]]
name = "{U1}"
uuid = "{U1}"
type = "mvgpu-128M"
parent = "igd0"
attributes = [
    [
        "vgpu_params",
        "a=1",
    ],
    [
        "vgpu_params",
        "a=2",
    ],
    [
        "group_uuid",
        "{GROUP}",
    ],
]
mdevctl = "{{\\"note\\":\\"for Anna\\"}}"
"""
    )
    assert machine.mdo("import", "--parent", "grid0") == (
        f"""\
[[pool]]
name = "{U2}"
uuid = "{U2}"
type = "mvgpu-12"
parent = "grid0"
start = "manual"
"""
    )


@pytest.mark.parametrize("name", ["all.toml", "all.json"])
def test_there_and_back(machine: Machine, tmp_path: Path, name: str) -> None:
    mdevctl.write(machine.handle, [FIRST, SECOND])
    file = tmp_path / name
    assert machine.mdo("import", "-o", str(file)) == ""
    assert file.read_text().startswith("{" if name.endswith("json") else "[[pool]]")
    assert len(load(file).spec.pools) == 2
    other = tmp_path / "other"
    written = machine.mdo("export", str(file), "--to", str(other)).split()
    assert written == [f"{other}/grid0/{U2}", f"{other}/igd0/{U1}"]
    for path in machine.where.glob("*/*"):
        assert (other / path.parent.name / path.name).read_bytes() == path.read_bytes()
    assert machine.mdo("export", str(file), "--to", str(other)) == ""
    assert machine.mdo("import", "--from", str(other)) == machine.mdo("import")
    machine.mdo("import", "-o", str(file), code=2)
    assert machine.err == f"mdo: {file} exists already \u2014 --force replaces it\n"
    machine.mdo("import", "-o", str(file), "--force", str(U1))
    assert len(load(file).spec.pools) == 1


def test_import_as_json(machine: Machine) -> None:
    mdevctl.write(machine.handle, [SECOND])
    (pool,) = json.loads(machine.mdo("import", "--json"))["pool"]
    assert pool["uuid"] == str(U2)


def test_bad_definitions_are_named_and_the_others_imported(machine: Machine) -> None:
    mdevctl.write(machine.handle, [FIRST, SECOND])
    bad = machine.where / "igd0" / str(U3)
    bad.write_text("{")
    mdevctl.write(machine.handle, [Definition(uuid=U2, parent="igd0", type="t")])
    text = machine.mdo("import", code=1)
    assert text.count("[[pool]]") == 1
    first, second, last = machine.err.splitlines()
    assert first.startswith(f"mdo: {bad} is not JSON")
    assert second == (
        f"mdo: mdevctl defines {U2} on grid0 and on igd0, and a device exists once \u2014 "
        "choose with --parent grid0"
    )
    assert last.startswith("mdo: 3 of 4 definitions were left out")
    assert "[[pool]]" in machine.mdo("import", str(U2), "--parent", "grid0")
    assert machine.err == ""
    assert machine.mdo("import", str(U3), code=2) == ""
    assert machine.err.startswith(f"mdo: {bad} is not JSON")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "mdevctl has no definitions \u2014 mdevctl define makes them"),
        ([str(U1)], f"mdevctl has not defined {U1} \u2014 mdevctl list --defined"),
        (["x"], "'x' is not a UUID"),
        (["--parent", "p"], "mdevctl has no definitions on p"),
        (["--from", "/none"], "/none is not a directory"),
    ],
)
def test_nothing_to_import(machine: Machine, arguments: list[str], words: str) -> None:
    assert machine.mdo("import", *arguments, code=2) == ""
    assert machine.err.startswith(f"mdo: {words}")


def manage(machine: Machine, *devices: DeviceRecord) -> None:
    """Write records of devices."""

    async def put() -> None:
        with Journal.open(machine.handle.journal_path) as journal:
            await journal.put(Change(devices={device.uuid: device for device in devices}))

    asyncio.run(put())


def test_managed_devices_are_exported_as_they_were_made(machine: Machine) -> None:
    machine.system.groups_of("igd0", 3)
    path = machine.system.mdev("igd0", "mvgpu-128M", str(U1))
    (path / "vgpu_params").write_text("a=2\n")
    machine.system.mdev("grid0", "mvgpu-12", str(U2))
    machine.mdo("export", code=2)
    assert machine.err.startswith("mdo: no mdev here is ours \u2014 name those")
    known = DeviceRecord(
        uuid=U1,
        parent="igd0",
        type="mvgpu-128M",
        params="a=2",
        attributes=(("written_only", "5"), ("written_only", "6")),
    )
    manage(machine, known, DeviceRecord(uuid=U2, parent="igd0", type="gone"))
    (dump,) = json.loads(machine.mdo("export"))
    assert list(dump) == ["igd0"]
    assert dump["igd0"][0][str(U1)]["attrs"] == [
        {"vgpu_params": "a=2"},
        {"written_only": "5"},
        {"written_only": "6"},
    ]
    (path / "vgpu_params").write_text("a=3\n")  # by another program, so it is not as we made it
    (dump,) = json.loads(machine.mdo("export"))
    assert dump["igd0"][0][str(U1)]["attrs"] == [{"vgpu_params": "a=3"}]


def test_devices_that_exist(machine: Machine) -> None:
    machine.system.groups_of("igd0", 3)
    path = machine.system.mdev("igd0", "mvgpu-128M", str(U1))
    (path / "vgpu_params").write_text("a=2\n")
    (path / "group_uuid").write_text(f"{GROUP}\n")
    machine.system.mdev("grid0", "mvgpu-12", str(U2))

    seen = json.loads(machine.mdo("export", str(U1)))
    attrs = [{"vgpu_params": "a=2"}, {"group_uuid": GROUP}]
    assert seen == {"mdev_type": "mvgpu-128M", "start": "manual", "attrs": attrs}
    (dump,) = json.loads(machine.mdo("export", str(U1), str(U2)))
    assert {parent: list(entries[0]) for parent, entries in dump.items()} == {
        "grid0": [str(U2)],
        "igd0": [str(U1)],
    }
    mdevctl.write(machine.handle, [FIRST])  # which says how it came to be as it is
    assert json.loads(machine.mdo("export", str(U1))) == mdevctl.to_plain(FIRST) | {
        "note": "for Anna"
    }

    where = str(machine.where)
    shape = json.loads(machine.mdo("export", str(U2), str(U1), "--to", where, "--json"))
    assert shape == {
        "definitions": [
            {
                "uuid": str(U2),
                "parent": "grid0",
                "definition": {"mdev_type": "mvgpu-12", "start": "manual", "attrs": []},
                "file": f"{where}/grid0/{U2}",
                "written": True,
            },
            {
                "uuid": str(U1),
                "parent": "igd0",
                "definition": json.loads(mdevctl.to_json(FIRST)),
                "file": f"{where}/igd0/{U1}",
                "written": False,
            },
        ]
    }
    (path / "vgpu_params").write_text("a=3\n")
    machine.mdo("export", str(U1), "--to", where, code=2)
    assert f"{where}/igd0/{U1} defines the device {U1} otherwise \u2014 --force" in machine.err
    assert mdevctl.read(machine.handle).found == (SECOND, FIRST)
    machine.mdo("export", "--to", where, "--force", str(U1))
    assert mdevctl.read(machine.handle).found[1].attributes[0] == ("vgpu_params", "a=3")


def test_what_cannot_be_exported(machine: Machine, tmp_path: Path) -> None:
    machine.mdo("export", str(U1), code=2)
    assert machine.err == f"mdo: there is no mdev {U1} \u2014 mdo host lists them\n"
    spec = tmp_path / "s.toml"
    spec.write_text('[[pool]]\nname = "a"\ntype = "t"\n')
    machine.mdo("export", str(spec), code=2)
    assert machine.err.startswith(f"mdo: {spec}:1: pool[0]: mdevctl defines devices by UUID")
    machine.mdo("export", str(U1), str(spec), code=2)
    assert "is not a UUID" in machine.err


def test_a_plan_knows_what_mdevctl_has_defined(machine: Machine, tmp_path: Path) -> None:
    spec = tmp_path / "s.toml"
    spec.write_text(f'[[guest]]\nname = "a"\nmdev = [{{uuid = "{U1}"}}]\n')
    machine.mdo("plan", str(spec), code=2)
    mdevctl.write(machine.handle, [FIRST])
    (placement,) = json.loads(machine.mdo("plan", str(spec), "--json"))["placements"]
    assert (placement["parent"], placement["type"]) == ("igd0", "mvgpu-128M")
