# SPDX-License-Identifier: GPL-2.0-or-later
"""mvgpu by itself: what its files and registers say, what it refuses, what it can be made to do.

Runs inside the lab, without QEMU: ``mdo lab exec python3 -m pytest tests/lab/test_driver.py``.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import signal
import subprocess
import time
from pathlib import Path
from uuid import uuid4

import pytest

from lab import vfio
from lab.kernel_log import KernelLog
from lab.vfio import Child, Device, Make, get, put

pytestmark = pytest.mark.skipif("MDO_LAB" not in os.environ, reason="needs the lab's kernel")

ATTRIBUTES = {"group_uuid", "online", "vgpu_params", "group_owner", "group_links", "group_error"}
GROUP = "6f9619ff-8b86-d011-b42d-00c04fc964ff"


@contextlib.contextmanager
def refused(number: int) -> contextlib.AbstractContextManager[None]:
    with pytest.raises(OSError, match=r".") as caught:
        yield
    assert caught.value.errno == number, os.strerror(caught.value.errno or 0)


def available(parent: str, *types: str) -> list[int]:
    path = vfio.PARENTS / parent / "mdev_supported_types"
    return [int((path / f"mvgpu-{t}" / "available_instances").read_text()) for t in types]


def test_the_seeds_example(make: Make) -> None:
    types = ("128M", "256M", "512M")
    assert available("igd0", *types) == [8, 4, 2]
    (large,) = make(type_="512M")
    assert available("igd0", *types) == [4, 2, 1]
    (small,) = make(type_="128M")
    assert available("igd0", *types) == [3, 1, 0]
    vfio.remove(large)
    vfio.remove(small)
    assert available("igd0", *types) == [8, 4, 2]


def test_a_grid_card_is_of_one_type_at_a_time(make: Make) -> None:
    types = [str(number) for number in range(11, 19)]
    assert available("grid0", *types) == [16, 16, 8, 8, 4, 4, 2, 1]
    first, second = make(2, type_="17")
    assert available("grid0", *types) == [0] * 8
    with refused(errno.ENOSPC):
        vfio.create("grid0", "17")
    with refused(errno.ENOSPC):
        vfio.create("grid0", "11")
    vfio.remove(first)
    assert available("grid0", *types) == [0, 0, 0, 0, 0, 0, 1, 0]
    vfio.remove(second)
    assert available("grid0", *types) == [16, 16, 8, 8, 4, 4, 2, 1]


def test_the_attributes_of_a_new_mdev(make: Make) -> None:
    (uuid,) = make()
    modes = {
        path.name: path.stat().st_mode & 0o777
        for path in (vfio.MDEVS / uuid).iterdir()
        if path.name in ATTRIBUTES
    }
    writable = {"group_uuid", "online", "vgpu_params"}
    assert modes == {name: 0o644 if name in writable else 0o444 for name in ATTRIBUTES}
    values = {name: get(uuid, name) for name in ATTRIBUTES}
    zero = dict.fromkeys(("online", "group_owner", "group_links"), "0")
    assert values == dict.fromkeys(ATTRIBUTES, "") | zero
    parent = vfio.PARENTS / "igd0"
    assert (parent / "p2p_links").read_text() == (parent / "p2p_links_free").read_text()


@pytest.mark.parametrize(
    "text",
    [
        GROUP.upper(),
        f"{{{GROUP}}}",
        GROUP.replace("-", ""),
        GROUP[:-1],
        f"{GROUP}0",
        f" {GROUP}",
        f"{GROUP}\n",
        GROUP.replace("6f", "6g"),
        "00000000-0000-0000-0000-000000000000",
        "none",
        "\0" * 36,
        "\xff" * 18,
    ],
)
def test_what_is_no_group_uuid(make: Make, text: str) -> None:
    (uuid,) = make(group=GROUP)
    with refused(errno.EINVAL):
        put(uuid, "group_uuid", text)
    assert get(uuid, "group_uuid") == GROUP


def test_a_group_uuid_is_set_and_cleared(make: Make) -> None:
    (uuid,) = make(group=GROUP)
    assert get(uuid, "group_uuid") == GROUP
    put(uuid, "group_uuid", GROUP)
    put(uuid, "group_uuid", "")
    assert get(uuid, "group_uuid") == ""


@pytest.mark.parametrize("text", ["2", "-1", "01", "yes", "", "1\n", "1 ", "\0"])
def test_online_is_0_or_1(make: Make, text: str) -> None:
    (uuid,) = make()
    with refused(errno.EINVAL):
        put(uuid, "online", text)
    assert get(uuid, "online") == "0"


@pytest.mark.parametrize(
    "text", ["frame_rate_limiter=0,disable_vnc=1", "a=b c;d", "~" * 512, "some vendor's words", ""]
)
def test_parameters_are_passed_through_as_they_are(make: Make, text: str) -> None:
    (uuid,) = make()
    put(uuid, "vgpu_params", text)
    assert get(uuid, "vgpu_params") == text


@pytest.mark.parametrize("text", ["~" * 513, "a\tb", "a\nb", "\u00e9", "\x7f", "a\0b"])
def test_parameters_that_no_line_can_hold(make: Make, text: str) -> None:
    (uuid,) = make()
    put(uuid, "vgpu_params", "x=1")
    with refused(errno.EINVAL):
        put(uuid, "vgpu_params", text)
    assert get(uuid, "vgpu_params") == "x=1"


def test_a_parameter_that_means_something(make: Make) -> None:
    (uuid,) = make()
    for text, frames in (
        ("", 60),
        ("frame_rate_limiter=0", 0),
        ("x=1,frame_rate_limiter=0,disable_vnc=1", 0),
        ("frame_rate_limiter=1", 60),
        ("a_frame_rate_limiter=0", 60),
    ):
        put(uuid, "vgpu_params", text)
        with Device(uuid) as device:
            assert device.read("FRL") == frames, text
            with refused(errno.EBUSY):
                put(uuid, "vgpu_params", "late")


def test_parameters_stay_as_they_are_while_online(make: Make) -> None:
    (uuid,) = make()
    put(uuid, "online", "1")
    with refused(errno.EBUSY):
        put(uuid, "vgpu_params", "late")
    put(uuid, "online", "0")
    put(uuid, "vgpu_params", "in time")


def test_an_open_without_a_group(make: Make) -> None:
    (uuid,) = make()
    since = vfio.now()
    with Device(uuid) as device:
        assert (get(uuid, "online"), get(uuid, "group_links")) == ("1", "0")
        assert get(uuid, "group_owner") == str(os.getpid())
        assert device.read("STATE") == vfio.MV["STATE_ONLINE"]
        assert (device.read("SLOT"), device.read("MEMBERS")) == (0, 1)
        assert device.members() == {uuid: 0}
        for name, text in (("online", "0"), ("group_uuid", GROUP), ("group_uuid", "")):
            with refused(errno.EBUSY):
                put(uuid, name, text)
        put(uuid, "online", "1")
    assert (get(uuid, "online"), get(uuid, "group_owner")) == ("0", "0")
    seen = [event.event for event in vfio.events(since)]
    assert seen == ["started", "opened", "accessed", "closed", "stopped"]


def test_every_second_open_is_a_new_life(make: Make) -> None:
    (uuid,) = make()
    for _ in range(2):
        since = vfio.now()
        with Device(uuid) as device:
            assert device.read("SCRATCH") == 0
            device.write("SCRATCH", 1)
        accesses = [event for event in vfio.events(since) if event.event == "accessed"]
        assert [(event.uuid, event.value) for event in accesses] == [(uuid, 1)]


def test_the_log_is_a_ring_that_names_the_process(make: Make) -> None:
    since = vfio.now()
    (uuid,) = make(group=GROUP)
    with Child(uuid) as child:
        pass
    vfio.remove(uuid)
    log = vfio.events(since)
    assert [event.event for event in log] == [
        *("created", "grouped", "started", "opened", "accessed", "closed", "stopped", "removed"),
    ]
    assert {event.uuid for event in log} == {uuid}
    assert {event.pid for event in log[2:7]} == {child.pid}
    assert [event.sequence for event in log] == list(range(since, since + 8))
    assert [event.ns for event in log] == sorted(event.ns for event in log)
    (uuid,) = make()
    for _ in range(2050):  # two events each, and no uevent
        put(uuid, "group_uuid", GROUP)
        put(uuid, "group_uuid", "")
    full = vfio.events()
    assert len(full) == 4096
    numbers = [event.sequence for event in full]
    assert numbers == list(range(numbers[0], numbers[0] + 4096))


def test_a_create_that_fails_leaves_nothing(make: Make) -> None:
    uuid = str(uuid4())
    with vfio.fault("create", f"errno={errno.EIO} uuid={uuid}") as state:
        (other,) = make()
        with refused(errno.EIO):
            vfio.create("igd0", "512M", uuid)
        assert state() == f"errno=5 delay_ms=0 times=0 uuid={uuid} hits=1\n"
        assert not (vfio.MDEVS / uuid).exists()
        assert available("igd0", "128M") == [7]
        vfio.remove(vfio.create("igd0", "512M", uuid))
    assert get(other, "online") == "0"


def test_an_open_that_fails_starts_nothing(make: Make) -> None:
    first, second = make(2, GROUP)
    with vfio.fault("open", f"errno={errno.EREMOTEIO} uuid={second}"):
        with Device(first), refused(errno.EREMOTEIO):
            Device(second)
        assert get(first, "online") == "0"
        with Device(second) as device:
            assert device.read("MAGIC") == vfio.MV["MAGIC"]


def test_a_start_that_fails_says_why_and_can_be_tried_again(
    make: Make, kernel_log: KernelLog
) -> None:
    first, second = make(2, GROUP)
    since = vfio.now()
    with vfio.fault("start", f"errno={errno.EIO} times=2 uuid={GROUP}"):
        with refused(errno.EIO):
            Device(first)
        assert get(second, "group_error") == "the hardware said -EIO"
        assert (get(first, "online"), get(first, "group_owner")) == ("0", "0")
        with refused(errno.EIO):
            put(second, "online", "1")
    assert [e.event for e in vfio.events(since)] == ["refused", "refused"]
    assert any(f"group {GROUP} does not start: -EIO" in line for line in kernel_log.lines())
    put(second, "online", "1")
    assert get(first, "group_error") == ""


def test_a_register_that_cannot_be_read(make: Make) -> None:
    (uuid,) = make()
    with Device(uuid) as device, vfio.fault("region", f"errno={errno.EIO} times=-1") as state:
        for _ in range(3):
            with refused(errno.EIO):
                device.read("MAGIC")
        with refused(errno.EIO):
            device.write("SCRATCH", 1)
        assert state().endswith("hits=4\n")
    with Device(uuid) as device:
        assert device.read("SCRATCH") == 0


@pytest.mark.parametrize("point", ["create", "open", "region"])
def test_slow_hardware(make: Make, point: str) -> None:
    with vfio.fault(point, "delay_ms=300"):
        began = time.monotonic()
        (uuid,) = make()
        with Device(uuid) as device:
            device.read("MAGIC")
        assert time.monotonic() - began >= 0.3


@pytest.mark.parametrize("point", ["start", "open", "region"])
def test_a_process_that_must_die_waits_for_no_hardware(make: Make, point: str) -> None:
    (uuid,) = make()
    with vfio.fault(point, "delay_ms=600000"):
        child = Child(uuid, wait=False)
        deadline = time.monotonic() + 30
        while "hits=1" not in (vfio.DEBUG / "fault" / point).read_text():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        began = time.monotonic()
        child.end(signal.SIGKILL)
        assert time.monotonic() - began < 5
    assert (get(uuid, "online"), get(uuid, "group_owner")) == ("0", "0")
    with Device(uuid) as device:
        assert device.read("MAGIC") == vfio.MV["MAGIC"]


@pytest.mark.parametrize(
    "line",
    [
        "errno=4096",
        "errno=-5",
        "errno=",
        "errno",
        "delay_ms=600001",
        "times=-2",
        "uuid=1",
        f"uuid={GROUP}0",
        "colour=red",
        "errno=5 colour=red",
        "x" * 256,
    ],
)
def test_what_is_no_fault(line: str, kernel_log: KernelLog) -> None:
    path = vfio.DEBUG / "fault" / "open"
    before = path.read_text()
    with refused(errno.EINVAL):
        vfio.poke(path, line)
    assert path.read_text() == before


@pytest.mark.parametrize(
    "options",
    [
        {"links": 65536},
        {"links": -1},
        {"has_online": 0, "implicit_start": 0},
        {"implicit_start": 2},
        {"aperture_mib": 3},
        {"grid_parents": 65},
    ],
)
def test_parameters_that_do_not_load(options: dict[str, int], kernel_log: KernelLog) -> None:
    with vfio.loaded():
        subprocess.run(["rmmod", "mvgpu"], check=True)
        with pytest.raises(subprocess.CalledProcessError):
            vfio.load(**options)
        assert not Path("/sys/module/mvgpu").exists()
        vfio.load()


def test_a_driver_without_online(kernel_log: KernelLog) -> None:
    with vfio.loaded(has_online=0):
        uuid = vfio.create("igd0", "128M")
        assert not ATTRIBUTES & {path.name for path in (vfio.MDEVS / uuid).iterdir()}
        since = vfio.now()
        with Device(uuid) as device:
            assert device.read("STATE") == vfio.MV["STATE_ONLINE"]
        seen = [event.event for event in vfio.events(since)]
        assert seen == ["started", "opened", "accessed", "closed", "stopped"]
        vfio.remove(uuid)


def test_unloading_with_everything_in_use(kernel_log: KernelLog) -> None:
    """The module goes with groups online, and not while one is open."""
    with vfio.loaded(links=3):
        group = str(uuid4())
        uuids = [vfio.create("igd0", "128M") for _ in range(3)]
        for uuid in uuids:
            put(uuid, "group_uuid", group)
        with Child(*uuids):
            done = subprocess.run(["rmmod", "mvgpu"], check=False, capture_output=True, text=True)
            assert done.returncode != 0
            assert re.search("in use", done.stderr)
        put(uuids[0], "online", "1")
    assert not any((vfio.MDEVS / uuid).exists() for uuid in uuids)


def test_every_bound(make: Make, tmp_path: Path) -> None:
    """The C program checks what a process can ask of the device, and abuses it; TAP."""
    here = Path(__file__).parent
    program = tmp_path / "vfio-user"
    source = here / "c" / "vfio-user.c"
    include = here.parents[1] / "kernel"
    subprocess.run(["gcc", "-O1", f"-I{include}", "-o", program, source], check=True)
    (uuid,) = make()
    done = subprocess.run([program, uuid, "check"], check=False, capture_output=True, text=True)
    assert [line for line in done.stdout.splitlines() if line.startswith("not ok")] == []
    assert done.returncode == 0, done.stderr
