# SPDX-License-Identifier: GPL-2.0-or-later
"""Strings that would like to be options: every one stays the value that it is."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any, cast
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from mdev_orchestrator.errors import MdoError, RequestError
from mdev_orchestrator.host.sysfs import create
from mdev_orchestrator.machine import Machine
from mdev_orchestrator.model import check_attribute, group_uuid
from mdev_orchestrator.qemu.command import GuestMdev, GuestSpec, Sockets, check_name, guest_argv
from mdev_orchestrator.qemu.hotplug import device_for
from mdev_orchestrator.qemu.start import _spawn

GUEST = UUID("c0ffee00-0000-4000-8000-000000000001")
SOCKETS = Sockets(qmp=3, query=4, watch=6, console=5, console_log=Path("/s,id=x/console.log"))
MDEV = GuestMdev(GUEST, Path("/sys,driver=x/bus/mdev/devices") / str(GUEST))
PLAIN = GuestSpec(
    name="a",
    uuid=GUEST,
    kernel=Path("/k"),
    initrd=Path("/i"),
    append="x",
    disk=Path("/d"),
    machine="q35",
    firmware=Path("/f"),
    hotplug_ports=0,
)

HOSTILE = (
    "-S",
    "--",
    "-device",
    "x,id=mdev-0",
    ",id=disk1",
    ",,id=disk1",
    "smm=off",
    "type=none",
    "a=b,c=d",
    "$(reboot)",
    "`reboot`",
    "'; reboot; '",
    '"',
    "a\nb",
    "a\\",
    "\x1b[2J",
    "help",
    "?",
    "json:{}",
    "@/etc/shadow",
)
any_text = st.sampled_from(HOSTILE) | st.text(st.characters(codec="utf-8", exclude_characters="\0"))


def pairs(value: str) -> list[tuple[str, str]]:
    """Keys and values as QEMU's option parser has them; a key of its own without ``=`` is empty."""
    parts = (part.replace("\0", ",") for part in value.replace(",,", "\0").split(","))
    split = (part.partition("=") for part in parts)
    return [(key, text) if equals else ("", key) for key, equals, text in split]


@given(any_text, any_text, any_text, any_text)
def test_a_string_of_a_spec_adds_neither_argument_nor_key(
    append: str, path: str, machine: str, disk_format: str
) -> None:
    file = Path("/" + path)
    wild = replace(
        PLAIN,
        append=append or "x",
        kernel=file,
        initrd=file,
        disk=file,
        firmware=file,
        machine=machine,
        disk_format=disk_format,
    )
    argv, usual = guest_argv(wild, SOCKETS), guest_argv(PLAIN, SOCKETS)
    assert len(argv) == len(usual)
    for number, (word, plain) in enumerate(zip(argv, usual, strict=True)):
        if usual[number - 1] in {"-kernel", "-initrd", "-L"}:
            assert word == str(file)
        elif usual[number - 1] == "-append":
            assert word == wild.append
        elif plain.startswith("-"):
            assert word == plain
        else:
            assert [key for key, _ in pairs(word)] == [key for key, _ in pairs(plain)]
    assert pairs(argv[usual.index("-drive") + 1]) == [
        ("if", "none"),
        ("id", "disk0"),
        ("format", disk_format),
        ("file", str(file)),
    ]
    assert pairs(argv[usual.index("-machine") + 1]) == [("type", wild.machine)]


@pytest.mark.parametrize("machine", HOSTILE)
def test_a_machine_is_its_type_and_nothing_else(machine: str) -> None:
    argv = guest_argv(replace(PLAIN, machine=machine), SOCKETS)
    assert pairs(argv[argv.index("-machine") + 1]) == [("type", machine)]


def test_paths_of_the_host_are_values_too() -> None:
    argv = guest_argv(replace(PLAIN, mdevs=(MDEV,)), SOCKETS)
    assert ("logfile", str(SOCKETS.console_log)) in [p for word in argv for p in pairs(word)]
    assert ("sysfsdev", str(MDEV.path)) in pairs(argv[-1])
    assert device_for(MDEV).properties == {"sysfsdev": str(MDEV.path)}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_is_refused(name: str) -> None:
    if name == "help":
        assert check_name(name) == name  # a name like any other: -name guest=help
        return
    with pytest.raises(RequestError):
        check_name(name)
    with pytest.raises(RequestError):
        guest_argv(replace(PLAIN, name=name), SOCKETS)


@pytest.mark.parametrize("accel", ["kvm,thread=multi", "-S", ""])
def test_a_hostile_accelerator_is_refused(accel: Any) -> None:  # noqa: ANN401 - no Accel
    with pytest.raises(RequestError):
        guest_argv(replace(PLAIN, accel=accel), SOCKETS)


@pytest.mark.parametrize("group", [word for word in HOSTILE if word != "help"])
def test_a_hostile_group_is_refused(group: str) -> None:
    with pytest.raises(RequestError):
        group_uuid(group)


@given(any_text)
def test_a_group_is_a_uuid_when_it_gets_anywhere(group: str) -> None:
    try:
        found = group_uuid(group)
    except RequestError:
        return
    assert isinstance(found, UUID)


@pytest.mark.parametrize(
    "name", ["../remove", "/etc/passwd", "a/../../x", ".", "", "a\nb", "remove"]
)
def test_a_parameter_stays_in_its_device(name: str) -> None:
    with pytest.raises(RequestError):
        check_attribute(name, "1")


@pytest.mark.parametrize("name", ["../x", "..", "", "a/b", "a\0b"])
async def test_a_parent_and_a_type_stay_in_sysfs(tmp_path: Path, name: str) -> None:
    for parent, type_ in ((name, "t"), ("p", name)):
        with pytest.raises(MdoError, match="is not a name in sysfs"):
            await create(Machine(tmp_path), parent, type_, GUEST)


def test_the_gate_passes_words_on_as_they_are(tmp_path: Path) -> None:
    log = tmp_path / "log"
    pid, opener = _spawn(["/usr/bin/printf", r"%s\0", *HOSTILE], [], log)
    os.write(opener, b"$(reboot) `reboot` \\ ' \"\n")
    os.close(opener)
    status = os.waitpid(pid, 0)[1]
    assert (status, log.read_bytes()) == (0, "".join(f"{word}\0" for word in HOSTILE).encode())


@pytest.mark.parametrize("machine", ["smm=off", "q35,smm=off", "-S", "none,x-y=z"])
def test_qemu_takes_it_for_a_machine(qemu: str, machine: str) -> None:
    argv = guest_argv(replace(PLAIN, machine=machine), SOCKETS)
    value = argv[argv.index("-machine") + 1]
    done = subprocess.run(
        [qemu, "-display", "none", "-S", "-machine", value],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "unsupported machine type" in done.stderr


def test_qemu_runs_a_machine_that_there_is(qemu: str) -> None:
    argv = guest_argv(PLAIN, SOCKETS)
    value = argv[argv.index("-machine") + 1]
    command = [qemu, "-display", "none", "-S", "-nodefaults", "-accel", "tcg", "-qmp", "stdio"]
    asked = b'{"execute":"qmp_capabilities"}{"execute":"query-machines"}{"execute":"quit"}'
    out = subprocess.run(
        [*command, "-machine", value], input=asked, capture_output=True, check=True
    ).stdout
    answers = [cast("dict[str, Any]", json.loads(line)) for line in out.splitlines()]
    assert any("return" in answer for answer in answers)
