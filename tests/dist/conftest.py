# SPDX-License-Identifier: GPL-2.0-or-later
"""The packages, built once a release, and a clean root to install them in."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from dist import roots


@pytest.fixture(scope="session", params=["bookworm", "trixie"])
def suite(request: pytest.FixtureRequest) -> str:
    if os.geteuid():
        pytest.skip("only root can make a root directory")
    name: str = request.param
    return name


@pytest.fixture(scope="session")
def packages(suite: str) -> Path:
    return roots.build(suite)


@pytest.fixture(scope="module")
def root(suite: str, packages: Path) -> Iterator[roots.Root]:
    with roots.new(suite, packages) as root:
        yield root
