# SPDX-License-Identifier: GPL-2.0-or-later
"""Files: replaced as a whole, removed, and made by one process at a time."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


def write_atomic(path: Path, data: bytes, *, mode: int = 0o600, sync: bool = True) -> None:
    """Replace the content of ``path`` as a whole.

    The new content is written to ``.NAME.new`` beside it, which is renamed. Two processes that
    replace the same file at once need a lock of their own.

    :param sync: Whether the content is on the disk when this returns.
    :raise OSError: It cannot be written; ``path`` is as before, and nothing is left beside it.
    """
    scratch = path.with_name(f".{path.name}.new")
    try:
        descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            if sync:
                os.fsync(file.fileno())
        scratch.rename(path)
    except OSError:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)
        raise


def remove(path: Path) -> None:
    """Remove a file, or a directory with all that is in it; it need not exist."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Let one process at a time make ``path``; the others wait, and find it then.

    Blocks without a deadline: not for coroutines. The lock is the file ``NAME.lock`` beside it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(path.name + ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
