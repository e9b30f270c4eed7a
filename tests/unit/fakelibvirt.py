# SPDX-License-Identifier: GPL-2.0-or-later
"""libvirt's Python binding as far as it is used, with one domain on a machine of files.

The domain's process is in the machine's ``/proc``, and has its devices open.
"""

from __future__ import annotations

import re
import shutil
import threading
import types
from collections.abc import Callable
from typing import Any
from uuid import UUID

from unit.fakesys import FakeSystem

DOMAIN = UUID("c0ffee00-0000-4000-8000-00000000d0d0")
NAME = "web 1"
PID = 4711


class FakeLibvirt(types.ModuleType):
    """The module ``libvirt``.

    :ivar devices: The mdevs of the domain.
    :ivar refusal: What libvirt answers to a change instead of making it.
    :ivar stuck: Calls of these names wait until the event is set.
    :ivar broken: Whether the connection breaks with the refusal.
    :ivar keeps: Whether the guest keeps what it is asked to let go of.
    :ivar after: Called after an attach.
    :ivar calls: The changes that were asked for.
    """

    VIR_DOMAIN_AFFECT_LIVE = 1
    VIR_ERR_NO_DOMAIN = 42

    class libvirtError(Exception):  # noqa: N801 - the binding's
        code = 0

        def get_error_message(self) -> str:
            return str(self)

        def get_error_code(self) -> int:
            return self.code

    def __init__(self, system: FakeSystem) -> None:
        super().__init__("libvirt")
        self.system = system
        self.devices: list[str] = []
        self.refusal = ""
        self.down = False
        self.broken = False
        self.keeps = False
        self.stuck: dict[str, threading.Event] = {}
        self.calls: list[str] = []
        self.addresses: list[str] = []
        self.after: Callable[[str], object] | None = None
        (system.root / "run/libvirt/qemu").mkdir(parents=True)
        (system.root / f"run/libvirt/qemu/{NAME}.pid").write_text(f"{PID}")
        self.show()

    def show(self) -> None:
        """Show the domain's process with what it has open."""
        shutil.rmtree(self.system.root / "proc" / str(PID), ignore_errors=True)
        name = ["-name", f"guest={NAME},debug-threads=on", "-uuid", str(DOMAIN)]
        groups = [(self.system.bus / uuid / "iommu_group").resolve().name for uuid in self.devices]
        nodes = [f"/dev/vfio/{group}" for group in groups]
        self.system.process(PID, "qemu-system-x86", ["qemu-system-x86_64", *name], nodes)
        stat = self.system.root / "proc" / str(PID) / "stat"
        stat.write_text(f"{PID} (qemu) S 1")

    def wait(self, name: str) -> None:
        if name in self.stuck:
            self.stuck[name].wait(60)

    def registerErrorHandler(self, *_: object) -> None:  # noqa: N802
        pass

    def open(self, address: str) -> Any:  # noqa: ANN401
        self.addresses.append(address)
        self.wait("open")
        if self.down:
            raise self.libvirtError("Failed to connect socket")
        return _Connection(self)


class _Connection:
    def __init__(self, libvirt: FakeLibvirt) -> None:
        self.libvirt = libvirt

    def lookupByUUID(self, uuid: bytes) -> _Domain:  # noqa: N802
        if uuid != DOMAIN.bytes:
            error = self.libvirt.libvirtError("no domain")
            error.code = self.libvirt.VIR_ERR_NO_DOMAIN
            raise error
        return _Domain(self.libvirt)

    def isAlive(self) -> int:  # noqa: N802
        return 0 if self.libvirt.broken else 1

    def close(self) -> None:
        pass


class _Domain:
    def __init__(self, libvirt: FakeLibvirt) -> None:
        self.libvirt = libvirt

    def XMLDesc(self, _flags: int) -> str:  # noqa: N802
        self.libvirt.wait("XMLDesc")
        hostdevs = (
            f"<hostdev mode='subsystem' type='mdev'><source><address uuid='{uuid}'/></source>"
            f"<alias name='hostdev{number}'/></hostdev>"
            for number, uuid in enumerate(self.libvirt.devices)
        )
        return f"<domain><devices>{''.join(hostdevs)}</devices></domain>"

    def attachDeviceFlags(self, xml: str, flags: int) -> None:  # noqa: N802
        uuid = self._change("attach", xml, flags)
        self.libvirt.devices.append(uuid)
        self.libvirt.show()
        if self.libvirt.after is not None:
            self.libvirt.after("attach")
        self._failed()

    def detachDeviceFlags(self, xml: str, flags: int) -> None:  # noqa: N802
        uuid = self._change("detach", xml, flags)
        if uuid not in self.libvirt.devices:
            raise self.libvirt.libvirtError("device not found")
        if not self.libvirt.keeps:
            self.libvirt.devices.remove(uuid)
            self.libvirt.show()

    def _change(self, verb: str, xml: str, flags: int) -> str:
        assert flags == self.libvirt.VIR_DOMAIN_AFFECT_LIVE
        self.libvirt.wait(verb)
        found = re.search("uuid='([^']*)'", xml)
        assert found is not None
        self.libvirt.calls.append(f"{verb} {found[1]}")
        if self.libvirt.refusal and not self.libvirt.broken:
            raise self.libvirt.libvirtError(self.libvirt.refusal)
        return found[1]

    def _failed(self) -> None:
        if self.libvirt.broken:
            raise self.libvirt.libvirtError(self.libvirt.refusal)
