# SPDX-License-Identifier: GPL-2.0-or-later
"""The kernel's parents, asked by bare writes: of mvgpu, and of the kernel's three samples.

The samples are there where ``MDO_LAB_SAMPLES`` names their directory.
"""

from __future__ import annotations

import errno
import os
import random
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from lab import vfio
from mdev_orchestrator.host import sysfs
from mdev_orchestrator.machine import Machine
from unit.capacity.drivers import Texts

SAMPLES = os.environ.get("MDO_LAB_SAMPLES")
DRIVERS = ("mtty", "mdpy", "mbochs") if SAMPLES else ()
FULL = {errno.ENOSPC, errno.EUSERS}


@contextmanager
def all_drivers(**parameters: int) -> Iterator[None]:
    """mvgpu with these parameters, and the samples."""
    with vfio.loaded(**parameters):
        for name in DRIVERS:
            subprocess.run(["insmod", Path(SAMPLES or "") / f"{name}.ko"], check=True)
        try:
            yield
        finally:
            for name in DRIVERS:
                subprocess.run(["rmmod", name], check=True)


class Parent:
    """One of the kernel's, in the shape of :class:`unit.capacity.cases.Parent`."""

    def __init__(self, name: str) -> None:
        (found,) = (parent for parent in sysfs.read_host(Machine()).parents if parent.name == name)
        self.name = name
        self.texts: dict[str, Texts] = {
            type_.id: (type_.name, type_.description, type_.attributes) for type_ in found.types
        }
        self.directory = vfio.PARENTS / name / "mdev_supported_types"
        self.devices: list[tuple[str, str]] = []
        self.said = {frozenset(): self.counts()}

    @property
    def used(self) -> Counter[str]:
        return Counter(type_ for _, type_ in self.devices)

    def counts(self) -> dict[str, int]:
        return {
            type_: int((self.directory / type_ / "available_instances").read_text())
            for type_ in self.texts
        }

    def create(self, type_: str) -> bool:
        uuid = str(uuid4())
        try:
            vfio.poke(self.directory / type_ / "create", uuid)
        except OSError as error:
            if error.errno not in FULL:
                raise
            return False
        self.devices.append((uuid, type_))
        self.said.setdefault(frozenset(self.used.items()), self.counts())
        return True

    def remove(self, uuid: str) -> None:
        """Remove a device, and wait until the driver counts as it did before such a one was made.

        The core gives an instance back when the last reference goes, which may be a moment later.
        """
        vfio.poke(vfio.MDEVS / uuid / "remove", "1")
        self.devices = [device for device in self.devices if device[0] != uuid]
        expected = self.said.get(frozenset(self.used.items()))
        deadline = time.monotonic() + 5
        while expected is not None and (counts := self.counts()) != expected:
            assert time.monotonic() < deadline, (self.name, self.used, counts, expected)
            time.sleep(0.001)

    def become(self, used: Counter[str]) -> None:
        """Have just so many devices of each type."""
        for uuid, type_ in reversed(self.devices):
            if self.used[type_] > used[type_]:
                self.remove(uuid)
        for type_, count in (used - self.used).items():
            for _ in range(count):
                assert self.create(type_), "what fitted in one order does not in another"

    def left(self, used: Counter[str], type_: str) -> int:
        """Whether it takes one more, found out by asking for it."""
        self.become(used)
        taken = self.create(type_)
        if taken:
            self.remove(self.devices[-1][0])
        return int(taken)

    def occupy(self, rng: random.Random) -> None:
        """Create some devices, up to all that fit, and remove a few of them."""
        types = sorted(self.texts)
        for _ in range(rng.choice([0, 1, 3, 6, 12])):
            if not self.create(rng.choice(types)):
                types = [type_ for type_, left in self.counts().items() if left]
                if not types:
                    break
        for uuid, _ in rng.sample(self.devices, min(len(self.devices), rng.randrange(4))):
            self.remove(uuid)
