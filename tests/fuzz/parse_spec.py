# SPDX-License-Identifier: GPL-2.0-or-later
"""What a user asks for: a spec in TOML or JSON."""

from fuzz import harness
from mdev_orchestrator import spec
from mdev_orchestrator.errors import MdoError


def one(data: bytes) -> None:
    try:
        document = spec.parse(data, "spec.toml")
    except MdoError as error:
        harness.check_message(error)
        return
    assert all(1 <= line <= data.count(b"\n") + 1 for line in document.lines.values())
    written = spec.to_toml(document.spec)
    assert spec.parse(written).spec == document.spec, written
    assert spec.parse(spec.to_json(document.spec), kind="json").spec == document.spec
    assert spec.check(document.spec).spec == document.spec
    for guest in document.spec.guests:
        assert spec.read_guest(spec.to_json(guest)) == guest
