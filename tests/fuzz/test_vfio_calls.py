# SPDX-License-Identifier: GPL-2.0-or-later
"""mvgpu under calls that no program makes, on a kernel with checkers.

On request only, since the kernel has to be built first: ``make test-fuzz``, or for a short look
``MDO_TEST_CALLS=20000 mdo lab run --kernel 6.12-debug -- python -m pytest -s tests/fuzz``.

``MDO_TEST_SEED``, ``MDO_TEST_CALLS`` and ``MDO_TEST_THREADS`` choose what is done; one thread does
the same in the same order every time. ``MDO_TEST_SECONDS`` is what it may take.
"""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import vfio
from lab.kernel_log import KernelLog

pytestmark = pytest.mark.skipif(
    "MDO_LAB_CHECKERS" not in os.environ, reason="needs a lab with --kernel 6.12-debug"
)

SEED = os.environ.get("MDO_TEST_SEED", "1")
CALLS = os.environ.get("MDO_TEST_CALLS", "1000000")
THREADS = os.environ.get("MDO_TEST_THREADS", "4")
SECONDS = os.environ.get("MDO_TEST_SECONDS", "7200")

#: A pool, and a card whose instances are of one type at a time.
TYPES = ("igd0/mdev_supported_types/mvgpu-128M", "igd0/mdev_supported_types/mvgpu-256M")
TYPES += ("grid0/mdev_supported_types/mvgpu-11", "grid0/mdev_supported_types/mvgpu-13")

KERNEL_DEBUG = Path("/sys/kernel/debug")
KMEMLEAK = KERNEL_DEBUG / "kmemleak"
KMEMLEAK_AGE = 6.0
"""Younger than five seconds nothing is a leak."""

#: Each fault of ``lab-fault.ko`` and what the kernel says to it. Lockdep is first: KASAN, when it
#: reports, switches it off.
FAULTS = {
    "lockdep": r"WARNING: possible circular locking dependency",
    "kasan": r"BUG: KASAN: \S*use-after-free",
    "ubsan": r"UBSAN: shift-out-of-bounds",
    "atomic": r"BUG: sleeping function called from invalid context",
    "kmemleak": r"kmemleak: \d+ new suspected memory leaks",
}


@pytest.fixture
def log() -> Iterator[KernelLog]:
    """The kernel's log from now on."""
    log = KernelLog()
    yield log
    log.close()


@pytest.fixture(scope="module")
def without_udev() -> Iterator[None]:
    """Keep udev from looking at every event; the kernel makes the nodes itself."""
    subprocess.run(["udevadm", "control", "--exit"], check=True)
    yield
    subprocess.run(["/lib/systemd/systemd-udevd", "--daemon"], check=True)


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program."""
    program = tmp_path_factory.mktemp("fuzz") / "vfio-fuzz"
    source = Path(__file__).with_name("vfio-fuzz.c")
    flags = ["-O1", "-Wall", "-Wextra", "-Werror", "-pthread", f"-I{vfio.HEADER.parent}"]
    subprocess.run(["gcc", *flags, "-o", program, source], check=True)
    return program


def leaks() -> str:
    """What kmemleak finds that it has not found before. It scans twice: what the first scan met on
    its way through a register or a stack is gone by the second.
    """
    for _ in range(2):
        time.sleep(KMEMLEAK_AGE)
        vfio.poke(KMEMLEAK, "scan")
    return KMEMLEAK.read_text()


def counts() -> dict[str, int]:
    """What is left of each type, and the links of each parent."""
    paths = [
        *vfio.PARENTS.glob("*/mdev_supported_types/*/available_instances"),
        *vfio.PARENTS.glob("*/p2p_links_free"),
    ]
    return {str(path): int(path.read_text()) for path in paths}


def taints() -> str:
    return Path("/proc/sys/kernel/tainted").read_text()


def lockdep_is_awake() -> bool:
    """Whether lockdep still looks: it stops at its first report, and when its tables are full."""
    text = Path("/proc/lockdep_stats").read_text()
    return bool(re.search(r"debug_locks:\s+1", text))


def let_allocations_fail() -> None:
    """Those of a task that asks for it, whatever they are for; without a word in the log."""
    for name in ("failslab", "fail_page_alloc", "fail_usercopy"):
        vfio.poke(KERNEL_DEBUG / name / "verbose", "0")
    for name in ("failslab", "fail_page_alloc"):
        vfio.poke(KERNEL_DEBUG / name / "ignore-gfp-wait", "N")
    vfio.poke(KERNEL_DEBUG / "fail_page_alloc" / "min-order", "0")


def clear_nodes() -> None:
    """Remove the nodes of devices that have gone, of which there are none any more.

    devtmpfs takes memory for a node's name to remove it (``devtmpfs_delete_node``), and forgets the
    node when it gets none; the next device of that number would be opened by it, and is not there.
    """
    for node in Path("/dev/vfio").glob("[0-9]*"):
        node.unlink()


@pytest.mark.usefixtures("without_udev")
def test_no_call_makes_a_checker_report(fuzzer: Path, log: KernelLog) -> None:
    let_allocations_fail()
    leaks()
    vfio.poke(KMEMLEAK, "clear")
    before, tainted = counts(), taints()
    assert lockdep_is_awake()

    types = [str(vfio.PARENTS / name) for name in TYPES]
    with subprocess.Popen(
        [fuzzer, SEED, CALLS, SECONDS, THREADS, *types], stdout=subprocess.PIPE, text=True
    ) as process:
        while process.poll() is None:  # the log is a ring: what is not read is lost
            log.lines()
            time.sleep(1)
        said = process.stdout.read() if process.stdout else ""
    sys.stdout.write("".join(f"campaign: {line}\n" for line in said.splitlines()))

    assert log.complaints() == []
    assert not log.lost
    assert counts() == before
    clear_nodes()
    uuid = vfio.create("igd0", "128M")
    with vfio.Device(uuid) as device:
        assert device.read("MAGIC") == vfio.MV["MAGIC"]
        assert device.run("FILL", dst=0, len=1 << 20) == 0
    vfio.remove(uuid)
    assert counts() == before
    with vfio.loaded():  # what the module itself has forgotten is seen when it is gone
        assert leaks() == ""
    assert log.complaints() == []
    assert taints() == tainted
    assert lockdep_is_awake()
    assert process.returncode == 0, "there was no time for all calls"


@pytest.mark.parametrize("what", FAULTS)
def test_every_checker_is_awake(what: str, log: KernelLog) -> None:
    module = Path(os.environ["MDO_LAB_CHECKERS"], "lab-fault.ko")
    done = subprocess.run(
        ["insmod", module, f"what={what}"], check=False, capture_output=True, text=True
    )
    assert os.strerror(errno.EAGAIN) in done.stderr
    if what == "kmemleak":
        assert 'comm "insmod"' in leaks()
        vfio.poke(KMEMLEAK, "clear")
    assert [line for line in log.complaints() if re.search(FAULTS[what], line)]
