# SPDX-License-Identifier: GPL-2.0-or-later
"""From a file or a text to a document that is checked as a whole."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from mdev_orchestrator.errors import RequestError
from mdev_orchestrator.spec import messages
from mdev_orchestrator.spec.decoding import DecodingError, decode
from mdev_orchestrator.spec.document import Document
from mdev_orchestrator.spec.messages import Place
from mdev_orchestrator.spec.positions import Kind
from mdev_orchestrator.spec.rules import check_files, check_rules
from mdev_orchestrator.spec.sizes import MIB, quoted
from mdev_orchestrator.spec.structures import GuestConfig, Spec
from mdev_orchestrator.spec.syntax import read_text
from mdev_orchestrator.spec.writing import to_plain

MAX_BYTES = MIB
"""Of a file. A thousand guests need a tenth of it."""


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
    kind: Kind | None = None
    if os.fspath(path).endswith((".json", ".toml")):
        kind = "json" if os.fspath(path).endswith(".json") else "toml"
    document = parse(data, source, kind=kind, base=base.absolute())
    check_files(document)
    return document


def _read(path: Path | str, source: str) -> bytes:
    if os.fspath(path) == "-":
        return sys.stdin.buffer.read(MAX_BYTES + 1)
    try:
        # without O_NONBLOCK a FIFO without a writer would hold the command for ever
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        hint = "check its name" if error.errno == errno.ENOENT else ""
        raise RequestError(
            f"{source} cannot be read: {os.strerror(error.errno or 0)}", hint, errno=error.errno
        ) from error
    except ValueError as error:
        raise RequestError(f"{quoted(source)} cannot be read: it has a zero byte") from error
    try:
        with open(fd, "rb") as file:  # noqa: PTH123 - a descriptor
            return file.read(MAX_BYTES + 1) or b""
    except OSError as error:
        raise RequestError(
            f"{source} cannot be read: {os.strerror(error.errno or 0)}", errno=error.errno
        ) from error


def parse(
    data: bytes | str,
    source: str = "spec",
    *,
    kind: Kind | None = None,
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
    raw, lines = read_text(text, source, kind)
    return _checked(raw, source, lines, base)


def check(
    spec: Spec, source: str = "spec", lines: Mapping[Place, int] = MappingProxyType({})
) -> Document:
    """Check a spec that a program made, or changed, as one that was read.

    :param lines: Where its keys stand, if it was read once.
    :raise RequestError: Something is wrong with it.
    """
    return _checked(to_plain(spec), source, lines, None)


def read_guest(text: str) -> GuestConfig:
    """Read a guest that :func:`.writing.to_json` wrote.

    :raise RequestError: It is none.
    """
    return parse(f'{{"guest": [{text}]}}', "the journal", kind="json").spec.guests[0]


def _checked(raw: object, source: str, lines: Mapping[Place, int], base: Path | None) -> Document:
    try:
        spec = decode(raw, Spec, base)
    except DecodingError as error:
        raise messages.fault(source, lines, error.place, error.message, error.hint) from None
    document = Document(spec, source, lines)
    check_rules(document)
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
