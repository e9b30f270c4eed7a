# SPDX-License-Identifier: GPL-2.0-or-later
"""``mdo apply``, ``diff``, ``destroy``, ``recover``, ``adopt`` and ``host`` as a user meets them.

In this process where that can be: a program that starts costs more than what it does here. Bad
specs are the matter of test_spec.py and test_plan_command.py; what is shown here is that nothing
is done about them.
"""

from __future__ import annotations

import asyncio
import errno
import io
import json
import os
import signal
import sqlite3
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mdev_orchestrator.cli.context import SAME_SECONDS, machine
from mdev_orchestrator.cli.main import main
from mdev_orchestrator.engine import recovery
from mdev_orchestrator.engine.journal_db import VERSION, read_managed
from mdev_orchestrator.engine.records import Managed
from unit.fakesys import FakeSystem

U1 = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"
U2 = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1002"
FOREIGN = "99999999-509f-382f-3c1e-e6bfe0fa1001"
POOL = f"""\
name = "lab"
[[pool]]
name = "p"
type = "t-1"
uuid = "{U1}"
[[pool]]
name = "q"
type = "t-1"
uuid = "{U2}"
"""


class CommandLine:
    """A machine of files, and the command line on it."""

    def __init__(self, system: FakeSystem, capsys: pytest.CaptureFixture[str]) -> None:
        self.system = system
        self.capsys = capsys

    def __call__(self, *arguments: str, code: int = 0) -> tuple[str, str]:
        """Standard output and standard error of a command, which ends with ``code``."""
        self.capsys.readouterr()
        try:
            ended = main(list(arguments))
        except SystemExit as error:
            ended = int(error.code or 0)
        said = self.capsys.readouterr()
        assert ended == code, said.err
        return said.out, said.err

    def managed(self) -> Managed:
        """What the journal has."""
        return read_managed(machine())

    def refused(self, *arguments: str, code: int = 2) -> str:
        """The one line that a command says which does nothing."""
        before, owned = set(self.system.uuids()), self.managed()
        self.system.writes.clear()
        out, err = self(*arguments, code=code)
        assert out == ""
        (line,) = err.splitlines()
        assert self.system.writes == []
        assert (self.system.uuids(), self.managed()) == (before, owned)
        return line.removeprefix("mdo: ")

    def spec(self, content: str | bytes = POOL, name: str = "lab.toml") -> str:
        path = self.system.root / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)


@pytest.fixture
def mdo(
    system: FakeSystem, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> CommandLine:
    """Two cards, and a device of another program."""
    for name in ("card0", "card1"):
        system.parent(name)
        system.type(name, "t-1", 8)
        system.groups_of(name, 3)
    asyncio.run(system.write(str(system.types("card0") / "t-1" / "create"), FOREIGN.encode()))
    system.writes.clear()
    monkeypatch.setenv("MDO_ROOT", str(system.root))
    return CommandLine(system, capsys)


# ---- what it says ----


def test_apply_says_what_it_does_and_a_second_time_nothing(mdo: CommandLine) -> None:
    out, err = mdo("apply", mdo.spec())
    assert out == "lab: applied, 2 steps\n"
    assert sorted(err.splitlines()) == sorted(
        f"mdo: [{n}/2] create t-1 on card0: mdev {uuid}" for n, uuid in ((1, U1), (2, U2))
    )
    assert mdo("apply", mdo.spec()) == ("lab: nothing to do\n", "")
    assert mdo.system.uuids() == {U1, U2, FOREIGN}


def test_diff_says_the_same_and_does_nothing(mdo: CommandLine) -> None:
    before = mdo.system.uuids()
    out, err = mdo("diff", mdo.spec())
    assert sorted(out.splitlines()) == sorted(
        f"create t-1 on card0: mdev {uuid}" for uuid in (U1, U2)
    )
    assert err == ""
    mdo("diff", mdo.spec(), "--exit-code", code=1)
    assert (mdo.system.uuids(), mdo.system.writes) == (before, [])
    mdo("apply", mdo.spec())
    assert mdo("diff", mdo.spec(), "--exit-code") == ("", "mdo: lab: nothing to do\n")


def test_their_json(mdo: CommandLine) -> None:
    shape = json.loads(mdo("diff", mdo.spec(), "--json")[0])
    assert set(shape) >= {"spec", "changes", "restarts"}
    assert shape["changes"][0] == {
        "do": "create",
        "guest": None,
        "uuid": U1,
        "type": "t-1",
        "parent": "card0",
        "needs": [],
    }
    assert json.loads(mdo("apply", mdo.spec(), "--json")[0]) == shape
    shape = json.loads(mdo("destroy", "lab", "--json")[0])
    assert [change["do"] for change in shape["changes"]] == ["remove", "remove"]


@pytest.mark.parametrize("by", ["name", "file"])
def test_destroy_by_name_or_by_file(mdo: CommandLine, by: str) -> None:
    spec = mdo.spec()
    mdo("apply", spec)
    out, _ = mdo("destroy", spec if by == "file" else "lab")
    assert out == "lab: destroyed, 2 steps\n"
    assert mdo.system.uuids() == {FOREIGN}
    assert mdo.managed() == Managed()
    assert mdo.refused("destroy", "lab").startswith("no spec lab was applied")


def test_host_tells_whose_a_device_is(mdo: CommandLine) -> None:
    mdo("apply", mdo.spec())
    (mdo.system.bus / U2).unlink()  # it is lost: gone without mdo
    found = json.loads(mdo("host", "--json")[0])
    owners = {mdev["uuid"]: (mdev["owner"], mdev["spec"], mdev["for"]) for mdev in found["mdevs"]}
    assert owners[FOREIGN] == ("foreign", None, None)
    assert owners[U1] == ("ours", "lab", "pool:p")


def test_host_shows_what_is_lost_and_apply_brings_it_back(mdo: CommandLine) -> None:
    mdo("apply", mdo.spec())
    asyncio.run(mdo.system.write(str(mdo.system.bus / U2 / "remove"), b"1"))
    (lost,) = json.loads(mdo("host", "--json")[0])["lost"]
    assert (lost["uuid"], lost["spec"], lost["for"]) == (U2, "lab", "pool:q")
    _, err = mdo("host")
    assert f"mdev {U2} of spec lab is lost" in err
    mdo("apply", mdo.spec())
    assert mdo.system.uuids() == {U1, U2, FOREIGN}
    assert json.loads(mdo("host", "--json")[0])["lost"] == []


def test_host_says_that_the_journal_is_damaged_and_shows_the_rest(
    mdo: CommandLine, tmp_path: Path
) -> None:
    (tmp_path / "state").mkdir(mode=0o700)
    (tmp_path / "state" / "journal.db").write_bytes(b"no journal at all")
    out, err = mdo("host")
    assert FOREIGN in out
    assert "is damaged" in err
    assert len(err.splitlines()) == 1


def test_adopt(mdo: CommandLine) -> None:
    assert mdo("adopt", FOREIGN)[0] == f"mdev {FOREIGN} is ours\n"
    assert [str(uuid) for uuid in mdo.managed().devices] == [FOREIGN]
    assert mdo("adopt", FOREIGN)[0] == ""
    assert "name guests and UUIDs, or --all" in mdo.refused("adopt")
    assert "there is no mdev" in mdo.refused("adopt", U1)


# ---- bad input: one line, nothing done, exit 2 ----

GUEST = '[[guest]]\nname = "a"\n'
DEEP = "[" * 100_000


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b'[[pool]]\nname = "\xff"', "lab.toml:2: this is not UTF-8 text"),
        (b"#" * (10 << 20), "is larger than 1 MiB"),
        (f"x = {DEEP}", "lab.toml"),
        (f'{GUEST}[[guest.mdev]]\ntype = "t-1"\ncount = 10000\n', "must be at most 4096"),
        (
            "".join(f'[[pool]]\nname = "p{n}"\ntype = "t-1"\ncount = 4000\n' for n in range(3)),
            "asks for more than 4096 devices",
        ),
        (
            f'{GUEST}mdev = [{{uuid = "{U1}", type = "t-1"}}, {{uuid = "{U1}", type = "t-1"}}]',
            f"device {U1} is named a second time",
        ),
        (
            GUEST
            + "\n".join(
                f'[[guest.mdev]]\ntype = "t-1"\ngroup = "g"\nparent = "card{n}"' for n in range(2)
            ),
            "group g",
        ),
        (f'[[pool]]\nname = "p"\ntype = "t-1"\nuuid = "{FOREIGN}"', "exists and is not ours"),
        (f'{GUEST}mdev = [{{uuid = "{FOREIGN}"}}]', "exists and is not ours"),
        (f'{GUEST}disk = "not-there.img"', "not-there.img"),
        (f'{GUEST}kernel = "/not/there"', "/not/there"),
        (f'{GUEST}memroy = "1G"', "there is no such key \u2014 did you mean memory?"),
        ('[[pool]]\nname = "p"\ntype = "t-1"\ncount = 17', "17 asked for, 15 fit"),
        ('[[pool]]\nname = "p"\ntype = "t-2"', "t-2"),
        (f'{GUEST}mdev = [{{type = "t-1", count = 9, group = "g"}}]', "lab.toml:3"),
    ],
)
def test_bad_specs_change_nothing(mdo: CommandLine, content: str | bytes, words: str) -> None:
    path = mdo.spec(content)
    line = mdo.refused("apply", path)
    assert words in line
    assert path in line
    assert len(line) < 600
    assert mdo.refused("diff", path) == line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["apply"], "missing argument 'SPEC'"),
        (["apply", "/not/there.toml"], "/not/there.toml cannot be read: No such file"),
        (["apply", "/"], "cannot be read"),
        (["apply", "/dev/null"], "is empty"),
        (["apply", "lab.toml", "--policy", "scatter"], "'scatter'"),
        (["apply", "lab.toml", "--deadline", "0"], "'--deadline'"),
        (["apply", "lab.toml", "--restrat"], "no such option: --restrat"),
        (["destroy", "no such name"], "no spec no such name was applied"),
        (["destroy", "../no/such/name"], "cannot be read"),
        (["recover", "now"], "unexpected extra argument"),
    ],
)
def test_bad_arguments_change_nothing(mdo: CommandLine, arguments: list[str], words: str) -> None:
    assert words in mdo.refused(*arguments)


def test_a_spec_from_standard_input(mdo: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(POOL.encode())))
    assert mdo("apply", "-")[0] == "lab: applied, 2 steps\n"
    nameless = POOL.removeprefix('name = "lab"\n').encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(nameless)))
    assert "the spec has no name" in mdo.refused("apply", "-")


def test_a_damaged_journal_is_known_before_anything(mdo: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "state").mkdir(mode=0o700)
    journal = tmp_path / "state" / "journal.db"
    journal.write_bytes(b"\xff" * 5000)
    for arguments in (["apply", mdo.spec()], ["destroy", "lab"], ["recover"]):
        _, err = mdo(*arguments, code=5)
        assert err.startswith(f"mdo: the journal {journal} is damaged: ")
        assert err.endswith("move it away; mdo adopt --all then makes a new one from what runs\n")
        assert len(err.splitlines()) == 1
    assert mdo.system.writes == []
    assert journal.read_bytes() == b"\xff" * 5000


def test_a_journal_of_a_newer_version(mdo: CommandLine, tmp_path: Path) -> None:
    mdo("apply", mdo.spec())
    mdo.system.writes.clear()
    with sqlite3.connect(tmp_path / "state" / "journal.db") as other:
        other.execute(f"PRAGMA user_version = {VERSION + 1}")
    other.close()
    _, err = mdo("destroy", "lab", code=5)
    versions = f"version {VERSION + 1}, this one knows {VERSION}"
    assert f"was written by a newer mdo: {versions} \u2014 use the newer mdo" in err
    assert mdo.system.writes == []


# ---- what fails on the way ----


def test_the_first_error_and_that_all_was_undone_are_one_line(mdo: CommandLine) -> None:
    mdo.system.refuse[U2] = errno.EIO
    out, err = mdo("apply", mdo.spec(), code=1)
    assert out == ""
    last = err.splitlines()[-1]
    assert last.startswith("mdo: cannot create t-1 on card0: Input/output error; ")
    assert mdo.system.uuids() == {FOREIGN}
    assert mdo.managed() == Managed()


def test_what_could_not_be_undone_stands_beside_it_and_recover_tries_again(
    mdo: CommandLine,
) -> None:
    def late(_name: str, uuid: str) -> None:
        if uuid == U2:  # it fails when the other one is there
            until(lambda: U1 in mdo.system.uuids())

    mdo.system.before = late
    mdo.system.refuse |= {U2: errno.EIO, f"{U1}/remove": errno.EPERM}
    _, err = mdo("apply", mdo.spec(), code=1)
    last = err.splitlines()[-1]
    assert "Input/output error" in last
    assert f"could not undo: create t-1 on card0: mdev {U1}: " in last
    assert "mdo recover tries again to undo it" in last
    assert mdo.system.uuids() == {U1, FOREIGN}
    mdo.system.refuse.clear()
    orphaned()
    out, _ = mdo("recover", "--dry-run")
    assert out.splitlines()[0].endswith("1 step to undo")
    assert mdo.system.uuids() == {U1, FOREIGN}


def orphaned() -> None:
    """Let the process be gone whose run is still open."""
    with sqlite3.connect(machine().journal_path) as journal:
        journal.execute("UPDATE run SET start_time = 1 WHERE ended IS NULL")
    journal.close()


def test_recover_with_nothing_open(mdo: CommandLine, tmp_path: Path) -> None:
    assert mdo("recover", "--dry-run") == ("nothing is open\n", "")
    assert not (tmp_path / "state").exists()
    assert mdo("recover")[0] == "nothing is open\n"
    assert json.loads(mdo("recover", "--json")[0]) == {"dry_run": False, "runs": []}


# ---- interrupted ----


def in_child(mdo: CommandLine, arguments: list[str], err: Path) -> int:
    """Start a command in a process of its own, on the same machine of files."""
    pid = os.fork()
    if not pid:
        code = 99
        try:
            with err.open("w") as file:
                sys.stderr = file
                code = main(arguments)
        except SystemExit as error:
            code = int(error.code or 0)
        finally:
            os._exit(code)
    return pid


def until(check: Callable[[], bool]) -> None:
    for _ in range(2000):
        if check():
            return
        time.sleep(0.01)
    raise AssertionError("it did not happen")


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_in_the_middle_rolls_back_and_says_so(
    mdo: CommandLine, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    gate = mdo.system.block[U2] = asyncio.Event()
    err = tmp_path / "err"
    pid = in_child(mdo, ["apply", mdo.spec(), "--deadline", "1.5"], err)
    until(lambda: U1 in mdo.system.uuids() and "[1/2]" in err.read_text())
    os.kill(pid, number)
    time.sleep(0.3)  # no event says that it has taken the signal
    gate.set()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == code
    assert err.read_text().splitlines()[-1] == "mdo: interrupted; all was undone"
    assert mdo.system.uuids() == {FOREIGN}
    assert mdo.managed() == Managed()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_stops_at_once_and_recover_still_works(
    mdo: CommandLine, tmp_path: Path, number: signal.Signals
) -> None:
    mdo.system.block[U2] = asyncio.Event()
    err = tmp_path / "err"
    pid = in_child(mdo, ["apply", mdo.spec(), "--deadline", "60"], err)
    until(lambda: U1 in mdo.system.uuids() and "[1/2]" in err.read_text())
    os.kill(pid, number)
    time.sleep(SAME_SECONDS + 0.2)  # at once it would be the same interruption
    os.kill(pid, number)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 128 + number
    last = err.read_text().splitlines()[-1]
    assert last == "mdo: interrupted again: stopped at once; mdo recover undoes what was begun"
    assert mdo.system.uuids() == {U1, FOREIGN}
    mdo.system.block.clear()
    (done,) = asyncio.run(recovery.recover(machine()))
    assert done.errors == ()
    assert mdo.system.uuids() == {FOREIGN}
    assert mdo.managed() == Managed()
