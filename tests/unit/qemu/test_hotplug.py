# SPDX-License-Identifier: GPL-2.0-or-later
"""Attach and detach.

A real QEMU without a guest's software shows what QEMU does by itself, with ordinary PCI devices
instead of mdevs. What guests do (take, let go, refuse) comes from a scripted monitor, and for real
in the lab's tests.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest

from mdev_orchestrator import errors
from mdev_orchestrator.errors import Outcome
from mdev_orchestrator.machine import Machine
from mdev_orchestrator.qemu import hotplug
from mdev_orchestrator.qemu.command import GuestMdev, GuestSpec
from mdev_orchestrator.qemu.hotplug import Device, Port
from mdev_orchestrator.qemu.monitor import connect
from mdev_orchestrator.qemu.process import RunningGuest, State, is_stopped
from mdev_orchestrator.qemu.remedies import remedy
from mdev_orchestrator.qemu.start import start_qemu
from mdev_orchestrator.qemu.stop import stop_qemu
from mdev_orchestrator.spec.sizes import Size
from mdev_orchestrator.system.waiting import poll_until
from unit.qemu.conftest import Peer, Script, Serve

M1 = UUID("83b8f4f2-509f-382f-3c1e-e6bfe0fa1001")
RNG = Device("rng", "virtio-rng-pci")


@asynccontextmanager
async def guest(
    qemu: str, machine: Machine, ports: int = 2, *extra: str
) -> AsyncIterator[RunningGuest]:
    what = GuestSpec(
        name="g",
        uuid=uuid4(),
        memory=Size(64 << 20),
        accel="tcg",
        qemu=qemu,
        hotplug_ports=ports,
        extra=("-S", *extra),
    )
    found = await start_qemu(machine, what)
    try:
        yield found
    finally:
        await stop_qemu(machine, found, deadline=0, force=True)


async def plug(
    found: RunningGuest, device: Device, *, deadline: float = 30, wait_guest: bool = False
) -> str | None:
    end = asyncio.get_running_loop().time() + deadline
    async with connect(found.qmp_socket, found.label, deadline=None, end=end) as qmp:
        return await hotplug.plug_by(qmp, device, end, wait_guest=wait_guest)


async def unplug(found: RunningGuest, device_id: str, deadline: float = 60) -> None:
    """Any device: :func:`hotplug.detach` takes mdevs only, which this machine has not."""
    end = asyncio.get_running_loop().time() + deadline
    async with connect(found.qmp_socket, found.label, deadline=None, end=end) as qmp:
        await hotplug._unplug(qmp, device_id, end, deadline)


async def ports(found: RunningGuest) -> tuple[Port, ...]:
    async with connect(found.qmp_socket, found.label) as qmp:
        return await hotplug.ports(qmp)


async def test_devices_take_free_ports(qemu: str, machine: Machine) -> None:
    # one without an id sits in port1: only the bus itself knows
    async with guest(qemu, machine, 12, "-device", "virtio-rng-pci,bus=port1") as found:
        assert await plug(found, RNG) == "port0"
        assert await plug(found, Device("e", "edu")) == "port2"
        known = await ports(found)
        assert [port.id for port in known] == [f"port{number}" for number in range(12)]
        assert [port.occupant for port in known[:4]] == [
            "virtio-rng-pci",
            "virtio-rng-pci",
            "edu",
            None,
        ]


async def test_no_port_is_free(qemu: str, machine: Machine) -> None:
    async with guest(qemu, machine, 1) as found:
        await plug(found, RNG)
        with pytest.raises(errors.RequestError, match="all 1 root ports are taken") as caught:
            await plug(found, Device("second", "edu"))
        assert "--hotplug-ports" in caught.value.hint


async def test_no_port_at_all(qemu: str, machine: Machine) -> None:
    async with guest(qemu, machine, 0) as found:
        with pytest.raises(errors.RequestError, match="it has no root port"):
            await plug(found, RNG)


async def test_twice(qemu: str, machine: Machine) -> None:
    async with guest(qemu, machine) as found:
        await plug(found, RNG)
        with pytest.raises(errors.RequestError, match="guest g has rng already"):
            await plug(found, RNG)


async def test_many_at_once(qemu: str, machine: Machine) -> None:
    async with guest(qemu, machine, 3) as found:
        devices = [Device(f"d{number}", "edu") for number in range(4)]
        results = await asyncio.gather(
            *(plug(found, device) for device in devices), return_exceptions=True
        )
        *plugged, failed = sorted(results, key=lambda one: isinstance(one, Exception))
        assert sorted(map(str, plugged)) == ["port0", "port1", "port2"]
        assert "all 3 root ports are taken" in str(failed)


async def test_qemu_refuses_a_device(qemu: str, machine: Machine) -> None:
    async with guest(qemu, machine) as found:
        mdev = GuestMdev(M1, Path("/sys/bus/mdev/devices") / str(M1))
        with pytest.raises(errors.CommandError, match="no such host device") as caught:
            await plug(found, hotplug.device_for(mdev))
        assert "mdo host" in caught.value.hint
        assert caught.value.exit_code == 3
        assert [port.occupant for port in await ports(found)] == [None, None]
        with pytest.raises(errors.CommandError, match="nonsense"):
            await plug(found, Device("x", "nonsense"))


async def test_a_guest_without_software_never_takes(qemu: str, machine: Machine) -> None:
    async with guest(qemu, machine) as found:
        with pytest.raises(errors.DeadlineError, match=r"has not taken rng.*it stays plugged"):
            await plug(found, RNG, deadline=1, wait_guest=True)
        assert (await ports(found))[0].occupant == "virtio-rng-pci"


async def test_a_guest_without_software_never_lets_go(qemu: str, machine: Machine) -> None:
    async with guest(qemu, machine) as found:
        await plug(found, RNG)
        for _ in range(2):  # the second hears that one is under way, and waits for that
            with pytest.raises(errors.DeadlineError, match=r"did not let go of rng.*it still has"):
                await unplug(found, "rng", 0.3)
            assert (await ports(found))[0].occupant == "virtio-rng-pci"


async def test_a_listing_does_not_wait_for_an_unplug(qemu: str, machine: Machine) -> None:
    async with guest(qemu, machine) as found:
        await plug(found, RNG)
        task = asyncio.ensure_future(unplug(found, "rng", 60))
        for _ in range(3):
            assert await hotplug.mdevs_of(found) == ()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_what_is_not_there_cannot_be_unplugged(qemu: str, machine: Machine) -> None:
    async with guest(qemu, machine):
        with pytest.raises(
            errors.UnknownError, match=rf"guest g has no mdev {M1} \(it has: none\)"
        ):
            await hotplug.detach(machine, "g", M1, 5)
        with pytest.raises(errors.UnknownError, match="no guest is called other"):
            await hotplug.detach(machine, "other", M1, 5)


async def test_qemu_ends_while_a_device_is_waited_for(qemu: str, machine: Machine) -> None:
    async with guest(qemu, machine) as found:
        await plug(found, RNG)
        task = asyncio.ensure_future(unplug(found, "rng", 60))
        async with connect(found.query_socket, found.label) as qmp:
            await qmp.execute("query-status", object)
            await qmp.quit()
        with pytest.raises(errors.QemuError, match="guest g"):
            await task


@pytest.mark.parametrize("goes_on", ["before the hang-up", "after it"])
async def test_what_a_new_connection_sees_is_final(
    qemu: str, machine: Machine, goes_on: str
) -> None:
    """After a device_add with an unknown outcome, this is how its effect is found out."""
    unknown = 8
    async with guest(qemu, machine, unknown) as found:
        assert found.record
        for number in range(unknown):
            async with connect(found.qmp_socket, found.label) as qmp:
                await qmp.execute("query-status", object)
                os.kill(found.record.pid, signal.SIGSTOP)
                assert await poll_until(lambda: is_stopped(found), 10)
                end = asyncio.get_running_loop().time() + 0.1
                device, bus = Device(f"d{number}", "edu"), {"bus": f"port{number}"}
                with qmp.until(end), pytest.raises(errors.DeadlineError) as caught:
                    await hotplug._add(qmp, device, bus)
                assert caught.value.outcome is Outcome.UNKNOWN
                if goes_on == "before the hang-up":
                    os.kill(found.record.pid, signal.SIGCONT)
            os.kill(found.record.pid, signal.SIGCONT)
            first = await ports(found)
            await asyncio.sleep(0.1)
            assert await ports(found) == first


@pytest.mark.parametrize("ends", ["well", "badly"])
async def test_the_next_client_does_not_take_a_late_reply_for_its_own(
    qemu: str, machine: Machine, ends: str
) -> None:
    """QEMU sends the reply to a command of the client before to the client that it has then."""
    slow = machine.state_dir / "slow"  # its writer waits in open() for a reader
    os.mkfifo(slow)
    dump = {"val": 0, "size": 1 << 20, "filename": str(slow)}
    async with guest(qemu, machine) as found:
        async with connect(found.qmp_socket, found.label) as qmp:
            with pytest.raises(errors.DeadlineError, match="no reply to pmemsave"):
                await qmp.execute("pmemsave", object, dump, deadline=0.2)
        looking = asyncio.ensure_future(ports(found))
        await asyncio.sleep(0.2)
        assert not looking.done()  # it comes after what QEMU is at
        reader = await asyncio.to_thread(os.open, slow, os.O_RDONLY)
        while ends == "well" and await asyncio.to_thread(os.read, reader, 1 << 20):
            pass
        os.close(reader)
        assert [port.occupant for port in await looking] == [None, None]


# ---------------------------------------------------------------- scripted


class Fake:
    """A QEMU with one root port, made of what its monitor answers."""

    def __init__(self) -> None:
        self.devices: dict[str, str] = {"port0": "pcie-root-port"}
        self.anonymous: dict[str, str] = {}
        self.sysfsdev: dict[str, str] = {}
        self.pci: Iterator[list[dict[str, Any]]] = iter(())
        self.on_add: list[dict[str, object]] = []
        self.on_del: list[list[dict[str, object]]] = []
        self.asked_to_go = 0
        self.looked = 0
        self.peer: Peer | None = None
        self.added = asyncio.Event()
        self.answer_add = asyncio.Event()
        self.answer_add.set()

    async def __call__(self, peer: Peer) -> None:
        await peer.greet()
        self.peer = peer
        while True:
            command = await peer.command()
            name = command["execute"].replace("-", "_")
            reply = await getattr(self, name)(peer, **command.get("arguments", {}))
            await peer.send({"id": command["id"], **reply})

    async def qom_list(self, _peer: Peer, path: str) -> dict[str, object]:
        match path.split("/")[2:]:
            case ["peripheral"]:
                self.looked += 1
                found = [(name, f"child<{kind}>") for name, kind in self.devices.items()]
            case ["peripheral-anon"]:
                found = [(name, f"child<{kind}>") for name, kind in self.anonymous.items()]
            case ["peripheral", "port0", "port0"]:
                inside = [kind for name, kind in self.devices.items() if name != "port0"]
                found = [(f"child[{n}]", f"link<{kind}>") for n, kind in enumerate(inside)]
            case _:
                found = []
        return {"return": [{"name": name, "type": kind} for name, kind in found]}

    async def qom_get(self, _peer: Peer, path: str, property: str) -> dict[str, object]:  # noqa: A002
        name = path.rsplit("/", 1)[1]
        if property == "sysfsdev" and name in self.sysfsdev:
            return {"return": self.sysfsdev[name]}
        return {"error": {"class": "GenericError", "desc": "no property"}}

    async def device_add(self, _peer: Peer, **arguments: str) -> dict[str, object]:
        self.added.set()
        await self.answer_add.wait()
        if self.on_add:
            return self.on_add.pop(0)
        self.devices[arguments["id"]] = arguments["driver"]
        return {"return": {}}

    async def device_del(self, peer: Peer, id: str) -> dict[str, object]:  # noqa: A002
        self.asked_to_go += 1
        answer: dict[str, object] = {"return": {}}
        for message in self.on_del.pop(0) if self.on_del else []:
            if message.get("event") == "DEVICE_DELETED":
                self.devices.pop(id, None)
            if "event" in message:
                await peer.send(message)
            else:
                answer = message
        return answer

    async def query_pci(self, _peer: Peer) -> dict[str, object]:
        return {"return": next(self.pci)}


def event(name: str, device: str) -> dict[str, object]:
    return {"event": name, "data": {"device": device, "path": "/x"}, "timestamp": {}}


@asynccontextmanager
async def faked(serve: Serve, script: Script) -> AsyncIterator[RunningGuest]:
    async with serve(script) as path:
        yield RunningGuest("g", path.parent, State.RUNNING)


@pytest.fixture
def fake() -> Fake:
    return Fake()


def buses(*regions: tuple[int, str, int]) -> list[dict[str, Any]]:
    shown = [
        {"bar": bar, "type": kind, "size": 4096, "address": address}
        for bar, kind, address in regions
    ]
    device = {"qdev_id": "rng", "slot": 0, "regions": shown}
    bridge = {"bus": {"number": 0, "secondary": 1}, "devices": [device]}
    port = {"qdev_id": "port0", "regions": [], "pci_bridge": bridge}
    return [{"bus": 0, "devices": [{"qdev_id": "", "regions": []}, port]}]


NOTHING: list[dict[str, Any]] = [{"bus": 0, "devices": []}]


async def test_taken_when_every_memory_bar_decodes(serve: Serve, fake: Fake) -> None:
    fake.pci = iter(
        [
            NOTHING,
            buses((0, "memory", -1), (2, "memory", -1), (6, "memory", -1)),
            buses((0, "memory", 0x1000), (2, "memory", -1), (4, "io", 0xC000)),
            buses((0, "memory", 0x1000), (2, "memory", 0x2000), (4, "io", -1), (6, "memory", -1)),
        ]
    )
    async with faked(serve, fake) as found:
        assert await plug(found, RNG, wait_guest=True) == "port0"
    assert next(fake.pci, None) is None


async def test_taken_with_nothing_but_io(serve: Serve, fake: Fake) -> None:
    fake.pci = iter([buses((0, "io", -1)), buses((0, "io", 0xC000))])
    async with faked(serve, fake) as found:
        await plug(found, RNG, wait_guest=True)
    assert next(fake.pci, None) is None


MIB = 1 << 20
CLOSED = {"base": 0xFFF00000, "limit": 0xFFFFF}


def behind(windows: dict[str, Any], *regions: dict[str, Any]) -> list[dict[str, Any]]:
    """What ``query-pci`` answers about one device behind one port."""
    device = {"qdev_id": "rng", "slot": 0, "regions": list(regions)}
    closed = {"memory_range": CLOSED, "prefetchable_range": CLOSED}
    bus = {"number": 0, "secondary": 1, **closed, **windows}
    bridge = {"bus": bus, "devices": [device]}
    return [{"bus": 0, "devices": [{"qdev_id": "port0", "regions": [], "pci_bridge": bridge}]}]


def bar(number: int, size: int, address: int = -1, *, kind: str = "") -> dict[str, Any]:
    return {
        "bar": number,
        "type": "memory",
        "size": size,
        "address": address,
        "prefetch": "pref" in kind,
        "mem_type_64": "64" in kind,
    }


def window(base: int, size: int) -> dict[str, int]:
    return {"base": base, "limit": base + size - 1}


#: As Debian 13's firmware and the guest's Linux left it, see ``mdev_orchestrator.qemu.command``.
HYPERTRANSPORT = {
    "memory_range": window(0xFE800000, 2 * MIB),
    "prefetchable_range": window(0xFFB0000000, 256 * MIB),
}


async def test_a_bar_that_the_guest_gave_no_address(serve: Serve, fake: Fake) -> None:
    """Decoding is on, so the guest has booted, and it has a driver."""
    shown = behind(HYPERTRANSPORT, bar(0, 4096), bar(2, 2 * MIB, 0xFE800000, kind="pref64"))
    fake.pci = itertools.repeat(shown)
    async with faked(serve, fake) as found:
        with pytest.raises(errors.DeadlineError, match="could not give") as caught:
            await plug(found, RNG, deadline=0.5, wait_guest=True)
    assert "BAR 0 (4K) of rng an address" in caught.value.message
    assert "0xfe800000-0xfe9fffff and 0xffb0000000-0xffbfffffff" in caught.value.message
    assert "--hotplug-window" in caught.value.hint
    assert caught.value.outcome is Outcome.DONE


@pytest.mark.parametrize(
    ("windows", "bars", "left"),
    [
        ({}, [bar(0, 4096)], "BAR 0 (4K)"),
        ({"prefetchable_range": window(1 << 32, 256 * MIB)}, [bar(0, 4096)], "BAR 0 (4K)"),
        (HYPERTRANSPORT, [bar(2, 512 * MIB, kind="pref64")], "BAR 2 (512M)"),
        (HYPERTRANSPORT, [bar(2, 4 * MIB, kind="pref")], "BAR 2 (4M)"),
        (HYPERTRANSPORT, [bar(0, MIB), bar(1, 2 * MIB), bar(3, MIB)], "BAR 0 (1M) and BAR 3 (1M)"),
        (  # a window that does not begin where such a BAR may
            {"memory_range": window(0xFE900000, 3 * MIB)},
            [bar(0, 2 * MIB), bar(1, MIB)],
            "BAR 1 (1M)",
        ),
        (HYPERTRANSPORT, [bar(0, 4096), bar(2, 256 * MIB, kind="pref64")], None),
        (HYPERTRANSPORT, [bar(0, MIB, kind="pref"), bar(1, MIB)], None),
        ({"prefetchable_range": window(0xD0000000, MIB)}, [bar(0, MIB, kind="pref")], None),
    ],
)
async def test_bars_that_do_not_fit_into_the_ports_windows(
    serve: Serve, fake: Fake, windows: dict[str, Any], bars: list[dict[str, Any]], left: str | None
) -> None:
    """Decoding is off. If they fit, the guest may still boot, and that is what is said."""
    fake.pci = itertools.repeat(behind(windows, *bars))
    async with faked(serve, fake) as found:
        with pytest.raises(errors.DeadlineError) as caught:
            await plug(found, RNG, deadline=0.2, wait_guest=True)
    if left is None:
        assert "may still boot" in caught.value.hint
    else:
        assert f"could not give {left} of rng" in caught.value.message


async def test_the_last_question_comes_too_late_to_be_answered(serve: Serve, fake: Fake) -> None:
    """What the guest was last seen to have done is told, and not that QEMU is silent."""

    async def query_pci(_peer: Peer) -> dict[str, object]:
        if next(answers):
            await asyncio.sleep(2)
        return {"return": NOTHING}

    answers = iter([False, True])
    fake.query_pci = query_pci  # type: ignore[method-assign]
    async with faked(serve, fake) as found:
        with pytest.raises(errors.DeadlineError, match="has not taken rng in time"):
            await plug(found, RNG, deadline=0.5, wait_guest=True)


async def test_pci_that_is_nonsense(serve: Serve, fake: Fake) -> None:
    fake.pci = iter([[{"devices": 3}]])
    async with faked(serve, fake) as found:
        with pytest.raises(errors.QemuError, match="query-pci answered something odd"):
            await plug(found, RNG, wait_guest=True)


async def test_qemu_takes_a_device_and_has_it_not(serve: Serve, fake: Fake) -> None:
    fake.on_add = [{"return": {}}]
    async with faked(serve, fake) as found:
        with pytest.raises(errors.QemuError, match="took rng, but does not list it") as caught:
            await plug(found, RNG)
    assert caught.value.outcome is Outcome.UNKNOWN


async def test_a_race_for_the_id(serve: Serve, fake: Fake) -> None:
    fake.on_add = [{"error": {"class": "GenericError", "desc": "Duplicate device ID 'rng'"}}]
    async with faked(serve, fake) as found:
        with pytest.raises(errors.RequestError, match="guest g has rng already"):
            await plug(found, RNG)


async def test_cancelled_while_it_is_plugged(serve: Serve, fake: Fake) -> None:
    fake.answer_add.clear()
    async with faked(serve, fake) as found:
        task = asyncio.ensure_future(plug(found, RNG))
        await fake.added.wait()
        task.cancel()
        asyncio.get_running_loop().call_soon(fake.answer_add.set)
        with pytest.raises(asyncio.CancelledError) as caught:
            await task
    assert "has rng by now; mdo detach" in caught.value.__notes__[0]


async def test_device_add_is_never_answered(serve: Serve, fake: Fake) -> None:
    """Fault 1: the run closed as undone, and QEMU had the device."""
    fake.answer_add.clear()
    async with faked(serve, fake) as found:
        with pytest.raises(errors.DeadlineError, match="no reply to device_add") as caught:
            await plug(found, RNG, deadline=0.5)
        assert caught.value.outcome is Outcome.UNKNOWN
        assert "not known" in caught.value.hint
        fake.answer_add.set()


async def test_device_add_is_answered_by_a_hang_up(serve: Serve, fake: Fake) -> None:
    async def hangs_up(peer: Peer, **_: str) -> dict[str, object]:
        raise ConnectionError

    fake.device_add = hangs_up  # type: ignore[method-assign]
    async with faked(serve, fake) as found:
        with pytest.raises(errors.QemuError, match="device_add: the monitor hung up") as caught:
            await plug(found, RNG)
        assert caught.value.outcome is Outcome.UNKNOWN


async def test_what_is_wrong_before_device_add_has_no_effect(serve: Serve, fake: Fake) -> None:
    fake.devices["port0"] = "edu"
    async with faked(serve, fake) as found:
        with pytest.raises(errors.RequestError, match="has no room") as caught:
            await plug(found, RNG)
    assert caught.value.outcome is Outcome.NO_EFFECT
    assert not fake.added.is_set()


async def test_the_deadline_is_for_the_whole(serve: Serve, fake: Fake) -> None:
    """Fault 11: each phase had all of it. When it is over, nothing more is begun."""
    async with faked(serve, fake) as found, connect(found.qmp_socket, "guest g") as qmp:
        now = asyncio.get_running_loop().time()
        with pytest.raises(errors.DeadlineError, match="no time was left") as caught:
            await hotplug.plug_by(qmp, RNG, now)
    assert caught.value.outcome is Outcome.NO_EFFECT
    assert not fake.added.is_set()


async def test_a_device_that_is_plugged_and_not_taken_is_done(serve: Serve, fake: Fake) -> None:
    fake.pci = itertools.repeat(NOTHING)
    async with faked(serve, fake) as found:
        with pytest.raises(errors.DeadlineError, match="it stays plugged") as caught:
            await plug(found, RNG, deadline=0.5, wait_guest=True)
    assert caught.value.outcome is Outcome.DONE


@pytest.fixture
def plugged(fake: Fake) -> Fake:
    fake.devices[f"mdev-{M1}"] = "vfio-pci"
    fake.sysfsdev[f"mdev-{M1}"] = f"/sys/bus/mdev/devices/{M1}"
    fake.devices["whole"] = "vfio-pci"
    fake.sysfsdev["whole"] = "/sys/bus/pci/devices/0000:01:00.0"
    return fake


DEVICE = f"mdev-{M1}"


async def test_mdevs_are_known_by_sysfsdev(serve: Serve, plugged: Fake) -> None:
    plugged.devices["nvidia0"] = plugged.devices.pop(DEVICE)
    plugged.sysfsdev["nvidia0"] = plugged.sysfsdev.pop(DEVICE)
    async with faked(serve, plugged) as found, connect(found.qmp_socket, "guest g") as qmp:
        [one] = await hotplug.mdevs(qmp)
    assert (one.uuid, one.device_id, one.driver) == (M1, "nvidia0", "vfio-pci")


async def test_an_mdev_may_have_another_id(
    serve: Serve, plugged: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A guest that was adopted has what its starter called it."""
    plugged.devices["nvidia0"] = plugged.devices.pop(DEVICE)
    plugged.sysfsdev["nvidia0"] = plugged.sysfsdev.pop(DEVICE)
    plugged.on_del = [[event("DEVICE_DELETED", "nvidia0")]]
    async with faked(serve, plugged) as found:
        monkeypatch.setattr(hotplug, "find_running", lambda *_: found)
        await hotplug.detach(Machine(), "g", M1)
    assert "nvidia0" not in plugged.devices


async def test_what_an_id_says_is_not_believed(
    serve: Serve, plugged: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugged.sysfsdev[DEVICE] = plugged.sysfsdev["whole"]
    async with faked(serve, plugged) as found:
        monkeypatch.setattr(hotplug, "find_running", lambda *_: found)
        with pytest.raises(errors.UnknownError, match=f"guest g has no mdev {M1}"):
            await hotplug.detach(Machine(), "g", M1)
    assert plugged.asked_to_go == 0


async def test_an_mdev_without_an_id_cannot_be_unplugged(
    serve: Serve, plugged: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugged.anonymous["device[0]"] = plugged.devices.pop(DEVICE)
    plugged.sysfsdev["device[0]"] = plugged.sysfsdev.pop(DEVICE)
    async with faked(serve, plugged) as found:
        monkeypatch.setattr(hotplug, "find_running", lambda *_: found)
        with pytest.raises(errors.RequestError, match=f"guest g: mdev {M1} has no id in QEMU"):
            await hotplug.detach(Machine(), "g", M1)
    assert plugged.asked_to_go == 0


async def test_let_go(serve: Serve, plugged: Fake) -> None:
    plugged.on_del = [[event("DEVICE_DELETED", "other"), event("DEVICE_DELETED", DEVICE)]]
    async with faked(serve, plugged) as found:
        await unplug(found, DEVICE)
    assert plugged.asked_to_go == 1


async def test_let_go_before_device_del_is_answered(serve: Serve, plugged: Fake) -> None:
    """The listener is there before the question; and the last device_del finds nothing."""
    gone: dict[str, object] = {"error": {"class": "DeviceNotFound", "desc": "Device not found"}}
    plugged.on_del = [[event("DEVICE_DELETED", DEVICE), gone]]
    async with faked(serve, plugged) as found:
        await unplug(found, DEVICE)


async def test_already_on_its_way(serve: Serve, plugged: Fake) -> None:
    busy = {"class": "GenericError", "desc": "Device x is already in the process of unplug"}
    plugged.on_del = [[{"error": busy}, event("DEVICE_DELETED", DEVICE)]]
    async with faked(serve, plugged) as found:
        await unplug(found, DEVICE)


async def test_the_guest_refuses(serve: Serve, plugged: Fake) -> None:
    plugged.on_del = [[event("DEVICE_UNPLUG_GUEST_ERROR", DEVICE)]]
    async with faked(serve, plugged) as found:
        with pytest.raises(errors.BusyError, match="guest g refuses to let go") as caught:
            await unplug(found, DEVICE)
    assert caught.value.outcome is Outcome.NO_EFFECT
    assert DEVICE in plugged.devices


@pytest.mark.parametrize(
    ("asked", "outcome"), [(0, Outcome.NO_EFFECT), (1, Outcome.UNKNOWN)], ids=["at once", "again"]
)
async def test_qemu_refuses_to_unplug(
    serve: Serve, plugged: Fake, monkeypatch: pytest.MonkeyPatch, asked: int, outcome: Outcome
) -> None:
    """When it was asked before, that question is open all the same."""
    monkeypatch.setattr(hotplug, "ASK_AGAIN_SECONDS", 0.05)
    refusal = {"error": {"class": "GenericError", "desc": "does not support hotplug"}}
    plugged.on_del = [*[[]] * asked, [refusal]]
    async with faked(serve, plugged) as found:
        with pytest.raises(errors.CommandError, match="does not support hotplug") as caught:
            await unplug(found, DEVICE)
    assert caught.value.outcome is outcome


async def test_device_del_is_never_answered(
    serve: Serve, plugged: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def hangs(peer: Peer, **_: str) -> dict[str, object]:
        await peer.hang()
        raise ConnectionError

    plugged.device_del = hangs  # type: ignore[method-assign]
    async with faked(serve, plugged) as found:
        monkeypatch.setattr(hotplug, "find_running", lambda *_: found)
        with pytest.raises(errors.DeadlineError, match="no reply to device_del") as caught:
            await hotplug.detach(Machine(), "g", M1, 0.3)
        assert caught.value.outcome is Outcome.UNKNOWN
        assert marks(found) == [f"asked-{M1}"]


async def test_the_looker_waits_no_longer_than_it_may(
    serve: Serve, plugged: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 23: 30 seconds were waited for, whatever the deadline was."""
    async with asked(serve, plugged, monkeypatch) as found:
        with pytest.raises(errors.DeadlineError, match="may do so yet") as caught:
            await hotplug.await_pending_unplug(found, M1, deadline=0.3)
        assert caught.value.outcome is Outcome.UNKNOWN
        assert marks(found) == [f"asked-{M1}"]


async def test_the_event_is_lost(serve: Serve, plugged: Fake) -> None:
    async def unheard(peer: Peer) -> None:
        await peer.greet()
        while True:
            command = await peer.command()
            value: object = [] if command["execute"] == "qom-list" else {}
            await peer.send({"return": value, "id": command["id"]})

    async with faked(serve, unheard) as found:
        await unplug(found, DEVICE, 0.2)


async def test_asked_again_when_the_guest_did_not_hear(
    serve: Serve, plugged: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hotplug, "ASK_AGAIN_SECONDS", 0.05)
    plugged.on_del = [[], [], [event("DEVICE_DELETED", DEVICE)]]
    async with faked(serve, plugged) as found:
        await unplug(found, DEVICE)
    assert plugged.asked_to_go == 3


@asynccontextmanager
async def asked(
    serve: Serve, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[RunningGuest]:
    """A guest that was asked to let go by a command that was interrupted then."""
    async with faked(serve, fake) as found:
        monkeypatch.setattr(hotplug, "find_running", lambda *_: found)
        detaching = asyncio.ensure_future(hotplug.detach(Machine(), "g", M1))
        while not fake.asked_to_go:
            await asyncio.sleep(0.01)
        detaching.cancel()
        with pytest.raises(asyncio.CancelledError):
            await detaching
        assert marks(found) == [f"asked-{M1}"]
        yield found


async def test_a_guest_that_has_let_go_meanwhile_has_no_open_question(
    serve: Serve, plugged: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with asked(serve, plugged, monkeypatch) as found:
        del plugged.devices[DEVICE], plugged.sysfsdev[DEVICE]
        with pytest.raises(errors.UnknownError, match="has no mdev"):
            await hotplug.detach(Machine(), "g", M1)
        assert marks(found) == []


def marks(found: RunningGuest) -> list[str]:
    return [path.name for path in found.directory.glob("asked-*")]


@pytest.mark.parametrize("lets_go", [True, False])
async def test_a_guest_answers_when_the_asker_was_interrupted(
    serve: Serve, plugged: Fake, monkeypatch: pytest.MonkeyPatch, lets_go: bool
) -> None:
    """What it was asked cannot be taken back, so it is waited for."""
    async with asked(serve, plugged, monkeypatch) as found:
        looked = plugged.looked
        keeping = asyncio.ensure_future(hotplug.await_pending_unplug(found, M1))
        while plugged.looked < looked + 2:
            await asyncio.sleep(0.01)
        assert plugged.peer
        await plugged.peer.send(
            event("DEVICE_DELETED" if lets_go else "DEVICE_UNPLUG_GUEST_ERROR", DEVICE)
        )
        assert await keeping is not lets_go
        assert marks(found) == []
        assert plugged.asked_to_go == 1
        if lets_go:
            del plugged.devices[DEVICE]
        assert await hotplug.await_pending_unplug(found, M1) is not lets_go  # at once


@pytest.mark.parametrize("late", [0.0, 1.0])
async def test_a_guest_that_does_not_answer_keeps_what_it_has(
    serve: Serve, plugged: Fake, monkeypatch: pytest.MonkeyPatch, late: float
) -> None:
    """Neither to a look that is soon, and waits, nor to a later one."""
    monkeypatch.setattr(hotplug, "OBEY_SECONDS", 0.5)
    async with asked(serve, plugged, monkeypatch) as found:
        await asyncio.sleep(late)
        assert await hotplug.await_pending_unplug(found, M1)
        assert marks(found) == []


async def test_a_guest_may_let_go_after_the_deadline(
    serve: Serve, plugged: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with faked(serve, plugged) as found:
        monkeypatch.setattr(hotplug, "find_running", lambda *_: found)
        with pytest.raises(errors.DeadlineError, match="it still has the device") as caught:
            await hotplug.detach(Machine(), "g", M1, 0.2)
        assert caught.value.outcome is Outcome.UNKNOWN
        assert marks(found) == [f"asked-{M1}"]
        plugged.on_del = [[event("DEVICE_DELETED", DEVICE)]]
        await hotplug.detach(Machine(), "g", M1)
        assert marks(found) == []


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        ("vfio x: error getting device from group 12: Input/output error", "dmesg"),
        ("vfio x: failed to open /dev/vfio/3: Device or resource busy", "guest list"),
        ("vfio x: failed to open /dev/vfio/3: Permission denied", "doctor"),
        ("vfio /sys/x/vfio-dev: Failed to open /dev/vfio/devices/vfio3", "doctor"),
        ("Could not open '/dev/iommu': Permission denied", "doctor"),
        ("error bind device fd=9 to iommufd=8: Device or resource busy", "guest list"),
        ("Could not access KVM kernel module: No such file or directory", "tcg"),
        ("something else", ""),
    ],
)
def test_remedies(words: str, advice: str) -> None:
    assert advice in remedy(words)
    assert bool(advice) == bool(remedy(words))
