# SPDX-License-Identifier: GPL-2.0-or-later
"""What systemd and udev are told, so that guests end with the machine and come back with it.

``mdo-guests.service``
    is active from boot to shutdown. Stopping it powers every guest down, before the network and
    remote file systems go; starting it wants the other one.
``mdo-restore.service``
    brings back what was applied, and waits for the parents that it needs. It does not remain
    active, so it can be started again.
``90-mdo.rules``
    starts it when a parent appears, however late. While it is at work, or waits, a start is no
    start, so a hundred parents that appear at once are one process; it looks at all of them.

What counts is that a parent registers with the mdev core, or is there with its types when udev adds
it: a driver may be loaded before udev is. A ``change`` that somebody triggers is neither: systemd
would take each for a reason to start, and bring back what an administrator has stopped. Whoever has
stopped ``mdo-guests.service`` gets no guest by loading a driver.

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
from pathlib import Path

from mdev_orchestrator.errors import HostError
from mdev_orchestrator.host.sysfs import ROOT

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
# A parent of mediated devices has registered; or had before udev began, which tells of it then.
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
    """The files to install, by their path below the root, and what is in them.

    :param mdo: The command that is ``mdo``, with an absolute path.
    :param environment: What it shall find in its environment.
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
    """A command as units have it: quoted where it must be, nothing in it expanded."""
    return " ".join(_word(word).replace("$", "$$") for word in argv)


def _word(text: str) -> str:
    text = text.replace("%", "%%")
    if re.fullmatch(r"[\w@%+=:,./-]+", text):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def scope(guest: str, root: Path = ROOT) -> list[str]:
    """The words before a QEMU's command that give it a systemd scope; none where there is no need.

    Else it would be of the session, or the service, in which it was started: a shutdown kills that
    before anybody has powered the guest down. The process stays the one that it is.

    :param guest: Its name, for whoever reads ``systemctl status``.
    """
    if not (root / BOOTED).exists() or os.geteuid() or shutil.which("systemd-run") is None:
        return []
    unit = f"mdo-guest-{guest}-{os.urandom(4).hex()}"  # the one before may still be going away
    return [
        *("systemd-run", "--scope", "--quiet", "--collect", f"--unit={unit}"),
        *("--slice=machine.slice", f"--property=Before={GUESTS}", "--"),
    ]


def install(contents: Mapping[str, str], root: Path = ROOT) -> bool:
    """Write the files, and have a running systemd start what they say.

    :param contents: As :func:`files` gives them.
    :return: Whether there is a running systemd.
    :raise HostError: They cannot be written, or systemd refuses.
    """
    with _explained():
        for path, text in contents.items():
            target = root / path
            target.parent.mkdir(parents=True, exist_ok=True)
            draft = target.with_name(f".{target.name}.new")
            draft.write_text(text)
            draft.rename(target)
        link = root / WANTED
        link.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            link.symlink_to(f"../{GUESTS}")
    return _tell(root, ["systemctl", "start", GUESTS])


def remove(root: Path = ROOT) -> bool:
    """Remove the files again; guests that run go on running.

    :return: Whether there was anything to remove.
    :raise HostError: They cannot be removed.
    """
    places = [root / path for path in (WANTED, *files((), {}))]
    present = [path for path in places if path.is_symlink() or path.exists()]
    with _explained():
        for path in present:
            path.unlink(missing_ok=True)
    if present:
        _tell(root)
    return bool(present)


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise HostError(
            f"cannot change {error.filename}: {error.strerror}", "run this as root"
        ) from error


def _tell(root: Path, *more: list[str]) -> bool:
    """Have systemd and udev read their files again, and do what ``more`` says; if they run."""
    if not (root / BOOTED).exists():
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
