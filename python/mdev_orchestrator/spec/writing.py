# SPDX-License-Identifier: GPL-2.0-or-later
"""From a spec to plain values, TOML and JSON, which :mod:`.loading` reads."""

from __future__ import annotations

from functools import cache
from typing import Any

import msgspec
from msgspec import Struct

from mdev_orchestrator.spec.sizes import Size
from mdev_orchestrator.spec.structures import Spec


def to_plain(table: Struct) -> dict[str, Any]:
    """A spec, or a table of one, as JSON has it: its name first, nothing that is at its default."""
    plain = {}
    for name, written, default in _defaults(type(table)):
        value = getattr(table, name)
        if value == default:
            continue
        if isinstance(value, tuple) and isinstance(value[0], Struct):
            plain[written] = [to_plain(item) for item in value]
        else:
            plain[written] = msgspec.to_builtins(value, enc_hook=_plain)
    return plain


@cache
def _defaults(type_: type[Struct]) -> tuple[tuple[str, str, object], ...]:
    """The fields: their names here and in a file, and their defaults; asking msgspec takes time."""
    fields = sorted(
        msgspec.structs.fields(type_),
        key=lambda field: (field.name != "name", field.name != "uuid"),
    )
    return tuple(
        (
            field.name,
            field.encode_name,
            field.default
            if field.default_factory is msgspec.NODEFAULT
            else field.default_factory(),
        )
        for field in fields
    )


def to_toml(spec: Spec) -> str:
    """The text of a spec; nothing that is at its default."""
    import tomli_w  # few commands write TOML

    return tomli_w.dumps(to_plain(spec))


def to_json(value: Struct) -> str:
    """A spec, or a part of one, as JSON."""
    return msgspec.json.encode(msgspec.to_builtins(value, enc_hook=_plain)).decode()


def _plain(value: object) -> object:
    return int(value) if isinstance(value, Size) else str(value)
