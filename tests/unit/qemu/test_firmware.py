# SPDX-License-Identifier: GPL-2.0-or-later
"""UEFI firmware is found by its descriptions, and a guest has variables of its own."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from msgspec.structs import replace

from mdev_orchestrator.errors import HostError, RequestError
from mdev_orchestrator.machine import Machine
from mdev_orchestrator.qemu import process
from mdev_orchestrator.qemu.command import Flash, GuestSpec
from mdev_orchestrator.qemu.firmware import find_uefi, prepare_flash
from mdev_orchestrator.qemu.start import start_qemu
from mdev_orchestrator.qemu.stop import stop_qemu

SPEC = GuestSpec(name="g", uuid=uuid4(), qemu="/usr/bin/qemu-system-x86_64", uefi=True)
PACKAGES, MACHINES = "usr/share/qemu/firmware", "etc/qemu/firmware"
SIZE = 1 << 16


def describe(root: Path, place: str, name: str, **changes: Any) -> None:  # noqa: ANN401
    """Write a description as Debian has it, and the images that it names."""
    code, variables = root / f"{name}-code.fd", root / f"{name}-vars.fd"
    code.write_bytes(b"code")
    variables.write_bytes(bytes(SIZE))
    text = {
        "description": "UEFI",
        "interface-types": ["uefi"],
        "mapping": {
            "device": "flash",
            "executable": {"filename": str(code), "format": "raw"},
            "nvram-template": {"filename": str(variables), "format": "raw"},
        },
        "targets": [{"architecture": "x86_64", "machines": ["pc-i440fx-*", "pc-q35-*"]}],
        "features": ["acpi-s3", "verbose-dynamic"],
        "tags": [],
    }
    (root / place).mkdir(parents=True, exist_ok=True)
    (root / place / f"{name}.json").write_text(json.dumps(text | changes))


def found(root: Path, **changes: Any) -> str:  # noqa: ANN401
    return find_uefi(Machine(root), replace(SPEC, **changes)).code.name


@pytest.mark.parametrize("machine", ["q35", "pc", "pc-q35-7.2"])
def test_the_first_that_fits_by_name(tmp_path: Path, machine: str) -> None:
    describe(tmp_path, PACKAGES, "60-plain")
    describe(tmp_path, PACKAGES, "70-other")
    describe(tmp_path, PACKAGES, "40-secure", features=["requires-smm", "secure-boot"])
    describe(tmp_path, PACKAGES, "41-keys", features=["enrolled-keys", "secure-boot"])
    describe(tmp_path, PACKAGES, "42-memory", mapping={"device": "memory", "filename": "/x"})
    describe(tmp_path, PACKAGES, "43-bios", **{"interface-types": ["bios"]})
    describe(tmp_path, PACKAGES, "44-arm", targets=[{"architecture": "arm", "machines": ["*"]}])
    assert found(tmp_path, machine=machine) == "60-plain-code.fd"


def test_the_machines_own_count_before_those_of_packages(tmp_path: Path) -> None:
    describe(tmp_path, PACKAGES, "60-plain")
    describe(tmp_path, PACKAGES, "50-hidden")
    (tmp_path / MACHINES).mkdir(parents=True)
    (tmp_path / MACHINES / "50-hidden.json").touch()
    assert found(tmp_path) == "60-plain-code.fd"
    describe(tmp_path, MACHINES, "10-own")
    assert found(tmp_path) == "10-own-code.fd"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"mapping": {"device": 1}}', "[" * 99999])
def test_a_description_that_cannot_be_read_is_none(tmp_path: Path, text: str) -> None:
    describe(tmp_path, PACKAGES, "60-plain")
    (tmp_path / PACKAGES / "10-damaged.json").write_text(text)
    assert found(tmp_path) == "60-plain-code.fd"


def test_without_firmware_its_package_is_named(tmp_path: Path) -> None:
    with pytest.raises(HostError, match=r"guest g: there is no UEFI firmware.* q35") as caught:
        found(tmp_path)
    assert caught.value.hint == "apt-get install ovmf"
    describe(tmp_path, PACKAGES, "60-plain")
    with pytest.raises(HostError, match="no UEFI firmware for the machine microvm"):
        found(tmp_path, machine="microvm")


def test_an_image_that_is_not_there_is_named(tmp_path: Path) -> None:
    describe(tmp_path, PACKAGES, "60-plain")
    (tmp_path / "60-plain-code.fd").unlink()
    with pytest.raises(HostError, match=r"60-plain\.json .*/60-plain-code\.fd cannot be read"):
        found(tmp_path)


def test_variables_are_the_guests_own_and_stay(tmp_path: Path) -> None:
    describe(tmp_path, PACKAGES, "60-plain")
    uefi = find_uefi(Machine(tmp_path), SPEC)
    own = tmp_path / "own.fd"
    flash = prepare_flash(uefi, own, "guest g")
    assert (flash.code, flash.variables) == (uefi.code, own)
    assert own.read_bytes() == uefi.variables.read_bytes()
    assert stat.S_IMODE(own.stat().st_mode) == 0o600
    own.write_bytes(b"x" * SIZE)
    prepare_flash(uefi, own, "guest g")
    assert own.read_bytes() == b"x" * SIZE


def test_variables_of_other_firmware_are_refused(tmp_path: Path) -> None:
    template = tmp_path / "template"
    template.write_bytes(bytes(SIZE))
    uefi = Flash(Path("/c"), "raw", template, "raw")
    own = tmp_path / "own.fd"
    own.write_bytes(b"x")
    with pytest.raises(RequestError, match=r"own\.fd have 1 bytes, those of /c have 65536"):
        prepare_flash(uefi, own, "guest g")
    assert own.read_bytes() == b"x"
    with pytest.raises(HostError, match=r"none/own\.fd cannot be used: No such file"):
        prepare_flash(uefi, tmp_path / "none/own.fd", "guest g")


async def test_a_guest_runs_from_them(qemu: str, place: Path) -> None:
    describe(place, PACKAGES, "60-plain")
    (place / "60-plain-code.fd").write_bytes(bytes(SIZE))
    (place / "guests").mkdir(mode=0o700)
    machine = Machine(place, state=place)
    what = replace(SPEC, qemu=qemu, memory=64 << 20, accel="tcg", hotplug_ports=0, extra=("-S",))
    guest = await start_qemu(machine, what)
    variables = guest.directory / process.UEFI_VARIABLES
    assert variables.read_bytes() == bytes(SIZE)
    await stop_qemu(machine, guest, deadline=0, force=True)
    assert not variables.exists()
    own = place / "own.fd"
    guest = await start_qemu(machine, replace(what, uefi_variables=own))
    await stop_qemu(machine, guest, deadline=0, force=True)
    assert own.stat().st_size == SIZE
