# SPDX-License-Identifier: GPL-2.0-or-later
"""Shell scripts that stand for the programs that fetch and build a kernel."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest


def stand_before(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, scripts: Mapping[str, str], version: str
) -> Path:
    """Have scripts found before the real programs, and an empty cache.

    :param version: Of the package that the script for apt-cache offers.
    :return: The directory of the scripts.
    """
    directory = tmp_path / "bin"
    directory.mkdir()
    for name, text in scripts.items():
        (directory / name).write_text(f"#!/bin/sh\n{text}\n")
        (directory / name).chmod(0o755)
    (directory / "apt-cache.version").write_text(version)
    monkeypatch.setenv("PATH", f"{directory}:/usr/bin:/bin")
    monkeypatch.setenv("MDO_CACHE_DIR", str(tmp_path / "cache"))
    return directory
