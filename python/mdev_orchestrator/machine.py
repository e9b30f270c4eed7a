# SPDX-License-Identifier: GPL-2.0-or-later
"""The one handle of a host: where it is, where its state is kept, and how it is written to.

Every function that reads or changes the host takes a :class:`Machine`. A test, or a caller that
looks at another root, makes one with other directories; nothing else changes.
"""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from mdev_orchestrator.state import state_dir

if TYPE_CHECKING:
    from mdev_orchestrator.system.writer import SysfsWriter


class Machine:
    """A host.

    :ivar root: Directory in which ``sys``, ``dev``, ``proc``, ``run`` and ``etc`` are.
    """

    def __init__(self, root: Path | str = "/", *, state: Path | str | None = None) -> None:
        """Name a host; nothing is opened or read.

        :param root: Directory in which ``sys``, ``dev`` and ``proc`` are.
        :param state: The state directory; :func:`mdev_orchestrator.state.state_dir` without it.
        """
        self.root = Path(root)
        self._state = None if state is None else Path(state)

    def __repr__(self) -> str:
        return f"Machine({str(self.root)!r})"

    @cached_property
    def state_dir(self) -> Path:
        """Directory for what outlives a command; need not exist.

        :raise HostError: Another user could change what is in it.
        """
        return state_dir(self._state)

    @property
    def guests_dir(self) -> Path:
        """Directory with one directory per guest; need not exist."""
        return self.state_dir / "guests"

    @property
    def journal_path(self) -> Path:
        """File of the journal; need not exist."""
        return self.state_dir / "journal.db"

    @cached_property
    def writer(self) -> SysfsWriter:
        """What writes to sysfs; it has no processes before the first write."""
        # A command that only reads the host does not load asyncio.
        from mdev_orchestrator.system.writer import SysfsWriter

        return SysfsWriter()

    async def close(self) -> None:
        """End the processes of the writer; it starts others if it is used again."""
        if "writer" in self.__dict__:
            await self.writer.close()

    def path(self, *parts: str) -> str:
        """A path below the root, as text: a host has thousands of them."""
        return os.path.join(self.root, *parts)
