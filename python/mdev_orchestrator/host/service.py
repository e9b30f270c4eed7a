# SPDX-License-Identifier: GPL-2.0-or-later
"""The units of systemd and the rule of udev by which guests end with the machine and come back.

``mdo-guests.service``
    is active from boot to shutdown. Stopping it powers every guest down, before the network and
    remote file systems go; starting it wants the other one.
``mdo-restore.service``
    brings back what was applied, and waits for the parents that it needs. It does not remain
    active, so it can be started again.
``90-mdo.rules``
    starts it when a parent appears, however late. systemd ignores a start while the service runs,
    so a hundred parents that appear at once are one process, which handles all of them.

The rule reacts when a parent registers with the mdev core, or is there with its types when udev
adds it, since a driver may be loaded before udev is. A ``change`` that an administrator triggers is
neither: systemd would start the service for each, and bring back what was stopped. When
``mdo-guests.service`` is stopped, no guest comes back because a driver is loaded.

A guest does not end with the session or the service that started it: it has a :func:`scope` of its
own, which a shutdown ends after ``mdo-guests.service``.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence

from mdev_orchestrator.errors import HostError
from mdev_orchestrator.machine import Machine
from mdev_orchestrator.system.files import write_atomic

GUESTS = "mdo-guests.service"
RESTORE = "mdo-restore.service"
UNITS = "etc/systemd/system"
RULES = "etc/udev/rules.d/90-mdo.rules"
WANTED = f"{UNITS}/multi-user.target.wants/{GUESTS}"
BOOTED = "run/systemd/system"
"""Is there when systemd is the first process; sd_booted(3)."""
POWERDOWN_SECONDS = 60
"""For all guests; those that do not power down are ended then."""
_SLACK = 30
"""More, until systemd ends what should have ended guests: killing takes its time too."""

_GUESTS = """\
[Unit]
Description=Guests of mdo: brought back at boot, powered down before shutdown
Wants={restore}
After=network.target remote-fs.target nvidia-vgpud.service nvidia-vgpu-mgr.service

[Service]
Type=oneshot
RemainAfterExit=yes
KillMode=process
TimeoutStopSec={timeout}
{environment}ExecStop={mdo} guest stop --all --force --deadline {deadline}

[Install]
WantedBy=multi-user.target
"""
_RESTORE = """\
[Unit]
Description=Bring back the devices and guests that mdo had applied
Requisite={guests}
After={guests} systemd-modules-load.service
StartLimitIntervalSec=0

[Service]
Type=oneshot
KillMode=process
TimeoutStopSec={timeout}
{environment}ExecStart={mdo} restore
"""
_RULES = """\
# A parent of mediated devices has registered, or had before udev began, and is added now.
ACTION=="change", ENV{{MDEV_STATE}}=="registered", GOTO="mdo_parent"
ACTION=="add", TEST=="mdev_supported_types", GOTO="mdo_parent"
# Its driver has let go of it: if it takes it again, that is news to systemd.
ACTION=="change", ENV{{MDEV_STATE}}=="unregistered", TAG+="systemd", ENV{{SYSTEMD_READY}}="0"
GOTO="mdo_end"
LABEL="mdo_parent"
TAG+="systemd", ENV{{SYSTEMD_WANTS}}+="{restore}"
LABEL="mdo_end"
"""


def files(mdo: Sequence[str], environment: Mapping[str, str]) -> dict[str, str]:
    """The files to install: their content by their path below the root.

    :param mdo: The command that runs ``mdo``, with an absolute path.
    :param environment: Variables to set in its environment.
    """
    values = {
        "mdo": words(mdo),
        "environment": "".join(
            f"Environment={_word(f'{name}={value}')}\n" for name, value in environment.items()
        ),
        "guests": GUESTS,
        "restore": RESTORE,
        "deadline": POWERDOWN_SECONDS,
        "timeout": POWERDOWN_SECONDS + _SLACK,
    }
    texts = {f"{UNITS}/{GUESTS}": _GUESTS, f"{UNITS}/{RESTORE}": _RESTORE, RULES: _RULES}
    return {path: text.format_map(values) for path, text in texts.items()}


def words(argv: Sequence[str]) -> str:
    """A command in the syntax of units, quoted so that systemd expands nothing in it."""
    return " ".join(_word(word).replace("$", "$$") for word in argv)


def _word(text: str) -> str:
    text = text.replace("%", "%%")
    if re.fullmatch(r"[\w@%+=:,./-]+", text):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def scope(machine: Machine, guest: str) -> list[str]:
    """The words before a QEMU's command that give it a systemd scope; none if it needs none.

    Without one QEMU belongs to the session, or the service, in which it was started, and a shutdown
    kills that before ``mdo-guests.service`` has powered the guest down. The process id stays.

    :param guest: Its name, which ``systemctl status`` shows then.
    """
    if not (machine.root / BOOTED).exists() or os.geteuid() or shutil.which("systemd-run") is None:
        return []
    unit = f"mdo-guest-{guest}-{os.urandom(4).hex()}"  # the one before may still be going away
    return [
        *("systemd-run", "--scope", "--quiet", "--collect", f"--unit={unit}"),
        *("--slice=machine.slice", f"--property=Before={GUESTS}", "--"),
    ]


def install(machine: Machine, contents: Mapping[str, str]) -> bool:
    """Write the files, and have a running systemd start the units.

    :param contents: As :func:`files` gives them.
    :return: Whether there is a running systemd.
    :raise HostError: They cannot be written, or systemd refuses.
    """
    with _explained():
        for path, text in contents.items():
            target = machine.root / path
            target.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(target, text.encode(), mode=0o644)
        link = machine.root / WANTED
        link.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            link.symlink_to(f"../{GUESTS}")
    return _reload(machine, ["systemctl", "start", GUESTS])


def remove(machine: Machine) -> bool:
    """Remove the files; running guests go on.

    :return: Whether there was anything to remove.
    :raise HostError: They cannot be removed.
    """
    places = [machine.root / path for path in (WANTED, *files((), {}))]
    present = [path for path in places if path.is_symlink() or path.exists()]
    with _explained():
        for path in present:
            path.unlink(missing_ok=True)
    if present:
        _reload(machine)
    return bool(present)


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise HostError(
            f"cannot change {error.filename}: {error.strerror}", "run this as root"
        ) from error


def _reload(machine: Machine, *more: list[str]) -> bool:
    """Have a running systemd and udev read their files again, then run the commands ``more``."""
    if not (machine.root / BOOTED).exists():
        return False
    for argv in (["systemctl", "daemon-reload"], ["udevadm", "control", "--reload"], *more):
        try:
            done = subprocess.run(argv, capture_output=True, text=True, check=False)
        except OSError as error:
            raise HostError(f"cannot run {argv[0]}: {error.strerror}") from error
        if done.returncode:
            cause = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[0]
            raise HostError(f"{' '.join(argv)} failed: {cause}", "run this as root")
    return True
