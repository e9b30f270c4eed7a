# SPDX-License-Identifier: GPL-2.0-or-later
"""What ``mdo watch`` prints of an event."""

from __future__ import annotations

import gc
from uuid import UUID

import pytest

from mdev_orchestrator.cli import main, watch
from mdev_orchestrator.cli.watch import line, shape
from mdev_orchestrator.host.events import MdevEvent
from mdev_orchestrator.qemu.events import StateChange, Unwatched, Watched

U1 = UUID("83b8f4f2-509f-382f-3c1e-e6bfe0fa1001")
GROUP = UUID("83b8f4f2-509f-382f-3c1e-e6bfe0fa10ff")


def test_a_change_of_state() -> None:
    event = MdevEvent("change", U1, "grid0", "online")
    assert shape(event) == {
        "event": "mdev",
        "action": "change",
        "uuid": str(U1),
        "parent": "grid0",
        "state": "online",
    }
    assert line(event) == f"mdev    change  {U1}  grid0  online"


def test_an_event_without_a_state_has_no_such_member() -> None:
    assert "state" not in shape(MdevEvent("add", U1, "grid0"))


def test_what_qemu_reports() -> None:
    event = StateChange("g", U1, "igd0", GROUP, "offline", "online")
    assert shape(event) == {
        "event": "guest",
        "action": "change",
        "guest": "g",
        "uuid": str(U1),
        "parent": "igd0",
        "old_state": "offline",
        "state": "online",
        "group_uuid": str(GROUP),
    }
    assert line(event) == f"guest   change  g  {U1}  igd0  offline  online  {GROUP}"


def test_a_start_that_was_refused_has_a_reason_and_a_group_of_its_own_no_uuid() -> None:
    result = shape(StateChange("g", U1, "igd0", None, "offline", "offline", "no link left"))
    assert result["reason"] == "no link left"
    assert "group_uuid" not in result


def test_a_guest_that_is_watched_and_no_more() -> None:
    assert line(Watched("g")) == "guest   watched  g"
    assert line(Unwatched("g")) == "guest   unwatched  g"


def test_it_runs_for_long_and_collects_garbage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other commands never do: it takes as long as some of them."""
    before = gc.get_threshold()
    gc.set_threshold(main.GARBAGE)
    try:
        monkeypatch.setattr(watch, "run", lambda _: None)
        watch.watch()
        assert gc.get_threshold() <= before
    finally:
        gc.set_threshold(*before)
