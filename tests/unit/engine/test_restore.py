# SPDX-License-Identifier: GPL-2.0-or-later
"""What is waited for after a reboot, and for how long; tests/reboot shows that it comes back.

Here a device "comes back" with its parent, so a spec that has all that it needs has nothing to do.
"""

from __future__ import annotations

import asyncio
import errno
import json
from collections.abc import Iterator
from uuid import UUID

import msgspec
import pytest

from mdev_orchestrator.engine.journal import Journal
from mdev_orchestrator.engine.journal_db import read_managed
from mdev_orchestrator.engine.records import Change, DeviceRecord, Managed, SpecRecord
from mdev_orchestrator.engine.restore import Need, Restored, needs, power_down, restore
from mdev_orchestrator.errors import DeadlineError, HostError, UnknownError
from mdev_orchestrator.interop.mdevctl import Definition
from mdev_orchestrator.machine import Machine
from unit.fakesys import FakeSystem
from unit.host.test_events import FakeMonitor

U1 = UUID("11111111-1111-4111-8111-111111111111")
U2 = UUID("22222222-2222-4222-8222-222222222222")
REGISTERED = {"ACTION": "change", "SUBSYSTEM": "fake", "MDEV_STATE": "registered"}


@pytest.fixture
def monitor() -> Iterator[FakeMonitor]:
    monitor = FakeMonitor()
    yield monitor
    monitor.close()


def registered(parent: str) -> dict[str, str]:
    return REGISTERED | {"DEVPATH": f"/devices/virtual/fake/{parent}"}


def pool(uuid: UUID, parent: str, name: str, **more: str) -> tuple[DeviceRecord, SpecRecord]:
    """A spec of one pool of one device, as the journal has it."""
    asked = {"name": "p", "type": "fake-1", "uuid": str(uuid), **more}
    text = json.dumps({"name": name, "pool": [asked]})
    device = DeviceRecord(
        uuid=uuid,
        parent=parent,
        type="fake-1",
        spec=name,
        owner="pool:p",
        want=json.dumps(asked),
    )
    return device, SpecRecord(name=name, text=text, source=f"{name}.toml", applied=1.0)


async def applied(machine: Machine, *records: tuple[DeviceRecord, SpecRecord]) -> None:
    """What an earlier boot has left in the journal."""
    with Journal.open(machine.journal_path) as journal:
        run = await journal.begin("apply", "test", (), ())
        await journal.end(
            run,
            "done",
            change=Change(devices={device.uuid: device for device, _ in records}),
            specs={spec.name: spec for _, spec in records},
        )


def appear(system: FakeSystem, parent: str, uuid: UUID, type_: str = "fake-1") -> None:
    system.parent(parent)
    system.type(parent, type_)
    if type_ == "fake-1":
        system.mdev(parent, type_, str(uuid))


async def back(machine: Machine, monitor: FakeMonitor, **options: object) -> tuple[Restored, ...]:
    return await restore(machine, make_monitor=lambda: monitor, **options)  # type: ignore[arg-type]


async def test_nothing_was_applied(machine: Machine, monitor: FakeMonitor) -> None:
    assert await back(machine, monitor) == ()
    assert not machine.journal_path.exists()


async def test_a_spec_that_was_never_applied(machine: Machine, monitor: FakeMonitor) -> None:
    await applied(machine, pool(U1, "card0", "one"))
    with pytest.raises(UnknownError, match=r"no spec two was applied \(there are: one\)"):
        await back(machine, monitor, names=["two"])


async def test_what_is_there_needs_no_events(machine: Machine, system: FakeSystem) -> None:
    await applied(machine, pool(U1, "card0", "one"))
    appear(system, "card0", U1)

    def none() -> FakeMonitor:
        raise HostError("cannot listen")

    (done,) = await restore(machine, make_monitor=none)
    assert done.error is None
    assert done.changes is not None
    assert done.changes.steps == ()


async def test_each_spec_waits_for_its_own_parent(
    machine: Machine, system: FakeSystem, monitor: FakeMonitor
) -> None:
    """In whatever order parents come; the error names the one that does not."""
    await applied(machine, *(pool(UUID(int=n + 1), f"card{n}", f"spec{n}") for n in range(3)))
    appear(system, "card0", UUID(int=1))
    work = asyncio.create_task(back(machine, monitor, wait=1.0))
    await asyncio.sleep(0.2)
    appear(system, "card2", UUID(int=3))
    monitor.send(registered("card2"))
    done = await work
    assert [one.name for one in done] == ["spec0", "spec1", "spec2"]
    assert [type(one.error) for one in done] == [type(None), DeadlineError, type(None)]
    assert str(done[1].error) == (
        "spec spec1 is not back after 1 s: parent card1 has not appeared "
        "(see the kernel log for its driver; then mdo restore spec1)"
    )
    assert set(read_managed(machine).devices) == {UUID(int=n + 1) for n in range(3)}


@pytest.mark.parametrize(
    "event", [registered("card0"), OSError(errno.ENOBUFS, "full")], ids=["event", "events lost"]
)
async def test_as_soon_as_the_last_one_is_there(
    machine: Machine, system: FakeSystem, monitor: FakeMonitor, event: dict[str, str] | OSError
) -> None:
    await applied(machine, pool(U1, "card0", "one"))
    work = asyncio.create_task(back(machine, monitor, wait=60.0))
    await asyncio.sleep(0.2)
    appear(system, "card0", U1)
    monitor.send(event)
    async with asyncio.timeout(5):
        (done,) = await work
    assert done.error is None


async def test_without_events_the_others_come_back(machine: Machine, system: FakeSystem) -> None:
    await applied(machine, pool(U1, "card0", "one"), pool(U2, "card1", "two"))
    appear(system, "card0", U1)

    def none() -> FakeMonitor:
        raise HostError("cannot listen")

    done = await restore(machine, make_monitor=none)
    assert [one.error and one.error.message for one in done] == [None, "cannot listen"]


async def test_a_parent_without_its_type(
    machine: Machine, system: FakeSystem, monitor: FakeMonitor
) -> None:
    """It is not made elsewhere or of another type: a reboot brings back what was."""
    await applied(machine, pool(U1, "card0", "one"))
    appear(system, "card0", U1, type_="fake-2")
    (done,) = await back(machine, monitor, wait=0)
    assert "parent card0 has appeared without type fake-1" in str(done.error)


async def test_a_pool_that_is_made_by_hand(machine: Machine, monitor: FakeMonitor) -> None:
    """It is not waited for and not made; it stays managed, for the next apply."""
    await applied(machine, pool(U1, "card0", "one", start="manual"))
    before = read_managed(machine)
    (done,) = await back(machine, monitor, wait=0)
    assert done.error is None
    assert done.changes is not None
    assert done.changes.steps == ()
    assert read_managed(machine).devices == before.devices
    assert '"manual"' in read_managed(machine).specs["one"].text


async def test_a_spec_that_cannot_be_read(
    machine: Machine, system: FakeSystem, monitor: FakeMonitor
) -> None:
    device, record = pool(U1, "card0", "one")
    await applied(
        machine, (device, msgspec.structs.replace(record, text="{}")), pool(U2, "card0", "two")
    )
    appear(system, "card0", U2)
    one, two = await back(machine, monitor)
    assert one.error is not None
    assert one.error.exit_code == 2
    assert two.error is None


async def test_ten_at_once(machine: Machine, system: FakeSystem) -> None:
    await applied(machine, pool(U1, "card0", "one"))
    appear(system, "card0", U1)
    done = await asyncio.gather(*(restore(machine) for _ in range(10)))
    assert [one.error for (one,) in done] == [None] * 10
    with Journal.open(machine.journal_path) as journal:
        assert journal.open_runs() == []


def test_what_mdevctl_starts_is_waited_for() -> None:
    """A managed device, and one that mdevctl does not start, is created by the apply."""
    device, spec = pool(U1, "card0", "one")

    def defined(start: str) -> dict[UUID, list[Definition]]:
        return {U1: [Definition(uuid=U1, parent="card0", type="fake-1", start=start)]}  # type: ignore[arg-type]

    assert needs(spec, Managed(), defined("auto")) == {Need("card0", "fake-1", U1)}
    assert needs(spec, Managed(), defined("manual")) == frozenset()
    managed = Managed({U1: device})
    assert needs(spec, managed, defined("auto")) == {Need("card0", "fake-1")}


async def test_no_guest_to_power_down(machine: Machine) -> None:
    assert await power_down(machine) == ()
