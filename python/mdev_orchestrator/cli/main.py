# SPDX-License-Identifier: GPL-2.0-or-later
"""Entry point of ``mdo``: runs a command, and turns what goes wrong into one line."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Sequence

from mdev_orchestrator.cli import output
from mdev_orchestrator.errors import MdoError

GARBAGE = 50_000
"""Objects that may be made before Python looks for cycles among them; most commands make fewer."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``mdo`` with ``arguments``, by default the program's own; gives the exit status."""
    if arguments is not None:
        return _main(list(arguments))
    # the process is this command's alone
    gc.set_threshold(GARBAGE)
    try:
        return _main(sys.argv[1:])
    finally:
        gc.freeze()  # or the interpreter looks at every object once more on its way out


def _main(arguments: list[str]) -> int:
    try:
        output.prepare()

        from mdev_orchestrator.cli import tree

        return tree.run(arguments)
    except MdoError as error:
        return _failed(error)
    except KeyboardInterrupt:  # outside of a coroutine: nothing was begun
        from mdev_orchestrator.cli.context import InterruptionError

        return _failed(InterruptionError(signal.SIGINT))
    except Exception as error:  # noqa: BLE001 - a bug ends like anything else: in one line
        return _bug(error, arguments)
    finally:
        output.speak_json(on=False)


def _failed(error: MdoError) -> int:
    if os.environ.get("MDO_DEBUG"):
        output.trace(error)
    output.report(error)
    return error.exit_code


def _bug(error: Exception, arguments: list[str]) -> int:
    if os.environ.get("MDO_DEBUG"):
        output.trace(error)
    output.report(BugError(f"{type(error).__name__}: {error}", arguments))
    return BugError.exit_code


class BugError(MdoError):
    """A bug of this program."""

    exit_code = output.INTERNAL_ERROR

    def __init__(self, what: str, arguments: Sequence[str]) -> None:
        hint = f"run again with mdo --debug {' '.join(arguments[:1])}"
        super().__init__(f"internal error: {what}", hint)


if __name__ == "__main__":
    sys.exit(main())
