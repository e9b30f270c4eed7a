# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMU's own tests: the patched one passes what a stock one of the same source passes.

``make check-unit check-qtest-x86_64`` runs in both build directories, and the results are compared
subtest by subtest; the file ``tests.json`` beside each has them. What differs runs again in both,
alone: some of QEMU's tests mind a busy machine. They run without ``/dev/kvm``: that it opens proves
nothing, and tests hang where it does not work.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from mdev_lab import qemus
from mdev_orchestrator.qemu_build import builds, patches, source

Results = dict[str, str]  # of "TEST", and of each "TEST: SUBTEST"

TARGETS = ("check-unit", "check-qtest-x86_64")
PATIENCE = 6  # times QEMU's own time limits: other work may run beside

#: Of network cards, in a Debian package of their own.
OPTION_ROMS = Path("/usr/lib/ipxe/qemu")

#: Only the patched one has these; QEMU's test of all queries finds ours by itself.
OURS = {
    "test-mdev-lifecycle": "OK",
    "qtest-x86_64/vfio-mdev-test": "OK",
    "qtest-x86_64/qmp-cmd-test: /x86_64/qmp/query-vfio-mdevs": "passed",
}

#: A /dev with what tests need, and a build that knows of no KVM: else it runs many more of them.
WITHOUT_KVM = """
set -e
mount --rbind /dev "$0"
mount -t tmpfs dev /dev
for name in full null ptmx pts random shm tty urandom zero; do
	if [ -d "$0/$name" ]; then mkdir "/dev/$name"; else : >"/dev/$name"; fi
	mount --bind "$0/$name" "/dev/$name"
done
cp -P "$0/fd" "$0/stdin" "$0/stdout" "$0/stderr" /dev
pyvenv/bin/meson setup --reconfigure . ../source
exec "$@"
"""


def run(place: Path, *command: str) -> Results:
    """Run a command that runs tests in a build directory, and read what meson wrote of them."""
    build = place / "build"
    logs = build / "meson-logs"
    for old in logs.glob("testlog*"):
        old.unlink()
    devices = place / "dev"
    devices.mkdir(exist_ok=True)
    with (place / "tests.log").open("ab") as out:
        subprocess.run(
            ["unshare", "--map-root-user", "--mount", "sh", "-c", WITHOUT_KVM, devices, *command],
            cwd=build,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            check=False,  # some fail with the stock one, too
        )
    return read_results(logs)


def read_results(logs: Path) -> Results:
    """Read what meson wrote, where a test is called ``SUITES - qemu:TEST``."""
    results: Results = {}
    for line in (logs / "testlog.json").read_text().splitlines():
        record = json.loads(line)
        results[record["name"].rpartition("qemu:")[2]] = record["result"]
    for suite in ET.parse(logs / "testlog.junit.xml").getroot():  # noqa: S314 - of our own run
        test = suite.get("name", "").rpartition("qemu:")[2]
        for case in suite.iter("testcase") if test else ():  # else those without subtests
            ended = [child.tag for child in case if child.tag in ("skipped", "failure", "error")]
            name = re.sub(r"^\d+ ", "", case.get("name", ""))
            results[f"{test}: {name}"] = "".join(ended) or "passed"
    return results


def run_all(place: Path) -> Results:
    """Build and run the tests; Debian's source has no firmware, which most of them want."""
    assert OPTION_ROMS.is_dir(), "apt-get install ipxe-qemu"
    share = place / "build/qemu-bundle/usr/local/share/qemu"
    for image in (*(place / "firmware").iterdir(), *OPTION_ROMS.iterdir()):
        if not (share / image.name).is_symlink() and not (share / image.name).exists():
            (share / image.name).symlink_to(image)
    (place / "tests.log").unlink(missing_ok=True)
    jobs = f"-j{os.cpu_count() or 1}"
    return run(place, "make", jobs, *TARGETS, f"TIMEOUT_MULTIPLIER={PATIENCE}")


def run_again(place: Path, tests: list[str]) -> Results:
    """Run some tests, one at a time."""
    command = ("pyvenv/bin/meson", "test", "--no-rebuild", "--num-processes=1", f"-t{PATIENCE}")
    return run(place, *command, *tests)


def whole_test(name: str) -> str:
    """The test that a subtest belongs to."""
    return name.partition(": ")[0]


def different(stock: Results, patched: Results) -> dict[str, tuple[str | None, str | None]]:
    """What did not end alike, and how it ended with either."""
    return {
        name: (stock.get(name), patched.get(name))
        for name in sorted(stock.keys() | patched.keys())
        if not {name, whole_test(name)} & OURS.keys() and stock.get(name) != patched.get(name)
    }


@pytest.mark.parametrize("series", patches.series_known())
def test_both_pass_the_same(
    series: str, record_testsuite_property: Callable[[str, object], None]
) -> None:
    builds.build(series, progress=print)
    qemus.build_stock(series, progress=print)
    places = [source.place_of(f"{series}-stock"), source.place_of(series)]
    stock, patched = map(run_all, places)
    for _ in range(2):
        if again := sorted(set(map(whole_test, different(stock, patched)))):
            stock, patched = (
                {name: end for name, end in results.items() if whole_test(name) not in again}
                | run_again(place, again)
                for place, results in zip(places, (stock, patched), strict=True)
            )
    for place, results in zip(places, (stock, patched), strict=True):
        (place / "tests.json").write_text(json.dumps(results, indent=1, sort_keys=True))
        whole = Counter(end for name, end in results.items() if name == whole_test(name))
        parts = Counter(end for name, end in results.items() if name != whole_test(name))
        record_testsuite_property(place.name, f"tests {dict(whole)}, subtests {dict(parts)}")

    assert different(stock, patched) == {}
    assert {name: patched[name] for name in OURS} == OURS
    assert not OURS.keys() & stock.keys()
    assert sum(end == "OK" for end in stock.values()) > 100
