# SPDX-License-Identifier: GPL-2.0-or-later
"""``mdo probe`` on the real kernel: what it learns of each driver, and that it leaves nothing.

Over mvgpu and the kernel's samples. For the engine's part the drivers are unknown: neither their
names nor their descriptions are looked at.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import vfio
from lab.machine import machine
from lab.parents import DRIVERS, Parent, all_drivers
from mdev_orchestrator.capacity import models
from mdev_orchestrator.capacity.attributes import TypeFacts
from mdev_orchestrator.engine import model_cache
from mdev_orchestrator.engine.journal import Journal
from mdev_orchestrator.engine.probe import probe
from mdev_orchestrator.host import sysfs

pytestmark = pytest.mark.skipif("MDO_LAB" not in os.environ, reason="needs the lab's kernel")

CODE = "from mdev_orchestrator.cli.main import main; raise SystemExit(main())"
PARENTS = ("grid0", "igd0", *DRIVERS)


@pytest.fixture(scope="module", autouse=True)
def drivers() -> Iterator[None]:
    with all_drivers():
        yield


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A state directory of its own; the machine is as before afterwards."""
    monkeypatch.setenv("MDO_STATE_DIR", str(tmp_path))
    before = sysfs.read_host(machine())
    yield tmp_path
    assert sysfs.read_host(machine()) == before
    if (tmp_path / "journal.db").exists():
        with Journal.open(machine().journal_path) as journal:
            assert journal.open_runs() == []
            assert journal.managed().devices == {}


def mdo(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", CODE, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.mark.parametrize("name", PARENTS)
async def test_an_unknown_driver_is_known_afterwards(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "facts_of", lambda _: TypeFacts())
    monkeypatch.setattr(models, "_recognise", lambda _: None)
    probed = await probe(machine(), name)
    assert probed.before.confidence is models.Confidence.GUESSED
    assert probed.learned, probed.after.why
    parent = Parent(name)
    rng = random.Random(name)  # noqa: S311 - not for secrets
    try:
        for _ in range(40):
            assert probed.after.remaining(parent.used) == parent.counts(), parent.used
            if parent.devices and rng.random() < 0.3:
                parent.remove(rng.choice(parent.devices)[0])
            else:
                parent.create(rng.choice(sorted(parent.texts)))
        # with devices on it, what was learned is what is believed
        found = {
            c.name: c
            for c in models.survey(sysfs.read_host(machine()), learned=model_cache.load(machine()))
        }
        assert found[name].model == probed.after.model
        assert found[name].confidence is models.Confidence.OBSERVED
    finally:
        parent.become(Counter())


def test_all_parents_by_one_command() -> None:
    done = mdo("probe", "--yes", "--json")
    assert done.returncode == 0, done.stderr
    assert "devices will be created and removed again on each of: " in done.stderr
    shown = {parent["name"]: parent for parent in json.loads(done.stdout)["parents"]}
    assert set(shown) == set(PARENTS)
    for parent in shown.values():
        assert (parent["learned"], parent["before"]["confidence"]) == (True, "known"), parent
        assert parent["model"] == parent["before"]["model"]
    believed = models.survey(sysfs.read_host(machine()), learned=model_cache.load(machine()))
    assert {capacity.confidence for capacity in believed} == {models.Confidence.OBSERVED}


def test_a_parent_in_use_and_no_terminal_to_ask_on() -> None:
    uuid = vfio.create("igd0", "128M")
    try:
        done = mdo("probe", "--yes", "igd0")
        assert (done.returncode, done.stdout) == (2, "")
        assert f"mdo: parent igd0 has devices: {uuid} " in done.stderr
        done = mdo("probe", "grid0")
        assert (done.returncode, done.stdout) == (2, "")
        assert "--yes says that it may" in done.stderr
        assert [path.name for path in vfio.MDEVS.iterdir()] == [uuid]
    finally:
        vfio.remove(uuid)


STRUCK = """
import os, sys
from mdev_orchestrator.cli.main import main
from mdev_orchestrator.engine.steps import Create

act = Create.act

async def struck(create, context):
    Create.act = act
    await act(create, context)
    os.kill(os.getpid(), int(sys.argv[1]))

Create.act = struck
raise SystemExit(main(sys.argv[2:]))
"""


def cut_short(number: signal.Signals) -> subprocess.CompletedProcess[str]:
    """A probe of grid0 that gets a signal at the moment when it has made its first device."""
    return subprocess.run(
        [sys.executable, "-c", STRUCK, str(int(number)), "probe", "--yes", "grid0"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_leaves_nothing(number: signal.Signals) -> None:
    done = cut_short(number)
    assert done.returncode == 128 + number, done.stderr
    assert "every device was removed again" in done.stderr


def test_what_a_killed_one_leaves_is_removed_and_nothing_else() -> None:
    foreign = vfio.create("igd0", "128M")
    try:
        assert cut_short(signal.SIGKILL).returncode == -signal.SIGKILL
        left = {path.name for path in vfio.MDEVS.iterdir()} - {foreign}
        assert len(left) == 1
        done = mdo("recover", "--json")
        assert done.returncode == 0, done.stderr
        assert [run["command"] for run in json.loads(done.stdout)["runs"]] == ["probe"]
        assert {path.name for path in vfio.MDEVS.iterdir()} == {foreign}
    finally:
        vfio.remove(foreign)
