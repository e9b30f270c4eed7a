# SPDX-License-Identifier: GPL-2.0-or-later
"""From a specification to QEMU's command line."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from mdev_orchestrator.errors import RequestError
from mdev_orchestrator.qemu.command import (
    Flash,
    GuestMdev,
    GuestSpec,
    Sockets,
    check_name,
    guest_argv,
    option,
    parse_accel,
    parse_iommu,
    port_window,
)
from mdev_orchestrator.spec import parse_size

GUEST = UUID("c0ffee00-0000-4000-8000-000000000001")
M1 = UUID("83b8f4f2-509f-382f-3c1e-e6bfe0fa1001")
M2 = UUID("83b8f4f2-509f-382f-3c1e-e6bfe0fa1002")
SOCKETS = Sockets(qmp=3, query=4, watch=6, console=5, console_log=Path("/s/console.log"))
WINDOW = f"pref64-reserve={8 << 30}"
BUS = Path("/sys/bus/mdev/devices")

BARE = """\
qemu-system-x86_64
-name guest=render-1,debug-threads=on
-uuid c0ffee00-0000-4000-8000-000000000001
-machine type=q35
-accel kvm
-accel tcg
-m 512M
-smp 1
-nodefaults
-no-user-config
-display none
-chardev socket,id=qmp,fd=3,server=on,wait=off
-mon chardev=qmp,mode=control
-chardev socket,id=query,fd=4,server=on,wait=off
-mon chardev=query,mode=control
-chardev socket,id=watch,fd=6,server=on,wait=off
-mon chardev=watch,mode=control
-chardev socket,id=console,fd=5,server=on,wait=off,logfile=/s/console.log
-serial chardev:console
"""


def shown(argv: list[str]) -> str:
    """An option and its value on one line."""
    return re.sub(r"\n(?!-)", " ", "\n".join(argv)).replace(" -name", "\n-name") + "\n"


def mdev(uuid: UUID, api: str = "vfio-pci") -> GuestMdev:
    return GuestMdev(uuid, BUS / str(uuid), api)


def spec(**changes: Any) -> GuestSpec:  # noqa: ANN401 - fields of GuestSpec
    return replace(GuestSpec(name="render-1", uuid=GUEST, hotplug_ports=0), **changes)


def added(**changes: Any) -> list[str]:  # noqa: ANN401
    """Lines that the changes add to the bare command line."""
    lines = shown(guest_argv(spec(**changes), SOCKETS)).splitlines()
    return [line for line in lines if line not in BARE.splitlines()]


def test_bare() -> None:
    assert shown(guest_argv(spec(), SOCKETS)) == BARE


def test_mdevs_take_the_first_ports_and_free_ones_follow() -> None:
    port = "-device pcie-root-port,"
    assert added(mdevs=(mdev(M1), mdev(M2)), hotplug_ports=1, hotplug_window=8 << 30) == [
        f"{port}id=port0,bus=pcie.0,addr=0x0f.0,chassis=1,slot=1,{WINDOW},multifunction=on",
        f"{port}id=port1,bus=pcie.0,addr=0x0f.1,chassis=2,slot=2,{WINDOW}",
        f"{port}id=port2,bus=pcie.0,addr=0x0f.2,chassis=3,slot=3,{WINDOW}",
        f"-device vfio-pci,id=mdev-{M1},sysfsdev=/sys/bus/mdev/devices/{M1},bus=port0",
        f"-device vfio-pci,id=mdev-{M2},sysfsdev=/sys/bus/mdev/devices/{M2},bus=port1",
    ]


def test_mdevs_that_are_opened_by_iommufd_share_one_object() -> None:
    lines = added(mdevs=(mdev(M1), mdev(M2)), iommu="iommufd")
    assert [line for line in lines if "mmu" in line] == [
        "-object iommufd,id=iommufd0",
        *(
            f"-device vfio-pci,id=mdev-{uuid},sysfsdev=/sys/bus/mdev/devices/{uuid}"
            f",iommufd=iommufd0,bus=port{number}"
            for number, uuid in enumerate((M1, M2))
        ),
    ]
    assert added(iommu="iommufd") == []  # the object comes with the first device


def test_kinds_of_iommu() -> None:
    assert parse_iommu("iommufd") == "iommufd"
    with pytest.raises(RequestError, match="is no kind of IOMMU"):
        parse_iommu("smmu")


def test_what_is_not_pci_sits_on_no_port() -> None:
    assert added(
        machine="s390-ccw-virtio",
        hotplug_ports=4,
        mdevs=(mdev(M1, "vfio-ccw"), mdev(M2, "vfio-ap")),
    ) == [
        "-machine type=s390-ccw-virtio",
        f"-device vfio-ccw,id=mdev-{M1},sysfsdev=/sys/bus/mdev/devices/{M1}",
        f"-device vfio-ap,id=mdev-{M2},sysfsdev=/sys/bus/mdev/devices/{M2}",
    ]


def test_boot() -> None:
    assert added(
        kernel=Path("/k"),
        initrd=Path("/i"),
        append="console=ttyS0 a,b",
        disk=Path("/d,readonly=on"),
        firmware=Path("/fw"),
        memory=2 << 30,
        cpus=3,
        accel="tcg",
        extra=("-S",),
    ) == [
        "-m 2048M",
        "-smp 3",
        "-L /fw",
        "-kernel /k",
        "-initrd /i",
        "-append console=ttyS0 a,b",
        "-drive if=none,id=disk0,format=raw,file=/d,,readonly=on",
        "-device virtio-blk,drive=disk0",
        "-S",
    ]


def test_uefi_is_two_flash_chips() -> None:
    flash = Flash(Path("/code,1.fd"), "raw", Path("/vars.fd"), "qcow2")
    usual, argv = guest_argv(spec(), SOCKETS), guest_argv(spec(uefi=True), SOCKETS, flash=flash)
    assert shown(argv).splitlines()[len(shown(usual).splitlines()) :] == [
        "-drive if=pflash,unit=0,format=raw,readonly=on,file=/code,,1.fd",
        "-drive if=pflash,unit=1,format=qcow2,file=/vars.fd",
    ]


def test_a_monitor_is_an_object_where_there_is_that_type() -> None:
    argv = guest_argv(spec(), SOCKETS, objects={"monitor-qmp", "iothread"})
    monitors = [line for line in shown(argv).splitlines() if "monitor" in line]
    assert monitors == [
        f"-object monitor-qmp,id=monitor-{name},chardev={name}"
        for name in ("qmp", "query", "watch")
    ]
    assert "-mon" not in argv


@pytest.mark.parametrize("count", [9, 64, 128])
def test_ports_are_unique(count: int) -> None:
    ports = [line for line in guest_argv(spec(hotplug_ports=count), SOCKETS) if "root-port" in line]
    assert len(ports) == count
    for key in ("id", "addr", "chassis", "slot"):
        assert len({re.search(rf",{key}=([^,]*)", port)[1] for port in ports}) == count  # type: ignore[index]
    firsts = [port for port in ports if "multifunction=on" in port]
    assert all(re.search(r"addr=0x..\.0,", port) for port in firsts)
    assert len(firsts) == -(-count // 8)


TIB = 1 << 40
HYPERTRANSPORT = TIB - (12 << 30)


@pytest.mark.parametrize("more", [0, 16 << 10, 1 << 30])
@pytest.mark.parametrize("ports", [*range(1, 20), 64, 127, 128])
def test_windows_stay_out_of_the_hypertransport_range(ports: int, more: int) -> None:
    """What SeaBIOS 1.16.3 does on a processor of AMD's kind with 40 address bits.

    :param more: Bytes of 64-bit memory that devices without a port need.
    """
    window = port_window(spec(hotplug_ports=ports, hotplug_window=256 << 20))
    size = -(-(ports * window + more) // (1 << 30) << 30)
    base = TIB - size
    base -= size  # the range at the top is reserved
    base = -(-base // window) * window
    assert base + size <= HYPERTRANSPORT


@pytest.mark.parametrize(("asked", "given"), [("256M", 4), ("4G", 4), ("64G", 64)])
def test_a_port_reserves_what_was_asked_for_at_least(asked: str, given: int) -> None:
    window = port_window(spec(hotplug_ports=4, hotplug_window=parse_size(asked)))
    assert window == given << 30


def test_ports_leave_the_low_slots_to_what_has_no_address() -> None:
    ports = [line for line in guest_argv(spec(hotplug_ports=128), SOCKETS) if "root-port" in line]
    slots = {int(re.search(r",addr=(0x..)", port)[1], 16) for port in ports}  # type: ignore[index]
    assert slots == set(range(15, 31))  # 0 is the host bridge, 31 the chipset


def unescaped(text: str) -> list[str]:
    """QEMU's rule, read from its manual: a comma ends a value, two commas are one inside it."""
    return [part.replace("\0", ",") for part in text.replace(",,", "\0").split(",")]


@given(st.text(st.characters(exclude_characters="\0", codec="utf-8"), min_size=1))
def test_no_value_can_become_an_option(value: str) -> None:
    assert unescaped(option("x", file=value, last=1)) == ["x", f"file={value}", "last=1"]


@given(
    st.text(st.characters(codec="utf-8")),
    st.text(st.characters(codec="utf-8")),
    st.text(st.characters(codec="utf-8"), max_size=8),
    st.text(st.characters(codec="utf-8"), max_size=8),
)
def test_no_string_of_a_user_adds_an_argument(
    append: str, disk: str, machine: str, disk_format: str
) -> None:
    plain = spec(kernel=Path("/k"), append="-x", disk=Path("/d"))
    wild = replace(
        plain,
        append=append or "-x",
        disk=Path("/d" + disk),
        machine="q35-" + machine,
        disk_format=disk_format,
    )
    try:
        argv = guest_argv(wild, SOCKETS)
    except RequestError:
        assert "\0" in append + disk + machine + disk_format
        return
    usual = guest_argv(plain, SOCKETS)
    assert len(argv) == len(usual)
    assert [word for word in argv if word in {"-drive", "-device", "-mon", "-append"}][:4] == [
        word for word in usual if word in {"-drive", "-device", "-mon", "-append"}
    ][:4]
    drive = unescaped(argv[usual.index("-drive") + 1])
    assert drive == ["if=none", "id=disk0", f"format={disk_format}", f"file={wild.disk}"]


def test_qemu_reads_it_so(qemu: str, tmp_path: Path) -> None:
    disk = tmp_path / "d,readonly=on,id=oops"
    disk.write_bytes(bytes(1 << 20))
    argv = [qemu, "-display", "none", "-S", "-nodefaults", "-accel", "tcg", "-qmp", "stdio"]
    argv += ["-drive", option("if=none", id="disk0", format="raw", file=disk)]
    asked = b'{"execute":"qmp_capabilities"}{"execute":"query-block"}{"execute":"quit"}'
    out = subprocess.run(argv, input=asked, capture_output=True, check=True).stdout
    [answer] = [
        value["return"]
        for value in map(json.loads, out.splitlines())
        if isinstance(value.get("return"), list)
    ]
    assert [(drive["device"], drive["inserted"]["file"]) for drive in answer] == [
        ("disk0", str(disk))
    ]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"name": "../x"}, "name of a guest"),
        ({"name": "a,b"}, "name of a guest"),
        ({"name": "-x"}, "name of a guest"),
        ({"name": ""}, "name of a guest"),
        ({"name": "a" * 41}, "name of a guest"),
        ({"name": "a\n"}, "name of a guest"),
        ({"memory": 0}, "memory"),
        ({"memory": (1 << 20) + 1}, "memory"),
        ({"cpus": 0}, "CPUs"),
        ({"cpus": 1000}, "CPUs"),
        ({"hotplug_ports": -1}, "ports"),
        ({"hotplug_ports": 128, "mdevs": (mdev(M1),)}, "ports"),
        ({"hotplug_window": 3 << 20}, "window"),
        ({"hotplug_window": 0}, "window"),
        ({"initrd": Path("/i")}, "kernel"),
        ({"append": "x"}, "kernel"),
        ({"uefi_variables": Path("/v")}, "UEFI"),
        ({"mdevs": (mdev(M1), mdev(M1))}, "twice"),
        ({"mdevs": (mdev(M1, "vfio-pci,x-y=on"),)}, "device_api"),
        ({"mdevs": (mdev(M1, "-S"),)}, "device_api"),
        ({"extra": ("\0",)}, "zero byte"),
    ],
)
def test_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        guest_argv(spec(**changes), SOCKETS)


@given(st.text())
def test_a_name_that_passes_is_a_file_name_and_an_option(name: str) -> None:
    try:
        check_name(name)
    except RequestError:
        return
    assert Path(name).name == name
    assert option("x", guest=name) == f"x,guest={name}"


def test_accelerators() -> None:
    assert parse_accel("tcg") == "tcg"
    with pytest.raises(RequestError, match="accelerator"):
        parse_accel("kvm,thread=multi")
