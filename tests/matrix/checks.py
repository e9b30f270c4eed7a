# SPDX-License-Identifier: GPL-2.0-or-later
"""What must hold, whoever started and however it ended."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lab import vfio
from lab.vfio import Event, get, links, refusal

Make = Callable[[int], list[str]]


def online(uuids: list[str]) -> set[str]:
    """States of some mdevs; nothing where the driver does not tell."""
    return {get(uuid, "online") for uuid in uuids if Path(vfio.MDEVS, uuid, "online").exists()}


def history(uuid: str, since: int) -> dict[str, Event]:
    """The first event of each kind of an mdev."""
    found: dict[str, Event] = {}
    for event in vfio.events(since):
        if event.uuid == uuid:
            found.setdefault(event.event, event)
    return found


def started_before_opened(uuids: list[str], since: int, *, as_group: bool) -> set[int]:
    """The whole group was online before any member was open, and every open before its access.

    :return: The processes that started it.
    """
    found = [history(uuid, since) for uuid in uuids]
    for one in found:
        assert one["opened"].sequence < one["accessed"].sequence
        assert one["started"].sequence < one["opened"].sequence
        assert one["accessed"].value == 1, "accessed while offline"
    if as_group:
        last = max(one["started"].sequence for one in found)
        assert last < min(one["opened"].sequence for one in found)
    opened = [one["opened"].sequence for one in found]
    assert opened == sorted(opened), "opened in another order than asked for"
    return {one["started"].pid for one in found}


def closed_before_stopped(uuids: list[str], since: int, *, as_group: bool) -> None:
    """Each was closed and stopped once, and none was stopped while a member was open."""
    log = vfio.events(since)
    for uuid in uuids:
        names = [event.event for event in log if event.uuid == uuid]
        assert [names.count(name) for name in ("started", "stopped")] == [1, 1], names
    found = [history(uuid, since) for uuid in uuids]
    for one in found:
        assert one["closed"].sequence < one["stopped"].sequence
    if as_group:
        last = max(one["closed"].sequence for one in found)
        assert last < min(one["stopped"].sequence for one in found)


def given_back(uuids: list[str], total: int) -> None:
    """Offline, every link free, and another process can have the group."""
    assert online(uuids) <= {"0"}
    assert links() == total
    owned = Path(vfio.MDEVS, uuids[0], "group_owner").exists()
    if owned:
        assert {get(uuid, "group_owner") for uuid in uuids} == {"0"}
    explicit = Path("/sys/module/mvgpu/parameters/implicit_start").read_text().strip() == "N"
    if explicit:
        vfio.put(uuids[0], "online", "1")
    assert not refusal(*uuids)
    if explicit:
        vfio.put(uuids[0], "online", "0")
    assert online(uuids) <= {"0"}
    assert links() == total
