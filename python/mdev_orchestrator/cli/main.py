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

from mdev_orchestrator import __version__

if TYPE_CHECKING:
    from mdev_orchestrator.cli.options import Command, Group

COMMANDS = {
    "host": ("host:host", "Show parents, types and devices, free and used"),
    "create": ("create:create", "Create devices of one type, all or none"),
    "plan": ("plan:plan", "Show what a spec would create and what would remain; changes nothing"),
    "diff": ("apply:diff", "Show what apply would do; changes nothing"),
    "apply": ("apply:apply", "Make a spec true, all of it or nothing"),
    "destroy": ("apply:destroy", "Remove all that a spec has brought"),
    "recover": ("recover:recover", "Undo or finish what a command that was killed left open"),
    "restore": ("restore:restore", "After a reboot, bring back every spec that was applied"),
    "service": ("service:COMMANDS", "Have systemd do that, and power guests down before"),
    "adopt": ("recover:adopt", "Make guests and devices ours that the journal does not know"),
    "probe": ("probe:probe", "Learn how parents fill, by creating devices and removing them"),
    "remove": ("remove:remove", "Remove devices, and take them out of their guest first if asked"),
    "guest": ("guest:COMMANDS", "List, start and stop guests, and open their consoles"),
    "attach": ("hotplug:attach", "Plug a device into a running guest"),
    "detach": ("hotplug:detach", "Unplug a device from a running guest"),
    "import": ("mdevctl:import_", "Make a spec of mdevctl's definitions"),
    "export": ("mdevctl:export", "Print or write mdevctl's definitions of devices"),
    "watch": ("watch:watch", "Print events as they happen"),
    "doctor": ("doctor:doctor", "Say what this host lacks, and how to mend it"),
    "qemu": ("qemu:COMMANDS", "Build a QEMU that starts and stops groups itself"),
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
    from mdev_orchestrator.cli import output
    from mdev_orchestrator.errors import MdoError

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # whatever a vendor calls his types
    try:
        return _run(list(arguments))
    except MdoError as error:
        if os.environ.get("MDO_DEBUG"):
            import traceback

            traceback.print_exception(error)
            if error.details:
                output.say(error.details)
        output.say_error(error)
        return error.exit_code
    except KeyboardInterrupt:
        output.say("interrupted")
        return output.INTERRUPTED
    except Exception as error:
        if os.environ.get("MDO_DEBUG"):
            raise
        what = " ".join(f"{type(error).__name__}: {error}".split())
        hint = f"run again with mdo --debug {' '.join(arguments[:1])}"
        output.say(f"internal error: {what} \u2014 {hint}")
        return INTERNAL_ERROR


def _run(words: list[str]) -> int:
    from mdev_orchestrator.cli.output import USAGE_ERROR, emit

    while words and words[0].startswith("-"):
        match words.pop(0):
            case "--debug":
                os.environ["MDO_DEBUG"] = "1"
            case "--version":
                emit(f"mdo {__version__}")
                return 0
            case "--help" | "-h":
                emit(_usage())
                return 0
            case option:
                from mdev_orchestrator.cli.options import unknown

                raise unknown("option", option, ("--debug", "--version", "--help"), "mdo")
    if not words:
        sys.stderr.write(_usage() + "\n")
        return USAGE_ERROR
    return command(words[0])(words[1:])


def command(name: str) -> Command | Group:
    """Return the command or group of a name: one of :data:`COMMANDS`, or an installed plugin.

    :raise RequestError: There is none of that name.
    :raise HostError: It is the lab's, which is not installed.
    """
    from importlib import import_module

    from mdev_orchestrator.cli.options import Command, Group, unknown

    if name not in COMMANDS:
        from mdev_orchestrator.cli import plugins

        plugin = plugins.find(name)
        if plugin is None:
            raise unknown("command", name, COMMANDS, "mdo")
        return plugin
    place, text = COMMANDS[name]
    module, _, attribute = place.partition(":")
    target = getattr(import_module(f"mdev_orchestrator.cli.{module}"), attribute)
    if isinstance(target, dict):
        return Group(target, f"mdo {name}", text)
    return Command(target, f"mdo {name}")


def _usage() -> str:
    from mdev_orchestrator.cli import plugins

    texts = {name: text for name, (_, text) in COMMANDS.items()} | plugins.installed()
    width = max(map(len, texts))
    return USAGE + "\n".join(f"  {name:{width}}  {text}" for name, text in texts.items())


if __name__ == "__main__":
    sys.exit(main())
