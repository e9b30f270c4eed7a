# SPDX-License-Identifier: GPL-2.0-or-later
"""docs/library.md: every example runs, and leaves nothing behind."""

from __future__ import annotations

import re
from pathlib import Path

from mdev_orchestrator.host.sysfs import read_host
from mdev_orchestrator.machine import Machine
from mdev_orchestrator.qemu.process import list_guests

PAGE = Path(__file__).resolve().parents[2] / "docs/library.md"


def test_the_examples() -> None:
    before = read_host(Machine()).mdevs
    code = re.findall(r"^```python\n(.*?)^```", PAGE.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    assert len(code) > 4
    names: dict[str, object] = {}
    for number, example in enumerate(code):
        exec(compile(example, f"{PAGE.name}, example {number + 1}", "exec"), names)  # noqa: S102
    assert read_host(Machine()).mdevs == before
    assert list_guests() == []
