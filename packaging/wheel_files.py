# SPDX-License-Identifier: GPL-2.0-or-later
"""Adds the man pages and the completion of three shells to the wheel, made from the commands.

Hatchling runs this with what the project depends on in reach. An editable install has none of them.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

COMPLETIONS = {
    "bash": "bash-completion/completions/mdo",
    "zsh": "zsh/site-functions/_mdo",
    "fish": "fish/vendor_completions.d/mdo.fish",
}
"""Where a shell looks for the completion of ``mdo``, below ``share``."""

AUTOLOADED = '\n_mdo_completion "$@"\n'
"""zsh runs the file as a function for the first completion; typer's script only defines one."""


class WheelFiles(BuildHookInterface):  # type: ignore[type-arg]
    """Hatchling's hook."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Write the files, and have them put into the wheel."""
        if version == "editable":
            return
        self._made = tempfile.TemporaryDirectory()
        share = Path(self._made.name)
        sys.path.insert(0, str(Path(self.root, "python")))
        from typer.completion import get_completion_script

        from mdev_orchestrator.cli import manpages, tree

        manpages.write(share / "man/man1")
        for shell, name in COMPLETIONS.items():
            path = share / name
            path.parent.mkdir(parents=True)
            script = get_completion_script(prog_name="mdo", complete_var=tree.COMPLETE, shell=shell)
            path.write_text(f"{script}\n" + (AUTOLOADED if shell == "zsh" else ""))
        for path in filter(Path.is_file, share.rglob("*")):
            build_data["shared_data"][str(path)] = f"share/{path.relative_to(share)}"

    def finalize(self, version: str, _build_data: dict[str, Any], _artifact_path: str) -> None:
        """Remove the files."""
        if version != "editable":
            self._made.cleanup()
