# SPDX-License-Identifier: GPL-2.0-or-later
"""Every parser, fuzzed for a while: no crash, no hang, no exception but the project's own.

``MDO_FUZZ_SECONDS`` is the time for each, ten minutes without it. One runs at a time, under the
lowest priority. What a run has found to lead to new places stays in ``build/fuzz/NAME``, and the
next run goes on from there. An input that fails is ``build/fuzz/NAME-crash-…``: mend the parser,
and give it a place in ``corpus/NAME``.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from fuzz import harness

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "build/fuzz"
SECONDS = int(os.environ.get("MDO_FUZZ_SECONDS", "600"))
MEMORY = "/dev/shm"  # noqa: S108 - a directory with a random name is made there
HANG_SECONDS = 10
LARGEST = 8192  # bytes
LIFECYCLE = "mdev-lifecycle"
"""The state machine in C; all other names are harnesses in Python."""


def fuzzer(name: str) -> list[str]:
    """The program for a parser; the one in C is built first."""
    if name != LIFECYCLE:
        return [sys.executable, "-m", "fuzz", name]
    flags = subprocess.run(
        ["pkg-config", "--cflags", "--libs", "glib-2.0"], capture_output=True, text=True, check=True
    )
    program = WORK / f"fuzz-{LIFECYCLE}"
    subprocess.run(
        [
            *("clang", "-g", "-O1", "-fsanitize=fuzzer,address,undefined"),
            *("-fno-sanitize-recover=all", "-I.", f"tests/fuzz/fuzz-{LIFECYCLE}.c"),
            *(f"hw/vfio/{LIFECYCLE}.c", *flags.stdout.split(), "-o", str(program)),
        ],
        cwd=ROOT,
        check=True,
    )
    return [str(program)]


@pytest.mark.parametrize("name", [*harness.names(), LIFECYCLE])
def test_survives_any_input(name: str) -> None:
    assert shutil.which("clang"), "tools/setup fuzz installs what this needs"
    kept = WORK / name
    kept.mkdir(parents=True, exist_ok=True)
    log = WORK / f"{name}.log"
    options = {
        "max_total_time": SECONDS,
        "timeout": HANG_SECONDS,
        "rss_limit_mb": 2048,
        "max_len": LARGEST,
        "print_final_stats": 1,
        "artifact_prefix": f"{kept}-",
    }
    flags = [f"-{key}={value}" for key, value in options.items()]
    command = ["nice", "-n", "19", *fuzzer(name), *flags, kept, harness.CORPUS / name]
    path = f"{ROOT / 'tests'}:{ROOT / 'python'}"
    with log.open("wb") as out, tempfile.TemporaryDirectory(dir=MEMORY) as scratch:
        done = subprocess.run(
            command,
            cwd=WORK,
            env={**os.environ, "PYTHONPATH": path, "TMPDIR": scratch},
            stdout=out,
            stderr=out,
            check=False,
        )
    text = log.read_text(errors="replace")
    assert done.returncode == 0, text[-4000:]
    executions, edges = (
        re.findall(pattern, text)[-1]
        for pattern in (r"number_of_executed_units: +([0-9]+)", r"\bcov: ([0-9]+)")
    )
    number = sum(1 for _ in kept.iterdir())
    sys.stdout.write(
        f"\ncampaign: {name}: {int(executions):,} executions in {SECONDS} s, {edges} edges, "
        f"{number} inputs kept\n"
    )
