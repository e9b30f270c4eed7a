# SPDX-License-Identifier: GPL-2.0-or-later
"""How words on the command line become values, for every command that there is."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from functools import cache, wraps
from pathlib import Path
from typing import Any

import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st

from mdev_orchestrator.cli import main, output, tree

Click = Any
"""An object of click's, for which typer has no public name."""


@cache
def commands() -> dict[str, Any]:
    """Each command by its words, such as ``guest start``."""
    program = tree.root()

    def below(command: Click, context: Click, words: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
        if not hasattr(command, "list_commands"):
            yield " ".join(words), command
            return
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            with child.make_context(name, [], parent=context, resilient_parsing=True) as inner:
                yield from below(child, inner, (*words, name))

    with program.make_context("mdo", [], resilient_parsing=True) as context:
        return dict(below(program, context, ()))


def parse(name: str, *words: str) -> dict[str, Any]:
    """What a command's function would be called with."""
    original = commands()[name]
    values: dict[str, Any] = {}

    @wraps(original.callback.__wrapped__)
    def record(**given: object) -> None:
        values.update(given)

    command = tree.build(name, record)
    command.context_settings = original.context_settings
    names = {"help_option_names": ["-h", "--help"]}
    with command.make_context(f"mdo {name}", list(words), **names) as context:
        command.invoke(context)
    return values


def run(*words: str) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = main.main(words)
        except SystemExit as end:
            code = int(end.code or 0)
    return code, out.getvalue(), err.getvalue()


def test_there_are_as_many_as_there_were() -> None:
    assert len(commands()) > 30
    wanted = {"host", "attach", "guest start", "lab run", "qemu build", "service show"}
    assert wanted <= {*commands()}


@pytest.mark.parametrize("name", commands())
def test_every_command_and_parameter_has_a_help(name: str) -> None:
    command = commands()[name]
    assert command.help
    context = typer.Context(command, info_name=name)
    for parameter in command.params:
        assert parameter.help.endswith((".", "\u2026")), parameter.name
        written, _ = parameter.get_help_record(context)
        assert "<" not in written, "a metavar of typer's own"
    code, out, err = run(*name.split(), "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"Usage: mdo {name} [OPTIONS]")
    assert "{" not in out.splitlines()[0]


@pytest.mark.parametrize(
    ("words", "values"),
    [
        ("t-1", {"type_id": "t-1"}),
        ("t-1 -n 3", {"type_id": "t-1", "count": 3}),
        ("t-1 -n3", {"type_id": "t-1", "count": 3}),
        ("--count=3 t-1 --count=4", {"type_id": "t-1", "count": 4}),
        ("t-1 --deadline 0.5", {"type_id": "t-1", "deadline": 0.5}),
        ("t-1 --set a=b --set=c=d=e", {"type_id": "t-1", "set_": ["a=b", "c=d=e"]}),
        ("t-1 --group -g", {"type_id": "t-1", "group": "-g"}),
        ("-- --json", {"type_id": "--json"}),
        ("- --json", {"type_id": "-", "json": True}),
    ],
)
def test_words_become_values(words: str, values: dict[str, Any]) -> None:
    found = parse("create", *words.split())
    default = parse("create", "x")
    assert {name: value for name, value in found.items() if value != default[name]} == values


def test_a_value_may_begin_with_a_dash() -> None:
    values = parse("guest start", "g", "--arg", "-device", "--arg", "--x=y", "--arg=-nic")
    assert values["arg"] == ["-device", "--x=y", "-nic"]
    assert parse("guest start", "g", "--append", "-- quiet")["append"] == "-- quiet"


@pytest.mark.parametrize(
    ("words", "command", "name"),
    [
        ("ls", ["ls"], "run"),
        ("ls -l --name x -- y", ["ls", "-l", "--name", "x", "--", "y"], "run"),
        ("--name x ls --help", ["ls", "--help"], "x"),
        ("--name x -- -c -- d", ["-c", "--", "d"], "x"),
    ],
)
def test_another_programs_words_are_left_alone(words: str, command: list[str], name: str) -> None:
    values = parse("lab run", *words.split())
    assert (values["command"], values["name"]) == (command, name)


def test_the_environment_gives_what_words_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MDO_QEMU", "another")
    assert parse("guest start", "g")["qemu"] == "another"
    assert parse("guest start", "g", "--qemu", "third")["qemu"] == "third"
    monkeypatch.setenv("MDO_QEMU", "")  # as good as unset
    assert parse("guest start", "g")["qemu"] == "qemu-system-x86_64"


def test_paths_are_paths_and_numbers_are_numbers() -> None:
    values = parse("guest start", "g", "--kernel", "~/k", "--cpus", "2")
    assert values["kernel"] == Path("~/k")
    assert (values["cpus"], values["deadline"]) == (2, 60.0)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("creat t", "no such command: creat \u2014 did you mean create?"),
        ("xyzzy", "no such command: xyzzy \u2014 mdo --help"),
        ("guest strat g", "no such command: strat \u2014 did you mean start?"),
        ("guest --x", "no such option: --x \u2014 mdo guest --help"),
        ("--frob host", "no such option: --frob \u2014 mdo --help"),
        ("create", "missing argument 'TYPE' \u2014 mdo create --help"),
        ("create t -x", "no such option: -x \u2014 mdo create --help"),
        ("create t --cuont 3", "no such option: --cuont \u2014 did you mean --count?"),
        (
            "create t --cou 3",
            "no such option: --cou \u2014 did you mean --count?",
        ),  # never cut short
        ("recover --dry", "no such option: --dry \u2014 did you mean --dry-run?"),
        ("create t -n", "option '-n' requires an argument \u2014 mdo create --help"),
        ("create t -n x", "invalid value for '-n' / '--count': 'x' is not a valid int"),
        ("create t -n 1.5", "invalid value for '-n' / '--count': '1.5' is not a valid int"),
        ("create t --deadline x", "invalid value for '--deadline': 'x' is not a valid float"),
        ("create t --deadline 0", "invalid value for '--deadline': 0.0 is not in the range x>=0.1"),
        ("create t --deadline nan", "invalid value for '--deadline': nan is not a number"),
        ("create t --json=yes", "option '--json' does not take a value"),
        ("create t u", "got unexpected extra argument"),
        ("diff f --policy scatter", "invalid value for '--policy': 'scatter' is not one of"),
        ("remove", "missing argument 'UUID...' \u2014 mdo remove --help"),
    ],
)
def test_words_that_are_wrong_are_one_line_and_status_2(words: str, line: str) -> None:
    code, out, err = run(*words.split())
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"mdo: {line}")


def test_words_that_are_wrong_are_json_where_that_is_asked_for() -> None:
    code, _, err = run("host", "--jsno", "--json")
    assert code == 2
    error = json.loads(err)["error"]
    assert error["message"] == "no such option: --jsno"
    assert (error["kind"], error["hint"]) == ("RequestError", "did you mean --json?")


@pytest.mark.parametrize("words", [(), ("guest",), ("lab",)])
def test_no_command_is_a_usage_error_with_help(words: tuple[str, ...]) -> None:
    code, out, err = run(*words)
    assert (code, out) == (2, "")
    assert err.startswith(f"Usage: {' '.join(('mdo', *words))} [OPTIONS] COMMAND")
    assert run(*words, "--help") == (0, err, "")


def test_help_is_given_although_words_are_missing_or_no_values() -> None:
    assert run("create", "-h")[0] == 0
    assert run("create", "-n", "x", "--help")[0] == 0


def test_what_the_function_returns_is_the_status(monkeypatch: pytest.MonkeyPatch) -> None:
    from mdev_orchestrator.cli import apply

    monkeypatch.setattr(apply, "diff", three)
    assert run("diff")[0] == 3


def three() -> int:
    """Give 3."""
    return 3


def words_for(command: Click) -> st.SearchStrategy[list[str]]:
    names = st.sampled_from(["--help", *(name for it in command.params for name in it.opts)])
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
@given(st.sampled_from(sorted(commands())), st.data())
def test_any_words_call_the_function_or_are_one_line(name: str, data: st.DataObject) -> None:
    words = data.draw(words_for(commands()[name]))
    out, err = io.StringIO(), io.StringIO()
    try:
        with redirect_stdout(out), redirect_stderr(err):
            parse(name, *words)
    except typer.Exit:
        assert out.getvalue().startswith("Usage: ")
    except tree._UsageError:
        output.speak_json(on=False)
        code, said, err_line = run(*name.split(), *words)
        assert (code, said) == (2, "")
        (line,) = err_line.split("\n")[:-1]
        assert line.startswith(("mdo: ", '{"error":'))
    finally:
        output.speak_json(on=False)


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    return lambda text: monkeypatch.setattr("sys.stdin", io.StringIO(text))


@pytest.mark.parametrize("answer", ["y\n", "Y\n", "yes\n", " yes \n", "y"])
def test_yes(
    answer: str, answers: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    answers(answer)
    output.confirm("Go on?")
    assert capsys.readouterr() == ("", "Go on? [y/N]: ")


@pytest.mark.parametrize("answer", ["\n", "n\n", "no\n", "yess\n", ""])
def test_anything_else_is_no(
    answer: str, answers: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    answers(answer)
    with pytest.raises(SystemExit) as caught:
        output.confirm("Go on?")
    assert caught.value.code == 1
    assert capsys.readouterr() == ("", "Go on? [y/N]: " + "\n" * (not answer))
