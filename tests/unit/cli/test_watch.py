# SPDX-License-Identifier: GPL-2.0-or-later
"""What ``mdo watch`` prints of an event."""

from __future__ import annotations

from uuid import UUID

from mdev_orchestrator.cli.watch import line, shape
from mdev_orchestrator.host.events import MdevEvent

U1 = UUID("83b8f4f2-509f-382f-3c1e-e6bfe0fa1001")


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
