# SPDX-License-Identifier: GPL-2.0-or-later
"""What ``--json`` prints has the members that docs/cli.md documents: no more, and no less."""

from __future__ import annotations

import asyncio
import json
import re
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from mdev_orchestrator.cli import apply, guest, hotplug, output, restore, watch
from mdev_orchestrator.cli.context import machine
from mdev_orchestrator.engine.attach import Attached
from mdev_orchestrator.engine.diff import Changes
from mdev_orchestrator.engine.foreign import ForeignGuest
from mdev_orchestrator.engine.restore import PoweredDown, Restored
from mdev_orchestrator.errors import BusyError, DeadlineError, Outcome
from mdev_orchestrator.host.events import MdevEvent, NodeEvent, ParentEvent, Rescan
from mdev_orchestrator.model import Host, Mdev
from mdev_orchestrator.qemu.events import StateChange, Unwatched, Watched
from mdev_orchestrator.qemu.hotplug import Plugged
from mdev_orchestrator.qemu.process import ProcessRecord, RunningGuest, State
from mdev_orchestrator.qemu.status import Report
from unit.cli.test_apply_command import FOREIGN, POOL, U2, CommandLine
from unit.cli.test_apply_command import mdo as mdo  # noqa: PLC0414 - a fixture
from unit.cli.test_main import U1

DOCS = Path(__file__).parents[3] / "docs/cli.md"
FREE = {"attributes", "definition"}
"""Members whose own members are a vendor's or mdevctl's."""

Json = Any
"""A JSON value."""


def documents() -> Iterator[tuple[str, Json]]:
    """Each JSON document of the page, and the heading above it."""
    heading = ""
    for match in re.finditer(
        r"^#+ ([^\n]*)$|^```json\n(.*?)^```$", DOCS.read_text(), re.MULTILINE | re.DOTALL
    ):
        if match[1]:
            heading = match[1]
            continue
        text = match[2].strip()
        while text:
            value, end = json.JSONDecoder().raw_decode(text)
            yield heading, value
            text = text[end:].lstrip()


DOCUMENTED = list(documents())


def compare(printed: Json, heading: str, number: int = 0) -> None:
    """Compare with the document of this number below a heading."""
    _compare(printed, [value for name, value in DOCUMENTED if name == heading][number], heading)


def _compare(printed: Json, documented: Json, where: str) -> None:
    if printed is None or documented is None:
        return
    if isinstance(documented, dict):
        assert isinstance(printed, dict), where
        assert set(printed) == set(documented), where
        for key in set(documented) - FREE:
            _compare(printed[key], documented[key], f"{where}: {key}")
    elif isinstance(documented, list):
        assert isinstance(printed, list), where
        for element in printed if documented else ():
            _compare(element, documented[0], where)
    else:
        number = isinstance(documented, int | float) and not isinstance(documented, bool)
        assert isinstance(printed, int | float if number else type(documented)), where


def test_the_page_documents_every_command() -> None:
    """One that is not here prints what another one does, or no JSON."""
    assert {heading for heading, _ in DOCUMENTED} == {
        "Errors as JSON",
        "mdo host",
        "mdo create",
        "mdo plan",
        "mdo probe",
        "mdo diff, mdo apply, mdo destroy",
        "mdo recover, mdo adopt",
        "mdo restore, mdo service",
        "mdo remove",
        "mdo watch",
        "mdo doctor",
        "mdo guest list",
        "mdo guest stop",
        "mdo attach, mdo detach",
        "mdo import, mdo export",
        "mdo lab",
        "mdo qemu",
    }


def of(mdo: CommandLine, *arguments: str, code: int = 0) -> Json:
    return json.loads(mdo(*arguments, "--json", code=code)[0])


def test_host(mdo: CommandLine) -> None:
    mdo("apply", mdo.spec())
    mdo("create", "t-1", "--parent", "card1", "--group", "peers")
    asyncio.run(mdo.system.write(str(mdo.system.bus / U2 / "remove"), b"1"))
    node = f"/dev/vfio/{(mdo.system.bus / FOREIGN / 'iommu_group').resolve().name}"
    mdo.system.process(41, "qemu-system-x86", ["qemu", "-name", "guest=g1"], [node])
    shape = of(mdo, "host")
    assert [len(shape[key]) for key in ("parents", "mdevs", "lost", "groups")] == [2, 3, 1, 1]
    assert any(mdev["holders"] for mdev in shape["mdevs"])
    compare(shape, "mdo host")


def test_create_and_remove(mdo: CommandLine) -> None:
    arguments = ("create", "t-1", "--parent", "card0", "--uuid", U1, "--group", "g")
    compare(of(mdo, *arguments), "mdo create")
    compare(of(mdo, "remove", U1), "mdo remove")


def test_plan(mdo: CommandLine) -> None:
    guests = '\n[[guest]]\nname = "a"\nmdev = [{type = "t-1", count = 20}]\n'
    compare(of(mdo, "plan", mdo.spec()), "mdo plan")
    mdo("apply", mdo.spec())
    shape = of(mdo, "plan", mdo.spec(POOL + guests), code=2)
    assert [bool(shape[key]) for key in ("existing", "placements", "shortfalls")] == [True] * 3
    compare(shape, "mdo plan")


def test_probe(mdo: CommandLine) -> None:
    shape = of(mdo, "probe", "--yes")
    assert shape["in_use"] == ["card0"]
    compare(shape, "mdo probe")


def test_diff_apply_and_destroy(mdo: CommandLine) -> None:
    heading = "mdo diff, mdo apply, mdo destroy"
    compare(of(mdo, "diff", mdo.spec()), heading)
    compare(of(mdo, "apply", mdo.spec()), heading)
    compare(of(mdo, "destroy", "lab"), heading)
    compare(apply.shape(Changes("lab", restarts={"g": "memory changes"})), heading)


def test_recover(mdo: CommandLine) -> None:
    def late(name: str, uuid: str) -> None:
        while uuid == U2 and U1 not in mdo.system.uuids():
            pass

    mdo.system.before = late
    mdo.system.refuse |= {U2: 5, f"{U1}/remove": 1}
    mdo("apply", mdo.spec(), code=1)
    with sqlite3.connect(machine().journal_path) as journal:
        journal.execute("UPDATE run SET start_time = 1 WHERE ended IS NULL")
    journal.close()
    compare(of(mdo, "recover", "--dry-run"), "mdo recover, mdo adopt")
    shape = of(mdo, "recover", code=1)
    assert shape["runs"][0]["stuck"]
    compare(shape, "mdo recover, mdo adopt")


def test_adopt(mdo: CommandLine) -> None:
    compare(of(mdo, "adopt", FOREIGN), "mdo recover, mdo adopt", 1)


def test_restore(mdo: CommandLine) -> None:
    mdo("apply", mdo.spec())
    compare(of(mdo, "restore", "--wait", "0"), "mdo restore, mdo service")
    failed = restore.shape(Restored("other", error=DeadlineError("it is not back")))
    compare({"specs": [failed]}, "mdo restore, mdo service")


def test_doctor(mdo: CommandLine) -> None:
    compare(of(mdo, "doctor", "--qemu", "no-such-qemu", code=5), "mdo doctor")


def test_export(mdo: CommandLine) -> None:
    compare(of(mdo, "export", FOREIGN), "mdo import, mdo export", 1)


def test_qemu(mdo: CommandLine) -> None:
    compare(of(mdo, "qemu", "list"), "mdo qemu")


def test_watch() -> None:
    group = UUID(int=1)
    events = [
        Rescan("listening"),
        ParentEvent("igd0", registered=True),
        MdevEvent("add", UUID(U1), "igd0"),
        NodeEvent("add", "/dev/vfio/0"),
        MdevEvent("change", UUID(U1), "igd0", "online"),
        Watched("render-1"),
        StateChange("render-1", UUID(U1), "igd0", group, "offline", "offline", "why"),
        Unwatched("render-1"),
    ]
    for number, event in enumerate(events):
        compare(watch.shape(event), "mdo watch", number)
    assert [name for name, _ in DOCUMENTED].count("mdo watch") == len(events)


@pytest.mark.parametrize("damaged", [True, False])
def test_guests(tmp_path: Path, damaged: bool) -> None:
    record = ProcessRecord("g", UUID(int=2), 41, 1, "", 0.0, [], [], 64 << 20, 1)
    found = RunningGuest("g", tmp_path, State.RUNNING, None if damaged else record)
    plugged = Plugged(UUID(U1), "vfio-pci", "/machine/x", "mdev-x", "port0")
    mdev = Mdev(UUID(U1), "card0", "t-1", "", group_uuid=UUID(int=1))
    shape = guest.guest_shape(
        Report(found, "running", (plugged,), running=True), Host(mdevs=(mdev,)), {UUID(int=1): "g"}
    )
    compare({"guests": [shape]}, "mdo guest list")


def test_guests_of_others() -> None:
    found = ForeignGuest("web", UUID(int=3), 42, "libvirt", (UUID(U1),))
    compare({"guests": [guest.foreign_shape(found, Host(), {})]}, "mdo guest list")


def test_stopped_guests() -> None:
    ended = [PoweredDown("g", "quit"), PoweredDown("h", error=DeadlineError("it still runs"))]
    shapes = [guest.ended_shape(one) for one in ended]
    compare({"guests": shapes}, "mdo guest stop", 1)


def test_attach_and_detach() -> None:
    done = Attached(UUID(U1), "mdev-x", "port0", created=True)
    compare(hotplug.attached_shape("g", done, taken=True), "mdo attach, mdo detach")
    compare(hotplug.detached_shape("g", UUID(U1), removed=True), "mdo attach, mdo detach", 1)


def test_errors_and_remarks(capsys: pytest.CaptureFixture[str]) -> None:
    output.speak_json(on=True)
    try:
        output.report(BusyError("held", "detach it", outcome=Outcome.NO_EFFECT, subject="mdev"))
        output.remark("by the way")
    finally:
        output.speak_json(on=False)
    for number, line in enumerate(capsys.readouterr().err.splitlines()):
        compare(json.loads(line), "Errors as JSON", number)


def test_labs() -> None:
    labs = pytest.importorskip("mdev_lab.labs")
    demo = pytest.importorskip("mdev_lab.demo")
    shown = {*labs.Lab.__dataclass_fields__, "directory"}
    assert shown == set(DOCUMENTED_LABS["labs"][0])
    assert {*demo.Row.__dataclass_fields__} == set(DOCUMENTED_DEMO["steps"][0])


DOCUMENTED_LABS, DOCUMENTED_DEMO = (value for name, value in DOCUMENTED if name == "mdo lab")
