# SPDX-License-Identifier: GPL-2.0-or-later
"""Fuzz one parser, guided by the coverage of its Python code.

``python -m fuzz NAME [libFuzzer's options and directories]``, in an environment that has atheris
(``tools/setup fuzz``). ``test_parsers.py`` runs all of them for a given time.
"""

import sys

import atheris

from fuzz import harness

#: Packages whose bytecode reports where it comes along. msgspec and SQLite are C, and do not.
INSTRUMENTED = ["mdev_orchestrator", "tomllib", "qemu"]


def main() -> None:
    name = sys.argv.pop(1)
    with atheris.instrument_imports(include=INSTRUMENTED):
        target = harness.load(name)
    atheris.Setup(sys.argv, target)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
