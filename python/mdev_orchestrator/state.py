# SPDX-License-Identifier: GPL-2.0-or-later
"""Where the program keeps its files.

Two places, each with an environment variable that names another: the state directory
(``MDO_STATE_DIR``: guests, labs) and the cache (``MDO_CACHE_DIR``: kernels, builds; may be
deleted at any time). Both follow the XDG base directory specification otherwise.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeVar

from mdev_orchestrator.errors import HostError

T = TypeVar("T")

APP = "mdev-orchestrator"


def _base(own: str, xdg: str, fallback: str) -> Path:
    if value := os.environ.get(own):
        return Path(value).absolute()
    if value := os.environ.get(xdg):
        return Path(value).absolute() / APP
    return Path.home() / fallback / APP


def state_dir() -> Path:
    """Directory for what must outlive a command; not created here."""
    return _base("MDO_STATE_DIR", "XDG_STATE_HOME", ".local/state")


def cache_dir() -> Path:
    """Directory for what can be made again; not created here."""
    return _base("MDO_CACHE_DIR", "XDG_CACHE_HOME", ".cache")


def journal_path() -> Path:
    """What is ours and what was intended, see ``engine.journal``; need not be there."""
    return state_dir() / "journal.db"


def private_dir(path: Path) -> Path:
    """Create ``path`` with mode 0700, or check that it is a directory of ours.

    :raise HostError: It belongs to somebody else, is no directory, or cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.mkdir(exist_ok=True, mode=0o700)
        status = path.lstat()
    except OSError as error:
        raise HostError(f"cannot create directory {path}: {error.strerror}") from error
    if not path.is_dir() or path.is_symlink():
        raise HostError(f"{path} is not a directory", "remove it or set MDO_STATE_DIR")
    if status.st_uid != os.geteuid():
        raise HostError(
            f"{path} belongs to user {status.st_uid}, not to you",
            "set MDO_STATE_DIR to a directory of your own",
        )
    return path


def decode(data: bytes, type_: type[T]) -> T:
    """Read a JSON file that an earlier command wrote, or somebody else since.

    :raise ValueError: It is none of that type; the message is for a user.
    """
    import msgspec  # here, because who only asks for a directory does without it

    try:
        return msgspec.json.decode(data, type=type_)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except msgspec.DecodeError as error:
        raise ValueError(str(error)) from error
