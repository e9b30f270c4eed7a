# SPDX-License-Identifier: GPL-2.0-or-later
"""Where the program keeps its files.

Two places, each with an environment variable that names another: the state directory
(``MDO_STATE_DIR``: guests, labs) and the cache (``MDO_CACHE_DIR``: kernels, builds; may be
deleted at any time). Both follow the XDG base directory specification otherwise.

What stands in the state directory is believed: which process a guest is, which mdevs are ours. So
the directory has to be ours alone, and nobody else may be able to put another one in its place.
"""

from __future__ import annotations

import os
import stat
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


def state_dir(path: Path | None = None) -> Path:
    """Directory for what must outlive a command; not created here.

    :param path: The directory, if it is not the one that the environment names.
    :raise HostError: Another user could change what is in it.
    """
    path = (path or _base("MDO_STATE_DIR", "XDG_STATE_HOME", ".local/state")).absolute()
    _check_ours(path)
    return path


def cache_dir() -> Path:
    """Directory for what can be made again; not created here."""
    return _base("MDO_CACHE_DIR", "XDG_CACHE_HOME", ".cache")


def journal_path() -> Path:
    """What is ours and what was intended, see ``engine.journal``; need not be there."""
    return state_dir() / "journal.db"


def private_dir(path: Path) -> Path:
    """Create ``path`` with mode 0700, or check that it is a directory of ours alone.

    :raise HostError: Somebody else could change what stands there, it is no directory, or cannot be
        made.
    """
    try:
        for place in (*reversed(path.parents), path):  # pathlib makes parents for all to read
            if not os.path.lexists(place):
                place.mkdir(mode=0o700)
    except FileExistsError:
        pass  # somebody was quicker; what it is, is said below
    except OSError as error:
        raise HostError(f"cannot create directory {path}: {error.strerror}") from error
    _check_ours(path)
    return path


def _check_ours(path: Path) -> None:
    """See that a directory, as far as it is there, is ours alone and stays where it is.

    It is no link, is ours, and others cannot write to it. All that it stands in, as it is called
    and as links lead there, is ours or root's; others cannot write to that either, unless it is
    sticky, as ``/tmp`` is.

    :raise HostError: It is otherwise.
    """
    linked = _check_place(path, path)
    for place in path.parents:
        linked |= _check_place(path, place)
    if linked:
        for place in Path(os.path.realpath(path)).parents:
            _check_place(path, place)


def _check_place(path: Path, place: Path) -> bool:
    """Look at a directory, or at one thing that it stands in; whether that is a link."""
    above = place != path
    try:
        status = place.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise HostError(f"cannot look at {place}: {error.strerror}") from error
    if not above and not stat.S_ISDIR(status.st_mode):
        raise HostError(f"{path} is not a directory", "remove it or set MDO_STATE_DIR")
    if status.st_uid not in {os.geteuid(), 0 if above else os.geteuid()}:
        raise HostError(
            f"{place} belongs to user {status.st_uid}, not to you",
            "set MDO_STATE_DIR to a directory of your own",
        )
    sticky = above and status.st_mode & stat.S_ISVTX
    if stat.S_ISDIR(status.st_mode) and status.st_mode & 0o022 and not sticky:
        raise HostError(
            f"{place} can be written by others (mode {stat.S_IMODE(status.st_mode):04o}), "
            "and mdo believes what stands there",
            f"chmod go-w {place}, or set MDO_STATE_DIR to a directory of your own",
        )
    return stat.S_ISLNK(status.st_mode)


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
