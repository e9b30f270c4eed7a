# SPDX-License-Identifier: GPL-2.0-or-later
"""Kernels from a Debian mirror: the mirror is a few shell scripts here."""

import subprocess
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
*pkgnames*) cat <<'END'
linux-image-amd64
linux-image-6.12-amd64
linux-image-6.12.9+deb12-amd64
linux-image-6.12.117+deb12-amd64
linux-image-6.12.117+deb12-cloud-amd64
linux-image-6.12.118+deb12-amd64-unsigned
linux-image-6.12.118+deb12-amd64-dbg
linux-image-6.1.0-9-amd64
linux-image-6.1.0-50-amd64
END
;;
*linux-headers-*) echo '  Depends: linux-kbuild-6.12';;
esac
"""

BACKPORTS = """
case "$*" in
*pkgnames*) echo linux-image-7.2.12+deb13-amd64; echo linux-image-7.3.4+deb13-amd64;;
*linux-image-*) cat <<'END'
  PreDepends: linux-base
 |Depends: <dracut>
  Depends: <linux-initramfs-tool>
  Depends: linux-base-7.3.4+deb13-amd64
  Depends: linux-binary-7.3.4+deb13-amd64
  Depends: linux-modules-7.3.4+deb13-amd64
END
;;
*linux-headers-*) cat <<'END'
  Depends: <gcc-14-for-host>
  Depends: linux-base
  Depends: linux-base-7.3.4+deb13-amd64
  Depends: linux-headers-7.3.4+deb13-common
  Depends: linux-kbuild-7.3.4+deb13
END
;;
esac
"""


@pytest.fixture
def release(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What the machine's os-release says: Debian 12, or what a test makes of it."""
    words = {"ID": "debian", "VERSION_ID": "12", "VERSION_CODENAME": "bookworm"}
    monkeypatch.setattr("platform.freedesktop_os_release", lambda: words)
    return words


def trixie(release: dict[str, str]) -> None:
    release.update(VERSION_ID="13", VERSION_CODENAME="trixie")


def test_the_newest_kernel_of_a_series(programs: Path) -> None:
    script(programs, "apt-cache", CATALOGUE)
    assert kernels.resolve("6.12") == "6.12.117+deb12-amd64"
    assert kernels.resolve("6.1") == "6.1.0-50-amd64"


def test_a_series_that_the_mirror_does_not_have(programs: Path, release: dict[str, str]) -> None:
    script(programs, "apt-cache", CATALOGUE)
    with pytest.raises(UnknownError, match=r"Debian 12 has no kernel 6\.9") as caught:
        kernels.resolve("6.9")
    assert caught.value.hint == "--kernel 6.1 or 6.12"
    release.update(VERSION_ID="14", VERSION_CODENAME="forky")
    with pytest.raises(UnknownError, match=r"the Debian mirror offers no kernel 6\.9"):
        kernels.resolve("6.9")
    script(programs, "apt-cache", "true")
    with pytest.raises(UnknownError) as caught:
        kernels.resolve("6.12")
    assert caught.value.hint == "run 'apt-get update'"


def test_the_release_says_which_kernels_it_lacks_and_not_its_mirror(
    programs: Path, release: dict[str, str]
) -> None:
    script(programs, "apt-cache", "exit 100")
    assert kernels.lacks("6.1") is None
    assert kernels.lacks("7.3") == "Debian 12 has no kernel 7.3"
    trixie(release)
    assert kernels.lacks("6.1") == "Debian 13 has no kernel 6.1"
    assert [kernels.lacks(series) for series in ("6.12", "6.12-debug", "7.3")] == [None] * 3
    release.update(ID="ubuntu", VERSION_CODENAME="trixie")
    assert kernels.lacks("6.1") is None


def test_a_kernel_of_the_backports_is_found_with_lists_of_its_own(
    programs: Path, tmp_path: Path, release: dict[str, str]
) -> None:
    """From 6.19 on an image's package is empty, and depends on those of its parts."""
    trixie(release)
    script(programs, "apt-cache", BACKPORTS)
    log = tmp_path / "apt.log"
    script(
        programs,
        "apt-get",
        f"""echo "$*" >>{log}
case "$*" in
*indextargets*) echo 'uri|trixie|Debian|Debian';;
*download*) touch linux-binary.deb;;
esac""",
    )
    script(
        programs,
        "dpkg-deb",
        """
modules=$3/usr/lib/modules/7.3.4+deb13-amd64 headers=$3/usr/src/linux-headers-7.3.4+deb13-amd64
mkdir -p $modules $headers $3/usr/src/linux-headers-7.3.4+deb13-common
echo image >$modules/vmlinuz
echo KBUILD_OUTPUT=/usr/src/linux-headers-7.3.4+deb13-amd64 >$headers/Makefile
echo include /usr/src/linux-headers-7.3.4+deb13-common/Makefile >>$headers/Makefile
echo 'x:; @echo $(KBUILD_OUTPUT)' >$3/usr/src/linux-headers-7.3.4+deb13-common/Makefile""",
    )
    script(programs, "depmod", "")
    kernel = kernels.fetch_kernel("7.3")
    assert kernel.release == "7.3.4+deb13-amd64"
    assert kernel.image.read_text() == "image\n"
    where = subprocess.check_output(["make", "-sC", kernel.headers], text=True)
    assert Path(where.strip()).resolve() == kernel.headers
    private = tmp_path / "cache/kernels/apt"
    assert (private / "sources.list").read_text().split()[-3:] == [
        "uri",
        "trixie-backports",
        "main",
    ]
    _, update, download = log.read_text().splitlines()
    lists = f"-o Dir::State::lists={private}/lists"
    assert lists in update
    assert lists in download
    assert [word for word in download.split() if word.startswith("linux-")] == [
        "linux-image-7.3.4+deb13-amd64",
        "linux-base-7.3.4+deb13-amd64",
        "linux-binary-7.3.4+deb13-amd64",
        "linux-modules-7.3.4+deb13-amd64",
        "linux-headers-7.3.4+deb13-amd64",
        "linux-headers-7.3.4+deb13-common",
        "linux-kbuild-7.3.4+deb13",
    ]


def test_a_broken_mirror_is_an_error(programs: Path, release: dict[str, str]) -> None:
    trixie(release)
    script(programs, "apt-get", "echo 'E: The repository is not there' >&2; exit 100")
    with pytest.raises(MdoError, match="The repository is not there"):
        kernels.fetch_kernel("7.3")


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
    with pytest.raises(MdoError):
        kernels.fetch_kernel("6.1")


@pytest.mark.parametrize("place", ["lib/modules", "usr/lib/modules"])
def test_modules_are_found_wherever_the_packages_have_them(
    programs: Path, tmp_path: Path, place: str
) -> None:
    """Debian 13's packages have no /lib, where depmod and modprobe look."""
    script(programs, "apt-cache", CATALOGUE)
    script(programs, "apt-get", "touch linux-image.deb")
    script(programs, "dpkg-deb", f"mkdir -p $3/{place}/6.12.117+deb12-amd64")
    script(programs, "depmod", "cd $2/lib/modules/$3")
    kernel = kernels.fetch_kernel("6.12")
    assert kernel.modules.is_dir()
    assert kernel.modules.resolve() == tmp_path / "cache/kernels/6.12" / place / kernel.release
