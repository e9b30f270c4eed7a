# SPDX-License-Identifier: GPL-2.0-or-later
"""How creating one device changes what else can be created on the same parent. Pure: no I/O.

sysfs says how many of each type can be created *now*. It does not say what remains after one more
was created; a model does. There are four:

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
:func:`observe` corrects it by what creations did to the counts. What was observed holds for every
parent of the same kind (:func:`kind_of`), and :func:`survey` takes it as ``learned``.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from enum import StrEnum
from itertools import islice
from types import MappingProxyType
from typing import TypeAlias
from uuid import UUID

from msgspec import Struct
from msgspec.structs import astuple, replace

from mdev_orchestrator.capacity.attributes import TypeFacts, facts_of
from mdev_orchestrator.model import Host, Parent

Counts: TypeAlias = tuple[int, ...]
"""A number for each type of a parent, in the order of the model's ``types``."""

_LIMIT = 1 << 63
_STATES = 500  # in which two models are compared
_SETTLED = 64  # types of which the costs are searched
_ANSWERS = 16  # to the question what types take, which may differ
_TRIES = 5000  # to find what types take, which is about a tenth of a second


class Independent(Struct, frozen=True):
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


class SharedPool(Struct, frozen=True):
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


class Homogeneous(Struct, frozen=True):
    """As long as there is a device, only its kind can be created.

    :ivar capacity: How many devices of the type's kind an empty parent holds; 0 where another kind
        was in use when this was learned and no attribute says it.
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


class ParentCounter(Struct, frozen=True):
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
    """Creations changed the counts as it says, and as no other model does."""
    KNOWN = "known"
    """The driver is known, and the counts agree with it."""
    GUESSED = "guessed"
    """The counts agree with it, and may agree with another as well."""


class ParentCapacity(Struct, frozen=True):
    """One parent: its types, what exists on it, and how it fills.

    :ivar name: Kernel name of the parent. The planner only compares it: a plan over several hosts
        needs names that are unique over all of them, such as ``HOST/PARENT``.
    :ivar facts: The attributes of each type, by id.
    :ivar used: How many devices of each type count as existing.
    :ivar unseen: Devices whose type is not known, for instance one that is being removed. The
        kernel's counts include them already.
    :ivar unreadable: Types whose count cannot be read. The model promises none of them; only the
        driver knows.
    :ivar why: One sentence for users: where the model comes from.
    """

    name: str
    model: Model
    facts: Mapping[str, TypeFacts]
    used: Mapping[str, int]
    confidence: Confidence
    why: str
    unseen: int = 0
    unreadable: frozenset[str] = frozenset()

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


# ---- inference ------------------------------------------------------------------------------


def survey(
    host: Host, removing: Collection[UUID] = (), learned: Mapping[str, Model] = MappingProxyType({})
) -> tuple[ParentCapacity, ...]:
    """Infer how every parent of a host fills.

    :param removing: Devices to count as gone: what they held is free in the result.
    :param learned: Models that were observed, by the kind of parent (:func:`kind_of`). Not
        trusted: one that the counts contradict is not used.
    """
    existing: dict[str, Counter[str | None]] = {}
    for mdev in host.mdevs:
        existing.setdefault(mdev.parent, Counter())[mdev.type_id] += 1
    found = []
    for parent in host.parents:
        capacity = infer(
            parent,
            existing.get(parent.name, Counter()),
            learned.get(kind_of(parent)) if learned else None,
        )
        gone = Counter(
            mdev.type_id
            for mdev in host.mdevs
            if mdev.uuid in removing and mdev.parent == parent.name and mdev.type_id is not None
        )
        used = {type_: n - gone[type_] for type_, n in capacity.used.items()}
        found.append(replace(capacity, used=used))
    return tuple(found)


def kind_of(parent: Parent) -> str:
    """What parents that fill alike have in common, as a short text.

    That is all that does not change: the types' ids, names and descriptions, and the attributes
    that are known, such as ``max_instance``.
    """
    import hashlib

    said = [
        (type_.id, type_.name, type_.description, astuple(facts_of(type_)))
        for type_ in parent.types
    ]
    return hashlib.sha256(repr(said).encode()).hexdigest()[:32]


def infer(
    parent: Parent, existing: Mapping[str | None, int], learned: Model | None = None
) -> ParentCapacity:
    """Infer how one parent fills, from its types, their counts and what exists.

    What was learned is believed as long as the counts agree, then a driver that is known by its
    names. Otherwise the first model of these that agrees: independent (when devices exist and
    every type has all the rest of its ``max_instance``), homogeneous (when a device exists and
    every other type reads 0), parent counter (all counts equal), shared pool (all sizes known),
    independent.

    :param existing: How many devices of each type id exist; under ``None`` those without a type.
    :param learned: What was observed of parents of this kind. Not trusted.
    """
    evidence = _Evidence(
        types=tuple(type_.id for type_ in parent.types),
        facts=tuple(facts_of(type_) for type_ in parent.types),
        left=tuple(type_.available_instances for type_ in parent.types),
        used=tuple(existing.get(type_.id, 0) for type_ in parent.types),
        unseen=sum(n for type_, n in existing.items() if type_ not in {t.id for t in parent.types}),
    )
    if learned is not None and len(evidence.types) > 1 and evidence.confirms(learned):
        why = "devices that were created on such a parent have shown it"
        return _capacity(parent.name, evidence, learned, Confidence.OBSERVED, why)
    model, confidence, why = _choose(evidence, _recognise(parent))
    return _capacity(parent.name, evidence, model, confidence, why)


class TypeCounts(Struct, frozen=True):
    """The types of a parent in one scan.

    :ivar used: How many devices exist, by type id.
    :ivar left: How many more can be created, as the kernel says, by type id; ``None`` where the
        count could not be read.
    """

    used: Mapping[str, int]
    left: Mapping[str, int | None]


def count_types(host: Host, parent: str) -> TypeCounts | None:
    """Count the devices of one parent in a scan, by type.

    :return: ``None`` if the parent is gone, or if a device is being created or removed: then the
        counts are of one moment and the devices of another.
    """
    found = next((p for p in host.parents if p.name == parent), None)
    existing = Counter(mdev.type_id for mdev in host.mdevs if mdev.parent == parent)
    if found is None or not existing.keys() <= {type_.id for type_ in found.types}:
        return None
    return TypeCounts(
        used={type_.id: existing[type_.id] for type_ in found.types},
        left={type_.id: type_.available_instances for type_ in found.types},
    )


def observe(capacity: ParentCapacity, samples: Sequence[TypeCounts]) -> ParentCapacity:
    """Correct a parent's model by counts between which devices were created or removed.

    :param capacity: What was believed.
    :param samples: In any order but for the last, which is how the parent is now.
    :return: The parent as it is now. Its model explains all samples; where none of the four does,
        it is independent, ``guessed``, and says so.
    """
    types = capacity.types
    facts = tuple(capacity.facts[type_] for type_ in types)
    seen = [
        _Evidence(
            types,
            facts,
            tuple(sample.left.get(type_) for type_ in types),
            tuple(sample.used.get(type_, 0) for type_ in types),
            capacity.unseen,
        )
        for sample in samples
    ]
    model, confidence, why = capacity.model, capacity.confidence, capacity.why
    models = tuple(dict.fromkeys(_explanations(model, seen)))
    if not models:
        model = _independent(seen[-1])
        confidence, why = Confidence.GUESSED, "no model explains what creating devices changed"
    elif len(types) > 1:
        if all(_alike(models[0], other) for other in models[1:]):
            confidence, why = Confidence.OBSERVED, "creating devices changed the counts like this"
        elif models[0] != model:
            confidence = Confidence.GUESSED
            why = "creating devices changed the counts like this, which has other explanations"
        model = models[0]
    return _capacity(capacity.name, seen[-1], model, confidence, why)


def learn(
    before: Host, after: Host, learned: Mapping[str, Model] = MappingProxyType({})
) -> dict[str, Model]:
    """Infer models from the devices that came or went between two scans.

    :param learned: What is known already.
    :return: Models to be known from now on, by kind of parent; empty where nothing contradicts
        what was known.
    """
    found = {}
    kinds = {parent.name: kind_of(parent) for parent in before.parents}
    for capacity in survey(before, learned=learned):
        then, now = count_types(before, capacity.name), count_types(after, capacity.name)
        if then is None or now is None or then.used == now.used:
            continue
        change = {type_: now.used.get(type_, 0) - n for type_, n in then.used.items()}
        if capacity.confidence is Confidence.GUESSED or capacity.remaining(change) != now.left:
            corrected = observe(capacity, (then, now))
            if corrected.confidence is Confidence.OBSERVED:
                found[kinds[capacity.name]] = corrected.model
    return found


def is_sound(model: Model) -> bool:
    """Whether a model that was read from a file is complete and has sensible numbers."""
    count = len(model.types)
    match model:
        case SharedPool():
            width = len(model.resources)
            rows = (model.size, *model.costs)
            numbers = [n for row in rows for n in row]
            numbers += [limit for limit in model.limits if limit is not None]
            shaped = (
                len(model.costs) == len(model.limits) == count
                and all(len(row) == width for row in rows)
                and all(map(any, model.costs))
            )
        case Homogeneous():
            numbers = [*model.capacity, *model.kinds]
            shaped = len(model.capacity) == len(model.kinds) == count
        case ParentCounter():
            numbers, shaped = [model.total], True
        case Independent():
            numbers, shaped = list(model.capacity), len(model.capacity) == count
    return shaped and all(0 <= number < _LIMIT for number in numbers)


class _Evidence(Struct, frozen=True):
    """What one scan says of a parent; all tuples in the order of ``types``."""

    types: tuple[str, ...]
    facts: tuple[TypeFacts, ...]
    left: tuple[int | None, ...]
    used: Counts
    unseen: int

    def agrees(self, model: Model) -> bool:
        said = model.left(self.used)
        return all(have in {None, n} for have, n in zip(self.left, said, strict=True))

    def confirms(self, model: Model) -> bool:
        """Whether the model is one of these types, and every count can be read and agrees.

        A model says nothing reliable of a type whose count cannot be read.
        """
        return model.types == self.types and None not in self.left and self.agrees(model)

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
        "nothing says how the types depend on each other" + suffix,
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
    # with a count that cannot be read the type would be promised what the others have
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
        # a device that is being removed holds a kind: what reads 0 now is not promised
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
    """A pool of the least size that explains the counts."""
    free = tuple(
        max((evidence.left[t] or 0) * costs[t][i] for t in evidence.known())
        for i in range(len(resources))
    )
    return _with_free(evidence, resources, costs, free)


def _with_free(
    evidence: _Evidence, resources: tuple[str, ...], costs: tuple[Counts, ...], free: Counts
) -> SharedPool:
    """A pool of which so much is free now."""
    size = tuple(
        have + sum(n * cost[i] for n, cost in zip(evidence.used, costs, strict=True))
        for i, have in enumerate(free)
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


def _alike(one: Model, other: Model) -> bool:
    """Whether two models give the same answers in the states that few devices lead to."""
    start = (0,) * len(one.types)
    seen, waiting = {start}, deque([start])
    while waiting:
        used = waiting.popleft()
        left = one.left(used)
        if left != other.left(used):
            return False
        for index, n in enumerate(left):
            more = (*used[:index], used[index] + 1, *used[index + 1 :])
            if n and more not in seen and len(seen) < _STATES:
                seen.add(more)
                waiting.append(more)
    return True


def _explanations(current: Model, samples: Sequence[_Evidence]) -> Iterator[Model]:
    """Models that agree with all samples, the current one's kind first."""
    candidates: list[Model] = [current]
    for evidence in reversed(samples):
        candidates += _homogeneous(evidence)
        candidates += _counter(evidence)
        for resources in (("framebuffer",), ("ports",), _GVTG):
            candidates += _pool(evidence, resources)
        candidates.append(_independent(evidence))
    candidates += _seen_kinds(samples)
    candidates = [_grown(candidate, candidates) for candidate in candidates]
    candidates.sort(key=lambda model: model.name != current.name)
    found = [model for model in candidates if all(seen.agrees(model) for seen in samples)]
    yield from found
    if not any(isinstance(model, SharedPool) for model in found):
        yield from _seen_costs(samples)


def _grown(model: Model, others: Iterable[Model]) -> Model:
    """A pool with the largest size that any sample of the same pool has shown."""
    if not isinstance(model, SharedPool):
        return model
    sizes = [
        other.size
        for other in others
        if isinstance(other, SharedPool)
        and (other.resources, other.costs) == (model.resources, model.costs)
    ]
    return replace(model, size=tuple(map(max, zip(*sizes, strict=True))))


def _seen_kinds(samples: Sequence[_Evidence]) -> Iterator[Homogeneous]:
    """Types are of one kind when a device of the one left room for the other."""
    kinds = list(range(len(samples[0].types)))
    for evidence in samples:
        if any(evidence.used):
            both = zip(kinds, evidence.used, evidence.left, strict=True)
            joined = {kind for kind, used, left in both if used or left}
            kinds = [min(joined) if kind in joined else kind for kind in kinds]
    if len(set(kinds)) > 1:
        for evidence in samples:
            yield _of_kinds(evidence, tuple(kinds))


def _seen_costs(samples: Sequence[_Evidence]) -> Iterator[SharedPool]:
    """A pool where no attribute says what the types take: the coarsest units that explain all.

    The largest count is tried as the number of units first, then more: of types that take 3 and 5
    of 16, an empty parent holds 5 and 3. Where all types divide the units evenly, that is taken for
    the truth; otherwise there may be several answers, and they may differ.
    """
    first = samples[0]
    if any(None in evidence.left for evidence in samples) or len(first.types) > _SETTLED:
        return
    most = max(left or 0 for left in first.left)
    # what a type takes limits the others only when one was created: such types are settled first
    order = sorted(
        range(len(first.types)),
        key=lambda type_: all(e.used[type_] == first.used[type_] for e in samples),
    )
    tries = (
        (total, costs)
        for total in range(most, 16 * most + 1)
        for costs in _tries(total, samples, order, {})
    )
    found = 0
    for total, costs in islice(tries, _TRIES):
        if len(costs) == len(order):
            ordered = tuple((costs[type_],) for type_ in sorted(order))
            yield _with_free(first, ("units",), ordered, (total,))
            found += 1
            even = all(costs[type_] * (first.left[type_] or 0) == total for type_ in order)
            if even or found == _ANSWERS:
                return


def _tries(
    total: int, samples: Sequence[_Evidence], order: Sequence[int], costs: Mapping[int, int]
) -> Iterator[Mapping[int, int]]:
    """What each type may take of ``total`` units that are free in the first sample.

    Of several answers the largest costs come first, which promise least.

    :param costs: Those that are settled.
    :return: Everything that was tried, so that it can be counted: what is complete is an answer.
    """
    if not all(_explains(costs, total, samples[0], evidence) for evidence in samples):
        yield {}
        return
    yield costs
    if len(costs) < len(order):
        type_ = order[len(costs)]
        left = samples[0].left[type_] or 0
        least = total // (left + 1) + 1
        for cost in range(total // left if left else least, least - 1, -1):
            yield from _tries(total, samples, order, {**costs, type_: cost})


def _explains(costs: Mapping[int, int], total: int, first: _Evidence, now: _Evidence) -> bool:
    """Whether costs, as far as they are settled, explain a sample."""
    more = {t: n - first.used[t] for t, n in enumerate(now.used) if n != first.used[t]}
    if not more.keys() <= costs.keys():
        return True
    free = max(0, total - sum(n * costs[type_] for type_, n in more.items()))
    for type_, cost in costs.items():
        left = now.left[type_] or 0
        full = now.facts[type_].max_instance == left + now.used[type_]
        if left != free // cost and not (full and left < free // cost):
            return False
    return True
