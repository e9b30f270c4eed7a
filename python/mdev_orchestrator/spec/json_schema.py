# SPDX-License-Identifier: GPL-2.0-or-later
"""The JSON Schema of a spec, for editors and other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from mdev_orchestrator.spec.conditions import Condition
from mdev_orchestrator.spec.sizes import Size
from mdev_orchestrator.spec.structures import Spec


def schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a spec."""

    def hook(type_: type) -> dict[str, Any]:
        if type_ is Path:
            return {"type": "string", "minLength": 1}
        if issubclass(type_, Condition):
            return dict(type_.json_schema())
        return dict(Size.json_schema)

    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "What mdo plan and mdo apply read",
        **msgspec.json.schema(Spec, schema_hook=hook),
    }


def schema_text() -> str:
    """The contents of ``docs/spec.schema.json``."""
    return msgspec.json.format(msgspec.json.encode(schema()), indent=2).decode() + "\n"
