# SPDX-License-Identifier: GPL-2.0-or-later
"""libvirt in a lab, without systemd: for what is compared with it, and for tests beside it."""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path

from mdev_orchestrator.errors import DeadlineError, HostError

PROGRAMS = ("virtlogd", "libvirtd")
START_SECONDS = 1800
"""Nothing is measured by it, and a busy machine is slow."""
_PATH = "/usr/sbin:/usr/bin"
_started: list[subprocess.Popen[bytes]] = []
"""They run on: without a reference Python would complain of each."""
_CONFIGURATION = """\
security_driver = "none"
user = "root"
group = "root"
cgroup_controllers = []
namespaces = []
remember_owner = 0
"""


def is_installed() -> bool:
    """Whether its programs are here; ``tools/setup libvirt`` installs them."""
    return all(shutil.which(name, path=_PATH) for name in (*PROGRAMS, "virsh"))


def start(place: Path) -> subprocess.Popen[bytes]:
    """Start ``virtlogd``, if it does not run, and ``libvirtd``; gives the latter. They end with L1.

    :param place: Directory for what they print.
    :raise DeadlineError: It does not answer, or has ended.
    """
    if not is_installed():
        raise HostError("libvirt is not there", "tools/setup libvirt installs it")
    Path("/etc/libvirt").mkdir(exist_ok=True)
    Path("/etc/libvirt/qemu.conf").write_text(_CONFIGURATION)
    # it wants the user of its Debian package, though it uses another
    for file, line in (("passwd", "64055:64055::/:/bin/false"), ("group", "64055:")):
        if "libvirt-qemu" not in (path := Path("/etc", file)).read_text():
            path.write_text(f"{path.read_text()}libvirt-qemu:x:{line}\n")
    if not _started:
        _started.append(_run(place, "virtlogd"))
    libvirtd = _run(place, "libvirtd", "--timeout", "0")
    _started.append(libvirtd)
    end = time.monotonic() + START_SECONDS
    while subprocess.run(["virsh", "version"], check=False, capture_output=True).returncode:
        if libvirtd.poll() is not None or time.monotonic() > end:
            raise DeadlineError((place / "libvirtd.log").read_text())
        time.sleep(0.2)
    return libvirtd


def _run(place: Path, name: str, *words: str) -> subprocess.Popen[bytes]:
    with (place / f"{name}.log").open("wb") as log:
        return subprocess.Popen([f"/usr/sbin/{name}", *words], stdout=log, stderr=log)
