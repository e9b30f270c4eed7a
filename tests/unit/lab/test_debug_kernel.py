# SPDX-License-Identifier: GPL-2.0-or-later
"""Kernels with checkers; the mirror and kbuild are a few shell scripts here."""

from pathlib import Path

import pytest

from mdev_lab import debug_kernel, kernels
from mdev_orchestrator.errors import HostError, MdoError, UnknownError
from unit.lab.scripts import stand_before

SERIES = "6.12-debug"

SCRIPTS = {
    "apt-cache": "printf 'linux-source-6.12:\\n  Candidate: %s\\n' $(cat $0.version)",
    "apt-get": "echo $* >>$0.log; touch source.deb",
    "dpkg-deb": "mkdir -p $3/usr/src; touch $3/usr/src/linux-source-6.12.tar.xz",
    "tar": "mkdir -p linux-source-6.12",
    "pkg-config": "exit 0",
    # make -s -C SOURCE O=OBJECTS … TARGET
    "make": """
for word; do
    case $word in
    O=*) cd ${word#O=};;
    KCONFIG_ALLCONFIG=*) cp ${word#*=} .config;;
    INSTALL_MOD_PATH=*) mkdir -p ${word#*=}/lib/modules/6.12.9-debug;;
    bzImage)
        echo $* >>$0.log
        [ -e $0.broken ] && { echo 'x.c:1: error: no'; exit 2; }
        mkdir -p arch/x86/boot include/config
        echo image >arch/x86/boot/bzImage
        echo 6.12.9-debug >include/config/kernel.release;;
    esac
done""",
}


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of programs that stands before the real ones."""
    directory = stand_before(monkeypatch, tmp_path, SCRIPTS, "6.12.9-1")
    for name in ("bc", "bison", "flex", "gcc"):
        (directory / name).symlink_to("/bin/true")
    return directory


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def test_it_is_built_once(programs: Path, tmp_path: Path) -> None:
    said: list[str] = []
    kernel = debug_kernel.fetch(SERIES, said.append)
    assert (kernel.series, kernel.release, kernel.checked) == (SERIES, "6.12.9-debug", True)
    assert kernel.image.read_text() == "image\n"
    assert kernel.modules.is_dir()
    assert said[0] == "downloading linux-source-6.12 6.12.9-1"
    left = {path.name for path in (tmp_path / "cache/kernels").iterdir()}
    assert left == {SERIES, f"{SERIES}.lock"}
    assert debug_kernel.fetch(SERIES) == kernel
    assert lines(programs / "make.log") == 1


def test_a_new_source_is_built_and_a_mirror_without_lists_offers_none(programs: Path) -> None:
    debug_kernel.fetch(SERIES)
    (programs / "apt-cache.version").write_text("(none)")
    debug_kernel.fetch(SERIES)
    assert lines(programs / "make.log") == 1
    (programs / "apt-cache.version").write_text("6.12.10-1")
    debug_kernel.fetch(SERIES)
    assert lines(programs / "make.log") == 2
    assert lines(programs / "apt-get.log") == 2


def test_another_configuration_is_built(
    programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    debug_kernel.fetch(SERIES)
    config = tmp_path / "other.config"
    config.write_text(debug_kernel.CONFIG.read_text() + "CONFIG_MORE=y\n")
    monkeypatch.setattr(debug_kernel, "CONFIG", config)
    debug_kernel.fetch(SERIES)
    assert lines(programs / "make.log") == 2


def test_a_build_that_fails_says_why_and_goes_on_from_the_source(programs: Path) -> None:
    (programs / "make.broken").touch()
    with pytest.raises(MdoError, match=r"failed: the compiler said: x\.c:1: error: no"):
        debug_kernel.fetch(SERIES)
    (programs / "make.broken").unlink()
    debug_kernel.fetch(SERIES)
    assert lines(programs / "apt-get.log") == 1


def test_a_mirror_without_the_source(programs: Path) -> None:
    (programs / "apt-cache.version").write_text("(none)")
    with pytest.raises(UnknownError, match=r"no linux-source-6\.12"):
        debug_kernel.fetch(SERIES)


def test_what_the_host_lacks_is_named(programs: Path) -> None:
    (programs / "pkg-config").write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(HostError, match="needs libelf-dev"):
        debug_kernel.fetch(SERIES)


def test_a_series_without_checkers(programs: Path) -> None:
    with pytest.raises(UnknownError, match=r"no kernel 6\.1-debug"):
        debug_kernel.fetch("6.1-debug")


def test_an_option_that_kconfig_drops_is_named() -> None:
    wanted = 'CONFIG_A=y\nCONFIG_B=m\nCONFIG_C="-x"\n# CONFIG_D is not set\n'
    debug_kernel.check_taken(wanted, wanted + "CONFIG_E=y\n")
    with pytest.raises(MdoError, match="does not take CONFIG_B, CONFIG_C "):
        debug_kernel.check_taken(wanted, "CONFIG_A=y\n# CONFIG_B is not set\n")


@pytest.mark.parametrize(
    ("release", "series"),
    [
        ("6.12.117+deb12-amd64", "6.12"),
        ("6.1.0-56-amd64", "6.1"),
        ("6.12.117-debug", "6.12-debug"),
    ],
)
def test_the_series_of_a_release(release: str, series: str) -> None:
    assert kernels.series_of(release) == series
