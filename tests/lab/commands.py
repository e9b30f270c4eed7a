# SPDX-License-Identifier: GPL-2.0-or-later
"""mdo and mdevctl as a user of the machine runs them."""

from __future__ import annotations

import subprocess

import pytest

from mdev_orchestrator.cli.main import main


def mdevctl(*arguments: object, code: int = 0) -> str:
    """Run mdevctl; what it printed."""
    done = subprocess.run(
        ["mdevctl", *map(str, arguments)], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == code, done.stderr
    return done.stdout


class Mdo:
    """``mdo`` in this process: calling it gives what it printed.

    :ivar errors: What the last call printed to standard error.
    """

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys
        self.errors = ""

    def __call__(self, *arguments: object, code: int = 0) -> str:
        ended = main([str(argument) for argument in arguments])
        output, self.errors = self.capsys.readouterr()
        assert ended == code, self.errors
        return output
