# SPDX-License-Identifier: GPL-2.0-or-later
"""A kernel with iommufd; the mirror and kbuild are a few shell scripts here."""

from pathlib import Path

import pytest

from mdev_lab import iommufd_kernel
from mdev_lab.kernel_modules import build_modules
from mdev_orchestrator.errors import MdoError, UnknownError
from unit.lab.scripts import stand_before

RELEASE = "6.12.9+deb12-amd64"
SPANS = "#ifdef CONFIG_INTERVAL_TREE_SPAN_ITER\nint span;\n#endif\n"

SCRIPTS = {
    "apt-cache": "printf 'linux-source-6.12:\\n  Candidate: %s\\n' $(cat $0.version)",
    "apt-get": "echo $* >>$0.log; touch source.deb",
    "dpkg-deb": "mkdir -p $3/usr/src; touch $3/usr/src/linux-source-6.12.tar.xz",
    "tar": f"""
cd $PWD; mkdir -p linux-source-6.12/drivers/iommu/iommufd linux-source-6.12/lib
echo >linux-source-6.12/drivers/iommu/iommufd/Makefile
printf '{SPANS}' >linux-source-6.12/lib/interval_tree.c""",
    # make -s -C HEADERS M=DIRECTORY … modules
    "make": r"""
echo $* >>$0.log
for word; do case $word in M=*) cd ${word#M=};; esac; done
[ -e $0.broken ] && { echo 'x.c:1: error: no' >&2; exit 2; }
[ -e lib ] && cat drivers/iommu/iommufd/interval_tree_spans.c Kbuild >$0.spans
touch new.ko
printf '0x2\tvfio_open\tdrivers/vfio/vfio\tEXPORT_SYMBOL_GPL\t\n' >Module.symvers""",
    "strip": "exit 0",
    "depmod": "touch $2/lib/modules/$3/modules.dep",
}


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of programs that stands before the real ones."""
    return stand_before(monkeypatch, tmp_path, SCRIPTS, "6.12.9-1~deb12u1")


@pytest.fixture
def stock(programs: Path, tmp_path: Path) -> Path:
    """The stock kernel's directory, unpacked before."""
    root = tmp_path / "cache/kernels/6.12"
    headers = root / "usr/src" / f"linux-headers-{RELEASE}"
    texts = {
        "release": RELEASE,
        f"boot/vmlinuz-{RELEASE}": "image",
        f"lib/modules/{RELEASE}/modules.dep": "stock",
        f"lib/modules/{RELEASE}/kernel/vfio.ko.xz": "stock",
        "usr/lib/linux-kbuild-6.12/scripts": "",
        "usr/src/linux-headers-6.12.9+deb12-common/Makefile": "",
        f"usr/src/{headers.name}/vmlinux": "types",
        f"usr/src/{headers.name}/include/config/auto.conf": "CONFIG_VFIO=m\n",
        f"usr/src/{headers.name}/include/generated/autoconf.h": "#define CONFIG_VFIO_MODULE 1\n",
        f"usr/src/{headers.name}/Module.symvers": (
            "0x1\tvfio_open\tdrivers/vfio/vfio\tEXPORT_SYMBOL_GPL\t\n"
            "0x5\tkmalloc\tvmlinux\tEXPORT_SYMBOL\t\n"
        ),
    }
    for name, text in texts.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def contents(root: Path) -> dict[str, str]:
    return {str(p.relative_to(root)): p.read_text() for p in root.rglob("*") if p.is_file()}


def test_it_is_built_once_and_the_stock_kernel_stays_as_it_is(stock: Path, programs: Path) -> None:
    before = contents(stock)
    kernel = iommufd_kernel.build("6.12")
    assert (kernel.series, kernel.release, kernel.base) == ("6.12-iommufd", RELEASE, "6.12")
    assert kernel.image.read_text() == "image"
    assert (kernel.modules / "updates/new.ko").exists()
    assert (kernel.modules / "kernel/vfio.ko.xz").read_text() == "stock"
    spans = (programs / "make.spans").read_text()
    assert "#include <linux/interval_tree.h>\nint span;\n" in spans
    assert "obj-m := drivers/iommu/iommufd/ drivers/vfio/" in spans
    assert "linux-source-6.12=6.12.9-1~deb12u1" in (programs / "apt-get.log").read_text()
    assert iommufd_kernel.build("6.12") == kernel
    assert len((programs / "make.log").read_text().splitlines()) == 1
    assert contents(stock) == before


def test_its_headers_have_the_options_and_the_new_symbols(stock: Path, tmp_path: Path) -> None:
    headers = iommufd_kernel.build("6.12").headers
    assert not (headers / "vmlinux").exists()
    assert "CONFIG_IOMMUFD=m\n" in (headers / "include/config/auto.conf").read_text()
    options = (headers / "include/generated/autoconf.h").read_text()
    assert "#define CONFIG_IOMMUFD_MODULE 1\n" in options
    assert "#define CONFIG_VFIO_DEVICE_CDEV 1\n" in options
    assert (headers.parent / "linux-headers-6.12.9+deb12-common/Makefile").exists()
    symbols = (headers / "Module.symvers").read_text()
    assert [line.split("\t")[:2] for line in symbols.splitlines()] == [
        ["0x5", "kmalloc"],
        ["0x2", "vfio_open"],
    ]
    source = tmp_path / "driver"
    source.mkdir()
    (source / "Kbuild").write_text("obj-m := new.o\n")
    kernel = iommufd_kernel.build("6.12")
    stock_kernel = iommufd_kernel.fetch_kernel("6.12")
    assert build_modules(source, kernel) != build_modules(source, stock_kernel)


def test_a_kernel_of_another_version_than_the_source(stock: Path, programs: Path) -> None:
    (programs / "apt-cache.version").write_text("6.12.10-1")
    with pytest.raises(UnknownError, match=r"linux-source-6\.12 6\.12\.10-1, .* is 6\.12\.9\+"):
        iommufd_kernel.build("6.12")
    (programs / "apt-cache.version").write_text("(none)")
    with pytest.raises(UnknownError, match=r"offers no linux-source-6\.12"):
        iommufd_kernel.build("6.12")


def test_a_build_that_fails_leaves_nothing(stock: Path, programs: Path) -> None:
    (programs / "make.broken").touch()
    with pytest.raises(MdoError, match=r"x\.c:1: error: no"):
        iommufd_kernel.build("6.12")
    left = {path.name for path in stock.parent.iterdir()}
    assert left == {"6.12", "6.12.lock", "6.12-iommufd.lock"}


@pytest.mark.parametrize("series", ["6.1", "6.12-debug"])
def test_a_series_without_it(programs: Path, series: str) -> None:
    with pytest.raises(UnknownError, match="with iommufd"):
        iommufd_kernel.build(series)
