# SPDX-License-Identifier: GPL-2.0-or-later
"""What the campaigns ask for. Beside the foreign devices it fits exactly as it is meant to.

No guest's processor is ever started: their firmware would only take time. A port without power
lets a device go without asking the guest, so what was plugged in can be unplugged again (see
``pcie_cap_slot_unplug_request_cb`` in QEMU's hw/pci/pcie.c); ACPI would ask.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

EXTRA = ["-S", "-global", "ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off"]

Spec = dict[str, Any]


def guest(name: str, *mdevs: Spec, **more: object) -> Spec:
    """A guest that never runs a line of its own."""
    return {"name": name, "memory": "16M", "extra": EXTRA, "mdev": list(mdevs)} | more


def write(path: Path, *guests: Spec, pools: tuple[Spec, ...] = (), name: str = "one") -> str:
    """A spec as a file; the path of it."""
    path.write_text(json.dumps({"name": name, "guest": list(guests), "pool": list(pools)}))
    return str(path)


def three(place: Path) -> str:
    """Three guests, seven devices, two groups."""
    return write(
        place / "three.json",
        guest("one", {"type": "mvgpu-128M", "count": 3, "group": "peers"}),
        guest("two", {"type": "mvgpu-12", "count": 2, "group": "pair"}),
        guest("three", {"type": "mvgpu-12"}, {"type": "mvgpu-256M"}),
    )


PEERS = "aaaaaaaa-0000-4000-8000-000000000001"
PAIR = "aaaaaaaa-0000-4000-8000-000000000002"
KNOWN = {
    name: [f"bbbbbbbb-0000-4000-8000-{number:06}{index:06}" for index in range(count)]
    for number, (name, count) in enumerate({"one": 3, "two": 2, "three": 2}.items(), 1)
}
"""Devices of :func:`known`, by their guest."""


def known(place: Path, **changes: Spec) -> str:
    """Like :func:`three`, under UUIDs that a fault can be told of.

    :param changes: Further keys of a guest, by its name.
    """
    one, two, three = KNOWN["one"], KNOWN["two"], KNOWN["three"]
    kinds = (
        ("one", [{"type": "mvgpu-128M", "uuid": uuid, "group": PEERS} for uuid in one]),
        ("two", [{"type": "mvgpu-12", "uuid": uuid, "group": PAIR} for uuid in two]),
        (
            "three",
            [{"type": "mvgpu-12", "uuid": three[0]}, {"type": "mvgpu-256M", "uuid": three[1]}],
        ),
    )
    guests = [guest(name, *mdevs, **changes.get(name, {})) for name, mdevs in kinds]
    return write(place / "known.json", *guests)


def plain(place: Path) -> str:
    """Before the first change: a device less than :func:`before`."""
    return write(
        place / "plain.json",
        guest("hot", {"type": "mvgpu-128M"}),
        guest("other", {"type": "mvgpu-12"}),
        pools=({"name": "spare", "type": "mvgpu-12"},),
    )


def before(place: Path) -> str:
    """What is to be changed: the guest has one device more, which was plugged in."""
    return write(
        place / "before.json",
        guest("hot", {"type": "mvgpu-128M"}, {"type": "mvgpu-256M"}),
        guest("other", {"type": "mvgpu-12"}),
        pools=({"name": "spare", "type": "mvgpu-12"},),
    )


def changed(place: Path) -> str:
    """The change: one device is detached, two are attached; a guest and a group are new."""
    return write(
        place / "changed.json",
        guest(
            "hot",
            {"type": "mvgpu-128M"},
            {"type": "mvgpu-12", "params": "frame_rate_limiter=0"},
            {"type": "mvgpu-12"},
        ),
        guest("other", {"type": "mvgpu-12"}),
        guest("new", {"type": "mvgpu-12", "count": 2, "group": "pair"}),
        pools=({"name": "more", "type": "mvgpu-128M"},),
    )
