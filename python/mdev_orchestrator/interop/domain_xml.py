# SPDX-License-Identifier: GPL-2.0-or-later
"""Reads the XML of a libvirt domain, and makes a spec of what a spec can say of it.

The reader marks each element, attribute and text that it uses. What has no mark at the end is left
out, and is listed with its line: nothing is dropped in silence. The format is described in
https://libvirt.org/formatdomain.html; what ``virsh dumpxml`` of libvirt 9.0 prints was read.

=================  ===========================================
:func:`load`       a file -> a spec, and what it leaves out
:func:`mdevs`      the XML of a domain that runs -> its mdevs
=================  ===========================================
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID
from xml.parsers import expat

from msgspec import Struct

from mdev_orchestrator import spec as specs
from mdev_orchestrator.errors import RequestError, one_line
from mdev_orchestrator.model import as_uuid
from mdev_orchestrator.spec import MIB, Document, GuestConfig, GuestMdev, Place, Size, Spec

MAX_BYTES = specs.MAX_BYTES
MAX_ELEMENTS = 20_000
MAX_DEPTH = 32
"""Of elements; a domain has seven or so."""

_UNITS: dict[str, int] = {
    "b": 1,
    "bytes": 1,
    **{letter + "b": 1000**power for power, letter in enumerate("kmgt", 1)},
    **{letter + end: 1024**power for power, letter in enumerate("kmgt", 1) for end in ("", "ib")},
}
"""In small letters. Without a unit libvirt takes KiB."""
_ACCELERATORS = {"kvm": "kvm", "qemu": "tcg"}
_SOURCES = {"file": "file", "block": "dev"}
"""For each type of disk that an image can be, the attribute that names it."""
_SHOWN = 70  # characters of an element in a message

_CONSOLE = "each guest has one serial console, see mdo guest console"
_WHY = {
    "currentMemory": "a guest has all of its memory from the start",
    "devices/console": _CONSOLE,
    "devices/controller": "mdo has its own buses",
    "devices/hostdev": "a spec has mediated devices only",
    "devices/interface": "a spec has no network cards; extra takes QEMU's arguments for one",
    "devices/serial": _CONSOLE,
    "os firmware": "the guest boots with the firmware that its QEMU takes by default",
    "os/boot": "the guest boots from its kernel or its disk",
    "os/loader": "the guest boots with the firmware that its QEMU takes by default",
    "os/type arch": "the QEMU that is named says it",
    "vcpu current": "the guest has those from the start, and no more can be added",
}
"""Why an element is left out, or an attribute of one: by its path below the domain."""
_ENDINGS = {
    "address": "mdo chooses the place on the bus",
    "alias": "mdo has its own names for devices",
    "target bus": "the disk is a virtio disk",
}
"""The same by the last part of a path."""
_NO_KEY = "a spec has no key for it"


class LeftOut(Struct, frozen=True):
    """Something of a domain that the spec does not say, or not in the same way.

    :ivar element: Its path below ``domain``, and what tells it from others.
    """

    file: str
    line: int
    element: str
    why: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: left out: {self.element}: {self.why}"


class _Element:
    """An element, and which parts of it were used."""

    __slots__ = ("attributes", "children", "line", "path", "rest", "tag", "text", "used", "why")

    def __init__(self, tag: str, attributes: dict[str, str], line: int, path: str) -> None:
        self.tag = tag
        self.attributes = attributes
        self.line = line
        self.path = path
        self.children: list[_Element] = []
        self.text = ""
        self.rest = {name for name in attributes if not name.startswith("xmlns")}
        self.used = False
        self.why = ""

    def get(self, name: str) -> str:
        """The value of an attribute; empty if there is none."""
        return self.attributes.get(name, "")

    def use(self, *names: str) -> str:
        """Use attributes; the value of the last."""
        self.rest -= set(names)
        return self.get(names[-1])

    def use_text(self) -> str:
        """Use its text, without blanks around it."""
        text, self.text = self.text.strip(), ""
        return text

    def all(self, tag: str) -> list[_Element]:
        """The children of that name."""
        return [child for child in self.children if child.tag == tag]

    def has(self, tag: str) -> bool:
        """Whether it has a child of that name."""
        return any(child.tag == tag for child in self.children)

    def child(self, tag: str) -> _Element | None:
        """The first child of that name, which is used."""
        found = next(iter(self.all(tag)), None)
        if found is not None:
            found.used = True
        return found

    def shown(self, *names: str) -> str:
        """Its path and some attributes for a message."""
        parts = (f"{name}='{self.attributes[name]}'" for name in names)
        text = one_line(" ".join((self.path, *parts)))
        return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


# ---- XML ------------------------------------------------------------------------------------


def _parse(data: bytes, source: str) -> _Element:
    """Read XML, without document types and so without entities of its own.

    :raise RequestError: It is too large, or no XML, or has a document type.
    """
    # defusedxml would refuse the same, by the same handler of expat, and gives no line numbers
    if len(data) > MAX_BYTES:
        raise RequestError(
            f"{source} is larger than {MAX_BYTES // MIB} MiB", "is this the right file?"
        )
    parser = expat.ParserCreate()
    parser.buffer_text = True
    top = _Element("", {}, 0, "")
    stack = [top]
    count = 0

    def start(tag: str, attributes: dict[str, str]) -> None:
        nonlocal count
        count += 1
        line = parser.CurrentLineNumber
        if count > MAX_ELEMENTS or len(stack) > MAX_DEPTH:
            what = f"more than {MAX_ELEMENTS} elements"
            if count <= MAX_ELEMENTS:
                what = f"elements that are nested deeper than {MAX_DEPTH}"
            raise RequestError(f"{source}:{line}: has {what}", "is this the XML of a domain?")
        # the paths begin below <domain>
        path = tag if len(stack) < 3 else f"{stack[-1].path}/{tag}"  # noqa: PLR2004
        element = _Element(tag, attributes, line, path)
        stack[-1].children.append(element)
        stack.append(element)

    def text(data: str) -> None:
        stack[-1].text += data

    def refuse(*_: object) -> None:
        raise RequestError(
            f"{source}:{parser.CurrentLineNumber}: has a document type, and a domain has none",
            "remove the <!DOCTYPE …>: entities are not read",
        )

    parser.StartElementHandler = start
    parser.EndElementHandler = lambda _tag: stack.pop()
    parser.CharacterDataHandler = text
    parser.StartDoctypeDeclHandler = refuse
    try:
        parser.Parse(data, True)
    except expat.ExpatError as error:
        words = expat.ErrorString(error.code)
        raise RequestError(
            f"{source}:{error.lineno}: this is not XML: {words}",
            "virsh dumpxml DOMAIN prints what is read here",
        ) from None
    except (LookupError, ValueError):
        raise RequestError(
            f"{source}:1: is in an encoding that is not known", "save the file as UTF-8"
        ) from None
    return top.children[0]


def _read(path: Path | str) -> tuple[bytes, str]:
    source = "standard input" if os.fspath(path) == "-" else os.fspath(path)
    try:
        if source == "standard input":
            return sys.stdin.buffer.read(MAX_BYTES + 1), source
        # without O_NONBLOCK a FIFO without a writer would hold the command for ever
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(fd, "rb") as file:  # noqa: PTH123 - a descriptor
            return file.read(MAX_BYTES + 1) or b"", source
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise RequestError(
            f"{source} cannot be read: {reason}",
            "name the XML of a domain, or UUIDs that mdevctl has defined",
            errno=error.errno,
        ) from error


# ---- a domain that runs ---------------------------------------------------------------------


def mdevs(xml: str) -> dict[UUID, str]:
    """The mdevs of a domain in their order, and what QEMU calls each; empty if it does not run.

    :raise RequestError: It is no XML of a domain.
    """
    domain = _parse(xml.encode(), "the domain's XML")
    found: dict[UUID, str] = {}
    for hostdev in (each for devices in domain.all("devices") for each in devices.all("hostdev")):
        addresses = [each for source in hostdev.all("source") for each in source.all("address")]
        uuid = as_uuid(addresses[0].get("uuid")) if addresses and _is_mdev(hostdev) else None
        if uuid is not None:
            found[uuid] = next((alias.get("name") for alias in hostdev.all("alias")), "")
    return found


def _is_mdev(hostdev: _Element) -> bool:
    return hostdev.get("mode") == "subsystem" and hostdev.get("type") == "mdev"


# ---- a spec ---------------------------------------------------------------------------------


def load(path: Path | str) -> tuple[Spec, tuple[LeftOut, ...]]:
    """Read the XML of a domain from a file, or from standard input for ``-``; see :func:`to_spec`.

    :raise RequestError: It cannot be read, or :func:`to_spec` raises.
    """
    return to_spec(*_read(path))


def to_spec(data: bytes, source: str) -> tuple[Spec, tuple[LeftOut, ...]]:
    """Make a spec with one guest of the XML of a domain.

    :param source: What messages call the file.
    :return: The spec, and what it leaves out, by line.
    :raise RequestError: It is no domain of QEMU, or a value of it makes no sense.
    """
    if not data.strip():
        raise RequestError(f"{source} is empty", "virsh dumpxml DOMAIN prints what is read here")
    domain = _parse(data, source)
    if domain.tag != "domain":
        raise RequestError(
            f"{source}:{domain.line}: this is a <{domain.tag[:40]}>, not a <domain>",
            "virsh dumpxml DOMAIN prints what is read here",
        )
    return _Reader(source, domain).read()


class _Reader:
    """One domain on its way to a spec.

    :ivar values: The fields of the guest.
    :ivar lines: Where each of its keys stands in the XML.
    """

    def __init__(self, source: str, domain: _Element) -> None:
        self.source = source
        self.domain = domain
        self.values: dict[str, Any] = {}
        self.lines: dict[Place, int] = {("guest", 0): domain.line}
        self.changed: list[LeftOut] = []

    def read(self) -> tuple[Spec, tuple[LeftOut, ...]]:
        """Make the spec."""
        domain = self.domain
        domain.used = True
        domain.use("id")  # of this run only
        kind = domain.use("type")
        if kind not in _ACCELERATORS:
            raise self.fault(domain, f"is a domain of {kind[:40]!r}, not of kvm or qemu")
        self.set("accel", _ACCELERATORS[kind], domain)
        self._name()
        if (uuid := domain.child("uuid")) is not None:
            self.set("uuid", self.uuid(uuid, uuid.use_text()), uuid)
        self._memory()
        self._cpus()
        self._boot()
        if (devices := domain.child("devices")) is not None:
            self._devices(devices)
        spec = Spec(guests=(GuestConfig(**self.values),))
        document: Document = specs.check(spec, self.source, self.lines)
        left = [*self.changed, *_left_out(domain, self.source)]
        return document.spec, tuple(sorted(left, key=lambda it: it.line))

    # ---- helpers ----

    def set(self, name: str, value: object, element: _Element) -> None:
        """Set a key of the guest."""
        self.values[name] = value
        self.lines["guest", 0, name] = element.line

    def fault(self, element: _Element, what: str, hint: str = "") -> RequestError:
        """The error for a value that makes no sense."""
        return RequestError(f"{self.source}:{element.line}: {element.path}: {what}", hint)

    def change(self, element: _Element, why: str, *names: str) -> None:
        """List a value that is another one in the spec."""
        shown = element.shown(*names)
        self.changed.append(LeftOut(self.source, element.line, shown, why))

    def uuid(self, element: _Element, text: str) -> UUID:
        """Read a UUID."""
        found = as_uuid(text)
        if found is None:
            raise self.fault(element, f"{text[:40]!r} is not a UUID")
        return found

    def number(self, element: _Element, text: str) -> int:
        """Read a number."""
        if re.fullmatch(r"[0-9]{1,15}", text) is None:
            raise self.fault(element, f"{text[:40]!r} is not a whole number")
        return int(text)

    def amount(self, element: _Element) -> int:
        """The bytes that an element says; uses it."""
        number = self.number(element, element.use_text())
        unit = element.use("unit") or "KiB"
        if unit.lower() not in _UNITS:
            raise self.fault(element, f"{unit[:40]!r} is no unit of memory", "such as KiB or GiB")
        return number * _UNITS[unit.lower()]

    # ---- parts ----

    def _name(self) -> None:
        element = self.domain.child("name")
        if element is None or not (name := element.use_text()):
            raise self.fault(self.domain, "has no name")
        fitting = re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-._")[:40] or "guest"
        if fitting != name:
            self.change(element, f"a guest cannot have this name, and is {fitting}")
        self.set("name", fitting, element)

    def _memory(self) -> None:
        element = self.domain.child("memory")
        if element is None:
            raise self.fault(self.domain, "has no memory")
        size = self.amount(element)
        whole = max(-(-size // MIB), 1) * MIB
        if whole != size:
            self.change(element, f"a guest has whole MiB, so {specs.format_size(whole)}")
        self.set("memory", Size(whole), element)
        current = self.domain.child("currentMemory")
        if current is not None and self.amount(current) != size:
            self.change(current, _WHY[current.path])

    def _cpus(self) -> None:
        element = self.domain.child("vcpu")
        if element is None:
            return
        most = self.number(element, element.use_text())
        if element.get("placement") == "static":
            element.use("placement")
        now = self.number(element, element.use("current")) if element.get("current") else most
        if now != most:
            self.change(element, _WHY["vcpu current"], "current")
        self.set("cpus", now, element)

    def _boot(self) -> None:
        os_ = self.domain.child("os")
        if os_ is None:
            return
        type_ = os_.child("type")
        if type_ is not None:
            type_.use_text()  # hvm: there is no other one with QEMU
            if machine := type_.use("machine"):
                self.set("machine", machine, type_)
            if type_.get("arch") == "x86_64":
                type_.use("arch")
        for name, key in (("kernel", "kernel"), ("initrd", "initrd"), ("cmdline", "append")):
            if name != "kernel" and "kernel" not in self.values:
                break
            element = os_.child(name)
            if element is not None and (value := element.use_text()):
                self.set(key, value if name == "cmdline" else Path(value), element)
        for boot in os_.all("boot"):
            if boot.get("dev") == "hd":
                boot.used = True
                boot.use("dev")

    def _devices(self, devices: _Element) -> None:
        emulator = devices.child("emulator")
        if emulator is not None and (qemu := emulator.use_text()):
            self.set("qemu", qemu, emulator)
        for disk in sorted(devices.all("disk"), key=_boot_order):
            disk.why = "a guest of a spec has one disk" if "disk" in self.values else ""
            disk.why = _unfit(disk) or disk.why
            if not disk.why:
                self._disk(disk)
        found: list[GuestMdev] = []
        for hostdev in devices.all("hostdev"):
            source = hostdev.child("source") if _is_mdev(hostdev) else None
            address = source.child("address") if source is not None else None
            if address is None:
                continue
            hostdev.used = True
            # the device's type says which model it is, and libvirt manages no mdev
            hostdev.use("mode", "type", "model", "managed")
            hostdev.rest -= {key for key in ("display", "ramfb") if hostdev.get(key) == "off"}
            self.lines["guest", 0, "mdev", len(found)] = address.line
            found.append(GuestMdev(uuid=self.uuid(address, address.use("uuid"))))
        self.values["mdevs"] = tuple(found)

    def _disk(self, disk: _Element) -> None:
        source = disk.child("source")
        if source is None:
            raise AssertionError("an unfit disk")
        disk.used = True
        disk.use("device")
        self.set("disk", Path(source.use(_SOURCES[disk.use("type")])), source)
        driver = disk.child("driver")
        if driver is not None:
            driver.use("name")  # qemu: there is no other one
            if format_ := driver.use("type"):  # libvirt, too, takes raw without one
                self.set("disk_format", format_, driver)
        target = disk.child("target")
        if target is not None:
            target.use("dev")  # a hint, as libvirt says itself: the guest names its disks
            if target.get("bus") == "virtio":
                target.use("bus")
        boot = disk.child("boot")
        if boot is not None:
            boot.use("order")


def _boot_order(disk: _Element) -> int:
    """Where a disk comes among those that the guest may boot from."""
    orders = [boot.get("order") for boot in disk.all("boot")]
    return int(orders[0]) if orders and re.fullmatch(r"[0-9]{1,9}", orders[0]) else MAX_ELEMENTS


def _unfit(disk: _Element) -> str:
    """Why a disk cannot be the one of a guest; empty if it can."""
    if disk.get("device") not in {"", "disk"}:
        return f"a guest of a spec has no {one_line(disk.get('device')[:20])}"
    if disk.get("type") not in _SOURCES:
        return "a disk of a spec is a file or a block device"
    for protected in ("readonly", "transient"):
        if disk.has(protected):
            return f"it is {protected}, and a guest of a spec writes to its disk"
    sources = disk.all("source")
    if disk.has("encryption") or any(source.has("encryption") for source in sources):
        return "it is encrypted"
    if not sources or not sources[0].get(_SOURCES[disk.get("type")]).startswith("/"):
        return "it names no image"
    return ""


def _left_out(element: _Element, source: str) -> Iterator[LeftOut]:
    """What was not used of an element, by its outermost parts."""
    if not element.used:
        shown = element.shown(*element.attributes)
        yield LeftOut(source, element.line, shown, element.why or _why(element.path))
        return
    for name in element.attributes:
        if name in element.rest:
            why = _why(f"{element.path} {name}")
            yield LeftOut(source, element.line, element.shown(name), why)
    if text := element.text.strip():
        shown = repr(text if len(text) <= _SHOWN else text[:_SHOWN] + "...")
        yield LeftOut(source, element.line, f"{element.path} {shown}", _NO_KEY)
    for child in element.children:
        yield from _left_out(child, source)


def _why(path: str) -> str:
    return _WHY.get(path) or _ENDINGS.get(path.rpartition("/")[2]) or _NO_KEY
