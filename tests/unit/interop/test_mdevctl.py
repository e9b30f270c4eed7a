# SPDX-License-Identifier: GPL-2.0-or-later
"""mdevctl's definitions: nothing is lost on any way, and no bad file hides another."""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from mdev_orchestrator.errors import HostError, RequestError, UnknownError
from mdev_orchestrator.interop import mdevctl
from mdev_orchestrator.interop.mdevctl import Definition, from_json, to_json
from mdev_orchestrator.machine import Machine
from mdev_orchestrator.model import Host, Mdev
from mdev_orchestrator.spec import GuestMdev, Pool, Spec, check, parse, to_toml
from unit.other_words import reword

U1 = UUID("83b8f4f2-509f-382f-3c1e-e6bfe0fa1001")
U2 = UUID("83b8f4f2-509f-382f-3c1e-e6bfe0fa1002")
U3 = UUID("83b8f4f2-509f-382f-3c1e-e6bfe0fa1003")
HERE = Machine()
GROUP = UUID("aaaaaaaa-1111-4222-8333-444444444444")

WRITTEN = """\
{
  "mdev_type": "vfio_ap-passthrough",
  "start": "auto",
  "attrs": [
    {
      "assign_adapter": "5"
    },
    {
      "assign_adapter": "6"
    },
    {
      "assign_domain": "é \\"q\\" \\\\ \\tx"
    }
  ]
}"""
"""To the byte what mdevctl 1.2 writes."""
READ = Definition(
    uuid=U1,
    parent="matrix",
    type="vfio_ap-passthrough",
    start="auto",
    attributes=(
        ("assign_adapter", "5"),
        ("assign_adapter", "6"),
        ("assign_domain", 'é "q" \\ \tx'),
    ),
)

words = st.from_regex(r"[A-Za-z0-9_.:-]{1,20}", fullmatch=True)
values = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=40)
files = st.sampled_from(["vgpu_params", "nvidia/vgpu_params", "assign_adapter", "é", "a b", "..."])
attributes = st.lists(st.tuples(files, values), max_size=6)
plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    # a lone surrogate is in no text that either side can write
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner, max_size=3)
    ),
    max_leaves=8,
)
extras = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"])).filter(
        lambda name: name not in {"mdev_type", "start", "attrs"}
    ),
    plain,
    max_size=3,
)


@st.composite
def documents(draw: st.DrawFn) -> dict[str, object]:
    """What may stand in a file."""
    return {
        "mdev_type": draw(words),
        "start": draw(st.sampled_from(["auto", "manual"])),
        "attrs": [{name: value} for name, value in draw(attributes)],
        **draw(extras),
    }


parents = words.filter(lambda name: name not in {".", "..", "scripts.d"})


def put(where: Path, definition: Definition, text: str | bytes | None = None) -> Path:
    file = where / definition.parent / str(definition.uuid)
    file.parent.mkdir(parents=True, exist_ok=True)
    data = to_json(definition) if text is None else text
    file.write_bytes(data.encode() if isinstance(data, str) else data)
    return file


def device(uuid: UUID, parent: str, type_: str, **more: object) -> Mdev:
    mdev = Mdev(uuid, f"/sys/bus/mdev/devices/{uuid}", parent, type_)
    return replace(mdev, **more)


# ---- JSON ----


def test_a_file_is_written_to_the_byte_as_mdevctl_writes_it() -> None:
    assert from_json(U1, "matrix", WRITTEN.encode()) == READ
    assert to_json(READ) == WRITTEN


def test_without_attributes_it_is_as_mdevctls_too() -> None:
    bare = Definition(uuid=U1, parent="p", type="t")
    assert to_json(bare) == (
        '{\n  "mdev_type": "t",\n  "start": "manual",\n  "attrs": []\n}'  # as seen
    )
    for attrs in ('"attrs": null, ', ""):
        text = f'{{{attrs}"start": "manual", "mdev_type": "t"}}'
        assert from_json(U1, "p", text.encode()) == bare


@given(st.uuids(), parents, documents())
def test_every_file_means_the_same_after_a_round(
    uuid: UUID, parent: str, document: dict[str, object]
) -> None:
    for text in (json.dumps(document), json.dumps(document, ensure_ascii=False, indent=3)):
        definition = from_json(uuid, parent, text.encode())
        assert json.loads(to_json(definition)) == document
        assert from_json(uuid, parent, to_json(definition).encode()) == definition


def test_numbers_of_others_keep_their_digits() -> None:
    extra = '"a":1.10,"b":123456789012345678901234567890,"c":[null,-0.0,1E5]'
    text = f'{{"x":{{{extra}}},"mdev_type":"t","start":"auto","\x7f":"\x7f"}}'
    definition = from_json(U1, "p", text.encode())
    assert definition.extra == f'{{"x":{{{extra}}},"\\u007f":"\\u007f"}}'
    assert from_json(U1, "p", to_json(definition).encode()) == definition
    assert mdevctl.to_pool(definition).mdevctl == definition.extra


@given(st.binary(max_size=80))
def test_nonsense_is_no_definition(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"^is "):
        from_json(U1, "p", data)


# ---- there and back ----


@given(st.dictionaries(st.uuids(), st.tuples(parents, documents()), max_size=4))
def test_definitions_to_a_spec_and_back_are_the_same(
    found: dict[UUID, tuple[str, dict[str, object]]],
) -> None:
    definitions = [
        from_json(uuid, parent, json.dumps(document).encode())
        for uuid, (parent, document) in found.items()
    ]
    spec, faults = mdevctl.to_spec(definitions)
    assert faults == ()
    if not definitions:
        return
    text = to_toml(spec)
    back = mdevctl.of_spec(parse(text), Host())
    assert sorted(back, key=lambda it: it.uuid) == sorted(definitions, key=lambda it: it.uuid)
    for definition in back:
        assert json.loads(to_json(definition)) == found[definition.uuid][1]
    # and once more from there: spec, definitions, spec
    again, _ = mdevctl.to_spec(back)
    assert to_toml(again) == text


def test_a_guests_devices_become_definitions_in_the_order_of_setting_up() -> None:
    document = parse(f"""
[[guest]]
name = "g"
[[guest.mdev]]
uuid = "{U1}"
type = "nvidia-12"
parent = "0000:86:00.0"
params = "frame_rate_limiter=0"
attributes = [["b", "1"], ["a", "2"]]
group = "{GROUP}"
[[guest.mdev]]
uuid = "{U2}"
group = "peers"
params = "x=1"
""")
    here = device(U2, "igd0", "mvgpu-128M", group_uuid=GROUP)
    first, second = mdevctl.of_spec(document, Host(mdevs=(here,)))
    assert first == Definition(
        uuid=U1,
        parent="0000:86:00.0",
        type="nvidia-12",
        attributes=(
            ("nvidia/vgpu_params", "frame_rate_limiter=0"),
            ("b", "1"),
            ("a", "2"),
            ("group_uuid", str(GROUP)),
        ),
    )
    assert second == Definition(
        uuid=U2,
        parent="igd0",
        type="mvgpu-128M",
        attributes=(("vgpu_params", "x=1"), ("group_uuid", str(GROUP))),
    )


def test_keys_of_others_may_be_written_as_one_likes(tmp_path: Path) -> None:
    text = f"""
[[pool]]
name = "a"
uuid = "{U1}"
type = "t"
parent = "p"
mdevctl = ' {{ "b" : [ 1.10 , null ], "a" : "é" }} '
"""
    definitions = mdevctl.of_spec(parse(text), Host())
    assert definitions[0].extra == '{"b":[1.10,null],"a":"é"}'
    assert len(mdevctl.write(HERE, definitions, tmp_path)) == 1
    assert mdevctl.write(HERE, definitions, tmp_path) == ()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ('type = "t"\nparent = "p"', "s:1: pool[0]: mdevctl defines devices by UUID"),
        (f'uuid = "{U1}"\nparent = "p"', "s:1: pool[0]: mdevctl defines a device with its type"),
        (f'uuid = "{U1}"\ntype = "t"', "s:1: pool[0]: mdevctl defines a device with its parent"),
    ],
)
def test_what_a_definition_needs(keys: str, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        mdevctl.of_spec(parse(f'[[pool]]\nname = "a"\n{keys}\n', "s"), Host())
    assert caught.value.message == message
    assert "add " in caught.value.hint


def test_a_group_without_a_uuid_cannot_be_defined() -> None:
    text = f'[[guest]]\nname = "g"\nmdev = [{{uuid="{U1}", type="t", parent="p", group="peers"}}]'
    with pytest.raises(RequestError, match=r"s:3: guest\[0\].mdev\[0\].group: .* has none yet"):
        mdevctl.of_spec(parse(text, "s"), Host())


@pytest.mark.parametrize(
    ("definition", "words"),
    [
        (
            Definition(uuid=U1, parent="p", type="t", attributes=(("a", "1"), ("online", "1"))),
            rf"definition of {U1} on p: attributes\[1\]: 'online' cannot be set",
        ),
        (
            Definition(uuid=U1, parent="p", type="t", attributes=(("../../x", "1"),)),
            r"attributes\[0\]: '../../x' does not name a file",
        ),
        (Definition(uuid=U1, parent="p", type="a b"), "type: must be one word without '/'"),
    ],
)
def test_what_a_spec_cannot_ask_for_is_left_out_and_named(
    definition: Definition, words: str
) -> None:
    with pytest.raises(RequestError, match=words):
        mdevctl.to_pool(definition)
    good = Definition(uuid=U2, parent="p", type="t")
    spec, faults = mdevctl.to_spec([definition, good])
    assert [pool.uuid for pool in spec.pools] == [U2]
    assert len(faults) == 1


def test_a_uuid_on_two_parents_is_not_one_device() -> None:
    both = [Definition(uuid=U1, parent=name, type="t") for name in ("p10", "p9")]
    spec, (fault,) = mdevctl.to_spec([*both, Definition(uuid=U2, parent="p9", type="t")])
    assert [pool.uuid for pool in spec.pools] == [U2]
    assert fault.message == f"mdevctl defines {U1} on p9 and on p10, and a device exists once"
    assert fault.hint == "choose with --parent p9"


# ---- devices as they run ----


def test_a_device_that_runs() -> None:
    mdev = device(U1, "grid0", "mvgpu-12", params="a=1", group_uuid=GROUP, online=True)
    assert mdevctl.of_mdev(mdev) == Definition(
        uuid=U1,
        parent="grid0",
        type="mvgpu-12",
        attributes=(("vgpu_params", "a=1"), ("group_uuid", str(GROUP))),
    )
    bare = mdevctl.of_mdev(device(U1, "grid0", "mvgpu-12", params=""))
    assert bare == Definition(uuid=U1, parent="grid0", type="mvgpu-12")


def test_its_own_definition_says_more_than_can_be_read_of_a_device() -> None:
    known = Definition(
        uuid=U1,
        parent="matrix",
        type="t",
        start="auto",
        attributes=(("assign_adapter", "5"), ("vgpu_params", "a=0"), ("vgpu_params", "a=1")),
        extra='{"note":1}',
    )
    others = [
        Definition(uuid=U2, parent="matrix", type="t"),
        Definition(uuid=U1, parent="elsewhere", type="t"),
        Definition(uuid=U1, parent="matrix", type="other"),
    ]
    mdev = device(U1, "matrix", "t", params="a=1")
    assert mdevctl.of_mdev(mdev, [*others, known]) == known
    for differs in (replace(mdev, params="a=2"), replace(mdev, group_uuid=GROUP)):
        assert mdevctl.of_mdev(differs, [*others, known]).extra == ""


def test_a_device_that_goes_has_no_definition() -> None:
    with pytest.raises(RequestError, match="is being removed"):
        mdevctl.of_mdev(device(U1, "p", "t", type_id=None))


# ---- devices of a spec that mdevctl knows ----

BY_UUID = f"""
[[guest]]
name = "g"
[[guest.mdev]]
uuid = "{U1}"
[[pool]]
name = "p"
uuid = "{U2}"
"""
KNOWN = {
    U1: (
        Definition(
            uuid=U1,
            parent="igd0",
            type="t",
            attributes=(("group_uuid", str(GROUP)), ("vgpu_params", "a=1")),
        ),
    ),
    U2: (
        Definition(
            uuid=U2,
            parent="igd1",
            type="s",
            attributes=(("x", "1"), ("group_uuid", str(GROUP))),
        ),
    ),
}


def test_a_uuid_is_enough_for_what_mdevctl_has_defined() -> None:
    document = parse(BY_UUID, "s")
    filled = mdevctl.complete(document, KNOWN, Host())
    ((mdev,), (pool,)) = filled.spec.guests[0].mdevs, filled.spec.pools
    assert mdev == GuestMdev(
        uuid=U1, type="t", parent="igd0", group=str(GROUP), attributes=(("vgpu_params", "a=1"),)
    )
    assert pool == Pool(
        name="p", uuid=U2, type="s", parent="igd1", attributes=KNOWN[U2][0].attributes
    )
    assert filled.fault(("pool", 0, "uuid"), "x").message == "s:8: pool[0].uuid: x"


def test_what_exists_as_defined_is_filled_in_too() -> None:
    document = parse(BY_UUID, "s")
    host = Host(
        mdevs=(
            device(U1, "igd0", "t", group_uuid=GROUP),
            device(U2, "igd1", "s", group_uuid=GROUP),
        )
    )
    assert mdevctl.complete(document, KNOWN, host) == mdevctl.complete(document, KNOWN, Host())
    both = KNOWN | {U2: (*KNOWN[U2], Definition(uuid=U2, parent="p", type="t"))}
    assert mdevctl.complete(document, both, host) == mdevctl.complete(document, KNOWN, host)


def test_what_exists_otherwise_or_is_described_is_left_as_it_is() -> None:
    document = parse(BY_UUID, "s")
    host = Host(mdevs=(device(U1, "igd0", "s"), device(U2, "b", "s")))
    assert mdevctl.complete(document, KNOWN, host) == document
    host = Host(mdevs=(device(U1, "igd0", "t"), device(U2, "igd1", "s", group_uuid=U3)))
    assert mdevctl.complete(document, KNOWN, host) == document
    assert mdevctl.complete(document, {}, Host()) == document
    described = parse(BY_UUID + 'type = "mine"\n', "s")
    assert mdevctl.complete(described, KNOWN, Host()).spec.pools == described.spec.pools


def test_of_two_parents_the_spec_must_say_one() -> None:
    known = {U2: tuple(Definition(uuid=U2, parent=f"p{n}", type=f"t{n}") for n in (1, 2))}
    with pytest.raises(RequestError, match=rf"s:8: pool\[0\].uuid: .* {U2} on p1 and on p2") as e:
        mdevctl.complete(parse(BY_UUID, "s"), known, Host())
    assert e.value.hint == 'add parent = "p1"'
    chosen = parse(BY_UUID + 'parent = "p2"\n', "s")
    assert mdevctl.complete(chosen, known, Host()).spec.pools[0].type == "t2"


def test_a_definition_that_cannot_be_asked_for_is_blamed_itself() -> None:
    known = {U2: (Definition(uuid=U2, parent="p", type="t", attributes=(("online", "1"),)),)}
    with pytest.raises(RequestError, match=f"mdevctl's definition of {U2} on p: .*'online'"):
        mdevctl.complete(parse(BY_UUID, "s"), known, Host())


# ---- files: reading ----

Spoil = Callable[[Path], object]


def deep(file: Path) -> None:
    file.write_text('{"mdev_type":"t","start":"auto","x":' + "[" * 99999 + "]" * 99999 + "}")


def loop(file: Path) -> None:
    file.unlink()
    file.symlink_to(file)


def folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def fifo(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def says(text: str | bytes) -> Spoil:
    return lambda file: file.write_bytes(text.encode() if isinstance(text, str) else text)


HEAD = '"mdev_type":"t","start":"auto"'
BAD: dict[str, tuple[Spoil, str]] = {
    "empty": (says(""), "is not JSON: line 1 cannot be read"),
    "not JSON": (says("{"), "is not JSON"),
    "two documents": (says(f"{{{HEAD}}} {{}}"), "is not JSON"),
    "not UTF-8": (says(f'{{{HEAD},"x":"'.encode() + b'\xff"}'), "is not UTF-8"),
    "UTF-16": (says(f"{{{HEAD}}}".encode("utf-16")), "is not UTF-8"),
    "lone surrogate": (says(f'{{{HEAD},"x":"\\ud800"}}'), "is not JSON"),
    "a list": (says("[]"), "is no definition: must be a table, not a list"),
    "null": (says("null"), "is no definition"),
    "no type": (says('{"start":"auto"}'), "is no definition: the key mdev_type is missing"),
    "empty type": (says('{"mdev_type":"","start":"auto"}'), "is no definition"),
    "no start": (says('{"mdev_type":"t"}'), "is no definition: the key start is missing"),
    "odd start": (says('{"mdev_type":"t","start":"Auto"}'), "is no definition"),
    "attrs is an object": (says(f'{{{HEAD},"attrs":{{}}}}'), "is no definition"),
    "a number for a value": (says(f'{{{HEAD},"attrs":[{{"a":1}}]}}'), "is no definition"),
    "two in one": (says(f'{{{HEAD},"attrs":[{{"a":"1","b":"2"}}]}}'), "is no definition"),
    "none in one": (says(f'{{{HEAD},"attrs":[{{}}]}}'), "is no definition"),
    "recursive": (deep, "is nested too deep"),
    "huge": (says(" " * (mdevctl.MAX_BYTES + 1)), "is larger than 256 KiB"),
    "a directory": (folder, "is not a file|Is a directory"),
    "a link in a loop": (loop, "is a link, which mdevctl passes over"),
    "a FIFO": (fifo, "is not a file"),
}


@pytest.mark.parametrize("name", BAD)
def test_why_a_file_is_bad_does_not_depend_on_the_words_of_a_library(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil, words = BAD[name]
    spoil(put(tmp_path, READ))
    reword(monkeypatch)
    (damage,) = mdevctl.read(HERE, tmp_path).damage
    assert re.search(words, damage.reason)
    assert "ailleurs" not in damage.reason


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_named_and_hides_no_other(tmp_path: Path, name: str) -> None:
    spoil, words = BAD[name]
    good = [
        Definition(uuid=U1, parent="p", type="t"),
        Definition(uuid=U3, parent="p", type="t"),
        Definition(uuid=U2, parent="q", type="t"),
    ]
    for definition in good:
        put(tmp_path, definition)
    bad = put(tmp_path, Definition(uuid=U2, parent="p", type="t"))
    spoil(bad)
    read = mdevctl.read(HERE, tmp_path)
    assert read.found == tuple(good)
    (damage,) = read.damage
    assert damage.file == bad
    assert str(damage).startswith(f"{bad} ")
    assert "\n" not in str(damage)
    assert re.search(words, damage.reason), damage.reason
    with pytest.raises(RequestError, match=str(bad)):
        mdevctl.select(read, [U2], "p")
    assert mdevctl.select(read, [U2]).found == (good[2],)
    assert mdevctl.select(read, [U1]).damage == ()


def test_what_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = Definition(uuid=U1, parent="q", type="t")
    put(tmp_path, good)
    file = put(tmp_path, Definition(uuid=U1, parent="p", type="t"))
    opened, listed = os.open, os.scandir

    def closed(path: object, *rest: int) -> int:  # root may read everything
        if path == str(file):
            raise PermissionError(errno.EACCES, "no")
        return opened(path, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", closed)
    read = mdevctl.read(HERE, tmp_path)
    assert read.found == (good,)
    assert [str(damage) for damage in read.damage] == [f"{file} cannot be read: Permission denied"]

    def hidden(path: Path) -> Iterator[os.DirEntry[str]]:
        if path == file.parent:
            raise PermissionError(errno.EACCES, "no")
        return listed(path)

    monkeypatch.setattr(os, "scandir", hidden)
    read = mdevctl.read(HERE, tmp_path)
    assert read.found == (good,)
    assert [damage.file for damage in read.damage] == [file.parent]


def test_what_mdevctl_passes_over_too(tmp_path: Path) -> None:
    card = "0000:86:00.0"
    good = Definition(uuid=U1, parent=card, type="t")
    put(tmp_path, good)
    put(tmp_path, Definition(uuid=U2, parent="scripts.d", type="t"))
    (tmp_path / "a file").write_text("x")
    (tmp_path / card / "a directory").mkdir()
    assert mdevctl.read(HERE, tmp_path) == mdevctl.Definitions((good,))
    (tmp_path / "linked").symlink_to(tmp_path / card)
    (tmp_path / card / "note~").write_text("x")
    shouted = str(U3).upper()
    put(tmp_path, good).with_name(shouted).write_text(to_json(good))
    (tmp_path / "\udcff").mkdir()
    (tmp_path / "\udcff" / str(U3)).write_text(to_json(good))
    read = mdevctl.read(HERE, tmp_path)
    assert read.found == (good,)
    words = sorted(str(damage).replace(f"{tmp_path}/", "") for damage in read.damage)
    assert words == [
        f"'\\udcff/{U3}' is of a parent with a name that no kernel makes",
        f"{card}/{shouted} has capital letters in its name, and mdevctl would write another file",
        f"{card}/note~ is no definition: its name is not a UUID",
        "linked is a link, which mdevctl passes over",
    ]


def test_no_directory_holds_nothing(tmp_path: Path) -> None:
    assert mdevctl.read(HERE, tmp_path / "none") == mdevctl.Definitions()
    assert mdevctl.defined(Machine(tmp_path)) == {}


def test_a_uuid_may_be_defined_on_several_parents(tmp_path: Path) -> None:
    where = mdevctl.directory(Machine(tmp_path))
    both = tuple(Definition(uuid=U2, parent=name, type="t") for name in ("p9", "p10"))
    one = Definition(uuid=U1, parent="p10", type="t")
    for definition in (*both, one):
        put(where, definition)
    assert mdevctl.defined(Machine(tmp_path)) == {U1: (one,), U2: both}
    read = mdevctl.read(HERE, where)
    assert mdevctl.select(read, parent="p10").found == (one, both[1])
    assert mdevctl.select(read, [U2]).found == both
    with pytest.raises(UnknownError, match=f"mdevctl has not defined {U1} on p9"):
        mdevctl.select(read, [U1], "p9")
    with pytest.raises(UnknownError, match="no definitions on p8") as caught:
        mdevctl.select(read, parent="p8")
    assert caught.value.hint == "it has some on p9, p10"


# ---- files: writing ----


def test_written_files_are_as_mdevctls(tmp_path: Path) -> None:
    where = mdevctl.directory(Machine(tmp_path))
    umask = os.umask(0o027)
    try:
        (file,) = mdevctl.write(HERE, [READ], where)
    finally:
        os.umask(umask)
    assert file == where / "matrix" / str(U1)
    assert file.read_text(encoding="utf-8") == WRITTEN
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o750
    assert [path.name for path in where.iterdir()] == ["matrix"]
    assert [path.name for path in file.parent.iterdir()] == [str(U1)]


def test_what_is_there_already_is_not_written(tmp_path: Path) -> None:
    (file,) = mdevctl.write(HERE, [READ], tmp_path)
    file.write_text(json.dumps(json.loads(WRITTEN)))  # another layout, the same words
    assert mdevctl.write(HERE, [READ], tmp_path) == ()


def test_another_definition_is_replaced_by_force_only(tmp_path: Path) -> None:
    other = Definition(uuid=U2, parent="matrix", type="t")
    first = Definition(uuid=U3, parent="matrix", type="t")
    theirs = put(tmp_path, other)
    wanted = [first, Definition(uuid=U2, parent="matrix", type="u")]
    with pytest.raises(RequestError, match=f"{theirs} defines the device {U2} otherwise"):
        mdevctl.write(HERE, wanted, tmp_path)
    assert mdevctl.read(HERE, tmp_path).found == (other,)  # not even the first one was written
    assert mdevctl.write(HERE, wanted, tmp_path, force=True) == (theirs.with_name(str(U3)), theirs)
    assert set(mdevctl.read(HERE, tmp_path).found) == set(wanted)


def test_what_cannot_be_read_is_another_definition(tmp_path: Path) -> None:
    file = put(tmp_path, READ, "{")
    with pytest.raises(RequestError, match="otherwise"):
        mdevctl.write(HERE, [READ], tmp_path)
    mdevctl.write(HERE, [READ], tmp_path, force=True)
    assert file.read_text(encoding="utf-8") == WRITTEN


@pytest.mark.parametrize("parent", ["..", ".", "", "a/b", "scripts.d"])
def test_a_parent_is_one_name(tmp_path: Path, parent: str) -> None:
    with pytest.raises(RequestError, match="is not the name of a parent device"):
        mdevctl.write(HERE, [Definition(uuid=U1, parent=parent, type="t")], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_stands_in_the_way_is_said(tmp_path: Path) -> None:
    (tmp_path / "matrix").write_text("")
    with pytest.raises(HostError, match=f"matrix/{U1} cannot be written"):
        mdevctl.write(HERE, [READ], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["matrix"]


def test_another_program_is_quicker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = Definition(uuid=U1, parent="matrix", type="theirs")
    linked = Path.hardlink_to

    def slow(self: Path, target: Path) -> None:
        put(tmp_path, theirs)
        linked(self, target)

    monkeypatch.setattr(Path, "hardlink_to", slow)
    with pytest.raises(RequestError, match="otherwise"):
        mdevctl.write(HERE, [READ], tmp_path)
    assert mdevctl.read(HERE, tmp_path).found == (theirs,)
    assert [path.name for path in tmp_path.iterdir()] == ["matrix"]


# ---- as mdevctl lists them ----


def test_a_dump_is_mdevctls() -> None:
    assert mdevctl.dump([]) == "[]"
    definitions = [
        Definition(uuid=U2, parent="p9", type="t"),
        Definition(uuid=U1, parent="p9", type="t"),
        Definition(uuid=U3, parent="p10", type="t"),
    ]
    (dump,) = json.loads(mdevctl.dump(definitions))
    assert list(dump) == ["p10", "p9"]  # in order of their bytes, as mdevctl has them
    assert [list(entry) for entry in dump["p9"]] == [[str(U1)], [str(U2)]]
    assert dump["p10"] == [{str(U3): {"mdev_type": "t", "start": "manual", "attrs": []}}]


def test_a_spec_of_definitions_is_a_spec() -> None:
    spec, _ = mdevctl.to_spec([READ])
    assert check(spec).spec == spec == Spec(pools=(mdevctl.to_pool(READ),))
