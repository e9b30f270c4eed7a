# SPDX-License-Identifier: GPL-2.0-or-later
"""Everything that can happen to a host, as hypothesis would have it: in any order.

An *episode* is one sequence of moves, from a machine with nothing of ours on it and back to that.
After every move all invariants are checked, and what the move itself promises: done means that
exactly that has changed; an error, that nothing has. When an episode fails, hypothesis looks for
the shortest one that does.

A *heavy* move takes seconds in an emulated machine; between two of them there are light ones.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from campaign import specs, world
from campaign.command import Ended, kill_at, mdo
from campaign.world import Foreign, Look
from lab import vfio
from lab.kernel_log import KernelLog
from mdev_orchestrator.system.processes import has_ended
from soak.invariants import COUNT, State
from soak.samples import Samples
from soak.worker import DONE, Outcome, Worker

LIGHT = 20
"""Light moves between two heavy ones."""
PATIENCE = 60.0
"""Seconds until what was asked shows everywhere: the kernel gives some things back later, and the
children of the writer end when they were idle for :data:`~.writer.IDLE_SECONDS`."""
SPECS: dict[str, tuple[Callable[[Path], str], ...]] = {
    "": (specs.three, specs.known, specs.plain),
    "three.json": (specs.three,),
    "known.json": (specs.known,),
    "plain.json": (specs.plain, specs.before, specs.before),
    "before.json": (specs.before, specs.changed, specs.changed),
    "changed.json": (specs.changed,),
}
"""What can be applied, by what is: without waiting for guests to power down, which these do not."""
TYPES = ("mvgpu-128M", "mvgpu-12", "mvgpu-256M", "mvgpu-512M")
SAMPLES = os.environ.get("MDO_LAB_SAMPLES")


@dataclass
class Arena:
    """What all episodes share.

    :ivar fill: Fills the disk of the state directory; :meth:`make_room` empties it.
    :ivar empty: The machine with nothing of ours on it.
    :ivar watch: The process of ``mdo watch``, which writes to ``seen``.
    """

    place: Path
    others: Foreign
    fill: Callable[[], None]
    worker: Worker
    watch: subprocess.Popen[bytes]
    seen: Path
    samples: Samples
    log: KernelLog
    end: float
    empty: Look
    moves: Counter[str] = field(default_factory=Counter)
    seconds: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    checked: int = 0
    looking: float = 0.0
    episodes: int = 0
    failed: bool = False

    @property
    def over(self) -> bool:
        """Whether the time is over; a failure is still looked into."""
        return time.monotonic() > self.end and not self.failed

    def make_room(self) -> None:
        (self.place / "small" / "filler").unlink(missing_ok=True)

    def settle(self) -> list[str]:
        """Nothing of ours is there: soon nothing is under way either, and a sample is taken."""
        self.worker.call("reclaim")
        end = time.monotonic() + PATIENCE
        while self._left() and time.monotonic() < end:
            time.sleep(0.1)
        self.samples.take_idle(self.worker.call("objects").value)
        left = self._left()
        return [f"the service has children left: {left}"] if left else []

    def _left(self) -> list[int]:
        """The children of the service. Those that write to sysfs end when they were idle."""
        return world.children(self.worker.pid)


ARENA: list[Arena] = []
"""Hypothesis makes machines without arguments: it is put here before the first."""


def when(possible: Callable[[Any], object]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A rule that makes or removes a device or two where it cannot be.

    Hypothesis' own ``precondition`` would make what is drawn depend on how the machine is, which no
    seed decides: a process that is killed by the clock was here one time and there another.
    """

    def decorate(move: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(move)
        def moving(self: Soak, **drawn: Any) -> None:  # noqa: ANN401 - whatever it draws
            if self.arena.over:
                raise OverError
            if not self.wrong:
                with contextlib.suppress(BrokenError):
                    if possible(self):
                        move(self, **drawn)
                    else:
                        self.otherwise()

        return moving

    return decorate


class OverError(BaseException):
    """The time is over: hypothesis lets it pass, or says that what it draws has changed."""


class BrokenError(Exception):
    """Something is not as it should be: no further move in this episode."""


def tell(line: str) -> None:
    """An hour is long: show what happens meanwhile."""
    print(line, flush=True)  # noqa: T201


def always(_: Soak) -> bool:
    return True


class Soak(RuleBasedStateMachine):
    """One episode."""

    def __init__(self) -> None:
        super().__init__()
        self.arena = ARENA[0]
        self.arena.episodes += 1
        self.number = 0
        self.light = 0
        self.killed: set[str] = set()
        self.wrong: list[str] = []
        self.state = State.now(self.arena.others)
        assert world.differences(self.arena.empty, self.state.look) == []

    # ---- moving ---------------------------------------------------------------------------------

    def call(self, name: str, *arguments: object) -> Outcome:
        return self.arena.worker.call(name, *arguments)

    def moved(
        self,
        kind: str,
        began: float,
        outcome: Outcome,
        *,
        errors: Collection[str] = (),
        come: Collection[str] = (),
        gone: Collection[str] = (),
        up: Collection[str] = (),
        down: Collection[str] = (),
        spec: bool = False,
        half: bool = False,
    ) -> None:
        """Check what a move has done.

        :param errors: Kinds of errors that it may end with, having done nothing.
        :param come: Bare devices that are there when it is done.
        :param gone: Those that are not.
        :param up: Guests that run when it is done, beside those of a spec.
        :param down: Those that do not.
        :param spec: What belongs to the spec may have become anything.
        :param half: It was cut short: all of it has happened, or nothing.
        """
        arena, before = self.arena, self.state
        took = time.monotonic() - began
        arena.moves[kind] += 1
        arena.seconds[kind] += took
        arena.outcomes[f"{kind}: {outcome.kind}"] += 1
        tell(f"{arena.episodes}.{sum(arena.moves.values())} {kind} {took:.2f} s: {outcome}")
        wrong = [f"the event loop complains: {line}" for line in outcome.stray]
        if not outcome.done and not {outcome.kind, *outcome.kinds} & set(errors):
            wrong.append(f"it ended with {outcome}")
        wrong += [f"the kernel complains: {line}" for line in arena.log.complaints()]
        if arena.watch.poll() is not None:
            wrong.append(f"mdo watch has ended with {arena.watch.returncode}")
        if wrong:
            self.fail(kind, wrong)

        def unlike(now: State) -> list[str]:
            done = [_unlike(before, now, come, gone, up, down, spec=spec)]
            nothing = [_same(before, now, spec=spec)]
            options = done + nothing if half else done if outcome.done else nothing
            return min(options, key=len)

        looked = time.monotonic()
        end = looked + PATIENCE
        while True:
            now = State.now(arena.others)
            wrong = now.broken(self.killed, arena.empty) + unlike(now)
            if not wrong or time.monotonic() > end:
                break
            time.sleep(0.05)
        arena.checked += COUNT
        arena.looking += time.monotonic() - looked
        if wrong:
            self.fail(kind, [str(outcome), *wrong])
        self.state = now
        self.killed &= now.gone | now.of_spec
        self.light += 1
        arena.samples.take()

    def fail(self, kind: str, wrong: list[str]) -> None:
        """What is wrong is raised at the end, so that what is drawn does not depend on it."""
        self.arena.failed = True
        self.wrong = [f"after {kind}: {line}" for line in wrong]
        for line in self.wrong:
            tell(f"BROKEN {line}")
        raise BrokenError

    def heavy(self) -> None:
        self.light = 0

    def fresh(self, count: int) -> list[str]:
        """UUIDs that this episode has not used."""
        first = self.number
        self.number += count
        return [f"50a50a50-0000-4000-8000-{n:012}" for n in range(first, self.number)]

    def recover(self, kind: str, began: float, **expected: Any) -> None:  # noqa: ANN401
        """``recover`` after something was cut short; then all or nothing."""
        outcome = self.call("recover")
        if outcome.done and outcome.value:
            outcome = Outcome("not recovered", " / ".join(outcome.value))
        self.moved(kind, began, outcome, half=True, **expected)

    # ---- devices --------------------------------------------------------------------------------

    @rule(type_=st.sampled_from(TYPES), count=st.sampled_from((1, 1, 1, 2, 3)))
    @when(always)
    def create(self, type_: str, count: int) -> None:
        if count == 1 and not self.state.left(type_):
            self.otherwise()
            return
        self._create("create", type_, count, None)

    @rule(count=st.integers(4, 12))
    @when(always)
    def create_many(self, count: int) -> None:
        if not self.state.left("mvgpu-12"):
            self.otherwise()
            return
        self._create("create many", "mvgpu-12", count, None)

    @rule(type_=st.sampled_from(TYPES[:2]), count=st.integers(1, 4), group=st.integers(1, 2))
    @when(always)
    def create_in_a_group(self, type_: str, count: int, group: int) -> None:
        self._create("create in a group", type_, count, f"group-{group}")

    def otherwise(self) -> None:
        """The lightest move that there is."""
        if len(self.state.idle) > 2:
            uuids = self.state.idle[:2]
            began = time.monotonic()
            self.moved("remove", began, self.call("remove_idle", uuids), gone=uuids)
        elif self.state.left("mvgpu-12"):
            self._create("create", "mvgpu-12", 1, None)
        elif self.state.left("mvgpu-128M"):
            self._create("create", "mvgpu-128M", 1, None)

    def _create(self, kind: str, type_: str, count: int, group: str | None) -> None:
        uuids = self.fresh(count)
        began = time.monotonic()
        outcome = self.call("create", type_, uuids, group)
        # a group on another parent; a group that is online takes no more members
        errors = ("CapacityError", *(("RequestError", "BusyError", "MdoError") if group else ()))
        self.moved(kind, began, outcome, errors=errors, come=uuids)

    @rule(which=st.lists(st.integers(0, 30), min_size=1, max_size=4))
    @when(lambda self: self.state.bare)
    def remove(self, which: list[int]) -> None:
        uuids = list(dict.fromkeys(_pick(self.state.bare, number) for number in which))
        began = time.monotonic()
        outcome = self.call("remove_idle", uuids)
        held = not set(uuids) <= set(self.state.idle)
        errors = ("BusyError",) if held else ()
        self.moved("remove", began, outcome, errors=errors, gone=uuids)

    @rule()
    @when(lambda self: len(self.state.idle) > 3)
    def remove_all_idle(self) -> None:
        uuids = self.state.idle
        began = time.monotonic()
        self.moved("remove many", began, self.call("remove_idle", uuids), gone=uuids)

    @rule(what=st.integers(0, 3))
    @when(always)
    def impossible(self, what: int) -> None:
        """What is refused, without anything having happened."""
        began = time.monotonic()
        opened = self.arena.others.uuids[0]
        name, arguments, error = (
            ("remove_idle", ([opened],), "BusyError"),
            ("create", ("mvgpu-128M", [opened]), "UuidError"),
            ("create", ("mvgpu-13", self.fresh(1)), "CapacityError"),
            ("stop", ("no-such-guest",), "UnknownError"),
        )[what]
        outcome = self.call(name, *arguments)
        if outcome.done:
            outcome = Outcome("accepted", f"{name} {arguments}")
        self.moved("refused", began, outcome, errors=(error,))

    # ---- guests ---------------------------------------------------------------------------------

    @rule(which=st.lists(st.integers(0, 30), max_size=2))
    @when(lambda self: len(self.state.running - self.state.of_spec) < 2)
    def start(self, which: list[int]) -> None:
        name, uuids = self._guest(which)
        began = time.monotonic()
        outcome = self.call("start", name, uuids)
        errors = ("CapacityError", "BusyError") if uuids else ()
        self.moved("guest start", began, outcome, errors=errors, up=[name])

    def _guest(self, which: list[int]) -> tuple[str, list[str]]:
        """A name that is free, and idle devices with the whole of their groups."""
        name = next(n for n in ("solo-1", "solo-2", "solo-3") if n not in self.state.running)
        uuids: list[str] = []
        for number in which:
            if self.state.idle:
                uuids += self.state.with_group(_pick(self.state.idle, number))
        return name, list(dict.fromkeys(uuids))

    @rule(number=st.integers(0, 5))
    @when(lambda self: (self.state.running | self.state.gone) - self.state.of_spec)
    def stop(self, number: int) -> None:
        state = self.state
        name = _pick(sorted((state.running | state.gone) - state.of_spec), number)
        began = time.monotonic()
        outcome = self.call("stop", name)
        self.moved("guest stop", began, outcome, down=[name])

    @rule(number=st.integers(0, 5))
    @when(lambda self: self.state.running)
    def kill_qemu(self, number: int) -> None:
        name = _pick(sorted(self.state.running), number)
        record = next(guest.record for guest in self.state.guests if guest.name == name)
        assert record is not None
        began = time.monotonic()
        os.kill(record.pid, signal.SIGKILL)
        while not has_ended(record.pid):
            time.sleep(0.01)
        self.killed.add(name)
        self.moved("kill QEMU", began, Outcome(DONE), down=[name], spec=name in self.state.of_spec)

    @rule()
    @when(always)
    def reclaim(self) -> None:
        began = time.monotonic()
        self.moved("reclaim groups", began, self.call("reclaim"))

    # ---- hotplug --------------------------------------------------------------------------------

    @rule(guest=st.integers(0, 5), device=st.integers(0, 30))
    @when(lambda self: self.state.running and self.state.idle)
    def attach(self, guest: int, device: int) -> None:
        name, uuid = _pick(sorted(self.state.running), guest), _pick(self.state.idle, device)
        began = time.monotonic()
        outcome = self.call("attach", name, uuid)
        # no port is free; its group has another user, or is not complete; too few links
        errors = ("RequestError", "BusyError", "CapacityError", "CommandError", "MdoError")
        self.moved("attach", began, outcome, errors=errors)

    @rule(guest=st.integers(0, 5), type_=st.sampled_from(("mvgpu-128M", "mvgpu-12")))
    @when(lambda self: self.state.running)
    def attach_new(self, guest: int, type_: str) -> None:
        name = _pick(sorted(self.state.running), guest)
        began = time.monotonic()
        outcome = self.call("attach", name, type_)
        come = [outcome.value] if outcome.done else []
        errors = ("RequestError", "CapacityError", "CommandError")
        self.moved("attach new", began, outcome, errors=errors, come=come)

    @rule(number=st.integers(0, 30), remove=st.booleans())
    @when(lambda self: self.plugged())
    def detach(self, number: int, remove: bool) -> None:
        name, uuid = _pick(self.plugged(), number)
        began = time.monotonic()
        outcome = self.call("detach", name, uuid, remove)
        self.moved("detach", began, outcome, gone=[uuid] if remove else [])

    @rule(number=st.integers(0, 30))
    @when(lambda self: self.plugged())
    def remove_held(self, number: int) -> None:
        _, uuid = _pick(self.plugged(), number)
        began = time.monotonic()
        self.moved("remove held", began, self.call("remove", [uuid]), gone=[uuid])

    def plugged(self) -> list[tuple[str, str]]:
        """Guests with bare devices that were plugged into them."""
        bare = set(self.state.bare)
        return [
            (guest.name, uuid)
            for guest in self.state.guests
            for uuid in self.state.held_by(guest.name)
            if uuid in bare and guest.record and UUID(uuid) not in guest.record.mdevs
        ]

    # ---- specs ----------------------------------------------------------------------------------

    @rule(number=st.integers(0, 5))
    @when(lambda self: self.light > LIGHT)
    def apply(self, number: int) -> None:
        self.heavy()
        path = self._spec(number)
        began = time.monotonic()
        outcome = self.call("apply", path)
        # it does not fit beside what is there; a guest must be restarted
        errors = ("RequestError", "CapacityError")
        self.moved("apply", began, outcome, errors=errors, spec=outcome.done)
        if outcome.done:
            began = time.monotonic()
            again = self.call("apply", path)
            if again.done and not again.value:
                again = Outcome("not idempotent", path)
            self.moved("apply again", began, again)

    def _spec(self, number: int) -> str:
        """The file of a spec that can be applied now."""
        known = self.state.observed.managed.specs.values()
        now = next((Path(spec.source).name for spec in known), "")
        hot = next((guest for guest in self.state.guests if guest.name == "hot"), None)
        if hot is not None and not (hot.alive and hot.record and len(hot.record.mdevs) == 1):
            # what is on its command line it would have to let go of, and it never answers
            return SPECS[now][0](self.arena.place) if now else specs.three(self.arena.place)
        return str(_pick(SPECS[now], number)(self.arena.place))

    @rule(which=st.sampled_from((specs.three, specs.known, specs.plain, specs.changed)))
    @when(always)
    def diff(self, which: Callable[[Path], str]) -> None:
        began = time.monotonic()
        outcome = self.call("diff", which(self.arena.place))
        self.moved("diff", began, outcome, errors=("RequestError", "CapacityError"))

    @rule()
    @when(lambda self: self.light > LIGHT and self.state.spec)
    def destroy(self) -> None:
        self.heavy()
        began = time.monotonic()
        self.moved("destroy", began, self.call("destroy", "one"), spec=True)

    # ---- the orchestrator is killed, the disk is full ------------------------------------------

    @rule(
        which=st.integers(0, 6),
        number=st.integers(0, 30),
        moment=st.one_of(st.integers(1, 40), st.floats(0.0, 3.0)),
    )
    @when(lambda self: self.light > LIGHT)
    def kill_mdo(self, which: int, number: int, moment: float) -> None:
        """At a point of its work, or by the clock."""
        self.heavy()
        kind, command, expected = self._command(which, number)
        began = time.monotonic()
        if isinstance(moment, int):
            ended = mdo(*command, hook=kill_at(moment))
        else:
            ended = mdo(*command, after=moment)
        self._after(f"kill mdo {kind}", began, ended, expected)

    @rule(which=st.integers(0, 6), number=st.integers(0, 30), point=st.integers(1, 20))
    @when(lambda self: self.light > LIGHT)
    def fill_disk(self, which: int, number: int, point: int) -> None:
        """At a point of its work."""
        self.heavy()
        kind, command, expected = self._command(which, number)

        def hook(_what: str, seen: int) -> None:
            if seen == point:
                self.arena.fill()

        began = time.monotonic()
        try:
            ended = mdo(*command, hook=hook)
        finally:
            self.arena.make_room()
        self._after(f"full disk, {kind}", began, ended, expected)

    @rule(type_=st.sampled_from(TYPES))
    @when(always)
    def create_on_a_full_disk(self, type_: str) -> None:
        uuids = self.fresh(2)
        self.arena.fill()
        began = time.monotonic()
        try:
            outcome = self.call("create", type_, uuids)
        finally:
            self.arena.make_room()
        kind = "full disk, create"
        if "mdo recover" in outcome.words:  # that it was undone could not be written down either
            self.recover(kind, began)
        else:
            errors = ("HostError", "CapacityError")
            self.moved(kind, began, outcome, errors=errors, come=uuids)

    def _command(  # noqa: PLR0911 - one for each command
        self, which: int, number: int
    ) -> tuple[str, tuple[str, ...], dict[str, Any]]:
        """A command that changes things, and what may have changed after it."""
        state = self.state
        kinds = ["create", "apply", "start"]
        kinds += ["remove"] if state.idle else []
        kinds += ["destroy"] if state.spec else []
        kinds += ["attach"] if state.running else []
        kinds += ["detach"] if self.plugged() else []
        match kind := _pick(kinds, which):
            case "create":
                uuids = self.fresh(number % 4 + 1)
                given = [word for uuid in uuids for word in ("--uuid", uuid)]
                group = ("--group", "group-1") if number % 2 else ()
                return kind, ("create", "mvgpu-128M", *given, *group), {"come": uuids}
            case "apply":
                return kind, ("apply", self._spec(number)), {"spec": True}
            case "start":
                name, uuids = self._guest([number])
                words = [word for uuid in uuids for word in ("--mdev", uuid)]
                extra = [f"--arg={word}" for word in specs.EXTRA]
                command = ("guest", "start", name, "--memory", "16M", *words, *extra)
                return kind, command, {"up": [name]}
            case "remove":
                uuids = state.idle[: number % 4 + 1]
                return kind, ("remove", *uuids), {"gone": uuids}
            case "destroy":
                return kind, ("destroy", "one", "--force", "--deadline", "0"), {"spec": True}
            case "attach":
                name = _pick(sorted(state.running), number)
                return kind, ("attach", name, "mvgpu-128M"), {"come": ["?"]}
            case _:
                name, uuid = _pick(self.plugged(), number)
                remove = ("--remove",) if number % 2 else ()
                return kind, ("detach", name, uuid, *remove), {"gone": [uuid] if remove else []}

    def _after(self, kind: str, began: float, ended: Ended, expected: dict[str, Any]) -> None:
        if not ended.killed and ended.status not in range(6):
            self.fail(kind, [f"mdo ended with {ended}"])
        if "up" in expected:  # a start that is cut short may leave a directory; a stop removes it
            stopped = self.call("stop", expected.pop("up")[0])
            if not stopped.done and stopped.kind != "UnknownError":
                self.fail(kind, [f"what is left of a guest: {stopped}"])
        self.recover(kind, began, **expected)

    # ---- the driver -----------------------------------------------------------------------------

    @rule(type_=st.sampled_from(TYPES), number=st.sampled_from((5, 12, 28)))
    @when(always)
    def create_fails(self, type_: str, number: int) -> None:
        if self.state.left(type_) < 2:
            self.otherwise()
            return
        uuids = self.fresh(2)
        began = time.monotonic()
        with vfio.fault("create", f"errno={number} times=-1 uuid={uuids[-1]}"):
            outcome = self.call("create", type_, uuids)
        if outcome.done:
            outcome = Outcome("created in spite of a fault")
        self.moved("driver refuses", began, outcome, errors=("MdoError", "CapacityError"))

    @rule(number=st.integers(0, 30), point=st.sampled_from(("start", "open", "region")))
    @when(lambda self: self.state.idle)
    def start_fails(self, number: int, point: str) -> None:
        if len(self.state.running) > 3:
            self.otherwise()
            return
        name, uuids = self._guest([number])
        began = time.monotonic()
        with vfio.fault(point, f"errno=5 times=-1 uuid={self._failing(uuids[0], point)}"):
            outcome = self.call("start", name, uuids)
        if outcome.done:
            outcome = Outcome("started in spite of a fault")
        errors = ("MdoError", "QemuError", "CapacityError", "BusyError")
        self.moved(f"driver refuses {point}", began, outcome, errors=errors)

    def _failing(self, uuid: str, point: str) -> str:
        """What is to fail when a device is opened: it, or its group, whichever member starts it."""
        group = self.state.ours[uuid].group_uuid
        return str(group) if group is not None and point == "start" else uuid

    @rule(number=st.integers(0, 30), point=st.sampled_from(("start", "open", "region")))
    @when(lambda self: self.state.running and self.state.idle)
    def attach_fails(self, number: int, point: str) -> None:
        name, uuid = _pick(sorted(self.state.running), number), _pick(self.state.idle, number)
        began = time.monotonic()
        is_started = point == "start" and self.state.ours[uuid].online  # the guest has a member
        with vfio.fault(point, f"errno=5 times=-1 uuid={self._failing(uuid, point)}"):
            outcome = self.call("attach", name, uuid)
        if outcome.done and not is_started:
            outcome = Outcome("attached in spite of a fault")
        errors = ("MdoError", "RequestError", "BusyError", "CapacityError", "CommandError")
        self.moved(f"driver refuses {point}, hotplug", began, outcome, errors=errors)

    @rule()
    @when(always)
    def unload_in_use(self) -> None:
        """mvgpu is in use all the time: by the foreign QEMU."""
        self._unload_in_use("mvgpu")

    def _unload_in_use(self, module: str) -> None:
        began = time.monotonic()
        ended = subprocess.run(["rmmod", module], check=False, capture_output=True, text=True)
        outcome = Outcome(DONE if "in use" in ended.stderr else "unloaded", ended.stderr.strip())
        self.moved("unload refused", began, outcome)

    @rule(held=st.booleans())
    @when(lambda self: SAMPLES and self.light > LIGHT)
    def unload(self, held: bool) -> None:
        """The kernel's own mtty comes, has devices, and goes; unless one of them is open."""
        self.heavy()
        began, uuids = time.monotonic(), self.fresh(2)
        subprocess.run(["insmod", f"{SAMPLES}/mtty.ko"], check=True)
        try:
            self.moved("load", began, Outcome(DONE))
            began = time.monotonic()
            self.moved("create", began, self.call("create", "mtty-1", uuids, None), come=uuids)
            name, _ = self._guest([])
            if held:
                began = time.monotonic()
                self.moved("guest start", began, self.call("start", name, uuids[:1]), up=[name])
                self._unload_in_use("mtty")
                began = time.monotonic()
                self.moved("guest stop", began, self.call("stop", name), down=[name])
        finally:
            began = time.monotonic()
            subprocess.run(["rmmod", "mtty"], check=True)
        self.moved("unload", began, self.call("recover"), gone=uuids)

    # ---- events ---------------------------------------------------------------------------------

    @rule(count=st.integers(1, 60))
    @when(always)
    def flood(self, count: int) -> None:
        began = time.monotonic()
        self._flood(count)
        self.moved("flood", began, Outcome(DONE))

    @rule(count=st.integers(60, 200))
    @when(lambda self: self.light > LIGHT)
    def drop(self, count: int) -> None:
        """Neither of those that follow events looks, and there are more than they can hold."""
        self.heavy()
        began = time.monotonic()
        lost = self.call("losses").value
        self.arena.watch.send_signal(signal.SIGSTOP)
        self.arena.worker.tell("stall", 0.5)
        time.sleep(0.1)
        self._flood(count)
        self.arena.watch.send_signal(signal.SIGCONT)
        outcome = self.arena.worker.answer()
        end = time.monotonic() + PATIENCE
        while (now := self.call("losses")).done and now.value <= lost:
            if time.monotonic() > end:
                outcome = Outcome("not told", "events were lost, and the service does not know")
                break
            time.sleep(0.05)
        self.moved("drop events", began, outcome)

    def _flood(self, count: int) -> None:
        files = [vfio.PARENTS / name / "uevent" for name in ("grid0", "igd0")]
        files += [vfio.MDEVS / uuid / "uevent" for uuid in self.state.bare]
        for number in range(count):
            vfio.poke(files[number % len(files)], "change")

    # ---- the end --------------------------------------------------------------------------------

    def teardown(self) -> None:
        arena = self.arena
        if not self.wrong:
            with contextlib.suppress(BrokenError):
                self._leave()
        if self.wrong:
            arena.make_room()
            world.clear(arena.others)
        assert self.wrong == []

    def _leave(self) -> None:
        """Back to nothing, by what an operator would say."""
        if self.state.spec:
            began = time.monotonic()
            self.moved("destroy", began, self.call("destroy", "one"), spec=True)
        for name in sorted((self.state.running | self.state.gone) - self.state.of_spec):
            began = time.monotonic()
            self.moved("guest stop", began, self.call("stop", name), down=[name])
        if self.state.bare:
            uuids = self.state.bare
            began = time.monotonic()
            self.moved("remove many", began, self.call("remove_idle", uuids), gone=uuids)
        left = world.differences(self.arena.empty, self.state.look)
        if left:
            self.fail("episode", left)
        left = self.arena.settle()
        if left:
            self.fail("episode", left)


def _pick(things: Any, number: int) -> Any:  # noqa: ANN401 - one of them
    return things[number % len(things)]


def _unlike(
    before: State,
    now: State,
    come: Collection[str],
    gone: Collection[str],
    up: Collection[str],
    down: Collection[str],
    *,
    spec: bool,
) -> list[str]:
    """What is not as it should be when a move was done."""
    wrong = []
    wanted = (set(before.bare) | set(come)) - set(gone)
    if "?" in come:
        wanted = wanted - {"?"} | set(now.bare)
    if wanted != set(now.bare):
        wrong.append(
            f"devices: wanted and not there {sorted(wanted - set(now.bare))}, "
            f"there and not wanted {sorted(set(now.bare) - wanted)}"
        )
    guests, found = (before.running | set(up)) - set(down), now.running
    if spec:
        guests, found = guests - before.of_spec - now.of_spec, found - before.of_spec - now.of_spec
    if guests != found:
        wrong.append(f"guests: {sorted(guests)} wanted, {sorted(found)} found")
    if not spec:
        keys = ("our specs", "our guests")
        wrong += world.differences({key: before.look[key] for key in keys}, now.look)
    return wrong


_PASSING = frozenset(("files", "guests"))
"""What even a failure may tidy up: the start of a guest clears away an ended one of its name. The
guests that run are looked at apart."""


def _same(before: State, now: State, *, spec: bool) -> list[str]:
    """What has changed though nothing should have."""
    if spec:
        return _unlike(before, now, (), (), (), (), spec=True)
    keys = before.look.keys() - _PASSING
    wrong = world.differences({key: before.look[key] for key in sorted(keys)}, now.look)
    if before.running != now.running:
        wrong.append(f"guests: {sorted(before.running)} wanted, {sorted(now.running)} found")
    return wrong
