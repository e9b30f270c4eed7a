# SPDX-License-Identifier: GPL-2.0-or-later
"""An L1 whose first process is the host's systemd, on a disk that survives a reboot.

The usual L1 forgets everything when it ends, and its first process is the agent. This one is for
tests of what a host does when it shuts down and boots: the disk is the upper layer of L1's root, so
that all that is written in L1 is there again when it is brought up with the same disk.
``systemctl reboot`` ends the lab, and ``up`` boots it again. QEMU could reset the machine itself,
but under TCG the boot after a reset was seen to stand still for minutes.

Only systemd, its journal and udev, the driver and the agent run, and none of the host's services.
So the machine is the same on every host, and it is up in seconds. ``mvgpu.service`` loads the
driver and ``lab.service`` is the agent; a test that needs other ones writes a drop-in.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from mdev_orchestrator.host.service import words
from mdev_orchestrator.system.children import run

DISK_SIZE = "2G"
"""Of a sparse file: blocks that are never written take no room."""
MODULES = ("virtio_blk", "ext4")
INIT = "/usr/lib/systemd/systemd"
STATE = "/var/lib/mdev-orchestrator"
"""The state directory of commands in L1, on the disk."""

#: What systemd is told so that it does not look for disks and terminals.
COMMAND_LINE = "systemd.unit=multi-user.target systemd.show_status=0 systemd.firstboot=0"

_SYSINIT = ("systemd-journald.service", "systemd-udevd.service")
_SOCKETS = (
    "systemd-journald-dev-log.socket",
    "systemd-journald.socket",
    "systemd-udevd-control.socket",
    "systemd-udevd-kernel.socket",
)
_AGENT = """\
[Unit]
Description=Commands from the host

[Service]
ExecStart=/bin/sh /run/lab-agent
"""
_DRIVER = """\
[Unit]
Description=The driver of the mediated devices
DefaultDependencies=no
After=systemd-udevd.service

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart={}
"""


def make_disk(path: Path) -> Path:
    """Make a file with an empty file system for the upper layer of L1's root, unless it exists.

    :return: The absolute path.
    :raise MdoError: It cannot be made.
    """
    if not path.exists():
        run(["/sbin/mke2fs", "-q", "-t", "ext4", path, DISK_SIZE])
    return path.absolute()


def arguments(disk: Path) -> list[str]:
    """Return QEMU's arguments for the disk."""
    name = str(disk).replace(",", ",,")
    drive = f"if=none,id=disk,format=raw,file={name},cache=unsafe"
    return ["-drive", drive, "-device", "virtio-blk-pci,drive=disk"]


def prepare(agent: Sequence[str], insmod: Sequence[str]) -> str:
    """Return the part of ``/init`` that prepares the root in ``/new`` for systemd.

    :param agent: Command line of the agent.
    :param insmod: Command line that loads the driver.
    """
    units, wants = "/new/run/systemd/system", "multi-user.target.wants"
    lib = "/new/usr/lib/systemd"
    links = [(name, "sysinit.target.wants") for name in _SYSINIT]
    links += [(name, "sockets.target.wants") for name in _SOCKETS]
    first = [
        f"b rm -rf /new/etc/systemd/system {lib}/system/*.wants {lib}/system-generators",
        f"b mkdir -p /new/etc/systemd/system {lib}/system/sysinit.target.wants",
        f"b mkdir {lib}/system/sockets.target.wants",
        *(f"b ln -s ../{name} {lib}/system/{place}/" for name, place in links),
        "b tr -d - </new/proc/sys/kernel/random/uuid >/new/etc/machine-id",
        "b rm -f /new/.dockerenv",  # systemd would take the machine for a container
        "b touch /memory/made",
    ]
    lines = [
        "if ! [ -e /memory/made ]; then",
        *(f"    {line}" for line in first),
        "fi",
        f"b mkdir -p {units}/{wants}",
        _write("/new/run/lab-agent", f"exec {shlex.join(agent)}\n"),
        _write(f"{units}/lab.service", _AGENT),
        _write(f"{units}/mvgpu.service", _DRIVER.format(words(insmod))),
        *(f"b ln -s ../{name}.service {units}/{wants}/" for name in ("lab", "mvgpu")),
    ]
    return "\n".join(lines) + "\n"


def _write(path: str, text: str) -> str:
    return f"b cat >{path} <<'END'\n{text}END"
