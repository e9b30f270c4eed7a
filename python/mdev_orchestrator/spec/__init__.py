# SPDX-License-Identifier: GPL-2.0-or-later
"""What a user asks for: a TOML or JSON file as typed, frozen structures.

::

    [[guest]]
    name = "render-1"
    memory = "512M"
    kernel = "vmlinuz"            # paths are relative to the file they stand in

    [[guest.mdev]]
    framebuffer = ">=512M"        # or type = "mvgpu-12", or uuid = "…"
    count = 2
    group = "peers"               # on one parent, started together
    params = "frame_rate_limiter=0"

    [[pool]]                      # devices without a guest, created ahead
    name = "spare"
    type = "mvgpu-128M"
    count = 4

:func:`load` reads a file, :func:`parse` a text. Both return a :class:`Document`: the :class:`Spec`,
and the line on which each of its keys stands. Each fault of a file is a :class:`RequestError` of
one line, ``FILE:LINE: KEY: what``, in words of this package: no message depends on the wording of
a library.

===========  ======================================================
sizes        amounts of memory and resolutions
conditions   what an attribute of a type must be
structures   the tables of a spec
messages     how messages name a key and its line
document     a spec together with the lines of its keys
positions    finds the line of each key
syntax       text -> plain values
decoding     plain values -> structures
rules        what the types of the structures cannot say
loading      file or text -> document
writing      spec -> TOML and JSON
json_schema  the JSON Schema; ``python -m mdev_orchestrator.spec`` prints it
===========  ======================================================

docs/spec.md describes the format to users. A spec has no variables, and nothing is read from the
environment.
"""

from mdev_orchestrator.spec.conditions import (
    Condition,
    CountCondition,
    ResolutionCondition,
    SizeCondition,
)
from mdev_orchestrator.spec.decoding import DecodingError, decode
from mdev_orchestrator.spec.document import Document
from mdev_orchestrator.spec.json_schema import schema, schema_text
from mdev_orchestrator.spec.loading import MAX_BYTES, check, load, parse, read_guest
from mdev_orchestrator.spec.messages import Place, key
from mdev_orchestrator.spec.positions import MAX_DEPTH
from mdev_orchestrator.spec.sizes import MIB, Size, format_size, parse_resolution, parse_size
from mdev_orchestrator.spec.structures import (
    ATTRIBUTES,
    MAX_CPUS,
    MAX_DEVICES,
    MAX_PORTS,
    Devices,
    GuestConfig,
    GuestMdev,
    GuestSettings,
    Pool,
    Spec,
)
from mdev_orchestrator.spec.writing import to_json, to_plain, to_toml

__all__ = [
    "ATTRIBUTES",
    "MAX_BYTES",
    "MAX_CPUS",
    "MAX_DEPTH",
    "MAX_DEVICES",
    "MAX_PORTS",
    "MIB",
    "Condition",
    "CountCondition",
    "DecodingError",
    "Devices",
    "Document",
    "GuestConfig",
    "GuestMdev",
    "GuestSettings",
    "Place",
    "Pool",
    "ResolutionCondition",
    "Size",
    "SizeCondition",
    "Spec",
    "check",
    "decode",
    "format_size",
    "key",
    "load",
    "parse",
    "parse_resolution",
    "parse_size",
    "read_guest",
    "schema",
    "schema_text",
    "to_json",
    "to_plain",
    "to_toml",
]
