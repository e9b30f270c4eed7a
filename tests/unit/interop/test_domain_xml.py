# SPDX-License-Identifier: GPL-2.0-or-later
"""``mdo import DOMAIN.xml``: what a spec can say of a domain, and each line that it leaves out."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from uuid import UUID

import pytest

from mdev_orchestrator.cli.main import main
from mdev_orchestrator.errors import RequestError
from mdev_orchestrator.interop import domain_xml, mdevctl
from mdev_orchestrator.spec import GuestConfig, Size, load
from unit.cli.test_json_shapes import compare
from unit.interop.test_commands import Machine, machine  # noqa: F401 - a fixture

U1 = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"
U2 = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1002"
ID = "c0ffee00-0000-4000-8000-000000000001"

DOMAIN = f"""\
<domain type='kvm' id='3' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>render-1</name>
  <uuid>{ID}</uuid>
  <memory unit='GiB'>2</memory>
  <currentMemory unit='KiB'>2097152</currentMemory>
  <vcpu placement='static' cpuset='1-3'>2</vcpu>
  <os>
    <type arch='x86_64' machine='pc-q35-7.2'>hvm</type>
    <boot dev='hd'/>
  </os>
  <!-- nothing to see here -->
  <cpu mode='host-passthrough'><topology sockets='1' cores='2' threads='1'/></cpu>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2' cache='none'/>
      <source file='DISK'/>
      <target dev='vda' bus='virtio'/>
      <address type='pci' domain='0x0000' bus='0x04' slot='0x00' function='0x0'/>
    </disk>
    <disk type='file' device='cdrom'>
      <target dev='sda' bus='sata'/>
      <readonly/>
    </disk>
    <interface type='network'>
      <source network='default'/>
    </interface>
    <hostdev mode='subsystem' type='mdev' managed='no' model='vfio-pci' display='off'>
      <source>
        <address uuid='{U1}'/>
      </source>
      <alias name='hostdev0'/>
    </hostdev>
    <hostdev mode='subsystem' type='mdev' model='vfio-pci' display='on'>
      <source><address uuid='{U2}'/></source>
    </hostdev>
    <hostdev mode='subsystem' type='pci' managed='yes'>
      <source><address domain='0' bus='6' slot='0' function='0'/></source>
    </hostdev>
  </devices>
  <qemu:commandline>
    <qemu:arg value='-msg'/>
  </qemu:commandline>
</domain>
"""

HOSTDEV = f"<hostdev mode='subsystem' type='mdev'><source><address uuid='{U1}'/></source></hostdev>"


def domain(*parts: str, kind: str = "kvm", memory: str = "<memory>1048576</memory>") -> str:
    return f"<domain type='{kind}'>\n<name>a</name>\n{memory}\n" + "\n".join(parts) + "\n</domain>"


def read(text: str | bytes, tmp_path: Path) -> tuple[GuestConfig, list[str]]:
    """The guest of a domain, and the lines about what is left out, without the file's name."""
    file = tmp_path / "a.xml"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    spec, left_out = domain_xml.load(file)
    return spec.guests[0], [str(part).removeprefix(f"{file}:") for part in left_out]


def test_a_domain_becomes_a_spec_that_can_be_loaded(
    machine: Machine,  # noqa: F811
    tmp_path: Path,
) -> None:
    disk = tmp_path / "render-1.qcow2"
    disk.touch()
    file = tmp_path / "render-1.xml"
    file.write_text(DOMAIN.replace("DISK", str(disk)))
    assert machine.mdo("import", str(file)) == (
        f"""\
[[guest]]
name = "render-1"
uuid = "{ID}"
memory = 2147483648
cpus = 2
disk = "{disk}"
disk_format = "qcow2"
accel = "kvm"
machine = "pc-q35-7.2"
qemu = "/usr/bin/qemu-system-x86_64"
mdev = [
    {{ uuid = "{U1}" }},
    {{ uuid = "{U2}" }},
]
"""
    )
    left = machine.err.replace(str(tmp_path), "").splitlines()
    assert left == [
        "mdo: /render-1.xml:6: left out: vcpu cpuset='1-3': a spec has no key for it",
        "mdo: /render-1.xml:12: left out: cpu mode='host-passthrough': a spec has no key for it",
        (
            "mdo: /render-1.xml:16: left out: devices/disk/driver cache='none': "
            "a spec has no key for it"
        ),
        (
            "mdo: /render-1.xml:19: left out: devices/disk/address type='pci' domain='0x0000' "
            "bus='0x04' slot='0x...: mdo chooses the place on the bus"
        ),
        (
            "mdo: /render-1.xml:21: left out: devices/disk type='file' device='cdrom': "
            "a guest of a spec has no cdrom"
        ),
        (
            "mdo: /render-1.xml:25: left out: devices/interface type='network': "
            "a spec has no network cards; extra takes QEMU's arguments for one"
        ),
        (
            "mdo: /render-1.xml:32: left out: devices/hostdev/alias name='hostdev0': "
            "mdo has its own names for devices"
        ),
        "mdo: /render-1.xml:34: left out: devices/hostdev display='on': a spec has no key for it",
        (
            "mdo: /render-1.xml:37: left out: devices/hostdev mode='subsystem' type='pci' "
            "managed='yes': a spec has mediated devices only"
        ),
        "mdo: /render-1.xml:41: left out: qemu:commandline: a spec has no key for it",
    ]
    spec = tmp_path / "spec.toml"
    machine.mdo("import", str(file), "-o", str(spec))
    assert load(spec).spec.guests[0].disk == disk
    machine.mdo("import", str(file), "-o", str(spec), code=2)
    assert "--force replaces it" in machine.err


def test_the_spec_can_be_compared_with_the_machine(
    machine: Machine,  # noqa: F811
    tmp_path: Path,
) -> None:
    mdevctl.write(
        machine.handle, [mdevctl.Definition(uuid=UUID(U1), parent="igd0", type="mvgpu-128M")]
    )
    file = tmp_path / "a.xml"
    file.write_text(domain("<devices>", HOSTDEV, "</devices>"))
    spec = tmp_path / "a.json"
    machine.mdo("import", str(file), "-o", str(spec))
    create, launch = json.loads(machine.mdo("diff", str(spec), "--json"))["changes"]
    assert (create["do"], create["uuid"], create["parent"]) == ("create", U1, "igd0")
    assert (launch["do"], launch["guest"]) == ("launch", "a")


def test_json(machine: Machine, tmp_path: Path) -> None:  # noqa: F811
    file = tmp_path / "a.xml"
    file.write_text(domain("<pm/>"))
    printed = json.loads(machine.mdo("import", str(file), "--json"))
    assert printed == {"guest": [{"name": "a", "memory": 1 << 30, "accel": "kvm"}]}
    left = json.loads(machine.err)
    compare(left, "mdo import, mdo export")
    assert left["left_out"] == {
        "file": str(file),
        "line": 4,
        "element": "pm",
        "why": "a spec has no key for it",
    }


def test_standard_input(
    machine: Machine,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = io.TextIOWrapper(io.BytesIO(domain("<pm/>").encode()))
    monkeypatch.setattr("sys.stdin", given)
    assert 'name = "a"' in machine.mdo("import", "-")
    assert machine.err == "mdo: standard input:4: left out: pm: a spec has no key for it\n"


@pytest.mark.parametrize(
    ("memory", "size"),
    [
        ("<memory>1048576</memory>", 1 << 30),
        ("<memory unit='b'>1073741824</memory>", 1 << 30),
        ("<memory unit='bytes'>1073741824</memory>", 1 << 30),
        ("<memory unit='k'>1048576</memory>", 1 << 30),
        ("<memory unit='KiB'>1048576</memory>", 1 << 30),
        ("<memory unit='M'>512</memory>", 512 << 20),
        ("<memory unit='MiB'>512</memory>", 512 << 20),
        ("<memory unit='G'>1</memory>", 1 << 30),
        ("<memory unit='TiB'>1</memory>", 1 << 40),
        ("<memory unit='MB'>1048576</memory>", 1_048_576_000_000),
    ],
)
def test_units_of_memory(memory: str, size: int, tmp_path: Path) -> None:
    assert read(domain(memory=memory), tmp_path) == (
        GuestConfig(name="a", memory=Size(size), accel="kvm"),
        [],
    )


def test_what_becomes_another_value_is_listed(tmp_path: Path) -> None:
    guest, left = read(
        "<domain type='qemu'>\n<name>Anna's machine</name>\n<memory unit='MB'>600</memory>\n"
        "<currentMemory>262144</currentMemory>\n<vcpu current='1'>4</vcpu>\n</domain>",
        tmp_path,
    )
    assert (guest.name, guest.memory, guest.cpus, guest.accel) == (
        "Anna-s-machine",
        573 << 20,
        1,
        "tcg",
    )
    assert left == [
        "2: left out: name: a guest cannot have this name, and is Anna-s-machine",
        "3: left out: memory: a guest has whole MiB, so 573M",
        "4: left out: currentMemory: a guest has all of its memory from the start",
        (
            "5: left out: vcpu current='1': "
            "the guest has those from the start, and no more can be added"
        ),
    ]


def test_a_kernel_to_boot(tmp_path: Path) -> None:
    words = "<kernel>/k</kernel><initrd>/i</initrd><cmdline>quiet  ro</cmdline>"
    guest, left = read(domain(f"<os firmware='efi'>{words}</os>"), tmp_path)
    assert (guest.kernel, guest.initrd, guest.append) == (Path("/k"), Path("/i"), "quiet  ro")
    assert left == [
        (
            "4: left out: os firmware='efi': "
            "the guest boots with the firmware that its QEMU takes by default"
        )
    ]
    _, left = read(domain("<os><initrd>/i</initrd></os>"), tmp_path)
    assert left == ["4: left out: os/initrd: a spec has no key for it"]


DISK = "<disk type='{kind}'>{rest}<source {key}='{name}'/><target dev='vda' bus='virtio'/></disk>"


def disk(name: str, rest: str = "", kind: str = "file", key: str = "file") -> str:
    return DISK.format(kind=kind, rest=rest, key=key, name=name)


@pytest.mark.parametrize(
    ("disks", "taken", "left"),
    [
        ((disk("/a"), disk("/b")), "/a", ["a guest of a spec has one disk"]),
        (
            (disk("/a"), disk("/b", "<boot order='1'/>")),
            "/b",
            ["a guest of a spec has one disk"],
        ),
        ((disk("/dev/sdx", kind="block", key="dev"),), "/dev/sdx", []),
        (
            (disk("/a", "<readonly/>"), disk("/b")),
            "/b",
            ["it is readonly, and a guest of a spec writes to its disk"],
        ),
        (
            (disk("/a", "<transient/>"),),
            None,
            ["it is transient, and a guest of a spec writes to its disk"],
        ),
        ((disk("/a", "<encryption/>"),), None, ["it is encrypted"]),
        (
            (disk("pool", kind="volume", key="pool"),),
            None,
            ["a disk of a spec is a file or a block device"],
        ),
        ((disk("a.raw"),), None, ["it names no image"]),
        (
            (disk("/a").replace("virtio", "sata"),),
            "/a",
            ["the disk is a virtio disk"],
        ),
    ],
)
def test_disks(disks: tuple[str, ...], taken: str | None, left: list[str], tmp_path: Path) -> None:
    guest, listed = read(domain("<devices>", *disks, "</devices>"), tmp_path)
    assert guest.disk == (None if taken is None else Path(taken))
    assert guest.disk_format == "raw"
    assert [line.rpartition(": ")[2] for line in listed] == left


LAUGHS = "".join(f"<!ENTITY l{n} '{f'&l{n - 1};' * 10}'>" for n in range(1, 10))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a.xml is empty"),
        (" " * (1 << 20) + domain(), "a.xml is larger than 1 MiB"),
        ("<domain", "a.xml:1: this is not XML: "),
        (domain()[:-3], "a.xml:5: this is not XML: "),
        ("[guest]", "a.xml:1: this is not XML: "),
        (b"<?xml version='1.0' encoding='x-none'?><domain/>", "a.xml:1: "),
        (b"<domain>\xff</domain>", "a.xml:1: this is not XML: "),
        (f"<!DOCTYPE d [<!ENTITY l0 'ha'>{LAUGHS}]><d>&l9;</d>", "a.xml:1: has a document type"),
        ("<!DOCTYPE d SYSTEM 'file:///etc/passwd'><d/>", "a.xml:1: has a document type"),
        (domain("<a>&more;</a>"), "a.xml:4: this is not XML: undefined entity"),
        ("<a>" * 60 + "</a>" * 60, "a.xml:1: has elements that are nested deeper than 32"),
        (domain("<a/>" * 20_001), "a.xml:4: has more than 20000 elements"),
        ("<network/>", "a.xml:1: this is a <network>, not a <domain>"),
        ("<domain/>", "a.xml:1: domain: is a domain of '', not of kvm or qemu"),
        (domain(kind="xen"), "a.xml:1: domain: is a domain of 'xen', not of kvm or qemu"),
        ("<domain type='kvm'/>", "a.xml:1: domain: has no name"),
        ("<domain type='kvm'><name>a</name></domain>", "a.xml:1: domain: has no memory"),
        (domain(memory="<memory/>"), "a.xml:3: memory: '' is not a whole number"),
        (domain(memory="<memory>-1</memory>"), "a.xml:3: memory: '-1' is not a whole number"),
        (domain(memory="<memory unit='ell'>1</memory>"), "a.xml:3: memory: 'ell' is no unit"),
        (
            domain(memory="<memory unit='TiB'>999999999999999</memory>"),
            "a.xml:3: guest[0].memory: ",
        ),
        (domain("<vcpu>many</vcpu>"), "a.xml:4: vcpu: 'many' is not a whole number"),
        (domain("<vcpu>4096</vcpu>"), "a.xml:4: guest[0].cpus: must be at most 288"),
        (domain("<uuid>1</uuid>"), "a.xml:4: uuid: '1' is not a UUID"),
        (
            domain("<devices>", HOSTDEV.replace(U1, "x"), "</devices>"),
            "a.xml:5: devices/hostdev/source/address: 'x' is not a UUID",
        ),
        (
            domain("<devices>", HOSTDEV, HOSTDEV, "</devices>"),
            f"a.xml:6: guest[0].mdev[1].uuid: device {U1} is named a second time",
        ),
    ],
)
def test_bad_files(text: str | bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError) as caught:
        read(text, tmp_path)
    said = caught.value.message.removeprefix(f"{tmp_path}/")
    assert said.startswith(message)
    assert "\n" not in said


def test_bad_arguments(machine: Machine, tmp_path: Path) -> None:  # noqa: F811
    machine.mdo("import", "none.xml", code=2)
    assert re.search("none.xml cannot be read: No such file", machine.err)
    machine.mdo("import", str(tmp_path), code=2)
    assert "Is a directory" in machine.err
    machine.mdo("import", "a.xml", "--parent", "igd0", code=2)
    assert "are for mdevctl's definitions" in machine.err
    machine.mdo("import", "a.xml", "b.xml", code=2)
    assert "is not a UUID" in machine.err
    assert main(["import", "none.xml", "--json"]) == 2


def test_the_mdevs_of_a_domain_that_runs() -> None:
    assert domain_xml.mdevs(DOMAIN) == {UUID(U1): "hostdev0", UUID(U2): ""}
    assert domain_xml.mdevs(domain()) == {}
