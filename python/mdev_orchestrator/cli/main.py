# SPDX-License-Identifier: GPL-2.0-or-later
"""Entry point of ``mdo``: finds the command, runs it, and turns what goes wrong into one line.

``mdo --help`` is read while one thinks, so it must not wait for commands that are not called: they
stand in a table, and only the one that is invoked is imported.
"""

from __future__ import annotations

import gc
import io
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mdev_orchestrator.errors import MdoError

COMMANDS = {
    "host": ("host:host", "Show parents, types and devices, free and used"),
    "create": ("create:create", "Create devices of one type, all or none"),
    "plan": ("plan:plan", "Show what a spec would create and what would remain; changes nothing"),
    "diff": ("apply:diff", "Show what apply would do; changes nothing"),
    "apply": ("apply:apply", "Make a spec true, all of it or nothing"),
    "destroy": ("apply:destroy", "Remove all that a spec has brought"),
    "recover": ("recover:recover", "Undo or finish what a command that was killed left open"),
    "restore": ("restore:restore", "After a reboot, bring back every spec that was applied"),
    "service": ("service:app", "Have systemd do that, and power guests down before"),
    "adopt": ("recover:adopt", "Make guests and devices ours that the journal does not know"),
    "probe": ("probe:probe", "Learn how parents fill, by creating devices and removing them"),
    "remove": ("remove:remove", "Remove devices, and take them out of their guest first if asked"),
    "guest": ("guest:app", "List, start and stop guests, and open their consoles"),
    "attach": ("hotplug:attach", "Plug a device into a running guest"),
    "detach": ("hotplug:detach", "Unplug a device from a running guest"),
    "import": ("mdevctl:import_", "Make a spec of mdevctl's definitions"),
    "export": ("mdevctl:export", "Print or write mdevctl's definitions of devices"),
    "watch": ("watch:watch", "Print events as they happen"),
    "doctor": ("doctor:doctor", "Say what this host lacks, and how to mend it"),
    "qemu": ("qemu:app", "Build a QEMU that starts and stops groups itself"),
    "lab": ("lab:app", "A nested machine to try everything in"),
}

USAGE = """\
Usage: mdo [OPTIONS] COMMAND [ARGS]...

Creates mediated devices, launches QEMU guests with them and drives their hotplug.

Options:
  --debug    Show the traceback of an error (or set MDO_DEBUG)
  --version  Show the version
  --help     Show this text; mdo COMMAND --help tells of one command

Commands:
"""

USAGE_ERROR = 2
INTERNAL_ERROR = 70  # EX_SOFTWARE of sysexits.h


GARBAGE = 50_000
"""Objects that may be made before Python looks for cycles among them; most commands make fewer."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``mdo`` with ``arguments``, by default the program's own; gives the exit status."""
    if arguments is not None:
        return _main(arguments)
    # the process is this command's alone
    gc.set_threshold(GARBAGE)
    try:
        return _main(sys.argv[1:])
    finally:
        gc.freeze()  # or the interpreter looks at every object once more on its way out


def _main(arguments: Sequence[str]) -> int:
    from mdev_orchestrator.cli.output import emit

    rest = list(arguments)
    while rest and rest[0].startswith("-"):
        match rest.pop(0):
            case "--debug":
                os.environ["MDO_DEBUG"] = "1"
            case "--version":
                emit(_version())
                return 0
            case "--help" | "-h":
                emit(_usage())
                return 0
            case unknown:
                return _usage_error(f"no such option: {unknown}")
    if not rest:
        sys.stderr.write(_usage() + "\n")
        return USAGE_ERROR
    name = rest.pop(0)
    if name not in COMMANDS:
        from difflib import get_close_matches

        close = get_close_matches(name, COMMANDS, n=1)
        return _usage_error(
            f"no such command: {name}", f"did you mean {close[0]}?" if close else "mdo --help"
        )
    return _run(name, rest)


def _run(name: str, arguments: list[str]) -> int:
    from mdev_orchestrator.errors import MdoError

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # whatever a vendor calls his types
    try:
        return _invoke(name, arguments)
    except MdoError as error:
        return _report(error)
    except KeyboardInterrupt:
        from mdev_orchestrator.cli import output

        output.say("interrupted")
        return output.INTERRUPTED
    except Exception as error:
        if os.environ.get("MDO_DEBUG"):
            raise
        from mdev_orchestrator.cli import output

        what = " ".join(f"{type(error).__name__}: {error}".split())
        output.say(f"internal error: {what} \u2014 run again with mdo --debug {name}")
        return INTERNAL_ERROR


def _invoke(name: str, arguments: list[str]) -> int:
    from importlib import import_module

    import typer

    place = COMMANDS[name][0]
    module, _, attribute = place.partition(":")
    target = getattr(import_module(f"mdev_orchestrator.cli.{module}"), attribute)
    if isinstance(target, typer.Typer):
        app = target
    else:
        app = typer.Typer(add_completion=False)
        app.command(name)(target)
    # typer's own click has no public name for this class
    usage_error: type[Exception] = typer.BadParameter.__bases__[0]
    try:
        code = typer.main.get_command(app).main(
            arguments, prog_name=f"mdo {name}", standalone_mode=False
        )
    except usage_error as error:
        return _misused(error, name)
    except typer.Abort:
        return 1
    return code if isinstance(code, int) else 0


def _misused(error: Exception, name: str) -> int:
    message = error.format_message() if hasattr(error, "format_message") else str(error)
    if "\n" in message:  # a group of commands that was given none: the message is its help
        sys.stderr.write(message + "\n")
        return USAGE_ERROR
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else f"mdo {name}"
    return _usage_error(message[:1].lower() + message[1:].rstrip("."), f"{command} --help")


def _report(error: MdoError) -> int:
    from mdev_orchestrator.cli.output import say_error

    if os.environ.get("MDO_DEBUG"):
        import traceback

        traceback.print_exception(error)
    say_error(error)
    return error.exit_code


def _usage_error(message: str, hint: str = "mdo --help") -> int:
    from mdev_orchestrator.cli.output import say

    say(f"{message} \u2014 {hint}")
    return USAGE_ERROR


def _usage() -> str:
    width = max(map(len, COMMANDS))
    return USAGE + "\n".join(f"  {name:{width}}  {text}" for name, (_, text) in COMMANDS.items())


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"mdo {version('mdev-orchestrator')}"
    except PackageNotFoundError:
        return "mdo (not installed)"


if __name__ == "__main__":
    sys.exit(main())
