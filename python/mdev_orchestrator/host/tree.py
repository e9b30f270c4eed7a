# SPDX-License-Identifier: GPL-2.0-or-later
"""Reads parents, types and mdevs from ``/sys``.

The layout is the kernel's (Documentation/ABI/testing/sysfs-bus-vfio-mdev)::

    class/mdev_bus/PARENT -> ../../devices/…/PARENT
    devices/…/PARENT/mdev_supported_types/TYPE/{create,name,available_instances,device_api,…}
    bus/mdev/devices/UUID -> ../../../devices/…/PARENT/UUID
    devices/…/PARENT/UUID/{mdev_type -> ../mdev_supported_types/TYPE, iommu_group -> …, remove}
    class/vfio/N, a group that VFIO users can open
    kernel/iommu_groups/N/devices/UUID -> ../../../../devices/…/PARENT/UUID
    devices/…/PARENT/UUID/vfio-dev/vfioN/dev

The last file is there when the kernel gives the device a node of its own,
``/dev/vfio/devices/vfioN``.

What a vendor's driver adds is optional: ``group_uuid``, ``online`` and ``vgpu_params`` of an mdev,
``p2p_links`` and ``p2p_links_free`` of a parent (kernel/ABI.rst).

A removal takes the links away first. While it waits for the process that has the device open, only
the device's own directory and its ``iommu_group`` are left of it, and its instance is still in use.
So devices are searched for below their parents too. A parent that goes loses its own link first,
and waits for the same processes: then only their groups lead to the devices.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Collection, Mapping
from pathlib import Path
from uuid import UUID

from mdev_orchestrator.host.values import (
    last_part,
    link_target,
    list_names,
    parse_count,
    printable,
    read_text,
    shown,
    unprintable,
)
from mdev_orchestrator.machine import Machine
from mdev_orchestrator.model import (
    CDEV_NODES,
    GROUP_FILE,
    Host,
    Mdev,
    MdevType,
    Parent,
    as_uuid,
    as_uuids,
    natural_key,
)

CLASS = "sys/class/mdev_bus"
"""Directory with a link to each parent, below the root."""
BUS = "sys/bus/mdev/devices"
"""Directory with a link to each mdev, below the root."""
VFIO = "sys/class/vfio"
"""Directory with an entry for each group that VFIO users can open, below the root."""
GROUPS = "sys/kernel/iommu_groups"
"""Directory with a directory for each IOMMU group, below the root."""
TYPES = "mdev_supported_types"
"""Directory of a parent with a directory for each of its types."""
ONLINE_FILE = "online"
"""The file of an mdev that says whether its start group is online."""
PARAMS_FILES = ("vgpu_params", "nvidia/vgpu_params")
"""Files of an mdev that hold its vendor's parameters; a driver has at most one of them."""

_CORE_FILES = frozenset(
    ("create", "name", "available_instances", "device_api", "description", "devices", "uevent")
)
_LIFECYCLE_FILES = frozenset(
    name.partition("/")[0] for name in (GROUP_FILE, ONLINE_FILE, *PARAMS_FILES)
)
_Kind = tuple[str, str | None]
"""Parent and type of an mdev."""
_Like = tuple[str | None, frozenset[str]]
"""What mdevs of a kind have in common: ``device_api``, and which of ``_LIFECYCLE_FILES``."""
_Links = tuple[str | OSError, str | OSError, str | None]
"""What an mdev's ``mdev_type`` and ``iommu_group`` lead to, and the name of its own node."""
_CDEV = re.compile(r"vfio\d+")
_NO_LIFECYCLE = None, None, None
_LINKS_FILES = ("p2p_links", "p2p_links_free")


async def scan(machine: Machine, *, types: bool = True) -> Host:
    """Read all parents, types and mdevs in a thread; see :func:`read_host`."""
    import asyncio  # here: a command that only reads the host does not load it

    return await asyncio.to_thread(read_host, machine, types=types)


def read_host(machine: Machine, *, types: bool = True) -> Host:
    """Read all parents, types and mdevs; a host with many takes longer than a coroutine may.

    What vanishes while it is read is left out; what cannot be read carries ``damage``. No content
    of the tree raises an error.

    :param types: Without them, which are most of the work, parents have none and mdevs no
        ``device_api``.
    """
    class_dir = machine.path(CLASS)
    bus_dir = machine.path(BUS)
    parent_names = list_names(class_dir)
    mdev_names = list_names(bus_dir)
    damage: list[str] = []
    parents = tuple(
        parent
        for name in sorted(printable(parent_names or (), damage), key=natural_key)
        if (parent := _parent(class_dir, name, with_types=types)) is not None
    )
    homes: dict[str, tuple[UUID, str, str]] = {}
    for parent in parents:
        path = os.fspath(parent.path)
        for name, uuid in as_uuids(list_names(path) or ()).items():
            homes[name] = uuid, parent.name, f"{path}/{name}"
    apis: dict[_Kind, str | None] = {
        (type_.parent, type_.id): type_.device_api for p in parents for type_ in p.types
    }
    # All links at once: one at a time between other work takes a fifth more.
    with_cdev = _has_cdevs(machine)
    links = {name: _links(path, with_cdev=with_cdev) for name, (_, _, path) in homes.items()}
    linked = set(mdev_names or ())
    held = _in_groups(machine, {group for _, group, _ in links.values()}, linked.union(homes))
    homes |= held
    links |= {name: _links(path, with_cdev=with_cdev) for name, (_, _, path) in held.items()}
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
            mdev = _linked_mdev(unhoused, link, kinds, apis, with_cdev=with_cdev)
        else:
            damage.append(f"{shown(name)} on the mdev bus is not a UUID")
        if mdev is not None:
            found.setdefault(mdev.parent, []).append(mdev)
    return Host(
        parents=parents,
        mdevs=tuple(mdev for parent in sorted(found, key=natural_key) for mdev in found[parent]),
        mdev_bus=parent_names is not None or mdev_names is not None,
        damage=tuple(damage),
    )


def read_mdev(machine: Machine, uuid: UUID) -> Mdev | None:
    """Read one mdev; ``None`` if there is no such device.

    Unlike :func:`read_host` it reads ``device_api`` from the device's own type link.
    """
    path = directory(machine, uuid)
    if path is None:
        return None
    where = os.path.dirname(path)
    if where != machine.path(BUS):
        return _leaving(uuid, os.path.basename(where), path)
    return _linked_mdev(uuid, path, {}, None, with_cdev=_has_cdevs(machine))


def directory(machine: Machine, uuid: UUID) -> str | None:
    """The directory of an mdev: on the mdev bus, or below its parent while it is being removed."""
    path = machine.path(BUS, str(uuid))
    if os.path.lexists(path):
        return path
    class_dir = machine.path(CLASS)
    for parent in list_names(class_dir) or ():
        path = os.path.join(os.path.realpath(os.path.join(class_dir, parent)), str(uuid))
        if os.path.exists(path):
            return path
    for group in list_names(machine.path(VFIO)) or ():
        link = machine.path(GROUPS, group, "devices", str(uuid))
        if os.path.lexists(link):
            return os.path.realpath(link)
    return None


def _in_groups(
    machine: Machine, known: Collection[object], mdevs: Collection[str]
) -> dict[str, tuple[UUID, str, str]]:
    """UUID, parent and own directory of mdevs in VFIO's groups, by their names in sysfs.

    :param known: Names of groups that are left out.
    :param mdevs: Names of mdevs that are left out.
    """
    homes = {}
    for group in set(list_names(machine.path(VFIO)) or ()) - {*known}:
        devices = machine.path(GROUPS, group, "devices")
        for name, uuid in as_uuids(list_names(devices) or ()).items():
            path = os.path.realpath(f"{devices}/{name}")
            if name not in mdevs:
                homes[name] = uuid, last_part(os.path.dirname(path)), path
    return homes


def parent_links(machine: Machine, parent: str) -> tuple[int | None, int | None]:
    """How many peer-to-peer links a parent has, and how many are free; ``None`` if it has no such
    file.
    """
    path = machine.path(CLASS, parent)
    links, free = (_optional_count(path, name, []) for name in _LINKS_FILES)
    return links, free


def _parent(class_dir: str, name: str, *, with_types: bool) -> Parent | None:
    link = os.path.join(class_dir, name)
    try:
        path = os.path.normpath(os.path.join(class_dir, link_target(link)))
    except FileNotFoundError:
        return None
    except OSError:
        path = link  # not a link: its types may be there nevertheless
    damage: list[str] = []
    types: list[MdevType] = []
    types_dir = os.path.join(path, TYPES)
    entries: list[str] = []
    try:
        if with_types:
            listed = (entry.name for entry in os.scandir(types_dir) if entry.is_dir())
            entries = printable(listed, damage)
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
        numa_node=_numa_node(path, damage),
        links=links,
        links_free=free,
        damage=tuple(damage),
    )


def _numa_node(path: str, damage: list[str]) -> int | None:
    text = read_text(f"{path}/numa_node", damage, optional=True)
    try:
        return None if text in (None, "-1") else parse_count(text)
    except ValueError as error:
        damage.append(f"numa_node {error}")
    return None


def _optional_count(path: str, name: str, damage: list[str]) -> int | None:
    text = read_text(f"{path}/{name}", damage, optional=True)
    try:
        return None if text is None else parse_count(text)
    except ValueError as error:
        damage.append(f"{name} {error}")
    return None


def _type(path: str, id_: str, parent: str) -> MdevType | None:
    damage: list[str] = []
    name = read_text(path + "/name", damage, optional=True)
    available = None
    count = read_text(path + "/available_instances", damage)
    if count is not None:
        try:
            available = parse_count(count)
        except ValueError as error:
            damage.append(f"available_instances {error}")
    api = read_text(path + "/device_api", damage)
    description = read_text(path + "/description", damage, optional=True)
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
        for name in sorted(list_names(f"{path}/{directory}") or ()):
            _attribute(f"{path}/{directory}", name, into, damage)


def _attribute(directory: str, name: str, into: dict[str, str], damage: list[str]) -> None:
    path = f"{directory}/{name}"
    try:
        mode = os.lstat(path).st_mode
    except OSError:
        return
    if not printable((name,), damage) or not stat.S_ISREG(mode) or not mode & 0o444:
        return
    text = read_text(path, damage, optional=True, empty=True)
    if text is not None:
        into[name if name not in into else f"{last_part(directory)}/{name}"] = text


def _linked_mdev(
    uuid: UUID,
    link: str,
    kinds: dict[_Kind, _Like],
    apis: Mapping[_Kind, str | None] | None,
    *,
    with_cdev: bool,
) -> Mdev | None:
    """Read an mdev of which only the link on the bus is known; see :func:`_mdev`."""
    try:
        path = os.path.normpath(os.path.join(os.path.dirname(link), link_target(link)))
    except FileNotFoundError:
        return None
    except OSError as error:
        reason = f"has no link to its parent: {os.strerror(error.errno or 0)}"
        links = _links(link, with_cdev=with_cdev)
        return _mdev(uuid, link, "", link, links, kinds, apis, (reason,))
    parent = os.path.basename(os.path.dirname(path))
    links = _links(path, with_cdev=with_cdev)
    return _mdev(uuid, link, parent, path, links, kinds, apis)


def _has_cdevs(machine: Machine) -> bool:
    """Whether any device has a node of its own: without one none has to be asked for it."""
    return os.path.isdir(machine.path(CDEV_NODES))


def _links(path: str, *, with_cdev: bool) -> _Links:
    cdev = cdev_name(path) if with_cdev else None
    return _link(f"{path}/mdev_type"), _link(f"{path}/iommu_group"), cdev


def cdev_name(path: str) -> str | None:
    """The name of a device's own VFIO node; ``None`` if the kernel gives it none.

    :param path: The device's directory.
    """
    for name in list_names(f"{path}/vfio-dev") or ():
        if _CDEV.fullmatch(name) and os.path.exists(f"{path}/vfio-dev/{name}/dev"):
            return name
    return None


def _link(path: str) -> str | OSError:
    """The name that a link leads to, or the error that reading it gives."""
    try:
        target = os.readlink(path)
    except OSError as error:
        return error
    return target.rpartition("/")[2] if target.isprintable() else unprintable()


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
    :param kinds: What is known of other mdevs and need not be read again; added to here.
    :param apis: Each kind's ``device_api``; without them its type is asked.
    """
    damage = list(damaged)
    type_id = None
    type_link, group_link, cdev = links
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
        files = _LIFECYCLE_FILES.intersection(list_names(path) or ())
        if apis is not None:
            api = apis.get(kind)
        else:
            api = read_text(f"{path}/mdev_type/device_api", damage, optional=True)
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
        cdev=cdev,
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
        text = read_text(f"{path}/{GROUP_FILE}", damage, optional=True, empty=True)
        if text and (group := as_uuid(text)) is None:
            damage.append(f"{GROUP_FILE} is not a UUID: {shown(text)}")
    if ONLINE_FILE in names:
        text = read_text(f"{path}/{ONLINE_FILE}", damage, optional=True)
        if text in ("0", "1"):
            online = text == "1"
        elif text is not None:
            damage.append(f"{ONLINE_FILE} is neither 0 nor 1: {shown(text)}")
    for name in PARAMS_FILES:
        if params is None and name.partition("/")[0] in names:
            params = read_text(f"{path}/{name}", damage, optional=True, empty=True)
    return group, online, params


def _leaving(uuid: UUID, parent: str, path: str) -> Mdev | None:
    """What is left of an mdev that is being removed; ``None`` if nothing is."""
    if not os.path.exists(path):
        return None
    damage = ["it is being removed, and the kernel waits for the process that has it open"]
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
