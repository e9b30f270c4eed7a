# SPDX-License-Identifier: GPL-2.0-or-later
"""How words on a command line become what a command's function is called with."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdev_orchestrator.cli import main, output, plugins
from mdev_orchestrator.cli.options import Argument, Command, Group, Option, Parameter
from mdev_orchestrator.errors import RequestError


class Colour(StrEnum):
    RED = "red"
    BLUE = "blue"


def paint(
    what: Annotated[str, Argument(metavar="WHAT", help="A thing.")],
    more: Annotated[list[str] | None, Argument(metavar="MORE...", help="Further things.")] = None,
    *,
    count: Annotated[int, Option("-n", "--count", min=1, help="How often.")] = 1,
    seconds: Annotated[float | None, Option(min=0.5, help="How long.")] = None,
    colour: Annotated[Colour, Option(help="With what.")] = Colour.RED,
    dry_run: Annotated[bool, Option("-d", "--dry-run", help="Do not.")] = False,
    loud: Annotated[bool, Option("-l", "--loud", help="Sing.")] = False,
    to: Annotated[Path | None, Option("-o", metavar="FILE", help="Where.")] = None,
    tag: Annotated[list[int] | None, Option(help="Numbers.")] = None,
    tool: Annotated[str, Option(envvar="MDO_TEST_TOOL", help="By what.")] = "brush",
) -> int:
    """Paint things.

    Ends with the number of them.
    """
    return 1 + len(more or ())


def run(
    command: Annotated[list[str], Argument(metavar="COMMAND...", rest=True, help="It.")],
    name: Annotated[str, Option(help="Whose.")] = "us",
) -> None:
    """Run a command."""


def parse(*words: str) -> dict[str, Any]:
    """What differs from the defaults."""
    command = Command(paint, "mdo paint")
    values = command.parse(words)
    assert values is not None
    assert list(values) == [parameter.name for parameter in command.parameters]
    return {
        parameter.name: values[parameter.name]
        for parameter in command.parameters
        if values[parameter.name] != parameter.default
    }


@pytest.mark.parametrize(
    ("words", "values"),
    [
        ("a", {"what": "a"}),
        ("a b c", {"what": "a", "more": ["b", "c"]}),
        ("-n 3 a", {"what": "a", "count": 3}),
        ("a -n3", {"what": "a", "count": 3}),
        ("a --count 3 b", {"what": "a", "more": ["b"], "count": 3}),
        ("a --count=3 --count=4", {"what": "a", "count": 4}),
        ("a --seconds 0.5", {"what": "a", "seconds": 0.5}),
        ("a --colour blue", {"what": "a", "colour": Colour.BLUE}),
        ("a -dl", {"what": "a", "dry_run": True, "loud": True}),
        ("a -dn2", {"what": "a", "dry_run": True, "count": 2}),
        ("a -do f", {"what": "a", "dry_run": True, "to": Path("f")}),
        ("a --dry-run --dry-run", {"what": "a", "dry_run": True}),
        ("a --tag 1 b --tag=2", {"what": "a", "more": ["b"], "tag": [1, 2]}),
        ("-- -n --count", {"what": "-n", "more": ["--count"]}),
        ("a -- -- -n", {"what": "a", "more": ["--", "-n"]}),
        ("- -d -", {"what": "-", "more": ["-"], "dry_run": True}),
        ("a -o --", {"what": "a", "to": Path("--")}),  # a value may begin with a dash
        ("a -o -n", {"what": "a", "to": Path("-n")}),
        ("a --tool=", {"what": "a", "tool": ""}),
        ("a --tool=x=y", {"what": "a", "tool": "x=y"}),
        ("a --tag=-1", {"what": "a", "tag": [-1]}),
    ],
)
def test_words_become_values(words: str, values: dict[str, Any]) -> None:
    found = parse(*words.split())
    assert found == values
    assert {name: type(it) for name, it in found.items()} == {
        name: type(it) if name != "to" else type(Path()) for name, it in values.items()
    }


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("", "missing argument 'WHAT' (mdo paint --help)"),
        ("a -x", "no such option: -x (mdo paint --help)"),
        ("a -dx", "no such option: -x (mdo paint --help)"),
        ("a --cuont 3", "no such option: --cuont (did you mean --count?)"),
        ("a --col blue", "no such option: --col (did you mean --colour?)"),  # never cut short
        ("a --dry", "no such option: --dry (did you mean --dry-run?)"),
        ("a --=3", "no such option: -- (mdo paint --help)"),
        ("a --count", "option '--count' requires an argument (mdo paint --help)"),
        ("a -n", "option '-n' requires an argument (mdo paint --help)"),
        ("a --loud=yes", "option '--loud' does not take a value (mdo paint --help)"),
        ("a -n 0", "invalid value for '-n' / '--count': '0' is not 1 or more (mdo paint --help)"),
        ("a -n x", "invalid value for '-n' / '--count': 'x' is not a whole number"),
        ("a -n 1.5", "invalid value for '-n' / '--count': '1.5' is not a whole number"),
        ("a --tag 1 --tag x", "invalid value for '--tag': 'x' is not a whole number"),
        ("a --seconds x", "invalid value for '--seconds': 'x' is not a number"),
        ("a --seconds .4", "invalid value for '--seconds': '.4' is not 0.5 or more"),
        ("a --seconds nan", "invalid value for '--seconds': 'nan' is not 0.5 or more"),
        ("a --colour RED", "invalid value for '--colour': 'RED' is not one of 'red', 'blue'"),
    ],
)
def test_words_that_are_wrong(words: str, line: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse(*words.split())
    assert str(caught.value).startswith(line)


def test_an_argument_too_many() -> None:
    def nothing(one: Annotated[str, Argument(help="It.")]) -> None:
        """Do nothing."""

    with pytest.raises(RequestError, match="got unexpected extra argument 'b'"):
        Command(nothing, "mdo nothing").parse(["a", "b", "c"])


@pytest.mark.parametrize(
    ("words", "command", "name"),
    [
        ("ls", ["ls"], "us"),
        ("ls -l --name x -- y", ["ls", "-l", "--name", "x", "--", "y"], "us"),
        ("--name x ls --help", ["ls", "--help"], "x"),
        ("--name x -- -c -- d", ["-c", "--", "d"], "x"),
    ],
)
def test_another_programs_words_are_left_alone(words: str, command: list[str], name: str) -> None:
    values = Command(run, "mdo run").parse(words.split())
    assert values == {"command": command, "name": name}


def test_the_environment_says_what_words_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MDO_TEST_TOOL", "roller")
    assert parse("a") == {"what": "a", "tool": "roller"}
    assert parse("a", "--tool", "pen") == {"what": "a", "tool": "pen"}
    monkeypatch.setenv("MDO_TEST_TOOL", "")  # as good as unset
    assert parse("a") == {"what": "a"}


def test_what_the_function_returns_is_the_status() -> None:
    assert Command(paint, "mdo paint")(["a", "b", "c"]) == 3
    assert Command(run, "mdo run")(["a"]) == 0


def test_help(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "56")
    assert Command(paint, "mdo paint")(["--help"]) == 0
    assert (
        capsys.readouterr().out
        == """\
Usage: mdo paint [OPTIONS] WHAT [MORE...]

Paint things.

Ends with the number of them.

Arguments:
  WHAT     A thing.
  MORE...  Further things.

Options:
  -n, --count INTEGER
                      How often. [at least 1] [default:
                      1]
  --seconds NUMBER    How long. [at least 0.5]
  --colour red|blue   With what. [default: red]
  -d, --dry-run       Do not.
  -l, --loud          Sing.
  -o FILE             Where.
  --tag INTEGER       Numbers.
  --tool TEXT         By what. [env var: MDO_TEST_TOOL]
                      [default: brush]
  -h, --help          Show this text.
"""
    )


def test_help_is_given_although_words_are_missing_or_no_values() -> None:
    assert Command(paint, "mdo paint").parse(["-h"]) is None
    assert Command(paint, "mdo paint").parse(["a", "-n", "x", "--help"]) is None


def test_a_group(capsys: pytest.CaptureFixture[str]) -> None:
    group = Group({"paint": paint, "run": run}, "mdo do", "Do things")
    assert group([]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "\n  paint  Paint things.\n  run    Run a command.\n" in said.err
    assert group(["--help"]) == 0
    assert capsys.readouterr().out == said.err
    assert group(["paint", "a", "b"]) == 2  # its function's
    with pytest.raises(RequestError, match=r"no such command: rnu \(did you mean run\?\)"):
        group(["rnu"])
    with pytest.raises(RequestError, match=r"no such option: --x \(mdo do --help\)"):
        group(["--x"])
    with pytest.raises(RequestError, match=r"missing argument 'WHAT' \(mdo do paint --help\)"):
        group(["paint"])


# ---- every command of mdo ----


def commands() -> Iterator[tuple[list[str], Command]]:
    for name in (*main.COMMANDS, *plugins.installed()):
        found = main.command(name)
        if isinstance(found, Group):
            yield from (([name, one], found.command(one)) for one in found.commands)
        else:
            yield [name], found


COMMANDS = {" ".join(words): command for words, command in commands()}


def test_there_are_as_many_as_there_were() -> None:
    assert len(COMMANDS) > 30
    assert {"host", "attach", "guest start", "lab run", "qemu build", "service show"} <= {*COMMANDS}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_parameter_can_be_given_and_is_in_the_help(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = COMMANDS[name]
    code = command.function.__code__
    assert [it.name for it in command.parameters] == list(
        code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    )
    assert [it for it in command.arguments if it.many] == [
        it for it in command.arguments[-1:] if it.many
    ]
    for parameter in command.parameters:
        assert parameter.type in {str, int, float, bool, Path} or parameter.choices
        assert parameter.help.endswith((".", "\u2026"))
        assert not parameter.flag or parameter.default is False
    for columns in ("1", "80", "1000"):
        monkeypatch.setenv("COLUMNS", columns)
        text = command.help()
        assert text.startswith(f"Usage: mdo {name}")
        assert max(map(len, text.splitlines())) <= 100
        for parameter in command.parameters:
            assert all(f" {word}" in text for word in parameter.names or (parameter.metavar,))


def right(parameter: Parameter, value: object) -> bool:
    """Whether a function's parameter may have this value."""
    if value is parameter.default:
        return True
    kind = type(Path()) if parameter.type is Path else parameter.type
    if parameter.many:
        return isinstance(value, list) and value != [] and {type(it) for it in value} == {kind}
    return type(value) is kind


def words_for(command: Command) -> st.SearchStrategy[list[str]]:
    names = st.sampled_from(sorted(command.options))
    values = st.one_of(
        st.sampled_from(
            ["1", "0", "-1", "0.5", "nan", "inf", "1e999", "pack", "", "-", "--", "-h"]
        ),
        st.text(max_size=6),
    )
    joined = st.tuples(names, values).map("=".join)
    stuck = st.tuples(names, values).map("".join)
    return st.lists(st.one_of(names, names, values, values, joined, stuck), max_size=8)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(COMMANDS)), st.data())
def test_any_words_call_the_function_rightly_or_are_one_line(
    name: str, data: st.DataObject
) -> None:
    command = COMMANDS[name]
    words = data.draw(words_for(command))
    out, err = io.StringIO(), io.StringIO()
    try:
        values = command.parse(words)
    except RequestError:
        with redirect_stdout(out), redirect_stderr(err):
            assert main.main([*name.split(), *words]) == 2
        (line,) = err.getvalue().split("\n")[:-1]
        assert line.startswith("mdo: ")
        assert out.getvalue() == ""
        return
    if values is None:
        assert {"-h", "--help"} & {*words} or any(word[:1] == "-" and "h" in word for word in words)
        return
    assert list(values) == [parameter.name for parameter in command.parameters]
    for parameter in command.parameters:
        assert right(parameter, values[parameter.name]), parameter.name


# ---- asking ----


@pytest.mark.parametrize("answer", ["y\n", "Y\n", "yes\n", " yes \n", "y"])
def test_yes(
    answer: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(answer))
    output.confirm("Go on?")
    assert capsys.readouterr() == ("", "Go on? [y/N]: ")


@pytest.mark.parametrize("answer", ["\n", "n\n", "no\n", "yess\n", ""])
def test_anything_else_is_no(
    answer: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(answer))
    with pytest.raises(SystemExit) as caught:
        output.confirm("Go on?")
    assert caught.value.code == 1
    assert capsys.readouterr() == ("", "Go on? [y/N]: " + "\n" * (not answer))
