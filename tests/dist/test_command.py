# SPDX-License-Identifier: GPL-2.0-or-later
"""``mdo`` on a host that has nothing but a release of Debian: installed, tried, and purged.

The tests of a release share a root, and follow one another.
"""

from __future__ import annotations

import json

import pytest

from dist.roots import DIST, Root
from mdev_orchestrator import __version__
from mdev_orchestrator.cli.tree import COMMANDS

RELEASES = {"bookworm": "deb12", "trixie": "deb13"}

#: What it needs to be installed, and what shows its pages and completes its commands.
BEFORE = ("bash-completion", "fish", "man-db", "python3", "zsh")
QEMU = "apt-get install --no-install-recommends qemu-system-x86"
STATE = "/var/lib/mdev-orchestrator"


@pytest.fixture(scope="module")
def before(root: Root) -> set[str]:
    """The files of the root before the package is there."""
    root.apt_get("install", *BEFORE)
    assert not (root.path / "usr/bin/systemctl").exists()
    return root.files()


@pytest.fixture(scope="module")
def installed(root: Root, before: set[str]) -> Root:
    """The root with the package, which apt has installed without a network."""
    root.sh("apt-get install -qq -y --no-install-recommends libudev1")
    root.apt_get("install", *packages(root, "mdev-orchestrator_*.deb"), net=False)
    return root


def packages(root: Root, pattern: str) -> list[str]:
    return [f"{DIST}/{path.name}" for path in root.packages.glob(pattern)]


def test_all_is_built(root: Root, suite: str) -> None:
    version = f"{__version__}~{RELEASES[suite]}"
    assert {path.name for path in root.packages.iterdir()} >= {
        f"mdev_orchestrator-{__version__}-py3-none-any.whl",
        f"mdev_orchestrator-{__version__}.tar.gz",
        f"mdev-orchestrator_{version}_amd64.deb",
        f"mdev-orchestrator_{version}.dsc",
        f"mvgpu-dkms_{version}_all.deb",
    }


def test_doctor_says_what_the_host_lacks(installed: Root) -> None:
    done = installed.run("mdo", "doctor", "--json", code=5)
    found = {finding["subject"]: finding for finding in json.loads(done.stdout)["findings"]}
    assert found["user"]["message"] == "this is root"
    assert found["qemu"]["message"] == "no program qemu-system-x86_64"
    assert found["qemu"]["remedy"] == QEMU
    table = installed.run("mdo", "doctor", code=5).stdout
    assert table.splitlines()[0].split() == ["LEVEL", "SUBJECT", "FINDING", "REMEDY"]


def test_an_empty_host_is_shown_as_that(installed: Root) -> None:
    done = installed.run("mdo", "host")
    assert done.stdout == ""
    assert done.stderr.startswith("mdo: this host has no mdev bus")
    done = installed.run("mdo", "host", "--json")
    assert json.loads(done.stdout)["parents"] == []


def test_no_command_needs_what_is_not_there(installed: Root) -> None:
    """There is no systemd, no QEMU, and no library of Python but Debian's least."""
    done = installed.sh(f"for name in {' '.join(COMMANDS)}; do mdo $name --help; done")
    assert done.stdout.count("Usage: mdo") == len(COMMANDS)
    assert done.stderr == ""


@pytest.mark.parametrize("page", ["mdo", "mdo-guest-start", "mdo-doctor"])
def test_man_shows_a_page(installed: Root, page: str) -> None:
    done = installed.run("man", "-P", "cat", page)
    assert f"NAME {page} - " in " ".join(done.stdout.split())
    assert done.stderr == ""


@pytest.mark.parametrize(
    "shell",
    [
        ("bash", "--rcfile", "/usr/share/bash-completion/bash_completion", "-i"),
        ("sh", "-c", "echo 'autoload -U compinit; compinit' >/tmp/.zshrc; ZDOTDIR=/tmp exec zsh"),
    ],
    ids=["bash", "zsh"],
)
def test_tab_completes(installed: Root, shell: tuple[str, ...]) -> None:
    shown = installed.type(*shell, keys="mdo guest sta\t--ker\tX", until="start --kernel X")
    assert "mdo guest start --kernel X" in shown


def test_fish_completes(installed: Root) -> None:
    done = installed.run("env", "HOME=/tmp", "fish", "-c", "complete -C 'mdo guest st'")
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["start", "stop"]


def test_systemd_would_find_the_units(installed: Root) -> None:
    """Those of ``mdo service``, for the mdo of the package; systemd need not be there."""
    done = installed.run("dpkg", "-L", "mdev-orchestrator")
    (unit,) = [line for line in done.stdout.splitlines() if line.endswith("/mdo-guests.service")]
    assert "ExecStop=/usr/bin/mdo guest stop --all" in (installed.path / unit[1:]).read_text()
    for name in ("mdo-restore.service", "90-mdo.rules"):
        assert f"/{name}\n" in done.stdout
    wanted = installed.path / "etc/systemd/system/multi-user.target.wants/mdo-guests.service"
    assert wanted.is_symlink()


def test_nothing_is_left_after_a_purge(installed: Root, before: set[str]) -> None:
    installed.run("mdo", "recover")  # makes a journal, with nothing in it
    assert (installed.path / STATE[1:] / "journal.db").exists()
    done = installed.apt_get("purge", "mdev-orchestrator")
    assert "stays" not in done.stderr
    assert installed.files() == before


def test_a_purge_lets_a_guest_run_and_keeps_what_is_known_of_it(root: Root) -> None:
    """The guest has no devices, since the machine has none."""
    root.apt_get("install", *packages(root, "mdev-orchestrator_*.deb"))
    root.sh(f"{QEMU} -y -qq")
    found = json.loads(root.run("mdo", "doctor", "--json", code=5).stdout)["findings"]
    assert "fault" not in {finding["level"] for finding in found if finding["subject"] == "qemu"}
    done = root.sh("""
        mdo guest start render-1 --accel tcg --memory 64M --arg=-S
        apt-get purge -q -y mdev-orchestrator
        grep -l '^qemu-system' /proc/[0-9]*/comm
    """)
    assert f"mdev-orchestrator: {STATE} stays, since it holds guests" in done.stdout
    assert (root.path / STATE[1:] / "guests/render-1").is_dir()
    assert not (root.path / "usr/bin/mdo").exists()


def test_pipx_installs_the_wheel(root: Root) -> None:
    root.apt_get("install", "pipx")
    before = root.files()
    root.run("pipx", "install", *packages(root, "*.whl"))
    assert root.run("mdo", "host").stderr.startswith("mdo: this host has no mdev bus")
    assert "has the device vfio-pci" in root.run("mdo", "doctor", code=5).stdout
    (page,) = (root.path / "root/.local").glob("**/venvs/mdev-orchestrator/share/man/man1/mdo.1")
    shown = root.run("man", "-P", "cat", f"/{page.relative_to(root.path)}").stdout
    assert "NAME mdo - " in " ".join(shown.split())
    script = 'eval "$(mdo --show-completion bash)"; complete -p mdo'
    assert "_mdo_completion" in root.run("bash", "-c", script).stdout
    root.run("pipx", "uninstall", "mdev-orchestrator")
    left = [name for name in root.files() - before if "pipx" not in name]
    assert [name for name in left if not (root.path / name).is_dir()] == []
