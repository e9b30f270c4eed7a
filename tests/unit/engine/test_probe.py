# SPDX-License-Identifier: GPL-2.0-or-later
"""A probe: what it learns, that it leaves nothing, and that what it learned is remembered."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from uuid import UUID

import pytest

from mdev_orchestrator.capacity.models import Confidence, Homogeneous, ParentCapacity, survey
from mdev_orchestrator.cli.main import main
from mdev_orchestrator.engine import model_cache
from mdev_orchestrator.engine.journal import Journal, open_journal
from mdev_orchestrator.engine.journal_db import read_managed
from mdev_orchestrator.engine.probe import Probed, candidates, probe
from mdev_orchestrator.engine.recovery import recover
from mdev_orchestrator.errors import BusyError, CapacityError, DeadlineError, MdoError, UnknownError
from mdev_orchestrator.host.sysfs import read_host
from mdev_orchestrator.machine import Machine
from unit.capacity import drivers
from unit.capacity.drivers import Driver, Texts
from unit.fakesys import FakeSystem

FOREIGN = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"


def install(system: FakeSystem, *installed: Driver) -> None:
    """Parents that count as the drivers say."""
    for driver in installed:
        system.parent(driver.name)
        for type_ in driver.parent().types:
            path = system.type(driver.name, type_.id, type_.available_instances)
            for file, text in (("name", type_.name), ("description", type_.description)):
                (path / file).unlink(missing_ok=True)
                if text is not None:
                    (path / file).write_text(text + "\n")
            (path / "attributes").mkdir()
            for file, text in type_.attributes.items():
                (path / "attributes" / file).write_text(text + "\n")

    def count(system: FakeSystem) -> None:
        for driver in installed:
            used = Counter(
                (system.bus / uuid / "mdev_type").resolve().name
                for uuid in system.uuids()
                if (system.bus / uuid).resolve().parent.name == driver.name
            )
            for type_ in driver.texts:
                left = driver.left(used, type_)
                (system.types(driver.name) / type_ / "available_instances").write_text(f"{left}\n")

    system.capacity = count


def unknown(driver: Driver) -> Driver:
    """The same, without a text that says what it is."""
    texts: dict[str, Texts] = {f"acme-{id_}": (None, None, {}) for id_ in driver.texts}

    def left(used: Counter[str], type_: str) -> int:
        real = Counter({id_.removeprefix("acme-"): n for id_, n in used.items()})
        return driver.left(real, type_.removeprefix("acme-"))

    return Driver(driver.name, texts, left)


def odd() -> Driver:
    """A pool of which no type takes a multiple of what another one does."""
    costs = {"a": 3, "b": 5, "c": 7}

    def left(used: Counter[str], type_: str) -> int:
        return (31 - sum(costs[t] * n for t, n in used.items())) // costs[type_]

    return Driver("odd", {id_: (None, None, {}) for id_ in costs}, left)


def kinds() -> Driver:
    """As newer drivers of NVIDIA do: types of one framebuffer go together."""
    sizes = {"1a": 1, "1b": 1, "2a": 2, "2b": 2, "4q": 4}

    def left(used: Counter[str], type_: str) -> int:
        if any(n and sizes[other] != sizes[type_] for other, n in used.items()):
            return 0
        return 8 // sizes[type_] - sum(used.values())

    return Driver("kinds", {id_: (None, None, {}) for id_ in sizes}, left)


def moody() -> Driver:
    """No model is like this one: the third device brings more."""
    return Driver(
        "moody",
        {"x-a": (None, None, {}), "x-b": (None, None, {})},
        lambda used, type_: (4 if type_ == "x-a" else 3) + 5 * (used.total() == 3) - used[type_],
    )


async def learn(machine: Machine, system: FakeSystem, driver: Driver) -> Probed:
    await asyncio.to_thread(install, system, driver)
    return await probe(machine, driver.name, deadline=5)


def agree(driver: Driver, capacity: ParentCapacity, seed: int = 1) -> None:
    """From an empty parent on, creations and removals at random change the counts as is said."""
    rng = random.Random(seed)  # noqa: S311 - not for secrets
    used: Counter[str] = Counter()
    types = sorted(driver.texts)
    for _ in range(60):
        said = capacity.remaining(used)
        assert said == {type_: driver.left(used, type_) for type_ in types}, used
        type_ = rng.choice(types)
        if rng.random() < 0.3 and used[type_]:
            used[type_] -= 1
        elif said[type_]:
            used[type_] += 1


# ---- what it learns ----

MAKERS: list[Callable[[], Driver]] = [
    *(drivers.grid, drivers.nvidia, drivers.igd, drivers.mbochs, drivers.mtty, drivers.mdpy),
    *(drivers.independent, kinds),
]


@pytest.mark.parametrize("make", MAKERS)
async def test_an_unknown_driver_is_known_afterwards(
    system: FakeSystem, machine: Machine, make: Callable[[], Driver]
) -> None:
    driver = unknown(make())
    probed = await learn(machine, system, driver)
    assert probed.before.confidence is Confidence.GUESSED
    assert probed.after.confidence is Confidence.OBSERVED, probed.after.why
    assert probed.created == sum(name == "create" for name, _ in system.writes)
    await asyncio.to_thread(lambda: [agree(driver, probed.after, seed) for seed in range(20)])
    # and a later command knows it, of this parent and of others like it
    (now,) = survey(read_host(machine), learned=model_cache.load(machine))
    assert (now.model, now.confidence) == (probed.after.model, Confidence.OBSERVED)


@pytest.mark.parametrize("make", [*MAKERS, drivers.gvtg])
async def test_a_known_driver_is_confirmed(
    system: FakeSystem, machine: Machine, make: Callable[[], Driver]
) -> None:
    probed = await learn(machine, system, make())
    assert probed.after.confidence is Confidence.OBSERVED
    assert probed.after.model.name == probed.before.model.name or probed.before.confidence == (
        Confidence.GUESSED
    )
    agree(make(), probed.after)


async def test_gvtgs_memory_is_known_afterwards(system: FakeSystem, machine: Machine) -> None:
    """One look tells of a part only, see ``gvtg`` of the models' tests."""
    driver = drivers.gvtg()
    probed = await learn(machine, system, driver)
    agree(driver, probed.after)


@pytest.mark.parametrize("make", [odd, lambda: unknown(drivers.gvtg())])
async def test_what_has_several_explanations_stays_a_guess(
    system: FakeSystem, machine: Machine, make: Callable[[], Driver]
) -> None:
    probed = await learn(machine, system, make())
    assert (probed.after.confidence, probed.learned) == (Confidence.GUESSED, False)
    assert "which has other explanations" in probed.after.why
    assert model_cache.load(machine) == {}


async def test_what_nothing_explains_is_said_and_not_kept(
    system: FakeSystem, machine: Machine
) -> None:
    probed = await learn(machine, system, moody())
    assert not probed.learned
    assert "no model explains" in probed.after.why
    assert model_cache.load(machine) == {}
    assert system.uuids() == set()


async def test_one_type_needs_no_probe(system: FakeSystem, machine: Machine) -> None:
    system.parent("ccw0")
    system.type("ccw0", "vfio_ccw-io", 1)
    probed = await probe(machine, "ccw0", deadline=5)
    assert (probed.created, probed.after.confidence) == (0, Confidence.CERTAIN)
    assert system.writes == []


# ---- what it refuses ----


async def test_a_parent_that_has_devices_is_refused_and_they_are_named(
    system: FakeSystem, machine: Machine
) -> None:
    install(system, drivers.igd("igd0"), drivers.igd("igd1"))
    system.mdev("igd0", "mvgpu-128M", FOREIGN)
    with pytest.raises(BusyError, match=f"parent igd0 has devices: {FOREIGN}"):
        await candidates(machine, ["igd1", "igd0"])
    with pytest.raises(BusyError, match="has devices"):
        await probe(machine, "igd0", deadline=5)
    chosen = await candidates(machine, [])
    assert ([parent.name for parent in chosen.idle], chosen.busy) == (["igd1"], ("igd0",))
    assert system.writes == []
    with pytest.raises(UnknownError, match=r"no parent igd2; .*|did you mean"):
        await candidates(machine, ["igd2"])


async def test_no_parent_is_idle(system: FakeSystem, machine: Machine) -> None:
    with pytest.raises(UnknownError, match="no device of this host offers mdevs"):
        await candidates(machine, [])
    install(system, drivers.igd())
    system.mdev("igd0", "mvgpu-128M", FOREIGN)
    with pytest.raises(BusyError, match="every parent has devices: igd0"):
        await candidates(machine, [])


async def test_a_parent_that_offers_nothing(system: FakeSystem, machine: Machine) -> None:
    driver = drivers.igd()
    driver.left = lambda _, __: 0
    install(system, driver)
    with pytest.raises(CapacityError, match="its driver offers none"):
        await probe(machine, "igd0", deadline=5)


# ---- nothing is left ----


def at_creation(system: FakeSystem, turn: int, what: Callable[[], int | None]) -> None:
    """Let something happen at one of the creations; an errno is its outcome."""
    seen = 0

    def create(name: str, _uuid: str) -> int | None:
        nonlocal seen
        seen += name == "create"
        return what() if name == "create" and seen == turn else None

    system.before = create


async def left_open(machine: Machine) -> list[str]:
    assert read_managed(machine).devices == {}
    async with open_journal(machine) as journal:
        return [str(run) for run in journal.open_runs()]


@pytest.mark.parametrize("turn", range(1, 8))
async def test_a_refusal_leaves_nothing(system: FakeSystem, machine: Machine, turn: int) -> None:
    await asyncio.to_thread(install, system, drivers.igd())
    at_creation(system, turn, lambda: errno.EIO)
    with pytest.raises(MdoError, match="Input/output error") as caught:
        await probe(machine, "igd0", deadline=5)
    assert "every device was removed again" in caught.value.__notes__
    assert (system.uuids(), await left_open(machine)) == (set(), [])
    assert model_cache.load(machine) == {}


async def test_an_instance_that_is_counted_late_is_waited_for(
    system: FakeSystem, machine: Machine
) -> None:
    """The driver has not counted the device yet that was removed right before."""
    await asyncio.to_thread(install, system, drivers.igd())
    at_creation(system, 2, lambda: errno.ENOSPC)
    probed = await probe(machine, "igd0", deadline=5)
    assert probed.learned
    assert sum(name == "create" for name, _ in system.writes) == probed.created + 1


@pytest.mark.parametrize("turn", range(1, 8))
async def test_an_interruption_leaves_nothing(
    system: FakeSystem, machine: Machine, turn: int
) -> None:
    install(system, drivers.igd())
    task: asyncio.Task[Probed]

    loop = asyncio.get_running_loop()

    def interrupt() -> None:
        loop.call_soon_threadsafe(task.cancel)

    at_creation(system, turn, interrupt)
    task = asyncio.ensure_future(probe(machine, "igd0", deadline=5))
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (system.uuids(), await left_open(machine)) == (set(), [])


@pytest.mark.parametrize("turn", [1, 2, 5])
async def test_another_program_on_the_parent_ends_it(
    system: FakeSystem, machine: Machine, turn: int
) -> None:
    install(system, drivers.igd())

    def intrude() -> None:
        system.mdev("igd0", "mvgpu-128M", FOREIGN)

    at_creation(system, turn, intrude)
    with pytest.raises(BusyError, match=f"another program created device {FOREIGN} on parent igd0"):
        await probe(machine, "igd0", deadline=5)
    assert system.uuids() == {FOREIGN}
    assert await left_open(machine) == []


async def test_a_parent_on_which_another_command_creates_is_not_probed(
    system: FakeSystem, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(Journal.begin.__kwdefaults__, "wait", 0.2)
    install(system, drivers.igd())
    async with open_journal(machine) as journal:
        await journal.begin("create", "1 x mvgpu-128M", (), ["parent:igd0"])
        with pytest.raises(BusyError, match="parent igd0 is being changed by mdo create"):
            await probe(machine, "igd0")
    assert system.writes == []


async def test_counts_that_do_not_come_back(
    system: FakeSystem, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mdev_orchestrator.engine.probe.SETTLE_SECONDS", 0.1)
    install(system, drivers.igd())
    lost = system.types("igd0") / "mvgpu-128M/available_instances"

    def spoil(_: FakeSystem) -> None:
        lost.write_text("7\n")

    system.capacity = spoil
    with pytest.raises(DeadlineError, match="7 of mvgpu-128M can be created, and it should be 8"):
        await probe(machine, "igd0", deadline=5)
    assert (system.uuids(), await left_open(machine)) == (set(), [])


async def test_a_device_that_stays_is_named_and_the_run_is_open(
    system: FakeSystem, machine: Machine
) -> None:
    install(system, drivers.igd())
    system.before = lambda name, _uuid: errno.EIO if name == "remove" else None
    with pytest.raises(MdoError) as caught:
        await probe(machine, "igd0", deadline=1)
    (left,) = system.uuids()
    assert left in str(caught.value)
    # 'mdo recover' tries again
    system.before = None
    (found,) = await recover(machine)
    assert (found.run.kind, found.errors) == ("probe", ())
    assert (system.uuids(), await left_open(machine)) == (set(), [])


# ---- what is remembered ----


def kept(machine: Machine) -> Path:
    return machine.state_dir / "models.json"


async def test_what_is_wrong_with_the_memory_is_no_error(
    system: FakeSystem, machine: Machine
) -> None:
    await learn(machine, system, drivers.igd())
    good = json.loads(kept(machine).read_text())
    assert len(model_cache.load(machine)) == 1
    (entry,) = good
    bad: list[object] = [
        {**entry, "model": "magic"},
        {**entry, "more": 1},
        {**entry, "fields": {**entry["fields"], "size": [-1]}},
        {**entry, "fields": {**entry["fields"], "size": [1 << 70]}},
        {**entry, "fields": {**entry["fields"], "size": []}},
        {**entry, "fields": {**entry["fields"], "costs": [[0], [0], [0]]}},
        {**entry, "fields": {**entry["fields"], "limits": [None]}},
        {**entry, "fields": {"types": entry["fields"]["types"]}},
    ]
    texts = [json.dumps([one]).encode() for one in bad]
    for text in (*texts, b"", b"{}", b"\xff", b"[" * 100_000, b" " * (2 << 20)):
        kept(machine).write_bytes(text)
        assert model_cache.load(machine) == {}
        assert (
            survey(read_host(machine), learned=model_cache.load(machine))[0].confidence
            == Confidence.KNOWN
        )
    kept(machine).unlink()
    os.mkfifo(kept(machine))
    assert model_cache.load(machine) == {}
    kept(machine).unlink()
    kept(machine).mkdir()
    with pytest.raises(MdoError, match=r"cannot write .*models\.json"):
        model_cache.keep(machine, {"x": Homogeneous(("a",), (1,), (0,))})
    assert list(machine.state_dir.glob(".models*")) == []


async def test_a_memory_that_the_counts_contradict_is_not_used(
    system: FakeSystem, machine: Machine
) -> None:
    await learn(machine, system, drivers.mbochs(total=256))
    (found,) = survey(read_host(machine), learned=model_cache.load(machine))
    assert found.confidence is Confidence.OBSERVED
    smaller = drivers.mbochs("less", total=128)
    (other,) = survey(drivers.host(smaller), learned=model_cache.load(machine))
    assert other.confidence is Confidence.KNOWN
    assert other.remaining() == smaller.counts()


def test_the_oldest_is_forgotten_first(machine: Machine) -> None:
    model = Homogeneous(("a", "b"), (1, 2), (0, 1))
    for number in range(model_cache.KEPT + 5):
        model_cache.keep(machine, {f"kind {number}": model})
    assert list(model_cache.load(machine)) == [f"kind {n}" for n in range(5, model_cache.KEPT + 5)]


async def test_a_creation_teaches_too(system: FakeSystem, machine: Machine) -> None:
    """An unknown driver, and one device of it."""
    driver = unknown(drivers.mbochs())
    install(system, driver)
    before = read_host(machine)
    assert survey(before)[0].confidence is Confidence.GUESSED
    type_ = "acme-mbochs-large"
    await system.write(str(system.types("mbochs") / type_ / "create"), FOREIGN.encode())
    await model_cache.learn_from(machine, before)
    (now,) = survey(read_host(machine), learned=model_cache.load(machine))
    assert now.confidence is Confidence.OBSERVED
    assert now.remaining({type_: -1}) == driver.counts()
    # with that, there is nothing to be learned from the next
    before, known = read_host(machine), model_cache.load(machine)
    second = str(UUID(int=7))
    await system.write(str(system.types("mbochs") / type_ / "create"), second.encode())
    await model_cache.learn_from(machine, before)
    assert model_cache.load(machine) == known


# ---- the command ----


@pytest.fixture
def two(system: FakeSystem, monkeypatch: pytest.MonkeyPatch) -> FakeSystem:
    """Two parents, on the machine that commands act on."""
    install(system, drivers.igd("igd0"), drivers.mdpy("mdpy"))
    monkeypatch.setenv("MDO_ROOT", str(system.root))
    return system


def test_it_says_what_it_will_do_and_asks(
    two: FakeSystem, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["probe", "igd0"]) == 2
    said = capsys.readouterr()
    assert "up to 19 devices will be created and removed again on each of: igd0" in said.err
    assert said.err.endswith(
        "mdo: mdo probe creates and removes devices — --yes says that it may\n"
    )
    assert two.writes == []


def test_a_table(two: FakeSystem, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["probe", "--yes"]) == 0
    assert capsys.readouterr().out == (
        "PARENT  MODEL BEFORE            MODEL NOW                  CREATED AND REMOVED\n"
        "igd0    shared pool (known)     shared pool (observed)     7\n"
        "mdpy    parent counter (known)  parent counter (observed)  7\n"
    )
    assert two.uuids() == set()


def test_its_json(two: FakeSystem, capsys: pytest.CaptureFixture[str]) -> None:
    two.mdev("mdpy", "mdpy-vga", FOREIGN)
    assert main(["probe", "--yes", "--json"]) == 0
    said = capsys.readouterr()
    remark, *_ = map(json.loads, said.err.splitlines())
    assert remark == {"remark": "left out, since they have devices: mdpy"}
    assert json.loads(said.out) == {
        "parents": [
            {
                "name": "igd0",
                "model": "shared pool",
                "confidence": "observed",
                "why": "creating devices changed the counts like this",
                "before": {"model": "shared pool", "confidence": "known"},
                "created": 7,
                "learned": True,
                "types": [
                    {"id": "mvgpu-128M", "holds": 8},
                    {"id": "mvgpu-256M", "holds": 4},
                    {"id": "mvgpu-512M", "holds": 2},
                ],
            }
        ],
        "in_use": ["mdpy"],
    }
