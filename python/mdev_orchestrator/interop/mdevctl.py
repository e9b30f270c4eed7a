# SPDX-License-Identifier: GPL-2.0-or-later
"""Reads and writes mdevctl's definitions without loss; converts them to a spec and back.

mdevctl keeps a file for each device that it may start, ``/etc/mdevctl.d/PARENT/UUID``, JSON::

    {
      "mdev_type": "vfio_ap-passthrough",
      "start": "auto",                          or "manual"; auto: when the parent appears
      "attrs": [
        {"assign_adapter": "5"},                files of the device, written in this order;
        {"assign_adapter": "6"},                one that is a command may be there again
        {"assign_domain": "0xab"}
      ]
    }

A UUID may be defined on several parents, and is started on one of them. Keys that are not known
are kept: mdevctl ignores them. Observed with mdevctl 1.2, and read in its ``src/mdev.rs`` and
``src/main.rs``.

=================  ===========================================
:func:`read`       files -> definitions, and what is wrong with the others
:func:`write`      definitions -> files
:func:`to_spec`    definitions -> a spec: one pool per definition
:func:`of_spec`    a spec -> definitions
:func:`of_mdev`    a device as it is now -> its definition
:func:`complete`   adds what mdevctl knows to devices of a spec that have only a UUID
=================  ===========================================

A definition that is converted to a spec and back is the same; so is a spec that came from
definitions.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, Literal
from uuid import UUID

import msgspec
from msgspec import Meta, Struct

from mdev_orchestrator import spec as specs
from mdev_orchestrator.errors import HostError, RequestError, UnknownError
from mdev_orchestrator.machine import Machine
from mdev_orchestrator.model import GROUP_FILE, Host, Mdev, is_uuid, natural_key
from mdev_orchestrator.spec import DecodingError, Document, GuestMdev, Place, Pool, Spec, decode

MAX_BYTES = 256 * 1024
"""Of a definition; the largest that makes sense, 256 adapters and 256 domains, has 20 KiB."""

_SCRIPTS = "scripts.d"  # call-outs of mdevctl, beside the parents


class Definition(Struct, frozen=True, kw_only=True):
    """One device as mdevctl has defined it.

    :ivar parent: Name of the parent device, which need not be there.
    :ivar type: Id of the type.
    :ivar start: ``auto``: mdevctl starts it when its parent appears.
    :ivar attributes: Files below the device's directory and what is written there, in order.
    :ivar extra: The keys of its file that are not mdevctl's: a JSON object as one line of text;
        empty for none.
    """

    uuid: UUID
    parent: str
    type: str
    start: Literal["auto", "manual"] = "manual"
    attributes: tuple[tuple[str, str], ...] = ()
    extra: str = ""


class Damage(Struct, frozen=True):
    """A file that should be a definition and is none.

    :ivar file: ``…/PARENT/UUID``; its name need not be a UUID.
    :ivar reason: A sentence without its subject.
    """

    file: Path
    reason: str

    def __str__(self) -> str:
        name = os.fspath(self.file)
        return f"{name if name.isprintable() else ascii(name)} {self.reason}"


class Definitions(Struct, frozen=True):
    """What a directory holds, in natural order of the parents and in order of the UUIDs."""

    found: tuple[Definition, ...] = ()
    damage: tuple[Damage, ...] = ()


class _File(Struct, frozen=True):
    """The keys of a file that mdevctl knows; it ignores any others."""

    mdev_type: Annotated[str, Meta(pattern=r"^[\s\S]", extra={"fault": "must not be empty"})]
    start: Literal["auto", "manual"]
    attrs: tuple[dict[str, str], ...] | None = None


# ---- JSON -----------------------------------------------------------------------------------


def from_json(uuid: UUID, parent: str, data: bytes) -> Definition:
    """Read the contents of a file.

    :raise ValueError: They are no definition; the message completes "the file …".
    """
    try:
        text = data.decode()
        known = _known(msgspec.json.decode(text))
    except UnicodeDecodeError:
        raise ValueError("is not UTF-8") from None
    except RecursionError:
        raise ValueError("is nested too deep") from None
    except msgspec.DecodeError:
        raise ValueError(f"is not JSON{_faulty_line(text)}") from None
    fields = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
    extra = {name: raw for name, raw in fields.items() if name not in _File.__struct_fields__}
    return Definition(
        uuid=uuid,
        parent=parent,
        type=known.mdev_type,
        start=known.start,
        attributes=tuple(item for attr in known.attrs or () for item in attr.items()),
        extra=_one_line(msgspec.json.encode(extra)) if extra else "",
    )


def _known(raw: object) -> _File:
    """What mdevctl knows of a file.

    :raise ValueError: It is no definition; the message completes "the file …".
    """
    try:
        known = decode(raw, _File)
    except DecodingError as error:
        where = f"{specs.key(error.place)}: " if error.place else ""
        raise ValueError(f"is no definition: {where}{error.message}") from None
    for number, attr in enumerate(known.attrs or ()):
        if len(attr) != 1:
            raise ValueError(f"is no definition: attrs[{number}]: must name one file")
    return known


def _faulty_line(text: str) -> str:
    """Where a text ceases to be JSON, for a message; empty if that cannot be found."""
    import json  # most commands do without it

    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        return f": line {error.lineno} cannot be read"
    except RecursionError:
        pass
    return ""


def _one_line(text: bytes) -> str:
    # DEL is the one control character that JSON does not escape
    return msgspec.json.format(text, indent=-1).decode().replace("\x7f", "\\u007f")


def to_plain(definition: Definition) -> dict[str, Any]:
    """What its file holds, for a JSON encoder: as mdevctl has it, further keys at the end."""
    extra = msgspec.json.decode(definition.extra or "{}", type=dict[str, msgspec.Raw])
    return {
        "mdev_type": definition.type,
        "start": definition.start,
        "attrs": [{name: value} for name, value in definition.attributes],
        **extra,
    }


def to_json(definition: Definition) -> str:
    """The contents of its file, to the byte as mdevctl writes them.

    ``mdevctl define --jsonfile`` and ``mdevctl start --jsonfile`` take them too.
    """
    return _pretty(to_plain(definition))


def dump(definitions: Iterable[Definition]) -> str:
    """What ``mdevctl list --defined --dumpjson`` prints when there are just these."""
    by_parent: dict[str, list[dict[str, Any]]] = {}
    for definition in sorted(definitions, key=lambda it: (it.parent, it.uuid)):
        by_parent.setdefault(definition.parent, []).append(
            {str(definition.uuid): to_plain(definition)}
        )
    return _pretty([by_parent] if by_parent else [])


def _pretty(value: object) -> str:
    return msgspec.json.format(msgspec.json.encode(value), indent=2).decode()


def _sorted(definitions: Iterable[Definition]) -> list[Definition]:
    return sorted(definitions, key=lambda it: (natural_key(it.parent), it.parent, it.uuid))


# ---- files ----------------------------------------------------------------------------------


def directory(machine: Machine) -> Path:
    """Where mdevctl keeps its definitions."""
    return Path(machine.path("etc", "mdevctl.d"))


def read(machine: Machine, where: Path | None = None) -> Definitions:
    """Read all definitions below a directory; one that is not there has none.

    Like mdevctl this follows no links. Does not raise for anything that stands there.

    :param where: The directory; mdevctl's own without it.
    """
    found: list[Definition] = []
    damage: list[Damage] = []
    for parent in _entries(where or directory(machine), damage):
        if parent.is_symlink():
            damage.append(Damage(Path(parent.path), "is a link, which mdevctl passes over"))
        elif parent.name != _SCRIPTS and parent.is_dir(follow_symlinks=False):
            for entry in _entries(Path(parent.path), damage):
                try:
                    if is_uuid(entry.name) or not entry.is_dir(follow_symlinks=False):
                        found.append(_definition(parent.name, entry))
                except ValueError as error:
                    damage.append(Damage(Path(entry.path), str(error)))
    return Definitions(tuple(_sorted(found)), tuple(damage))


def defined(machine: Machine) -> Mapping[UUID, tuple[Definition, ...]]:
    """Read the definitions of a machine: by UUID, for each in natural order of the parents."""
    found = sorted(read(machine).found, key=lambda it: it.uuid)
    return {uuid: tuple(same) for uuid, same in groupby(found, key=lambda it: it.uuid)}


def select(
    definitions: Definitions, uuids: Sequence[UUID] = (), parent: str | None = None
) -> Definitions:
    """Select the definitions of some UUIDs and of one parent; without these, of all.

    :raise UnknownError: There is none of this UUID or this parent.
    :raise RequestError: One that is named cannot be read.
    """
    found = tuple(it for it in definitions.found if parent in {None, it.parent})
    damage = tuple(it for it in definitions.damage if parent in {None, it.file.parent.name})
    where = "" if parent is None else f" on {parent}"
    if not uuids:
        if not found and not damage:
            names = sorted({it.parent for it in definitions.found}, key=natural_key)
            hint = f"it has some on {', '.join(names)}" if names else "mdevctl define makes them"
            raise UnknownError(f"mdevctl has no definitions{where}", hint)
        return Definitions(found, damage)
    for uuid in uuids:
        if all(it.uuid != uuid for it in found):
            for it in damage:
                if it.file.name == str(uuid):
                    raise RequestError(str(it), "mend or remove the file")
            raise UnknownError(
                f"mdevctl has not defined {uuid}{where}", "mdevctl list --defined lists what it has"
            )
    return Definitions(tuple(it for it in found if it.uuid in uuids))


def _entries(where: Path, damage: list[Damage]) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(where) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except FileNotFoundError:
        return []
    except OSError as error:
        damage.append(Damage(where, f"cannot be read: {os.strerror(error.errno or 0)}"))
        return []


def _definition(parent: str, entry: os.DirEntry[str]) -> Definition:
    """Read one file.

    :raise ValueError: It is no definition; the message completes "the file …".
    """
    if not parent.isprintable():
        raise ValueError("is of a parent with a name that no kernel makes")
    if not is_uuid(entry.name):
        raise ValueError("is no definition: its name is not a UUID")
    if entry.name != entry.name.lower():
        raise ValueError("has capital letters in its name, and mdevctl would write another file")
    if entry.is_symlink():
        raise ValueError("is a link, which mdevctl passes over")
    try:
        data = _bytes(entry.path)
    except OSError as error:
        raise ValueError(f"cannot be read: {os.strerror(error.errno or 0)}") from None
    return from_json(UUID(entry.name), parent, data)


def _bytes(path: str | Path) -> bytes:
    # without O_NONBLOCK a FIFO without a writer would hold the command for ever
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    with open(fd, "rb") as file:  # noqa: PTH123 - a descriptor
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise ValueError("is not a file")
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(f"is larger than {MAX_BYTES // 1024} KiB")
    return data


def path(definition: Definition, where: Path) -> Path:
    """The file of a definition.

    :raise RequestError: Its parent's name is none.
    """
    if "/" in definition.parent or definition.parent in {"", ".", "..", _SCRIPTS}:
        raise RequestError(f"{definition.parent!r} is not the name of a parent device")
    return where / definition.parent / str(definition.uuid)


def write(
    machine: Machine,
    definitions: Sequence[Definition],
    where: Path | None = None,
    *,
    force: bool = False,
) -> tuple[Path, ...]:
    """Write definitions to their files, with the modes that mdevctl gives them.

    All files are checked before the first is written. Each is on the disk when this returns, and is
    there whole or not at all at any moment.

    :param where: The directory; mdevctl's own without it.
    :param force: Replace definitions that are different, too.
    :return: The files that were written: those that hold their definition already are not.
    :raise RequestError: A file holds something else; nothing was written.
    :raise HostError: A file cannot be written.
    """
    where = where or directory(machine)
    wanted = {path(definition, where): definition for definition in definitions}
    missing = {
        file: definition for file, definition in wanted.items() if not _holds(file, definition)
    }
    if not force:
        for file in missing:
            _refuse_taken(file)
    for file, definition in missing.items():
        try:
            _store(file, to_json(definition).encode(), where, force=force)
        except OSError as error:
            if error.errno == errno.EEXIST:  # another program wrote it since the check
                _refuse_taken(file)
            reason = os.strerror(error.errno or 0)
            hint = "run as root" if error.errno in {errno.EACCES, errno.EPERM} else ""
            raise HostError(
                f"{file} cannot be written: {reason}", hint, errno=error.errno
            ) from error
    if missing:
        for changed in {where, *(file.parent for file in missing)}:
            _sync(changed)
    return tuple(missing)


def _holds(file: Path, definition: Definition) -> bool:
    try:
        return from_json(definition.uuid, definition.parent, _bytes(file)) == definition
    except (OSError, ValueError):
        return False


def _refuse_taken(file: Path) -> None:
    if os.path.lexists(file):
        raise RequestError(
            f"{file} defines the device {file.name} otherwise",
            "--force replaces it; mdevctl list --defined --verbose shows it",
        )


def _store(file: Path, data: bytes, where: Path, *, force: bool) -> None:
    """Put a file in its place; its name is on the disk when the directories are.

    ``system.files.write_atomic`` would replace what another program put there meanwhile, and have
    its draft beside the definitions, where mdevctl complains of it.
    """
    where.mkdir(parents=True, exist_ok=True)
    file.parent.mkdir(exist_ok=True)
    # beside the parents mdevctl passes over a file that it does not know
    draft = where / f".mdo-{os.urandom(8).hex()}"
    try:
        with draft.open("xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        if force:
            draft.replace(file)
        else:
            file.hardlink_to(draft)  # which, unlike a rename, replaces nothing
    finally:
        draft.unlink(missing_ok=True)


def _sync(directory_: Path) -> None:
    fd = os.open(directory_, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# ---- specs ----------------------------------------------------------------------------------


def to_spec(definitions: Iterable[Definition]) -> tuple[Spec, tuple[RequestError, ...]]:
    """Make a spec that asks for these devices: a pool for each, named by the UUID.

    :return: The spec, and why it leaves some out: their UUID is defined on several parents, or a
        spec cannot ask for what they ask for (:func:`to_pool`).
    """
    ordered = _sorted(definitions)
    parents: dict[UUID, list[str]] = {}
    for definition in ordered:
        parents.setdefault(definition.uuid, []).append(definition.parent)
    faults = [
        RequestError(
            f"mdevctl defines {uuid} on {' and on '.join(names)}, and a device exists once",
            f"choose with --parent {names[0]}",
        )
        for uuid, names in parents.items()
        if len(names) > 1
    ]
    pools = []
    for definition in ordered:
        if len(parents[definition.uuid]) == 1:
            try:
                pools.append(to_pool(definition))
            except RequestError as error:
                faults.append(error)
    return Spec(pools=tuple(pools)), tuple(faults)


def to_pool(definition: Definition) -> Pool:
    """Make the pool that asks for one device.

    :raise RequestError: A spec cannot ask for it.
    """
    pool = Pool(
        name=str(definition.uuid),
        uuid=definition.uuid,
        type=definition.type,
        parent=definition.parent,
        attributes=definition.attributes,
        start=definition.start,
        mdevctl=definition.extra,
    )
    try:
        specs.check(Spec(pools=(pool,)))
    except RequestError as error:
        what = error.message.partition("pool[0].")[2] or error.message
        raise RequestError(
            f"mdevctl's definition of {definition.uuid} on {definition.parent}: {what}", error.hint
        ) from None
    return pool


def of_spec(document: Document, host: Host) -> tuple[Definition, ...]:
    """Make the definitions of the devices of a spec.

    A definition needs a UUID, a parent and a type. What the spec leaves open is taken from the
    device, if it exists.

    :raise RequestError: With file and line: one of these is not known.
    """
    return tuple(
        _of_request(document, place, devices, host) for place, _, devices in document.spec.devices()
    )


def _of_request(
    document: Document, place: Place, devices: GuestMdev | Pool, host: Host
) -> Definition:
    if devices.uuid is None:
        raise document.fault(place, "mdevctl defines devices by UUID", 'add uuid = "…"')
    mdev = host.find(devices.uuid)
    type_ = devices.type or (mdev and mdev.type_id)
    parent = devices.parent or (mdev and mdev.parent)
    for name, value in (("type", type_), ("parent", parent)):
        if not value:
            raise document.fault(
                place, f"mdevctl defines a device with its {name}", f'add {name} = "…"'
            )
    group = None
    if isinstance(devices, GuestMdev) and devices.group is not None:
        group = mdev.group_uuid if mdev is not None else None
        if is_uuid(devices.group):
            group = UUID(devices.group)
        if group is None:
            raise document.fault(
                (*place, "group"),
                f"mdevctl defines a group by UUID, and {devices.group} has none yet",
                "name the group by a UUID, or start the guest first",
            )
    return of_device(
        devices.uuid,
        parent or "",
        type_ or "",
        params=devices.params,
        attributes=devices.attributes,
        group=group,
        start=devices.start if isinstance(devices, Pool) else "manual",
        extra=devices.mdevctl if isinstance(devices, Pool) else "",
    )


def of_device(
    uuid: UUID,
    parent: str,
    type_: str,
    *,
    params: str = "",
    attributes: Sequence[tuple[str, str]] = (),
    group: UUID | None = None,
    start: Literal["auto", "manual"] = "manual",
    extra: str = "",
) -> Definition:
    """Make the definition of a device that is set up as this project does: params, files, group."""
    files = [*attributes]
    if params:
        files.insert(0, (_params_file(type_), params))
    if group is not None:
        files.append((GROUP_FILE, str(group)))
    return Definition(
        uuid=uuid,
        parent=parent,
        type=type_,
        start=start,
        attributes=tuple(files),
        extra=_one_line(extra.encode()) if extra else "",
    )


def _params_file(type_: str) -> str:
    # a type's id begins with the name of its driver (mdev core); only NVIDIA's has a directory
    return "nvidia/vgpu_params" if type_.startswith("nvidia-") else "vgpu_params"


def of_mdev(mdev: Mdev, known: Iterable[Definition] = ()) -> Definition:
    """Make the definition of a device as it is.

    :param known: Definitions that exist. One of this device that agrees with what can be read of it
        is its definition: some files can only be written.
    :raise RequestError: The device is being removed.
    """
    if mdev.type_id is None:
        raise RequestError(f"mdev {mdev.uuid} is being removed", "mdo host lists what remains")
    now = of_device(
        mdev.uuid, mdev.parent, mdev.type_id, params=mdev.params or "", group=mdev.group_uuid
    )
    for definition in known:
        if is_of(mdev, definition) and _readable(definition) == _readable(now):
            return definition
    return now


def _readable(definition: Definition) -> dict[str, str]:
    """What can be read back of a definition's attributes."""
    files = {GROUP_FILE, _params_file(definition.type)}
    return {name: value.lower() for name, value in definition.attributes if name in files and value}


# ---- devices of a spec that mdevctl knows ---------------------------------------------------


def complete(
    document: Document, definitions: Mapping[UUID, Sequence[Definition]], host: Host
) -> Document:
    """Fill in what mdevctl knows of the devices of which a spec says little more than the UUID.

    A device for which the spec says a type or a condition is left as it is, and so is one that
    exists and is not as defined. The others get type, parent and attributes, and a guest's device
    its group.

    :param definitions: As :func:`defined` gives them.
    :raise RequestError: With file and line: it is defined on several parents.
    """
    filled: dict[Place, GuestMdev | Pool] = {}
    for place, _, devices in document.spec.devices():
        if devices.uuid is None or devices.type is not None or devices.conditions:
            continue
        found = host.find(devices.uuid)
        known = [
            definition
            for definition in definitions.get(devices.uuid, ())
            if devices.parent in {None, definition.parent}
            and (found is None or (is_of(found, definition) and _in_its_group(found, definition)))
        ]
        if not known:
            continue
        if len(known) > 1:
            raise document.fault(
                (*place, "uuid"),
                f"mdevctl defines {devices.uuid} on "
                + " and on ".join(definition.parent for definition in known),
                f'add parent = "{known[0].parent}"',
            )
        filled[place] = _filled(devices, known[0])
    if not filled:
        return document
    spec = document.spec
    guests = tuple(
        msgspec.structs.replace(
            guest,
            mdevs=tuple(
                filled.get(("guest", number, "mdev", index), mdev)
                for index, mdev in enumerate(guest.mdevs)
            ),
        )
        for number, guest in enumerate(spec.guests)
    )
    pools = tuple(filled.get(("pool", number), pool) for number, pool in enumerate(spec.pools))
    spec = msgspec.structs.replace(spec, guests=guests, pools=pools)
    return specs.check(spec, document.source, document.lines)


def is_of(mdev: Mdev, definition: Definition) -> bool:
    """Whether a device is the one that is defined."""
    where = (mdev.uuid, mdev.parent, mdev.type_id)
    return where == (definition.uuid, definition.parent, definition.type)


def _in_its_group(mdev: Mdev, definition: Definition) -> bool:
    group = None if mdev.group_uuid is None else str(mdev.group_uuid)
    return _readable(definition).get(GROUP_FILE) == group


def _filled(devices: GuestMdev | Pool, definition: Definition) -> GuestMdev | Pool:
    to_pool(definition)  # its error names the definition if a spec cannot ask for it
    attributes = devices.attributes or definition.attributes
    changes: dict[str, Any] = {"type": definition.type, "parent": definition.parent}
    if isinstance(devices, GuestMdev):
        groups = [value for name, value in attributes if name == GROUP_FILE]
        attributes = tuple(item for item in attributes if item[0] != GROUP_FILE)
        if groups and devices.group is None:
            changes["group"] = groups[-1]
    return msgspec.structs.replace(devices, **changes, attributes=attributes)
