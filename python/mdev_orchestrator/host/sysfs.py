# SPDX-License-Identifier: GPL-2.0-or-later
"""The only module that reads or writes ``/sys``.

The layout is the kernel's (Documentation/ABI/testing/sysfs-bus-vfio-mdev)::

    class/mdev_bus/PARENT -> ../../devices/…/PARENT
    devices/…/PARENT/mdev_supported_types/TYPE/{create,name,available_instances,device_api,…}
    bus/mdev/devices/UUID -> ../../../devices/…/PARENT/UUID
    devices/…/PARENT/UUID/{mdev_type -> ../mdev_supported_types/TYPE, iommu_group -> …, remove}

What a vendor's driver adds is optional: ``group_uuid``, ``online`` and ``vgpu_params`` of an mdev,
``p2p_links`` and ``p2p_links_free`` of a parent (kernel/ABI.rst).

A removal takes the links away first. While it waits for whoever has the device open, only the
device's own directory and its ``iommu_group`` are left of it, and its instance is still in use; so
devices are looked for below their parents too.

Every function takes the directory in which ``sys`` stands, so that tests give another than ``/``.
What stands in the files comes from a vendor's driver and is not trusted: text is bounded, must be
UTF-8 without control characters, and numbers must be numbers; what is not becomes ``None`` and a
sentence in the object's ``damage``.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from uuid import UUID

from mdev_orchestrator.errors import (
    CapacityError,
    DeadlineError,
    HostError,
    MdoError,
    UnknownError,
    UuidError,
)
from mdev_orchestrator.model import (
    GROUP_FILE,
    Host,
    Mdev,
    MdevType,
    Parent,
    as_uuid,
    as_uuids,
    natural_key,
)
from mdev_orchestrator.system.writer import Writer, write_apart

ROOT = Path("/")

TEXT_LIMIT = 64 * 1024
"""Bytes; the kernel's own limit for one sysfs file is a page."""

_PAGE = 4096
_READ = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
_CORE_FILES = frozenset(
    ("create", "name", "available_instances", "device_api", "description", "devices", "uevent")
)
_ONLINE_FILE = "online"
_CORE_MDEV_FILES = frozenset(("remove", "uevent", "power", GROUP_FILE, _ONLINE_FILE))
PARAMS_FILES = ("vgpu_params", "nvidia/vgpu_params")
_LIFECYCLE_FILES = frozenset(
    name.partition("/")[0] for name in (GROUP_FILE, _ONLINE_FILE, *PARAMS_FILES)
)
_Kind = tuple[str, str | None]
"""Parent and type of an mdev."""
_Like = tuple[str | None, frozenset[str]]
"""What mdevs of a kind have in common: ``device_api``, and which of ``_LIFECYCLE_FILES``."""
_Links = tuple[str | OSError, str | OSError]
"""What an mdev's ``mdev_type`` and ``iommu_group`` lead to."""
_NO_LIFECYCLE = None, None, None
_LINKS_FILES = ("p2p_links", "p2p_links_free")
_COUNT_DIGITS = 10  # the kernel's counts are 32 bits wide
_GONE = frozenset((errno.ENOENT, errno.ENODEV, errno.ENOTDIR))
ON_ITS_WAY = _GONE | {0}
"""What writing to ``remove`` gives when the device goes: a removal takes the file away first and
the device later, and a second writer is told success, ENOENT or ENODEV."""


# ---- reading ------------------------------------------------------------------------------------


def scan(root: Path = ROOT, *, types: bool = True) -> Host:
    """Read all parents, types and mdevs of the machine.

    What vanishes while it is read is left out; what cannot be read carries ``damage``. Does not
    raise for anything that stands in the tree.

    :param types: Without them, which are most of the work, parents have none and mdevs no
        ``device_api``.
    """
    base = os.fspath(root)
    class_dir = os.path.join(base, "sys/class/mdev_bus")
    bus_dir = os.path.join(base, "sys/bus/mdev/devices")
    parent_names = _list(class_dir)
    mdev_names = _list(bus_dir)
    damage: list[str] = []
    parents = tuple(
        parent
        for name in sorted(_fit(parent_names or (), damage), key=natural_key)
        if (parent := _parent(class_dir, name, with_types=types)) is not None
    )
    homes: dict[str, tuple[UUID, str, str]] = {}
    for parent in parents:
        path = os.fspath(parent.path)
        for name, uuid in as_uuids(_list(path) or ()).items():
            homes[name] = uuid, parent.name, f"{path}/{name}"
    apis: dict[_Kind, str | None] = {
        (type_.parent, type_.id): type_.device_api for p in parents for type_ in p.types
    }
    # All links at once: to change between the kernel's work and ours for each takes a fifth more.
    links = {
        name: (_link(f"{path}/mdev_type"), _link(f"{path}/iommu_group"))
        for name, (_, _, path) in homes.items()
    }
    linked = set(mdev_names or ())
    found: dict[str, list[Mdev]] = {}
    kinds: dict[_Kind, _Like] = {}
    for name in sorted(linked.union(homes)):
        link = f"{bus_dir}/{name}"
        mdev = None
        home = homes.get(name)
        if home is not None:
            uuid, parent_name, path = home
            if name in linked:
                mdev = _mdev(uuid, link, parent_name, path, links[name], kinds, apis)
            elif not os.path.lexists(link):  # else it came after the bus was listed
                mdev = _leaving(uuid, parent_name, path)
        elif (unhoused := as_uuid(name)) is not None:
            mdev = _linked_mdev(unhoused, link, kinds, apis)
        else:
            damage.append(f"{_shown(name)} on the mdev bus is not a UUID")
        if mdev is not None:
            found.setdefault(mdev.parent, []).append(mdev)
    return Host(
        parents=parents,
        mdevs=tuple(mdev for parent in sorted(found, key=natural_key) for mdev in found[parent]),
        mdev_bus=parent_names is not None or mdev_names is not None,
        damage=tuple(damage),
    )


def read_mdev(uuid: UUID, root: Path = ROOT) -> Mdev | None:
    """Read one mdev by itself; ``None`` when there is no such device.

    Unlike :func:`scan` it reads ``device_api`` from the device's own type link.
    """
    path = directory(uuid, root)
    if path is None:
        return None
    where = os.path.dirname(path)
    if where != os.path.join(root, "sys/bus/mdev/devices"):
        return _leaving(uuid, os.path.basename(where), path)
    return _linked_mdev(uuid, path, {}, None)


def directory(uuid: UUID, root: Path = ROOT) -> str | None:
    """The directory of an mdev: on the mdev bus, or below its parent while it is being removed."""
    path = os.path.join(root, "sys/bus/mdev/devices", str(uuid))
    if os.path.lexists(path):
        return path
    class_dir = os.path.join(root, "sys/class/mdev_bus")
    for parent in _list(class_dir) or ():
        path = os.path.join(os.path.realpath(os.path.join(class_dir, parent)), str(uuid))
        if os.path.exists(path):
            return path
    return None


def vfio_node(uuid: UUID, root: Path = ROOT) -> str | None:
    """The device node that a user of this mdev opens; ``None`` until the kernel has named it.

    ``/dev/vfio/GROUP`` where there is an IOMMU group, ``/dev/vfio/devices/vfioN`` otherwise. The
    node itself need not be there yet.
    """
    try:
        group = _last(_target(file(uuid, "iommu_group", root)))
    except OSError:
        name = vfio_cdev(uuid, root)
        return None if name is None else os.path.join(root, "dev/vfio/devices", name)
    return os.path.join(root, "dev/vfio", group)


def vfio_cdev(uuid: UUID, root: Path = ROOT) -> str | None:
    """Name of the mdev's VFIO character device (``vfio0``), on kernels that have those."""
    names = _list(os.path.join(root, "sys/bus/mdev/devices", str(uuid), "vfio-dev"))
    return names[0] if names else None


def read_file(uuid: UUID, name: str, root: Path = ROOT) -> str | None:
    """Read an optional file of an mdev's directory: ``online``, ``nvidia/vgpu_params``…

    :return: Its text without trailing white space; ``None`` when this driver has no such file.
    :raise MdoError: It is there and cannot be read.
    """
    damage: list[str] = []
    path = os.path.join(root, "sys/bus/mdev/devices", str(uuid), name)
    text = _text(path, damage, optional=True, empty=True)
    if damage:
        raise MdoError(f"mdev {uuid}: {damage[0]}")
    return text


async def write_file(
    uuid: UUID, name: str, value: str, root: Path = ROOT, *, write: Writer = write_apart
) -> bool:
    """Write an optional file of an mdev's directory.

    :return: Whether this driver has that file.
    :raise MdoError: The driver refused the value.
    """
    path = file(uuid, name, root)
    number = await write(path, value.encode())
    if number == errno.ENOENT:
        return False
    if number:
        raise _refused(f"mdev {uuid} refused {value!r} for {name}", number)
    return True


def file(uuid: UUID, name: str, root: Path = ROOT) -> str:
    """Path of a file in an mdev's directory."""
    return os.path.join(root, "sys/bus/mdev/devices", str(uuid), name)


def leads_out(uuid: UUID, name: str, root: Path = ROOT) -> bool:
    """Whether a file's name goes through a link to somewhere outside the mdev's directory."""
    base = os.path.realpath(file(uuid, "", root))
    return os.path.commonpath((base, os.path.realpath(file(uuid, name, root)))) != base


def writable_files(uuid: UUID, root: Path = ROOT) -> tuple[str, ...]:
    """The vendor's files of an mdev that can be written, in its directory and one below."""
    base = file(uuid, "", root)
    found = []
    for name in _list(base) or ():
        inner = _list(base + name) if not os.path.islink(base + name) else None
        names = [name] if inner is None else [f"{name}/{entry}" for entry in inner]
        found += [
            path
            for path in names
            if path.partition("/")[0] not in _CORE_MDEV_FILES
            and not os.path.islink(base + path)
            and os.path.isfile(base + path)
            and os.stat(base + path).st_mode & 0o200
        ]
    return tuple(sorted(found))


def _list(path: str) -> list[str] | None:
    """Names in a directory, ``None`` if it cannot be listed."""
    try:
        return os.listdir(path)
    except OSError:
        return None


def _fit(names: Iterable[str], damage: list[str]) -> list[str]:
    """The names that can be shown; the others, which the kernel never makes, are ``damage``."""
    fit = []
    for name in names:
        if name.isprintable():  # neither control characters nor bytes that are no UTF-8
            fit.append(name)
        else:
            damage.append(f"there is an entry with an unprintable name: {name!a}")
    return fit


def _target(path: str) -> str:
    """What a link says.

    :raise OSError: There is none, or it is no text that can be shown (EILSEQ).
    """
    target = os.readlink(path)
    if not target.isprintable():
        raise _unprintable()
    return target


def _unprintable() -> OSError:
    return OSError(errno.EILSEQ, os.strerror(errno.EILSEQ))


def _text(
    path: str, damage: list[str], *, optional: bool = False, empty: bool = False
) -> str | None:
    """Text of a file, stripped; ``None`` and an entry in ``damage`` if it cannot be shown."""
    try:
        fd = os.open(path, _READ)
        try:
            data = os.read(fd, _PAGE)
            if len(data) == _PAGE:  # else it is the whole value: sysfs gives that at once
                while len(data) <= TEXT_LIMIT and (more := os.read(fd, TEXT_LIMIT)):
                    data += more
        finally:
            os.close(fd)
    except OSError as error:
        if not (optional and error.errno in _GONE):
            damage.append(f"{_last(path)} cannot be read: {os.strerror(error.errno or 0)}")
        return None
    if len(data) > TEXT_LIMIT:
        damage.append(f"{_last(path)} is larger than {TEXT_LIMIT // 1024} KiB")
        return None
    try:
        text = data.decode().strip()
    except UnicodeDecodeError:
        damage.append(f"{_last(path)} is not UTF-8")
        return None
    if not text and not empty:
        damage.append(f"{_last(path)} is empty")
        return None
    if not text.isprintable() and any(
        not line.isprintable() for line in text.replace("\t", " ").split("\n")
    ):
        damage.append(f"{_last(path)} contains control characters")
        return None
    return text


def _last(path: str) -> str:
    """The last part of a path or of what a link reads."""
    return path.rpartition("/")[2]


def parse_count(text: str) -> int:
    """A count as the kernel prints it: decimal digits, 32 bits.

    :raise ValueError: It is anything else; the message completes "the file …".
    """
    if len(text) < _COUNT_DIGITS and text.isascii() and text.isdecimal():
        return int(text)
    digits = text.removeprefix("-")
    if not (digits.isascii() and digits.isdecimal()):
        raise ValueError(f"is not a number: {_shown(text)}")
    if digits != text:
        raise ValueError(f"is negative: {_shown(text)}")
    if len(digits.lstrip("0")) > _COUNT_DIGITS or int(digits) >= 1 << 32:
        raise ValueError(f"is too large: {_shown(text)}")
    return int(digits)


def _shown(text: str) -> str:
    limit = 40
    return ascii(text if len(text) <= limit else text[:limit] + "...")


def _parent(class_dir: str, name: str, *, with_types: bool) -> Parent | None:
    link = os.path.join(class_dir, name)
    try:
        path = os.path.normpath(os.path.join(class_dir, _target(link)))
    except FileNotFoundError:
        return None
    except OSError:
        path = link  # not a link: whatever it is, its types can be looked for
    damage: list[str] = []
    types: list[MdevType] = []
    types_dir = os.path.join(path, "mdev_supported_types")
    entries: list[str] = []
    try:
        if with_types:
            listed = (entry.name for entry in os.scandir(types_dir) if entry.is_dir())
            entries = _fit(listed, damage)
    except OSError as error:
        if not os.path.lexists(link):
            return None
        damage.append(f"mdev_supported_types cannot be read: {os.strerror(error.errno or 0)}")
    for entry in sorted(entries, key=natural_key):
        type_ = _type(os.path.join(types_dir, entry), entry, name)
        if type_ is not None:
            types.append(type_)
    links, free = (_optional_count(path, file, damage) for file in _LINKS_FILES)
    return Parent(
        name=name,
        path=Path(path),
        types=tuple(types),
        links=links,
        links_free=free,
        damage=tuple(damage),
    )


def _optional_count(path: str, name: str, damage: list[str]) -> int | None:
    text = _text(f"{path}/{name}", damage, optional=True)
    try:
        return None if text is None else parse_count(text)
    except ValueError as error:
        damage.append(f"{name} {error}")
    return None


def _type(path: str, id_: str, parent: str) -> MdevType | None:
    damage: list[str] = []
    name = _text(path + "/name", damage, optional=True)
    available = None
    count = _text(path + "/available_instances", damage)
    if count is not None:
        try:
            available = parse_count(count)
        except ValueError as error:
            damage.append(f"available_instances {error}")
    api = _text(path + "/device_api", damage)
    description = _text(path + "/description", damage, optional=True)
    attributes: dict[str, str] = {}
    try:
        _attributes(path, attributes, damage)
    except OSError as error:
        if not os.path.lexists(path):
            return None
        damage.append(f"cannot be listed: {os.strerror(error.errno or 0)}")
    return MdevType(
        id=id_,
        parent=parent,
        name=name,
        available_instances=available,
        device_api=api,
        description=description,
        attributes=attributes,
        damage=tuple(damage),
    )


def _attributes(path: str, into: dict[str, str], damage: list[str]) -> None:
    """Collect the vendor's one-value files: beside the core's and one directory below."""
    directories = []
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.name in _CORE_FILES:
                continue
            if entry.is_dir(follow_symlinks=False):
                directories.append(entry.name)
            else:
                _attribute(path, entry.name, into, damage)
    for directory in sorted(directories):
        # one that is gone meanwhile held nothing that the core knows
        for name in sorted(_list(f"{path}/{directory}") or ()):
            _attribute(f"{path}/{directory}", name, into, damage)


def _attribute(directory: str, name: str, into: dict[str, str], damage: list[str]) -> None:
    path = f"{directory}/{name}"
    try:
        mode = os.lstat(path).st_mode
    except OSError:
        return
    if not _fit((name,), damage) or not stat.S_ISREG(mode) or not mode & 0o444:
        return
    text = _text(path, damage, optional=True, empty=True)
    if text is not None:
        into[name if name not in into else f"{_last(directory)}/{name}"] = text


def _linked_mdev(
    uuid: UUID, link: str, kinds: dict[_Kind, _Like], apis: Mapping[_Kind, str | None] | None
) -> Mdev | None:
    """Read an mdev of which only the link on the bus is known; see :func:`_mdev`."""
    try:
        path = os.path.normpath(os.path.join(os.path.dirname(link), _target(link)))
    except FileNotFoundError:
        return None
    except OSError as error:
        reason = f"has no link to its parent: {os.strerror(error.errno or 0)}"
        return _mdev(uuid, link, "", link, _links(link), kinds, apis, (reason,))
    parent = os.path.basename(os.path.dirname(path))
    return _mdev(uuid, link, parent, path, _links(path), kinds, apis)


def _links(path: str) -> _Links:
    return _link(f"{path}/mdev_type"), _link(f"{path}/iommu_group")


def _link(path: str) -> str | OSError:
    """The name that a link leads to, or why that cannot be told."""
    try:
        target = os.readlink(path)
    except OSError as error:
        return error
    return target.rpartition("/")[2] if target.isprintable() else _unprintable()


def _mdev(
    uuid: UUID,
    link: str,
    parent: str,
    path: str,
    links: _Links,
    kinds: dict[_Kind, _Like],
    apis: Mapping[_Kind, str | None] | None,
    damaged: tuple[str, ...] = (),
) -> Mdev | None:
    """Read one mdev of the bus.

    :param link: Its entry on the bus, which may be gone at any time.
    :param path: Its own directory: links are slow to follow.
    :param kinds: What is known of other mdevs and is not looked for again; added to here.
    :param apis: Each kind's ``device_api``; without them its type is asked.
    """
    damage = list(damaged)
    type_id = None
    type_link, group_link = links
    if isinstance(type_link, str):
        type_id = type_link
    elif isinstance(type_link, FileNotFoundError):
        if not os.path.lexists(link):  # its removal began meanwhile
            return _leaving(uuid, parent, path)
        if not os.path.exists(path):
            damage.append("its link leads nowhere")
    else:
        damage.append(f"mdev_type cannot be read: {os.strerror(type_link.errno or 0)}")
    group = _group(group_link, damage)
    kind = parent, type_id
    like = kinds.get(kind)
    if like is None:
        # A driver's files are added before the type is linked and removed after it, so a device
        # that has its link when they have been listed tells for all of its kind.
        files = _LIFECYCLE_FILES.intersection(_list(path) or ())
        if apis is not None:
            api = apis.get(kind)
        else:
            api = _text(f"{path}/mdev_type/device_api", damage, optional=True)
        like = api, files
        if type_id is not None and os.path.lexists(f"{path}/mdev_type"):
            kinds[kind] = like
    api, files = like
    start_group, online, params = _lifecycle(path, files, damage) if files else _NO_LIFECYCLE
    return Mdev(
        uuid=uuid,
        directory=link,
        parent=parent,
        type_id=type_id,
        device_api=api,
        iommu_group=group,
        group_uuid=start_group,
        online=online,
        params=params,
        damage=tuple(damage),
    )


def _lifecycle(
    path: str, names: Collection[str], damage: list[str]
) -> tuple[UUID | None, bool | None, str | None]:
    """Start group, state and parameters: files that few drivers have."""
    group = online = params = None
    if GROUP_FILE in names:
        text = _text(f"{path}/{GROUP_FILE}", damage, optional=True, empty=True)
        if text and (group := as_uuid(text)) is None:
            damage.append(f"{GROUP_FILE} is not a UUID: {_shown(text)}")
    if _ONLINE_FILE in names:
        text = _text(f"{path}/{_ONLINE_FILE}", damage, optional=True)
        if text in ("0", "1"):
            online = text == "1"
        elif text is not None:
            damage.append(f"{_ONLINE_FILE} is neither 0 nor 1: {_shown(text)}")
    for name in PARAMS_FILES:
        if params is None and name.partition("/")[0] in names:
            params = _text(f"{path}/{name}", damage, optional=True, empty=True)
    return group, online, params


def _leaving(uuid: UUID, parent: str, path: str) -> Mdev | None:
    """What is left of an mdev whose removal is under way, if anything is."""
    if not os.path.exists(path):
        return None
    damage = ["it is being removed, and the kernel waits for whoever has it open"]
    return Mdev(
        uuid=uuid,
        directory=path,
        parent=parent,
        type_id=None,
        iommu_group=_group(_link(f"{path}/iommu_group"), damage),
        damage=tuple(damage),
    )


def _group(link: str | OSError, damage: list[str]) -> int | None:
    if isinstance(link, str):
        try:
            return parse_count(link)
        except ValueError as error:
            damage.append(f"iommu_group {error}")
    elif not isinstance(link, FileNotFoundError):
        damage.append(f"iommu_group cannot be read: {os.strerror(link.errno or 0)}")
    return None


# ---- creating and removing ----------------------------------------------------------------------


async def create(
    parent: str, type_id: str, uuid: UUID, root: Path = ROOT, *, write: Writer = write_apart
) -> None:
    """Create one mdev; returns when the kernel has made it.

    Cancelling does not take the write back: the device may still appear.

    :raise UuidError: The UUID is taken, under whichever parent.
    :raise CapacityError: The driver has no instance of that type left.
    :raise UnknownError: Parent or type is not there, or goes at this moment.
    :raise HostError: No permission.
    :raise MdoError: The driver refused for another reason.
    """
    path, data = creation(parent, type_id, uuid, root)
    number = await write(path, data)
    if number:
        raise refusal(parent, type_id, uuid, number, root)


def creation(parent: str, type_id: str, uuid: UUID, root: Path = ROOT) -> tuple[str, bytes]:
    """What is to be written where to create one mdev.

    :raise UnknownError: Parent or type can be no name in sysfs.
    """
    return f"{_type_directory(parent, type_id, root)}/create", str(uuid).encode()


def refusal(parent: str, type_id: str, uuid: UUID, number: int, root: Path = ROOT) -> MdoError:
    """What it means that writing to ``create`` gave an errno; see :func:`create`."""
    what = f"cannot create {type_id} on {parent}"
    match number:
        case errno.EEXIST:
            return taken(uuid, root)
        case errno.EUSERS | errno.ENOSPC:
            damage: list[str] = []
            directory = _type_directory(parent, type_id, root)
            left = _text(f"{directory}/available_instances", damage)
            return CapacityError(
                f"{what}: the driver has no instance left",
                f"available_instances reads {left if left is not None else damage[0]}",
            )
        case errno.ENOENT:
            return UnknownError(f"{what}: no such type or parent", "mdo host lists them")
        case errno.ENODEV:
            return UnknownError(f"{what}: the parent is going away", "mdo host lists what remains")
    return _refused(what, number)


def available_instances(parent: str, type_id: str, root: Path = ROOT) -> int | None:
    """How many more of a type can be created now, as the kernel says; ``None`` if it does not."""
    text = _text(f"{_type_directory(parent, type_id, root)}/available_instances", [])
    try:
        return None if text is None else parse_count(text)
    except ValueError:
        return None


def _type_directory(parent: str, type_id: str, root: Path) -> str:
    for name in (parent, type_id):
        if "/" in name or "\0" in name or name in ("", ".", ".."):
            raise UnknownError(f"{_shown(name)} is not a name in sysfs")
    return os.path.join(root, "sys/class/mdev_bus", parent, "mdev_supported_types", type_id)


async def remove(
    uuid: UUID, deadline: float, root: Path = ROOT, *, write: Writer = write_apart
) -> None:
    """Remove one mdev; returns when it is gone.

    The kernel waits without end for whoever has the device open, so see
    :func:`mdev_orchestrator.host.holders.holders` first.

    A device that is still being created is waited for: it has ``remove`` already and its type not
    yet, and a write would be refused (EAGAIN) *and* take the file away for good
    (``remove_store`` and ``mdev_device_remove`` in drivers/vfio/mdev).

    :param deadline: Seconds.
    :raise DeadlineError: It is still there; the kernel goes on and ends the removal when the device
        is released.
    :raise UnknownError: There is no such mdev.
    :raise HostError: No permission.
    :raise MdoError: The kernel refused for another reason.
    """
    import asyncio  # here, because who only reads the host does without it

    from mdev_orchestrator.host.events import until

    path = _own_directory(uuid, root)

    def gone() -> bool:
        return not os.path.exists(path)

    def created() -> bool:
        return os.path.lexists(f"{path}/mdev_type") or not os.path.exists(f"{path}/remove")

    number = 0
    complete = created()
    try:
        async with asyncio.timeout(deadline):
            await until(created, root)
            complete = True
            number = await write(os.path.join(path, "remove"), b"1")
            if number in ON_ITS_WAY:
                await until(gone, root)
                return
    except TimeoutError:
        if not complete:
            raise DeadlineError(
                f"mdev {uuid} was not removed within {deadline:g} s: it is still being created",
                "its driver has not answered yet; try again when it has",
            ) from None
        raise DeadlineError(
            f"mdev {uuid} was not removed within {deadline:g} s: somebody has it open",
            "the kernel ends the removal by itself when the device is released",
        ) from None
    raise not_removed(uuid, number)


def removal(parent: Path, uuid: UUID) -> str:
    """The file that is written to remove an mdev: in its own directory, which outlives the links.

    :param parent: Its parent's own directory.
    """
    return f"{parent}/{uuid}/remove"


def not_removed(uuid: UUID, number: int) -> MdoError:
    """What it means that writing to ``remove`` gave an errno; see :func:`remove`."""
    return _refused(f"cannot remove mdev {uuid}", number)


def _own_directory(uuid: UUID, root: Path) -> str:
    """The device's directory itself: the link on the bus goes long before it may."""
    path = directory(uuid, root)
    if path is None:
        raise UnknownError(f"there is no mdev {uuid}", "mdo host lists them")
    return os.path.realpath(path)


def taken(uuid: UUID, root: Path = ROOT) -> UuidError:
    """The error that says under which parent a UUID exists already."""
    mdev = read_mdev(uuid, root)
    where = f" under parent {mdev.parent}" if mdev is not None and mdev.parent else ""
    kind = f" as {mdev.type_id}" if mdev is not None and mdev.type_id else ""
    return UuidError(f"mdev {uuid} exists already{where}{kind}", "choose another UUID")


def _refused(what: str, number: int) -> MdoError:
    reason = os.strerror(number)
    if number in (errno.EACCES, errno.EPERM):
        return HostError(f"{what}: {reason}", "run as root")
    if number == errno.EROFS:
        return HostError(f"{what}: {reason}", "/sys is mounted read-only: mount -o remount,rw /sys")
    if number == errno.EBUSY:
        return MdoError(f"{what}: {reason}", "somebody has it open or another type is in use")
    if number == errno.EINVAL:
        return MdoError(f"{what}: the driver does not accept it ({reason})", "see the kernel log")
    return MdoError(f"{what}: {reason}", "the driver's own words are in the kernel log (dmesg)")
