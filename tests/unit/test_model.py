# SPDX-License-Identifier: GPL-2.0-or-later
"""Names of start groups."""

from __future__ import annotations

from uuid import UUID

from mdev_orchestrator.model import group_names, group_uuid

GIVEN = UUID("aaaaaaaa-1111-4222-8333-444444444444")
RANDOM = UUID("bbbbbbbb-1111-4222-8333-444444444444")


def test_a_group_that_was_given_by_name_is_found_by_its_uuid() -> None:
    """``mdo create --group peers`` makes the UUID of the name; a spec's group has a random one."""
    peers = group_uuid("peers")
    records = [
        (peers, "peers"),
        (RANDOM, "render"),
        (RANDOM, "render"),
        (GIVEN, str(GIVEN)),
        (None, None),
        (UUID(int=1), None),
    ]
    assert group_names(records) == {peers: "peers", RANDOM: "render"}
