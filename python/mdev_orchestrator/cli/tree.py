# SPDX-License-Identifier: GPL-2.0-or-later
"""The commands of ``mdo`` as a typer program.

The commands are in a table, and only the one that is invoked is imported: ``mdo --help`` does not
wait for the engine or for QEMU's protocol. Another package adds a command by an entry point of the
group :data:`PLUGINS`, whose name is the command's and whose object is a function or a
:class:`typer.Typer`, best one made by :func:`noun`::

    [project.entry-points."mdev_orchestrator.commands"]
    lab = "mdev_lab.cli:app"

The classes here keep to what typer passes on from click under its own names: since 0.26 it brings a
click of its own, whose module is private.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from mdev_orchestrator import __version__
from mdev_orchestrator.cli import output
from mdev_orchestrator.errors import HostError, RequestError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

COMMANDS = {
    "host": ("host:host", "Show parents, types and devices, free and used"),
    "create": ("create:create", "Create devices of one type, all or none"),
    "plan": ("plan:plan", "Show what a spec would create and what would remain; changes nothing"),
    "diff": ("apply:diff", "Show what apply would do; changes nothing"),
    "apply": ("apply:apply", "Make a spec true, all of it or nothing"),
    "destroy": ("apply:destroy", "Remove the guests and devices of a spec"),
    "recover": ("recover:recover", "Undo or finish what a command that was killed left open"),
    "restore": ("restore:restore", "After a reboot, bring back every spec that was applied"),
    "service": ("service:app", "Have systemd restore at boot, and power guests down before"),
    "adopt": ("recover:adopt", "Take over guests and devices that the journal does not know"),
    "probe": ("probe:probe", "Learn how parents fill, by creating devices and removing them"),
    "remove": ("remove:remove", "Remove devices, and detach them from their guest first if asked"),
    "guest": ("guest:app", "List, start and stop guests, and open their consoles"),
    "attach": ("hotplug:attach", "Plug a device into a running guest"),
    "detach": ("hotplug:detach", "Unplug a device from a running guest"),
    "import": ("mdevctl:import_", "Make a spec of mdevctl's definitions or of a libvirt domain"),
    "export": ("mdevctl:export", "Print or write mdevctl's definitions of devices"),
    "watch": ("watch:watch", "Print events as they happen"),
    "doctor": ("doctor:doctor", "Say what this host lacks, and how to mend it"),
    "qemu": ("qemu:app", "Build a QEMU that starts and stops groups itself"),
}
"""For each command its module and object, and what a list of commands says of it."""

PLUGINS = "mdev_orchestrator.commands"
"""Group of the entry points of further commands; a command of the table comes first."""

COMPLETE = "_MDO_COMPLETE"
"""Variable of the environment by which a shell asks for completions."""

WIDEST = 100
"""Columns of a help text on a terminal that is wider."""

_Context = Any
"""A click context: typer has no public name for the class that its methods take."""
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]
"""What the parser raises; typer has no public name for it either."""


@contextmanager
def _of(context: _Context) -> Iterator[None]:
    """Say which command an error is of: the parser leaves that out of some."""
    try:
        yield
    except _UsageError as error:
        if getattr(error, "ctx", context) is None:
            error.ctx = context  # type: ignore[attr-defined]
        raise


def _by_emit(option: Any) -> Any:  # noqa: ANN401 - a click option
    """Let the option for the help print as all commands do: typer's own fails with a traceback."""

    def show(context: _Context, _: Any, wanted: bool) -> None:  # noqa: ANN401
        if wanted and not context.resilient_parsing:
            output.emit(context.get_help())
            context.exit()

    if option is not None:
        option.callback = show
    return option


class Command(TyperCommand):
    """A command that takes options and arguments."""

    def get_help_option(self, ctx: _Context) -> Any:  # noqa: ANN401
        """The option that shows the help."""
        return _by_emit(super().get_help_option(ctx))

    def parse_args(self, ctx: _Context, args: list[str]) -> list[str]:
        """Read the words."""
        with _of(ctx):
            return super().parse_args(ctx, args)

    def collect_usage_pieces(self, ctx: _Context) -> list[str]:
        """Write arguments that must be given as ``NAME``, as manuals do, not as ``{NAME}``."""
        pieces = super().collect_usage_pieces(ctx)
        return [piece.removeprefix("{").removesuffix("}") for piece in pieces]

    def get_short_help_str(self, limit: int = 0) -> str:
        """The first sentence of its help, never cut short."""
        return super().get_short_help_str(max(limit, 10 * WIDEST))


class Group(TyperGroup):
    """Commands below one name."""

    def get_help_option(self, ctx: _Context) -> Any:  # noqa: ANN401
        """The option that shows the help."""
        return _by_emit(super().get_help_option(ctx))

    def parse_args(self, ctx: _Context, args: list[str]) -> list[str]:
        """Read the words; without any, show the help on standard error and end with 2."""
        if not args and not ctx.resilient_parsing:
            output.write_error(ctx.get_help() + "\n")
            ctx.exit(output.USAGE_ERROR)
        with _of(ctx):
            return super().parse_args(ctx, args)

    def resolve_command(self, ctx: _Context, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """Find the command that the words begin with.

        :raise RequestError: There is none of that name.
        """
        name = args[0]
        known = self.list_commands(ctx)
        if name not in known and not name.startswith("-") and not ctx.resilient_parsing:
            raise _unknown("command", name, known, ctx.command_path)
        return super().resolve_command(ctx, args)


class Root(Group):
    """``mdo`` itself: its commands are those of :data:`COMMANDS` and of plugins."""

    _listing = False

    def list_commands(self, ctx: _Context) -> list[str]:  # noqa: ARG002 - typer's
        """The names of all commands."""
        return [*COMMANDS, *(name for name in plugins() if name not in COMMANDS)]

    def get_command(self, ctx: _Context, cmd_name: str) -> Any:  # noqa: ANN401, ARG002
        """A command, for which its module is imported; ``None`` if there is none."""
        if self._listing:
            return TyperCommand(cmd_name, short_help=_summary(cmd_name))
        if cmd_name not in COMMANDS and cmd_name not in plugins():
            return None
        return build(cmd_name, _load(cmd_name))

    def resolve_command(self, ctx: _Context, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """As of a group, but a command of the table is found without looking for plugins.

        :raise HostError: It is the lab's, which is not installed.
        """
        if args[0] in COMMANDS:
            return args[0], self.get_command(ctx, args[0]), args[1:]
        if args[0] == "lab" and "lab" not in plugins() and not ctx.resilient_parsing:
            raise HostError(
                "mdo lab needs a checkout of the project", "run it from there: make setup"
            )
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: _Context, formatter: Any) -> None:  # noqa: ANN401
        """Write the list of commands without importing them."""
        with self._names_only():
            super().format_commands(ctx, formatter)

    def shell_complete(self, ctx: _Context, incomplete: str) -> list[Any]:
        """Complete the name of a command without importing any."""
        with self._names_only():
            return super().shell_complete(ctx, incomplete)

    @contextmanager
    def _names_only(self) -> Iterator[None]:
        self._listing = True
        try:
            yield
        finally:
            self._listing = False


class Noun(typer.Typer):
    """Commands below one name, each added by ``@app.command(NAME)``."""

    def command(
        self,
        name: str | None = None,
        *,
        cls: type[TyperCommand] | None = None,
        **settings: Any,  # noqa: ANN401 - typer's
    ) -> Callable[[Any], Any]:
        """Add a command; :meth:`typer.Typer.command` says which settings there are."""
        return super().command(name, cls=cls or Command, **settings)


def noun(help: str) -> Noun:  # noqa: A002 - typer's name
    """An empty group of commands.

    :param help: What it is for; one sentence.
    """
    return Noun(cls=Group, help=help, **_PLAIN)


_PLAIN: dict[str, Any] = {
    "add_completion": False,
    "rich_markup_mode": None,
    "pretty_exceptions_enable": False,
}


def build(name: str, target: Callable[..., Any] | typer.Typer) -> Any:  # noqa: ANN401
    """A command for the tree, made of a function or of a group of commands."""
    if isinstance(target, typer.Typer):
        command: Any = typer.main.get_group(target)
    else:
        app = Noun(**_PLAIN)
        app.command(name)(target)
        command = typer.main.get_command(app)
    command.name = name
    return command


# ---- plugins ----


@cache
def plugins() -> dict[str, EntryPoint]:
    """Commands that other packages bring."""
    from importlib.metadata import entry_points

    return {point.name: point for point in entry_points(group=PLUGINS)}


def _load(name: str) -> Callable[..., Any] | typer.Typer:
    """What makes a command.

    :raise HostError: It is a plugin's, and cannot be imported.
    """
    if name in COMMANDS:
        module, _, attribute = COMMANDS[name][0].partition(":")
        return getattr(import_module(f"mdev_orchestrator.cli.{module}"), attribute)  # type: ignore[no-any-return]
    point = plugins()[name]
    try:
        return point.load()  # type: ignore[no-any-return]
    except Exception as error:
        package = f" of the package {point.dist.name}" if point.dist else ""
        what = f"{type(error).__name__}: {error}"
        raise HostError(
            f"the command {name}{package} cannot be loaded: {what}", "install it again"
        ) from error


def _summary(name: str) -> str:
    """What a list of commands says of one."""
    if name in COMMANDS:
        return COMMANDS[name][1]
    try:
        return str(build(name, _load(name)).get_short_help_str(WIDEST)).rstrip(".")
    except HostError as error:
        return error.message


# ---- the program ----


def _show_version(value: bool) -> None:
    if value:
        output.emit(f"mdo {__version__}")
        raise typer.Exit


def _show_tracebacks(value: bool) -> None:
    if value:
        os.environ["MDO_DEBUG"] = "1"


def mdo(
    *,
    _debug: Annotated[
        bool,
        typer.Option(
            "--debug",
            callback=_show_tracebacks,
            help="Show the traceback of an error (or set MDO_DEBUG).",
        ),
    ] = False,
    _version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Create mediated devices, launch QEMU guests with them and drive their hotplug."""


app = typer.Typer(
    cls=Root,
    callback=mdo,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": WIDEST},
    **_PLAIN | {"add_completion": True},
)


def root() -> Any:  # noqa: ANN401 - a click group
    """The whole program."""
    return typer.main.get_command(app)


def run(words: Sequence[str]) -> int:
    """Run the command that ``words`` name; gives the exit status.

    :raise RequestError: They name none, or do not say what it needs.
    :raise MdoError: It fails.
    """
    program = root()
    if os.environ.get(COMPLETE):
        program.main([], prog_name="mdo", complete_var=COMPLETE)  # ends the process
    try:
        with program.make_context("mdo", list(words)) as context:
            status = program.invoke(context)
    except typer.Exit as end:
        return end.exit_code
    except _UsageError as error:
        if "--json" in words:
            output.speak_json(on=True)
        raise _misused(error) from None
    return status if isinstance(status, int) else 0


def _misused(error: Any) -> RequestError:  # noqa: ANN401 - a click UsageError
    """The error of words that the parser does not take."""
    command = "mdo" if error.ctx is None else error.ctx.command_path
    if hasattr(error, "possibilities"):
        hint = f"did you mean {error.possibilities[0]}?" if error.possibilities else ""
        return RequestError(f"no such option: {error.option_name}", hint or f"{command} --help")
    message = error.format_message().rstrip(".")
    return RequestError(message[:1].lower() + message[1:], f"{command} --help")


def _unknown(what: str, name: str, known: Sequence[str], command: str) -> RequestError:
    from difflib import get_close_matches

    close = get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"{command} --help"
    return RequestError(f"no such {what}: {name}", hint)
