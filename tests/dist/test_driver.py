# SPDX-License-Identifier: GPL-2.0-or-later
"""mvgpu by DKMS: refused for want of headers, built when they come, and gone after a purge."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from dist import roots
from dist.roots import DIST, Root

RELEASE = os.uname().release


@pytest.fixture(scope="module")
def root(suite: str, packages: Path) -> Iterator[Root]:
    with roots.new(suite, packages) as root:
        root.apt_get("install", "dkms", "kmod")
        yield root


def test_headers_are_missing(root: Root) -> None:
    before = root.files()
    (package,) = root.packages.glob("mvgpu-dkms_*.deb")
    done = root.apt_get("install", f"{DIST}/{package.name}")
    assert f"mvgpu-dkms: the headers of kernel {RELEASE}, which runs, are missing" in done.stderr
    root.apt_get("purge", "mvgpu-dkms")
    assert root.files() == before


def test_the_kernel_loads_signed_modules_only(root: Root) -> None:
    """As with secure boot; the file of the kernel is one of ours here."""
    (package,) = root.packages.glob("mvgpu-dkms_*.deb")
    done = root.sh(f"""
        mount -t tmpfs lockdown /sys/kernel/security
        echo 'none [integrity] confidentiality' >/sys/kernel/security/lockdown
        apt-get install -q -y --no-install-recommends {DIST}/{package.name}
    """)
    assert "mvgpu-dkms: this kernel loads modules only that are signed" in done.stdout
    assert "mokutil --import /var/lib/dkms/mok.pub" in done.stdout
    root.apt_get("purge", "mvgpu-dkms")


def test_it_is_built_for_the_kernel_of_the_release(root: Root) -> None:
    root.apt_get("install", "linux-headers-amd64")
    root.apt_get("install", *(f"{DIST}/{path.name}" for path in root.packages.glob("*.deb")))
    built = {path.name.partition(".")[0] for path in root.path.glob("lib/modules/*/updates/dkms/*")}
    assert built == {"mvgpu", "mvgpu-uio"}
    # it is not for the kernel that runs
    done = root.run("mdo", "doctor", code=5)
    assert "mvgpu/0.1.0" in done.stdout
    assert "DKMS cannot build it" in done.stdout
    root.apt_get("purge", "mvgpu-dkms")
    assert not list(root.path.glob("lib/modules/*/updates/dkms/*"))
    assert not list(root.path.glob("usr/src/mvgpu*"))
