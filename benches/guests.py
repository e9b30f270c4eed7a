# SPDX-License-Identifier: GPL-2.0-or-later
"""Hotplug and guests: by the library, by mdo, by a bare QMP client, and by libvirt.

Runs in the lab on mvgpu. All guests have the same kernel, memory, machine, ports and QEMU, and KVM
as far as L1 has it. What counts as the end is the same for all ways, and what the guest has is
seen by one observer, on a monitor that no other client uses:

=========  =======================================================================================
attach     QEMU has realised the device: the command or call has returned
taken      the guest has given the device's BARs their addresses and decodes them
detach     QEMU has the device no more, and the command or call has returned
start      QEMU answers QMP: the command or call has returned
booted     the guest has taken the device that it was started with
together   so many guests with a device each: all commands have returned
=========  =======================================================================================

===========  =====================================================================================
bare         a socket and JSON: the client sends what must be sent, and waits for what must come
library      ``attach``, ``detach``, ``apply``, in an event loop that runs already
mdo          a process each, Python's start and imports included
virsh        a process each, and a ``libvirtd`` that stays
===========  =====================================================================================

At the start of a guest ours create its device too; for the others it is there.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import bench

from mdev_lab import libvirtd

TYPE, MEMORY = "mvgpu-11", 128
PORTS = 4
MVGPU = "grid_parents=2 igd_parents=0"
MDEVS = Path("/sys/bus/mdev/devices")
ROM = 6  # QEMU's number of the BAR that is the expansion ROM
IDLE_LOOKS = 10  # in a row, a tenth of a second apart
PATIENCE = 1800  # seconds: nothing is measured by it, and a busy machine is slow
DOMAIN = """<domain type='{accel}' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
<name>{name}</name><memory unit='MiB'>{memory}</memory><vcpu>1</vcpu>
<os><type arch='x86_64' machine='q35'>hvm</type>
<kernel>{kernel}</kernel><initrd>{initrd}</initrd><cmdline>{append}</cmdline></os>
<features><acpi/></features>
<on_poweroff>destroy</on_poweroff>
<devices><emulator>{qemu}</emulator>
{ports}
<controller type='usb' model='none'/>
<memballoon model='none'/>
<serial type='pty'/>
{hostdev}</devices>
<qemu:commandline><qemu:arg value='-qmp'/>
<qemu:arg value='unix:{monitor},server=on,wait=off'/></qemu:commandline></domain>
"""
HOSTDEV = """<hostdev mode='subsystem' type='mdev' managed='no' model='vfio-pci'>
<source><address uuid='{uuid}'/></source></hostdev>
"""


class Qmp:
    """The least that talks to a monitor."""

    def __init__(self, path: Path, pause: float = 0.01) -> None:
        """:param pause: Seconds between two looks whether QEMU listens."""
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(PATIENCE)
        end = time.monotonic() + PATIENCE
        while True:
            try:
                self.socket.connect(str(path))
                break
            except OSError:
                if time.monotonic() > end:
                    raise
                time.sleep(pause)
        self.file = self.socket.makefile("rwb")
        self.file.readline()
        self.ask("qmp_capabilities")

    def ask(self, command: str, **arguments: object) -> Any:  # noqa: ANN401 - as it comes
        """Send a command and wait for its answer; events before it are left out."""
        self.file.write(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        self.file.flush()
        while True:
            answer = json.loads(self.file.readline())
            if "error" in answer:
                raise RuntimeError(answer["error"]["desc"])
            if "return" in answer:
                return answer["return"]

    def event(self, name: str) -> None:
        """Wait for an event."""
        while json.loads(self.file.readline()).get("event") != name:
            pass

    def close(self) -> None:
        """Hang up."""
        self.file.close()
        self.socket.close()


def taken(buses: Any, device: str) -> bool:  # noqa: ANN401 - as it comes
    """Whether the answer to ``query-pci`` shows that the guest has taken a device."""
    pending = [function for bus in buses for function in bus["devices"]]
    while pending:
        function = pending.pop()
        pending += function.get("pci_bridge", {}).get("devices", [])
        if function["qdev_id"] == device:
            bars = [r for r in function["regions"] if r["type"] == "memory" and r["bar"] != ROM]
            return all(bar["address"] != -1 for bar in bars)
    return False


def wait_taken(qmp: Qmp, device: str) -> None:
    """Look every 20 ms, the same for all ways."""
    end = time.monotonic() + PATIENCE
    while not taken(qmp.ask("query-pci"), device):
        if time.monotonic() > end:
            raise TimeoutError(device)
        time.sleep(0.02)


def wait_gone(qmp: Qmp, device: str) -> bool:
    """The same until QEMU has it no more; whether it was there."""
    end = time.monotonic() + PATIENCE
    there = False
    while device in json.dumps(qmp.ask("query-pci")):
        there = True
        if time.monotonic() > end:
            raise TimeoutError(device)
        time.sleep(0.02)
    return there


def wait_idle(qmp: Qmp) -> None:
    """Wait until a guest's kernel has nothing to do: it has booted, and done what it missed."""
    end = time.monotonic() + PATIENCE
    idle = 0
    while idle < IDLE_LOOKS:
        state = qmp.ask("human-monitor-command", **{"command-line": "info registers"})
        idle = idle + 1 if "HLT=1" in state and "RIP=ffffffff" in state else 0
        if time.monotonic() > end:
            raise TimeoutError(state)
        time.sleep(0.1)  # QEMU has no event for it


def make_mdevs(count: int) -> list[UUID]:
    """Devices by bare writes, on each parent as many."""
    parents = sorted(Path("/sys/class/mdev_bus").iterdir())
    made = [uuid4() for _ in range(count)]
    for number, uuid in enumerate(made):
        parent = parents[number % len(parents)]
        (parent / "mdev_supported_types" / TYPE / "create").write_text(str(uuid))
    return made


def remove_mdevs() -> None:
    """All devices that there are."""
    for path in MDEVS.iterdir():
        (path / "remove").write_text("1")


# ---- the ways -----------------------------------------------------------------------------------


class Guests:
    """Guests of one name by one way, described when it is made and not yet started.

    :ivar names: Of the guests.
    """

    def __init__(self, place: Path, name: str, count: int, *, device: bool) -> None:
        """:param device: Whether each has one, which is made now unless the way makes it."""
        from mdev_lab import l2

        self.place, self.name, self.device = place, name, device
        self.names = [f"{name}{number}" for number in range(count)]
        self.kernel, self.initrd = os.environ["MDO_LAB_KERNEL"], os.environ["MDO_LAB_INITRD"]
        self.append = l2.APPEND
        self.describe()

    def describe(self) -> None:
        """Write what the start needs."""
        raise NotImplementedError

    def start(self) -> None:
        """Start all; returns when each answers QMP."""
        raise NotImplementedError

    def stop(self) -> None:
        """End all at once, without asking them."""
        raise NotImplementedError

    def attach(self, uuid: UUID) -> None:
        """Plug a device into the first guest."""
        raise NotImplementedError

    def detach(self, uuid: UUID) -> None:
        """Unplug it, until QEMU has closed it."""
        raise NotImplementedError

    def look(self) -> Qmp:
        """The observer's monitor of the first guest."""
        return Qmp(self.place / f"{self.names[0]}.look")

    def say(self, command: str) -> None:
        """Give the first guest's QEMU a command, by the observer's monitor."""
        with contextlib.closing(self.look()) as look:
            look.ask(command)

    def id(self, uuid: UUID) -> str:
        """What QEMU calls the device."""
        from mdev_orchestrator.qemu.command import device_id

        return device_id(uuid)

    def mdevs(self) -> list[UUID | None]:
        """The device of each."""
        return [*make_mdevs(len(self.names))] if self.device else [None] * len(self.names)


class Bare(Guests):
    """QEMU's command line as ``mdo`` would write it, and a monitor."""

    def describe(self) -> None:
        """A command for each."""
        self.commands = [self.command(*of) for of in zip(self.names, self.mdevs(), strict=True)]

    def command(self, name: str, uuid: UUID | None) -> list[str]:
        """One guest's."""
        from mdev_orchestrator.qemu import command

        words = ["qemu-system-x86_64", "-name", name, "-machine", "q35"]
        words += [*command.accelerators("auto"), "-m", f"{MEMORY}M", "-smp", "1"]
        words += ["-nodefaults", "-no-user-config", "-display", "none", "-serial", "null"]
        for monitor in ("qmp", "look"):
            words += ["-qmp", f"unix:{self.place}/{name}.{monitor},server=on,wait=off"]
        words += ["-kernel", self.kernel, "-initrd", self.initrd, "-append", self.append]
        for number in range(PORTS + self.device):
            words += command.root_port(number, 256 << 20)
        if uuid is not None:
            options = f"id={self.id(uuid)},sysfsdev={MDEVS}/{uuid},bus=port0"
            words += ["-device", f"vfio-pci,{options}"]
        return words

    def start(self) -> None:
        """All at the same time."""
        self.processes = [
            subprocess.Popen(words, stdout=subprocess.DEVNULL) for words in self.commands
        ]
        self.monitors = [Qmp(self.place / f"{name}.qmp") for name in self.names]

    def stop(self) -> None:
        """By signals."""
        for process, monitor in zip(self.processes, self.monitors, strict=True):
            process.kill()
            process.wait()
            monitor.close()

    def attach(self, uuid: UUID) -> None:
        """One command."""
        options = {"driver": "vfio-pci", "id": self.id(uuid), "bus": "port0"}
        self.monitors[0].ask("device_add", sysfsdev=f"{MDEVS}/{uuid}", **options)

    def detach(self, uuid: UUID) -> None:
        """A command and an event."""
        self.monitors[0].ask("device_del", id=self.id(uuid))
        self.monitors[0].event("DEVICE_DELETED")


class Library(Guests):
    """A spec, applied in this process."""

    runner: asyncio.Runner

    def describe(self) -> None:
        """One spec for all."""
        import mdev_orchestrator as mdo

        self.machine = mdo.open()
        device = f'[[guest.mdev]]\ntype = "{TYPE}"\n' if self.device else ""
        guests = [
            f'[[guest]]\nname = "{name}"\nmemory = "{MEMORY}M"\nhotplug_ports = {PORTS}\n'
            f'kernel = "{self.kernel}"\ninitrd = "{self.initrd}"\nappend = "{self.append}"\n'
            for name in self.names
        ]
        self.file = self.place / f"{self.name}.toml"
        self.file.write_text("\n".join([f'name = "{self.name}"', *(g + device for g in guests)]))
        self.spec = mdo.load(str(self.file))

    def start(self) -> None:
        """One call."""
        self.runner.run(self.machine.apply(self.spec))

    def stop(self) -> None:
        """One call."""
        self.runner.run(self.machine.destroy(self.name, force=True, deadline=0))

    def attach(self, uuid: UUID) -> None:
        """One call."""
        self.runner.run(self.machine.attach(self.names[0], uuid))

    def detach(self, uuid: UUID) -> None:
        """One call."""
        self.runner.run(self.machine.detach(self.names[0], uuid))

    def look(self) -> Qmp:
        """The monitor for questions."""
        from mdev_orchestrator.qemu import process

        return Qmp(process.find(self.machine, self.names[0]).query_socket)


class Mdo(Library):
    """The same spec, by commands."""

    def start(self) -> None:
        """One command."""
        bench.run(["mdo", "apply", self.file])

    def attach(self, uuid: UUID) -> None:
        """One command."""
        bench.run(["mdo", "attach", self.names[0], str(uuid)])

    def detach(self, uuid: UUID) -> None:
        """One command."""
        bench.run(["mdo", "detach", self.names[0], str(uuid)])


class Virsh(Guests):
    """Domains of libvirt's."""

    def describe(self) -> None:
        """A file for each domain."""
        self.hostdev = self.place / "hostdev.xml"
        root = "<controller type='pci' model='pcie-root'/>\n"
        port = "<controller type='pci' model='pcie-root-port'/>\n"
        for name, uuid in zip(self.names, self.mdevs(), strict=True):
            (self.place / f"{name}.xml").write_text(
                DOMAIN.format(
                    accel="kvm" if Path("/dev/kvm").exists() else "qemu",
                    name=name,
                    memory=MEMORY,
                    kernel=self.kernel,
                    initrd=self.initrd,
                    append=self.append,
                    qemu=shutil.which("qemu-system-x86_64"),
                    ports=root + port * (PORTS + self.device),
                    hostdev=HOSTDEV.format(uuid=uuid) if uuid else "",
                    monitor=self.place / f"{name}.look",
                )
            )

    def start(self) -> None:
        """A command for each, all at the same time."""
        files = [self.place / f"{name}.xml" for name in self.names]
        with ThreadPoolExecutor(len(files)) as pool:
            list(pool.map(lambda file: bench.run(["virsh", "create", file]), files))

    def stop(self) -> None:
        """A command for each."""
        for name in self.names:
            bench.run(["virsh", "destroy", name])

    def attach(self, uuid: UUID) -> None:
        """One command."""
        self.hostdev.write_text(HOSTDEV.format(uuid=uuid))
        bench.run(["virsh", "attach-device", self.names[0], self.hostdev, "--live"])

    def detach(self, uuid: UUID) -> None:
        """One command."""
        self.hostdev.write_text(HOSTDEV.format(uuid=uuid))
        bench.run(["virsh", "detach-device", self.names[0], self.hostdev, "--live"])

    def id(self, uuid: UUID) -> str:
        """It counts its devices."""
        del uuid
        return "hostdev0"


WAYS: dict[str, type[Guests]] = {"bare": Bare, "library": Library, "mdo": Mdo, "virsh": Virsh}


# ---- the works ----------------------------------------------------------------------------------


def hotplug(figures: bench.Figures, place: Path) -> None:
    """One device in and out of a guest that has booted and does nothing.

    The guests of the other ways are paused meanwhile: even one that does nothing wants a share of
    L1's processor, the larger the longer a way computes.
    """
    guests = {way: make(place, f"{way}-plug", 1, device=False) for way, make in WAYS.items()}
    for own in guests.values():
        own.start()
        with contextlib.closing(own.look()) as look:
            wait_idle(look)
        own.say("stop")
    for way in figures.turns("hotplug", WAYS):
        own = guests[way]
        own.say("cont")
        (uuid,) = make_mdevs(1)
        bench.rest()
        with contextlib.closing(own.look()) as look:
            wait_idle(look)
        begun = time.perf_counter()
        own.attach(uuid)
        figures.note("attach", way, time.perf_counter() - begun)
        with contextlib.closing(own.look()) as look:
            wait_taken(look, own.id(uuid))
        figures.note("taken", way, time.perf_counter() - begun)
        begun = time.perf_counter()
        own.detach(uuid)
        seconds = time.perf_counter() - begun
        with contextlib.closing(own.look()) as look:
            # virsh waits five seconds and no longer, and says that it has asked
            if wait_gone(look, own.id(uuid)):
                seconds = time.perf_counter() - begun
        figures.note("detach", way, seconds)
        own.say("stop")
        remove_mdevs()
    for own in guests.values():
        own.stop()


def start(figures: bench.Figures, place: Path) -> None:
    """One guest with a device, from nothing to its end."""
    for way in figures.turns("start", WAYS):
        own = WAYS[way](place, f"{way}-new", 1, device=True)
        bench.rest()
        begun = time.perf_counter()
        own.start()
        figures.note("start", way, time.perf_counter() - begun)
        (mdev,) = MDEVS.iterdir()
        with contextlib.closing(own.look()) as look:
            wait_taken(look, own.id(UUID(mdev.name)))
        figures.note("booted", way, time.perf_counter() - begun)
        own.stop()
        remove_mdevs()


def together(figures: bench.Figures, place: Path, count: int) -> None:
    """So many guests with a device each."""
    work = f"{count} together"
    for way in figures.turns(work, WAYS, warm=False):
        own = WAYS[way](place, f"{way}-all", count, device=True)
        with figures.timed(work, way):
            own.start()
        meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        bench.say(f"{work} by {way}: {meminfo['MemAvailable'].strip()} of L1's memory are left")
        own.stop()
        remove_mdevs()


def inside(rounds: int, counts: list[int]) -> None:
    """Measure, in L1."""
    place = bench.installed()
    libvirtd.start(place)
    figures = bench.Figures("guests", rounds, ("bare",))
    with asyncio.Runner() as Library.runner:
        hotplug(figures, place)
        start(figures, place)
        for count in counts:
            together(figures, place, count)
    figures.report()


def main() -> int:
    """Read the arguments."""
    given = bench.arguments(__doc__, rounds=5, guests=[1, 4, 16]).parse_args()
    if given.inside:
        inside(given.rounds, given.guests)
        return 0
    for program in ("virsh", "libvirtd", "virtlogd"):
        if shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin") is None:
            print(f"there is no {program}: tools/setup bench installs it", file=sys.stderr)
            return 2
    return bench.in_lab(__file__, sys.argv[1:], mvgpu=MVGPU)


if __name__ == "__main__":
    sys.exit(main())
