# SPDX-License-Identifier: GPL-2.0-or-later
"""A machine with a real systemd that is really booted again: what was applied comes back, once.

The tests are a story: each goes on with the machine as the one before has left it. What they look
at is sysfs and the process table, not what mdo says of itself.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mdev_lab import labs

ROOT = Path(__file__).resolve().parents[2]
MDO = [sys.executable, "-m", "mdev_orchestrator.cli.main"]
NAME = f"reboot-{os.getpid()}"
SERIES = os.environ.get("MDO_TEST_KERNEL", "6.12")
SECONDS = 300
"""For anything; a busy machine takes many times as long as an idle one."""

SPEC = """
[[pool]]
name = "spare"
type = "mvgpu-128M"
count = 3

[[guest]]
name = "g"
memory = "256M"
kernel = "$MDO_LAB_KERNEL"
initrd = "$MDO_LAB_INITRD"
append = "console=ttyS0 quiet panic=-1 mitigations=off tsc=reliable random.trust_cpu=on"

[[guest.mdev]]
type = "mvgpu-12"
count = 2
group = "peers"
"""

#: Every device with its parent, type and group, then every QEMU with its guest's UUID.
LOOK = r"""
cd /sys/bus/mdev/devices && for d in *; do
    [ -e "$d" ] || continue
    echo "$d $(basename "$(dirname "$(realpath "$d")")") $(basename "$(realpath "$d/mdev_type")")" \
        "$(cat "$d/group_uuid")"
done
pgrep -a qemu-system | sed 's/^[0-9]* .*-name \([^ ]*\) -uuid \([^ ]*\) .*/\1 \2/'
"""

#: The guests end at once and the devices go: nothing is left of what was applied.
LOSE = """
mdo guest stop --all --force --deadline 0
for d in /sys/bus/mdev/devices/*; do [ ! -e $d ] || echo 1 >$d/remove; done
"""


def mdo(*words: str, seconds: float = SECONDS) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*MDO, *words],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )


def inside(script: str) -> str:
    """What a script prints in L1."""
    done = mdo("lab", "exec", "--name", NAME, "--", "sh", "-ec", script)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def up(disk: Path) -> None:
    done = mdo("lab", "up", "--name", NAME, "--kernel", SERIES, "--systemd", str(disk))
    assert done.returncode == 0, done.stderr


def reboot(disk: Path) -> None:
    """Boot L1 again, and wait until systemd has nothing left to start."""
    # the command that asks for it must not be one that it ends
    inside("systemd-run --quiet --on-active=1 systemctl reboot")
    end = time.monotonic() + SECONDS
    while any(lab.name == NAME for lab in labs.find_all()):
        assert time.monotonic() < end, "L1 has not shut down"
        time.sleep(0.5)
    up(disk)
    inside("systemctl is-system-running --wait || :")


def drop_in(unit: str, text: str) -> None:
    inside(
        f"mkdir -p /etc/systemd/system/{unit}.d\n"
        f"cat >/etc/systemd/system/{unit}.d/test.conf <<'END'\n[Service]\n{text}\nEND\n"
        "systemctl daemon-reload"
    )


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reboot") / "disk"


@pytest.fixture(scope="module")
def applied(disk: Path) -> Iterator[str]:
    """A machine that a spec was applied on; what it looks like."""
    try:
        up(disk)
        inside("mdo service install")
        inside(f"cat >/root/story.toml <<END\n{SPEC}\nEND\nmdo apply /root/story.toml")
        looks = inside(LOOK)
        assert looks.count("igd0 mvgpu-128M") == 3
        assert looks.count("grid0 mvgpu-12") == 2
        assert looks.count("guest=g,") == 1
        yield looks
    finally:
        assert mdo("lab", "down", "--name", NAME).returncode == 0


def test_a_reboot(applied: str, disk: Path) -> None:
    """The guest is powered down before, and all is back afterwards."""
    console = "/var/lib/mdev-orchestrator/guests/g/console.log"
    inside(f"until grep -q '\"ready\"' {console}; do sleep 1; done")
    drop_in("mdo-guests.service", "StandardOutput=append:/var/lib/said-at-shutdown")
    reboot(disk)
    assert inside("cat /var/lib/said-at-shutdown") == "g powered down\n"
    assert inside("systemctl --failed --no-legend") == ""
    assert inside(LOOK) == applied


def test_a_storm(applied: str) -> None:
    """Several restores at the same time, amid events that tell of the parents again and again."""
    inside(LOSE)
    assert inside(LOOK) == ""
    assert "/igd0\n" in inside("udevadm trigger --dry-run --verbose --subsystem-match=mvgpu")
    starts = "journalctl -b -u mdo-restore -o cat | grep -c ^Starting"
    before = inside(starts)
    said = inside(
        """
        for n in 1 2 3; do mdo restore & done 2>/dev/null
        for n in $(seq 50); do udevadm trigger --action=change --subsystem-match=mvgpu; done
        udevadm settle
        wait
        """
    )
    assert sorted(said.splitlines()) == ["story: back, 6 steps"] + ["story: nothing to do"] * 2
    assert inside(LOOK) == applied
    assert inside(starts) == before


def test_a_driver_that_loads_late(applied: str, disk: Path) -> None:
    """It is waited for; guests that did not run at the shutdown come back too."""
    drop_in("mvgpu.service", "ExecStartPre=/bin/sleep 10")
    inside("mdo guest stop --all --force --deadline 0")
    reboot(disk)
    assert inside("systemctl --failed --no-legend") == ""
    assert inside(LOOK) == applied


def test_a_driver_that_loads_after_the_deadline(applied: str) -> None:
    """The service fails and names the parent; when that comes, it is started again."""
    mdo_path = inside("sed -n 's/^ExecStart=//p' /etc/systemd/system/mdo-restore.service").strip()
    drop_in("mdo-restore.service", f"ExecStart=\nExecStart={mdo_path} --wait 2")
    drop_in("mvgpu.service", "")
    inside(LOSE + "systemctl stop mvgpu; rmmod mvgpu")
    failed = inside("systemctl start mdo-restore && exit 1; journalctl -b -u mdo-restore -o cat")
    assert "spec story is not back after 2 s: parent grid0 has not appeared; " in failed
    assert "parent igd0 has not appeared" in failed
    inside("systemctl start mvgpu; until pgrep qemu-system; do sleep 0.5; done")
    inside("systemctl start mdo-restore")  # what udev has started has come to its end then
    assert inside(LOOK) == applied


def test_stopped_by_the_administrator(applied: str) -> None:
    """After the guests were stopped, loading the driver brings none; starting them does."""
    inside("mdo guest stop --all --force --deadline 0; systemctl stop mdo-guests")
    inside(LOSE + "systemctl stop mvgpu; rmmod mvgpu; systemctl start mvgpu; udevadm settle")
    inside("! systemctl is-active -q mdo-restore")
    assert inside(LOOK) == ""
    inside("systemctl start mdo-guests; systemctl start mdo-restore")
    assert inside(LOOK) == applied
