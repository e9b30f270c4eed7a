# SPDX-License-Identifier: GPL-2.0-or-later
"""How creating one device changes what else can be created on the same parent. Pure: no I/O.

sysfs tells how many of each type can be created *now*. What remains after one was created is the
driver's secret; a model is our knowledge of it. There are four:

:class:`Independent`
    each type has a count of its own;
:class:`SharedPool`
    each device takes its share of one or more resources: mvgpu's igd (1 GiB of memory), mbochs
    (256 MB), mtty (24 ports), GVT-g (two kinds of memory and fences);
:class:`Homogeneous`
    as long as there is a device, no other type can be created: NVIDIA's GPUs, mvgpu's grid;
:class:`ParentCounter`
    any device takes one of a number: the mdev core's own way for drivers without a
    ``get_available`` of theirs, for instance mdpy.

All are *monotone*: what fits still fits when a device is taken away, and the order in which devices
were created does not matter. The planner relies on both.

:func:`survey` infers the model of every parent from one scan and says how sure it is;
:func:`observe` corrects it by what a creation did to the counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TypeAlias
from uuid import UUID

from mdev_orchestrator.capacity.attributes import TypeFacts, facts_of
from mdev_orchestrator.model import Host, Parent

Counts: TypeAlias = tuple[int, ...]
"""A number for each type of a parent, in the order of the model's ``types``."""


@dataclass(frozen=True, slots=True)
class Independent:
    """Each type has a count of its own.

    :ivar capacity: How many of each type an empty parent holds.
    """

    types: tuple[str, ...]
    capacity: Counts

    name = "independent"

    def left(self, used: Counts) -> Counts:
        """How many more of each type can be created where ``used`` exist."""
        return tuple(max(0, total - n) for total, n in zip(self.capacity, used, strict=True))

    def choices(self, types: Counts) -> Counts:
        """Those of some types (by index) that are worth a try: no other is as good or better."""
        return types


@dataclass(frozen=True, slots=True)
class SharedPool:
    """Each device takes its share of one or more resources of the parent.

    :ivar resources: What they are called.
    :ivar size: How much there is of each, in the unit of the costs (bytes, ports…). A lower bound
        when the counts did not tell more.
    :ivar costs: For each type how much of each resource one device takes.
    :ivar limits: For each type the most that can exist at once, ``None`` without such a limit.
    """

    types: tuple[str, ...]
    resources: tuple[str, ...]
    size: Counts
    costs: tuple[Counts, ...]
    limits: tuple[int | None, ...]

    name = "shared pool"

    def left(self, used: Counts) -> Counts:
        """How many more of each type can be created where ``used`` exist."""
        free = [
            size - sum(n * cost[i] for n, cost in zip(used, self.costs, strict=True))
            for i, size in enumerate(self.size)
        ]
        return tuple(
            max(
                0,
                min(
                    *(have // take for have, take in zip(free, cost, strict=True) if take),
                    1 << 32 if limit is None else limit - n,
                ),
            )
            for cost, limit, n in zip(self.costs, self.limits, used, strict=True)
        )

    def choices(self, types: Counts) -> Counts:
        """Those of some types (by index) that no other of them undercuts in every resource."""
        return tuple(t for t in types if not any(self._better(other, t) for other in types))

    def _better(self, a: int, b: int) -> bool:
        if a == b or self.limits[a] is not None:
            return False
        if any(x > y for x, y in zip(self.costs[a], self.costs[b], strict=True)):
            return False
        return self.costs[a] != self.costs[b] or self.limits[b] is not None or a < b


@dataclass(frozen=True, slots=True)
class Homogeneous:
    """As long as there is a device, only its kind can be created.

    :ivar capacity: How many devices of the type's kind an empty parent holds; 0 where another kind
        was in use when this was learned and nothing told.
    :ivar kinds: For each type its kind. Mostly a type is a kind of its own.
    """

    types: tuple[str, ...]
    capacity: Counts
    kinds: Counts

    name = "homogeneous"

    def left(self, used: Counts) -> Counts:
        """How many more of each type can be created where ``used`` exist."""
        active = {kind for kind, n in zip(self.kinds, used, strict=True) if n}
        devices = sum(used)
        return tuple(
            max(0, total - devices) if not active - {kind} else 0
            for total, kind in zip(self.capacity, self.kinds, strict=True)
        )

    def choices(self, types: Counts) -> Counts:
        """Of some types (by index) one of each kind, and all that hold different numbers."""
        seen: dict[tuple[int, int], int] = {}
        for index in types:
            seen.setdefault((self.kinds[index], self.capacity[index]), index)
        return tuple(seen.values())


@dataclass(frozen=True, slots=True)
class ParentCounter:
    """Any device takes one of a number.

    :ivar total: How many devices an empty parent holds.
    """

    types: tuple[str, ...]
    total: int

    name = "parent counter"

    def left(self, used: Counts) -> Counts:
        """How many more of each type can be created where ``used`` exist."""
        return (max(0, self.total - sum(used)),) * len(self.types)

    def choices(self, types: Counts) -> Counts:
        """One of some types (by index): they cost the same."""
        return types[:1]


Model: TypeAlias = Independent | SharedPool | Homogeneous | ParentCounter


class Confidence(StrEnum):
    """How sure a model is."""

    CERTAIN = "certain"
    """There is but one type: every model gives the same answers."""
    OBSERVED = "observed"
    """A creation changed the counts as it says."""
    KNOWN = "known"
    """The driver is known, and the counts agree with it."""
    GUESSED = "guessed"
    """The counts agree with it, and may agree with another as well."""


@dataclass(frozen=True, slots=True)
class ParentCapacity:
    """One parent: its types, what exists on it, and how it fills.

    :ivar name: Kernel name of the parent.
    :ivar facts: The attributes of each type, by id.
    :ivar used: How many devices of each type count as existing.
    :ivar unseen: Devices whose type cannot be told, for instance one that is being removed. The
        kernel's counts know of them already.
    :ivar why: One sentence for users: where the model comes from.
    """

    name: str
    model: Model
    facts: Mapping[str, TypeFacts]
    used: Mapping[str, int]
    confidence: Confidence
    why: str
    unseen: int = 0
    unreadable: frozenset[str] = field(default=frozenset())

    @property
    def types(self) -> tuple[str, ...]:
        """Ids of its types, in natural order."""
        return self.model.types

    def counts(self, used: Mapping[str, int] | None = None) -> Counts:
        """Numbers by type id as a tuple; without an argument those that exist."""
        numbers = self.used if used is None else used
        return tuple(numbers.get(type_, 0) for type_ in self.types)

    def remaining(self, created: Mapping[str, int] | None = None) -> dict[str, int]:
        """How many of each type could still be created, after ``created`` more of each.

        Exact as far as the model is true. Negative numbers in ``created`` are removals.
        """
        more = created or {}
        after = tuple(
            max(0, n + more.get(type_, 0))
            for type_, n in zip(self.types, self.counts(), strict=True)
        )
        return dict(zip(self.types, self.model.left(after), strict=True))

    def fits(self, created: Mapping[str, int]) -> bool:
        """Whether all of ``created`` can be created together."""
        used = list(self.counts())
        for index, type_ in enumerate(self.types):
            for _ in range(created.get(type_, 0)):
                if not self.model.left(tuple(used))[index]:
                    return False
                used[index] += 1
        return set(created) <= set(self.types)


# ---- inference ------------------------------------------------------------------------------


def survey(host: Host, removing: Collection[UUID] = ()) -> tuple[ParentCapacity, ...]:
    """Infer how every parent of a host fills.

    :param removing: Devices to count as gone: what they held is free in the result.
    """
    existing: dict[str, Counter[str | None]] = {}
    for mdev in host.mdevs:
        existing.setdefault(mdev.parent, Counter())[mdev.type_id] += 1
    found = []
    for parent in host.parents:
        capacity = infer(parent, existing.get(parent.name, Counter()))
        gone = Counter(
            mdev.type_id
            for mdev in host.mdevs
            if mdev.uuid in removing and mdev.parent == parent.name and mdev.type_id is not None
        )
        used = {type_: n - gone[type_] for type_, n in capacity.used.items()}
        found.append(replace(capacity, used=used))
    return tuple(found)


def infer(parent: Parent, existing: Mapping[str | None, int]) -> ParentCapacity:
    """Infer how one parent fills, from its types, their counts and what exists.

    A driver that is known by its names is believed as long as its counts agree. Otherwise the
    first model of these that agrees: independent (when devices exist and every type has all the
    rest of its ``max_instance``), homogeneous (when a device exists and every other type reads 0),
    parent counter (all counts equal), shared pool (all sizes known), independent.

    :param existing: How many devices of each type id exist; under ``None`` those without a type.
    """
    evidence = _Evidence(
        types=tuple(type_.id for type_ in parent.types),
        facts=tuple(facts_of(type_) for type_ in parent.types),
        left=tuple(type_.available_instances for type_ in parent.types),
        used=tuple(existing.get(type_.id, 0) for type_ in parent.types),
        unseen=sum(n for type_, n in existing.items() if type_ not in {t.id for t in parent.types}),
    )
    model, confidence, why = _choose(evidence, _recognise(parent))
    return _capacity(parent.name, evidence, model, confidence, why)


def observe(
    capacity: ParentCapacity,
    created: str,
    before: Mapping[str, int],
    after: Mapping[str, int],
) -> ParentCapacity:
    """Correct a parent's model by what one creation did.

    :param capacity: The parent as it was before.
    :param created: Id of the type of which one was created.
    :param before: ``available_instances`` by type id just before the creation.
    :param after: The same just after it.
    :return: The parent as it is now. Its model explains both counts; where none of ours does,
        it is independent, ``guessed``, and says so.
    """
    types = capacity.types
    used = capacity.counts()
    now = tuple(n + (type_ == created) for type_, n in zip(types, used, strict=True))
    facts = tuple(capacity.facts[type_] for type_ in types)
    old = _Evidence(types, facts, tuple(before.get(t) for t in types), used, capacity.unseen)
    new = _Evidence(types, facts, tuple(after.get(t) for t in types), now, capacity.unseen)
    models = tuple(_explanations(capacity.model, old, new, created))
    if not models:
        model: Model = _independent(new)
        confidence, why = Confidence.GUESSED, f"no model explains what creating {created} changed"
    elif models[0] == capacity.model and (len(types) == 1 or len({m.name for m in models}) > 1):
        model, confidence, why = models[0], capacity.confidence, capacity.why
    else:
        model = models[0]
        alone = len({m.name for m in models}) == 1
        confidence = Confidence.OBSERVED if alone else Confidence.GUESSED
        why = f"creating {created} changed the counts like this"
    return _capacity(capacity.name, new, model, confidence, why)


@dataclass(frozen=True, slots=True)
class _Evidence:
    """What one look at a parent tells; all tuples in the order of ``types``."""

    types: tuple[str, ...]
    facts: tuple[TypeFacts, ...]
    left: tuple[int | None, ...]
    used: Counts
    unseen: int

    def agrees(self, model: Model) -> bool:
        said = model.left(self.used)
        return all(have in {None, n} for have, n in zip(self.left, said, strict=True))

    def known(self) -> list[int]:
        return [index for index, n in enumerate(self.left) if n is not None]

    def separate(self) -> bool:
        """Whether devices exist, and every type has all the rest of its ``max_instance``."""
        totals = self.totals()
        return (
            any(self.used)
            and not self.unseen
            and all(f.max_instance == n for f, n in zip(self.facts, totals, strict=True))
            and (
                sum(n > 0 for n in self.used) > 1
                or any(left and not n for left, n in zip(self.left, self.used, strict=True))
            )
        )

    def totals(self) -> Counts:
        """What exists and what is left, by type; 0 where the count cannot be read."""
        return tuple(
            0 if left is None else left + n for left, n in zip(self.left, self.used, strict=True)
        )


def _capacity(
    name: str, evidence: _Evidence, model: Model, confidence: Confidence, why: str
) -> ParentCapacity:
    return ParentCapacity(
        name=name,
        model=model,
        facts=dict(zip(evidence.types, evidence.facts, strict=True)),
        used=dict(zip(evidence.types, evidence.used, strict=True)),
        confidence=confidence,
        why=why,
        unseen=evidence.unseen,
        unreadable=frozenset(
            type_ for type_, n in zip(evidence.types, evidence.left, strict=True) if n is None
        ),
    )


_GVTG = ("low_gm_size", "high_gm_size", "fence")
_DRIVERS: Mapping[str, tuple[str, str, tuple[str, ...]]] = {
    "mdpy": ("the kernel's mdpy", ParentCounter.name, ()),
    "mbochs": ("the kernel's mbochs", SharedPool.name, ("framebuffer",)),
    "mtty": ("the kernel's mtty", SharedPool.name, ("ports",)),
    "i915": ("i915 GVT-g", SharedPool.name, _GVTG),
    "nvidia": ("NVIDIA's vGPU manager", Homogeneous.name, ()),
    "mvgpu IGD": ("mvgpu's igd", SharedPool.name, ("framebuffer",)),
    "mvgpu GRID": ("mvgpu's grid", Homogeneous.name, ()),
}


def _recognise(parent: Parent) -> tuple[str, str, tuple[str, ...]] | None:
    """A known driver: what it is called, its model's name, the resources of its pool."""
    drivers = {type_.id.partition("-")[0] for type_ in parent.types}
    if len(drivers) != 1:
        return None
    (driver,) = drivers
    names = [type_.name or "" for type_ in parent.types]
    if driver == "mvgpu":  # two kinds of parents under one driver's name
        driver = next((f"mvgpu {n}" for n in ("IGD", "GRID") if _all_begin(names, n)), "")
    if driver in _DRIVERS:
        return _DRIVERS[driver]
    if (_all_begin(names, "GRID") or _all_begin(names, "NVIDIA")) and all(
        "frl_config" in (type_.description or "") for type_ in parent.types
    ):
        return "NVIDIA's vGPU manager, by its descriptions,", Homogeneous.name, ()
    return None


def _all_begin(names: Iterable[str], word: str) -> bool:
    return all(name.startswith(word + " ") for name in names)


def _choose(
    evidence: _Evidence, known: tuple[str, str, tuple[str, ...]] | None
) -> tuple[Model, Confidence, str]:
    if len(evidence.types) <= 1:
        return _independent(evidence), Confidence.CERTAIN, "there is only one type"
    if known is not None:
        driver, wanted, resources = known
        for model in _named(evidence, wanted, resources):
            if evidence.agrees(model):
                return model, Confidence.KNOWN, f"{driver} fills like this"
    suffix = "" if known is None else f"; the counts do not agree with {known[0]}"
    for model, why in _guesses(evidence):
        if evidence.agrees(model):
            return model, Confidence.GUESSED, why + suffix
    return (
        _independent(evidence),
        Confidence.GUESSED,
        "nothing tells how the types depend on each other" + suffix,
    )


def _named(evidence: _Evidence, name: str, resources: tuple[str, ...]) -> Iterator[Model]:
    if name == ParentCounter.name:
        yield from _counter(evidence)
    elif name == Homogeneous.name:
        yield from _homogeneous(evidence)
    else:
        yield from _pool(evidence, resources)


def _guesses(evidence: _Evidence) -> Iterator[tuple[Model, str]]:
    model: Model
    in_use = sum(n > 0 for n in evidence.used)
    if evidence.separate():
        yield _independent(evidence), "what exists of one type took nothing from the others"
    zeros = [n == 0 for n, used in zip(evidence.left, evidence.used, strict=True) if not used]
    if in_use == 1 and all(zeros) and any(evidence.left):
        for model in _homogeneous(evidence):
            yield model, "one type is in use and every other reads 0"
    if len({evidence.left[index] for index in evidence.known()}) == 1:
        for model in _counter(evidence):
            yield model, "every type reads the same count"
    for resources in (("framebuffer",), ("ports",), _GVTG):
        for model in _pool(evidence, resources):
            yield model, f"the counts agree with a pool of {', '.join(resources)}"


def _independent(evidence: _Evidence) -> Independent:
    return Independent(evidence.types, evidence.totals())


def _counter(evidence: _Evidence) -> Iterator[ParentCounter]:
    known = evidence.known()
    # a type whose count cannot be read would be promised what the others have
    if known and len(known) == len(evidence.types):
        yield ParentCounter(evidence.types, (evidence.left[known[0]] or 0) + sum(evidence.used))


def _homogeneous(evidence: _Evidence) -> Iterator[Homogeneous]:
    """First a kind for each type; then, as newer NVIDIA drivers do, for each framebuffer."""
    types = range(len(evidence.types))
    yield _of_kinds(evidence, tuple(types))
    sizes = [facts.framebuffer for facts in evidence.facts]
    if None not in sizes:
        yield _of_kinds(evidence, tuple(sizes.index(size) for size in sizes))


def _of_kinds(evidence: _Evidence, kinds: Counts) -> Homogeneous:
    active = {kind for kind, n in zip(kinds, evidence.used, strict=True) if n}
    devices = sum(evidence.used)
    capacity = []
    for index, kind in enumerate(kinds):
        left = evidence.left[index]
        most = evidence.facts[index].max_instance
        if left is None:
            capacity.append(0)
        elif not active or kind in active:
            capacity.append(left + (devices if kind in active else 0))
        else:  # reads 0 while another kind is in use
            capacity.append(most or 0)
    if not active and evidence.unseen:
        # a device that is going holds a kind: what reads 0 now is not promised
        capacity = [left or 0 for left in evidence.left]
    return Homogeneous(evidence.types, tuple(capacity), kinds)


def _pool(evidence: _Evidence, resources: tuple[str, ...]) -> Iterator[SharedPool]:
    """A pool of attributes; its size is the least that explains the counts."""
    costs = []
    for facts in evidence.facts:
        cost = tuple(getattr(facts, name) for name in resources)
        if any(take is None for take in cost) or not any(cost):
            return
        costs.append(cost)
    if evidence.known():
        yield _sized(evidence, resources, tuple(costs))


def _sized(
    evidence: _Evidence, resources: tuple[str, ...], costs: tuple[Counts, ...]
) -> SharedPool:
    size = tuple(
        max((evidence.left[t] or 0) * costs[t][i] for t in evidence.known())
        + sum(n * cost[i] for n, cost in zip(evidence.used, costs, strict=True))
        for i in range(len(resources))
    )
    limits = []
    for index, cost in enumerate(costs):
        limit = evidence.facts[index].max_instance
        if evidence.left[index] is None:
            limit = 0
        elif limit is not None:
            holds = min(have // take for have, take in zip(size, cost, strict=True) if take)
            limit = None if holds <= limit else limit
        limits.append(limit)
    return SharedPool(evidence.types, resources, size, costs, tuple(limits))


def _explanations(current: Model, old: _Evidence, new: _Evidence, created: str) -> Iterator[Model]:
    """Models that agree with the counts before and after, the current one's kind first."""
    candidates: list[Model] = [current]
    for evidence in (new, old):
        candidates += _homogeneous(evidence)
        candidates += _counter(evidence)
        for resources in (("framebuffer",), ("ports",), _GVTG):
            candidates += _pool(evidence, resources)
    candidates += _learned_pool(old, new, created)
    candidates.append(_independent(new))
    candidates = [_grown(candidate, candidates) for candidate in candidates]
    candidates.sort(key=lambda model: model.name != current.name)
    for model in candidates:
        if old.agrees(model) and new.agrees(model):
            yield model


def _grown(model: Model, others: Iterable[Model]) -> Model:
    """A pool with the largest size that any look at the same pool has shown."""
    if not isinstance(model, SharedPool):
        return model
    sizes = [
        other.size
        for other in others
        if isinstance(other, SharedPool)
        and (other.resources, other.costs) == (model.resources, model.costs)
    ]
    return replace(model, size=tuple(map(max, zip(*sizes, strict=True))))


def _learned_pool(old: _Evidence, new: _Evidence, created: str) -> Iterator[SharedPool]:
    """A pool whose costs are learned from the counts, in units of the cheapest type."""
    if None in old.left or None in new.left:
        return
    before = [n or 0 for n in old.left]
    after = [n or 0 for n in new.left]
    total, rest = max(before), after[before.index(max(before))]
    taken = total - rest
    if taken < 1:
        return
    costs = []
    for index, type_ in enumerate(old.types):
        cost = taken if type_ == created else _cost(before[index], after[index], total, rest)
        if cost is None:
            return
        costs.append((cost,))
    yield _sized(old, ("units",), tuple(costs))


def _cost(before: int, after: int, total: int, rest: int) -> int | None:
    """The cost of which ``total`` units give ``before`` devices and ``rest`` give ``after``.

    Of several the largest, which promises least.
    """
    low = max(total // (before + 1), rest // (after + 1)) + 1
    high = min(total // before if before else low, rest // after if after else total + 1)
    if not before:
        return low
    return high if low <= high else None
