# SPDX-License-Identifier: GPL-2.0-or-later
"""From a spec to steps, on a machine that exists in thought only.

:class:`World` does what steps say and refuses what a real machine would refuse: a device too many,
one removed under its guest, a guest started before its devices are there. First single stories as
a user lives them, then random ones.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from mdev_orchestrator.engine.diff import Changes, diff, without
from mdev_orchestrator.engine.executor import PlannedStep
from mdev_orchestrator.engine.placement import MisfitError
from mdev_orchestrator.engine.records import Change, DeviceRecord, GuestRecord, Managed, SpecRecord
from mdev_orchestrator.engine.snapshot import ObservedGuest, ObservedState
from mdev_orchestrator.engine.step_order import StepOptions
from mdev_orchestrator.engine.steps import AnyStep, Attach, Create, Detach, Launch, Remove, Stop
from mdev_orchestrator.errors import RequestError
from mdev_orchestrator.interop.mdevctl import Definition
from mdev_orchestrator.model import Host, Mdev
from mdev_orchestrator.qemu import hotplug
from mdev_orchestrator.qemu.start import START_SECONDS
from mdev_orchestrator.qemu.stop import STOP_SECONDS
from mdev_orchestrator.spec import Document, parse, read_guest, to_json
from unit.capacity import drivers
from unit.capacity.drivers import Driver

U1 = UUID("83b8f4f2-509f-382f-3c1e-e6bfe0fa1001")
U2 = UUID("83b8f4f2-509f-382f-3c1e-e6bfe0fa1002")
BUS = Path("/sys/bus/mdev/devices")


@dataclass
class World:
    """Parents, devices, guests that run, and the journal.

    :ivar devices: Parent, type and start group of each device.
    """

    parents: list[Driver]
    devices: dict[UUID, tuple[str, str, UUID | None]] = field(default_factory=dict)
    running: dict[str, ObservedGuest] = field(default_factory=dict)
    device_records: dict[UUID, DeviceRecord] = field(default_factory=dict)
    guest_records: dict[str, GuestRecord] = field(default_factory=dict)
    spec_records: dict[str, SpecRecord] = field(default_factory=dict)
    defined: dict[UUID, list[Definition]] = field(default_factory=dict)
    numbers: int = 0

    def driver(self, name: str) -> Driver:
        return next(driver for driver in self.parents if driver.name == name)

    def observe(self) -> ObservedState:
        mdevs = tuple(
            Mdev(uuid, str(BUS / str(uuid)), parent, type_, "vfio-pci", group_uuid=group)
            for uuid, (parent, type_, group) in sorted(self.devices.items())
        )
        host = Host(tuple(driver.parent() for driver in self.parents), mdevs)
        managed = Managed(
            dict(self.device_records), dict(self.guest_records), dict(self.spec_records)
        )
        return ObservedState(host, managed, dict(self.running), self.defined)

    def new_uuid(self) -> UUID:
        self.numbers += 1
        # in no order, as real ones
        return UUID(int=0xAAAA << 112 | self.numbers * 0x9E3779B97F4A7C15 % (1 << 64))

    def diff(self, document: Document) -> Changes:
        return diff(document, self.observe(), new_uuid=self.new_uuid)

    def apply(self, document: Document, seed: int = 0) -> Changes:
        """Do all steps, in any order that their needs allow."""
        changes = self.diff(document)
        self.do(changes, seed)
        text = to_json(document.spec)
        self.spec_records[changes.name] = SpecRecord(
            name=changes.name, text=text, source="s", applied=0.0
        )
        return changes

    def do(self, changes: Changes, seed: int = 0) -> None:
        rng = random.Random(seed)  # noqa: S311 - no secret
        left, done = dict(enumerate(changes.steps)), set[int]()
        while left:
            ready = [number for number, one in left.items() if done.issuperset(one.needs)]
            assert ready, "steps that wait for each other"
            number = rng.choice(ready)
            self.step(left.pop(number).step)
            done.add(number)
        self.change(changes.change)

    def step(self, step: AnyStep) -> None:
        match step:
            case Create(device=device):
                assert device.uuid not in self.devices, "created twice"
                driver = self.driver(device.parent)
                assert driver.left(driver.used, device.type) > 0, f"no {device.type} is left"
                driver.devices.append((device.uuid, device.type))
                self.devices[device.uuid] = (device.parent, device.type, device.group)
            case Remove(device=device):
                assert self.device_records.get(device.uuid) == device, "not managed"
                assert not self.holder(device.uuid), "removed under its guest"
                self.vanish(device.uuid)
            case Launch(guest=guest, devices=devices):
                assert guest.name not in self.running, "runs already"
                for uuid in devices:
                    assert uuid in self.devices, "launched without its device"
                    assert not self.holder(uuid), "held by another guest"
                ports = read_guest(guest.definition).hotplug_ports
                self.running[guest.name] = ObservedGuest(guest.uuid, devices, ports)
            case Stop(guest=guest):
                assert self.running.pop(guest.name).uuid == guest.uuid
            case Attach(guest=guest, uuid=uuid):
                it = self.running[guest.name]
                assert it.uuid == guest.uuid
                assert uuid in self.devices, "attached before it is there"
                assert not self.holder(uuid), "held by another guest"
                assert it.free_ports > 0, "no port is free"
                self.running[guest.name] = replace(
                    it, mdevs=(*it.mdevs, uuid), free_ports=it.free_ports - 1
                )
            case Detach(guest=guest, uuid=uuid):
                it = self.running[guest.name]
                left = tuple(one for one in it.mdevs if one != uuid)
                assert len(left) == len(it.mdevs) - 1, "detached what it has not"
                self.running[guest.name] = replace(it, mdevs=left, free_ports=it.free_ports + 1)
        self.change(step.on_begin)
        self.change(step.on_done)

    def change(self, change: Change) -> None:
        for uuid, device in change.devices.items():
            self.device_records.pop(uuid, None)
            if device is not None:
                self.device_records[uuid] = device
        for name, guest in change.guests.items():
            self.guest_records.pop(name, None)
            if guest is not None:
                self.guest_records[name] = guest

    def holder(self, uuid: UUID) -> str:
        return next((name for name, it in self.running.items() if uuid in it.mdevs), "")

    def vanish(self, uuid: UUID) -> None:
        parent, type_, _ = self.devices.pop(uuid)
        self.driver(parent).devices.remove((uuid, type_))

    def reboot(self) -> None:
        self.running.clear()
        for uuid in list(self.devices):
            self.vanish(uuid)

    def foreign(self, parent: str, type_: str, uuid: UUID | None = None) -> UUID:
        """Make a device that is not managed here."""
        made = uuid or self.new_uuid()
        self.driver(parent).devices.append((made, type_))
        self.devices[made] = (parent, type_, None)
        return made

    def of(self, owner: str) -> list[UUID]:
        """What is there for a guest or pool."""
        return [u for u, d in self.device_records.items() if d.owner == owner and u in self.devices]


def spec(text: str, name: str = "lab") -> Document:
    return parse(f'name = "{name}"\n{text}', "lab.toml")


def kinds(changes: Changes) -> str:
    return " ".join(type(planned.step).__name__.lower() for planned in changes.steps)


def needs_of(changes: Changes, kind: type[AnyStep]) -> list[set[str]]:
    """For each step of a kind, the kinds of steps that it needs, however far back."""

    def before(planned: PlannedStep) -> set[str]:
        names = set[str]()
        for need in planned.needs:
            names |= {type(changes.steps[need].step).__name__, *before(changes.steps[need])}
        return names

    return [before(planned) for planned in changes.steps if isinstance(planned.step, kind)]


@pytest.fixture
def world() -> World:
    """A homogeneous card, and a pool of 1 GiB."""
    return World([drivers.grid("grid0"), drivers.igd("igd0")])


PAIR = '[[guest]]\nname = "a"\nmdev = [{type = "mvgpu-128M", count = 2, group = "g"}]\n'
ONE = '[[guest]]\nname = "a"\nmdev = [{type = "mvgpu-128M"}]\n'
TWO = '[[guest]]\nname = "a"\nmdev = [{type = "mvgpu-128M", count = 2}]\n'
THREE = '[[guest]]\nname = "a"\nmdev = [{type = "mvgpu-128M", count = 3}]\n'


# ---- stories ----


def test_a_guest_with_a_group_is_started_when_its_devices_are_there(world: World) -> None:
    changes = world.apply(spec(PAIR))
    assert kinds(changes) == "create create launch"
    assert needs_of(changes, Launch) == [{"Create"}]
    first, second = (planned.step for planned in changes.steps[:2])
    assert isinstance(first, Create)
    assert isinstance(second, Create)
    assert changes.steps[1].needs == (0,)  # drivers number members in the order of joining
    assert first.device.group == second.device.group is not None
    assert (first.device.spec, first.device.owner, first.device.label) == ("lab", "guest:a", "g")
    assert list(world.running["a"].mdevs) == [first.device.uuid, second.device.uuid]


def test_a_second_apply_does_nothing(world: World) -> None:
    world.apply(spec(PAIR))
    again = world.diff(spec(PAIR))
    assert again.nothing
    assert [one.uuid for one in again.existing] == list(world.running["a"].mdevs)


def test_more_are_plugged_in(world: World) -> None:
    world.apply(spec(ONE))
    before = world.of("guest:a")
    changes = world.apply(spec(THREE))
    assert kinds(changes) == "create create attach attach"
    assert set(before) < set(world.of("guest:a"))
    assert len(world.running["a"].mdevs) == 3
    assert changes.restarts == {}


def test_fewer_are_unplugged_and_removed(world: World) -> None:
    world.apply(spec(THREE))
    before = world.of("guest:a")
    changes = world.apply(spec(ONE))
    assert kinds(changes) == "detach detach remove remove"
    assert set(world.of("guest:a")) < set(before)
    assert len(world.running["a"].mdevs) == 1


def test_new_devices_come_before_old_ones_go(world: World) -> None:
    """So that a change that fails has touched nothing that works."""
    world.apply(spec(ONE))
    changes = world.apply(spec(ONE.replace("128M", "256M")))
    assert sorted(kinds(changes).split()) == ["attach", "create", "detach", "remove"]
    assert needs_of(changes, Detach) == [{"Create", "Attach"}]


def test_a_card_of_one_type_is_cleared_before_it_takes_another(world: World) -> None:
    text = '[[guest]]\nname = "a"\nmdev = [{type = "mvgpu-12"}]\n'
    world.apply(spec(text))
    changes = world.apply(spec(text.replace("mvgpu-12", "mvgpu-18")))
    assert kinds(changes) == "detach remove create attach"
    assert needs_of(changes, Create) == [{"Remove", "Detach"}]


def test_a_full_pool_is_cleared_first_too(world: World) -> None:
    text = '[[pool]]\nname = "p"\ntype = "mvgpu-512M"\ncount = 2\n'
    world.apply(spec(text))
    changes = world.apply(spec(text.replace("512M", "256M").replace("2\n", "4\n")))
    assert needs_of(changes, Create)[0] == {"Remove"}
    assert Counter(type_ for _, type_, _ in world.devices.values()) == {"mvgpu-256M": 4}


def test_a_type_that_does_not_fit_at_all_is_refused_with_its_line(world: World) -> None:
    world.apply(spec(ONE))
    with pytest.raises(MisfitError, match=r"lab.toml:3: guest\[0\].mdev\[0\]: 3 asked for, 2 fit"):
        world.diff(spec('[[guest]]\nmdev = [{type = "mvgpu-512M", count = 3}]\nname = "a"'))


def test_what_another_spec_has_is_not_cleared(world: World) -> None:
    world.apply(spec('[[pool]]\nname = "p"\ntype = "mvgpu-12"\n', "other"))
    with pytest.raises(MisfitError):
        world.diff(spec('[[pool]]\nname = "q"\ntype = "mvgpu-18"\n'))


def test_a_group_by_another_name_is_another_group(world: World) -> None:
    """The start group of a device can only be written before it is used: it is made again."""
    world.apply(spec(PAIR))
    before = set(world.of("guest:a"))
    changes = world.apply(spec(PAIR.replace('"g"', '"h"')))
    assert kinds(changes).count("create") == kinds(changes).count("remove") == 2
    assert before.isdisjoint(world.of("guest:a"))


def test_a_member_more_joins_its_group(world: World) -> None:
    world.apply(spec(PAIR))
    world.apply(spec(PAIR.replace("count = 2", "count = 3")))
    groups = {world.devices[uuid][2] for uuid in world.of("guest:a")}
    assert len(world.of("guest:a")) == 3
    assert len(groups) == 1


def test_other_parameters_make_it_again(world: World) -> None:
    world.apply(spec(ONE))
    changes = world.apply(spec(ONE.replace('M"}', 'M", params = "frame_rate_limiter=0"}')))
    assert sorted(kinds(changes).split()) == ["attach", "create", "detach", "remove"]
    assert world.diff(spec(ONE.replace('M"}', 'M", params = "frame_rate_limiter=0"}'))).nothing


def test_a_uuid_that_is_given_is_used(world: World) -> None:
    text = f'[[guest]]\nname = "a"\nmdev = [{{type = "mvgpu-128M", uuid = "{U1}"}}]\n'
    world.apply(spec(text))
    assert world.of("guest:a") == [U1]
    assert world.diff(spec(text)).nothing


def test_a_uuid_of_another_type_is_removed_before_it_is_made(world: World) -> None:
    text = f'[[guest]]\nname = "a"\nmdev = [{{type = "mvgpu-128M", uuid = "{U1}"}}]\n'
    world.apply(spec(text))
    changes = world.apply(spec(text.replace("128M", "256M")))
    assert needs_of(changes, Create) == [{"Remove", "Detach"}]
    assert world.devices[U1][:2] == ("igd0", "mvgpu-256M")


def test_a_uuid_that_one_request_names_is_not_given_to_another(world: World) -> None:
    named = f'{{type = "mvgpu-128M", uuid = "{U1}"}}'
    text = f'[[guest]]\nname = "a"\nmdev = [{named}]\n'
    world.apply(spec(text))
    world.apply(spec(text.replace("128M", "256M").replace("}]", '}, {type = "mvgpu-128M"}]')))
    assert world.devices[U1][1] == "mvgpu-256M"
    assert len(world.of("guest:a")) == 2


def test_a_lost_uuid_may_be_had_by_another_guest(world: World) -> None:
    text = f'[[pool]]\nname = "p"\ntype = "mvgpu-128M"\nuuid = "{U1}"\n'
    world.apply(spec(text))
    world.reboot()
    world.apply(spec(f'[[guest]]\nname = "a"\nmdev = [{{type = "mvgpu-128M", uuid = "{U1}"}}]\n'))
    assert world.of("guest:a") == [U1]


def test_a_uuid_of_a_device_that_is_not_managed_is_refused(world: World) -> None:
    world.foreign("igd0", "mvgpu-128M", U1)
    text = f'[[guest]]\nname = "a"\nmdev = [{{type = "mvgpu-128M", uuid = "{U1}"}}]\n'
    with pytest.raises(RequestError, match=r"lab.toml:4: .*exists and is not ours.*mdo adopt"):
        world.diff(spec(text))


def test_a_uuid_of_another_spec_is_refused(world: World) -> None:
    text = f'[[pool]]\nname = "p"\ntype = "mvgpu-128M"\nuuid = "{U1}"\n'
    world.apply(spec(text, "other"))
    with pytest.raises(RequestError, match=f"{U1} belongs to pool p of spec other"):
        world.diff(spec(text))


def test_a_device_that_mdevctl_runs_is_lent_and_stays_when_it_is_given_back(world: World) -> None:
    world.foreign("igd0", "mvgpu-128M", U1)
    world.defined[U1] = [Definition(uuid=U1, parent="igd0", type="mvgpu-128M")]
    text = f'[[guest]]\nname = "a"\nmdev = [{{uuid = "{U1}"}}, {{type = "mvgpu-128M"}}]\n'
    changes = world.apply(spec(text))
    assert kinds(changes) == "create launch"
    assert U1 in world.running["a"].mdevs
    assert U1 not in world.device_records
    assert world.diff(spec(text)).nothing
    changes = world.apply(spec(ONE))
    assert kinds(changes) == "detach"
    assert U1 in world.devices


def test_after_a_reboot_all_is_made_again_as_it_was(world: World) -> None:
    world.apply(spec(PAIR))
    devices, guest = dict(world.devices), world.running["a"]
    world.reboot()
    changes = world.apply(spec(PAIR))
    assert kinds(changes) == "create create launch"
    assert world.devices == devices
    assert world.running["a"] == guest


def test_after_a_reboot_with_a_member_more_the_group_is_still_one(world: World) -> None:
    more = '{framebuffer = ">=256M", type = "mvgpu-256M", group = "g"}, '
    world.apply(spec(PAIR))
    world.reboot()
    world.apply(spec(PAIR.replace("mdev = [", "mdev = [" + more)))
    assert len({world.devices[uuid][2] for uuid in world.of("guest:a")}) == 1


def test_a_device_that_was_lost_under_its_guest_is_made_again(world: World) -> None:
    """``mdevctl stop`` removed it, or a user after an unplug."""
    world.apply(spec(TWO))
    lost = world.running["a"].mdevs[0]
    world.step(Detach(guest=world.guest_records["a"], uuid=lost))
    world.vanish(lost)
    changes = world.apply(spec(TWO))
    assert kinds(changes) == "create attach"
    assert lost in world.running["a"].mdevs


def test_a_lost_device_that_is_not_asked_for_any_more_is_forgotten(world: World) -> None:
    world.apply(spec('[[pool]]\nname = "p"\ntype = "mvgpu-128M"\ncount = 2\n'))
    world.reboot()
    changes = world.apply(spec('[[pool]]\nname = "p"\ntype = "mvgpu-128M"\n'))
    assert kinds(changes) == "create"
    assert len(world.device_records) == 1


def test_a_guest_that_has_ended_is_started_again(world: World) -> None:
    world.apply(spec(ONE))
    del world.running["a"]
    assert kinds(world.apply(spec(ONE))) == "launch"


def test_a_guest_that_the_spec_has_no_more_goes_with_its_devices(world: World) -> None:
    both = ONE + ONE.replace('"a"', '"b"')
    world.apply(spec(both))
    changes = world.apply(spec(ONE))
    assert kinds(changes) == "stop remove"
    assert changes.steps[1].needs == (0,)
    assert list(world.running) == list(world.guest_records) == ["a"]


def test_more_memory_needs_a_restart_which_keeps_the_devices(world: World) -> None:
    world.apply(spec(ONE))
    before = world.of("guest:a")
    changes = world.apply(spec(ONE.replace("mdev", 'memory = "1G"\nmdev')))
    assert changes.restarts == {"a": "memory changes from 512M to 1G"}
    assert kinds(changes) == "stop launch"
    assert world.of("guest:a") == before
    assert list(world.running["a"].mdevs) == before


@pytest.mark.parametrize("force", [False, True])
def test_a_guest_that_must_stop_is_only_ended_by_force(world: World, *, force: bool) -> None:
    """Restarted or gone from the spec: one that does not power down stays, or is ended."""
    both = ONE + ONE.replace('"a"', '"b"')
    world.apply(spec(both))
    changed = ONE.replace("mdev", 'memory = "1G"\nmdev')
    stops = [
        planned.step
        for planned in diff(spec(changed), world.observe(), options=StepOptions(force=force)).steps
        if isinstance(planned.step, Stop)
    ]
    assert [stop.guest.name for stop in stops] == ["b", "a"]
    assert [stop.force for stop in stops] == [force, force]


def test_a_restart_names_values_as_a_user_writes_them(world: World) -> None:
    text = ONE.replace("mdev", 'memory = "64M"\nuefi = false\nmdev')
    world.apply(spec(text))
    changes = world.diff(spec(text.replace("64M", "96M").replace("false", "true")))
    assert changes.restarts == {
        "a": "memory changes from 64M to 96M, uefi changes from false to true"
    }


@pytest.mark.parametrize("deadline", [None, 5.0])
def test_a_deadline_is_every_steps(world: World, deadline: float | None) -> None:
    """Of a guest that stops or starts too, not of devices alone."""
    plugged = ONE.replace('"a"', '"b"')
    world.apply(spec(ONE + plugged + ONE.replace('"a"', '"c"')))
    text = ONE.replace("mdev", 'memory = "1G"\nmdev') + plugged.replace("128M", "256M")
    changes = diff(spec(text), world.observe(), options=StepOptions(deadline=deadline))
    given = {
        (type(step), step.deadline)
        for step in (planned.step for planned in changes.steps)
        if not isinstance(step, Create | Remove)
    }
    defaults = {
        Stop: STOP_SECONDS,
        Launch: START_SECONDS,
        Attach: hotplug.ATTACH_SECONDS,
        Detach: hotplug.DETACH_SECONDS,
    }
    assert given == {(kind, deadline or default) for kind, default in defaults.items()}


def test_a_qemu_that_does_not_answer_gets_no_devices_by_hotplug(world: World) -> None:
    world.apply(spec(ONE))
    world.running["a"] = replace(world.running["a"], silent="it is stopped")
    assert world.diff(spec(ONE)).nothing
    changes = world.diff(spec(TWO))
    assert changes.restarts == {
        "a": "its devices change, and its QEMU does not answer: it is stopped"
    }
    assert kinds(changes) == "create stop launch"


def test_another_uuid_needs_a_restart(world: World) -> None:
    world.apply(spec(ONE))
    changes = world.apply(spec(ONE.replace("mdev", f'uuid = "{U2}"\nmdev')))
    assert "its uuid changes" in changes.restarts["a"]
    assert world.running["a"].uuid == U2


def test_too_few_ports_need_a_restart(world: World) -> None:
    world.apply(spec(ONE.replace("mdev", "hotplug_ports = 1\nmdev")))
    changes = world.apply(spec(THREE.replace("mdev", "hotplug_ports = 1\nmdev")))
    assert changes.restarts == {"a": "2 devices are to be attached, and it has 1 free ports"}
    assert len(world.running["a"].mdevs) == 3


def test_full_ports_are_freed_before_they_are_used_again(world: World) -> None:
    world.apply(spec(ONE.replace("mdev", "hotplug_ports = 0\nmdev")))
    changes = world.apply(
        spec(ONE.replace("mdev", "hotplug_ports = 0\nmdev").replace("128", "256"))
    )
    assert changes.restarts == {}
    assert needs_of(changes, Attach) == [{"Create", "Detach"}]


def test_a_guest_that_was_adopted_is_taken_to_be_as_the_spec_says(world: World) -> None:
    """The journal was lost, and ``mdo adopt`` has made a new one from what runs."""
    document = spec(PAIR)
    world.apply(document)
    world.spec_records.clear()
    for uuid, device in list(world.device_records.items()):
        world.device_records[uuid] = DeviceRecord(
            uuid=uuid, parent=device.parent, type=device.type, owner="guest:a", group=device.group
        )
    uuid = world.running["a"].uuid
    world.guest_records = {"a": GuestRecord(name="a", uuid=uuid, definition="")}
    changes = world.apply(document)
    assert kinds(changes) == ""
    assert changes.restarts == {}
    assert {device.spec for device in world.device_records.values()} == {"lab"}
    assert world.guest_records["a"].spec == "lab"
    assert world.diff(document).nothing


def test_adopted_groups_are_told_apart(world: World) -> None:
    """Their names are lost; a device of one was taken for the other, which is an error."""
    text = (
        '[[guest]]\nname = "a"\nmdev = [{type = "mvgpu-128M", group = "g"},'
        ' {type = "mvgpu-128M", count = 2, group = "h"}]\n'
    )
    world.apply(spec(text))
    for uuids in (sorted, reversed):
        lose_and_adopt(world)
        records = world.device_records
        world.device_records = {uuid: records[uuid] for uuid in uuids(list(records))}
        assert kinds(world.apply(spec(text))) == ""
        true_to(world, spec(text))


def adopt(world: World, *uuids: UUID, params: str = "") -> None:
    """Do what ``mdo adopt`` does with devices that no guest has."""
    for uuid in uuids:
        parent, type_, group = world.devices[uuid]
        world.device_records[uuid] = DeviceRecord(
            uuid=uuid, parent=parent, type=type_, group=group, params=params, adopted=True
        )


POOL = '[[pool]]\nname = "p"\ntype = "mvgpu-128M"\ncount = 4\n'


def test_a_pool_takes_adopted_devices_before_any_is_created(world: World) -> None:
    """The journal was lost: its devices are adopted, and none is made a second time."""
    world.apply(spec(POOL))
    before = set(world.devices)
    world.device_records.clear()
    world.spec_records.clear()
    other = world.foreign("igd0", "mvgpu-256M")
    adopt(world, *before, other)
    assert kinds(world.apply(spec(POOL))) == ""
    assert set(world.of("pool:p")) == before
    assert world.device_records[other].spec is None, "it is of another type"
    assert world.diff(spec(POOL)).nothing
    changes = world.apply(spec(POOL.replace("4", "5")))
    assert kinds(changes) == "create"


def test_what_is_adopted_is_not_taken_from_a_guest(world: World) -> None:
    world.apply(spec(ONE))
    (uuid,) = world.of("guest:a")
    world.device_records[uuid] = replace(world.device_records[uuid], spec=None, adopted=True)
    assert kinds(world.diff(spec(POOL, "other"))) == "create create create create"


def test_adopted_devices_are_told_apart_by_their_parameters(world: World) -> None:
    text = POOL.replace("4", "1")
    text += text.replace('"p"', '"q"') + 'params = "x=1"\n'
    for first in ("pool:p", "pool:q"):
        world.apply(spec(text))
        lose_and_adopt(world)
        in_order = sorted(world.device_records.items(), key=lambda item: item[1].params)
        world.device_records = dict(in_order if first == "pool:p" else reversed(in_order))
        assert kinds(world.apply(spec(text))) == ""


def test_an_adopted_device_is_taken_to_be_as_the_spec_says(world: World) -> None:
    """The driver shows parameters that the spec leaves to it; a second apply changes nothing."""
    adopt(world, world.foreign("igd0", "mvgpu-128M"), params="shown=1")
    text = POOL.replace("4", '1\nattributes = [["a", "1"]]')
    assert kinds(world.apply(spec(text))) == ""
    assert world.diff(spec(text)).nothing


def test_an_adopted_device_of_another_type_is_refused_by_its_uuid(world: World) -> None:
    """It was planned to be created, beside itself."""
    adopt(world, world.foreign("igd0", "mvgpu-128M", U1))
    text = f'[[pool]]\nname = "p"\ntype = "mvgpu-256M"\nuuid = "{U1}"\n'
    with pytest.raises(RequestError, match="exists as mvgpu-128M, not as mvgpu-256M"):
        world.diff(spec(text))


def test_a_lost_uuid_that_another_program_took_is_refused(world: World) -> None:
    text = f'[[pool]]\nname = "p"\ntype = "mvgpu-12"\nuuid = "{U1}"\n'
    world.apply(spec(text))
    world.vanish(U1)
    world.foreign("igd0", "mvgpu-128M", U1)
    with pytest.raises(RequestError, match=f"{U1} exists and is not ours"):
        world.diff(spec(text))


def test_a_guest_of_the_same_name_that_is_not_managed_is_refused(world: World) -> None:
    world.running["a"] = ObservedGuest(U1)
    with pytest.raises(RequestError, match=r"lab.toml:3: guest\[0\].name: guest a runs already"):
        world.diff(spec(ONE))


def test_a_guest_of_another_spec_is_refused(world: World) -> None:
    world.apply(spec(ONE, "other"))
    with pytest.raises(RequestError, match="guest a belongs to spec other"):
        world.diff(spec(ONE))


def test_what_a_user_has_attached_by_hand_stays(world: World) -> None:
    world.apply(spec(ONE))
    other = world.foreign("igd0", "mvgpu-128M")
    world.device_records[other] = DeviceRecord(uuid=other, parent="igd0", type="mvgpu-128M")
    world.step(Attach(guest=world.guest_records["a"], uuid=other))
    assert world.diff(spec(ONE)).nothing


def test_destroy_takes_the_guests_first_and_leaves_the_rest(world: World) -> None:
    world.apply(spec(ONE, "other"))
    text = PAIR.replace('"a"', '"b"') + '[[pool]]\nname = "p"\ntype = "mvgpu-128M"\n'
    world.apply(spec(text))
    lost = world.of("pool:p")[0]
    world.vanish(lost)
    changes = without("lab", world.observe())
    assert kinds(changes) == "stop remove remove"
    assert needs_of(changes, Remove) == [{"Stop"}, {"Stop"}]
    world.do(changes)
    assert set(world.devices) == set(world.device_records) == set(world.of("guest:a"))
    assert set(world.running) == set(world.guest_records) == {"a"}


# ---- random stories ----

TYPES = ("mvgpu-12", "mvgpu-18", "mvgpu-128M", "mvgpu-256M", "mvgpu-512M", "mdpy-vga", "mdpy-hd")
GIVEN = [UUID(int=0xBBBB << 112 | number) for number in range(3)]

kind = st.one_of(
    st.fixed_dictionaries({"type": st.sampled_from(TYPES)}),
    st.fixed_dictionaries({"framebuffer": st.sampled_from([">=256M", "<=512M", ">=8G"])}),
)
"""What a request asks for."""
extras = st.fixed_dictionaries({}, optional={"params": st.sampled_from(["", "x=1"])})


@st.composite
def specs(draw: st.DrawFn) -> Document:
    """A spec of up to three guests and two pools."""
    given = draw(st.permutations(GIVEN))

    def devices() -> dict[str, Any]:
        found: dict[str, Any] = {**draw(kind), **draw(extras)}
        if given and draw(st.integers(0, 5)) == 0:
            return {**found, "uuid": str(given.pop())}
        return {**found, "count": draw(st.integers(1, 3))}

    def guest(name: str) -> dict[str, Any]:
        group = st.sampled_from([{}, {}, {"group": "g"}, {"group": "h"}])
        return {
            "name": name,
            "memory": draw(st.sampled_from(["64M", "64M", "64M", "128M"])),
            "hotplug_ports": draw(st.sampled_from([0, 2, 4])),
            "mdev": [devices() | draw(group) for _ in range(draw(st.integers(0, 2)))],
        }

    names = draw(st.sets(st.sampled_from("abc"), min_size=1))
    pools = draw(st.sets(st.sampled_from("pq")))
    text = {
        "name": "lab",
        "guest": [guest(name) for name in sorted(names)],
        "pool": [{"name": name, **devices()} for name in sorted(pools)],
    }
    return parse(json.dumps(text), "lab.json")


class Disturbance:
    """What happens to a machine between two applies."""

    @staticmethod
    def nothing(world: World, rng: random.Random) -> None:
        pass

    @staticmethod
    def reboot(world: World, rng: random.Random) -> None:
        world.reboot()

    @staticmethod
    def a_guest_ends(world: World, rng: random.Random) -> None:
        if world.running:
            del world.running[rng.choice(sorted(world.running))]

    @staticmethod
    def a_device_is_lost(world: World, rng: random.Random) -> None:
        free = [uuid for uuid in world.device_records if uuid in world.devices]
        free = [uuid for uuid in free if not world.holder(uuid)]
        if free:
            world.vanish(rng.choice(sorted(free)))

    @staticmethod
    def another_program_takes_a_uuid(world: World, rng: random.Random) -> None:
        """After it was lost, under another parent."""
        lost = [uuid for uuid in world.device_records if uuid not in world.devices]
        driver = world.driver("mdpy")
        if lost and driver.left(driver.used, "mdpy-hd"):
            world.foreign("mdpy", "mdpy-hd", rng.choice(sorted(lost)))


DISTURBANCES = st.sampled_from(
    [value.__func__ for name, value in vars(Disturbance).items() if name[0] != "_"]
)


@settings(max_examples=60)
@given(
    first=specs(),
    chapters=st.lists(st.tuples(DISTURBANCES, specs()), max_size=2),
    seed=st.integers(0, 1 << 16),
)
def test_every_story_ends_as_asked(
    first: Document, chapters: Sequence[tuple[Any, Document]], seed: int
) -> None:
    rng = random.Random(seed)  # noqa: S311 - no secret
    world = World([drivers.grid("grid0"), drivers.igd("igd0"), drivers.mdpy("mdpy")])
    bystanders(world, rng)
    happened = [(Disturbance.nothing, first), *chapters, (Disturbance.nothing, None)]
    document = first
    for disturb, next_ in happened:
        disturb(world, rng)
        document = next_ or document
        before = picture(world)
        kept = Counter((d.owner, d.want) for u, d in before.records.items() if before.is_here(u))
        refused = ""
        try:
            changes = world.apply(document, seed)
        except RequestError as error:
            event(f"refused: {type(error).__name__}")
            refused = str(error)
        if refused:
            assert refused.startswith("lab.json"), "without its place"
            assert picture(world) == before, "refused, and something was done"
            return
        event(f"{min(len(changes.steps), 9)} steps")
        true_to(world, document)
        untouched(world, before)
        stayed = Counter(
            (d.owner, d.want)
            for u, d in world.device_records.items()
            if before.is_here(u) and before.devices[u] == world.devices.get(u)
        )
        asked = Counter((d.owner, d.want) for d in lab_records(world))
        for want in kept & asked:
            assert stayed[want] >= min(kept[want], asked[want]), "removed what was asked for still"
        again = world.diff(document)
        assert again.nothing, [str(planned.step) for planned in again.steps]
        assert not again.restarts


@settings(max_examples=60)
@given(document=specs(), seed=st.integers(0, 1 << 16))
def test_after_a_loss_of_the_journal_and_an_adoption_the_spec_takes_its_devices(
    document: Document, seed: int
) -> None:
    """Fault 27: what runs is adopted, and the next apply makes no device a second time."""
    world = World([drivers.grid("grid0"), drivers.igd("igd0"), drivers.mdpy("mdpy")])
    try:
        world.apply(document, seed)
    except RequestError:
        return
    lose_and_adopt(world)
    before = dict(world.devices)
    changes = world.apply(document, seed)
    event(f"{min(len(changes.steps), 9)} steps")
    typed = all(devices.type is not None for _, _, devices in document.spec.devices())
    if typed:  # conditions leave it open which device was for which request
        assert kinds(changes) == ""
        assert world.devices == before
    true_to(world, document)
    again = world.diff(document)
    assert again.nothing, [str(planned.step) for planned in again.steps]


def lose_and_adopt(world: World) -> None:
    """Lose the journal, and do what ``mdo adopt --all`` does then."""
    params = {uuid: record.params for uuid, record in world.device_records.items()}
    world.device_records = {
        uuid: DeviceRecord(
            uuid=uuid,
            parent=parent,
            type=type_,
            group=group,
            params=params[uuid],
            owner=f"guest:{world.holder(uuid)}" if world.holder(uuid) else "",
            adopted=True,
        )
        for uuid, (parent, type_, group) in sorted(world.devices.items())
    }
    world.guest_records = {
        name: GuestRecord(name=name, uuid=guest.uuid, definition="")
        for name, guest in world.running.items()
    }
    world.spec_records.clear()


def bystanders(world: World, rng: random.Random) -> None:
    """Devices that are not managed, and another spec with a guest."""
    for parent, type_ in (("igd0", "mvgpu-128M"), ("mdpy", "mdpy-xga")):
        if rng.random() < 0.5:
            world.foreign(parent, type_)
    text = '[[guest]]\nname = "z"\nmdev = [{type = "mdpy-vga"}]\n'
    if rng.random() < 0.5:
        world.apply(spec(text, "other"))


@dataclass(frozen=True)
class Picture:
    devices: Mapping[UUID, tuple[str, str, UUID | None]]
    records: Mapping[UUID, DeviceRecord]
    running: Mapping[str, ObservedGuest]
    guests: Mapping[str, GuestRecord]

    def is_here(self, uuid: UUID) -> bool:
        """Whether a device is there and is the managed one."""
        known = self.records.get(uuid)
        return known is not None and self.devices.get(uuid, ())[:2] == (known.parent, known.type)


def picture(world: World) -> Picture:
    return Picture(
        dict(world.devices),
        dict(world.device_records),
        dict(world.running),
        dict(world.guest_records),
    )


def lab_records(world: World) -> list[DeviceRecord]:
    return [device for device in world.device_records.values() if device.spec == "lab"]


def true_to(world: World, document: Document) -> None:
    """What is there is what was asked for, and nothing else of this spec is."""
    asked = Counter[str]()
    for _, name, devices in document.spec.devices():
        asked[name] += devices.count
    have = Counter(device.owner.partition(":")[2] for device in lab_records(world))
    assert have == asked
    groups: dict[tuple[str, str | None], set[object]] = {}
    for device in lab_records(world):
        assert world.devices[device.uuid] == (device.parent, device.type, device.group)
        assert (device.group is None) == (device.label is None)
        if device.label is not None:
            groups.setdefault((device.owner, device.label), set()).add(
                (device.parent, device.group)
            )
    assert all(len(group) == 1 for group in groups.values()), "a group is not whole"
    assert len(groups) == len(set.union(set(), *groups.values())), "two groups are one"
    for guest in document.spec.guests:
        running, known = world.running[guest.name], world.guest_records[guest.name]
        assert known.uuid == running.uuid
        wanted = [d.uuid for d in lab_records(world) if d.owner == f"guest:{guest.name}"]
        assert sorted(running.mdevs) == sorted(wanted)
    guests = {name for name, guest in world.guest_records.items() if guest.spec == "lab"}
    assert guests == {guest.name for guest in document.spec.guests}


def untouched(world: World, before: Picture) -> None:
    """What is not this spec's is as it was."""
    for uuid, what in before.devices.items():
        known = before.records.get(uuid)
        if known is None or known.spec != "lab" or not before.is_here(uuid):
            assert world.devices.get(uuid) == what
    for uuid, known in before.records.items():
        if known.spec != "lab":
            assert world.device_records.get(uuid) == known
    if "z" in before.running:
        assert world.running.get("z") == before.running["z"]
