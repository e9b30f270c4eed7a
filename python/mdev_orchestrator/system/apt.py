# SPDX-License-Identifier: GPL-2.0-or-later
"""Suites of the machine's own Debian mirror that its apt does not use.

apt is given lists and sources of its own, and those of the host stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from mdev_orchestrator.errors import HostError
from mdev_orchestrator.system.children import run

KEYRINGS = ("debian-archive-keyring.pgp", "debian-archive-keyring.gpg")


def private_apt(place: Path, kind: str, suites: Iterable[str]) -> list[str]:
    """Return options with which apt sees some suites of Debian's mirror and nothing else.

    :param place: Directory for apt's lists and cache.
    :param kind: ``deb`` or ``deb-src``.
    :raise HostError: apt knows no Debian mirror.
    """
    for name in ("lists/partial", "cache/archives/partial"):
        (place / name).mkdir(parents=True, exist_ok=True)
    keyrings = [Path("/usr/share/keyrings") / name for name in KEYRINGS]
    keyring = next((path for path in keyrings if path.exists()), None)
    signed = f"[signed-by={keyring}] " if keyring else ""
    sources = place / "sources.list"
    uri = mirror()
    sources.write_text("".join(f"{kind} {signed}{uri} {suite} main\n" for suite in suites))
    options = {
        "Dir::Etc::sourcelist": sources,
        "Dir::Etc::sourceparts": "/dev/null",
        "Dir::State::lists": place / "lists",
        "Dir::Cache": place / "cache",
        "APT::Sandbox::User": "",
    }
    return [word for name, value in options.items() for word in ("-o", f"{name}={value}")]


def mirror() -> str:
    """Return the URI of the mirror that the machine's own Debian comes from.

    :raise HostError: apt knows none.
    """
    fields = ("REPO_URI", "RELEASE", "ORIGIN", "LABEL")
    text = run(["apt-get", "indextargets", "--format", "|".join(f"$({name})" for name in fields)])
    for line in text.splitlines():
        uri, release, origin, label = line.split("|")
        # without lists (no 'apt-get update' yet) the last two stay unresolved
        if "-" not in release and origin in {"Debian", "$(ORIGIN)"} and label != "Debian-Security":
            return uri
    raise HostError(
        "apt knows no Debian mirror", "add one to /etc/apt/sources.list and run 'apt-get update'"
    )
