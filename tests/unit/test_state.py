# SPDX-License-Identifier: GPL-2.0-or-later
"""The state directory belongs to this user alone, or nothing in it is trusted."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mdev_lab import labs
from mdev_orchestrator.engine import model_cache
from mdev_orchestrator.engine.journal import Journal
from mdev_orchestrator.engine.journal_db import read_managed
from mdev_orchestrator.errors import HostError
from mdev_orchestrator.machine import Machine
from mdev_orchestrator.qemu import process
from mdev_orchestrator.qemu.start import _listen
from mdev_orchestrator.state import private_dir, state_dir

STRANGER = 65534


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the state directory shall be; the directory above it is there."""
    path = tmp_path / "above/state"
    path.parent.mkdir()
    monkeypatch.setenv("MDO_STATE_DIR", str(path))
    return path


@pytest.fixture
def any_umask(place: Path) -> Iterator[None]:
    """The caller may have none."""
    before = os.umask(0)
    yield
    os.umask(before)


USERS: dict[str, Callable[[], object]] = {
    "guest list": lambda: process.list_guests(Machine()),
    "guest, by name": lambda: process.find(Machine(), "a"),
    "lab list": labs.find_all,
    "journal, to look": lambda: read_managed(Machine()),
    "journal, to change": lambda: Journal.open(Machine().journal_path),
    "what was learned": lambda: model_cache.load(Machine()),
    "what is learned": lambda: model_cache.keep(Machine(), {}),
}


@pytest.fixture(params=list(USERS))
def use(request: pytest.FixtureRequest) -> Callable[[], object]:
    """Everything that trusts what stands there."""
    return USERS[request.param]


def refusal(use: Callable[[], object]) -> HostError:
    with pytest.raises(HostError) as caught:
        use()
    return caught.value


def test_a_link_is_refused(place: Path, use: Callable[[], object]) -> None:
    (place.parent / "elsewhere").mkdir(mode=0o700)
    place.symlink_to("elsewhere")
    assert refusal(use).message == f"{place} is not a directory"
    assert [*(place.parent / "elsewhere").iterdir()] == []


def test_a_link_to_nowhere_and_a_file_are_refused(place: Path, use: Callable[[], object]) -> None:
    place.symlink_to("elsewhere")
    assert refusal(use).message == f"{place} is not a directory"
    place.unlink()
    place.write_text("")
    assert refusal(use).message == f"{place} is not a directory"


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o1777])
def test_one_that_others_can_write_to_is_refused(
    place: Path, use: Callable[[], object], mode: int
) -> None:
    place.mkdir()
    place.chmod(mode)
    error = refusal(use)
    assert error.message.startswith(f"{place} can be written by others (mode {mode:04o})")
    assert error.hint.startswith(f"chmod go-w {place}")


def test_one_that_others_can_replace_is_refused(place: Path, use: Callable[[], object]) -> None:
    place.mkdir(mode=0o700)
    place.parent.chmod(0o775)
    assert refusal(use).message.startswith(f"{place.parent} can be written by others (mode 0775)")


def test_one_behind_a_link_that_leads_where_others_can_write_is_refused(
    place: Path, use: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    (place.parent / "loose/inner").mkdir(parents=True)
    (place.parent / "loose").chmod(0o777)
    (place.parent / "link").symlink_to("loose/inner")
    monkeypatch.setenv("MDO_STATE_DIR", str(place.parent / "link/state"))
    assert refusal(use).message.startswith(f"{place.parent}/loose can be written by others")


def test_a_sticky_directory_above_is_as_good_as_tmp(place: Path) -> None:
    place.parent.chmod(0o1777)
    assert state_dir() == place
    assert private_dir(place) == place
    assert process.list_guests(Machine()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("which", ["state", "above"])
def test_one_of_another_user_is_refused(place: Path, use: Callable[[], object], which: str) -> None:
    place.mkdir(mode=0o700)
    given = place if which == "state" else place.parent
    os.chown(given, STRANGER, -1)
    assert refusal(use).message == f"{given} belongs to user {STRANGER}, not to you"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_link_of_another_user_on_the_way_is_refused(
    place: Path, use: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    (place.parent / "link").symlink_to(".")
    os.chown(place.parent / "link", STRANGER, -1, follow_symlinks=False)
    monkeypatch.setenv("MDO_STATE_DIR", str(place.parent / "link/state"))
    assert refusal(use).message == f"{place.parent}/link belongs to user {STRANGER}, not to you"


@pytest.mark.usefixtures("any_umask")
def test_what_is_made_is_for_us_only(place: Path) -> None:
    with Journal.open(Machine().journal_path):
        pass
    model_cache.keep(Machine(), {})
    private_dir(Machine().guests_dir)
    found = {path.name: stat.S_IMODE(path.stat().st_mode) for path in place.iterdir()}
    assert (found["journal.db"], found["journal.lock"]) == (0o600, 0o600)
    assert found["guests"] == 0o700
    assert stat.S_IMODE(place.stat().st_mode) == 0o700


@pytest.mark.usefixtures("any_umask")
def test_directories_that_are_missing_above_are_made_for_us_only(place: Path) -> None:
    private_dir(place / "a/b/c")
    made = [place, place / "a", place / "a/b", place / "a/b/c"]
    assert [stat.S_IMODE(path.stat().st_mode) for path in made] == [0o700] * 4


@pytest.mark.usefixtures("any_umask")
def test_a_socket_is_for_us_only_from_its_first_moment(place: Path) -> None:
    path = private_dir(place) / "s"
    seen = []
    real = os.fchmod

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fchmod", lambda fd, mode: (seen.append(path.exists()), real(fd, mode)))
        _listen(path).close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert seen == [False]


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_journal_that_others_can_write_is_refused(place: Path, mode: int) -> None:
    with Journal.open(Machine().journal_path):
        pass
    (place / "journal.db").chmod(mode)
    for use in ("journal, to look", "journal, to change"):
        assert refusal(USERS[use]).message == f"{place / 'journal.db'} can be written by others"
