# SPDX-License-Identifier: GPL-2.0-or-later
"""A spec together with the lines of its keys."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from msgspec import Struct, field

from mdev_orchestrator.errors import RequestError
from mdev_orchestrator.spec import messages
from mdev_orchestrator.spec.messages import Place
from mdev_orchestrator.spec.structures import NAME_PATTERN, Spec


class Document(Struct, frozen=True):
    """A spec and where its words stand.

    :ivar source: What messages call the file.
    :ivar lines: The line of each key; of what is not there the nearest key around it counts.
    """

    spec: Spec
    source: str
    lines: Mapping[Place, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What the spec is called: its own name, or that of its file.

        :raise RequestError: Neither gives it a name.
        """
        stem = self.spec.name or Path(self.source).stem
        if re.match(NAME_PATTERN, stem) is None:
            raise self.fault((), "the spec has no name", 'add name = "…" as its first line')
        return stem

    def fault(self, place: Place, message: str, hint: str = "") -> RequestError:
        """The error for something that is wrong with a key, to be raised by the caller."""
        return messages.fault(self.source, self.lines, place, message, hint)
