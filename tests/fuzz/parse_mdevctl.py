# SPDX-License-Identifier: GPL-2.0-or-later
"""A definition of mdevctl: one file's contents."""

from uuid import UUID

from fuzz import harness
from mdev_orchestrator.errors import MdoError
from mdev_orchestrator.interop import mdevctl
from mdev_orchestrator.model import Host
from mdev_orchestrator.spec import Document

UUID_ = UUID("0f0f9c0e-6f2c-4a5e-8d5b-0a5a1d3a9a11")
PARENT = "0000:86:00.0"


def one(data: bytes) -> None:
    try:
        found = mdevctl.from_json(UUID_, PARENT, data)
    except ValueError as error:  # what the function says: its caller makes a Damage of it
        str(error).encode()
        return
    again = mdevctl.to_json(found).encode()
    assert mdevctl.from_json(UUID_, PARENT, again) == found, again
    assert mdevctl.to_json(mdevctl.from_json(UUID_, PARENT, again)).encode() == again
    mdevctl.dump([found])
    spec, faults = mdevctl.to_spec([found])
    for fault in faults:
        harness.check_message(fault)
    if not faults:
        assert mdevctl.of_spec(Document(spec, "spec"), Host()) == (found,)
    try:
        mdevctl.complete(Document(spec, "spec"), {UUID_: [found]}, Host())
    except MdoError as error:
        harness.check_message(error)
