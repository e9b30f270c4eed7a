# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMUs of several versions, started by themselves or by the orchestrator, and their monitor.

None of them boots: ``-S`` opens the devices and then waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self
from uuid import UUID, uuid4

from lab import vfio
from lab.machine import machine
from mdev_orchestrator.engine import guest_ops, start_groups
from mdev_orchestrator.errors import QemuError
from mdev_orchestrator.qemu import process
from mdev_orchestrator.qemu.command import GuestMdev, GuestSpec
from mdev_orchestrator.spec.sizes import Size

STOCK = "7.2"
PATCHED = ("10.0", "10.2")
PORTS = 8
#: A guest that has not booted has its slots powered off, and such a slot lets go at once. By ACPI
#: it would take a reset to complete an unplug, and when the last VFIO device goes in the middle of
#: that, QEMU from 9.1 on may fail an assertion of its own (resettable_container_child_foreach).
NATIVE = ("-global", "ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off")
#: No test is about time: this only ends what would wait for ever.
SECONDS = 240.0

Event = dict[str, Any]


@dataclass(frozen=True)
class Version:
    """A QEMU program."""

    name: str
    binary: str
    firmware: Path | None = None

    @property
    def patched(self) -> bool:
        """Whether it is ours, and starts groups."""
        return self.name in PATCHED


def versions() -> dict[str, Version]:
    """The distribution's QEMU, and those of ``MDO_TEST_QEMU``: ``NAME=BINARY:FIRMWARE,…``.

    Their names are series of QEMU, with ``-stock`` for one that was built without our patches.
    """
    found = {STOCK: Version(STOCK, shutil.which("qemu-system-x86_64") or "qemu-system-x86_64")}
    for item in filter(None, os.environ.get("MDO_TEST_QEMU", "").split(",")):
        name, _, paths = item.partition("=")
        binary, _, firmware = paths.partition(":")
        found[name] = Version(name, binary, Path(firmware))
    return found


def packaged() -> Version:
    """The distribution's QEMU, named after its series, such as ``debian-10.0``."""
    stock = versions()[STOCK]
    said = subprocess.run([stock.binary, "-version"], capture_output=True, text=True, check=True)
    series = re.search(r"version (\d+\.\d+)", said.stdout)
    return replace(stock, name=f"debian-{series[1] if series else '?'}")


class QmpError(QemuError):
    """What a command was answered."""


class GoneError(Exception):
    """QEMU has ended."""


class Qmp:
    """A monitor, one command at a time; events that come meanwhile are kept."""

    def __init__(self, connected: socket.socket) -> None:
        connected.settimeout(SECONDS)
        self._socket = connected
        self._file = connected.makefile("rb")
        self.events: list[Event] = []
        assert "QMP" in self._next()
        self.command("qmp_capabilities")

    @classmethod
    def at(cls, path: Path) -> Self:
        connected = socket.socket(socket.AF_UNIX)
        connected.connect(str(path))
        return cls(connected)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()
        self._socket.close()

    def _next(self) -> dict[str, Any]:
        try:
            line = self._file.readline()
        except ConnectionError:
            line = b""
        if not line:
            raise GoneError
        return json.loads(line)

    def command(self, name: str, **arguments: object) -> Any:  # noqa: ANN401 - it is JSON
        request = {"execute": name}
        if arguments:
            request["arguments"] = {key.replace("_", "-"): v for key, v in arguments.items()}
        try:
            self._socket.sendall(json.dumps(request).encode() + b"\n")
        except ConnectionError:
            raise GoneError from None
        while True:
            answer = self._next()
            if "event" in answer:
                self.events.append(answer)
            elif "error" in answer:
                raise QmpError(answer["error"]["desc"])
            else:
                return answer["return"]

    def wait(self, name: str, matches: Callable[[Event], bool] = lambda _: True) -> Event:
        """The first event of a name that has come or will come."""
        seen = 0
        while True:
            for event in self.events[seen:]:
                if event["event"] == name and matches(event.get("data", {})):
                    return event
            seen = len(self.events)
            answer = self._next()
            if "event" in answer:
                self.events.append(answer)

    def unplug(self, device: str) -> None:
        """Take a device out of a guest that has not booted."""
        self.events.clear()
        self.command("device_del", id=device)
        self.wait("DEVICE_DELETED", lambda data: data.get("device") == device)


class Direct:
    """QEMU as a child of the test, with no program in between.

    :raise QemuError: It ended at once; what it said, and its exit status.
    """

    orchestrated = False

    def __init__(self, version: Version, *uuids: str, extra: tuple[str, ...] = ()) -> None:
        self.version = version
        self.plugged: dict[str, int] = {}
        self.cold = frozenset(uuids)
        ours, theirs = socket.socketpair()
        argv = [version.binary, "-nodefaults", "-no-user-config", "-display", "none"]
        argv += ["-machine", "q35", "-chardev", f"socket,id=qmp,fd={theirs.fileno()}"]
        argv += ["-mon", "chardev=qmp,mode=control"]
        argv += NATIVE
        if version.firmware:
            argv += ["-L", str(version.firmware)]
        argv += ["-accel", "tcg", "-m", "64M", "-S"]
        for number in range(PORTS):
            argv += ["-device", f"pcie-root-port,id=port{number},chassis={number + 1}"]
        for uuid in uuids:
            options = self._device(uuid)
            argv += ["-device", ",".join(f"{key}={value}" for key, value in options.items())]
        self._process = subprocess.Popen(
            [*argv, *extra],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=[theirs.fileno()],
        )
        self.pid = self._process.pid
        theirs.close()
        try:
            self.qmp = Qmp(ours)
        except GoneError:
            ours.close()
            raise QemuError(self.words()) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def _device(self, uuid: str) -> dict[str, str]:
        port = min(set(range(PORTS)) - set(self.plugged.values()))
        self.plugged[uuid] = port
        path = str(vfio.MDEVS / uuid)
        return {
            "driver": "vfio-pci",
            "id": f"mdev-{uuid}",
            "sysfsdev": path,
            "bus": f"port{port}",
        }

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def command(self, name: str, **arguments: object) -> Any:  # noqa: ANN401
        return self.qmp.command(name, **arguments)

    def plug(self, uuid: str) -> None:
        options = self._device(uuid)
        try:
            self.command("device_add", **options)
        except QmpError:
            del self.plugged[uuid]
            raise

    def unplug(self, uuid: str) -> None:
        self.qmp.unplug(f"mdev-{uuid}")
        del self.plugged[uuid]

    def words(self) -> str:
        """What QEMU said, and its exit status; it has ended or is about to."""
        assert self._process.stderr
        with self._process.stderr as said:
            return f"{said.read().decode()}(exit status {self._process.wait(SECONDS)})"

    def quit(self) -> None:
        self.command("quit")

    def ended(self) -> int:
        """Wait for the end; the kernel has released everything when this returns."""
        status = self._process.wait(SECONDS)
        self.qmp.close()
        return status

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self.ended()
        assert self._process.stderr
        self._process.stderr.close()

    @staticmethod
    def reclaim(*uuids: str) -> None:
        """What the launcher of a QEMU does when it has ended."""
        for uuid in uuids:
            with contextlib.suppress(FileNotFoundError):
                vfio.put(uuid, "online", "0")


def guest_spec(version: Version, *uuids: str, extra: tuple[str, ...] = ()) -> GuestSpec:
    return GuestSpec(
        name="matrix",
        uuid=uuid4(),
        memory=Size(64 << 20),
        qemu=version.binary,
        firmware=version.firmware,
        accel="tcg",
        mdevs=tuple(map(guest_mdev, uuids)),
        extra=("-S", *NATIVE, *extra),
    )


def guest_mdev(uuid: str) -> GuestMdev:
    return GuestMdev(UUID(uuid), vfio.MDEVS / uuid, "vfio-pci")


class Orchestrated:
    """QEMU launched by the orchestrator's library, which starts the groups if QEMU does not.

    :raise MdoError: It could not be.
    """

    orchestrated = True

    def __init__(
        self,
        version: Version,
        *uuids: str,
        extra: tuple[str, ...] = (),
        guest: process.RunningGuest | None = None,
    ) -> None:
        self.version = version
        self._guest = guest or asyncio.run(
            guest_ops.launch(machine(), guest_spec(version, *uuids, extra=extra))
        )
        assert self._guest.record
        self.pid = self._guest.record.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run(guest_ops.end(machine(), self._guest, deadline=0, force=True))

    def command(self, name: str, **arguments: object) -> Any:  # noqa: ANN401
        with Qmp.at(self._guest.qmp_socket) as qmp:
            return qmp.command(name, **arguments)

    def plug(self, uuid: str) -> None:
        asyncio.run(guest_ops.attach(machine(), self._guest, guest_mdev(uuid)))

    def unplug(self, uuid: str) -> None:
        with Qmp.at(self._guest.qmp_socket) as qmp:
            qmp.unplug(f"mdev-{uuid}")
        asyncio.run(start_groups.reclaim_groups(machine()))

    def quit(self) -> None:
        with contextlib.suppress(GoneError):
            self.command("quit")

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def ended(self) -> None:
        assert asyncio.run(process.wait_ended(self._guest, SECONDS))

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.signal(signal.SIGKILL)
        self.ended()

    @staticmethod
    def reclaim(*_: str) -> None:
        for reclaimed in asyncio.run(start_groups.reclaim_groups(machine())):
            assert not reclaimed.error, reclaimed


Machine = Direct | Orchestrated
