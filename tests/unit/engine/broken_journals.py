# SPDX-License-Identifier: GPL-2.0-or-later
"""Ways in which a journal cannot be written while a block runs."""

from __future__ import annotations

import os
import resource
import signal
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager

from mdev_orchestrator.machine import Machine

Breaker = Callable[[Machine], AbstractContextManager[None]]


@contextmanager
def full_disk(_: Machine) -> Iterator[None]:
    """A limit on the size of files stands in for the disk's."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@contextmanager
def read_only_mount(machine: Machine) -> Iterator[None]:
    """A state directory on a file system that is mounted for reading."""
    place = str(machine.state_dir)
    subprocess.run(["mount", "--bind", place, place], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", place], check=True)
        yield
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


@contextmanager
def read_only(machine: Machine) -> Iterator[None]:
    """A state directory that may not be written, and a user that is not root."""
    for directory in machine.state_dir.parents:
        if directory.stat().st_uid == os.geteuid():
            directory.chmod(directory.stat().st_mode | 0o055)
    for file in (machine.state_dir, *machine.state_dir.iterdir()):
        os.chown(file, 65534, 65534)
    machine.state_dir.chmod(0o500)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@contextmanager
def locked(machine: Machine) -> Iterator[None]:
    """Another process writes and does not come to its end."""
    with closing(sqlite3.connect(machine.journal_path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield
        other.execute("ROLLBACK")
