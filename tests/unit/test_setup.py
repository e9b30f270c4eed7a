# SPDX-License-Identifier: GPL-2.0-or-later
"""tools/setup on systems that it was not tried on.

In a mount namespace ``/etc/os-release`` is another file, and so the machine another system.
"""

import os
import subprocess
from pathlib import Path

import pytest

from mdev_lab import kernels

SETUP = Path(__file__).resolve().parents[2] / "tools/setup"
AS_SYSTEM = """
mount --bind "$1" /etc/os-release
exec setpriv --reuid="$2" --regid="$3" --clear-groups "$4"
"""
FORKY = """\
PRETTY_NAME="Debian GNU/Linux 14 (forky)"
ID=debian
VERSION_ID="14"
VERSION_CODENAME=forky
"""
FEDORA = """\
PRETTY_NAME="Fedora Linux 41 (Server Edition)"
ID=fedora
VERSION_ID=41
VERSION_CODENAME=""
"""


def set_up(os_release: str, tmp_path: Path, path: str = os.environ["PATH"]) -> tuple[int, str]:
    """Run it as on a system with this os-release; the exit status, and what it said."""
    as_root = [] if os.geteuid() == 0 else ["sudo", "-n", "--preserve-env"]
    if as_root and subprocess.run([*as_root, "true"], check=False).returncode:
        pytest.skip("needs root or sudo for a mount namespace")
    file = tmp_path / "os-release"
    file.write_text(os_release)
    kernel = tmp_path / "cache/kernels/6.12/release"  # its lists need not be read again
    kernel.parent.mkdir(parents=True)
    kernel.touch()
    argv = [*as_root, "unshare", "--mount", "sh", "-c", AS_SYSTEM, "sh"]
    done = subprocess.run(
        [*argv, file, str(os.getuid()), str(os.getgid()), SETUP],
        env={**os.environ, "MDO_CACHE_DIR": str(tmp_path / "cache"), "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("os_release", "name"),
    [
        (FORKY, "Debian GNU/Linux 14 (forky)"),
        (FEDORA, "Fedora Linux 41 (Server Edition)"),
        ("", "another system"),
    ],
    ids=["newer Debian", "another distribution", "no names"],
)
def test_goes_on_where_the_programs_are_there(os_release: str, name: str, tmp_path: Path) -> None:
    code, said = set_up(os_release, tmp_path)
    assert code == 0
    (line,) = said.splitlines()
    assert line.startswith(f"setup: tried on Debian 12 and 13, and this is {name}; needs apt-get ")


def test_says_what_is_not_there(tmp_path: Path) -> None:
    """Another distribution, with other names for packages."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for place in ("/usr/bin", "/usr/sbin"):
        for program in Path(place).iterdir():
            if not (programs / program.name).is_symlink():
                (programs / program.name).symlink_to(program)
    for name in ("apt-get", "cpio"):
        (programs / name).unlink()
    code, said = set_up(FEDORA, tmp_path, path=str(programs))
    assert code == 1
    assert said.splitlines()[1:] == [
        "setup: not there: apt-get cpio - install them, and run this again"
    ]


@pytest.mark.parametrize("codename", kernels.RELEASES)
def test_was_tried_where_the_kernels_are_known(codename: str) -> None:
    assert f'"debian {codename}"' in SETUP.read_text()
