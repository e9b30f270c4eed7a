# SPDX-License-Identifier: GPL-2.0-or-later
"""What tests in the lab share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import vfio
from lab.commands import Mdo
from lab.kernel_log import KernelLog


@pytest.fixture
def kernel_log() -> Iterator[KernelLog]:
    """The kernel's log from the beginning of the test; nothing in it may be a complaint."""
    log = KernelLog()
    yield log
    complaints = log.complaints()
    log.close()
    assert complaints == []


@pytest.fixture
def mdo(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Mdo:
    """``mdo`` with a state directory of the test's own."""
    monkeypatch.setenv("MDO_STATE_DIR", str(tmp_path / "state"))
    return Mdo(capsys)


@pytest.fixture
def make(kernel_log: KernelLog) -> Iterator[vfio.Make]:
    """Makes mdevs that are gone, with their links, when the test has ended."""
    with vfio.factory() as make:
        yield make
