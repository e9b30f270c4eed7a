# SPDX-License-Identifier: GPL-2.0-or-later
"""The wheel alone, in a fresh environment: what it has, and that its library and commands work."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from mdev_orchestrator.qemu_build import builds, patches

ROOT = Path(__file__).resolve().parents[2]

#: Uses the library as its documentation says; it is checked, not run.
PROGRAM = """\
from __future__ import annotations
import asyncio
import mdev_orchestrator as mdo

async def main() -> list[str]:
    async with mdo.open() as machine:
        try:
            changes = await machine.apply(mdo.load("lab.toml"))
        except mdo.MdoError as error:
            return [error.message, error.hint]
        return [str(changes)]

print(asyncio.run(main()))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-deps", "--wheel-dir", place, ROOT)
    (built,) = place.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of the programs of an environment that has the wheel and what it requires."""
    place = tmp_path_factory.mktemp("venv")
    venv.create(place, with_pip=False, symlinks=True)
    pip("--python", place / "bin/python", "install", wheel)
    return place / "bin"


def pip(*words: str | Path) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def run(*argv: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a program outside of the checkout, with nothing of it on Python's path."""
    kept = {key: value for key, value in os.environ.items() if key in {"PATH", "HOME", "LANG"}}
    return subprocess.run(
        argv, cwd="/", env=kept | variables, capture_output=True, text=True, check=False
    )


def test_it_has_the_patches_and_nothing_of_the_lab(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    files = "mdev_orchestrator/qemu_build/files"
    ours = [*patches.NEW_FILES]
    for series in patches.series_known():
        ours += [str(path.relative_to(ROOT)) for path in patches.patches(series)]
        ours.append(f"qemu_patches/{series}/series")
    assert {f"{files}/{name}" for name in ours} <= names
    assert "mdev_orchestrator/py.typed" in names
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"mdev_orchestrator"}
    assert not [name for name in names if "/lab" in name or "mvgpu" in name]


def test_it_has_man_pages_and_completion_of_its_own_commands(environment: Path) -> None:
    share = environment.parent / "share"
    assert {"mdo.1", "mdo-guest-start.1"} <= {path.name for path in share.glob("man/man1/*")}
    assert not list(share.glob("man/man1/mdo-lab*"))
    for name in ("bash-completion/completions/mdo", "zsh/site-functions/_mdo"):
        assert "_mdo_completion" in (share / name).read_text()


def test_the_package_is_imported(environment: Path) -> None:
    done = run(environment / "python", "-c", "import mdev_orchestrator as m; print(m.__file__)")
    assert (done.returncode, done.stderr) == (0, "")
    assert Path(done.stdout).is_relative_to(environment.parent)


def test_a_program_that_uses_the_library_is_checked(environment: Path, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    python = environment / "python"
    words = ["--strict", "--config-file", os.devnull, "--cache-dir", tmp_path / "cache"]
    mypy = [Path(sys.executable).parent / "mypy", *words, "--python-executable", python]
    done = run(*mypy, program)
    assert done.stdout == "Success: no issues found in 1 source file\n", done.stdout + done.stderr
    program.write_text(PROGRAM.replace("error.hint", "error.nonsense"))
    assert '"MdoError" has no attribute "nonsense"' in run(*mypy, program).stdout


def test_the_digest_of_a_build_is_that_of_the_checkout(environment: Path) -> None:
    series = builds.DEFAULT_SERIES
    program = f"from mdev_orchestrator.qemu_build import builds; print(builds.digest({series!r}))"
    assert run(environment / "python", "-c", program).stdout.strip() == builds.digest(series)


def test_qemu_s_series_are_listed_and_exported(environment: Path, tmp_path: Path) -> None:
    cache = {"MDO_CACHE_DIR": str(tmp_path / "cache")}
    listed = run(environment / "mdo", "qemu", "list", **cache)
    assert [line.split()[0] for line in listed.stdout.splitlines()[1:]] == patches.series_known()
    exported = run(environment / "mdo", "qemu", "export", tmp_path / "out", **cache)
    assert (exported.returncode, exported.stderr) == (0, "")
    assert (tmp_path / "out/series").exists()


def test_doctor_says_what_it_finds(environment: Path, tmp_path: Path) -> None:
    done = run(environment / "mdo", "doctor", MDO_CACHE_DIR=str(tmp_path))
    assert done.returncode in {0, 5}  # a host may lack something
    assert "FINDING" in done.stdout
    assert done.stderr == ""


def test_help_has_no_lab(environment: Path) -> None:
    done = run(environment / "mdo", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    commands = [line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ")]
    assert {"create", "attach", "qemu"} <= set(commands)
    assert "lab" not in commands


def test_lab_needs_a_checkout_and_says_so_in_one_line(environment: Path) -> None:
    done = run(environment / "mdo", "lab", "up")
    assert (done.returncode, done.stdout) == (5, "")
    assert done.stderr.startswith("mdo: mdo lab needs a checkout of the project")
    assert done.stderr.count("\n") == 1


def test_bash_completes(environment: Path) -> None:
    """The script that the shell evaluates, and what it asks for then."""
    script = run(environment / "mdo", _MDO_COMPLETE="source_bash")
    assert "_mdo_completion" in script.stdout
    words = {"COMP_WORDS": "mdo guest st", "COMP_CWORD": "2"}
    done = run(environment / "mdo", _MDO_COMPLETE="complete_bash", **words)
    assert (done.stdout.split(), done.stderr) == (["start", "stop"], "")
