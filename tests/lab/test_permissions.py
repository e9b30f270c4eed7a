# SPDX-License-Identifier: GPL-2.0-or-later
"""Another user of the machine gets at nothing, and can make root's mdo believe nothing.

Runs inside the lab: ``mdo lab exec python3 -m pytest tests/lab/test_permissions.py``.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from uuid import uuid4

import msgspec
import pytest

from lab.machine import machine
from mdev_orchestrator.engine.journal import Journal
from mdev_orchestrator.qemu import process
from mdev_orchestrator.qemu.command import GuestSpec
from mdev_orchestrator.qemu.start import start_qemu
from mdev_orchestrator.qemu.stop import stop_qemu
from mdev_orchestrator.spec.sizes import Size
from mdev_orchestrator.system.processes import boot_id, start_time

pytestmark = pytest.mark.skipif("MDO_LAB" not in os.environ, reason="needs the lab's kernel")

OTHER_USER = 65534
CODE = "from mdev_orchestrator.cli.main import main; raise SystemExit(main())"
CONNECT = "import socket, sys; socket.socket(socket.AF_UNIX).connect(sys.argv[1])"
SOCKETS = ("qmp.sock", "query.sock", "watch.sock", "console.sock")


def as_other_user(*command: str) -> subprocess.CompletedProcess[str]:
    """Run a command as another user."""
    return subprocess.run(
        command, capture_output=True, text=True, check=False, user=OTHER_USER, group=OTHER_USER,
        extra_groups=[], env={"PATH": os.environ["PATH"]},
    )  # fmt: skip


@pytest.fixture
async def guest() -> AsyncIterator[process.RunningGuest]:
    """A guest that was started without a umask."""
    before = os.umask(0)
    try:
        spec = GuestSpec(
            name="g", uuid=uuid4(), memory=Size(32 << 20), hotplug_ports=0, extra=("-S",)
        )
        found = await start_qemu(machine(), spec)
        yield found
        await stop_qemu(machine(), found, deadline=0, force=True)
    finally:
        os.umask(before)


async def test_a_guests_files_are_for_its_owner_only(guest: process.RunningGuest) -> None:
    for path in (guest.directory, guest.directory.parent, machine().state_dir):
        assert (path.stat().st_uid, stat.S_IMODE(path.stat().st_mode)) == (0, 0o700)
    for name in SOCKETS:
        assert stat.S_IMODE((guest.directory / name).stat().st_mode) == 0o600
    assert as_other_user("ls", str(guest.directory)).returncode != 0
    assert as_other_user("cat", str(guest.directory / "record.json")).returncode != 0
    with Journal.open(machine().journal_path):
        pass
    assert stat.S_IMODE(machine().journal_path.stat().st_mode) == 0o600


async def test_a_socket_refuses_another_user_even_in_a_directory_that_is_open(
    guest: process.RunningGuest,
) -> None:
    opened = (guest.directory, guest.directory.parent, machine().state_dir)
    for path in opened:
        path.chmod(0o755)
    try:
        for name in SOCKETS:
            done = as_other_user("/usr/bin/python3", "-c", CONNECT, str(guest.directory / name))
            assert "PermissionError" in done.stderr, name
    finally:
        for path in opened:
            path.chmod(0o700)


@pytest.fixture
def victim() -> Iterator[tuple[int, str]]:
    """A process of root's with a -uuid on its command line, as a QEMU has one."""
    uuid = str(uuid4())
    with subprocess.Popen(["sh", "-c", "sleep 600; exit", "sh", "-uuid", uuid]) as running:
        yield running.pid, uuid
        running.kill()


def plant(place: Path, pid: int, uuid: str) -> None:
    """A state directory in which a guest is said to be that process."""
    directory = place / "guests/g"
    directory.mkdir(parents=True)
    record = {
        "name": "g", "uuid": uuid, "pid": pid, "start_time": start_time(pid),
        "boot_id": boot_id(), "created": 0, "argv": [], "mdevs": [], "memory": 1, "cpus": 1,
        "ready": True,
    }  # fmt: skip
    (directory / "record.json").write_bytes(msgspec.json.encode(record))


def mdo(place: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", CODE, *arguments],
        env={**os.environ, "MDO_STATE_DIR": str(place)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("how", ["theirs", "link", "replaceable"])
def test_a_state_directory_of_another_user_kills_nothing(
    tmp_path: Path, victim: tuple[int, str], how: str
) -> None:
    place = tmp_path / "open/state"
    place.mkdir(parents=True)
    plant(place, *victim)
    said = f"{place} belongs to user {OTHER_USER}, not to you"
    if how == "theirs":
        for path in (place, *place.rglob("*")):
            shutil.chown(path, OTHER_USER)
    elif how == "link":
        place.rename(tmp_path / "theirs")
        shutil.chown(tmp_path / "theirs", OTHER_USER)
        place.symlink_to(tmp_path / "theirs")
        said = f"{place} is not a directory"
    else:
        place.parent.chmod(0o777)
        said = f"{place.parent} can be written by others"
    for arguments in (("guest", "list"), ("guest", "stop", "--force", "g"), ("host", "--json")):
        done = mdo(place, *arguments)
        assert said in done.stderr, done.stderr
        assert done.stderr.count("\n") == 1
        assert done.returncode == (0 if arguments[0] == "host" else 5)
    assert start_time(victim[0]) is not None


def test_without_the_check_it_would_have_been_killed(
    tmp_path: Path, victim: tuple[int, str]
) -> None:
    """What root itself wrote is believed: so the test above shows the check, and nothing else."""
    place = tmp_path / "state"
    place.mkdir(mode=0o700)
    plant(place, *victim)
    assert mdo(place, "guest", "stop", "--force", "--deadline", "0", "g").returncode == 0
    assert start_time(victim[0]) is None
