# SPDX-License-Identifier: GPL-2.0-or-later
"""What the fuzzed parsers have in common.

Each module of this directory that is called ``parse_NAME`` has a function ``one(data)``: it gives
bytes to a parser's entry functions and checks what must hold for any bytes. It returns for what is
accepted and for what is refused with an :class:`MdoError`; anything else that it raises is a bug.

``corpus/NAME`` holds inputs that are worth beginning with, as files. The unit tests give each of
them to ``one`` too, with no fuzzer (``tests/unit/test_fuzz_corpus.py``).
"""

from __future__ import annotations

import atexit
import importlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mdev_orchestrator.errors import MdoError

HERE = Path(__file__).parent
CORPUS = HERE / "corpus"

One = Callable[[bytes], None]


def names() -> list[str]:
    """The parsers that there is a harness for."""
    return sorted(path.stem.removeprefix("parse_") for path in HERE.glob("parse_*.py"))


def load(name: str) -> One:
    """The function ``one`` of a parser."""
    one: One = importlib.import_module(f"fuzz.parse_{name}").one
    return one


def scratch() -> Path:
    """A directory for this process; its path is short enough for sockets."""
    place = Path(tempfile.mkdtemp(prefix="mdo-fuzz-"))
    # a process that libFuzzer ends does not come to this: test_parsers.py gives it a TMPDIR
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    return place


@contextmanager
def at_home(place: Path) -> Iterator[None]:
    """Let the program keep its files below ``place`` while the block runs."""
    kept = dict(os.environ)
    os.environ |= {"MDO_STATE_DIR": str(place), "MDO_CACHE_DIR": str(place)}
    try:
        yield
    finally:
        os.environ.clear()
        os.environ |= kept


def records(data: bytes) -> list[tuple[str, bytes]]:
    """Cut an input into named texts: lines ``--- NAME`` begin one, the rest is what it holds.

    So that an input is a file that can be read, and a fuzzer has words to move.
    """
    found = []
    for part in (b"\n" + data).split(b"\n--- ")[1:]:
        name, _, text = part.partition(b"\n")
        found.append((name.decode("utf-8", "surrogateescape"), text))
    return found


def check_shown(texts: Iterable[str | None]) -> None:
    """What a terminal or a JSON document gets has no control characters and no half ones."""
    for text in texts:
        if text is not None:
            text.encode()
            lines = text.replace("\t", " ").split("\n")
            assert all(line.isprintable() for line in lines), ascii(text)


def check_message(error: MdoError) -> None:
    """A user gets one line that can be shown."""
    assert error.message
    assert "\n" not in error.message, ascii(error.message)
    check_shown((error.message, error.hint))
