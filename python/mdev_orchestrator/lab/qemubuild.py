# SPDX-License-Identifier: GPL-2.0-or-later
"""Our QEMU: Debian's source of a series with our patches and files, built and cached.

What there is of a series is below ``cache_dir()/qemu/SERIES``:

============= =====================================================================
source/       the patched tree
pristine/     the files that patches change, as they were
build/        QEMU's build directory, kept so that the next build is short
bin/          the program; replaced at once, so that it can be started at any time
firmware/     links to the firmware of Debian's packages, for QEMU's ``-L``
build.log     what configure and ninja said
build.json    what was built, see :class:`Build`
============= =====================================================================

Only files whose content changed are written into ``source``, and a change of a patch touches only
the files that it changes: ninja then does what is left.

The source comes from the machine's own Debian mirror. Its suites need not be the machine's: apt is
given lists and sources of its own, below the cache, and the host's stay as they are.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from mdev_orchestrator.errors import HostError, MdoError, UnknownError
from mdev_orchestrator.lab.building import failure, run_build
from mdev_orchestrator.lab.debian import Progress, locked, run
from mdev_orchestrator.lab.driver import checkout
from mdev_orchestrator.state import cache_dir

DEFAULT_SERIES = "10.0"
PROGRAM = "qemu-system-x86_64"

#: Where a series may be found, next to the machine's own release.
SUITES = ("trixie", "sid")

#: Nothing but what the lab's guests use; a warning is an error.
CONFIGURE = (
    "--target-list=x86_64-softmmu",
    "--without-default-features",
    "--enable-kvm",
    "--enable-tcg",
    "--enable-pixman",
    "--enable-werror",
    "--disable-debug-info",
    "--disable-docs",
    "--disable-download",
    "--disable-install-blobs",
)

#: Our files, and where in QEMU's tree they belong.
NEW_FILES = {
    "hw/vfio/mdev.c": "hw/vfio/mdev.c",
    "hw/vfio/mdev.h": "hw/vfio/mdev.h",
    "hw/vfio/mdev-lifecycle.c": "hw/vfio/mdev-lifecycle.c",
    "hw/vfio/mdev-lifecycle.h": "hw/vfio/mdev-lifecycle.h",
    "hw/vfio/mdev-stub.c": "stubs/vfio-mdev.c",
    "hw/vfio/vfio-mdev.json": "qapi/vfio-mdev.json",
    "tests/c/test-mdev-lifecycle.c": "tests/unit/test-mdev-lifecycle.c",
    "tests/c/vfio-mdev-test.c": "tests/qtest/vfio-mdev-test.c",
}

#: Program, pkg-config module or path: Debian's package that has it.
NEEDED_PROGRAMS = {
    "dpkg-source": "dpkg-dev",
    "gcc": "gcc",
    "ninja": "ninja-build",
    "patch": "patch",
    "pkg-config": "pkgconf",
}
NEEDED_LIBRARIES = {"glib-2.0": "libglib2.0-dev", "pixman-1": "libpixman-1-dev"}
FIRMWARE = {
    "/usr/share/seabios": "seabios",
    "/usr/share/qemu": "qemu-system-data",
}
NEEDED_FIRMWARE = ("bios-256k.bin", "linuxboot_dma.bin")
KEYRINGS = ("debian-archive-keyring.pgp", "debian-archive-keyring.gpg")

_STEP = re.compile(rb"^\[(\d+)/(\d+)\] ")
_TOUCHED = re.compile(r"^diff --git a/(\S+) b/(\S+)$", re.MULTILINE)
_VERSION = re.compile(r"^Version: (?:\d+:)?((\d+\.\d+)\S*)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Build:
    """A QEMU that was built from our tree.

    :ivar version: Of the source: Debian's, or what its file VERSION says.
    :ivar digest: Of our patches and files that went into it.
    :ivar firmware: Directory for ``-L`` (:attr:`GuestSpec.firmware`).
    """

    series: str
    version: str
    digest: str
    binary: Path
    firmware: Path


def series_known() -> list[str]:
    """Series of QEMU that there are patches for."""
    return sorted(path.parent.name for path in checkout().glob("qemu_patches/*/series"))


def patches(series: str) -> list[Path]:
    """Our patches for a series, in their order.

    :raise UnknownError: There are none.
    """
    place = checkout() / "qemu_patches" / series
    if series not in series_known():
        raise UnknownError(
            f"there are no patches for QEMU {series}", f"give one of {', '.join(series_known())}"
        )
    return [place / line for line in (place / "series").read_text().split()]


def digest(series: str) -> str:
    """Sixteen hexadecimal digits that change with whatever of ours goes into a build."""
    total = hashlib.sha256(" ".join(CONFIGURE).encode())
    for path in [*patches(series), *(checkout() / name for name in NEW_FILES)]:
        total.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest()[:16]


def place_of(series: str) -> Path:
    """Directory of a series in the cache."""
    return cache_dir() / "qemu" / series


def find(series: str = DEFAULT_SERIES) -> Build | None:
    """The build of a series that the cache has, current or not."""
    try:
        record = json.loads((place_of(series) / "build.json").read_text())
        found = Build(
            series=record["series"],
            version=record["version"],
            digest=record["digest"],
            binary=Path(record["binary"]),
            firmware=Path(record["firmware"]),
        )
    except (OSError, ValueError, KeyError):
        return None
    return found if found.binary.exists() else None


def build(
    series: str = DEFAULT_SERIES,
    *,
    source: Path | None = None,
    jobs: int = 0,
    progress: Progress = lambda _: None,
) -> Build:
    """Build a series, or what has changed since; returns at once when nothing has.

    :param source: A source tree to take instead of Debian's; it is copied and stays as it is.
    :param jobs: Compilers at a time; 0 for one a processor.
    :raise MdoError: Something does not fit or does not compile.
    """
    place = place_of(series)
    ours = digest(series)
    with locked(place):
        done = find(series)
        if done and done.digest == ours and source is None:
            return done
        check_host()
        place.mkdir(parents=True, exist_ok=True)
        version = prepare_source(series, place, source, progress)
        changed = sync(series, place)
        if changed:
            progress(f"{changed} files of ours have changed")
        return make(place, series, version, ours, jobs, progress)


def build_stock(
    series: str = DEFAULT_SERIES, *, jobs: int = 0, progress: Progress = lambda _: None
) -> Build:
    """Build the source of a series as it was before our patches, with the same options.

    Only for comparisons: nothing else uses it, and it is not listed.

    :raise MdoError: It does not compile.
    """
    build(series, jobs=jobs, progress=progress)
    patched, place = place_of(series), place_of(f"{series}-stock")
    with locked(place):
        mark, origin = place / "source.json", (patched / "source.json").read_text()
        options = hashlib.sha256(" ".join(CONFIGURE).encode()).hexdigest()[:16]
        if not mark.exists() or mark.read_text() != origin:
            progress("copying the source without our patches")
            remove(place)
            place.mkdir(parents=True)
            with locked(patched):
                copy_unpatched(patched, place / "source")
            mark.write_text(origin)
        elif (done := find(place.name)) and done.digest == options:
            return done
        return make(place, place.name, json.loads(origin)["version"], options, jobs, progress)


def make(place: Path, series: str, version: str, ours: str, jobs: int, progress: Progress) -> Build:
    """Configure and compile ``place/source``, and put the program where it is found."""
    configure(place, progress)
    compile_program(place, jobs or os.cpu_count() or 1, progress)
    firmware = link_firmware(place)
    binary = place / "bin" / PROGRAM
    binary.parent.mkdir(exist_ok=True)
    shutil.copy2(place / "build" / PROGRAM, binary.with_suffix(".new"))
    binary.with_suffix(".new").replace(binary)
    done = Build(series, version, ours, binary, firmware)
    (place / "build.json").write_text(json.dumps(asdict(done), default=str) + "\n")
    return done


def check_host() -> None:
    """Check that all that QEMU's build wants is there.

    :raise HostError: Names what is not, and the packages that have it.
    """
    missing = [package for name, package in NEEDED_PROGRAMS.items() if not shutil.which(name)]
    if "pkgconf" not in missing:
        missing += [
            package
            for name, package in NEEDED_LIBRARIES.items()
            if subprocess.run(["pkg-config", "--exists", name], check=False).returncode
        ]
    missing += [package for path, package in FIRMWARE.items() if not Path(path).is_dir()]
    if missing:
        raise HostError(
            f"building QEMU needs {', '.join(missing)}", f"apt-get install {' '.join(missing)}"
        )
    if not importlib.util.find_spec("mesonbuild"):
        raise HostError(
            "building QEMU needs meson 1.5 or newer beside this Python",
            f"{sys.executable} -m pip install 'meson>=1.5'",
        )


# --- the source -----------------------------------------------------------------------------------


def prepare_source(series: str, place: Path, given: Path | None, progress: Progress) -> str:
    """See to it that ``place/source`` is a tree of the series; returns its version.

    A tree that is there stays, unless the user names one that is not what it came from; then it is
    replaced by one that our patches fit.
    """
    mark = place / "source.json"
    origin = str(given.absolute()) if given else "debian"
    if mark.exists():
        record = json.loads(mark.read_text())
        if given is None or record["origin"] == origin:
            return str(record["version"])
    with tempfile.TemporaryDirectory(dir=place) as name:
        work = Path(name)
        if given:
            version = tree_version(given, series)
            progress(f"copying QEMU {version} from {given}")
            run(["cp", "-a", "--reflink=auto", given, work / "source"])
        else:
            version = fetch_source(series, work, work / "source", progress)
        progress("patching")
        sync(series, work)
        mark.unlink(missing_ok=True)
        for part in ("source", "pristine", "build"):
            remove(place / part)
        for part in ("source", "pristine"):
            (work / part).rename(place / part)
    mark.write_text(json.dumps({"origin": origin, "version": version}) + "\n")
    return version


def remove(path: Path) -> None:
    """Remove a file or a directory that may not be there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def tree_version(tree: Path, series: str) -> str:
    """Version of a source tree.

    :raise UnknownError: It is none of QEMU, or of another series.
    """
    try:
        version = (tree / "VERSION").read_text().strip()
    except OSError:
        version = ""
    if not (tree / "hw/vfio").is_dir() or not version:
        raise UnknownError(f"{tree} is no source tree of QEMU", "name the directory with VERSION")
    if not f"{version}.".startswith(f"{series}."):
        raise UnknownError(f"{tree} is QEMU {version}, not {series}", "see mdo qemu build --series")
    return version


def fetch_source(series: str, work: Path, tree: Path, progress: Progress) -> str:
    """Unpack Debian's newest source package of a series, with its patches; returns its version.

    :raise UnknownError: The mirror has none.
    """
    apt = private_apt(place_of("apt"))
    progress("reading the mirror's lists of source packages")
    run(["apt-get", "-q", *apt, "update"])
    text = run(["apt-cache", *apt, "showsrc", "qemu"])
    # what is listed can be gone already, so older ones are tried as well
    failure: MdoError | None = None
    for version in versions(text, series):
        progress(f"downloading QEMU {version}")
        try:
            package = f"qemu={full_version(text, version)}"
            run(["apt-get", "-q", *apt, "source", "--download-only", package], cwd=work)
        except MdoError as error:
            failure = error
            continue
        progress(f"unpacking QEMU {version}")
        # apt has checked the sums against the signed list
        dsc = next(work.glob("*.dsc"))
        run(["dpkg-source", "--no-check", "-x", dsc, tree])
        return version
    if failure:
        raise failure
    raise UnknownError(
        f"the Debian mirror has no source of QEMU {series}", "name a source tree with --source"
    )


def versions(showsrc: str, series: str) -> list[str]:
    """Versions without epoch of a series that ``apt-cache showsrc`` lists, newest first."""
    found = {match[1] for match in _VERSION.finditer(showsrc) if match[2] == series}
    return sorted(found, key=_numbers, reverse=True)


def _numbers(version: str) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", version)]


def full_version(showsrc: str, version: str) -> str:
    """The version as it is listed, with its epoch."""
    match = re.search(rf"^Version: ((?:\d+:)?{re.escape(version)})$", showsrc, re.MULTILINE)
    return match[1] if match else version


def private_apt(place: Path) -> list[str]:
    """Options that let apt see the source packages of other suites, and nothing else.

    :raise HostError: The machine has no Debian mirror that they could be derived from.
    """
    for name in ("lists/partial", "cache/archives/partial"):
        (place / name).mkdir(parents=True, exist_ok=True)
    keyrings = [Path("/usr/share/keyrings") / name for name in KEYRINGS]
    keyring = next((path for path in keyrings if path.exists()), None)
    signed = f"[signed-by={keyring}] " if keyring else ""
    sources = place / "sources.list"
    uri = mirror()
    sources.write_text("".join(f"deb-src {signed}{uri} {suite} main\n" for suite in SUITES))
    options = {
        "Dir::Etc::sourcelist": sources,
        "Dir::Etc::sourceparts": "/dev/null",
        "Dir::State::lists": place / "lists",
        "Dir::Cache": place / "cache",
        "APT::Sandbox::User": "",
    }
    return [word for name, value in options.items() for word in ("-o", f"{name}={value}")]


def mirror() -> str:
    """URI of the mirror that the machine's own Debian comes from.

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
        "apt knows no Debian mirror to take QEMU's source from", "name a tree with --source"
    )


# --- our patches and files ------------------------------------------------------------------------


def touched(patch: Path) -> list[str]:
    """Files that a patch changes."""
    return [match[2] for match in _TOUCHED.finditer(patch.read_text())]


def sync(series: str, place: Path) -> int:
    """Bring our patches and files into the source tree; returns how many files were written.

    :raise MdoError: A patch does not fit; names it and the file.
    """
    source, pristine = place / "source", place / "pristine"
    wanted = sorted({name for patch in patches(series) for name in touched(patch)})
    for name in wanted:
        keep(source, pristine, name)
    with tempfile.TemporaryDirectory(dir=place) as work:
        patched = Path(work)
        for name in files_below(pristine):
            target = patched / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(pristine / name, target)
        for patch in patches(series):
            apply(patch, patched, series)
        changed = [update(patched / name, source / name) for name in files_below(pristine)]
    changed += [update(checkout() / name, source / target) for name, target in NEW_FILES.items()]
    return sum(changed)


def copy_unpatched(place: Path, tree: Path) -> None:
    """Copy the source of ``place`` as it was before our patches."""
    run(["cp", "-a", "--reflink=auto", place / "source", tree])
    for name in NEW_FILES.values():
        remove(tree / name)
    for name in files_below(place / "pristine"):
        update(place / "pristine" / name, tree / name)


def keep(source: Path, pristine: Path, name: str) -> None:
    """Keep a copy of a file before a patch changes it for the first time."""
    target = pristine / name
    if not target.exists() and (source / name).exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source / name, target)


def files_below(root: Path) -> list[str]:
    """Relative names of all files below a directory."""
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def apply(patch: Path, tree: Path, series: str) -> None:
    """Apply one patch without fuzz.

    :raise MdoError: It does not fit; names the patch and the first file.
    """
    command = ["patch", "--strip=1", "--fuzz=0", "--batch", "--forward", "--silent"]
    command += ["--reject-file=-", "--no-backup-if-mismatch"]
    for name, part in zip(touched(patch), split(patch.read_text()), strict=True):
        if not (tree / name).exists():
            cause = f"there is no {name}"
        elif subprocess.run(
            command, cwd=tree, input=part, capture_output=True, text=True, check=False
        ).returncode:
            cause = f"{name} is not what it changes"
        else:
            continue
        raise MdoError(
            f"patch {patch.name} does not fit this QEMU {series}: {cause}",
            "is the tree patched already, or of another version?",
        )


def split(text: str) -> list[str]:
    """The parts of a patch, one a file, without its message."""
    starts = [match.start() for match in _TOUCHED.finditer(text)]
    return [text[a:b] for a, b in zip(starts, [*starts[1:], len(text)], strict=True)]


def update(origin: Path, target: Path) -> bool:
    """Write a file only when its content changes, so that ninja sees what did."""
    content = origin.read_bytes()
    if target.exists() and target.read_bytes() == content:
        return False
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(content)
    return True


# --- building -------------------------------------------------------------------------------------


def configure(place: Path, progress: Progress) -> None:
    """Run QEMU's configure, unless it was with the same options."""
    work = place / "build"
    mark = work / ".configured"
    command = [str(place / "source/configure"), f"--python={sys.executable}", *CONFIGURE]
    if mark.exists() and mark.read_text() == "\n".join(command):
        return
    remove(work)
    work.mkdir()
    progress("configuring")
    with (place / "build.log").open("wb") as log:
        status = subprocess.run(
            command, cwd=work, stdout=log, stderr=subprocess.STDOUT, check=False
        ).returncode
    if status:
        raise failure("QEMU", "configure", place / "build.log")
    mark.write_text("\n".join(command))


def compile_program(place: Path, jobs: int, progress: Progress) -> None:
    """Run ninja, and tell how far it is."""

    def how_far(line: bytes) -> str:
        step = _STEP.match(line)
        return f"compiling, step {int(step[1])} of {int(step[2])}" if step else ""

    progress(f"compiling with {jobs} jobs")
    command = ["ninja", "-C", str(place / "build"), "-j", str(jobs), PROGRAM]
    run_build("QEMU", command, place / "build.log", progress, how_far)


def link_firmware(place: Path) -> Path:
    """One directory with what Debian's packages have, for ``-L``.

    :raise HostError: The files that every guest needs are not there.
    """
    target = place / "firmware"
    target.mkdir(exist_ok=True)
    for directory in map(Path, FIRMWARE):
        for path in directory.iterdir():
            link = target / path.name
            if not link.is_symlink():
                link.symlink_to(path)
    for name in NEEDED_FIRMWARE:
        if not (target / name).exists():
            packages = " ".join(FIRMWARE.values())
            raise HostError(f"QEMU's firmware {name} is not there", f"apt-get install {packages}")
    return target


# --- for people who patch by hand -----------------------------------------------------------------


def export(series: str, target: Path) -> list[Path]:
    """Write the complete series as patches for ``git am``, our new files first.

    :raise MdoError: The directory cannot be written.
    """
    hooks = patches(series)
    texts = [new_files_patch(), *(path.read_text() for path in hooks)]
    names = ["hw-vfio-add-the-mdev-lifecycle.patch", *(path.name[5:] for path in hooks)]
    written = []
    try:
        target.mkdir(parents=True, exist_ok=True)
        for number, (name, text) in enumerate(zip(names, texts, strict=True), 1):
            path = target / f"{number:04}-{name}"
            subject = f"Subject: [PATCH {number}/{len(names)}]"
            path.write_text(text.replace("Subject: [PATCH]", subject, 1))
            written.append(path)
        (target / "series").write_text("".join(f"{path.name}\n" for path in written))
    except OSError as error:
        raise MdoError(f"cannot write {target}: {error.strerror}") from error
    return written


def new_files_patch() -> str:
    """One patch that adds all of our files."""
    head = """\
From 0000000000000000000000000000000000000000 Mon Sep 17 00:00:00 2001
From: mdev-orchestrator developers <devel@mdev-orchestrator.invalid>
Date: Sun, 22 Nov 2026 12:00:00 +0000
Subject: [PATCH] hw/vfio: add the mdev lifecycle

Start groups of mediated devices are started before the first open of a
member and stopped after the last close. This adds the state machine, the
glue to VFIO, the QAPI schema, a stub and the tests; nothing builds or
calls them yet.

"""
    return head + "".join(_lines_of_new_file())


def _lines_of_new_file() -> Iterator[str]:
    for name, target in sorted(NEW_FILES.items(), key=lambda pair: pair[1]):
        lines = (checkout() / name).read_text().splitlines(keepends=True)
        yield f"diff --git a/{target} b/{target}\nnew file mode 100644\n"
        yield f"--- /dev/null\n+++ b/{target}\n@@ -0,0 +1,{len(lines)} @@\n"
        yield from _added(lines)


def _added(lines: Iterable[str]) -> Iterator[str]:
    return (f"+{line}" for line in lines)


def main() -> int:
    """Build each series with and without our patches; print them as tests are told of them."""
    found: list[Build] = []
    try:
        for series in sys.argv[1:] or series_known():
            found += [build(series, progress=_say), build_stock(series, progress=_say)]
    except MdoError as error:
        _say(str(error))
        return error.exit_code
    sys.stdout.write(",".join(f"{qemu.series}={qemu.binary}:{qemu.firmware}" for qemu in found))
    return 0


def _say(line: str) -> None:
    sys.stderr.write(f"qemu: {line}\n")


if __name__ == "__main__":
    sys.exit(main())
