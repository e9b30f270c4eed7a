# SPDX-License-Identifier: GPL-2.0-or-later
"""The models beside the drivers that they describe."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from mdev_orchestrator.capacity.attributes import TypeFacts, facts_of, meets, shown
from mdev_orchestrator.capacity.models import (
    Confidence,
    Homogeneous,
    Independent,
    ParentCapacity,
    ParentCounter,
    SharedPool,
    TypeCounts,
    count_types,
    infer,
    kind_of,
    learn,
    observe,
    survey,
)
from mdev_orchestrator.model import MdevType, Parent
from mdev_orchestrator.spec import ResolutionCondition, SizeCondition
from unit.capacity import drivers
from unit.capacity.drivers import Driver

MIB = 1 << 20


def capacity_of(driver: Driver) -> ParentCapacity:
    (found,) = survey(drivers.host(driver))
    return found


def created(
    capacity: ParentCapacity, id_: str, before: dict[str, int], after: dict[str, int]
) -> ParentCapacity:
    """The parent after one more device."""
    used = dict(capacity.used)
    more = {**used, id_: used[id_] + 1}
    return observe(capacity, [TypeCounts(used, before), TypeCounts(more, after)])


def type_(id_: str, left: int | None, **more: object) -> MdevType:
    return replace(MdevType(id_, "p", None, left, "vfio-pci"), **more)


def parent(*types: MdevType) -> Parent:
    return Parent("p", Path("/p"), types)


# ---- what vendors write ----


def test_nvidias_description() -> None:
    text = "num_heads=2, frl_config=45, framebuffer=512M, max_resolution=2560x1600, max_instance=16"
    assert facts_of(type_("nvidia-11", 16, description=text)) == TypeFacts(
        framebuffer=512 * MIB,
        num_heads=2,
        frl_config=45,
        max_resolution=(2560, 1600),
        max_instance=16,
    )


def test_gvtgs_lines() -> None:
    text = "low_gm_size: 128MB\nhigh_gm_size: 512MB\nfence: 4\nresolution: 1920x1200\nweight: 4\n"
    assert facts_of(type_("i915-GVTg_V5_4", 1, description=text)) == TypeFacts(
        low_gm_size=128 * MIB,
        high_gm_size=512 * MIB,
        fence=4,
        max_resolution=(1920, 1200),
        weight=4,
    )


def test_mvgpus_files_are_bytes_and_come_before_the_description() -> None:
    files = {"framebuffer": str(128 * MIB), "max_instance": "8", "max_resolution": "1024x768"}
    facts = facts_of(type_("mvgpu-128M", 8, description="framebuffer=1M", attributes=files))
    assert facts == TypeFacts(framebuffer=128 * MIB, max_instance=8, max_resolution=(1024, 768))


def test_the_kernels_samples() -> None:
    def facts(**texts: str) -> TypeFacts:
        return facts_of(type_("x", 1, **texts))

    assert facts(description="virtual display, 4 MB video memory").framebuffer == 4 * MIB
    assert facts(description="virtual display, 640x480 framebuffer").max_resolution == (640, 480)
    assert facts(name="Dual port serial").ports == 2


@given(st.text(), st.dictionaries(st.sampled_from(["framebuffer", "num_heads", "x"]), st.text()))
def test_no_text_of_a_vendor_breaks_anything(text: str, files: dict[str, str]) -> None:
    facts_of(type_("x", 1, description=text, attributes=files, name=text))


def test_an_attribute_that_is_not_there_meets_no_condition() -> None:
    conditions = [("framebuffer", SizeCondition(">=512M"))]
    assert meets(TypeFacts(framebuffer=512 * MIB), conditions)
    assert not meets(TypeFacts(), conditions)
    wide = [("max_resolution", ResolutionCondition(">=1920x1200"))]
    assert not meets(TypeFacts(max_resolution=(1920, 1080)), wide)
    assert (shown("framebuffer", 512 * MIB), shown("max_resolution", (1, 2))) == ("512M", "1x2")


# ---- what one scan tells ----


def test_the_example_of_the_thread() -> None:
    capacity = capacity_of(drivers.igd())
    assert tuple(capacity.remaining().values()) == (8, 4, 2)
    assert tuple(capacity.remaining({"mvgpu-512M": 1}).values()) == (4, 2, 1)
    assert tuple(capacity.remaining({"mvgpu-512M": 1, "mvgpu-128M": 1}).values()) == (3, 1, 0)


@pytest.mark.parametrize(
    ("make", "model"),
    [
        (drivers.grid, Homogeneous),
        (drivers.nvidia, Homogeneous),
        (drivers.igd, SharedPool),
        (drivers.mbochs, SharedPool),
        (drivers.mtty, SharedPool),
        (drivers.gvtg, SharedPool),
        (drivers.mdpy, ParentCounter),
    ],
)
def test_known_drivers_are_known(make: type[Driver], model: type) -> None:
    capacity = capacity_of(make())
    assert isinstance(capacity.model, model)
    assert capacity.confidence == Confidence.KNOWN


@given(st.data())
def test_what_remains_is_what_the_driver_says(data: st.DataObject) -> None:
    """From any state, by one scan, for any further creations."""
    driver = data.draw(st.sampled_from(drivers.EXACT))()
    types = st.lists(st.sampled_from(sorted(driver.texts)), max_size=20)
    for wanted in data.draw(types):
        driver.create(wanted)
    capacity = capacity_of(driver)
    assert capacity.remaining() == driver.counts()
    more: Counter[str] = Counter()
    for wanted in data.draw(types):
        promised = capacity.remaining(more)[wanted] > 0
        assert driver.create(wanted) == promised
        more[wanted] += promised
        assert capacity.remaining(more) == driver.counts()


@given(st.data())
def test_what_a_removal_gives_back(data: st.DataObject) -> None:
    driver = data.draw(st.sampled_from(drivers.EXACT))()
    for wanted in data.draw(st.lists(st.sampled_from(sorted(driver.texts)), max_size=20)):
        driver.create(wanted)
    before = drivers.host(driver)
    gone = [uuid for uuid, _ in driver.devices if data.draw(st.booleans())]
    driver.devices = [entry for entry in driver.devices if entry[0] not in gone]
    (capacity,) = survey(before, removing=gone)
    assert capacity.remaining() == driver.counts()


@given(st.lists(st.sampled_from(sorted(drivers.GVTG)), max_size=8), st.data())
def test_gvtg_is_never_promised_too_much(before: list[str], data: st.DataObject) -> None:
    """How much there is only the kernel knows: the model may promise less, and learns."""
    driver = drivers.gvtg()
    for wanted in before:
        driver.create(wanted)
    capacity = capacity_of(driver)
    assert capacity.remaining() == driver.counts()
    for wanted in data.draw(st.lists(st.sampled_from(sorted(drivers.GVTG)), max_size=8)):
        counts = driver.counts()
        if driver.create(wanted):
            assert all(capacity.remaining({wanted: 1})[t] <= n for t, n in driver.counts().items())
            capacity = created(capacity, wanted, counts, driver.counts())
            assert isinstance(capacity.model, SharedPool)
            assert capacity.remaining() == driver.counts()


def test_one_type_needs_no_model() -> None:
    capacity = infer(parent(type_("vfio_ccw-io", 1)), {})
    assert (capacity.confidence, capacity.remaining()) == (Confidence.CERTAIN, {"vfio_ccw-io": 1})


def test_an_unknown_driver_is_guessed() -> None:
    def guess(*types: MdevType, **existing: int) -> ParentCapacity:
        capacity = infer(parent(*types), {k.replace("_", "-"): n for k, n in existing.items()})
        assert capacity.confidence == Confidence.GUESSED
        return capacity

    assert isinstance(guess(type_("acme-a", 4), type_("acme-b", 4)).model, ParentCounter)
    assert isinstance(guess(type_("acme-a", 2), type_("acme-b", 3)).model, Independent)
    in_use = guess(type_("acme-a", 7), type_("acme-b", 0), acme_a=1)
    assert isinstance(in_use.model, Homogeneous)
    pool = guess(
        type_("acme-a", 8, attributes={"framebuffer": "1M"}),
        type_("acme-b", 4, attributes={"framebuffer": "2M"}),
    )
    assert pool.remaining({"acme-b": 1}) == {"acme-a": 6, "acme-b": 3}


def test_nvidias_descriptions_under_another_name_are_taken_for_what_they_are() -> None:
    driver = drivers.nvidia()
    driver.texts = {id_.replace("nvidia", "vgpu"): text for id_, text in driver.texts.items()}
    driver.left = lambda _, type_: drivers.GRID[type_.replace("vgpu", "mvgpu")][5]
    assert isinstance(capacity_of(driver).model, Homogeneous)


def test_newer_nvidia_drivers_mix_types_of_one_framebuffer() -> None:
    text = "frl_config=60, framebuffer={}M, max_instance={}"
    types = [
        type_("nvidia-1", 7, description=text.format(512, 8)),
        type_("nvidia-2", 7, description=text.format(512, 8)),
        type_("nvidia-3", 0, description=text.format(1024, 4)),
    ]
    capacity = infer(parent(*types), {"nvidia-1": 1})
    assert capacity.confidence == Confidence.KNOWN
    assert capacity.remaining({"nvidia-2": 3}) == {"nvidia-1": 4, "nvidia-2": 4, "nvidia-3": 0}
    assert capacity.remaining({"nvidia-1": -1})["nvidia-3"] == 4


def test_a_known_driver_whose_counts_disagree_is_doubted() -> None:
    capacity = infer(parent(type_("mdpy-vga", 4), type_("mdpy-xga", 3)), {})
    assert capacity.confidence == Confidence.GUESSED
    assert "mdpy" in capacity.why
    assert capacity.remaining() == {"mdpy-vga": 4, "mdpy-xga": 3}


def test_a_count_that_cannot_be_read_promises_nothing() -> None:
    for make in (*drivers.EXACT, drivers.gvtg, drivers.independent):
        real = make().parent()
        broken = replace(real.types[0], available_instances=None)
        capacity = infer(replace(real, types=(broken, *real.types[1:])), {})
        assert capacity.remaining()[broken.id] == 0
        assert capacity.unreadable == {broken.id}
        assert all(capacity.remaining()[t.id] == t.available_instances for t in real.types[1:])


def test_a_device_that_is_being_removed_is_in_the_counts_already() -> None:
    driver = drivers.grid()
    driver.create("mvgpu-12")
    capacity = infer(driver.parent(), {None: 1})
    assert capacity.remaining() == driver.counts()
    assert capacity.unseen == 1


# ---- what a creation tells ----


@pytest.mark.parametrize("make", [drivers.mbochs, drivers.mtty, drivers.independent, drivers.igd])
def test_a_creation_teaches_an_unknown_driver(make: type[Driver]) -> None:
    """The driver under another name and without a word about its types."""
    driver = make()
    bare = parent(*(type_(f"acme-{id_}", left) for id_, left in driver.counts().items()))
    capacity = infer(bare, {})
    assert capacity.confidence == Confidence.GUESSED
    before = driver.counts()
    largest = min(before, key=lambda id_: before[id_])
    driver.create(largest)
    capacity = created(
        capacity,
        f"acme-{largest}",
        {f"acme-{id_}": n for id_, n in before.items()},
        {f"acme-{id_}": n for id_, n in driver.counts().items()},
    )
    assert capacity.confidence == Confidence.OBSERVED
    more: Counter[str] = Counter()
    for id_ in (*before, *before):
        expected = {f"acme-{other}": n for other, n in driver.counts().items()}
        assert capacity.remaining(more) == expected
        if driver.create(id_):
            more[f"acme-{id_}"] += 1


def test_a_creation_unmasks_a_homogeneous_parent() -> None:
    bare = parent(type_("acme-a", 4), type_("acme-b", 4))
    capacity = infer(bare, {})
    assert isinstance(capacity.model, ParentCounter)
    capacity = created(capacity, "acme-a", {"acme-a": 4, "acme-b": 4}, {"acme-a": 3, "acme-b": 0})
    assert isinstance(capacity.model, Homogeneous)
    assert capacity.confidence == Confidence.OBSERVED
    assert capacity.remaining({"acme-a": -1}) == {"acme-a": 4, "acme-b": 4}


def test_a_creation_that_nothing_explains() -> None:
    capacity = infer(parent(type_("acme-a", 4), type_("acme-b", 4)), {})
    capacity = created(capacity, "acme-a", {"acme-a": 4, "acme-b": 4}, {"acme-a": 9, "acme-b": 1})
    assert capacity.confidence == Confidence.GUESSED
    assert capacity.remaining() == {"acme-a": 9, "acme-b": 1}


def test_a_creation_confirms_what_was_known() -> None:
    driver = drivers.grid()
    capacity = capacity_of(driver)
    before = driver.counts()
    driver.create("mvgpu-18")
    capacity = created(capacity, "mvgpu-18", before, driver.counts())
    assert capacity.confidence in {Confidence.KNOWN, Confidence.OBSERVED}
    assert capacity.remaining() == driver.counts()
    assert capacity.remaining({"mvgpu-18": -1}) == before


# ---- what is remembered ----


def test_a_kind_of_parent_is_what_does_not_change() -> None:
    used, other = drivers.igd("igd0"), drivers.igd("igd1")
    used.create("mvgpu-512M")
    assert kind_of(used.parent()) == kind_of(other.parent())
    (first, *rest) = other.parent().types
    for change in ({"name": "IGD 127M"}, {"attributes": {**first.attributes, "max_instance": "9"}}):
        changed = replace(other.parent(), types=(replace(first, **change), *rest))
        assert kind_of(changed) != kind_of(other.parent())


def test_what_was_learned_comes_before_what_is_known_as_long_as_the_counts_agree() -> None:
    """GVT-g: one scan shows less of its memory than there is."""
    driver = drivers.gvtg()
    parent = driver.parent()
    costs = tuple(drivers.GVTG[type_.id] for type_ in parent.types)
    names = ("low_gm_size", "high_gm_size", "fence")
    whole = SharedPool(tuple(drivers.GVTG), names, (64 * 9, 2048, 28), costs, (None,) * 4)
    learned = {kind_of(parent): whole}
    for type_ in ("i915-GVTg_V5_8", "i915-GVTg_V5_4", "i915-GVTg_V5_8"):
        (capacity,) = survey(drivers.host(driver), learned=learned)
        assert (capacity.model, capacity.confidence) == (whole, Confidence.OBSERVED)
        assert driver.create(type_)
        assert capacity.remaining({type_: 1}) == driver.counts()
    for wrong in (
        replace(whole, size=(64, 2048, 28)),
        replace(whole, types=("a", "b", "c", "d")),
        ParentCounter(whole.types, 4),
    ):
        (capacity,) = survey(drivers.host(driver), learned={kind_of(parent): wrong})
        assert capacity.confidence is Confidence.KNOWN
    silent = replace(parent.types[0], available_instances=None)
    unreadable = replace(parent, types=(silent, *parent.types[1:]))
    assert infer(unreadable, {}, whole).confidence is not Confidence.OBSERVED


def test_the_counts_are_not_used_while_a_device_is_being_removed() -> None:
    driver = drivers.igd()
    driver.create("mvgpu-128M")
    before = drivers.host(driver)
    assert count_types(before, "igd0") == TypeCounts(
        {"mvgpu-128M": 1, "mvgpu-256M": 0, "mvgpu-512M": 0}, driver.counts()
    )
    assert count_types(before, "igd1") is None
    leaving = replace(before, mdevs=(replace(before.mdevs[0], type_id=None),))
    assert count_types(leaving, "igd0") is None
    assert learn(before, leaving) == {}


@given(st.data())
def test_what_one_creation_teaches_explains_what_is_seen(data: st.DataObject) -> None:
    """Pools of unknown drivers."""
    types = [f"acme-{n}" for n in range(data.draw(st.integers(2, 4)))]
    total = data.draw(st.integers(1, 40))
    costs = {type_: data.draw(st.integers(1, 12)) for type_ in types}
    driver = Driver(
        "p",
        {type_: (None, None, {}) for type_ in types},
        lambda used, type_: (
            max(0, total - sum(costs[t] * n for t, n in used.items())) // costs[type_]
        ),
    )
    before = drivers.host(driver)
    if not driver.create(data.draw(st.sampled_from(types))):
        return
    learned = learn(before, drivers.host(driver))
    (capacity,) = survey(drivers.host(driver), learned=learned)
    assert capacity.remaining() == driver.counts()
