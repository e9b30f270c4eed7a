# SPDX-License-Identifier: GPL-2.0-or-later
"""UEFI firmware for guests, as the machine's packages describe it.

A package of firmware describes each of its images in a file of JSON, whose format is QEMU's
(``docs/interop/firmware.json`` in its source): what the image is for, and where it is. The files
stand in :data:`PLACES`. They are tried in the order of their names; of two with the same name that
of the later place counts, and an empty one hides the other.

What is taken is the first image that is UEFI in two flash chips for the guest's machine, and that
asks nothing of the guest: neither SMM nor signed boot files (:data:`UNFIT`).
"""

from __future__ import annotations

import os
import platform
import re
from fnmatch import fnmatchcase
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from mdev_orchestrator.errors import HostError, RequestError
from mdev_orchestrator.machine import Machine
from mdev_orchestrator.qemu.command import Flash, GuestSpec
from mdev_orchestrator.state import decode
from mdev_orchestrator.system.files import write_atomic

PLACES = ("usr/share/qemu/firmware", "etc/qemu/firmware")
"""Directories of descriptions below the machine's root: those of packages, then the machine's."""

PACKAGES = {"x86_64": "ovmf", "aarch64": "qemu-efi-aarch64"}
"""Debian's packages of UEFI firmware, by architecture."""

UNFIT = frozenset({"requires-smm", "enrolled-keys"})
"""Features of an image that it cannot be used with: mdo gives a guest no SMM, and a kernel that is
booted directly need not be signed."""

ALIASES = {"q35": "pc-q35-", "pc": "pc-i440fx-", "virt": "virt-"}
"""How the versions of a machine begin, for which QEMU has a short name."""

_PROGRAM = re.compile(r"qemu-system-(\w+)")


class _Image(Struct, frozen=True):
    """FirmwareFlashFile of QEMU."""

    filename: str
    format: str = "raw"


class _Mapping(Struct, frozen=True, rename="kebab"):
    """FirmwareMapping of QEMU, as far as it is flash."""

    device: str
    mode: str = "split"
    executable: _Image | None = None
    nvram_template: _Image | None = None


class _Target(Struct, frozen=True):
    """FirmwareTarget of QEMU."""

    architecture: str
    machines: list[str]


class _Description(Struct, frozen=True, rename="kebab"):
    """Firmware of QEMU, without what is not asked for here."""

    mapping: _Mapping
    interface_types: list[str] = []
    targets: list[_Target] = []
    features: list[str] = []


def find_uefi(machine: Machine, spec: GuestSpec) -> Flash:
    """Return the UEFI firmware for a guest, with the variables that a new guest begins with.

    :raise HostError: There is none, or its files are not there.
    """
    program = _PROGRAM.search(Path(spec.qemu).name)
    architecture = program[1] if program else platform.machine()
    package = PACKAGES.get(architecture)
    hint = f"apt-get install {package}" if package else "install your distribution's package of it"
    again = hint.replace("install", "install --reinstall", 1) if package else f"{hint} again"
    for path in _descriptions(machine):
        found = _read(path)
        if found is None or not _fits(found, architecture, spec.machine):
            continue
        code, variables = found.mapping.executable, found.mapping.nvram_template
        if code is None or variables is None:
            continue
        for image in (code.filename, variables.filename):
            if not os.access(image, os.R_OK):
                raise HostError(
                    f"guest {spec.name}: {path} describes UEFI firmware, and its file {image} "
                    "cannot be read",
                    again,
                )
        return Flash(Path(code.filename), code.format, Path(variables.filename), variables.format)
    raise HostError(
        f"guest {spec.name}: there is no UEFI firmware for the machine {spec.machine} of "
        f"{architecture}",
        hint,
    )


def prepare_flash(uefi: Flash, variables: Path, label: str) -> Flash:
    """Return the flash chips of a guest; its variables are made if they are not there.

    :param variables: File of the guest's variables.
    :param label: How messages name the guest.
    :raise RequestError: The file is there and cannot be of this firmware.
    :raise HostError: It cannot be made.
    """
    try:
        fresh = uefi.variables.read_bytes()
        if not variables.exists():
            write_atomic(variables, fresh)
        size = variables.stat().st_size
    except OSError as error:
        raise HostError(
            f"{label}: its UEFI variables {variables} cannot be used: {error.strerror}",
            errno=error.errno,
        ) from error
    if uefi.variables_format == "raw" and size != len(fresh):
        raise RequestError(
            f"{label}: its UEFI variables {variables} have {size} bytes, those of {uefi.code} have "
            f"{len(fresh)}",
            "name another file, or delete it: the guest begins with fresh ones then",
        )
    return replace(uefi, variables=variables)


def _descriptions(machine: Machine) -> list[Path]:
    """The files that describe firmware, in the order in which they count."""
    found: dict[str, Path] = {}
    for place in PLACES:
        found |= {path.name: path for path in Path(machine.path(place)).glob("*.json")}
    return [found[name] for name in sorted(found)]


def _read(path: Path) -> _Description | None:
    """Read a description; ``None`` for one that is empty, or cannot be used."""
    try:
        return decode(path.read_bytes(), _Description)
    except (OSError, ValueError):
        return None


def _fits(found: _Description, architecture: str, machine_type: str) -> bool:
    name = ALIASES.get(machine_type, machine_type)
    return (
        "uefi" in found.interface_types
        and (found.mapping.device, found.mapping.mode) == ("flash", "split")
        and UNFIT.isdisjoint(found.features)
        and any(
            target.architecture == architecture
            and any(fnmatchcase(name, pattern) for pattern in target.machines)
            for target in found.targets
        )
    )
