# SPDX-License-Identifier: GPL-2.0-or-later
"""Commands that campaigns disturb: each with what is done before it, and one for each verb."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from campaign import specs
from campaign.command import Ended, mdo
from campaign.world import Foreign, Look, clear, differences, look
from lab.machine import machine
from mdev_orchestrator.qemu.process import list_guests

Command = tuple[str, ...]

DESTROY = ("destroy", "one", "--force", "--deadline", "0")
UUIDS = tuple(f"cafe0000-0000-4000-8000-{number:012}" for number in range(4))
SMALL = "mvgpu-128M"


def create(*uuids: str, group: str = "") -> Command:
    """Create small devices under these UUIDs."""
    words = [word for uuid in uuids for word in ("--uuid", uuid)]
    return ("create", SMALL, *words, *(("--group", group) if group else ()))


def start(*uuids: str) -> Command:
    """Start guest ``g`` with these devices on its command line."""
    words = [word for uuid in uuids for word in ("--mdev", uuid)]
    extra = [f"--arg={word}" for word in specs.EXTRA]
    return ("guest", "start", "g", "--memory", "16M", *words, *extra)


STOP = ("guest", "stop", "g", "--force", "--deadline", "0")


@dataclass(frozen=True)
class Work:
    """One command.

    :ivar before: Commands that make the machine as this one is to find it; given the directory for
        specs.
    :ivar command: The command itself; given the same.
    :ivar is_repeated: ``mdo recover`` only closes it: if it has begun, a user gives it again.
    """

    before: Callable[[Path], list[Command]]
    command: Callable[[Path], Command]
    is_repeated: bool = False

    def prepare(self, place: Path, others: Foreign) -> Look:
        """Make the machine as the command is to find it; give what is there then."""
        clear(others)
        for command in self.before(place):
            done(*command)
        return look(others)

    def recovered(self, place: Path) -> list[str]:
        """Do what follows after the command was cut short; give what did not succeed."""
        wrong = recovered()
        if self.is_repeated and not all(guest.alive for guest in list_guests(machine())):
            again = mdo(*self.command(place))
            wrong += [] if again.status == 0 else [f"given again: {again}"]
        return wrong

    def whole(self, place: Path, others: Foreign) -> Look:
        """Run the command undisturbed; give what is there then."""
        was = self.prepare(place, others)
        done(*self.command(place))
        now = look(others)
        assert differences(was, now) != [], "the command changes nothing"
        return now


def done(*arguments: str) -> Ended:
    """Run a command that must succeed."""
    ended = mdo(*arguments)
    assert ended.status == 0, f"mdo {' '.join(arguments)}: {ended}"
    return ended


def recovered() -> list[str]:
    """Run ``mdo recover``; give why it did not succeed."""
    ended = mdo("recover")
    return [] if ended.status == 0 else [f"mdo recover: {ended}"]


def half_done(was: Look, whole: Look, now: Look) -> list[str]:
    """What is wrong if neither nothing nor all of a command is done: all that differs."""
    left = differences(was, now)
    return left if left and differences(whole, now, shape=True) else []


def _fixed(*commands: Command) -> Callable[[Path], list[Command]]:
    return lambda _: [*commands]


WORKS = {
    "create": Work(_fixed(), lambda _: create(*UUIDS[:3])),
    "create in a group": Work(
        _fixed(),
        lambda _: (*create(*UUIDS[:2], group="peers"), "--set", "vgpu_params=frame_rate_limiter=0"),
    ),
    "remove": Work(_fixed(create(*UUIDS[:3])), lambda _: ("remove", *UUIDS[:3])),
    "remove from a guest": Work(
        _fixed(create(*UUIDS[:2]), start(), ("attach", "g", UUIDS[0]), ("attach", "g", UUIDS[1])),
        lambda _: ("remove", "--detach", "--deadline", "3", *UUIDS[:2]),
    ),
    "guest start": Work(_fixed(create(*UUIDS[:2], group="peers")), lambda _: start(*UUIDS[:2])),
    "guest stop": Work(
        _fixed(create(*UUIDS[:2], group="peers"), start(*UUIDS[:2])),
        lambda _: STOP,
        is_repeated=True,
    ),
    "attach": Work(
        _fixed(create(UUIDS[0]), start()), lambda _: ("attach", "g", UUIDS[0], "--deadline", "3")
    ),
    "attach a new device": Work(
        _fixed(start()), lambda _: ("attach", "g", SMALL, "--deadline", "3")
    ),
    "detach": Work(
        _fixed(create(UUIDS[0]), start(), ("attach", "g", UUIDS[0])),
        lambda _: ("detach", "g", UUIDS[0], "--deadline", "3"),
    ),
    "detach and remove": Work(
        _fixed(create(UUIDS[0]), start(), ("attach", "g", UUIDS[0])),
        lambda _: ("detach", "g", UUIDS[0], "--remove", "--deadline", "3"),
    ),
    "apply": Work(_fixed(), lambda place: ("apply", specs.three(place))),
    "changed apply": Work(
        lambda place: [("apply", specs.plain(place)), ("apply", specs.before(place))],
        lambda place: ("apply", specs.changed(place)),
    ),
    "destroy": Work(lambda place: [("apply", specs.three(place))], lambda _: DESTROY),
}
