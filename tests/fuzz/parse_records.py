# SPDX-License-Identifier: GPL-2.0-or-later
"""Files that earlier commands left: a guest's record and start groups, what was learned, labs."""

import asyncio
import shutil

import msgspec

from fuzz import harness
from mdev_lab import labs
from mdev_orchestrator.cli.guest import guest_shape
from mdev_orchestrator.engine import model_cache, start_groups
from mdev_orchestrator.errors import MdoError
from mdev_orchestrator.machine import Machine
from mdev_orchestrator.model import Host
from mdev_orchestrator.qemu import features, process
from mdev_orchestrator.qemu.log import qemu_words
from mdev_orchestrator.qemu.status import Report

PLACE = harness.scratch()
GUEST = PLACE / "guests/a"
LAB = PLACE / "labs/b"
STARTED = "started/5b1d0f3e-3a43-4a8a-9a65-6f8a4b8f7c22.json"
FILES = {
    "record": GUEST / "record.json",
    "started": GUEST / STARTED,
    "log": GUEST / "qemu.log",
    "models": PLACE / "models.json",
    "properties": PLACE / "qemu-properties.json",
    "lab": LAB / "lab.json",
    "starter": LAB / "starter",
}


def one(data: bytes) -> None:
    """The input: records, each the contents of one of FILES."""
    for directory in (GUEST / "started", LAB):
        directory.mkdir(parents=True, mode=0o700)
    try:
        for name, text in harness.records(data):
            if name in FILES:
                FILES[name].write_bytes(text)
        with harness.at_home(PLACE):
            _read()
    finally:
        for entry in PLACE.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def _read() -> None:
    machine = Machine(PLACE, state=PLACE)  # it has no mdevs
    features._read()
    model_cache.load(machine)
    harness.check_shown([qemu_words(GUEST / "qemu.log")])
    for guest in process.list_guests(machine):
        msgspec.json.encode(guest_shape(Report(guest, damage=guest.damage), Host(), {}))
        if guest.record is not None:
            written = msgspec.json.encode(guest.record)
            assert msgspec.json.decode(written, type=process.ProcessRecord) == guest.record
    try:
        labs.lookup("b")
    except MdoError as error:
        harness.check_message(error)
    asyncio.run(start_groups.reclaim_groups(machine))
