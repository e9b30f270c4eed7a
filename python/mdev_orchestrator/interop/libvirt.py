# SPDX-License-Identifier: GPL-2.0-or-later
"""Domains of the libvirt of this host: which run, what they have, and how to give and take mdevs.

All that is done to a domain is done by libvirt, through its Python binding (``libvirt-python``, or
Debian's ``python3-libvirt``), which need not be there: the processes of domains are known without
it, by the pid files that libvirt has in ``/run/libvirt/qemu``.

The binding blocks, without a time limit, when libvirt does not answer. Each call is made in a
thread of its own, with a connection of its own, and the thread is left behind at the deadline.
What is known then: a call that was not begun has had no effect, of one that was begun it is not
known. Read in libvirt 9.0: a request that libvirt has received is done even if its client has gone;
requests that change a domain wait for each other, and requests for its XML do not.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

from msgspec import Struct

from mdev_orchestrator import errors
from mdev_orchestrator.errors import Outcome
from mdev_orchestrator.interop import domain_xml
from mdev_orchestrator.machine import Machine

T = TypeVar("T")


class Domain(Struct, frozen=True):
    """A domain of libvirt that runs.

    :ivar uuid: libvirt's own of it.
    :ivar pid: Its QEMU.
    """

    name: str
    uuid: UUID
    pid: int

    @property
    def label(self) -> str:
        """How messages name it."""
        return f"libvirt domain {self.name}"


URI = "LIBVIRT_DEFAULT_URI"
"""Variable of the environment that libvirt's own programs take the address from. One of another
host, or of a user's session, is not used: its domains are not those that are looked for."""
_PLACE = ("run", "libvirt")
_SOCKETS = ("virtqemud-sock", "libvirt-sock")
INSTALL = "install libvirt's Python binding: apt install python3-libvirt, or pip's libvirt-python"

_Connection = Any
"""A ``libvirt.virConnect``; the binding has no types."""
_Domain = Any
"""A ``libvirt.virDomain``."""


def processes(machine: Machine) -> dict[int, str]:
    """The names of domains by their process ids, as libvirt has written them down.

    A process of this number may be another one since: libvirt may have been killed.
    """
    place = Path(machine.path(*_PLACE, "qemu"))
    found = {}
    with suppress(OSError):
        for file in place.glob("*.pid"):
            with suppress(OSError, ValueError):
                found[int(file.read_text("ascii"))] = file.stem
    return found


def uri(machine: Machine) -> str:
    """The address of the libvirt of this host."""
    wanted = os.environ.get(URI, "")
    if wanted.startswith(("qemu:///system", "qemu+unix:///system")):
        return wanted
    if machine.root == Path("/"):
        return "qemu:///system"
    return f"qemu+unix:///system?socket={_socket(machine) or ''}"


def _socket(machine: Machine) -> str | None:
    sockets = [machine.path(*_PLACE, name) for name in _SOCKETS]
    return next(filter(os.path.exists, sockets), None)


def is_there(machine: Machine) -> bool:
    """Whether the host has a libvirt that may run guests of QEMU."""
    return _socket(machine) is not None


def is_installed() -> bool:
    """Whether the binding is there."""
    from importlib.util import find_spec

    return find_spec("libvirt") is not None


def hostdev(uuid: UUID, device_api: str) -> str:
    """The XML of an mdev as a device of a domain."""
    source = f"<source><address uuid='{uuid}'/></source>"
    return f"<hostdev mode='subsystem' type='mdev' model='{device_api}'>{source}</hostdev>"


def virsh(verb: str, domain: str, uuid: UUID, device_api: str) -> str:
    """The command that does what the binding would do.

    :param verb: ``attach`` or ``detach``.
    """
    xml = f'echo "{hostdev(uuid, device_api)}"'
    return f"{xml} | virsh {verb}-device --live {shlex.quote(domain)} /proc/self/fd/0"


# ---- what is asked of libvirt ---------------------------------------------------------------


async def devices(machine: Machine, domain: Domain, deadline: float) -> Mapping[UUID, str]:
    """The mdevs that a domain has now, and what QEMU calls each.

    :param deadline: Seconds.
    :raise UnknownError: libvirt has no such domain.
    :raise DeadlineError: libvirt does not answer.
    :raise HostError: It cannot be reached.
    :raise QemuError: It refuses.
    """

    def look(found: _Domain, begin: Callable[[], None]) -> Mapping[UUID, str]:
        begin()
        return domain_xml.mdevs(found.XMLDesc(0))

    return await _call(machine, domain, "say what it has", deadline, look)


async def attach_device(machine: Machine, domain: Domain, xml: str, deadline: float) -> None:
    """Give a domain a device, as long as it runs; it is not part of its configuration.

    :param xml: The device's.
    :raise MdoError: As of :func:`devices`. Where libvirt refuses, the outcome is "no effect" by its
        word: look.
    """
    await _call(machine, domain, "attach the device", deadline, _live("attachDeviceFlags", xml))


async def detach_device(machine: Machine, domain: Domain, xml: str, deadline: float) -> None:
    """Have the guest asked to let go of a device; libvirt waits five seconds for its answer.

    :param xml: The device's.
    :raise MdoError: As of :func:`attach_device`.
    """
    await _call(machine, domain, "detach the device", deadline, _live("detachDeviceFlags", xml))


def _live(name: str, xml: str) -> Callable[[_Domain, Callable[[], None]], None]:
    def act(found: _Domain, begin: Callable[[], None]) -> None:
        import libvirt

        begin()
        getattr(found, name)(xml, libvirt.VIR_DOMAIN_AFFECT_LIVE)

    return act


async def monitor_command(machine: Machine, domain: Domain, command: str, deadline: float) -> str:
    """Have libvirt ask a domain's QEMU something; libvirt calls the domain *tainted* then.

    :param command: A command of QMP as JSON.
    :return: QEMU's answer, the whole JSON document.
    """

    def ask(found: _Domain, begin: Callable[[], None]) -> str:
        import libvirt_qemu

        begin()
        return str(libvirt_qemu.qemuMonitorCommand(found, command, 0))

    return await _call(machine, domain, "ask its QEMU", deadline, ask)


# ---- calls ----------------------------------------------------------------------------------


class _AbandonedError(Exception):
    """The caller has given the call up before it began."""


class _Begun:
    """Whether a call has begun, or was given up before; one of the two."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._begun = False
        self._abandoned = False

    def begin(self) -> None:
        """:raise _AbandonedError: It was given up."""
        with self._lock:
            if self._abandoned:
                raise _AbandonedError
            self._begun = True

    def abandon(self) -> bool:
        """Give the call up; whether it had begun."""
        with self._lock:
            self._abandoned = True
            return self._begun


async def _call(
    machine: Machine,
    domain: Domain,
    what: str,
    deadline: float,
    work: Callable[[_Domain, Callable[[], None]], T],
) -> T:
    """Do something with a domain in a thread that can be left behind.

    :param what: Completes "libvirt did not …".
    :param work: Calls what it is given right before it acts.
    """
    if not is_installed():
        raise errors.HostError(
            f"{domain.label}: libvirt's Python binding is not there",
            INSTALL,
            outcome=Outcome.NO_EFFECT,
            subject=domain.label,
        )
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[T] = loop.create_future()
    begun = _Begun()

    def deliver(result: T | None, error: Exception | None) -> None:
        if answer.cancelled():
            return
        if error is not None:
            answer.set_exception(error)
        else:
            answer.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        try:
            result, error = _connected(uri(machine), domain, what, begun, work), None
        except Exception as failure:  # noqa: BLE001 - it is the caller's
            result, error = None, failure
        with suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(deliver, result, error)

    # not one of the loop's: those are waited for at the end of the program
    threading.Thread(target=run, name="libvirt", daemon=True).start()
    try:
        async with asyncio.timeout(deadline):
            return await answer
    except TimeoutError:
        outcome = Outcome.UNKNOWN if begun.abandon() else Outcome.NO_EFFECT
        raise errors.DeadlineError(
            f"{domain.label}: libvirt did not {what} within {deadline:.1f} s"
            + ("; it may do so yet" if outcome is Outcome.UNKNOWN else ""),
            "see systemctl status libvirtd virtqemud: does it run, or was it stopped?",
            outcome=outcome,
            subject=domain.label,
        ) from None
    except asyncio.CancelledError:
        begun.abandon()
        raise


def _connected(
    address: str,
    domain: Domain,
    what: str,
    begun: _Begun,
    work: Callable[[_Domain, Callable[[], None]], T],
) -> T:
    """Do something with a domain by a connection of its own; in a thread."""
    try:
        import libvirt
    except ImportError as error:
        raise errors.HostError(
            f"{domain.label}: libvirt's Python binding cannot be loaded: {error}",
            INSTALL,
            outcome=Outcome.NO_EFFECT,
            subject=domain.label,
        ) from error

    libvirt.registerErrorHandler(_keep_quiet, None)
    connection: _Connection = None
    try:
        connection = libvirt.open(address)
        found = connection.lookupByUUID(domain.uuid.bytes)
        return work(found, begun.begin)
    except libvirt.libvirtError as error:
        words = error.get_error_message() or str(error)
        if connection is None:
            raise errors.HostError(
                f"{domain.label}: libvirt cannot be reached: {words}",
                "see systemctl status libvirtd virtqemud, and virsh list",
                outcome=Outcome.NO_EFFECT,
                subject=domain.label,
            ) from error
        if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
            raise errors.UnknownError(
                f"libvirt has no domain {domain.name} with the UUID {domain.uuid}",
                "virsh list --all lists what it has",
                outcome=Outcome.NO_EFFECT,
                subject=domain.label,
            ) from error
        # an answer has come by a connection that is still there
        answered = connection.isAlive() == 1 or not begun.abandon()
        did = "libvirt did not" if answered else "it is not known whether libvirt did"
        raise errors.QemuError(
            f"{domain.label}: {did} {what}: {words}",
            outcome=Outcome.NO_EFFECT if answered else Outcome.UNKNOWN,
            subject=domain.label,
        ) from error
    finally:
        if connection is not None:
            with suppress(libvirt.libvirtError):
                connection.close()


def _keep_quiet(_context: object, _error: object) -> None:
    """The binding would print each error."""
