# SPDX-License-Identifier: GPL-2.0-or-later
"""``mdo create``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

from mdev_orchestrator.cli import output
from mdev_orchestrator.cli.host import mdev_shape
from mdev_orchestrator.cli.options import Argument, Option
from mdev_orchestrator.engine import model_cache
from mdev_orchestrator.engine.context import DEADLINE
from mdev_orchestrator.engine.devices import create_devices
from mdev_orchestrator.errors import RequestError
from mdev_orchestrator.host.sysfs import read_host
from mdev_orchestrator.machine import Machine


def create(
    type_id: Annotated[str, Argument(metavar="TYPE", help="Id of a type; mdo host lists them.")],
    *,
    count: Annotated[int | None, Option("-n", "--count", help="How many devices.")] = None,
    parent: Annotated[str | None, Option(help="Parent, when several offer the type.")] = None,
    uuid: Annotated[
        list[str] | None, Option(help="UUID to use; may be given again. Others are random.")
    ] = None,
    group: Annotated[
        str | None,
        Option(metavar="UUID|NAME", help="Start group that they are put into."),
    ] = None,
    set_: Annotated[
        list[str] | None,
        Option("--set", metavar="FILE=VALUE", help="Write a file of each; may be repeated."),
    ] = None,
    deadline: Annotated[float, Option(min=0.1, help="Seconds for each device.")] = DEADLINE,
    json: Annotated[bool, Option("--json", help="One JSON document.")] = False,
) -> None:
    """Create devices of one type, all or none; prints their UUIDs, one a line."""
    root = output.host_root()
    before = read_host(Machine(root))
    made = output.run(
        create_devices(
            type_id,
            count,
            parent=parent,
            uuids=uuid or (),
            group=group,
            attributes=parse_attributes(set_ or ()),
            deadline=deadline,
            root=root,
        )
    )
    if json:
        output.emit_json({"created": [mdev_shape(mdev) for mdev in made]})
    else:
        output.emit("\n".join(str(mdev.uuid) for mdev in made))
    model_cache.learn_from(before, root)


def parse_attributes(texts: Iterable[str]) -> list[tuple[str, str]]:
    """``FILE=VALUE`` as given on the command line; the value may contain more of them.

    :raise RequestError: One is something else.
    """
    found = []
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise RequestError(f"--set {text!r} has no '='", "write it like --set vgpu_params=a=1")
        found.append((name, value))
    return found
