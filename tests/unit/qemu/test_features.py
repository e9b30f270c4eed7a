# SPDX-License-Identifier: GPL-2.0-or-later
"""What a binary can do is asked, and remembered only as long as it is the same binary."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mdev_orchestrator.qemu.features import START, object_types, properties

ANSWER = """\
#!/bin/sh
echo "$*" >> {log}
echo "vfio-pci options:"
echo "  mdev-start=<OnOffAuto>    - start it (default: \\"auto\\")"
echo "  sysfsdev=<str>"
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MDO_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def program(tmp_path: Path, text: str = ANSWER) -> Path:
    path = tmp_path / "qemu"
    path.write_text(text.format(log=tmp_path / "log"))
    path.chmod(0o755)
    return path


def questions(tmp_path: Path) -> list[str]:
    return (tmp_path / "log").read_text().splitlines()


async def test_it_is_asked_once(tmp_path: Path, cache: Path) -> None:
    qemu = program(tmp_path)
    for _ in range(2):
        assert await properties(str(qemu), "vfio-pci") == {START, "sysfsdev"}
    assert questions(tmp_path) == ["-device vfio-pci,help"]
    await properties(str(qemu), "vfio-ap")
    assert questions(tmp_path)[1:] == ["-device vfio-ap,help"]


async def test_another_binary_is_asked_again(tmp_path: Path, cache: Path) -> None:
    qemu = program(tmp_path)
    await properties(str(qemu), "vfio-pci")
    program(tmp_path, ANSWER.replace("mdev-start", "other"))
    assert await properties(str(qemu), "vfio-pci") == {"other", "sysfsdev"}
    os.utime(qemu, ns=(1, 1))
    await properties(str(qemu), "vfio-pci")
    assert len(questions(tmp_path)) == 3


@pytest.mark.parametrize("damage", [b"", b"[1]", b"\xff", b"[]"])
async def test_a_damaged_cache_is_no_cache(tmp_path: Path, cache: Path, damage: bytes) -> None:
    cache.mkdir()
    (cache / "qemu-properties.json").write_bytes(damage)
    assert START in await properties(str(program(tmp_path)), "vfio-pci")


async def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path, cache: Path) -> None:
    cache.write_text("a file")
    assert START in await properties(str(program(tmp_path)), "vfio-pci")


@pytest.mark.parametrize("text", ["#!/bin/sh\nexit 1\n", "no program", "#!/nowhere\n"])
async def test_what_does_not_answer_can_nothing(tmp_path: Path, cache: Path, text: str) -> None:
    assert await properties(str(program(tmp_path, text)), "vfio-pci") == frozenset()
    assert await properties(str(tmp_path / "none"), "vfio-pci") == frozenset()
    assert await properties(str(tmp_path / "none"), "-x,y") == frozenset()


async def test_what_hangs_costs_the_deadline(tmp_path: Path, cache: Path) -> None:
    qemu = program(tmp_path, "#!/bin/sh\nexec sleep 60\n")
    assert await properties(str(qemu), "vfio-pci", deadline=0.2) == frozenset()


async def test_types_of_objects_are_asked_for_likewise(tmp_path: Path, cache: Path) -> None:
    answer = '#!/bin/sh\necho "$*" >> {log}\necho "List of objects:"\nprintf "  %s\\n" {names}\n'
    names = "iothread monitor-qmp secret_keyring"
    qemu = program(tmp_path, answer.replace("{names}", names))
    for _ in range(2):
        assert await object_types(str(qemu)) == set(names.split())
    assert await properties(str(qemu), "vfio-pci") == frozenset()
    assert questions(tmp_path) == ["-object help", "-device vfio-pci,help"]


async def test_the_real_one(qemu: str, cache: Path) -> None:
    found = await properties(qemu, "vfio-pci")
    assert {"sysfsdev", "host"} <= found
    assert {"iothread", "memory-backend-ram"} <= await object_types(qemu)
