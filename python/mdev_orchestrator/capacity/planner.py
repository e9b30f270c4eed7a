# SPDX-License-Identifier: GPL-2.0-or-later
"""Where requests for devices go, and what would remain. Pure: no I/O.

:func:`plan` places requests over the parents that :func:`..models.survey` found.

How it decides
==============

A device that belongs to no group is placed by itself; a group is placed whole, on one parent, or
not at all. The most demanding go first. Each goes where it costs least: the *loss* is the share of
a parent's possibilities that is gone afterwards. A small device therefore goes where no large slot
is broken for it, and a device of a homogeneous parent beside its own kind. Between equals, ``pack``
takes the fullest parent and ``spread`` the one with the fewest devices; ``spread`` compares the
devices first and the loss second, and gives way to ``pack`` where it would not fit otherwise.

When this places everything, the plan fits. When it does not, that alone proves nothing: packing is
hard. Parents that share no request form parts, and each part is searched by itself: exactly, with
bounds, each of several equal cases once. The search ends after ``effort`` steps; then
``Plan.proven`` is false and the plan says that nothing was *found*. Parts of up to some dozens of
devices are decided.

The same requests and parents give the same plan, whatever ran before.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Literal, TypeAlias

from msgspec import Struct

from mdev_orchestrator.capacity.attributes import TypeFacts, meets, shown
from mdev_orchestrator.capacity.models import (
    Counts,
    Homogeneous,
    Independent,
    Model,
    ParentCapacity,
    ParentCounter,
    SharedPool,
)
from mdev_orchestrator.spec import Condition

Policy = Literal["pack", "spread"]

EFFORT = 100_000
"""Steps of the exact search, which take about a second."""

_SEARCHED = 250  # devices and groups in one part; more would also be too deep for the stack
_OPTIONS = 4096  # ways to put one group on one parent that are compared
_SCALE = 1 << 40  # a parent's whole capacity, as an integer: no rounding, no order of summation


class Request(Struct, frozen=True):
    """So many devices of one kind.

    :ivar key: What messages and placements call it, for instance ``guest[0].mdev[1]``.
    :ivar type_id: Id of the type, ``None`` for any type that meets the conditions.
    :ivar conditions: What the type's attributes must be, by name.
    :ivar group: All requests with the same group go on one parent, whole or not at all.
    :ivar parent: The only parent that will do.
    """

    key: str
    type_id: str | None = None
    conditions: tuple[tuple[str, Condition], ...] = ()
    count: int = 1
    group: str | None = None
    parent: str | None = None

    def __str__(self) -> str:
        """What is asked for, without the key: ``2 x mvgpu-12`` or ``framebuffer >=512M``."""
        words = [self.type_id] if self.type_id is not None else []
        words += [f"{name} {condition}" for name, condition in self.conditions]
        return f"{self.count} x {', '.join(words) or 'any type'}"


class Placement(Struct, frozen=True):
    """One device to be created: for which request (its key), and where."""

    request: str
    parent: str
    type_id: str
    group: str | None = None


class Shortfall(Struct, frozen=True):
    """A request that does not fit.

    :ivar asked: Devices asked for.
    :ivar placed: Those of them that would fit.
    :ivar reason: Why the others do not, a sentence without its subject.
    :ivar hint: What would fit.
    """

    request: str
    asked: int
    placed: int
    reason: str
    hint: str = ""


class ParentPlan(Struct, frozen=True):
    """One parent before and after; all by type id."""

    capacity: ParentCapacity
    used_before: Mapping[str, int]
    used_after: Mapping[str, int]
    available_before: Mapping[str, int]
    available_after: Mapping[str, int]


class Plan(Struct, frozen=True):
    """The answer.

    :ivar placements: In the order of the requests. When it does not fit, those that would.
    :ivar shortfalls: The requests that do not fit, in their order; empty when all do.
    :ivar parents: In the order in which they were given, with what the placements leave.
    :ivar proven: Whether the answer is exact. A plan that fits always is.
    """

    placements: tuple[Placement, ...]
    shortfalls: tuple[Shortfall, ...]
    parents: tuple[ParentPlan, ...]
    policy: Policy
    proven: bool = True

    @property
    def fits(self) -> bool:
        """Whether all requests can be placed."""
        return not self.shortfalls


def plan(
    requests: Sequence[Request],
    parents: Sequence[ParentCapacity],
    policy: Policy = "pack",
    *,
    effort: int = EFFORT,
) -> Plan:
    """Place all requests, or say which do not fit and why.

    :param effort: Steps after which the exact search gives up.
    """
    job = _Job(requests, parents)
    found, proven = job.solve(policy, effort)
    placements: list[list[Placement]] = [[] for _ in requests]
    states = list(job.start)
    for item, where in zip(job.items, found, strict=True):
        if where is None:
            continue
        index, state, types = where
        kind = state.kind
        for request, type_ in zip(item.requests, types, strict=True):
            placements[request].append(
                Placement(
                    requests[request].key,
                    parents[index].name,
                    kind.model.types[type_],
                    requests[request].group,
                )
            )
            states[index] = states[index].after[type_] or states[index]
    changed = tuple(
        ParentPlan(
            capacity=parent,
            used_before=parent.used,
            used_after=dict(zip(parent.types, after.used, strict=True)),
            available_before=dict(zip(parent.types, before.left, strict=True)),
            available_after=dict(zip(parent.types, after.left, strict=True)),
        )
        for parent, before, after in zip(parents, job.start, states, strict=True)
    )
    explain = _Explain(job, requests, parents, states, proven=proven)
    return Plan(
        placements=tuple(placement for placed in placements for placement in placed),
        shortfalls=tuple(
            explain.shortfall(number, len(placements[number]))
            for number, request in enumerate(requests)
            if len(placements[number]) < request.count
        ),
        parents=changed,
        policy=policy,
        proven=proven,
    )


# ---- states ---------------------------------------------------------------------------------

Selector: TypeAlias = tuple[str | None, tuple[tuple[str, Condition], ...]]
Demand: TypeAlias = tuple[tuple[int, int], ...]
"""Numbers of selectors, and how many devices of each."""


class _Kind:
    """Parents that are alike in everything but what exists on them, and their states."""

    def __init__(self, model: Model, facts: tuple[TypeFacts, ...]) -> None:
        self.model = model
        self.facts = facts
        self.states: dict[Counts, _State] = {}
        self.eligible: dict[int, Counts] = {}
        whole = model.left((0,) * len(model.types))
        types = max(1, len(whole))
        self.weights = tuple(_SCALE // (max(1, n) * types) for n in whole)
        self.share = tuple(_SCALE // n if n else _SCALE for n in whole)
        self.volume = _volume(model)

    def state(self, used: Counts) -> _State:
        found = self.states.get(used)
        if found is None:
            found = self.states[used] = _State(self, used, len(self.states))
        return found

    def types(self, number: int, selector: Selector) -> Counts:
        """The types that a selector may take, without those that another one undercuts."""
        found = self.eligible.get(number)
        if found is None:
            type_id, conditions = selector
            fitting = tuple(
                index
                for index, (id_, facts) in enumerate(zip(self.model.types, self.facts, strict=True))
                if type_id in {None, id_} and meets(facts, conditions)
            )
            found = self.eligible[number] = self.model.choices(fitting)
        return found


def _volume(model: Model) -> Counts:
    """For each type a share of the parent, such that what fits never adds up to more than all."""
    match model:
        case SharedPool():
            return tuple(
                sum(
                    _SCALE * take // max(1, have)
                    for take, have in zip(cost, model.size, strict=True)
                )
                // len(model.size)
                for cost in model.costs
            )
        case Homogeneous():
            return tuple(_SCALE // max(1, n) for n in model.capacity)
        case ParentCounter():
            return (_SCALE // max(1, model.total),) * len(model.types)
        case Independent():
            return (_SCALE // max(1, sum(model.capacity)),) * len(model.types)


class _After:
    """The states that one more device of each type leads to; ``None`` where none fits."""

    __slots__ = ("known", "state")

    def __init__(self, state: _State) -> None:
        self.state = state
        self.known: dict[int, _State | None] = {}

    def __getitem__(self, type_: int) -> _State | None:
        try:
            return self.known[type_]
        except KeyError:
            state = self.state
            found = None
            if state.left[type_] > 0:
                used = state.used
                found = state.kind.state((*used[:type_], used[type_] + 1, *used[type_ + 1 :]))
            self.known[type_] = found
            return found


Option: TypeAlias = "tuple[_State, Counts]"
"""A state, and the types that lead there, one for each device."""


class _State:
    """What exists on a parent of some kind. There is one object for each such state."""

    __slots__ = ("after", "best", "devices", "kind", "left", "number", "options", "used", "value")

    def __init__(self, kind: _Kind, used: Counts, number: int) -> None:
        self.kind = kind
        self.used = used
        self.number = number
        self.devices = sum(used)
        self.left = kind.model.left(used)
        self.value = sum(map(int.__mul__, self.left, kind.weights))
        self.after = _After(self)
        self.options: dict[Demand, list[Option]] = {}
        self.best: dict[Demand, Option | None] = {}


class _Item(Struct):
    """What is placed as one: a device by itself, or a group.

    :ivar requests: The request of each device, in the order of the demand.
    :ivar allowed: Indices of parents that will do, ``None`` for all.
    """

    demand: Demand
    requests: tuple[int, ...]
    allowed: frozenset[int] | None


Found: TypeAlias = "tuple[int, _State, Counts] | None"
"""Where an item goes: a parent, the state that it finds there, the types of its devices."""


class _Job:
    """Requests and parents, taken apart for the search."""

    def __init__(self, requests: Sequence[Request], parents: Sequence[ParentCapacity]) -> None:
        self.selectors: list[Selector] = []
        self.numbers: dict[Selector, int] = {}
        self.kinds: dict[tuple[object, ...], _Kind] = {}
        self.start: list[_State] = []
        for parent in parents:
            facts = tuple(parent.facts[type_] for type_ in parent.types)
            kind = self.kinds.get((parent.model, facts))
            if kind is None:
                kind = self.kinds[parent.model, facts] = _Kind(parent.model, facts)
            self.start.append(kind.state(parent.counts()))
        self.items = list(self._items(requests, parents))
        self.signatures: dict[tuple[Demand, frozenset[int] | None], list[int]] = {}
        for number, item in enumerate(self.items):
            self.signatures.setdefault((item.demand, item.allowed), []).append(number)
        self.steps = 0
        self.cut = False  # whether a group had more ways than are compared

    def _items(
        self, requests: Sequence[Request], parents: Sequence[ParentCapacity]
    ) -> Iterator[_Item]:
        by_name: dict[str, set[int]] = {}
        for index, parent in enumerate(parents):
            by_name.setdefault(parent.name, set()).add(index)
        groups: dict[str, list[tuple[int, Request]]] = {}
        for number, request in enumerate(requests):
            if request.group is not None:
                groups.setdefault(request.group, []).append((number, request))
        for number, request in enumerate(requests):
            allowed = None
            if request.parent is not None:
                allowed = frozenset(by_name.get(request.parent, ()))
            if request.group is None:
                item = _Item(((self._selector(request), 1),), (number,), allowed)
                yield from (item,) * request.count
            elif request.group in groups:
                yield self._group(groups.pop(request.group), by_name)

    def _group(self, members: list[tuple[int, Request]], by_name: Mapping[str, set[int]]) -> _Item:
        allowed: frozenset[int] | None = None
        units: dict[int, list[int]] = {}
        for number, request in members:
            units.setdefault(self._selector(request), []).extend([number] * request.count)
            if request.parent is not None:
                there = frozenset(by_name.get(request.parent, ()))
                allowed = there if allowed is None else allowed & there
        order = sorted(units)
        return _Item(
            tuple((selector, len(units[selector])) for selector in order),
            tuple(number for selector in order for number in units[selector]),
            allowed,
        )

    def _selector(self, request: Request) -> int:
        selector = (request.type_id, request.conditions)
        if selector not in self.numbers:
            self.numbers[selector] = len(self.selectors)
            self.selectors.append(selector)
        return self.numbers[selector]

    # ---- one item on one parent ----

    def options(self, state: _State, demand: Demand) -> list[Option]:
        """All states that an item can lead to on a parent."""
        found = state.options.get(demand)
        if found is None:
            reached: dict[_State, Counts] = {state: ()}
            for selector, count in demand:
                types = state.kind.types(selector, self.selectors[selector])
                for _ in range(count):
                    further: dict[_State, Counts] = {}
                    for at, taken in reached.items():
                        for type_ in types:
                            then = at.after[type_]
                            if then is not None:
                                further.setdefault(then, (*taken, type_))
                        if len(further) > _OPTIONS:
                            self.cut = True
                            break
                    reached = further
            found = state.options[demand] = list(reached.items())
        return found

    def best(self, state: _State, demand: Demand) -> Option | None:
        """The option that leaves most of the parent."""
        if demand not in state.best:
            state.best[demand] = max(
                self.options(state, demand), key=lambda option: option[0].value, default=None
            )
        return state.best[demand]

    def room(self, state: _State, demand: Demand) -> int:
        """An upper bound of how often an item fits on a parent."""
        bound = 1 << 32
        for selector, count in demand:
            types = state.kind.types(selector, self.selectors[selector])
            bound = min(bound, sum(state.left[type_] for type_ in types) // count)
        return bound

    def places(self, item: _Item) -> Iterable[int]:
        """The parents that may be considered for an item."""
        return range(len(self.start)) if item.allowed is None else sorted(item.allowed)

    # ---- all of them ----

    def solve(self, policy: Policy, effort: int) -> tuple[list[Found], bool]:
        """Place everything or as much as can be; and whether that is exact."""
        orders = self.orders()
        attempts: list[list[Found]] = []
        for order in orders:
            attempts.append(self._greedy(order, policy))
            if None not in attempts[-1]:
                return attempts[-1], True
        if policy != "pack":
            for order in orders:
                attempts.append(self._greedy(order, "pack"))
                if None not in attempts[-1]:
                    return attempts[-1], True
        attempts.append(self._greedy(list(self.signatures.values()), policy))
        self.steps = effort
        proven = True
        found: list[Found] = [None] * len(self.items)
        for part in self._parts():
            tries = [[attempt[number] for number in part] for attempt in attempts]
            exact, answer = self._search_part(part, tries)
            proven = proven and exact
            for number, where in zip(part, answer, strict=True):
                found[number] = where
        return found, None not in found or (proven and not self.cut)

    def _search_part(self, part: list[int], tries: list[list[Found]]) -> tuple[bool, list[Found]]:
        for attempt in tries:
            if None not in attempt:
                return True, attempt
        most = max(
            tries,
            key=lambda attempt: sum(
                len(self.items[number].requests)
                for number, where in zip(part, attempt, strict=True)
                if where is not None
            ),
        )
        if any(not self._possible(number) for number in part) or not self._bounded(part):
            return True, most
        if len(part) > _SEARCHED:
            return False, most
        search = _Search(self, part)
        if search.run(0):
            return True, search.found
        return search.complete, most

    def _possible(self, number: int) -> bool:
        item = self.items[number]
        return any(self.options(self.start[index], item.demand) for index in self.places(item))

    def _bounded(self, part: list[int]) -> bool:
        """Whether all items of a kind together could fit if there were nothing else."""
        for (demand, _), members in self._signatures_of(part):
            item = self.items[members[0]]
            room = sum(self.room(self.start[index], demand) for index in self.places(item))
            if room < len(members):
                return False
        return self._volume_fits(part)

    def _volume_fits(self, part: list[int]) -> bool:
        """Whether the least shares that all items take are no more than what is free."""
        needed = 0
        open_: set[int] = set()
        for (demand, _), members in self._signatures_of(part):
            there = [
                index
                for index in self.places(self.items[members[0]])
                if self.options(self.start[index], demand)
            ]
            open_.update(there)
            kinds = {self.start[index].kind for index in there}
            needed += len(members) * sum(
                count
                * min(
                    kind.volume[type_]
                    for kind in kinds
                    for type_ in kind.types(selector, self.selectors[selector])
                )
                for selector, count in demand
            )
        free = sum(
            _SCALE - sum(map(int.__mul__, state.used, state.kind.volume))
            for state in (self.start[index] for index in open_)
        )
        return needed <= free

    def _signatures_of(
        self, part: Iterable[int]
    ) -> list[tuple[tuple[Demand, frozenset[int] | None], list[int]]]:
        wanted = set(part)
        chosen = ((key, [n for n in m if n in wanted]) for key, m in self.signatures.items())
        return [(key, members) for key, members in chosen if members]

    def orders(self) -> list[list[list[int]]]:
        """The items that are alike together, most demanding first: two notions of demanding."""
        measures = []
        for (demand, allowed), members in self.signatures.items():
            item = self.items[members[0]]
            states = {self.start[index] for index in self.places(item)}
            flexible = len(states) if allowed is None else len(allowed)
            size = min((self._size(kind, demand) for kind in {s.kind for s in states}), default=0)
            choices = sum(
                len(s.kind.types(n, self.selectors[n])) for s in states for n, _ in demand
            )
            measures.append((size, choices, flexible, members[0], members))
        large = sorted(measures, key=lambda m: (-m[0], m[1], m[2], m[3]))
        rigid = sorted(measures, key=lambda m: (m[1], m[2], -m[0], m[3]))
        return [[m[-1] for m in large], [m[-1] for m in rigid]]

    def _size(self, kind: _Kind, demand: Demand) -> int:
        """The share of an empty parent that an item takes at least."""
        return sum(
            count * min((kind.share[t] for t in kind.types(n, self.selectors[n])), default=_SCALE)
            for n, count in demand
        )

    def _greedy(self, order: list[list[int]], policy: Policy) -> list[Found]:
        """Place items one by one where each costs least."""
        states = list(self.start)
        found: list[Found] = [None] * len(self.items)
        for members in order:
            item = self.items[members[0]]
            demand = item.demand
            heap = [
                (score, index)
                for index in self.places(item)
                if (score := self._score(states[index], demand, policy)) is not None
            ]
            heapq.heapify(heap)
            for number in members:
                if not heap:
                    break
                _, index = heap[0]
                state = states[index]
                option = self.best(state, demand)
                if option is None:
                    break
                found[number] = (index, state, option[1])
                states[index] = option[0]
                score = self._score(option[0], demand, policy)
                if score is None:
                    heapq.heappop(heap)
                else:
                    heapq.heapreplace(heap, (score, index))
        return found

    def _score(self, state: _State, demand: Demand, policy: Policy) -> tuple[int, int] | None:
        option = state.best[demand] if demand in state.best else self.best(state, demand)
        if option is None:
            return None
        then = option[0].value
        if policy == "pack":
            return state.value - then, then
        return state.devices, state.value - then

    def _parts(self) -> list[list[int]]:
        """The items, apart where they share no parent: numbers in the order of the requests."""
        roots = list(range(len(self.start)))

        def root(index: int) -> int:
            while roots[index] != index:
                roots[index] = roots[roots[index]]
                index = roots[index]
            return index

        first: dict[int, int] = {}
        alone: list[list[int]] = []
        for (demand, _), members in self.signatures.items():
            item = self.items[members[0]]
            there = [i for i in self.places(item) if self.options(self.start[i], demand)]
            if not there:
                alone += [[number] for number in members]
                continue
            for index in there:
                roots[root(index)] = root(there[0])
            for number in members:
                first[number] = there[0]
        parts: dict[int, list[int]] = {}
        for number in sorted(first):
            parts.setdefault(root(first[number]), []).append(number)
        return [*parts.values(), *alone]


class _Search:
    """Searches for a way to place all items of a part, until found, excluded, or too much work."""

    def __init__(self, job: _Job, part: list[int]) -> None:
        self.job = job
        self.part = part
        self.complete = True
        self.states = list(job.start)
        place = {number: index for index, number in enumerate(part)}
        self.found: list[Found] = [None] * len(part)
        self.items = [n for members in job.orders()[0] for n in members if n in place]
        self.place = place
        self.failed: set[tuple[int, tuple[tuple[int, int, int], ...]]] = set()
        # parents are alike when every item that is bound to parents treats them alike
        bound = [job.items[n].allowed for n in part if job.items[n].allowed is not None]
        kinds = {kind: number for number, kind in enumerate(job.kinds.values())}
        classes: dict[tuple[bool, ...], int] = {}
        self.indices = sorted({i for n in part for i in job.places(job.items[n])})
        self.alike = {}
        for index in self.indices:
            key = tuple(index in allowed for allowed in bound if allowed is not None)
            self.alike[index] = (
                classes.setdefault(key, len(classes)),
                kinds[job.start[index].kind],
            )
        self.later = self._later()

    def _later(self) -> list[list[tuple[Demand, list[int], int]]]:
        """For each depth what is still to be placed: demand, parents, how many."""
        counts: Counter[tuple[Demand, frozenset[int] | None]] = Counter()
        later: list[list[tuple[Demand, list[int], int]]] = []
        for number in reversed(self.items):
            item = self.job.items[number]
            counts[item.demand, item.allowed] += 1
            later.append(
                [
                    (demand, [i for i in self.indices if allowed is None or i in allowed], n)
                    for (demand, allowed), n in counts.items()
                ]
            )
        return later[::-1]

    def run(self, depth: int) -> bool:
        """Place the items from ``depth`` on; whether that was possible."""
        if depth == len(self.items):
            return True
        job = self.job
        self.complete = self.complete and job.steps > 0
        # the work of one step grows with the parents and with what is still to be placed
        job.steps -= 1 + len(self.indices) * len(self.later[depth]) // 8
        here = (depth, self._fingerprint())
        if not self.complete or here in self.failed:
            return False
        moves = [] if self._hopeless(depth) else self._moves(job.items[self.items[depth]])
        number = self.items[depth]
        for index, state, then, types in moves:
            self.states[index] = then
            self.found[self.place[number]] = (index, state, types)
            if self.run(depth + 1):
                return True
            self.states[index] = state
            self.found[self.place[number]] = None
        self.failed.add(here)
        return False

    def _moves(self, item: _Item) -> list[tuple[int, _State, _State, Counts]]:
        seen: set[tuple[tuple[int, int], int]] = set()
        moves = []
        for index in self.job.places(item):
            state = self.states[index]
            if (self.alike[index], state.number) in seen:
                continue
            seen.add((self.alike[index], state.number))
            for then, types in self.job.options(state, item.demand):
                moves.append((state.value - then.value, then.value, index, state, then, types))
        moves.sort(key=lambda move: move[:3])
        return [move[2:] for move in moves]

    def _fingerprint(self) -> tuple[tuple[int, int, int], ...]:
        return tuple(sorted((*self.alike[i], self.states[i].number) for i in self.indices))

    def _hopeless(self, depth: int) -> bool:
        for demand, indices, needed in self.later[depth]:
            room = 0
            for index in indices:
                room += self.job.room(self.states[index], demand)
                if room >= needed:
                    break
            else:
                return True
        return False


# ---- reasons --------------------------------------------------------------------------------


class _Explain:
    """Finds the reason for what does not fit."""

    def __init__(
        self,
        job: _Job,
        requests: Sequence[Request],
        parents: Sequence[ParentCapacity],
        states: Sequence[_State],
        *,
        proven: bool,
    ) -> None:
        self.job = job
        self.requests = requests
        self.parents = parents
        self.states = states
        self.proven = proven
        self.offers: dict[object, list[tuple[int, Counts]]] = {}
        self.hints: dict[object, str] = {}

    def shortfall(self, number: int, placed: int) -> Shortfall:
        """Why a request does not fit, the most telling reason first."""
        request = self.requests[number]
        for reason in (self._unknown, self._alone, self._together):
            said = reason(request, number)
            if said is not None:
                return Shortfall(request.key, request.count, placed, *said)
        return Shortfall(request.key, request.count, placed, *self._beside(request, number, placed))

    def _offers(self, request: Request) -> list[tuple[int, Counts]]:
        """Parents that offer what is asked for, free or not, and the types."""
        selector = (request.type_id, request.conditions)
        found = self.offers.get((selector, request.parent))
        if found is not None:
            return found
        found = self.offers[selector, request.parent] = [
            (index, types)
            for index, state in enumerate(self.job.start)
            if request.parent in {None, self.parents[index].name}
            and (types := state.kind.types(self.job.numbers[selector], selector))
        ]
        return found

    def _unknown(self, request: Request, _: int) -> tuple[str, str] | None:
        if self._offers(request):
            return None
        names = [parent.name for parent in self.parents]
        if not names:
            return "there is no parent", "mdo doctor says what is missing"
        if request.parent is not None and request.parent not in names:
            close = get_close_matches(request.parent, names, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are {_few(names)}"
            return f"there is no parent {request.parent}", hint
        where = "no parent" if request.parent is None else f"parent {request.parent} does not"
        here = [p for p in self.parents if request.parent in {None, p.name}]
        types = list(dict.fromkeys(type_ for p in here for type_ in p.types))
        if request.type_id is not None and request.type_id not in types:
            verb = "offers" if request.parent is None else "offer"
            close = get_close_matches(request.type_id, types, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are {_few(types)}"
            elsewhere = [p.name for p in self.parents if request.type_id in p.types]
            if elsewhere:
                hint = f"it is offered by {_few(elsewhere)}"
            return f"{where} {verb} {request.type_id}", hint
        return self._unmet(request, here)

    def _unmet(self, request: Request, here: Sequence[ParentCapacity]) -> tuple[str, str]:
        facts = [
            (type_, parent.name, parent.facts[type_])
            for parent in here
            for type_ in parent.types
            if request.type_id in {None, type_}
        ]
        for name, condition in request.conditions:
            have = [
                (value, type_, parent)
                for type_, parent, fact in facts
                if (value := getattr(fact, name)) is not None
            ]
            if not have:
                return f"no type says its {name}", "ask by type; mdo host lists them"
            if not any(condition.holds(value) for value, _, _ in have):
                least = min(have, key=lambda h: h[0])
                most = max(have, key=lambda h: h[0])
                span = f"{shown(name, least[0])} to {shown(name, most[0])}"
                return (
                    f"no type has {name} {condition}",
                    f"there is {span} ({most[1]} on {most[2]})",
                )
        words = " and ".join(f"{name} {condition}" for name, condition in request.conditions)
        return f"no type has {words} at once", "loosen one of them"

    def _alone(self, request: Request, _: int) -> tuple[str, str] | None:
        """It would not fit if it were the only one."""
        offers = self._offers(request)
        demand = ((self.job.numbers[request.type_id, request.conditions], 1),)
        free = {
            index: self._most(self.job.start[index], demand, request.count) for index, _ in offers
        }
        names = _few([self.parents[index].name for index, _ in offers])
        if not any(free.values()):
            return f"none is free on {names}", self._would_fit(self.job.start, request)
        if request.group is None:
            total = sum(free.values())
            if total < request.count:
                return f"only {total} can be created on {names}", f"ask for {total}"
            return None
        best = max(free, key=lambda index: free[index])
        if free[best] < request.count:
            most = f"at most {free[best]} can be created on one ({self.parents[best].name})"
            return f"a group is on one parent, and {most}", "ask for fewer, or without the group"
        return None

    def _most(self, state: _State, demand: Demand, enough: int) -> int:
        """How many devices fit on a parent, one after the other; at most what is enough."""
        count = 0
        while count < enough and (option := self.job.best(state, demand)) is not None:
            state, count = option[0], count + 1
        return count

    def _together(self, request: Request, number: int) -> tuple[str, str] | None:
        """Its group would not fit if it were the only one."""
        if request.group is None:
            return None
        item = next(item for item in self.job.items if number in item.requests)
        if any(
            self.job.options(self.job.start[index], item.demand) for index in self.job.places(item)
        ):
            return None
        count = len(item.requests)
        return (
            f"no parent can take all {count} devices of group {request.group}",
            "ask for fewer, or for types of one parent that go together",
        )

    def _beside(self, request: Request, _: int, placed: int) -> tuple[str, str]:
        hint = self._would_fit(self.states, request)
        if not self.proven:
            return "no placement was found, and the search was given up", hint
        if request.group is not None:
            return f"group {request.group} does not fit beside the other requests", hint
        return f"only {placed} fit beside the other requests", hint

    def _would_fit(self, states: Sequence[_State], request: Request) -> str:
        """What could still be created where it was to go; elsewhere when that is nothing."""
        asked = (states is self.states, request.type_id, request.conditions, request.parent)
        if asked not in self.hints:
            self.hints[asked] = self._free(states, [index for index, _ in self._offers(request)])
        return self.hints[asked]

    def _free(self, states: Sequence[_State], offers: Sequence[int]) -> str:
        for indices in (offers, range(len(states))):
            free: dict[str, tuple[int, str]] = {}
            for index in indices:
                for type_, n in zip(self.parents[index].types, states[index].left, strict=True):
                    if n > free.get(type_, (0, ""))[0]:
                        free[type_] = (n, self.parents[index].name)
            if free:
                words = [f"{n} x {type_} on {where}" for type_, (n, where) in free.items()]
                return f"what would fit: {_few(words, ' or ')}"
        return "nothing can be created any more: remove devices"


def _few(words: Sequence[str], between: str = ", ") -> str:
    limit = 4
    more = f" and {len(words) - limit} more" if len(words) > limit else ""
    return between.join(words[:limit]) + more
