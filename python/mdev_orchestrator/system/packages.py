# SPDX-License-Identifier: GPL-2.0-or-later
"""Debian packages that a task needs and that are not installed."""

from __future__ import annotations

import shutil
from collections.abc import Mapping

from mdev_orchestrator.system.children import succeeds


def missing_packages(programs: Mapping[str, str], libraries: Mapping[str, str]) -> list[str]:
    """Return the packages to install, in the order given.

    :param programs: For each program the package that has it; ``pkg-config`` must be among them if
        ``libraries`` is not empty and the program may be missing.
    :param libraries: For each module of pkg-config the package that has it; not looked for while
        pkg-config is missing.
    """
    missing = [package for name, package in programs.items() if not shutil.which(name)]
    if shutil.which("pkg-config"):
        missing += [
            package
            for name, package in libraries.items()
            if not succeeds(["pkg-config", "--exists", name])
        ]
    return missing
