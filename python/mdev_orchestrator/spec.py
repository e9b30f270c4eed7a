# SPDX-License-Identifier: GPL-2.0-or-later
"""What a user asks for: a TOML or JSON file as typed, frozen structures.

::

    [[guest]]
    name = "render-1"
    memory = "512M"
    kernel = "vmlinuz"            # paths are relative to the file they stand in

    [[guest.mdev]]
    framebuffer = ">=512M"        # or type = "mvgpu-12", or uuid = "…"
    count = 2
    group = "peers"               # on one parent, started together
    params = "frame_rate_limiter=0"

    [[pool]]                      # devices without a guest, created ahead
    name = "spare"
    type = "mvgpu-128M"
    count = 4

:func:`load` reads a file, :func:`parse` a text. Both give a :class:`Document`: the :class:`Spec`,
and the line on which each of its keys stands. Everything wrong with a file is a
:class:`RequestError` of one line, ``FILE:LINE: KEY: what``. docs/spec.md describes the format to
users, docs/spec.schema.json is :func:`schema`.

Words of the file and the environment never mix: there are no variables.
"""

from __future__ import annotations

import errno
import os
import re
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal, Self, TypeAlias, get_args, get_origin
from uuid import UUID

import msgspec
from msgspec import Meta, Struct, field

from mdev_orchestrator.errors import RequestError
from mdev_orchestrator.model import check_attribute, is_uuid

MIB = 1 << 20
MAX_BYTES = MIB
"""Of a file. A thousand guests need a tenth of it."""
MAX_DEPTH = 16
"""Of tables and lists in each other, and of the parts of a dotted key."""
MAX_DEVICES = 4096
"""In one spec; the host layer is built for as many."""

Place: TypeAlias = tuple[str | int, ...]
"""A key of the file: ``("guest", 0, "mdev", 1, "count")``."""

_SIZE = re.compile(r"([0-9]{1,15}) ?([KMGT]?)(?:i?B)?", re.IGNORECASE)
_SHIFT = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}
_RESOLUTION = re.compile(r"([0-9]{1,6}) ?x ?([0-9]{1,6})")
_COUNT = re.compile(r"[0-9]{1,9}")
# "$" would let a newline at the end pass; the rest must suit JSON Schema as well
_NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,39}$(?!\n)"
_WORD = r"^[^\s/\x00-\x1f]{1,128}$(?!\n)"
_LINE = r"^[^\x00-\x1f\x7f]{0,1024}$(?!\n)"
_TEXT = r"^[^\x00-\x1f\x7f]*$(?!\n)"


def parse_size(text: str) -> int:
    """Read an amount of memory: ``512M``, ``2G``, ``128 MB``; powers of 1024.

    :return: Bytes.
    :raise ValueError: It is something else.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{_shown(text)} is no amount of memory; write it like 512M or 2G")
    return int(match[1]) << _SHIFT[match[2].upper()]


def parse_resolution(text: str) -> tuple[int, int]:
    """Read a resolution, ``1920x1200``.

    :return: Width and height, pixels.
    :raise ValueError: It is something else.
    """
    match = _RESOLUTION.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{_shown(text)} is no resolution; write it like 1920x1200")
    return int(match[1]), int(match[2])


def _parse_count(text: str) -> int:
    if _COUNT.fullmatch(text.strip()) is None:
        raise ValueError(f"{_shown(text)} is no count")
    return int(text)


def _shown(value: object) -> str:
    limit = 40
    text = str(value)
    return repr(text if len(text) <= limit else text[:limit] + "...")


# ---- values ---------------------------------------------------------------------------------


class Size(int):
    """Bytes; in a file a whole number, or text such as ``512M``."""

    json_schema: ClassVar[Mapping[str, Any]] = {
        "type": ["integer", "string"],
        "minimum": 0,
        "pattern": r"^[0-9]{1,15} ?[KMGTkmgt]?(i?[Bb])?$",
    }

    @classmethod
    def read(cls, value: object) -> Size:
        """Read what a file may hold.

        :raise ValueError: It is something else.
        """
        if isinstance(value, int) and not isinstance(value, bool):
            if not 0 <= value < 1 << 63:
                raise ValueError(f"{value} is no amount of memory")
            return cls(value)
        if isinstance(value, str):
            return cls(parse_size(value))
        raise ValueError("must be an amount of memory, like 512M or 2G")


_OPERATORS: Mapping[str, Callable[[Any, Any], bool]] = {
    ">=": lambda have, want: have >= want,
    "<=": lambda have, want: have <= want,
    "!=": lambda have, want: have != want,
    "==": lambda have, want: have == want,
    "=": lambda have, want: have == want,
    ">": lambda have, want: have > want,
    "<": lambda have, want: have < want,
}
_CONDITION_LIMIT = 100  # characters; the pattern takes quadratic time
_TERM = re.compile(r"\s*(>=|<=|!=|==|=|>|<)?\s*([^<>=!,]+?)\s*")


class Condition(str):
    """What an attribute of a type must be: ``>=512M``, ``>256M, <=1G``, or one exact value.

    Its text is the condition as it was written.
    """

    __slots__ = ("terms",)
    terms: tuple[tuple[str, Any], ...]
    _pattern: ClassVar[str]

    def __new__(cls, text: str) -> Self:
        """Read a condition.

        :raise ValueError: It is none.
        """
        self = super().__new__(cls, text)
        if len(text) > _CONDITION_LIMIT:
            raise ValueError(f"{_shown(text)} is longer than {_CONDITION_LIMIT} characters")
        terms = []
        for part in text.split(","):
            match = _TERM.fullmatch(part)
            if match is None:
                raise ValueError(f"{_shown(text)} is no condition; write it like {cls.example()}")
            terms.append((match[1] or "==", cls.parse_value(match[2])))
        self.terms = tuple(terms)
        return self

    @classmethod
    def example(cls) -> str:
        """A condition of this kind, for messages."""
        return ">=1"

    @classmethod
    def parse_value(cls, text: str) -> Any:  # noqa: ANN401 - an int or a resolution, by class
        """Read what stands after an operator.

        :raise ValueError: It is something else.
        """
        return _parse_count(text)

    @classmethod
    def read(cls, value: object) -> Condition:
        """Read what a file may hold: text, or a whole number for exactly that.

        :raise ValueError: It is something else.
        """
        if isinstance(value, (int, str)) and not isinstance(value, bool):
            return cls(str(value))
        raise ValueError(f"must be a condition, like {cls.example()}")

    @classmethod
    def json_schema(cls) -> Mapping[str, Any]:
        """How an editor can check it."""
        term = rf"\s*(>=|<=|!=|==|=|>|<)?\s*{cls._pattern}\s*"
        return {"type": ["string", "integer"], "pattern": rf"^{term}(,{term})*$"}

    def holds(self, value: Any) -> bool:  # noqa: ANN401 - an int or a resolution, by class
        """Whether a value meets all terms."""
        return all(_OPERATORS[operator](value, wanted) for operator, wanted in self.terms)


class SizeCondition(Condition):
    """A condition on an amount of memory."""

    __slots__ = ()
    _pattern = r"[0-9]{1,15} ?[KMGTkmgt]?(i?[Bb])?"

    @classmethod
    def example(cls) -> str:
        """A condition of this kind, for messages."""
        return ">=512M"

    @classmethod
    def parse_value(cls, text: str) -> int:
        """Read bytes, see :func:`parse_size`."""
        return parse_size(text)


class CountCondition(Condition):
    """A condition on a whole number."""

    __slots__ = ()
    _pattern = r"[0-9]{1,9}"


class ResolutionCondition(Condition):
    """A condition on a resolution; ``>=`` and its like hold for width and height together."""

    __slots__ = ()
    _pattern = r"[0-9]{1,6} ?x ?[0-9]{1,6}"

    @classmethod
    def example(cls) -> str:
        """A condition of this kind, for messages."""
        return ">=1920x1200"

    @classmethod
    def parse_value(cls, text: str) -> tuple[int, int]:
        """Read width and height, see :func:`parse_resolution`."""
        return parse_resolution(text)

    def holds(self, value: Any) -> bool:  # noqa: ANN401 - what Condition says
        """Whether a resolution (width, height) meets all terms."""
        for operator, wanted in self.terms:
            both = [_OPERATORS[operator](*pair) for pair in zip(value, wanted, strict=True)]
            if not (any(both) if operator == "!=" else all(both)):
                return False
        return True


# ---- structures -----------------------------------------------------------------------------

Name = Annotated[
    str, Meta(pattern=_NAME, description="Up to 40 letters, digits, '_', '.' and '-'.")
]
Line = Annotated[str, Meta(pattern=_LINE)]


class Devices(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What kind of devices, and how many.

    A type is chosen by its id, by its attributes, or both. An attribute that a type does not have
    meets no condition.
    """

    type: Annotated[
        Annotated[str, Meta(pattern=_WORD)] | None, Meta(description="Id of an mdev type.")
    ] = None
    count: Annotated[int, Meta(ge=1, le=MAX_DEVICES, description="How many devices.")] = 1
    uuid: Annotated[
        UUID | None, Meta(description="Of the one device; taken as it is when it exists.")
    ] = None
    parent: Annotated[
        Annotated[str, Meta(pattern=_WORD)] | None,
        Meta(description="The only parent to create them on."),
    ] = None
    params: Annotated[
        Line, Meta(description="The vendor's text for vgpu_params, passed on as it is.")
    ] = ""
    attributes: Annotated[
        tuple[tuple[str, str], ...],
        Meta(description="Files of each device and what is written there, in this order."),
    ] = ()
    framebuffer: Annotated[SizeCondition | None, Meta(description="Bytes of video memory.")] = None
    num_heads: Annotated[CountCondition | None, Meta(description="Displays.")] = None
    frl_config: Annotated[
        CountCondition | None, Meta(description="Frame rate limit, frames per second.")
    ] = None
    max_resolution: Annotated[
        ResolutionCondition | None, Meta(description="Largest resolution, pixels.")
    ] = None
    low_gm_size: Annotated[
        SizeCondition | None, Meta(description="GVT-g: bytes of mappable graphics memory.")
    ] = None
    high_gm_size: Annotated[
        SizeCondition | None, Meta(description="GVT-g: bytes of hidden graphics memory.")
    ] = None
    fence: Annotated[CountCondition | None, Meta(description="GVT-g: fence registers.")] = None
    weight: Annotated[CountCondition | None, Meta(description="GVT-g: share of time.")] = None
    ports: Annotated[CountCondition | None, Meta(description="Serial ports.")] = None

    @property
    def conditions(self) -> tuple[tuple[str, Condition], ...]:
        """The attributes that were given, by name, in the order of this class."""
        return tuple(
            (name, value) for name in ATTRIBUTES if (value := getattr(self, name)) is not None
        )


ATTRIBUTES = tuple(
    name
    for name in Devices.__struct_fields__
    if name not in {"type", "count", "uuid", "parent", "params", "attributes"}
)
"""The attributes that types are chosen by, under the vendors' names."""


class GuestMdev(Devices, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Devices of one guest."""

    group: Annotated[
        Name | None,
        Meta(description="Start group: on one parent, started together. A word of this guest."),
    ] = None


class GuestConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A virtual machine."""

    name: Name
    uuid: Annotated[UUID | None, Meta(description="Chosen once and kept when absent.")] = None
    memory: Annotated[
        Size,
        Meta(
            description="A multiple of 1 MiB.",
            extra_json_schema={"default": "512M"},
        ),
    ] = msgspec.field(default_factory=lambda: Size(512 * MIB))
    cpus: Annotated[int, Meta(ge=1, le=288, description="Virtual processors.")] = 1
    disk: Annotated[Path | None, Meta(description="Image of the first disk.")] = None
    disk_format: Annotated[
        Annotated[str, Meta(pattern=r"^[a-z0-9-]{1,32}$(?!\n)")],
        Meta(description="The image's format; it is never guessed."),
    ] = "raw"
    kernel: Annotated[Path | None, Meta(description="Linux image to boot directly.")] = None
    initrd: Annotated[Path | None, Meta(description="Needs a kernel.")] = None
    append: Annotated[Line, Meta(description="Kernel parameters; need a kernel.")] = ""
    mdevs: Annotated[tuple[GuestMdev, ...], Meta(description="Its mediated devices.")] = (
        msgspec.field(name="mdev", default=())
    )
    hotplug_ports: Annotated[
        int, Meta(ge=0, le=128, description="Free root ports for devices attached later.")
    ] = 4
    accel: Annotated[
        Literal["auto", "kvm", "tcg"], Meta(description="How QEMU runs the processors.")
    ] = "auto"
    machine: Annotated[Line, Meta(description="QEMU's machine type.")] = "q35"
    qemu: Annotated[Line, Meta(description="QEMU's program, a name or an absolute path.")] = (
        "qemu-system-x86_64"
    )
    firmware: Annotated[
        Path | None, Meta(description="Directory of firmware images, QEMU's -L.")
    ] = None
    extra: Annotated[
        tuple[Annotated[str, Meta(pattern=r"^[^\x00]{0,4096}$")], ...],
        Meta(description="Further arguments of QEMU, as they are."),
    ] = ()


class Pool(Devices, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Devices without a guest, created ahead as one does with SR-IOV functions."""

    name: Name
    start: Annotated[
        Literal["auto", "manual"],
        Meta(description="Whether they come back after a reboot by themselves."),
    ] = "auto"
    mdevctl: Annotated[
        Annotated[str, Meta(pattern=_TEXT)],
        Meta(description="Further keys of the device's mdevctl definition, a JSON object as text."),
    ] = ""


class Spec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All that one file asks for."""

    name: Annotated[
        Name | None,
        Meta(description="What it is called; the file's name without an ending if absent."),
    ] = None
    guests: Annotated[tuple[GuestConfig, ...], Meta(description="The virtual machines.")] = (
        msgspec.field(name="guest", default=())
    )
    pools: Annotated[tuple[Pool, ...], Meta(description="Devices without a guest.")] = (
        msgspec.field(name="pool", default=())
    )

    def devices(self) -> Iterator[tuple[Place, str, GuestMdev | Pool]]:
        """Every request for devices: its key in the file, whose it is, and the request."""
        for number, guest in enumerate(self.guests):
            for index, mdev in enumerate(guest.mdevs):
                yield ("guest", number, "mdev", index), guest.name, mdev
        for number, pool in enumerate(self.pools):
            yield ("pool", number), pool.name, pool


class Document(Struct, frozen=True):
    """A spec and where its words stand.

    :ivar source: What messages call the file.
    :ivar lines: The line of each key; of what is not there the nearest key around it counts.
    """

    spec: Spec
    source: str
    lines: Mapping[Place, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What the spec is called: by itself, or by its file.

        :raise RequestError: Neither gives it a name.
        """
        stem = self.spec.name or Path(self.source).stem
        if re.match(_NAME, stem) is None:
            raise self.fault((), "the spec has no name", 'add name = "…" as its first line')
        return stem

    def fault(self, place: Place, message: str, hint: str = "") -> RequestError:
        """The error for something that is wrong with a key, to be raised by the caller."""
        return _fault(self.source, self.lines, place, message, hint)


def key(place: Place) -> str:
    """A key as messages name it: ``guest[0].mdev[1].count``. Indices begin with 0."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)
    return text.removeprefix(".")


def _fault(
    source: str, lines: Mapping[Place, int], place: Place, message: str, hint: str = ""
) -> RequestError:
    around = place
    while around and around not in lines:
        around = around[:-1]
    where = f"{source}:{lines[around]}" if around in lines else source
    what = f"{where}: {key(place)}: {message}" if place else f"{where}: {message}"
    return RequestError(" ".join(what.split()), hint)


# ---- reading --------------------------------------------------------------------------------


def load(path: Path | str) -> Document:
    """Read and check a spec file; ``-`` is standard input.

    It is JSON if it is called ``.json`` or begins with ``{``, and TOML otherwise. Relative paths in
    it become relative to its directory, and the files they name must be there.

    :raise RequestError: It cannot be read or something is wrong with it.
    """
    source = "standard input" if os.fspath(path) == "-" else os.fspath(path)
    data = _read(path, source)
    if len(data) > MAX_BYTES:
        raise RequestError(
            f"{source} is larger than {MAX_BYTES // MIB} MiB", "is this the right file?"
        )
    base = Path() if os.fspath(path) == "-" else Path(path).parent
    kind: Literal["toml", "json"] | None = None
    if os.fspath(path).endswith((".json", ".toml")):
        kind = "json" if os.fspath(path).endswith(".json") else "toml"
    document = parse(data, source, kind=kind, base=base.absolute())
    _check_files(document)
    return document


def _read(path: Path | str, source: str) -> bytes:
    if os.fspath(path) == "-":
        return sys.stdin.buffer.read(MAX_BYTES + 1)
    try:
        # without O_NONBLOCK a FIFO that nobody writes to would hold the command for ever
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        hint = "check its name" if error.errno == errno.ENOENT else ""
        raise RequestError(f"{source} cannot be read: {os.strerror(error.errno or 0)}", hint) from (
            error
        )
    except ValueError as error:  # a zero byte in the name
        raise RequestError(f"{_shown(source)} cannot be read: {error}") from error
    try:
        with open(fd, "rb") as file:  # noqa: PTH123 - a descriptor
            return file.read(MAX_BYTES + 1) or b""
    except OSError as error:
        raise RequestError(f"{source} cannot be read: {os.strerror(error.errno or 0)}") from error


def parse(
    data: bytes | str,
    source: str = "spec",
    *,
    kind: Literal["toml", "json"] | None = None,
    base: Path | None = None,
) -> Document:
    """Check the text of a spec. Looks at nothing but the text.

    :param source: What messages call it.
    :param kind: TOML or JSON; guessed from the first character without it.
    :param base: Directory that relative paths are relative to; without it they stay as they are.
    :raise RequestError: Something is wrong with it.
    """
    text = _decoded(data, source)
    if not text.strip():
        raise RequestError(f"{source} is empty", "see docs/spec.md for what to write")
    if kind is None:
        kind = "json" if text.lstrip().startswith("{") else "toml"
    lines = _Places(text, source, kind).read()
    return _checked(_parsed(text, source, kind), source, lines, base)


def check(
    spec: Spec, source: str = "spec", lines: Mapping[Place, int] = MappingProxyType({})
) -> Document:
    """Check a spec that a program made, or changed, as one that was read.

    :param lines: Where its keys stand, if it was read once.
    :raise RequestError: Something is wrong with it.
    """
    return _checked(to_plain(spec), source, lines, None)


def _checked(raw: object, source: str, lines: Mapping[Place, int], base: Path | None) -> Document:
    try:
        spec = msgspec.convert(raw, Spec, dec_hook=lambda type_, value: _value(type_, value, base))
    except msgspec.ValidationError as error:
        raise _invalid(error, source, lines) from None
    document = Document(spec, source, lines)
    _check(document)
    return document


def _decoded(data: bytes | str, source: str) -> str:
    if isinstance(data, str):
        return data
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise RequestError(
            f"{source}:{line}: this is not UTF-8 text", "save the file as UTF-8"
        ) from None


def _parsed(text: str, source: str, kind: str) -> object:
    import tomllib

    try:
        if kind == "json":
            return msgspec.json.decode(text)
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        match = re.search(
            r"(.*) \(at (?:line ([0-9]+), column [0-9]+|end of document)\)$", str(error)
        )
        what = match[1] if match else str(error)
        line = match[2] if match and match[2] else text.count("\n") + 1
        raise RequestError(
            f"{source}:{line}: not valid TOML: {what[:1].lower()}{what[1:]}"
        ) from None
    except msgspec.DecodeError as error:
        match = re.fullmatch(r"(?:JSON is malformed: )?(.*?)(?: \(byte ([0-9]+)\))?", str(error))
        what = match[1] if match else str(error)
        at = int(match[2]) if match and match[2] else len(text)
        line = text.encode()[:at].count(b"\n") + 1
        raise RequestError(f"{source}:{line}: not valid JSON: {what}") from None
    except (RecursionError, ValueError) as error:
        raise RequestError(f"{source}: cannot be read as {kind.upper()}: {error}") from None


def _value(type_: type, value: object, base: Path | None) -> object:
    """Make a value of one of our types; msgspec turns the ValueError into its own error."""
    if issubclass(type_, (Size, Condition)):
        return type_.read(value)
    if type_ is Path:
        if not isinstance(value, str) or not value or "\0" in value:
            raise ValueError("must be the name of a file")
        return base / value if base is not None else Path(value)
    raise NotImplementedError(type_)


_WORDS = {
    "int": "a whole number",
    "str": "text",
    "bool": "true or false",
    "float": "a number",
    "object": "a table",
    "array": "a list",
    "null": "nothing",
    "datetime": "a date",
    "date": "a date",
    "time": "a time",
}
_CHOICES = {"accel": "auto, kvm, tcg", "start": "auto, manual"}
_PATTERNS = {
    _NAME: "must be up to 40 letters, digits, '_', '.' and '-', a letter or digit first",
    _WORD: "must be one word without '/'",
    _LINE: "must be one line without control characters",
    _TEXT: "must be one line without control characters",
}


def _invalid(
    error: msgspec.ValidationError, source: str, lines: Mapping[Place, int]
) -> RequestError:
    """What msgspec found, in our words and with the line."""
    message, _, path = str(error).partition(" - at `")
    place: Place = tuple(
        int(index) if index else name
        for name, index in re.findall(r"\.([^.\[\]`]+)|\[([0-9]+)\]", path)
    )
    match re.match(r"Object (contains unknown|missing required) field `(.*)`$", message, re.DOTALL):
        case re.Match() as found if found[1] == "contains unknown":
            known = _keys(place)
            close = get_close_matches(found[2], known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}"
            return _fault(source, lines, (*place, found[2][:40]), "there is no such key", hint)
        case re.Match() as found:
            return _fault(source, lines, place, f"the key {found[2]} is missing")
    pattern = re.match(r"Expected `str` matching regex ['\"](.*)['\"]$", message, re.DOTALL)
    if pattern is not None:
        by_shown = {repr(given)[1:-1]: words for given, words in _PATTERNS.items()}
        words = by_shown.get(pattern[1]) or _PATTERNS.get(pattern[1]) or "has characters it may not"
        return _fault(source, lines, place, words)
    bound = re.match(r"Expected `int` (>=|<=) (-?[0-9]+)$", message)
    if bound is not None:
        words = "at least" if bound[1] == ">=" else "at most"
        return _fault(source, lines, place, f"must be {words} {bound[2]}")
    kinds = re.match(r"Expected `(.*?)`, got `(.*?)`$", message)
    if kinds is not None:
        want = " or ".join(
            _WORDS.get(word, word) for word in kinds[1].split(" | ") if word != "null"
        )
        return _fault(source, lines, place, f"must be {want}, not {_WORDS.get(kinds[2], kinds[2])}")
    length = re.match(r"Expected `array` of length ([0-9]+), got ([0-9]+)$", message)
    if length is not None:
        message = f"must be a list of {length[1]}, not of {length[2]}"
    if message == "Invalid UUID":
        message = "is not a UUID; write it as 8-4-4-4-12 hexadecimal digits"
    if message.startswith("Invalid enum value"):
        message = f"is none of {_CHOICES[str(place[-1])]}"
    return _fault(source, lines, place, message)


def _keys(place: Place) -> list[str]:
    """The keys that the table at a place may have."""
    type_: Any = Spec
    for part in place:
        if isinstance(part, int):
            continue
        hint = next(f.type for f in msgspec.structs.fields(type_) if f.encode_name == part)
        while get_origin(hint) is not None or not hasattr(hint, "__struct_fields__"):
            arguments = get_args(hint)
            if not arguments:
                return []
            hint = arguments[0]
        type_ = hint
    return list(type_.__struct_encode_fields__)


# ---- what the types cannot say --------------------------------------------------------------


def _check(document: Document) -> None:
    spec = document.spec
    if not spec.guests and not spec.pools:
        raise RequestError(
            f"{document.source} asks for nothing", "write a [[guest]] or a [[pool]] into it"
        )
    _check_names(document)
    for number, guest in enumerate(spec.guests):
        _check_guest(document, ("guest", number), guest)
    total = 0
    seen: dict[UUID, Place] = {}
    for place, _, devices in spec.devices():
        total += devices.count
        if total > MAX_DEVICES:
            raise document.fault(
                (*place, "count"), f"this file asks for more than {MAX_DEVICES} devices"
            )
        _check_attributes(document, place, devices)
        uuid = devices.uuid
        if uuid is None:
            if devices.type is None and not devices.conditions:
                raise document.fault(
                    place, "says neither type nor attributes", 'add type = "…", see mdo host'
                )
            continue
        if uuid in seen:
            raise document.fault(
                (*place, "uuid"),
                f"device {uuid} is named a second time, first as {key(seen[uuid])}",
            )
        seen[uuid] = place
        if devices.count != 1:
            raise document.fault((*place, "count"), "a UUID names one device", "leave count out")
    _check_groups(document)


def _check_names(document: Document) -> None:
    seen: dict[str, Place] = {}
    uuids: dict[UUID, Place] = {}
    owners: list[tuple[Place, GuestConfig | Pool]] = [
        *((("guest", number), guest) for number, guest in enumerate(document.spec.guests)),
        *((("pool", number), pool) for number, pool in enumerate(document.spec.pools)),
    ]
    for place, owner in owners:
        if owner.name in seen:
            raise document.fault(
                (*place, "name"), f"{owner.name} is the name of {key(seen[owner.name])} already"
            )
        seen[owner.name] = place
        if isinstance(owner, GuestConfig) and owner.uuid is not None:
            if owner.uuid in uuids:
                raise document.fault(
                    (*place, "uuid"), f"is the UUID of {key(uuids[owner.uuid])} already"
                )
            uuids[owner.uuid] = place


def _check_guest(document: Document, place: Place, guest: GuestConfig) -> None:
    if guest.memory < MIB or guest.memory % MIB:
        raise document.fault(
            (*place, "memory"), f"{int(guest.memory)} bytes are no multiple of 1 MiB"
        )
    for name in ("initrd", "append"):
        if getattr(guest, name) and guest.kernel is None:
            raise document.fault((*place, name), "needs a kernel", 'add kernel = "…"')


def _check_attributes(document: Document, place: Place, devices: GuestMdev | Pool) -> None:
    for number, (name, value) in enumerate(devices.attributes):
        at = (*place, "attributes", number)
        try:
            check_attribute(name, value)
        except RequestError as error:
            raise document.fault(at, error.message, error.hint) from None
        if name == "group_uuid" and isinstance(devices, GuestMdev):
            raise document.fault(at, "a guest's devices have a group", f'group = "{value}"')
    if isinstance(devices, Pool) and devices.mdevctl:
        try:
            found = msgspec.json.decode(devices.mdevctl, type=dict[str, Any])
        except (msgspec.MsgspecError, RecursionError):
            raise document.fault((*place, "mdevctl"), "must be a JSON object") from None
        if known := {"mdev_type", "start", "attrs"}.intersection(found):
            raise document.fault(
                (*place, "mdevctl"),
                f"{min(known)} has a key of its own here",
                "type, start and attributes say it",
            )


def _check_groups(document: Document) -> None:
    """A start group has one user and one parent."""
    owners: dict[str, tuple[Place, str]] = {}
    parents: dict[tuple[str, str], tuple[Place, str]] = {}
    for place, owner, devices in document.spec.devices():
        if not isinstance(devices, GuestMdev) or devices.group is None:
            continue
        at = (*place, "group")
        if is_uuid(devices.group):
            first, name = owners.setdefault(devices.group.lower(), (place, owner))
            if name != owner:
                raise document.fault(
                    at, f"group {devices.group} is of guest {name} ({key(first)}): one user a group"
                )
        if devices.parent is None:
            continue
        first, parent = parents.setdefault((owner, devices.group), (place, devices.parent))
        if parent != devices.parent:
            raise document.fault(
                at,
                f"group {devices.group} is across parents: {key(first)} wants {parent}, "
                f"this {devices.parent}",
                "a group is on one parent",
            )


def _check_files(document: Document) -> None:
    for number, guest in enumerate(document.spec.guests):
        for name in ("disk", "kernel", "initrd", "firmware"):
            path: Path | None = getattr(guest, name)
            if path is None:
                continue
            place = ("guest", number, name)
            try:
                is_directory = path.is_dir()
                path.stat()
            except OSError as error:
                reason = os.strerror(error.errno or 0)
                raise document.fault(place, f"{path} cannot be used: {reason}") from None
            if is_directory != (name == "firmware"):
                kind = "is no directory" if name == "firmware" else "is a directory"
                raise document.fault(place, f"{path} {kind}")


# ---- lines ----------------------------------------------------------------------------------


class _LostError(Exception):
    """The text is not what it should be; the real parser says where."""


class _Places:
    """Finds the line of every key of a TOML or JSON text.

    The parsers do not tell. This reads just enough of both languages to follow the keys, gives up
    without a word on what it does not understand (the parser will complain), and refuses what the
    parsers would take quadratic time or the whole stack for.
    """

    _KEY: ClassVar[re.Pattern[str]] = re.compile(
        r"""[ \t]*("(?:[^"\\\n]|\\.)*"|'[^'\n]*'|[A-Za-z0-9_-]+)[ \t]*"""
    )
    _STRING: ClassVar[re.Pattern[str]] = re.compile(
        r'''"""(?:[^\\]|\\.)*?"{3,5}|\'\'\'.*?'{3,5}|"(?:[^"\\\n]|\\.)*"|'[^'\n]*\'''', re.DOTALL
    )
    _SPACE: ClassVar[re.Pattern[str]] = re.compile(r"(?:[ \t\r\n]+|#[^\n]*)*")
    _SCALAR: ClassVar[re.Pattern[str]] = re.compile(r"[^,\]}\n#\"'{\[]+")

    def __init__(self, text: str, source: str, kind: Literal["toml", "json"]) -> None:
        self.text = text
        self.source = source
        self.toml = kind == "toml"
        self.at = 0
        self.found: dict[Place, int] = {}
        self.assigned: set[Place] = set()
        self.starts = [0, *(match.end() for match in re.finditer("\n", text))]

    def read(self) -> Mapping[Place, int]:
        """The line of each key; of as many as can be found in a faulty text.

        :raise RequestError: A key is given twice, or the text is nested too deep.
        """
        try:
            if self.toml:
                self._document()
            else:
                self._space()
                self._value((), 0)
        except _LostError:
            pass
        return self.found

    def _line(self, at: int) -> int:
        return bisect_right(self.starts, at)

    def _space(self) -> None:
        match = self._SPACE.match(self.text, self.at)
        if match is not None:
            self.at = match.end()

    def _take(self, *texts: str) -> str:
        for text in texts:
            if self.text.startswith(text, self.at):
                self.at += len(text)
                return text
        raise _LostError

    def _peek(self) -> str:
        return self.text[self.at : self.at + 1]

    def _keys(self, prefix: Place) -> Place:
        parts: list[str] = []
        while True:
            match = self._KEY.match(self.text, self.at)
            if match is None:
                raise _LostError
            self.at = match.end()
            part = match[1]
            if part.startswith('"') and "\\" in part:
                try:
                    part = str(msgspec.json.decode(part))
                except msgspec.DecodeError:
                    raise _LostError from None
            elif part[0] in "\"'":
                part = part[1:-1]
            parts.append(part)
            if len(prefix) + len(parts) > MAX_DEPTH:
                raise self._too_deep()
            if not (self.toml and self._peek() == "."):
                return (*prefix, *parts)
            self.at += 1

    def _too_deep(self) -> RequestError:
        return RequestError(
            f"{self.source}:{self._line(self.at)}: nested deeper than {MAX_DEPTH} levels",
            "a spec needs four",
        )

    def _mark(self, place: Place, at: int, *, length: int = 0) -> None:
        line = self._line(at)
        for end in range(length + 1, len(place) + 1):
            self.found.setdefault(place[:end], line)

    def _document(self) -> None:
        counts: dict[Place, int] = {}
        table: Place = ()
        while True:
            self._space()
            if self.at >= len(self.text):
                return
            at = self.at
            if self._peek() == "[":
                many = self._take("[[", "[") == "[["
                table = ()
                names = self._keys(())
                for number, name in enumerate(names):
                    table = (*table, name)
                    last = number == len(names) - 1
                    if last and many:
                        counts[table] = counts.get(table, -1) + 1
                    if table in counts and (many or not last):
                        table = (*table, counts[table])
                self._take("]]" if many else "]")
                self._mark(table, at)
            else:
                self._pair(table, 1)

    def _pair(self, table: Place, depth: int) -> None:
        at = self.at
        place = self._keys(table)
        if place in self.assigned:
            raise _fault(self.source, {place: self._line(at)}, place, "is given a second time")
        self.assigned.add(place)
        self._mark(place, at, length=len(table))
        if not self.toml:
            self._space()
        self._take("=" if self.toml else ":")
        self._space()
        self._value(place, depth)

    def _value(self, place: Place, depth: int) -> None:
        if depth > MAX_DEPTH:
            raise self._too_deep()
        match self._peek():
            case "{":
                self._members("}", lambda _: self._pair(place, depth + 1))
            case "[":
                self._members("]", lambda index: self._item((*place, index), depth + 1))
            case '"' | "'":
                self._match(self._STRING)
            case _:
                self._match(self._SCALAR)

    def _item(self, place: Place, depth: int) -> None:
        self._mark(place, self.at, length=len(place) - 1)
        self._value(place, depth)

    def _members(self, end: str, member: Callable[[int], None]) -> None:
        self.at += 1
        index = 0
        self._space()
        while self._peek() != end:
            member(index)
            index += 1
            self._space()
            if self._take(",", end) == end:
                return
            self._space()
        self.at += 1

    def _match(self, pattern: re.Pattern[str]) -> None:
        match = pattern.match(self.text, self.at)
        if match is None:
            raise _LostError
        self.at = match.end()


# ---- writing --------------------------------------------------------------------------------


def to_plain(table: msgspec.Struct) -> dict[str, Any]:
    """A spec, or a table of one, as JSON has it; what stands at its default is left out."""
    plain = {}
    for name, written, default in _defaults(type(table)):
        value = getattr(table, name)
        if value == default:
            continue
        if isinstance(value, tuple) and isinstance(value[0], msgspec.Struct):
            plain[written] = [to_plain(item) for item in value]
        else:
            plain[written] = msgspec.to_builtins(value, enc_hook=_plain)
    return plain


@cache
def _defaults(type_: type[msgspec.Struct]) -> tuple[tuple[str, str, object], ...]:
    """Names of the fields, here and in a file, and their defaults; asking msgspec takes time."""
    return tuple(
        (
            field.name,
            field.encode_name,
            field.default
            if field.default_factory is msgspec.NODEFAULT
            else field.default_factory(),
        )
        for field in msgspec.structs.fields(type_)
    )


def to_toml(spec: Spec) -> str:
    """The text of a spec, which :func:`parse` reads; what stands at its default is left out."""
    return "\n".join(_lines(to_plain(spec), "")).removeprefix("\n") + "\n"


def _lines(table: Mapping[str, Any], path: str) -> Iterator[str]:
    """The lines of one table: its keys, what it is called by first, then the tables in it."""
    for name in sorted(table, key=lambda name: (name != "name", name != "uuid")):
        if not _has_tables(table[name]):
            yield f"{name} = {_toml(table[name])}"
    for name, items in table.items():
        if _has_tables(items):
            for item in items:
                yield f"\n[[{path}{name}]]"
                yield from _lines(item, f"{path}{name}.")


def _has_tables(value: object) -> bool:
    return isinstance(value, list) and isinstance(value[0], dict)


def _toml(value: object) -> str:
    if isinstance(value, (list, tuple)):
        words = [_toml(item) for item in value]
        if any(isinstance(item, (list, tuple)) for item in value):  # one a line
            return "[\n" + "".join(f"    {word},\n" for word in words) + "]"
        return f"[{', '.join(words)}]"
    if isinstance(value, str) and '"' in value and "'" not in value and value.isprintable():
        return f"'{value}'"
    # what JSON writes is TOML, but for one character
    return msgspec.json.encode(value).decode().replace("\x7f", "\\u007f")


def to_json(value: msgspec.Struct) -> str:
    """A spec, or a part of one, as JSON that :func:`parse` or :func:`read_guest` reads."""
    return msgspec.json.encode(msgspec.to_builtins(value, enc_hook=_plain)).decode()


def _plain(value: object) -> object:
    return int(value) if isinstance(value, Size) else str(value)


def read_guest(text: str) -> GuestConfig:
    """Read a guest that :func:`to_json` wrote.

    :raise RequestError: It is none.
    """
    return parse(f'{{"guest": [{text}]}}', "the journal", kind="json").spec.guests[0]


# ---- schema ---------------------------------------------------------------------------------


def schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a spec, for editors and other programs."""

    def hook(type_: type) -> dict[str, Any]:
        if type_ is Path:
            return {"type": "string", "minLength": 1}
        if issubclass(type_, Condition):
            return dict(type_.json_schema())
        return dict(Size.json_schema)

    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "What mdo plan and mdo apply read",
        **msgspec.json.schema(Spec, schema_hook=hook),
    }


def schema_text() -> str:
    """The contents of ``docs/spec.schema.json``."""
    return msgspec.json.format(msgspec.json.encode(schema()), indent=2).decode() + "\n"


if __name__ == "__main__":
    sys.stdout.write(schema_text())
