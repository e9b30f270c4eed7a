# SPDX-License-Identifier: GPL-2.0-or-later
"""Writing a file such that a reader, or a crash, sees the old content or the new one."""

from __future__ import annotations

import contextlib
import os
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
