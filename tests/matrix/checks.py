# SPDX-License-Identifier: GPL-2.0-or-later
"""What must hold, whichever program started and however it ended. The driver's log is the proof."""

from __future__ import annotations

from pathlib import Path

from lab import vfio
from lab.vfio import Event, get, links, refusal


def has(uuid: str, name: str) -> bool:
    """Whether the driver shows an attribute."""
    return (vfio.MDEVS / uuid / name).exists()


def online(uuids: list[str]) -> set[bool]:
    """States of some mdevs by the driver's log, and where it has ``online``, by that too."""
    log = vfio.events()
    states = set()
    for uuid in uuids:
        changes = [e.event for e in log if e.uuid == uuid and e.event in {"started", "stopped"}]
        state = changes[-1:] == ["started"]
        if has(uuid, "online"):
            assert get(uuid, "online") == str(int(state)), f"{uuid}: {changes}"
        states.add(state)
    return states


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
        assert one["opened"].sequence < one["accessed"].sequence, one
        assert one["started"].sequence < one["opened"].sequence, one
        assert one["accessed"].value == 1, f"accessed while offline: {one}"
    if as_group:
        last = max(one["started"].sequence for one in found)
        assert last < min(one["opened"].sequence for one in found), found
    opened = [one["opened"].sequence for one in found]
    assert opened == sorted(opened), f"opened in another order than asked for: {found}"
    return {one["started"].pid for one in found}


def closed_before_stopped(uuids: list[str], since: int, *, as_group: bool) -> None:
    """Each was closed and stopped once, and none was stopped while a member was open."""
    log = vfio.events(since)
    for uuid in uuids:
        names = [event.event for event in log if event.uuid == uuid]
        assert [names.count(name) for name in ("started", "stopped")] == [1, 1], names
    found = [history(uuid, since) for uuid in uuids]
    for one in found:
        assert one["closed"].sequence < one["stopped"].sequence, one
    if as_group:
        last = max(one["closed"].sequence for one in found)
        assert last < min(one["stopped"].sequence for one in found), found


def given_back(uuids: list[str], total: int) -> None:
    """Offline, every link free, and another process can have the group."""

    def is_free() -> None:
        assert online(uuids) == {False}
        assert links() == total, f"{links()} of {total} links are free"

    is_free()
    if has(uuids[0], "group_owner"):
        assert {get(uuid, "group_owner") for uuid in uuids} == {"0"}
    explicit = Path("/sys/module/mvgpu/parameters/implicit_start").read_text().strip() == "N"
    if explicit:
        vfio.put(uuids[0], "online", "1")
    assert not refusal(*uuids), "another process cannot have it"
    if explicit:
        vfio.put(uuids[0], "online", "0")
    is_free()
