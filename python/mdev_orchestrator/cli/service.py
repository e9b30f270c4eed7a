# SPDX-License-Identifier: GPL-2.0-or-later
"""``mdo service``: systemd restores guests at boot, and powers them down before a shutdown."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from mdev_orchestrator.cli import output
from mdev_orchestrator.cli.context import machine
from mdev_orchestrator.cli.tree import noun
from mdev_orchestrator.host import service
from mdev_orchestrator.state import cache_dir, state_dir

app = noun("Have systemd restore at boot, and power guests down before a shutdown.")


@app.command("install")
def install() -> None:
    """Write the units and the udev rule, for this mdo and this state directory; again to renew."""
    runs = service.install(machine(), _files())
    output.emit(f"{service.GUESTS} " + ("runs" if runs else "will run when systemd boots"))


@app.command("remove")
def remove() -> None:
    """Remove them again; guests that run go on running."""
    done = service.remove(machine())
    output.emit(f"{service.GUESTS} " + ("is removed" if done else "is not installed"))


@app.command("show")
def show() -> None:
    """Print what install would write."""
    for path, text in _files().items():
        output.emit(f"# /{path}\n{text}")


def _files() -> dict[str, str]:
    return service.files(
        _mdo(), {"MDO_STATE_DIR": str(state_dir()), "MDO_CACHE_DIR": str(cache_dir())}
    )


def _mdo() -> list[str]:
    """The command that runs this program again."""
    called = shutil.which(sys.argv[0])
    if called is not None and Path(called).name == "mdo":
        return [str(Path(called).absolute())]
    return [sys.executable, "-m", "mdev_orchestrator.cli.main"]
