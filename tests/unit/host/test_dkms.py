# SPDX-License-Identifier: GPL-2.0-or-later
"""A driver that DKMS should have built: doctor says why it is not there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mdev_orchestrator.host.dkms import lacking
from mdev_orchestrator.machine import Machine

RELEASE = os.uname().release


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """The kernel and its headers are there, and DKMS has mvgpu's source."""
    (tmp_path / "lib/modules" / RELEASE / "build").mkdir(parents=True)
    add(tmp_path, "mvgpu", "ret = mdev_register_parent(parent, dev);")
    return Machine(tmp_path)


def add(root: Path, name: str, code: str) -> None:
    source = root / "usr/src" / f"{name}-0.1"
    source.mkdir(parents=True)
    (source / "main.c").write_text(code)
    place = root / "var/lib/dkms" / name / "0.1"
    place.mkdir(parents=True)
    (place / "source").symlink_to(source)


def build(machine: Machine) -> None:
    place = machine.root / "var/lib/dkms/mvgpu/0.1" / RELEASE / "x86_64/module"
    place.mkdir(parents=True)
    for name in ("mvgpu-uio.ko.xz", "mvgpu.ko.xz"):
        (place / name).touch()


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def said(machine: Machine) -> str:
    (lack,) = lacking(machine)
    assert lack.driver == "mvgpu/0.1"
    return f"{lack.message} - {lack.remedy}"


def test_headers_are_missing(machine: Machine) -> None:
    (machine.root / "lib/modules" / RELEASE / "build").rmdir()
    assert f"the headers of kernel {RELEASE} are not installed" in said(machine)
    assert f"apt-get install linux-headers-{RELEASE}, then modprobe mvgpu" in said(machine)


def test_the_kernel_is_not_one_of_this_system(machine: Machine) -> None:
    (machine.root / "lib/modules" / RELEASE / "build").rmdir()
    (machine.root / "lib/modules" / RELEASE).rmdir()
    assert "boot that kernel" in said(machine)


def test_it_was_not_built(machine: Machine) -> None:
    assert said(machine) == (
        f"DKMS has not built it for kernel {RELEASE} - dkms install mvgpu/0.1, then modprobe mvgpu"
    )


def test_it_was_not_loaded(machine: Machine) -> None:
    build(machine)
    assert said(machine) == "it is built and not loaded - modprobe mvgpu"


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("sys/module/module/parameters/sig_enforce", "Y\n", "(module.sig_enforce)"),
        ("sys/kernel/security/lockdown", "none [integrity] confidentiality\n", "is integrity"),
    ],
)
def test_the_kernel_refuses_it(machine: Machine, file: str, text: str, words: str) -> None:
    write(machine.root / file, text)
    build(machine)
    assert words in said(machine)
    assert "mokutil --import /var/lib/dkms/mok.pub" in said(machine)


def test_the_kernel_refuses_nothing(machine: Machine) -> None:
    write(machine.root / "sys/module/module/parameters/sig_enforce", "N\n")
    write(machine.root / "sys/kernel/security/lockdown", "[none] integrity confidentiality\n")
    build(machine)
    assert said(machine) == "it is built and not loaded - modprobe mvgpu"


def test_nothing_is_wrong_with_a_driver_that_is_loaded(machine: Machine) -> None:
    build(machine)
    (machine.root / "sys/module/mvgpu").mkdir(parents=True)
    assert not list(lacking(machine))


def test_drivers_without_mdevs_are_not_looked_at(machine: Machine) -> None:
    add(machine.root, "zfs", "int mdev_register_parental(void);")
    add(machine.root, "nvidia", "mdev_register_device(dev, &ops);")
    assert [lack.driver for lack in lacking(machine)] == ["mvgpu/0.1", "nvidia/0.1"]


def test_a_source_that_is_gone_is_passed_over(machine: Machine) -> None:
    (machine.root / "usr/src/mvgpu-0.1/main.c").unlink()
    (machine.root / "usr/src/mvgpu-0.1").rmdir()
    assert not list(lacking(machine))
