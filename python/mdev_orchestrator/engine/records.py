# SPDX-License-Identifier: GPL-2.0-or-later
"""What the journal keeps of each managed device, guest and spec. Frozen values, no I/O."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal
from uuid import UUID

import msgspec
from msgspec import Struct, field


class DeviceRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A managed mdev: all that is needed to create it again as it is.

    :ivar spec: Name of the spec that asked for it; ``None`` for one made by ``mdo create``.
    :ivar owner: ``guest:NAME`` or ``pool:NAME``; empty for neither.
    :ivar label: The start group's name, as a spec or ``mdo create --group`` gave it.
    :ivar group: UUID of the start group that it was put into.
    :ivar params: The vendor's parameters, written to whichever file the driver has for them.
    :ivar attributes: Further files of it and what was written there, in order; ``group_uuid`` may
        be among them and is then written in its turn, else last.
    :ivar want: The request as the spec had it, to recognise it.
    :ivar adopted: It was found and adopted: a spec that asks for such a device may take it.
    """

    uuid: UUID
    parent: str
    type: str
    spec: str | None = None
    owner: str = ""
    label: str | None = None
    group: UUID | None = None
    params: str = ""
    attributes: tuple[tuple[str, str], ...] = ()
    want: str = ""
    adopted: bool = False


class GuestRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A managed guest.

    :ivar definition: The spec's ``guest`` without its devices, as JSON text.
    :ivar devices: The mdevs that it has from its spec.
    """

    name: str
    uuid: UUID
    spec: str | None = None
    definition: str = "{}"
    devices: tuple[UUID, ...] = ()


class SpecRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A spec that was applied.

    :ivar text: All of it, as JSON, with absolute paths.
    :ivar source: The file that it was read from.
    :ivar applied: Seconds since the epoch.
    """

    name: str
    text: str
    source: str
    applied: float
    policy: Literal["pack", "spread"] = "pack"


class Managed(Struct, frozen=True):
    """All that is managed here, by name."""

    devices: Mapping[UUID, DeviceRecord] = field(default_factory=dict)
    guests: Mapping[str, GuestRecord] = field(default_factory=dict)
    specs: Mapping[str, SpecRecord] = field(default_factory=dict)


class Change(Struct, frozen=True):
    """Records that a step adds or replaces; ``None`` for a record that it deletes."""

    @classmethod
    def merged(cls, changes: Iterable[Change]) -> Change:
        """All changes in one; a later change of the same record wins."""
        devices: dict[UUID, DeviceRecord | None] = {}
        guests: dict[str, GuestRecord | None] = {}
        for change in changes:
            devices |= change.devices
            guests |= change.guests
        return cls(devices, guests)

    devices: Mapping[UUID, DeviceRecord | None] = field(default_factory=dict)
    guests: Mapping[str, GuestRecord | None] = field(default_factory=dict)
