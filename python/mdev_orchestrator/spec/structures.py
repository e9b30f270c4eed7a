# SPDX-License-Identifier: GPL-2.0-or-later
"""The tables of a spec as frozen structures.

Types, bounds and patterns stand in the annotations: :mod:`.decoding` checks them and
:mod:`.json_schema` describes them. ``extra={"fault": …}`` is what a message says of a text that
does not match its pattern.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal
from uuid import UUID

from msgspec import Meta, Struct, field

from mdev_orchestrator.spec.conditions import (
    Condition,
    CountCondition,
    ResolutionCondition,
    SizeCondition,
)
from mdev_orchestrator.spec.messages import Place
from mdev_orchestrator.spec.sizes import MIB, Size

MAX_DEVICES = 4096
"""In one spec; the host layer is built for as many."""
MAX_CPUS = 288
MAX_PORTS = 128
"""Root ports of a guest: sixteen slots of eight."""

# "$" would let a newline at the end pass; the rest must suit JSON Schema as well
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,39}$(?!\n)"
_LINE_FAULT = {"fault": "must be one line without control characters"}

Name = Annotated[
    str,
    Meta(
        pattern=NAME_PATTERN,
        description="Up to 40 letters, digits, '_', '.' and '-'.",
        extra={
            "fault": "must be up to 40 letters, digits, '_', '.' and '-', a letter or digit first"
        },
    ),
]
Word = Annotated[
    str,
    Meta(
        pattern=r"^[^\s/\x00-\x1f]{1,128}$(?!\n)",
        extra={"fault": "must be one word without '/'"},
    ),
]
Line = Annotated[str, Meta(pattern=r"^[^\x00-\x1f\x7f]{0,1024}$(?!\n)", extra=_LINE_FAULT)]
Text = Annotated[str, Meta(pattern=r"^[^\x00-\x1f\x7f]*$(?!\n)", extra=_LINE_FAULT)]


class Devices(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What kind of devices, and how many.

    A type is chosen by its id, by its attributes, or both. An attribute that a type does not have
    meets no condition.
    """

    type: Annotated[Word | None, Meta(description="Id of an mdev type.")] = None
    count: Annotated[int, Meta(ge=1, le=MAX_DEVICES, description="How many devices.")] = 1
    uuid: Annotated[
        UUID | None, Meta(description="Of the one device; taken as it is when it exists.")
    ] = None
    parent: Annotated[Word | None, Meta(description="The only parent to create them on.")] = None
    params: Annotated[
        Line, Meta(description="The vendor's text for vgpu_params, passed on as it is.")
    ] = ""
    attributes: Annotated[
        tuple[tuple[str, str], ...],
        Meta(description="Files of each device and what is written there, in this order."),
    ] = ()
    framebuffer: Annotated[SizeCondition | None, Meta(description="Bytes of video memory.")] = None
    num_heads: Annotated[CountCondition | None, Meta(description="Displays.")] = None
    frl_config: Annotated[
        CountCondition | None, Meta(description="Frame rate limit, frames per second.")
    ] = None
    max_resolution: Annotated[
        ResolutionCondition | None, Meta(description="Largest resolution, pixels.")
    ] = None
    low_gm_size: Annotated[
        SizeCondition | None, Meta(description="GVT-g: bytes of mappable graphics memory.")
    ] = None
    high_gm_size: Annotated[
        SizeCondition | None, Meta(description="GVT-g: bytes of hidden graphics memory.")
    ] = None
    fence: Annotated[CountCondition | None, Meta(description="GVT-g: fence registers.")] = None
    weight: Annotated[CountCondition | None, Meta(description="GVT-g: share of time.")] = None
    ports: Annotated[CountCondition | None, Meta(description="Serial ports.")] = None

    @property
    def conditions(self) -> tuple[tuple[str, Condition], ...]:
        """The attributes that were given, by name, in the order of this class."""
        return tuple(
            (name, value) for name in ATTRIBUTES if (value := getattr(self, name)) is not None
        )


ATTRIBUTES = tuple(
    name
    for name in Devices.__struct_fields__
    if name not in {"type", "count", "uuid", "parent", "params", "attributes"}
)
"""The attributes that types are chosen by, under the vendors' names."""


class GuestMdev(Devices, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Devices of one guest."""

    group: Annotated[
        Name | None,
        Meta(description="Start group: on one parent, started together. A word of this guest."),
    ] = None


class GuestSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a virtual machine is, but for its UUID and its mediated devices."""

    name: Name
    memory: Annotated[
        Size,
        Meta(description="A multiple of 1 MiB.", extra_json_schema={"default": "512M"}),
    ] = field(default_factory=lambda: Size(512 * MIB))
    cpus: Annotated[int, Meta(ge=1, le=MAX_CPUS, description="Virtual processors.")] = 1
    disk: Annotated[Path | None, Meta(description="Image of the first disk.")] = None
    disk_format: Annotated[
        str,
        Meta(
            pattern=r"^[a-z0-9-]{1,32}$(?!\n)",
            description="The image's format; it is never guessed.",
            extra={"fault": "must be up to 32 small letters, digits and '-'"},
        ),
    ] = "raw"
    kernel: Annotated[Path | None, Meta(description="Linux image to boot directly.")] = None
    initrd: Annotated[Path | None, Meta(description="Needs a kernel.")] = None
    append: Annotated[Line, Meta(description="Kernel parameters; need a kernel.")] = ""
    hotplug_ports: Annotated[
        int, Meta(ge=0, le=MAX_PORTS, description="Free root ports for devices attached later.")
    ] = 4
    hotplug_window: Annotated[
        Size,
        Meta(
            description="Memory window of each root port; a power of two of at least 1 MiB.",
            extra_json_schema={"default": "256M"},
        ),
    ] = field(default_factory=lambda: Size(256 * MIB))
    iommu: Annotated[
        Literal["auto", "iommufd", "container"],
        Meta(description="How its mdevs are opened; auto is iommufd where there is one."),
    ] = "auto"
    accel: Annotated[
        Literal["auto", "kvm", "tcg"], Meta(description="How QEMU runs the processors.")
    ] = "auto"
    machine: Annotated[Line, Meta(description="QEMU's machine type.")] = "q35"
    qemu: Annotated[Line, Meta(description="QEMU's program, a name or an absolute path.")] = (
        "qemu-system-x86_64"
    )
    firmware: Annotated[
        Path | None, Meta(description="Directory of firmware images, QEMU's -L.")
    ] = None
    uefi: Annotated[bool, Meta(description="Boot by UEFI, not by QEMU's own firmware.")] = False
    uefi_variables: Annotated[
        Path | None, Meta(description="File that keeps the UEFI variables; made if needed.")
    ] = None
    extra: Annotated[
        tuple[
            Annotated[
                str,
                Meta(
                    pattern=r"^[^\x00]{0,4096}$",
                    extra={"fault": "must be at most 4096 characters without a zero byte"},
                ),
            ],
            ...,
        ],
        Meta(description="Further arguments of QEMU, as they are."),
    ] = ()


class GuestConfig(GuestSettings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A virtual machine."""

    uuid: Annotated[UUID | None, Meta(description="Chosen once and kept when absent.")] = None
    mdevs: Annotated[tuple[GuestMdev, ...], Meta(description="Its mediated devices.")] = field(
        name="mdev", default=()
    )


class Pool(Devices, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Devices without a guest, created ahead as one does with SR-IOV functions."""

    name: Name
    start: Annotated[
        Literal["auto", "manual"],
        Meta(description="Whether they come back after a reboot by themselves."),
    ] = "auto"
    mdevctl: Annotated[
        Text,
        Meta(description="Further keys of the device's mdevctl definition, a JSON object as text."),
    ] = ""


class Spec(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All that one file asks for."""

    name: Annotated[
        Name | None,
        Meta(description="What it is called; the file's name without an ending if absent."),
    ] = None
    guests: Annotated[tuple[GuestConfig, ...], Meta(description="The virtual machines.")] = field(
        name="guest", default=()
    )
    pools: Annotated[tuple[Pool, ...], Meta(description="Devices without a guest.")] = field(
        name="pool", default=()
    )

    def devices(self) -> Iterator[tuple[Place, str, GuestMdev | Pool]]:
        """Each request for devices: its key in the file, the name of its guest or pool, itself."""
        for number, guest in enumerate(self.guests):
            for index, mdev in enumerate(guest.mdevs):
                yield ("guest", number, "mdev", index), guest.name, mdev
        for number, pool in enumerate(self.pools):
            yield ("pool", number), pool.name, pool
