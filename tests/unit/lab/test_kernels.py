# SPDX-License-Identifier: GPL-2.0-or-later
"""Kernels from a Debian mirror: the mirror is a few shell scripts here."""

from pathlib import Path

import pytest

from mdev_lab import kernels
from mdev_orchestrator.errors import MdoError, UnknownError


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of programs that stands before the real ones."""
    directory = tmp_path / "bin"
    directory.mkdir()
    monkeypatch.setenv("PATH", f"{directory}:/usr/bin:/bin")
    monkeypatch.setenv("MDO_CACHE_DIR", str(tmp_path / "cache"))
    return directory


def script(directory: Path, name: str, text: str) -> None:
    (directory / name).write_text(f"#!/bin/sh\n{text}\n")
    (directory / name).chmod(0o755)


CATALOGUE = """
case "$*" in
*linux-image-6.12-amd64*) echo '  Depends: linux-image-6.12.9+deb12-amd64';;
*linux-image-amd64*) echo '  Depends: linux-image-6.1.0-50-amd64';;
*linux-headers-*) echo '  Depends: linux-kbuild-6.12';;
*) echo "E: No packages found" >&2; exit 100;;
esac
"""


def test_the_newest_kernel_of_a_series(programs: Path) -> None:
    script(programs, "apt-cache", CATALOGUE)
    assert kernels.resolve("6.12") == "6.12.9+deb12-amd64"
    assert kernels.resolve("6.1") == "6.1.0-50-amd64"


def test_a_series_that_the_mirror_does_not_have(programs: Path) -> None:
    script(programs, "apt-cache", CATALOGUE)
    with pytest.raises(UnknownError, match=r"no kernel 6\.9"):
        kernels.resolve("6.9")


@pytest.mark.parametrize("series", ["", "six", "6", "6.12; rm", "../6.12"])
def test_a_series_that_is_none(programs: Path, series: str) -> None:
    with pytest.raises(UnknownError, match="not a kernel series"):
        kernels.resolve(series)


def test_a_download_that_fails_says_why_and_leaves_nothing(programs: Path, tmp_path: Path) -> None:
    script(programs, "apt-cache", CATALOGUE)
    script(programs, "apt-get", "echo 'Get:1 something'; echo 'E: 404 not there' >&2; exit 100")
    with pytest.raises(MdoError, match="E: 404 not there"):
        kernels.fetch_kernel("6.12")
    left = [p for p in (tmp_path / "cache/kernels").iterdir() if p.suffix != ".lock"]
    assert left == []


def test_an_unpacked_kernel_is_found_without_the_mirror(programs: Path, tmp_path: Path) -> None:
    place = tmp_path / "cache/kernels/6.12"
    place.mkdir(parents=True)
    (place / "release").write_text("6.12.9-amd64\n")
    script(programs, "apt-cache", "exit 1")
    assert kernels.fetch_kernel("6.12").release == "6.12.9-amd64"
    with pytest.raises(UnknownError):
        kernels.fetch_kernel("6.1")


@pytest.mark.parametrize("place", ["lib/modules", "usr/lib/modules"])
def test_modules_are_found_wherever_the_packages_have_them(
    programs: Path, tmp_path: Path, place: str
) -> None:
    """Debian 13's packages have no /lib, where depmod and modprobe look."""
    script(programs, "apt-cache", CATALOGUE)
    script(programs, "apt-get", "touch linux-image.deb")
    script(programs, "dpkg-deb", f"mkdir -p $3/{place}/6.12.9+deb12-amd64")
    script(programs, "depmod", "cd $2/lib/modules/$3")
    kernel = kernels.fetch_kernel("6.12")
    assert kernel.modules.is_dir()
    assert kernel.modules.resolve() == tmp_path / "cache/kernels/6.12" / place / kernel.release
