# SPDX-License-Identifier: GPL-2.0-or-later
"""``mdo import`` and ``mdo export``: definitions of mdevctl, and domains of libvirt."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from mdev_orchestrator.cli import output
from mdev_orchestrator.cli.context import machine
from mdev_orchestrator.cli.params import Json, complete_parent
from mdev_orchestrator.engine.journal_db import read_managed
from mdev_orchestrator.errors import HostError, MdoError, RequestError, UnknownError
from mdev_orchestrator.host.sysfs import read_host
from mdev_orchestrator.interop import domain_xml, mdevctl
from mdev_orchestrator.interop.mdevctl import Definition
from mdev_orchestrator.model import is_uuid, parse_uuid
from mdev_orchestrator.spec import Spec, load, to_plain, to_toml


def import_(
    what: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="UUID...|DOMAIN.xml",
            help="Devices that mdevctl has defined, all if none is named; or a domain of libvirt.",
        ),
    ] = None,
    *,
    parent: Annotated[
        str | None,
        typer.Option(
            metavar="PARENT", help="Only those on this parent.", autocompletion=complete_parent
        ),
    ] = None,
    from_: Annotated[
        Path | None,
        typer.Option(
            "--from", metavar="DIR", help="Directory of definitions; /etc/mdevctl.d if not given."
        ),
    ] = None,
    to: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE", help="Spec to write; .json for JSON."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace FILE.")] = False,
    json: Json = False,
) -> None:
    """Make a spec of mdevctl's definitions, a pool for each device, or of a libvirt domain's XML.

    Changes no definition and no domain. What of the XML a spec cannot say is listed, by its line.
    """
    if len(what or []) == 1 and _is_file((what or [])[0]):
        if parent is not None or from_ is not None:
            raise RequestError(
                "--parent and --from are for mdevctl's definitions", "leave them out for a domain"
            )
        _import_domain((what or [])[0], to, force=force, json=json)
        return
    if from_ is not None and not from_.is_dir():
        raise RequestError(f"{from_} is not a directory", "--from names one like /etc/mdevctl.d")
    found = mdevctl.read(machine(), from_)
    asked = mdevctl.select(found, [parse_uuid(text) for text in what or ()], parent)
    spec, faults = mdevctl.to_spec(asked.found)
    for damage in asked.damage:
        output.remark(str(damage))
    for fault in faults:
        output.report(fault)
    if spec.pools:
        _give(spec, to, force=force, json=json)
    total = len(asked.found) + len(asked.damage)
    if left := total - len(spec.pools):
        raise MdoError(
            f"{left} of {total} definitions {'was' if left == 1 else 'were'} left out",
            "mend them, or name the devices that you want",
        )


def _is_file(word: str) -> bool:
    if is_uuid(word):
        return False
    return word == "-" or word.endswith(".xml") or os.path.lexists(word)


def _import_domain(path: str, to: Path | None, *, force: bool, json: bool) -> None:
    spec, left_out = domain_xml.load(path)
    _give(spec, to, force=force, json=json)
    for part in left_out:
        output.left_out(part)


def _give(spec: Spec, to: Path | None, *, force: bool, json: bool) -> None:
    """Print a spec or write it to a file."""
    as_json = json or (to is not None and to.suffix == ".json")
    if to is not None:
        _save(to, _json(to_plain(spec)) if as_json else to_toml(spec), force=force)
    elif as_json:
        output.emit_json(to_plain(spec))
    else:
        output.emit(to_toml(spec).rstrip("\n"))


def export(
    what: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SPEC|UUID...", help="Devices of a spec, or devices; ours if none is named."
        ),
    ] = None,
    *,
    to: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write files there: /etc/mdevctl.d is mdevctl's own."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace definitions that are different.")
    ] = False,
    json: Json = False,
) -> None:
    """Print or write mdevctl's definitions of devices that exist, or of those of a spec.

    Of one device it prints what mdevctl define --jsonfile takes.
    """
    definitions = _wanted(what or [], to)
    written = [] if to is None else mdevctl.write(machine(), definitions, to, force=force)
    if json:
        output.emit_json({"definitions": [_shape(it, to, written) for it in definitions]})
    elif to is not None:
        if written:
            output.emit("\n".join(map(str, written)))
    elif len(what or []) == 1 and is_uuid((what or [])[0]):
        output.emit(mdevctl.to_json(definitions[0]))
    else:
        output.emit(mdevctl.dump(definitions))


def _wanted(what: list[str], to: Path | None) -> Sequence[Definition]:
    here = machine()
    host = read_host(here)
    if len(what) == 1 and not is_uuid(what[0]):
        return mdevctl.of_spec(load(what[0]), host)
    ours = [
        mdevctl.of_device(
            own.uuid,
            own.parent,
            own.type,
            params=own.params,
            attributes=own.attributes,
            group=own.group,
        )
        for own in read_managed(here).devices.values()
    ]
    found = []
    for uuid in dict.fromkeys(parse_uuid(text) for text in what):
        mdev = host.find(uuid)
        if mdev is None:
            raise UnknownError(f"there is no mdev {uuid}", "mdo host lists them")
        found.append(mdev)
    if not what:
        found = [it for it in host.mdevs if any(mdevctl.is_of(it, own) for own in ours)]
        if not found:
            raise UnknownError("no mdev here is ours", "name those that you want; mdo host has all")
    known = (*mdevctl.read(here, to).found, *ours)
    return [mdevctl.of_mdev(mdev, known) for mdev in found]


def _shape(definition: Definition, to: Path | None, written: Sequence[Path]) -> dict[str, Any]:
    file = None if to is None else mdevctl.path(definition, to)
    return {
        "uuid": definition.uuid,
        "parent": definition.parent,
        "definition": mdevctl.to_plain(definition),
        "file": file,
        "written": file in written,
    }


def _json(value: object) -> str:
    import msgspec

    return msgspec.json.format(msgspec.json.encode(value), indent=2).decode() + "\n"


def _save(path: Path, text: str, *, force: bool) -> None:
    try:
        with path.open("w" if force else "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise RequestError(f"{path} exists already", "--force replaces it") from None
    except OSError as error:
        raise HostError(f"{path} cannot be written: {error.strerror}") from error
