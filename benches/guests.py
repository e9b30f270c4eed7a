# SPDX-License-Identifier: GPL-2.0-or-later
"""Hotplug and guests: by the library, by mdo, by a bare QMP client, and by libvirt.

Runs in the lab on mvgpu. All guests have the same kernel, memory, machine, ports and QEMU, and KVM
as far as L1 has it. In every round each way has its turn, in random order. What counts as the end
is the same for all ways, and is seen by one observer of ours:

=========  =======================================================================================
attach     QEMU has realised the device: the command or call has returned
taken      the guest has given the device's BARs their addresses and decodes them
detach     QEMU has closed the device, and the command or call has returned
start      QEMU answers QMP: the command or call has returned
booted     the guest has taken the device that it was started with
together   so many guests with a device each: all commands have returned
=========  =======================================================================================

===========  =====================================================================================
bare         a socket and JSON: the client sends what must be sent, and waits for what must come
library      ``attach``, ``detach``, ``apply`` in a process that has imported them
mdo          a process each, Python's start and imports included
virsh        a process each, and a ``libvirtd`` that stays
===========  =====================================================================================

usage: guests.py [--rounds N] [--guests N…]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

ROOT = Path(__file__).resolve().parents[1]
TYPE, MEMORY = "mvgpu-11", 128
PORTS = 4
ROM = 6  # QEMU's number of the BAR that is the expansion ROM
CODE = "from mdev_orchestrator.cli.main import main; raise SystemExit(main())"
LIBVIRT = """
security_driver = "none"
user = "root"
group = "root"
cgroup_controllers = []
namespaces = []
remember_owner = 0
"""
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


def outside(arguments: list[str]) -> int:
    """Run the rest in a lab with an installed copy of the package."""
    for program in ("virsh", "libvirtd", "virtlogd"):
        if shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin") is None:
            print(f"there is no {program}: tools/setup bench installs it", file=sys.stderr)
            return 2
    lab = [sys.executable, "-c", CODE, "lab", "run", "--name", f"bench-{os.getpid()}"]
    options = ["--mvgpu", "grid_parents=2 igd_parents=0"]
    inside = [sys.executable, str(Path(__file__).resolve()), "--inside", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "python")}
    return subprocess.run([*lab, *options, "--", *inside], check=False, env=environment).returncode


class Qmp:
    """The least that talks to a monitor."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(300)
        end = time.monotonic() + 300
        while True:
            try:
                self.socket.connect(str(path))
                break
            except OSError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.01)
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
    end = time.monotonic() + 300
    while not taken(qmp.ask("query-pci"), device):
        if time.monotonic() > end:
            raise TimeoutError(device)
        time.sleep(0.02)


class Clock:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self.begun = time.perf_counter()

    def __call__(self) -> float:
        """How many by now."""
        return time.perf_counter() - self.begun


class Lab:
    """What is there while it is measured."""

    def __init__(self, place: Path) -> None:
        from mdev_orchestrator.host import sysfs
        from mdev_orchestrator.lab import l2

        self.place = place
        self.sysfs = sysfs
        self.append = l2.APPEND
        self.kernel, self.initrd = os.environ["MDO_LAB_KERNEL"], os.environ["MDO_LAB_INITRD"]
        self.parents = sorted(path.name for path in Path("/sys/class/mdev_bus").iterdir())
        self.times: dict[str, dict[str, list[float]]] = {}

    def note(self, work: str, way: str, seconds: float) -> None:
        """One figure."""
        self.times.setdefault(work, {}).setdefault(way, []).append(seconds)

    def mdevs(self, count: int) -> list[UUID]:
        """Make devices by bare writes."""
        made = []
        for number in range(count):
            uuid = uuid4()
            directory = f"/sys/class/mdev_bus/{self.parents[number % len(self.parents)]}"
            Path(f"{directory}/mdev_supported_types/{TYPE}/create").write_text(str(uuid))
            made.append(uuid)
        return made

    def remove_all(self) -> None:
        """Remove all devices."""
        for path in Path("/sys/bus/mdev/devices").iterdir():
            (path / "remove").write_text("1")

    def spec(self, name: str, count: int, uuids: list[UUID]) -> str:
        """A spec of guests."""
        words = [f'name = "{name}"']
        for number in range(count):
            words += [
                "[[guest]]",
                f'name = "{name}{number}"',
                f'memory = "{MEMORY}M"',
                f'kernel = "{self.kernel}"',
                f'initrd = "{self.initrd}"',
                f'append = "{self.append}"',
                f"hotplug_ports = {PORTS}",
            ]
            words += [f'[[guest.mdev]]\nuuid = "{u}"\ntype = "{TYPE}"' for u in uuids[number:][:1]]
        return "\n".join(words) + "\n"

    def mdo(self, *words: str) -> None:
        """One command."""
        run([sys.executable, "-c", CODE, *words])

    def domain(self, name: str, uuid: UUID | None = None) -> Path:
        """A domain's file."""
        file = self.place / f"{name}.xml"
        accel = "kvm" if Path("/dev/kvm").exists() else "qemu"
        root = "<controller type='pci' model='pcie-root'/>\n"
        port = "<controller type='pci' model='pcie-root-port'/>\n"
        file.write_text(
            DOMAIN.format(
                accel=accel,
                name=name,
                memory=MEMORY,
                kernel=self.kernel,
                initrd=self.initrd,
                append=self.append,
                qemu=shutil.which("qemu-system-x86_64"),
                ports=root + port * (PORTS + (uuid is not None)),
                hostdev="" if uuid is None else HOSTDEV.format(uuid=uuid),
                monitor=self.place / f"{name}.qmp",
            )
        )
        return file


def run(words: list[str]) -> None:
    """A process to its end."""
    done = subprocess.run(words, check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words[-4:])}: {done.stderr.strip()[-400:]}")


@contextlib.contextmanager
def libvirt(place: Path) -> Iterator[None]:
    """``libvirtd`` and ``virtlogd``, by hand."""
    Path("/etc/libvirt").mkdir(exist_ok=True)
    Path("/etc/libvirt/qemu.conf").write_text(LIBVIRT)
    # it wants the user of its Debian package, though it uses another
    for file, line in (("passwd", "64055:64055::/:/bin/false"), ("group", "64055:")):
        if "libvirt-qemu" not in (path := Path("/etc", file)).read_text():
            path.write_text(f"{path.read_text()}libvirt-qemu:x:{line}\n")
    daemons = []
    for words in (["virtlogd"], ["libvirtd", "--timeout", "0"]):
        log = (place / f"{words[0]}.log").open("wb")
        path = f"/usr/sbin/{words[0]}"
        daemons.append(subprocess.Popen([path, *words[1:]], stdout=log, stderr=log))
    try:
        end = time.monotonic() + 120
        while subprocess.run(["virsh", "version"], check=False, capture_output=True).returncode:
            if time.monotonic() > end:
                raise TimeoutError((place / "libvirtd.log").read_text())
            time.sleep(0.2)
        yield
    finally:
        for daemon in daemons:
            daemon.terminate()
            daemon.wait()


# ---- ways to have a guest -----------------------------------------------------------------------


def qemu(lab: Lab, name: str, uuid: UUID | None = None) -> tuple[subprocess.Popen[bytes], Path]:
    """QEMU as ``mdo`` would start it, with a monitor at a path."""
    from mdev_orchestrator.qemu import command

    monitor = lab.place / f"{name}.qmp"
    monitor.unlink(missing_ok=True)
    words = ["qemu-system-x86_64", "-name", name, "-machine", "q35"]
    words += [*command.accelerators("auto"), "-m", f"{MEMORY}M", "-smp", "1"]
    words += ["-nodefaults", "-no-user-config", "-display", "none", "-serial", "null"]
    words += ["-qmp", f"unix:{monitor},server=on,wait=off"]
    words += ["-kernel", lab.kernel, "-initrd", lab.initrd, "-append", lab.append]
    for number in range(PORTS + (uuid is not None)):
        words += command.root_port(number, 256 << 20)
    if uuid is not None:
        path = f"/sys/bus/mdev/devices/{uuid}"
        words += ["-device", f"vfio-pci,id={command.device_id(uuid)},sysfsdev={path},bus=port0"]
    return subprocess.Popen(words, stdout=subprocess.DEVNULL), monitor


def ours(name: str) -> Qmp:
    """A look into a guest of mdo's, by the monitor for questions."""
    from mdev_orchestrator.qemu import process

    return Qmp(process.find(name).query_socket)


class Hotplug:
    """A guest for each way, booted once, into which devices come and from which they go."""

    def __init__(self, lab: Lab, stack: contextlib.ExitStack) -> None:
        import mdev_orchestrator as library

        self.lab, self.library = lab, library
        self.process, path = qemu(lab, "plain")
        stack.callback(self.process.wait)
        stack.callback(self.process.kill)
        self.plain = Qmp(path)
        asyncio.run(library.apply(library.parse(lab.spec("own", 1, []))))
        stack.callback(lambda: asyncio.run(library.destroy("own", force=True, deadline=0)))
        run(["virsh", "create", str(lab.domain("virt"))])
        stack.callback(run, ["virsh", "destroy", "virt"])
        self.virt = Qmp(lab.place / "virt.qmp")
        # a guest answers when it has booted: the first device shows it, and is not measured
        for way in WAYS:
            self.turn(way, lambda *_: None)

    def turn(self, way: str, note: Callable[[str, str, float], None]) -> None:
        """One device in and out."""
        from mdev_orchestrator.qemu.command import device_id

        (uuid,) = self.lab.mdevs(1)
        name = "hostdev0" if way == "virsh" else device_id(uuid)
        file = self.lab.place / "device.xml"
        file.write_text(HOSTDEV.format(uuid=uuid))
        clock = Clock()
        if way == "bare":
            path = f"/sys/bus/mdev/devices/{uuid}"
            options = {"driver": "vfio-pci", "id": name, "sysfsdev": path, "bus": "port0"}
            self.plain.ask("device_add", **options)
        elif way == "library":
            asyncio.run(self.library.attach("own0", str(uuid)))
        elif way == "mdo":
            self.lab.mdo("attach", "own0", str(uuid))
        else:
            run(["virsh", "attach-device", "virt", str(file), "--live"])
        note("attach", way, clock())
        # the monitor for questions takes one client at a time
        look = {"bare": self.plain, "virsh": self.virt}.get(way) or ours("own0")
        wait_taken(look, name)
        note("taken", way, clock())
        if way in {"library", "mdo"}:
            look.close()
        clock = Clock()
        if way == "bare":
            self.plain.ask("device_del", id=name)
            self.plain.event("DEVICE_DELETED")
        elif way == "library":
            asyncio.run(self.library.detach("own0", uuid))
        elif way == "mdo":
            self.lab.mdo("detach", "own0", str(uuid))
        else:
            run(["virsh", "detach-device", "virt", str(file), "--live"])
        seconds = clock()
        if way == "virsh" and name in json.dumps(self.virt.ask("query-pci")):
            raise RuntimeError("virsh has returned, and the guest still has the device")
        note("detach", way, seconds)
        self.lab.remove_all()


def start(lab: Lab, way: str, note: Callable[[str, str, float], None]) -> None:
    """One guest with a device, from nothing to its end."""
    import mdev_orchestrator as library
    from mdev_orchestrator.qemu.command import device_id

    file = lab.place / "start.toml"
    file.write_text(lab.spec("new", 1, []).rstrip() + f'\n[[guest.mdev]]\ntype = "{TYPE}"\n')
    uuid = lab.mdevs(1)[0] if way in {"bare", "virsh"} else None
    domain = lab.domain("new", uuid)
    spec = library.load(str(file))
    end: Callable[[], object]
    clock = Clock()
    if way == "bare":
        process, path = qemu(lab, "new", uuid)
        look, end = Qmp(path), process.kill
    elif way == "virsh":
        run(["virsh", "create", str(domain)])
        end = lambda: run(["virsh", "destroy", "new"])  # noqa: E731
    else:
        if way == "library":
            asyncio.run(library.apply(spec))
        else:
            lab.mdo("apply", str(file))
        end = lambda: asyncio.run(library.destroy("new", force=True, deadline=0))  # noqa: E731
    note("start", way, clock())
    if way == "virsh":
        look, name = Qmp(lab.place / "new.qmp"), "hostdev0"
    elif uuid is not None:
        name = device_id(uuid)
    else:
        look, name = (
            ours("new0"),
            device_id(UUID(next(Path("/sys/bus/mdev/devices").iterdir()).name)),
        )
    wait_taken(look, name)
    note("booted", way, clock())
    look.close()
    end()
    if way == "bare":
        process.wait()
    lab.remove_all()


def together(lab: Lab, way: str, count: int, note: Callable[[str, str, float], None]) -> None:
    """So many guests with a device each."""
    import mdev_orchestrator as library

    work = f"{count} together"
    if way == "virsh":
        domains = [lab.domain(f"all{n}", uuid) for n, uuid in enumerate(lab.mdevs(count))]
        clock = Clock()
        commands = [
            subprocess.Popen(["virsh", "create", str(domain)], stdout=subprocess.DEVNULL)
            for domain in domains
        ]
        if sum([command.wait() for command in commands]):
            raise RuntimeError("virsh create failed")
        note(work, way, clock())
        for number in range(count):
            run(["virsh", "destroy", f"all{number}"])
        lab.remove_all()
        return
    text = lab.spec("all", count, [])
    tables = text.split("[[guest]]")
    device = f'[[guest.mdev]]\ntype = "{TYPE}"\n'
    text = tables[0] + "".join(f"[[guest]]{table.rstrip()}\n{device}" for table in tables[1:])
    file = lab.place / "all.toml"
    file.write_text(text)
    spec = library.load(str(file))
    clock = Clock()
    if way == "library":
        asyncio.run(library.apply(spec))
    else:
        lab.mdo("apply", str(file))
    note(work, way, clock())
    asyncio.run(library.destroy("all", force=True, deadline=0))


WAYS = ("bare", "library", "mdo", "virsh")


def inside(rounds: int, counts: list[int]) -> int:
    """Measure, in L1."""
    place = Path(tempfile.mkdtemp(dir="/run"))
    shutil.copytree(ROOT / "python", place / "python")
    sys.path.insert(0, str(place / "python"))
    os.environ |= {"PYTHONPATH": str(place / "python"), "MDO_STATE_DIR": str(place / "state")}
    lab = Lab(place)
    with contextlib.ExitStack() as stack:
        stack.enter_context(libvirt(place))
        hotplug = Hotplug(lab, stack)
        for number in range(rounds):
            for way in random.sample(WAYS, len(WAYS)):
                hotplug.turn(way, lab.note)
            print(f"hotplug: round {number + 1} of {rounds}", file=sys.stderr, flush=True)
        stack.pop_all().close()
    with libvirt(place):
        for number in range(rounds):
            for way in random.sample(WAYS, len(WAYS)):
                start(lab, way, lab.note)
            for count in counts:
                for way in random.sample(WAYS[1:], len(WAYS) - 1):
                    together(lab, way, count, lab.note)
            print(f"guests: round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    report(lab.times, rounds)
    return 0


def report(times: dict[str, dict[str, list[float]]], rounds: int) -> None:
    """Print the table and, for programs, one line of JSON."""
    print(f"guests and hotplug, {rounds} rounds, medians; L1 is emulated, one processor")
    for work, ways in times.items():
        middle = {way: statistics.median(taken) for way, taken in ways.items()}
        for way, seconds in middle.items():
            words = f"{work:12} {way:8} {seconds:7.3f} s"
            words += f" ({min(ways[way]):.3f} to {max(ways[way]):.3f})"
            words += f"  {seconds / middle['library']:6.2f} x library"
            if "bare" in middle:
                words += f"  {seconds / middle['bare']:6.2f} x bare"
            print(words)
    print(json.dumps({"rounds": rounds, "seconds": times}))


def main() -> int:
    """Read the arguments."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--guests", type=int, nargs="*", default=[1, 4, 16])
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        return inside(arguments.rounds, arguments.guests)
    return outside(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
