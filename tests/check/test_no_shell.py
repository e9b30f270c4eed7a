# SPDX-License-Identifier: GPL-2.0-or-later
"""No shell reads anything that a user or a program gave: ruff forbids ``shell=True`` and its like
(S602, S604, S605), and what is run by ``sh -c`` is a fixed text of ours.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "python").rglob("*.py"))


def scripts(tree: ast.AST) -> list[ast.expr]:
    """What follows ``"sh", "-c"`` in a list or a tuple."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.List, ast.Tuple)):
            words = [e.value if isinstance(e, ast.Constant) else None for e in node.elts]
            found += [
                node.elts[number + 2]
                for number in range(len(words) - 2)
                if words[number] in {"sh", "/bin/sh", "bash"} and str(words[number + 1])[:1] == "-"
            ]
    return found


def texts(tree: ast.AST) -> set[str]:
    """Names that are given a fixed text, and nothing else."""
    given: dict[str, list[bool]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            fixed = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
            given.setdefault(node.targets[0].id, []).append(fixed)
    return {name for name, fixed in given.items() if all(fixed)}


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_a_shell_gets_fixed_texts_only(source: Path) -> None:
    tree = ast.parse(source.read_text("utf-8"))
    for script in scripts(tree):
        fixed = isinstance(script, ast.Constant) or (
            isinstance(script, ast.Name) and script.id in texts(tree)
        )
        assert fixed, f"{source.name}:{script.lineno}"


def test_the_gates_are_seen() -> None:
    seen = {path.name for path in SOURCES if scripts(ast.parse(path.read_text("utf-8")))}
    assert {"start.py", "l1.py"} <= seen


@pytest.mark.parametrize(
    "line",
    [
        "subprocess.run(x, shell=True)",
        "os.system(x)",
        "os.popen(x)",
        "subprocess.getoutput(x)",
    ],
)
def test_ruff_forbids_a_shell(line: str, tmp_path: Path) -> None:
    name = ROOT / "python/mdev_orchestrator/qemu/x.py"  # need not be there: it says which rules
    done = subprocess.run(
        [Path(sys.executable).parent / "ruff", "check", "--stdin-filename", name, "-"],
        input=f'"""X."""\n\nimport os\nimport subprocess\n\nx = input()\n{line}\n',
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert "S60" in done.stdout, done.stdout
