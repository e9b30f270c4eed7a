# SPDX-License-Identifier: GPL-2.0-or-later
"""An L1 with systemd, as far as it can be seen from outside: tests/reboot boots one."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from mdev_lab import kernels, l1, systemd

KERNEL = kernels.Kernel("6.12", "6.12.1-amd64", Path("/odd place/a,b"))


@pytest.mark.parametrize("with_systemd", [False, True])
def test_init_is_a_script(with_systemd: bool) -> None:
    script = l1.init_script(KERNEL, ["insmod", "/odd $place/m.ko"], with_systemd=with_systemd)
    done = subprocess.run(["sh", "-n"], input=script, text=True, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    first = script.splitlines()[-1]
    assert first.startswith("exec /bin/busybox switch_root /new ")
    assert first.endswith(systemd.INIT) is with_systemd
    assert ("/dev/vda" in script) is with_systemd
    assert ("ExecStart=insmod" in script) is with_systemd


def test_an_odd_path_of_the_driver() -> None:
    script = systemd.prepare(["agent"], ["insmod", "/odd $place/50%/m.ko"])
    assert 'ExecStart=insmod "/odd $$place/50%%/m.ko"\n' in script


def test_the_disk_is_sparse_and_made_once(tmp_path: Path) -> None:
    disk = systemd.make_disk(tmp_path / "disk")
    status = disk.stat()
    assert status.st_size == 2 << 30
    assert status.st_blocks * 512 < 100 << 20
    assert systemd.make_disk(disk).stat().st_mtime_ns == status.st_mtime_ns
