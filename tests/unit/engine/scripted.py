# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest that is found like any other, and whose QEMU answers as a test wants.

Its process is real and does nothing. Its monitor is served by the test's process, one client at a
time as QEMU does. What it has plugged in is seen as open in the ``/proc`` of the machine of files.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import PurePosixPath
from typing import Literal
from uuid import UUID, uuid4

import msgspec

from mdev_orchestrator.machine import Machine
from mdev_orchestrator.qemu import process
from mdev_orchestrator.qemu.process import ProcessRecord
from mdev_orchestrator.system.processes import boot_id, start_time
from mdev_orchestrator.system.waiting import readable
from unit.fakesys import FakeSystem
from unit.qemu.conftest import Peer, listen


class ScriptedGuest:
    """What its QEMU has and how it answers.

    :ivar devices: Types of the devices with an id; :ivar:`sysfsdev` has the paths of mdevs.
    :ivar goes_on: Cleared, QEMU answers nothing: it is stopped, or its driver holds it.
    :ivar on_detach: What the guest does when it is asked to let go.
    :ivar on_powerdown: The same for its power button.
    :ivar asked: The commands that change something, as they came.
    :ivar stops_at: The command at which it stops to answer, until :ivar:`goes_on` is set.
    :ivar refuses: Its words when it refuses a device.
    :ivar objects: Types of its objects by their ids.
    :ivar by_iommufd: The object that a device uses.
    :ivar knows_iommufd: Whether its QEMU can open devices by iommufd.
    """

    def __init__(self, system: FakeSystem, name: str, pid: int) -> None:
        self.system = system
        self.name = name
        self.pid = pid
        self.pidfd = os.pidfd_open(pid)
        self.uuid = uuid4()
        self.devices = {f"port{number}": "pcie-root-port" for number in range(4)}
        self.sysfsdev: dict[str, str] = {}
        self._ended = asyncio.Event()
        self.goes_on = asyncio.Event()
        self.goes_on.set()
        self.on_detach: Literal["lets go", "refuses", "does nothing"] = "lets go"
        self.on_powerdown: Literal["obeys", "does nothing"] = "does nothing"
        self.asked: list[str] = []
        self.stops_at = ""
        self.refuses = ""
        self.objects = {"ram0": "memory-backend-ram"}
        self.by_iommufd: dict[str, str] = {}
        self.knows_iommufd = True
        self._serving = {socket: asyncio.Lock() for socket in (process.QMP, process.QUERY)}

    def has(self, uuid: UUID) -> bool:
        """Whether it has an mdev."""
        return f"mdev-{uuid}" in self.devices

    def plug(self, uuid: UUID) -> None:
        """Give it an mdev, as on its command line."""
        self.devices[f"mdev-{uuid}"] = "vfio-pci"
        self.sysfsdev[f"mdev-{uuid}"] = f"/sys/bus/mdev/devices/{uuid}"
        self._show()

    def _unplug(self, id_: str) -> None:
        self.devices.pop(id_, None)
        self.sysfsdev.pop(id_, None)
        self.by_iommufd.pop(id_, None)
        self._show()

    def _show(self) -> None:
        """Show in ``/proc`` what it has open."""
        shutil.rmtree(self.system.root / "proc" / str(self.pid), ignore_errors=True)
        nodes = []
        for id_, path in self.sysfsdev.items():
            group = self.system.bus / PurePosixPath(path).name / "iommu_group"
            if group.is_symlink():
                own = f"devices/vfio{group.readlink().name}"
                node = own if id_ in self.by_iommufd else group.readlink().name
                nodes.append(f"/dev/vfio/{node}")
        self.system.process(self.pid, "qemu-system-x86", ["qemu", "-name", self.name], nodes)

    async def end(self) -> None:
        """Kill its process, and wait until it has ended."""
        signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        await self._ended.wait()

    async def serve(self, socket: str, peer: Peer) -> None:
        """Answer one client of a monitor."""
        async with self._serving[socket]:
            await self.goes_on.wait()
            await peer.greet()
            while True:
                command = await peer.command()
                name = command["execute"].replace("-", "_")
                if name in {"device_add", "device_del", "quit", "system_powerdown"}:
                    self.asked.append(name)
                if name == self.stops_at:
                    self.stops_at = ""
                    self.goes_on.clear()
                await self.goes_on.wait()
                reply = await getattr(self, name)(peer, **command.get("arguments", {}))
                await peer.send({"id": command["id"], **reply})

    async def qom_list(self, _: Peer, path: str) -> dict[str, object]:
        found: dict[str, str] = {}
        if path == "/machine/peripheral":
            found = {name: f"child<{kind}>" for name, kind in self.devices.items()}
        elif path == "/objects":
            found = {name: f"child<{kind}>" for name, kind in self.objects.items()}
        return {"return": [{"name": name, "type": kind} for name, kind in found.items()]}

    async def qom_get(self, _: Peer, path: str, property: str) -> dict[str, object]:  # noqa: A002
        name = path.rsplit("/", 1)[1]
        if property == "sysfsdev" and name in self.sysfsdev:
            return {"return": self.sysfsdev[name]}
        if property == "iommufd" and name in self.sysfsdev and self.knows_iommufd:
            used = self.by_iommufd.get(name)
            return {"return": f"/objects/{used}" if used else ""}
        return {"error": {"class": "GenericError", "desc": "no property"}}

    async def query_status(self, _: Peer) -> dict[str, object]:
        return {"return": {"status": "running", "running": True}}

    async def device_add(self, _: Peer, **arguments: str) -> dict[str, object]:
        uuid = UUID(PurePosixPath(arguments["sysfsdev"]).name)
        refusal = self.refuses
        if str(uuid) not in self.system.uuids():
            refusal = "no such host device"
        if refusal:
            return {"error": {"class": "GenericError", "desc": refusal}}
        if "iommufd" in arguments:
            self.by_iommufd[arguments["id"]] = arguments["iommufd"]
        self.plug(uuid)
        return {"return": {}}

    async def device_list_properties(self, _: Peer, typename: str) -> dict[str, object]:
        names = ["sysfsdev", *(["iommufd"] if self.knows_iommufd else [])]
        return {"return": [{"name": name, "type": "str"} for name in names]}

    async def object_add(self, _: Peer, **arguments: str) -> dict[str, object]:
        self.objects[arguments["id"]] = arguments["qom-type"]
        return {"return": {}}

    async def object_del(self, _: Peer, id: str) -> dict[str, object]:  # noqa: A002
        if id in self.by_iommufd.values():
            return {"error": {"class": "GenericError", "desc": f"object '{id}' is in use"}}
        del self.objects[id]
        return {"return": {}}

    async def device_del(self, peer: Peer, id: str) -> dict[str, object]:  # noqa: A002
        if self.on_detach == "does nothing":
            return {"return": {}}
        event = "DEVICE_DELETED"
        if self.on_detach == "refuses":
            event = "DEVICE_UNPLUG_GUEST_ERROR"
        else:
            self._unplug(id)
        data = {"device": id, "path": "/x"}
        await peer.send({"event": event, "data": data, "timestamp": {}})
        return {"return": {}}

    async def system_powerdown(self, peer: Peer) -> dict[str, object]:
        return await self.quit(peer) if self.on_powerdown == "obeys" else {"return": {}}

    async def quit(self, _: Peer) -> dict[str, object]:
        signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        return {"return": {}}


@asynccontextmanager
async def scripted_guest(
    machine: Machine, system: FakeSystem, name: str = "g", *mdevs: UUID
) -> AsyncIterator[ScriptedGuest]:
    """A guest that runs while the block does.

    The state directory must have a short name, since its sockets are there.
    """
    uuid = uuid4()
    command = ["bash", "-c", "read", "-uuid", str(uuid)]
    child = await asyncio.to_thread(subprocess.Popen, command, stdin=subprocess.PIPE)
    guest = ScriptedGuest(system, name, child.pid)
    guest.uuid = uuid
    directory = machine.guests_dir / name
    directory.mkdir(mode=0o700, parents=True)
    machine.guests_dir.chmod(0o700)
    record = ProcessRecord(
        name=name,
        uuid=uuid,
        pid=child.pid,
        start_time=start_time(child.pid) or 0,
        boot_id=boot_id(),
        created=time.time(),
        argv=command,
        mdevs=list(mdevs),
        memory=64 << 20,
        cpus=1,
        ready=True,
    )
    (directory / process.RECORD).write_bytes(msgspec.json.encode(record))
    for mdev in mdevs:
        guest.plug(mdev)
    servers = [
        await listen(partial(guest.serve, socket), directory / socket) for socket in guest._serving
    ]
    watching = asyncio.ensure_future(_close_at_end(guest))
    try:
        yield guest
    finally:
        guest.goes_on.set()
        for server, tasks in servers:
            server.close()
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.wait(tasks, timeout=5)
        if not watching.done():
            signal.pidfd_send_signal(guest.pidfd, signal.SIGKILL)
            await watching
        os.close(guest.pidfd)
        await asyncio.to_thread(child.communicate)


async def _close_at_end(guest: ScriptedGuest) -> None:
    """When its process has ended, it has nothing open any more."""
    await readable(guest.pidfd)
    shutil.rmtree(guest.system.root / "proc" / str(guest.pid), ignore_errors=True)
    guest._ended.set()
