# SPDX-License-Identifier: GPL-2.0-or-later
"""A command's options, arguments and help, made of the signature of its function::

    def create(
        type_id: Annotated[str, Argument(metavar="TYPE", help="Id of a type.")],
        *,
        count: Annotated[int, Option("-n", "--count", help="How many devices.")] = 1,
        json: Annotated[bool, Option("--json", help="One JSON document.")] = False,
    ) -> int | None:
        '''Create devices of one type.'''

What has no default must be given. A value is a ``str``, ``int``, ``float``, ``Path`` or an enum of
strings; a ``bool`` is an option without a value; a ``list`` is an option that may be repeated, or
all arguments that are left. ``| None`` is for what has no value when it is not given. What the
function returns is the exit status, and ``None`` is 0.

Words are read as GNU programs read them: options and arguments in any order, ``--`` ends the
options, ``-n3`` and ``--count=3`` mean ``-n 3`` and ``--count 3``, and a value may begin with a
dash. No name may be cut short, so that a new option never changes what an old script does.
"""

from __future__ import annotations

import os
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path
from types import FunctionType, NoneType, UnionType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from mdev_orchestrator.cli import output
from mdev_orchestrator.errors import RequestError


class Option:
    """Marks a parameter that is given by name.

    :ivar names: As they are written, such as ``-n`` and ``--count``; the parameter's own if empty.
    :ivar metavar: What stands for its value in help texts.
    :ivar min: The lowest value that is allowed.
    :ivar envvar: Variable of the environment that says it when the option is not given.
    """

    __slots__ = ("envvar", "help", "metavar", "min", "names")

    def __init__(
        self,
        *names: str,
        help: str,  # noqa: A002 - what it is called everywhere
        metavar: str = "",
        min: float | None = None,  # noqa: A002
        envvar: str = "",
    ) -> None:
        self.names = names
        self.help = help
        self.metavar = metavar
        self.min = min
        self.envvar = envvar


class Argument:
    """Marks a parameter that is given by its place.

    :ivar metavar: What stands for it in help texts and messages; the parameter's name if empty.
    :ivar rest: It takes every word from its first one on, also those that look like options.
    """

    __slots__ = ("help", "metavar", "rest")

    def __init__(self, *, help: str, metavar: str = "", rest: bool = False) -> None:  # noqa: A002
        self.help = help
        self.metavar = metavar
        self.rest = rest


REQUIRED = object()
"""The default of a parameter that must be given."""

KINDS = {
    str: ("TEXT", "text"),
    int: ("INTEGER", "a whole number"),
    float: ("NUMBER", "a number"),
    Path: ("PATH", "a path"),
}
"""For a type what stands for its values in help texts, and what messages call them."""


class Parameter:
    """A parameter of a command's function.

    :ivar name: What the function calls it.
    :ivar option: How it is given by name; ``None`` for an argument.
    :ivar names: How that is written.
    :ivar metavar: What stands for its value in help texts and messages.
    :ivar type: Makes a value of a word.
    :ivar many: It takes several words, and its value is a list.
    :ivar rest: It takes every word that is left.
    """

    def __init__(self, name: str, hint: object, default: object = REQUIRED) -> None:
        kind, mark = get_args(hint)
        if isinstance(kind, UnionType):
            (kind,) = (part for part in get_args(kind) if part is not NoneType)
        self.many = get_origin(kind) is list
        self.type: type[Any] = get_args(kind)[0] if self.many else kind
        self.flag = self.type is bool
        self.name = name
        self.default = default
        self.help: str = mark.help
        self.metavar: str = mark.metavar or name.upper()
        self.option = mark if isinstance(mark, Option) else None
        self.rest = self.option is None and mark.rest
        self.names: tuple[str, ...] = ()
        if self.option is not None:
            self.names = self.option.names or (f"--{name.replace('_', '-')}",)
            self.metavar = mark.metavar or "|".join(self.choices) or KINDS.get(self.type, ("",))[0]

    @property
    def choices(self) -> list[str]:
        """The values of an enum; empty for any other type."""
        return [str(one.value) for one in self.type] if issubclass(self.type, Enum) else []

    def __str__(self) -> str:
        return " / ".join(f"'{name}'" for name in self.names or (self.metavar,))

    def read(self, word: str) -> Any:  # noqa: ANN401 - of its type
        """Make a value of a word.

        :raise ValueError: It is none; says why.
        """
        try:
            value = self.type(word)
        except ValueError:
            one_of = ", ".join(map(repr, self.choices))
            wanted = f"one of {one_of}" if one_of else KINDS[self.type][1]
            raise ValueError(f"{word!r} is not {wanted}") from None
        least = None if self.option is None else self.option.min
        if least is not None and not value >= least:  # nor is what is no number
            raise ValueError(f"{word!r} is not {least:g} or more")
        return value

    def usage(self) -> tuple[str, str]:
        """How it is written and what it does, for a help text."""
        written = ", ".join(self.names) or self.metavar
        if self.names and self.metavar:
            written += f" {self.metavar}"
        remarks = []
        if self.option is not None and self.option.min is not None:
            remarks.append(f"at least {self.option.min:g}")
        if self.option is not None and self.option.envvar:
            remarks.append(f"env var: {self.option.envvar}")
        if not self.flag and self.default not in {REQUIRED, None, ""}:
            remarks.append(f"default: {self.default}")
        return written, " ".join((self.help, *(f"[{remark}]" for remark in remarks)))


HELP = Parameter("help", Annotated[bool, Option("-h", "--help", help="Show this text.")], False)


class Command:
    """A function as a command.

    :ivar name: How it is called, such as ``mdo guest start``.
    :ivar parameters: Those of the function, in its order.
    :ivar options: By each of their names, help with them.
    """

    def __init__(self, function: FunctionType, name: str) -> None:
        self.function = function
        self.name = name
        hints = get_type_hints(function, include_extras=True)
        hints.pop("return", None)
        defaults = _defaults(function)
        self.parameters = [
            Parameter(name, hint, defaults.get(name, REQUIRED)) for name, hint in hints.items()
        ]
        self.arguments = [it for it in self.parameters if it.option is None]
        self.options = {name: it for it in (*self.parameters, HELP) for name in it.names}

    def __call__(self, words: Iterable[str]) -> int:
        """Call the function with what ``words`` say, or print its help; gives the exit status.

        :raise RequestError: They do not say what it needs.
        """
        values = self.parse(words)
        if values is None:
            output.emit(self.help())
            return 0
        return self.function(**values) or 0

    def parse(self, words: Iterable[str]) -> dict[str, Any] | None:
        """A value for each parameter of the function; ``None`` if the words ask for help.

        :raise RequestError: A word is unknown, is no value, is too many, or is missing.
        """
        given, others = self._sort(iter(words))
        if HELP.name in given:
            return None
        for argument in self.arguments:
            count = len(others) if argument.many else 1
            given[argument.name], others = others[:count], others[count:]
        if others:
            raise self._misused(f"got unexpected extra argument {others[0]!r}")
        return {it.name: self._value(it, given[it.name]) for it in self.parameters}

    def _sort(self, words: Iterator[str]) -> tuple[dict[str, list[str]], list[str]]:
        """The values given for each option, and all other words."""
        given: dict[str, list[str]] = defaultdict(list)
        others: list[str] = []
        for word in words:
            if word == "--":
                others.extend(words)
            elif word == "-" or not word.startswith("-"):
                others.append(word)
                if self.arguments and self.arguments[-1].rest:
                    others.extend(words)
            else:
                for name, value in self._options_of(word):
                    option = self._option(name)
                    given[option.name].append(self._joined(option, name, value, words))
        return given, others

    def _options_of(self, word: str) -> Iterator[tuple[str, str | None]]:
        """The options in a word that begins with a dash, with the value that is joined to one."""
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            yield name, value if equals else None
            return
        name, more = word[:2], word[2:]
        while more and self._option(name).flag:
            yield name, None
            name, more = f"-{more[0]}", more[1:]
        yield name, more or None

    def _joined(self, option: Parameter, name: str, value: str | None, words: Iterator[str]) -> str:
        """The value of an option: what is joined to its name, or else the next word."""
        if option.flag:
            if value is not None:
                raise self._misused(f"option '{name}' does not take a value")
            return ""
        value = next(words, None) if value is None else value
        if value is None:
            raise self._misused(f"option '{name}' requires an argument")
        return value

    def _option(self, name: str) -> Parameter:
        if name not in self.options:
            raise unknown("option", name, self.options, self.name)
        return self.options[name]

    def _value(self, parameter: Parameter, words: list[str]) -> Any:  # noqa: ANN401 - its
        if not words and parameter.option is not None and parameter.option.envvar:
            words = list(filter(None, [os.environ.get(parameter.option.envvar)]))
        if not words:
            if parameter.default is REQUIRED:
                raise self._misused(f"missing argument {parameter}")
            return parameter.default
        if parameter.flag:
            return True
        try:
            values = [parameter.read(word) for word in words]
        except ValueError as error:
            raise self._misused(f"invalid value for {parameter}: {error}") from None
        return values if parameter.many else values[-1]

    def _misused(self, message: str) -> RequestError:
        return RequestError(message, f"{self.name} --help")

    def help(self) -> str:
        """What it does, with which arguments and options, as wide as the terminal."""
        placed = [
            it.metavar if it.default is REQUIRED else f"[{it.metavar}]" for it in self.arguments
        ]
        options = [it for it in self.parameters if it.option is not None]
        return page(
            " ".join((self.name, "[OPTIONS]", *placed)),
            _paragraphs(self.function),
            {
                "Arguments": [it.usage() for it in self.arguments],
                "Options": [it.usage() for it in (*options, HELP)],
            },
        )


def _defaults(function: FunctionType) -> dict[str, object]:
    # inspect.signature() knows them too, and is slow to load
    placed = function.__code__.co_varnames[: function.__code__.co_argcount]
    defaults = function.__defaults__ or ()
    found = dict(zip(placed[len(placed) - len(defaults) :], defaults, strict=True))
    return found | (function.__kwdefaults__ or {})


class Group:
    """Commands below one name.

    :ivar commands: The function of each.
    :ivar name: How the group is called, such as ``mdo guest``.
    :ivar text: What it is for.
    """

    def __init__(self, commands: Mapping[str, FunctionType], name: str, text: str) -> None:
        self.commands = commands
        self.name = name
        self.text = text

    def __call__(self, words: Sequence[str]) -> int:
        """Run the command that ``words`` begin with; gives the exit status.

        :raise RequestError: There is no such command, or it is not told what it needs.
        """
        if not words:
            sys.stderr.write(self.help() + "\n")
            return output.USAGE_ERROR
        name, *rest = words
        if name in HELP.names:
            output.emit(self.help())
            return 0
        if name.startswith("-"):
            raise unknown("option", name, HELP.names, self.name)
        if name not in self.commands:
            raise unknown("command", name, self.commands, self.name)
        return self.command(name)(rest)

    def command(self, name: str) -> Command:
        """One of its commands."""
        return Command(self.commands[name], f"{self.name} {name}")

    def help(self) -> str:
        """What it is for and its commands, as wide as the terminal."""
        summaries = [
            (name, " ".join(_paragraphs(function)[0].split()))
            for name, function in self.commands.items()
        ]
        return page(
            f"{self.name} [OPTIONS] COMMAND [ARGS]...",
            [f"{self.text}."],
            {"Options": [HELP.usage()], "Commands": summaries},
        )


def _paragraphs(function: FunctionType) -> list[str]:
    return (function.__doc__ or "").split("\n\n")


def unknown(what: str, name: str, known: Iterable[str], command: str) -> RequestError:
    """The error of a word that should be a name.

    :param what: What is asked for: ``option`` or ``command``.
    :param known: All names that there are.
    :param command: Whose names they are, such as ``mdo guest``.
    """
    from difflib import get_close_matches

    close = get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"{command} --help"
    return RequestError(f"no such {what}: {name}", hint)


NARROW, WIDE = 40, 100
"""Columns of a help text, whatever the terminal has."""


def page(
    usage: str, paragraphs: Iterable[str], tables: Mapping[str, Sequence[tuple[str, str]]]
) -> str:
    """A help text: how to write the command, what it does, and what it takes.

    :param tables: What there is and what it does, under their titles; an empty one is left out.
    """
    from shutil import get_terminal_size
    from textwrap import wrap

    width = min(max(get_terminal_size().columns, NARROW), WIDE)
    lines = [f"Usage: {usage}"]
    for paragraph in paragraphs:
        lines += ["", *wrap(" ".join(paragraph.split()), width, break_on_hyphens=False)]
    for title, rows in tables.items():
        if not rows:
            continue
        left = min(max(len(name) for name, _ in rows), width // 3)
        lines += ["", f"{title}:"]
        pad = " " * (left + 4)
        for name, what in rows:
            head = f"  {name:{left}}  "
            if len(name) > left:
                lines.append(f"  {name}")
                head = pad
            lines += wrap(
                what, width, initial_indent=head, subsequent_indent=pad, break_on_hyphens=False
            )
    return "\n".join(lines)
