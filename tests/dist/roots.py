# SPDX-License-Identifier: GPL-2.0-or-later
"""Clean roots of Debian's releases, in which a test runs one program after the other."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from programs import load

CHECKOUT = Path(__file__).resolve().parents[2]
DIST = "/dist"
"""Where the packages are in a root."""

#: Gives a program mounts of its own in a root. $0: the root, $1: apt's cache, $2: the packages.
MOUNT = f"""\
for place in dev sys; do mount --rbind "/$place" "$0/$place"; done
mount -t proc proc "$0/proc"
mkdir -p "$0{DIST}"
mount --bind "$1" "$0/var/cache/apt/archives"
mount --bind -o ro "$2" "$0{DIST}"
root=$0
shift 2
exec chroot "$root" "$@"
"""

PROMPT = "# "
"""What shells end root's prompt with."""

#: Changed by dpkg, apt and the machine's user, whatever is installed.
ALWAYS_CHANGED = (
    "dev",
    "dist",
    "proc",
    "root/.cache",
    "sys",
    "tmp",
    "var/cache/apt",
    "var/cache/ldconfig",
    "var/cache/man",
    "var/lib/apt",
    "var/lib/dpkg",
    "var/log",
)

fresh = load("fresh")
"""Makes such roots."""


class Root:
    """A root directory; a program in it ends with those that it started."""

    def __init__(self, path: Path, apt: Path, packages: Path) -> None:
        self.path = path
        self.apt = apt
        self.packages = packages

    def argv(self, *argv: str, net: bool = True) -> list[str]:
        """Words that run a program there."""
        spaces = ["--mount", "--pid", *([] if net else ["--net"])]
        mount = ["sh", "-ec", MOUNT, str(self.path), str(self.apt), str(self.packages)]
        return ["unshare", *spaces, "--fork", "--kill-child", *mount, "env", "-C", "/root", *argv]

    def run(self, *argv: str, code: int = 0, net: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a program, and check its exit status."""
        done = subprocess.run(
            self.argv(*argv, net=net),
            stdin=subprocess.DEVNULL,
            env=self.environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == code, done.stdout[-2000:] + done.stderr[-4000:]
        return done

    def sh(self, script: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        """Run a script of the shell."""
        return self.run("sh", "-ec", script, code=code)

    def apt_get(self, *words: str, net: bool = True) -> subprocess.CompletedProcess[str]:
        """Run apt-get, without packages that are only recommended."""
        options = ["-q", "-y", "--no-install-recommends", "-o", "Dpkg::Use-Pty=0"]
        # the root need not outlive a power cut
        options += ["-o", "Dpkg::Options::=--force-unsafe-io"]
        return self.run("apt-get", *options, *words, net=net)

    def environment(self) -> dict[str, str]:
        """Return that of a root user there, with this machine's way to PyPI."""
        return {
            **fresh.environment(Path("/root"), "root"),
            "DEBIAN_FRONTEND": "noninteractive",
            "PATH": "/root/.local/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        }

    def files(self) -> set[str]:
        """The paths of all files and directories but :data:`ALWAYS_CHANGED`."""
        found = set()
        for place, directories, names in os.walk(self.path):
            here = Path(place).relative_to(self.path)
            directories[:] = [d for d in directories if str(here / d) not in ALWAYS_CHANGED]
            found.update(str(here / name) for name in [*directories, *names])
        # Python compiles its own library when a program of root's imports it
        return {name for name in found if "__pycache__" not in name or "mdev" in name}

    def type(self, *argv: str, keys: str, until: str, seconds: float = 60) -> str:
        """Type into a program on a terminal; return what is there when ``until`` is, too."""
        ours, theirs = pty.openpty()
        environment = {**self.environment(), "TERM": "dumb"}
        with subprocess.Popen(
            self.argv(*argv), stdin=theirs, stdout=theirs, stderr=theirs, env=environment
        ) as process:
            os.close(theirs)
            os.set_blocking(ours, False)
            end = time.monotonic() + seconds
            shown = ""
            for awaited in (PROMPT, until):
                while awaited not in shown and time.monotonic() < end:
                    with contextlib.suppress(BlockingIOError):
                        shown += os.read(ours, 65536).decode(errors="replace")
                        shown = re.sub(r"[^\b]\x08", "", shown)  # zsh takes a space back
                    time.sleep(0.1)
                if awaited != until:
                    os.write(ours, keys.encode())
            process.kill()
        os.close(ours)
        return shown


@contextlib.contextmanager
def new(suite: str, packages: Path) -> Iterator[Root]:
    """Make a root for the block, in which apt has read its lists."""
    cache = fresh.cache_dir() / "fresh" / suite
    # not tools/fresh's own: apt locks it, and a program may be at work in a root of that
    apt = cache / "dist-apt"
    apt.mkdir(parents=True, exist_ok=True)
    with fresh.new_root(cache) as path:
        with fresh.base(suite, cache) as tar:
            fresh.run("tar", "-C", path, "-xf", tar)
        fresh.furnish(path, sudo=False)
        root = Root(path, apt, packages)
        root.apt_get("update")
        yield root


def build(suite: str) -> Path:
    """Build the packages in a root of its own, and return the directory that they are in."""
    keep = "rm -rf ~/.cache/mdev-orchestrator/dist && cp -r build/dist ~/.cache/mdev-orchestrator/"
    command = [CHECKOUT / "tools/fresh", suite, "sh", "-ec", f"make dist\n{keep}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found: Path = fresh.cache_dir() / "fresh" / suite / "root/mdev-orchestrator/dist"
    return found
