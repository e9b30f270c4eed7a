# SPDX-License-Identifier: GPL-2.0-or-later
"""What vendors say about their types, as typed values. Pure: no I/O.

Sources, the first that has a value counts:

* files of the type, one value each: mvgpu's ``attributes/``, where ``framebuffer`` is in bytes
  (kernel/ABI.rst);
* the ``description``: NVIDIA's ``num_heads=2, frl_config=45, framebuffer=512M, …``, the lines of
  i915 GVT-g (``low_gm_size: 128MB``), and the prose of the kernel's samples: mbochs' ``virtual
  display, 4 MB video memory`` and mdpy's ``virtual display, 640x480 framebuffer``;
* the name: mtty's ``Single port serial``.

The text is not trusted: a value that cannot be read is absent, never wrong.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from msgspec import Struct

from mdev_orchestrator.errors import RequestError
from mdev_orchestrator.model import MdevType
from mdev_orchestrator.spec import Condition, format_size, parse_resolution, parse_size

_PAIR = re.compile(r"([A-Za-z_]{1,40})[ \t]*[=:][ \t]*([^,\n]{1,80})")
_VIDEO_MEMORY = re.compile(r"([0-9]{1,9} ?[KMG]?B) video memory")
_DISPLAY = re.compile(r"([0-9]{1,6}x[0-9]{1,6}) framebuffer")
_PORTS = {"single port serial": 1, "dual port serial": 2}
_NUMBER = re.compile(r"[0-9]{1,18}")


class TypeFacts(Struct, frozen=True):
    """The attributes of one type; ``None`` where the vendor says nothing readable.

    :ivar framebuffer: Bytes of video memory.
    :ivar num_heads: Displays.
    :ivar frl_config: Frame rate limit, frames per second.
    :ivar max_resolution: Width and height, pixels.
    :ivar max_instance: How many an empty parent holds.
    :ivar low_gm_size: GVT-g: bytes of graphics memory that the processor can map.
    :ivar high_gm_size: GVT-g: bytes that it cannot.
    :ivar fence: GVT-g: fence registers.
    :ivar weight: GVT-g: share of time.
    :ivar ports: Serial ports.
    """

    framebuffer: int | None = None
    num_heads: int | None = None
    frl_config: int | None = None
    max_resolution: tuple[int, int] | None = None
    max_instance: int | None = None
    low_gm_size: int | None = None
    high_gm_size: int | None = None
    fence: int | None = None
    weight: int | None = None
    ports: int | None = None


def _read(name: str, text: str) -> int | tuple[int, int] | None:
    """One value; ``None`` if it cannot be read."""
    try:
        if name == "max_resolution":
            return parse_resolution(text)
        if name in _SIZES:
            return parse_size(text)
    except RequestError:
        return None
    if not _NUMBER.fullmatch(text):
        return None
    return int(text)


_SIZES = frozenset(("framebuffer", "low_gm_size", "high_gm_size"))
_NAMES = frozenset(TypeFacts.__struct_fields__)
_ALIASES = {"resolution": "max_resolution", "max_instances": "max_instance"}


def facts_of(type_: MdevType) -> TypeFacts:
    """Read the attributes of a type. Does not raise for anything a vendor writes."""
    return _facts(
        (type_.name or "").strip().lower(),
        type_.description or "",
        tuple(type_.attributes.items()),
    )


@lru_cache(1024)
def _facts(label: str, description: str, attributes: tuple[tuple[str, str], ...]) -> TypeFacts:
    """The same for the types of all parents of a kind, once.

    :param label: The type's human-readable name, in small letters.
    """
    texts: dict[str, str] = dict(reversed(_PAIR.findall(description)))
    if memory := _VIDEO_MEMORY.search(description):
        texts.setdefault("framebuffer", memory[1])
    if display := _DISPLAY.search(description):
        texts.setdefault("max_resolution", display[1])
    texts |= attributes
    found: dict[str, Any] = {}
    for word, text in texts.items():
        name = _ALIASES.get(word, word)
        # the name itself comes before an alias of it
        if name in _NAMES and (name == word or name not in texts):
            value = _read(name, text.strip())
            if value is not None:
                found[name] = value
    if (ports := _PORTS.get(label)) is not None:
        found.setdefault("ports", ports)
    return TypeFacts(**found)


def meets(facts: TypeFacts, conditions: Iterable[tuple[str, Condition]]) -> bool:
    """Whether a type meets all conditions; an attribute that it does not have meets none."""
    return all(
        (value := getattr(facts, name)) is not None and condition.holds(value)
        for name, condition in conditions
    )


def shown(name: str, value: int | tuple[int, int]) -> str:
    """An attribute's value as the vendors write it: ``512M``, ``1920x1200``, ``2``."""
    if isinstance(value, tuple):
        return "{}x{}".format(*value)
    return format_size(value) if name in _SIZES else str(value)
