# SPDX-License-Identifier: GPL-2.0-or-later
"""What a spec file may say, and the one line for each thing it may not."""

from __future__ import annotations

import json
import os
import tomllib
from pathlib import Path
from typing import Literal
from uuid import UUID

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mdev_orchestrator.errors import RequestError
from mdev_orchestrator.spec import (
    MAX_BYTES,
    MAX_DEVICES,
    CountCondition,
    Pool,
    ResolutionCondition,
    Size,
    SizeCondition,
    Spec,
    format_size,
    load,
    parse,
    parse_size,
    schema_text,
    to_plain,
    to_toml,
)
from unit.other_words import reword

KINDS: tuple[Literal["toml"], Literal["json"]] = ("toml", "json")
U1 = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"
ROOT = Path(__file__).resolve().parents[2]

WHOLE = f"""\
# two guests and a pool
[[guest]]
name = "render-1"
uuid = "{U1}"
memory = "1G"
cpus = 2
kernel = "vmlinuz"
append = "console=ttyS0 quiet"
extra = ["-device", "virtio-rng-pci"]

[[guest.mdev]]
type = "mvgpu-12"
count = 2
group = "peers"
params = "frame_rate_limiter=0,disable_vnc=1"

[[guest.mdev]]
framebuffer = ">=512M"
max_resolution = ">=1920x1200"
num_heads = 2

[[guest]]
name = "render-2"
disk = "disk.raw"
mdev = [
    {{ uuid = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1002" }},
]

[[pool]]
name = "spare"
type = "mvgpu-128M"
parent = "igd0"
count = 4
"""


def refused(text: str | bytes, **options: str) -> str:
    with pytest.raises(RequestError) as caught:
        parse(text, "s", **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- what is right ----


def test_a_whole_spec() -> None:
    spec = parse(WHOLE).spec
    first, second = spec.guests
    assert (first.name, first.uuid, first.memory, first.cpus) == ("render-1", UUID(U1), 1 << 30, 2)
    assert first.kernel == Path("vmlinuz")
    assert first.extra == ("-device", "virtio-rng-pci")
    peers, other = first.mdevs
    assert (peers.type, peers.count, peers.group) == ("mvgpu-12", 2, "peers")
    assert dict(other.conditions) == {
        "framebuffer": ">=512M",
        "num_heads": "2",
        "max_resolution": ">=1920x1200",
    }
    assert second.mdevs[0].uuid == UUID("83b8f4f2-509f-382f-3c1e-e6bfe0fa1002")
    assert (second.memory, second.cpus, second.disk_format) == (512 << 20, 1, "raw")
    (pool,) = spec.pools
    assert (pool.name, pool.type, pool.parent, pool.count) == ("spare", "mvgpu-128M", "igd0", 4)


def test_json_says_the_same_as_toml() -> None:
    as_json = json.dumps(tomllib.loads(WHOLE), indent=1)
    assert parse(as_json).spec == parse(WHOLE).spec
    assert parse(as_json, kind="json").lines["guest", 0, "mdev", 1, "framebuffer"] > 10


def test_a_device_that_is_described_in_full() -> None:
    text = """\
[[pool]]
name = "one"
uuid = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"
type = "vfio_ap-passthrough"
parent = "matrix"
attributes = [
    [
        "assign_adapter",
        "5",
    ],
    [
        "assign_adapter",
        "0x\\"6\\"",
    ],
    [
        "assign_domain",
        "a\\nb",
    ],
]
start = "manual"
mdevctl = "{\\"note\\":[null]}"
"""
    spec = parse(text).spec
    (pool,) = spec.pools
    assert pool.uuid == UUID(U1)
    assert pool.attributes == (
        ("assign_adapter", "5"),
        ("assign_adapter", '0x"6"'),
        ("assign_domain", "a\nb"),
    )
    assert (pool.start, pool.mdevctl) == ("manual", '{"note":[null]}')
    assert to_toml(spec) == text


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_reads_the_same(kind: Literal["toml", "json"]) -> None:
    spec = parse('name = "all"\n' + WHOLE).spec
    text = to_toml(spec) if kind == "toml" else json.dumps(to_plain(spec))
    assert parse(text, kind=kind).spec == spec
    assert "512M" not in text.replace(">=512M", "")  # the default
    assert to_toml(spec).startswith('name = "all"\n')
    assert '\n\n[[guest]]\nname = "render-1"\n' in to_toml(spec)


@given(st.lists(st.tuples(st.just("f"), st.text(max_size=50))), st.text(max_size=20))
def test_every_text_can_be_written(attributes: list[tuple[str, str]], parameters: str) -> None:
    pool = Pool(name="a", type="t", attributes=tuple(attributes), params=parameters)
    text = to_toml(Spec(pools=(pool,)))
    assert tomllib.loads(text) == json.loads(json.dumps(to_plain(Spec(pools=(pool,)))))


def test_every_key_has_its_line() -> None:
    lines = parse(WHOLE).lines
    for place, line in lines.items():
        word = next((part for part in reversed(place) if isinstance(part, str)), "")
        near = WHOLE.splitlines()[line - 1]
        assert word in near or "uuid" in near, (place, near)
    written = WHOLE.splitlines()
    assert "uuid" in written[lines["guest", 1, "mdev", 0, "uuid"] - 1]
    assert "count = 4" in written[lines["pool", 0, "count"] - 1]


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "vmlinuz").write_text("")
    (tmp_path / "disk.raw").write_text("")
    file = tmp_path / "a.toml"
    file.write_text(WHOLE)
    assert load(file).spec.guests[0].kernel == tmp_path / "vmlinuz"
    assert load(str(file)).spec.guests[1].disk == tmp_path / "disk.raw"


@pytest.mark.parametrize(
    ("text", "value", "again"),
    [
        ("512M", 512 << 20, "512M"),
        ("2g", 2 << 30, "2G"),
        ("128MB", 128 << 20, "128M"),
        ("4 MiB", 4 << 20, "4M"),
        ("1024 K", 1 << 20, "1M"),
        ("1T", 1 << 40, "1T"),
        ("1536M", 1536 << 20, "1536M"),
        ("7", 7, "7"),
        ("0", 0, "0"),
    ],
)
def test_sizes(text: str, value: int, again: str) -> None:
    assert parse_size(text) == value
    assert format_size(value) == again
    assert f"{Size(value)}" == again
    assert parse_size(again) == value


@given(st.text())
def test_any_text_is_a_size_or_one_line(text: str) -> None:
    try:
        size = parse_size(text)
    except RequestError:
        return
    assert 0 <= size < 1 << 63


@pytest.mark.parametrize("text", ["", "M", "-1", "1.5G", "5X", "1 0M", "5\u212a", "8388608T"])
def test_what_is_no_size(text: str) -> None:
    """Among them the Kelvin sign, which is a K in small letters, and eight exbibytes."""
    with pytest.raises(RequestError) as caught:
        parse_size(text)
    assert caught.value.message == f"{text!r} is no amount of memory"
    assert caught.value.hint == "write it like 512M or 2G"
    assert refused(GUEST + f"memory = '{text}'\n").startswith("s:3: guest[0].memory: ")


def test_the_window_of_a_port_is_given_as_the_memory_is() -> None:
    text = GUEST + "hotplug_window = '{}'\n"
    assert parse(GUEST).spec.guests[0].hotplug_window == 256 << 20
    assert parse(text.format("1 GiB")).spec.guests[0].hotplug_window == 1 << 30
    for wrong, size in (("3M", 3 << 20), ("512K", 1 << 19), ("0", 0)):
        assert refused(text.format(wrong)) == (
            f"s:3: guest[0].hotplug_window: {size} bytes are not a power of two of at least 1 MiB"
        )


def test_conditions() -> None:
    assert SizeCondition(">=512M, <2G").holds(512 << 20)
    assert not SizeCondition(">=512M, <2G").holds(2 << 30)
    assert SizeCondition("512M").holds(512 << 20)
    assert CountCondition("!=2").holds(3)
    assert ResolutionCondition(">=1920x1200").holds((2560, 1600))
    assert not ResolutionCondition(">=1920x1200").holds((2560, 1080))
    assert ResolutionCondition("!=1920x1200").holds((1920, 1080))
    assert not ResolutionCondition("!=1920x1200").holds((1920, 1200))


# ---- what is wrong ----

GUEST = '[[guest]]\nname = "a"\n'
WRONG: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "s is empty"),
    "blank": (" \n\t\n", "s is empty"),
    "only a comment": ("# nothing\n", "s asks for nothing"),
    "no TOML": ("[[guest]]\nname = \n", "s:2: not valid TOML: invalid value"),
    "cut off": ("[[guest]]\nname = 'a", "s:2: not valid TOML"),
    "no JSON": ('{"guest": [\n{"name": "a",}]}', "s:2: not valid JSON"),
    "cut off JSON": ('{"guest": [\n', "s:2: not valid JSON"),
    "two JSON documents": ('{"guest": [{"name": "a"}]} {}', "s:1: not valid JSON"),
    "a list": ("[1]", "s:1: 1: there is no such key (known are name, guest, pool)"),
    "no key": (GUEST + "= 1\n", "s:3: not valid TOML: expected a key"),
    "no equals sign": (GUEST + "cpus 1\n", "s:3: not valid TOML: expected '='"),
    "two on a line": (GUEST + "cpus = 1 memory = 2\n", "s:3: not valid TOML: invalid value"),
    "something after a text": (
        GUEST + "qemu = 'a' 'b'\n",
        "s:3: not valid TOML: expected the end of the line",
    ),
    "open text": (GUEST + 'qemu = "a\n\ncpus = 1\n', "s:3: not valid TOML: a text is not closed"),
    "open list": (GUEST + "extra = [\n'a'\n", "s:5: not valid TOML: it ends too early"),
    "no such escape": (GUEST + 'cpus = 1\nqemu = "\\q"\n', "s:4: not valid TOML: invalid value"),
    "a table twice": (
        "[a]\nb = 1\n# c\n[[guest]]\n[a]\n",
        "s:5: not valid TOML: this key or table cannot stand here",
    ),
    "a control character": (GUEST + "# \0\n", "s:4: not valid TOML: it cannot be read"),
    "a key without quotes in JSON": (
        "{\nguest: 1}",
        "s:2: not valid JSON: expected a key in double quotes",
    ),
    "no number of JSON": ('{"guest":\n01}', "s:2: not valid JSON: expected ',' or '}'"),
    "a huge number in JSON": ('{"guest":\n1e999}', "s:2: not valid JSON: invalid value"),
    "half a character in JSON": ('{"guest":\n"\\ud800"}', "s:2: not valid JSON: invalid text"),
    "a comment in JSON": ('{"guest": 1} # x', "s:1: not valid JSON: expected the end of the file"),
    "not UTF-8": (b"[[guest]]\nname = '\xff'\n", "s:2: this is not UTF-8 text"),
    "wrong type": (
        GUEST + 'cpus = "2"\n',
        "s:3: guest[0].cpus: must be a whole number, not text",
    ),
    "half a device": (
        GUEST + "mdev = [{type='x', count=1.5}]\n",
        "s:3: guest[0].mdev[0].count: must be a whole number, not 1.5",
    ),
    "no number": (GUEST + "cpus = nan\n", "s:3: guest[0].cpus: must be a whole number, not nan"),
    "yes": (GUEST + "cpus = true\n", "s:3: guest[0].cpus: must be a whole number, not true"),
    "a date": (GUEST + "uuid = 2016-09-01\n", "s:3: guest[0].uuid: must be text, not a date"),
    "nothing": (
        '{"guest": [{"name": "a",\n"extra": null}]}',
        "s:2: guest[0].extra: must be a list, not nothing",
    ),
    "a number for a choice": (GUEST + "accel = 1\n", "s:3: guest[0].accel: must be text, not a"),
    "a table for a list": ("[guest]\nname='a'\n", "s:1: guest: must be a list, not a table"),
    "unknown key": (
        GUEST + "cpu = 1\n",
        "s:3: guest[0].cpu: there is no such key (did you mean cpus?)",
    ),
    "unknown key of a device": (
        GUEST + "[[guest.mdev]]\ntype = 'x'\ncuont = 2\n",
        "s:5: guest[0].mdev[0].cuont: there is no such key (did you mean count?)",
    ),
    "unknown key at the top": (
        "guests = 1\n",
        "s:1: guests: there is no such key (did you mean guest?)",
    ),
    "missing key": ("[[guest]]\n\n[[guest]]\nname='a'\n", "s:1: guest[0]: the key name is missing"),
    "key twice": (GUEST + "cpus = 1\ncpus = 2\n", "s:4: guest[0].cpus: is given a second time"),
    "key twice in JSON": (
        '{"guest": [\n{"name": "a",\n"name": "b"}]}',
        "s:3: guest[0].name: is given a second time",
    ),
    "size": (
        GUEST + "memory = '5X'\n",
        "s:3: guest[0].memory: '5X' is no amount of memory (write it like 512M or 2G)",
    ),
    "negative size": (GUEST + "memory = -1\n", "s:3: guest[0].memory: -1 is no amount of memory"),
    "odd size": (GUEST + "memory = 1000\n", "s:3: guest[0].memory: 1000 bytes are no multiple"),
    "huge number": (GUEST + "memory = 99999999999999999999999\n", "s:3: guest[0].memory"),
    "truth": (GUEST + "memory = true\n", "s:3: guest[0].memory: must be an amount of memory"),
    "no processor": (GUEST + "cpus = 0\n", "s:3: guest[0].cpus: must be at least 1"),
    "name": ("[[guest]]\nname = '../a'\n", "s:2: guest[0].name: must be up to 40 letters"),
    "newline after a name": ('[[guest]]\nname = "a\\n"\n', "s:2: guest[0].name: must be up to 40"),
    "two lines": (
        GUEST + 'kernel = "k"\nappend = "a\\nb"\n',
        "s:4: guest[0].append: must be one line",
    ),
    "name twice": (GUEST + GUEST, "s:4: guest[1].name: a is the name of guest[0] already"),
    "name of a guest and a pool": (
        GUEST + "[[pool]]\nname = 'a'\ntype = 'x'\n",
        "s:4: pool[0].name: a is the name of guest[0] already",
    ),
    "guest's UUID twice": (
        f"[[guest]]\nname = 'a'\nuuid = '{U1}'\n[[guest]]\nname = 'b'\nuuid = '{U1}'\n",
        "s:6: guest[1].uuid: is the UUID of guest[0] already",
    ),
    "no UUID": (GUEST + "uuid = '1'\n", "s:3: guest[0].uuid: is not a UUID"),
    "no accelerator": (GUEST + "accel = 'hvf'\n", "s:3: guest[0].accel: is none of"),
    "initrd alone": (GUEST + "initrd = 'x'\n", "s:3: guest[0].initrd: needs a kernel"),
    "zero byte": (GUEST + 'disk = "a\\u0000"\n', "s:3: guest[0].disk: must be the name of a file"),
    "no condition": (
        GUEST + "mdev = [{framebuffer = '=>1G'}]\n",
        "s:3: guest[0].mdev[0].framebuffer: '=>1G' is no condition (write it like >=512M)",
    ),
    "no start": (
        '[[pool]]\nname = "a"\ntype = "t"\nstart = "never"\n',
        "s:4: pool[0].start: is none of auto, manual",
    ),
    "no file": (
        GUEST + 'mdev = [{type = "t", attributes = [["../x", "1"]]}]\n',
        "s:3: guest[0].mdev[0].attributes[0]: '../x' does not name a file of an mdev",
    ),
    "a file without a value": (
        GUEST + 'mdev = [{type = "t", attributes = [["x"]]}]\n',
        "s:3: guest[0].mdev[0].attributes[0]: must be a list of 2, not of 1",
    ),
    "a file that starts": (
        GUEST + 'mdev = [{type = "t", attributes = [["x", "1"], ["online", "1"]]}]\n',
        "s:3: guest[0].mdev[0].attributes[1]: 'online' cannot be set",
    ),
    "a group as an attribute": (
        GUEST + f'mdev = [{{type = "t", attributes = [["group_uuid", "{U1}"]]}}]\n',
        "s:3: guest[0].mdev[0].attributes[0]: a guest's devices have a group",
    ),
    "no JSON of mdevctl": (
        '[[pool]]\nname = "a"\ntype = "t"\nmdevctl = "[]"\n',
        "s:4: pool[0].mdevctl: must be a JSON object",
    ),
    "wrong JSON of mdevctl": (
        '[[pool]]\nname = "a"\ntype = "t"\nmdevctl = \'{"a": "\\q"}\'\n',
        "s:4: pool[0].mdevctl: must be a JSON object",
    ),
    "a type for mdevctl": (
        '[[pool]]\nname = "a"\ntype = "t"\nmdevctl = \'{"mdev_type": "x"}\'\n',
        "s:4: pool[0].mdevctl: mdev_type has a key of its own here",
    ),
    "neither type nor attributes": (
        GUEST + "mdev = [\n {count = 2}]\n",
        "s:4: guest[0].mdev[0]: says neither type nor attributes",
    ),
    "none": (GUEST + "mdev = [{type='x', count=0}]\n", "s:3: guest[0].mdev[0].count: must be at"),
    "too many at once": (
        GUEST + "mdev = [{type='x', count=10000}]\n",
        f"s:3: guest[0].mdev[0].count: must be at most {MAX_DEVICES}",
    ),
    "too many together": (
        GUEST + "mdev = [{type='x', count=4000},\n{type='x', count=4000}]\n",
        f"s:4: guest[0].mdev[1].count: this file asks for more than {MAX_DEVICES} devices",
    ),
    "device twice": (
        GUEST + f"mdev = [{{uuid='{U1}'}},\n{{uuid='{U1.upper()}'}}]\n",
        f"s:4: guest[0].mdev[1].uuid: device {U1} is named a second time, first as guest[0]",
    ),
    "one device four times": (
        GUEST + f"mdev = [{{uuid='{U1}', count=4}}]\n",
        "s:3: guest[0].mdev[0].count: a UUID names one device (leave count out)",
    ),
    "group across parents": (
        GUEST + "mdev = [{type='x', group='g', parent='p'},\n{type='x', group='g', parent='q'}]\n",
        "s:4: guest[0].mdev[1].group: group g is across parents: guest[0].mdev[0] wants p, this q",
    ),
    "group of two guests": (
        "".join(f"[[guest]]\nname='{n}'\nmdev=[{{type='x', group='{U1}'}}]\n" for n in "ab"),
        f"s:6: guest[1].mdev[0].group: group {U1} is of guest a (guest[0].mdev[0])",
    ),
    "group of a pool": (
        "[[pool]]\nname='a'\ntype='x'\ngroup='g'\n",
        "s:4: pool[0].group: there is no such key",
    ),
    "deep list": ("a = " + "[" * 50 + "]" * 50, "s:1: nested deeper than 16 levels"),
    "bottomless list": ("a = " + "[" * 200_000, "s:1: nested deeper than 16 levels"),
    "bottomless JSON": ('{"guest":' * 100_000, "s:1: nested deeper than 16 levels"),
    "bottomless key": ("a." * 300_000 + "b = 1", "s:1: nested deeper than 16 levels"),
    "bottomless table": ("[" + "a." * 300_000 + "b]", "s:1: nested deeper than 16 levels"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_is_one_line_with_file_line_and_key(name: str) -> None:
    text, message = WRONG[name]
    assert refused(text).startswith(message)


@pytest.mark.parametrize("name", WRONG)
def test_no_message_depends_on_the_words_of_a_library(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, message = WRONG[name]
    reword(monkeypatch)
    assert refused(text).startswith(message)


@pytest.mark.parametrize(
    "text",
    [
        GUEST + "mdev = [{framebuffer = '" + " " * 900_000 + "'}]\n",
        GUEST + "extra = [" + "'x'," * 200_000 + "1]\n",
        "x = '''" + "'\n" * 400_000,
        "[[guest]]\n" * 90_000,
        '{"guest": [' + "{}," * 300_000 + "{}]}",
        "#" * 1_000_000,
    ],
)
def test_a_large_wrong_file_is_refused(text: str) -> None:
    """Each would take hours if the time were quadratic."""
    refused(text)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"a\.toml cannot be read: No such file"):
        load(tmp_path / "a.toml")
    with pytest.raises(RequestError, match="cannot be read: Is a directory"):
        load(tmp_path)
    with pytest.raises(RequestError, match="cannot be read"):
        load("a\0b")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(RequestError, match="cannot be read: Too many levels"):
        load(tmp_path / "loop")
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(RequestError, match="is empty"):
        load(tmp_path / "fifo")


def test_a_file_that_is_too_large(tmp_path: Path) -> None:
    file = tmp_path / "large.toml"
    with file.open("wb") as out:
        out.truncate(10 * MAX_BYTES)
    with pytest.raises(RequestError, match=r"large\.toml is larger than 1 MiB"):
        load(file)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("disk = 'none.raw'", r"a\.toml:3: guest\[0\]\.disk: .*none\.raw cannot be used: No such"),
        ("kernel = '.'", r"a\.toml:3: guest\[0\]\.kernel: .* is a directory"),
        ("uefi_variables = 'v.fd'", r"a\.toml:3: guest\[0\]\.uefi_variables: needs UEFI"),
        ("uefi = 'yes'", r"a\.toml:3: guest\[0\]\.uefi: must be true or false, not text"),
        ("firmware = 'a.toml'", r"a\.toml:3: guest\[0\]\.firmware: .* is no directory"),
    ],
)
def test_a_disk_that_is_not_there(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "a.toml"
    file.write_text(GUEST + line + "\n")
    with pytest.raises(RequestError, match=message):
        load(file)


PIECES = ["[[guest]]\n", "[guest]\n", "name", " = ", '"a"', "'''", "{", "}", "[", "]", ",", "\n"]
PIECES += ["mdev", "count", "1", ".", '"', "\\", "#", ":", "type", '{"guest":', "é", "\r"]


@given(st.one_of(st.text(), st.lists(st.sampled_from(PIECES)).map("".join)))
@example('{"guest": [{"name": "a", "mdev": null}]}')
def test_no_text_breaks_the_reader(text: str) -> None:
    for kind in KINDS:
        try:
            parse(text, kind=kind)
        except RequestError as error:
            assert "\n" not in str(error)  # noqa: PT017 - both outcomes are right


@given(st.binary())
def test_no_bytes_break_the_reader(data: bytes) -> None:
    try:
        parse(data)
    except RequestError as error:
        assert "\n" not in str(error)  # noqa: PT017 - both outcomes are right


# ---- the schema ----


def test_the_shipped_schema_is_current() -> None:
    shipped = (ROOT / "docs/spec.schema.json").read_text(encoding="utf-8")
    assert shipped == schema_text(), "python -m mdev_orchestrator.spec >docs/spec.schema.json"
