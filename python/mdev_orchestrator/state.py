# SPDX-License-Identifier: GPL-2.0-or-later
"""Where the program keeps its files.

There are two places, and an environment variable names another one for each: the state directory
(``MDO_STATE_DIR``: guests, labs) and the cache (``MDO_CACHE_DIR``: kernels, builds; may be
deleted at any time). Without it both follow the XDG base directory specification.

The program trusts what stands in the state directory: which process a guest is, which mdevs are
managed. So the directory must belong to the calling user, and no other user may be able to write
to it or to put another one in its place.
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
    """Return the directory for what must outlive a command; does not create it.

    :param path: The directory, if it is not the one that the environment names.
    :raise HostError: Another user could change what is in it.
    """
    path = (path or _base("MDO_STATE_DIR", "XDG_STATE_HOME", ".local/state")).absolute()
    _check_ours(path)
    return path


def cache_dir() -> Path:
    """Return the directory for what can be made again; does not create it."""
    return _base("MDO_CACHE_DIR", "XDG_CACHE_HOME", ".cache")


def private_dir(path: Path) -> Path:
    """Create ``path`` with mode 0700, or check that it is a directory of this user alone.

    :raise HostError: Another user could change what stands there, it is no directory, or it cannot
        be created.
    """
    try:
        for place in (*reversed(path.parents), path):  # pathlib makes parents for all to read
            if not os.path.lexists(place):
                place.mkdir(mode=0o700)
    except FileExistsError:
        pass  # another process was quicker; the check below says what it is
    except OSError as error:
        raise HostError(
            f"cannot create directory {path}: {error.strerror}", errno=error.errno
        ) from error
    _check_ours(path)
    return path


def _check_ours(path: Path) -> None:
    """Check that a directory, if it exists, belongs to this user alone and cannot be replaced.

    It must not be a link, must belong to this user, and others must not be able to write to it. All
    directories above it, by its name and where links lead, must belong to this user or root; others
    must not be able to write to them either, unless they are sticky, as ``/tmp`` is.

    :raise HostError: It is not so.
    """
    linked = _check_place(path, path)
    for place in path.parents:
        linked |= _check_place(path, place)
    if linked:
        for place in Path(os.path.realpath(path)).parents:
            _check_place(path, place)


def _check_place(path: Path, place: Path) -> bool:
    """Check a directory, or one of those above it; returns whether that is a link."""
    above = place != path
    try:
        status = place.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise HostError(f"cannot look at {place}: {error.strerror}", errno=error.errno) from error
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
    """Read a JSON file of the state directory, which another program may have changed.

    :raise ValueError: It is not of that type; the message is for a user.
    """
    import msgspec  # a command that only needs a directory does without it

    try:
        return msgspec.json.decode(data, type=type_)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except msgspec.DecodeError as error:
        raise ValueError(str(error)) from error
