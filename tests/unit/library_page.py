# SPDX-License-Identifier: GPL-2.0-or-later
"""The examples of docs/library.md, to be run by tests.

One that imports the library is a program. Any other is the body of an ``async with mdo.open() as
machine``: it may use ``machine``, ``mdo`` and ``asyncio``.
"""

from __future__ import annotations

import ast
import asyncio
import re
import textwrap
from collections.abc import Awaitable
from dataclasses import dataclass
from pathlib import Path
from types import CodeType

import mdev_orchestrator as mdo

PAGE = Path(__file__).resolve().parents[2] / "docs/library.md"

_EXAMPLE = re.compile(r"^(<!-- needs a guest -->\n)?```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
_ROW = re.compile(r"^\| (`.*?) \|", re.MULTILINE)


@dataclass(frozen=True)
class Example:
    """One fenced block.

    :ivar line: Of the page, on which the code begins.
    :ivar needs_guest: It is for a guest ``render-1`` that runs and takes devices.
    """

    line: int
    code: str
    needs_guest: bool

    def __str__(self) -> str:
        return f"line-{self.line}"

    @property
    def is_program(self) -> bool:
        return "import mdev_orchestrator" in self.code

    def compile(self) -> CodeType:
        """Code whose evaluation gives an awaitable, unless it is a program."""
        tree = ast.increment_lineno(ast.parse(self.code), self.line - 1)
        flags = 0 if self.is_program else ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
        code: CodeType = compile(tree, str(PAGE), "exec", flags=flags)
        return code

    def run_program(self) -> None:
        exec(self.compile(), {"__name__": "__main__"})  # noqa: S102

    async def run(self, machine: mdo.OpenMachine) -> None:
        names: dict[str, object] = {"machine": machine, "mdo": mdo, "asyncio": asyncio}
        body: Awaitable[None] | None = eval(self.compile(), names)  # noqa: S307
        if body is not None:
            await body


def examples() -> list[Example]:
    text = PAGE.read_text("utf-8")
    return [
        Example(text.count("\n", 0, match.start(2)) + 1, match[2], match[1] is not None)
        for match in _EXAMPLE.finditer(text)
    ]


def as_module() -> str:
    """All examples in one module, each as a function, for a type checker."""
    found = examples()
    bodies = [
        f"async def example_{example.line}(machine: mdo.OpenMachine) -> None:\n"
        + textwrap.indent(example.code, "    ")
        for example in found
        if not example.is_program
    ]
    programs = [example.code for example in found if example.is_program]
    return "\n\n".join([*programs, *bodies])


def listed_names() -> list[str]:
    """The names of the page's last table."""
    _, _, table = PAGE.read_text("utf-8").partition("## All names\n")
    return [name for row in _ROW.findall(table) for name in re.findall(r"`(\w+)`", row)]
