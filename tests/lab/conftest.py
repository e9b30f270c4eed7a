# SPDX-License-Identifier: GPL-2.0-or-later
"""What the driver's own tests share; those of the host layer need none of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lab import vfio
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
def make(kernel_log: KernelLog) -> Iterator[vfio.Make]:
    """Makes mdevs that are gone, with their links, when the test has ended."""
    with vfio.factory() as make:
        yield make
