# SPDX-License-Identifier: GPL-2.0-or-later
"""L1, the nested machine: up, find, down.

A lab is a directory below the state directory with the record of one QEMU process in it. The
process is found again by its id and start time; a lab whose process is gone is swept away by the
next command that looks.

How L1 sees the host's files decides how fast Python starts there (``import qemu.qmp, pyudev`` under
TCG on two cores):

===================================================== ==================================
9p as virtme-ng mounts it                              7 to 8 s, at every start
9p with ``cache=loose``, but not for the packages      2.4 to 2.6 s
an erofs image of Python and its packages, 333 MB      1.5 s, then 1.3 s
===================================================== ==================================

So the root is one read-only 9p export that L1's page cache serves, below an overlay in memory: L1
may write anywhere and the host never sees it. Only the checkout is mounted again, writable and
uncached, so that edits and results pass through.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from mdev_orchestrator.errors import (
    BusyError,
    DeadlineError,
    HostError,
    MdoError,
    QemuError,
    RequestError,
    UnknownError,
)
from mdev_orchestrator.lab import (
    client,
    debian,
    driver,
    initramfs,
    kernelbuild,
    l2,
    samples,
    systemd,
)
from mdev_orchestrator.lab.debian import Kernel, Progress
from mdev_orchestrator.state import cache_dir, decode, private_dir, state_dir
from mdev_orchestrator.system.processes import start_time

QEMU = "qemu-system-x86_64"
EXEC_PORTS = 8
BOOT_SECONDS = {"tcg": 90.0, "kvm": 20.0}
CPU = {"tcg": "max,-erms,-fsrm", "kvm": "host"}
"""Emulated: without fast string copies. A kernel that is told of them copies and clears its pages
by ``rep movsb``, and TCG does that byte by byte, in two and a half times the time."""
CHECKED_FACTOR = 6
"""How many times longer a kernel with checkers may take."""
SYSTEMD_SECONDS = 120.0
"""More, for what systemd does before the agent begins."""
RECORD = "lab.json"
STARTER = "starter"
STOP_SECONDS = 5.0

#: Loaded from the initramfs, where they are uncompressed. virtio's PCI transport is built in or
#: not, depending on the kernel; modprobe knows.
MODULES = (
    "virtio_pci",
    "9pnet_virtio",
    "9p",
    "overlay",
    "virtio_console",
    "mdev",
    "vfio_iommu_type1",
    "kvm_amd",
    "kvm_intel",
    "loop",
)

#: The environment that commands in L1 start with.
ENVIRONMENT = {
    "HOME": "/root",
    "LANG": "C.UTF-8",
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "MDO_STATE_DIR": "/run/mdev-orchestrator",
    "TMPDIR": "/run/tmp",  # what stands in /tmp is the host's, and may be another user's
}


@dataclass(frozen=True, slots=True)
class Lab:
    """One lab as its record says.

    :ivar accel: ``tcg`` or ``kvm``.
    :ivar start_time: Of the QEMU process, in clock ticks since boot (``/proc/PID/stat``).
    :ivar created: Seconds since the epoch.
    :ivar files: Where the built parts are that a command inside may want, by the name of the
        environment variable that tells it.
    :ivar ready: Its agent has answered; until then it belongs to the command that brings it up.
    """

    name: str
    pid: int
    start_time: int
    release: str
    accel: str
    created: float
    files: dict[str, str] = field(default_factory=dict)
    ready: bool = True

    @property
    def directory(self) -> Path:
        """Where its sockets and logs are."""
        return labs_dir() / self.name

    @property
    def alive(self) -> bool:
        """Whether its process still is the one that was started."""
        return start_time(self.pid) == self.start_time


def labs_dir() -> Path:
    """Directory of all labs."""
    return state_dir() / "labs"


def check_name(name: str) -> str:
    """The name itself if it can be one.

    :raise RequestError: It cannot.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,31}", name):
        raise RequestError(
            f"'{name}' cannot name a lab", "use up to 32 letters, digits, '.', '_' and '-'"
        )
    return name


def labs() -> list[Lab]:
    """Every lab that runs; what dead ones left behind is swept away.

    One whose record is damaged is passed over here: :func:`find` says so when it is asked for.
    """
    found = []
    for directory in sorted(labs_dir().glob("*/")):
        with contextlib.suppress(FileNotFoundError):  # somebody else swept it
            inode = directory.stat().st_ino
            if (directory / RECORD).exists():
                lab = _read(directory)
                alive = lab is None or lab.alive
                if lab and lab.alive and lab.ready:
                    found.append(lab)
                elif lab and lab.alive and not _is_being_made(directory):
                    down(lab)  # who brought it up was killed meanwhile
            else:
                alive = _is_being_made(directory)
            if not alive:
                sweep(directory, inode)
    return found


def _is_being_made(directory: Path) -> bool:
    """Whether the command that makes a lab, or moves one aside, still runs."""
    try:
        pid, began = map(int, (directory / STARTER).read_text().split())
    except (ValueError, OSError):
        pid, began = 0, 0
    return start_time(pid) == began


def _read(directory: Path) -> Lab | None:
    """What a lab's record says; None when that is nothing to rely on."""
    try:
        lab = decode((directory / RECORD).read_bytes(), Lab)
    except ValueError:
        return None
    return lab if lab.name == directory.name else None


def look(name: str) -> Lab | None:
    """The running lab of a name, if there is one.

    :raise HostError: Its record is damaged.
    """
    for lab in labs():
        if lab.name == name:
            return lab
    directory = labs_dir() / check_name(name)
    if (directory / RECORD).exists():
        raise HostError(
            f"the record of lab {name} is damaged",
            f"end its QEMU if one runs, and delete {directory}",
        )
    return None


def find(name: str) -> Lab:
    """The running lab of a name.

    :raise UnknownError: There is none.
    """
    if (lab := look(name)) is None:
        raise UnknownError(f"no lab '{name}' is up", f"start it with 'mdo lab up --name {name}'")
    return lab


def sweep(directory: Path, inode: int | None = None) -> None:
    """Remove a lab's directory.

    :param inode: That of the directory which was found dead. It is moved aside first, and moved
        back if somebody has brought up another lab of that name since.
    """
    aside = directory.with_name(f".{directory.name.lstrip('.')}.{os.getpid()}")
    try:
        directory.rename(aside)
    except OSError:  # already swept
        return
    if inode is not None and aside.stat().st_ino != inode:
        aside.rename(directory)
        return
    shutil.rmtree(aside, ignore_errors=True)


def _claim(directory: Path) -> None:
    """Make a lab's directory, with who makes it inside: it appears whole or not at all."""
    draft = directory.with_name(f".{directory.name}.{os.getpid()}")
    private_dir(draft)
    (draft / STARTER).write_text(f"{os.getpid()} {start_time(os.getpid())}\n")
    try:
        draft.rename(directory)
    except OSError as error:
        shutil.rmtree(draft)
        raise BusyError(
            f"lab {directory.name} is being brought up by another command", "wait for it"
        ) from error


def up(
    name: str = "default",
    *,
    series: str = debian.DEFAULT_SERIES,
    memory: str = "4G",
    module_options: str = "",
    bound: bool = False,
    disk: Path | None = None,
    progress: Progress = lambda _: None,
) -> Lab:
    """Bring a lab up, or find it up already.

    :param series: Kernel of L1.
    :param memory: Of L1, as QEMU writes it.
    :param module_options: Parameters of mvgpu, as insmod takes them.
    :param bound: L1 ends with this process, even if that is killed.
    :param disk: L1 boots systemd and writes to this file, see :mod:`.systemd`.
    :raise MdoError: It cannot be; nothing is left behind.
    """
    directory = labs_dir() / check_name(name)
    if "MDO_LAB" in os.environ:
        raise RequestError("this is inside a lab already", "run it on the host")
    if shutil.which(QEMU) is None:
        raise HostError(f"{QEMU} is not installed", "apt-get install qemu-system-x86")
    if (lab := look(name)) is not None:
        if debian.series_of(lab.release) != series:
            raise RequestError(
                f"lab {name} is up with kernel {lab.release}", f"'mdo lab down --name {name}'"
            )
        return lab
    source = driver.checkout() / "kernel"
    kernel = kernelbuild.fetch(series, progress)
    modules = driver.build_modules(source, kernel, progress)
    # Guests stay quick: it is L1's kernel that is under examination.
    guest = debian.fetch_kernel(kernel.base, progress) if kernel.checked else kernel
    guest_modules = driver.build_modules(source, guest, progress)
    files = {
        "MDO_LAB_KERNEL": str(guest.image),
        "MDO_LAB_INITRD": str(l2.image(guest, guest_modules, progress)),
        "MDO_LAB_MODULES": str(modules),
    }
    if kernel.checked:
        files["MDO_LAB_CHECKERS"] = str(driver.build_modules(kernelbuild.FAULTS, kernel, progress))
    if (drivers := samples.built(kernel)) is not None:
        files["MDO_LAB_SAMPLES"] = str(drivers)
    insmod = ["insmod", str(modules / "mvgpu.ko"), *shlex.split(module_options)]
    private_dir(labs_dir())
    _claim(directory)
    try:
        needed = debian.run(["modinfo", "-F", "depends", insmod[1]]).strip().split(",")
        initramfs.build(
            directory / "initramfs",
            init=init_script(kernel, insmod, with_systemd=disk is not None),
            kernel=kernel,
            modules=(*MODULES, *filter(None, needed), *(systemd.MODULES if disk else ())),
        )
        if disk is not None:
            disk = systemd.make_disk(disk)
        boot = _Boot(directory, kernel, memory, files, bound, disk, progress)
        return _boot_somehow(boot)
    except BaseException:
        sweep(directory)
        raise


def down(lab: Lab) -> None:
    """End a lab and remove its files. Shared directories were written through, nothing is lost."""
    with contextlib.suppress(ProcessLookupError):
        pidfd = os.pidfd_open(lab.pid)
        try:
            for number in (signal.SIGTERM, signal.SIGKILL):
                if lab.alive:
                    signal.pidfd_send_signal(pidfd, number)
                    select.select([pidfd], [], [], STOP_SECONDS)
        finally:
            os.close(pidfd)
    with contextlib.suppress(ChildProcessError):  # it was started by an earlier command
        os.waitpid(lab.pid, os.WNOHANG)
    sweep(lab.directory)


@contextlib.contextmanager
def running(name: str, **options: object) -> Iterator[Lab]:
    """A lab that ends with the block, or with this process, whichever is first."""
    lab = up(name, bound=True, **options)  # type: ignore[arg-type]
    try:
        yield lab
    finally:
        down(lab)


def environment(lab: Lab) -> dict[str, str]:
    """What a command in L1 sees of the caller's environment, and of the lab."""
    passed = {key: os.environ[key] for key in ("TERM", "COLUMNS", "NO_COLOR") if key in os.environ}
    passed |= {key: value for key, value in os.environ.items() if key.startswith("MDO_TEST_")}
    venv = Path(sys.executable).parent
    return (
        passed
        | lab.files
        | {
            "MDO_LAB": lab.name,
            "MDO_CACHE_DIR": str(cache_dir()),
            "PATH": f"{venv}:{ENVIRONMENT['PATH']}",
        }
    )


def execute(
    lab: Lab,
    argv: list[str],
    *,
    terminal: bool = False,
    output: client.Output | None = None,
) -> int:
    """Run a command in a lab in the same directory as here; its exit status.

    :param output: Takes what the command prints instead of this process's standard output.

    :raise MdoError: It could not be run.
    """
    return client.run(
        lab.directory,
        argv,
        cwd=str(Path.cwd()),
        env=environment(lab),
        terminal=terminal,
        output=output,
    )


@dataclass(frozen=True, slots=True)
class _Boot:
    """What :func:`up` has decided."""

    directory: Path
    kernel: Kernel
    memory: str
    files: dict[str, str]
    bound: bool
    disk: Path | None
    progress: Progress


def _boot_somehow(boot: _Boot) -> Lab:
    """Boot with KVM where that works, else with TCG.

    A ``/dev/kvm`` that opens proves nothing, so the probe is the boot itself, with a deadline. That
    it failed is remembered until the host boots again.
    """
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text()
    mark = cache_dir() / "kvm-does-not-work"
    known_bad = mark.exists() and mark.read_text() == boot_id
    if os.access("/dev/kvm", os.R_OK | os.W_OK) and not known_bad:
        try:
            return _boot(boot, "kvm")
        except (QemuError, DeadlineError) as error:
            boot.progress(f"KVM does not work here, which is no fault: {error.message[:120]}")
            mark.write_text(boot_id)
    return _boot(boot, "tcg")


def _boot(boot: _Boot, accel: str) -> Lab:
    boot.progress(f"booting {boot.kernel.release} with {accel}")
    directory = boot.directory
    argv = [QEMU, *machine_arguments(directory.name, boot.kernel, accel, boot.memory)]
    argv += systemd.arguments(boot.disk) if boot.disk else []
    with (directory / "qemu.log").open("wb") as log:
        process = subprocess.Popen(
            gated(argv, bound=boot.bound),
            cwd=directory,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            start_new_session=True,
            umask=0o077,
        )
    try:
        lab = Lab(
            name=directory.name,
            pid=process.pid,
            start_time=start_time(process.pid) or 0,
            release=boot.kernel.release,
            accel=accel,
            created=time.time(),
            files=boot.files,
            ready=False,
        )
        _record(directory, lab)  # before the process can become a QEMU that nobody knows
        if process.stdin is not None:
            with contextlib.suppress(BrokenPipeError), process.stdin:
                process.stdin.write(b"go\n")
        _wait_up(boot, accel, process)
        lab = replace(lab, ready=True)
        _record(directory, lab)
    except BaseException:
        process.kill()
        process.wait()
        for path in (*directory.glob("exec-*"), directory / RECORD):
            path.unlink(missing_ok=True)
        raise
    return lab


def gated(argv: list[str], *, bound: bool) -> list[str]:
    """The same command, held back until it reads a line; it ends if this process is gone by then.

    :param bound: The kernel kills it when this process ends. The shell looks whether that has
        happened before ``setpriv`` asked for the signal. It is not done by ``preexec_fn``, which
        makes Python run its hooks for a fork: a ctrl-C in one of those is lost.
    """
    gate = '[ "$PPID" = "$1" ] && shift && read -r _ && exec "$@" </dev/null'
    binding = ["setpriv", "--pdeathsig", "KILL"] if bound else []
    return [*binding, "sh", "-c", gate, "sh", str(os.getpid()), *argv]


def _record(directory: Path, lab: Lab) -> None:
    draft = directory / f"{RECORD}.new"
    draft.write_text(json.dumps(asdict(lab)))
    draft.rename(directory / RECORD)


def _wait_up(boot: _Boot, accel: str, process: subprocess.Popen[bytes]) -> None:
    directory = boot.directory

    def alive() -> None:
        if process.poll() is not None:
            words = _tail(directory / "qemu.log") or _tail(directory / "console.log")
            raise QemuError(f"L1 ended while booting: {words or 'it said nothing'}")

    seconds = BOOT_SECONDS[accel] * (CHECKED_FACTOR if boot.kernel.checked else 1)
    started = time.monotonic()
    last = directory / f"exec-{EXEC_PORTS - 1}.sock"
    while not last.exists():
        alive()
        if time.monotonic() - started > seconds:
            raise DeadlineError("QEMU did not create its sockets")
        select.select([], [], [], 0.02)  # QEMU has no way to say that it listens
    try:
        with contextlib.closing(client.Session(directory)) as session:
            more = SYSTEMD_SECONDS if boot.disk else 0.0
            session.wait_ready(seconds + more, alive)
    except DeadlineError as error:
        raise DeadlineError(
            f"{error.message}; L1's last words: {_tail(directory / 'console.log')}"
        ) from error
    except MdoError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
        alive()
        raise
    boot.progress(f"up after {time.monotonic() - started:.1f} s")


def _tail(path: Path) -> str:
    try:
        lines = path.read_text(errors="replace").strip().splitlines()
    except OSError:
        return ""
    return " | ".join(lines[-3:])


def machine_arguments(name: str, kernel: Kernel, accel: str, memory: str) -> list[str]:
    """QEMU's arguments for L1.

    One processor: QEMU 7.2's TCG trips over 6.12's text patching with two.
    """
    argv = ["-name", f"guest=mdo-lab-{name}", "-M", "q35", "-accel", accel]
    argv += ["-cpu", CPU[accel], "-smp", "1", "-m", memory]
    argv += ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
    argv += ["-chardev", "file,id=console,path=console.log", "-serial", "chardev:console"]
    argv += ["-kernel", str(kernel.image), "-initrd", "initramfs"]
    argv += ["-append", f"console=ttyS0 quiet panic=-1 mitigations=off {systemd.COMMAND_LINE}"]
    for tag, path, mode in (
        ("root", Path("/"), "readonly=on"),
        ("checkout", driver.checkout(), "readonly=off"),
    ):
        argv += [
            "-fsdev",
            f"local,id={tag},path={_comma(path)},security_model=none,{mode},multidevs=remap",
        ]
        argv += ["-device", f"virtio-9p-pci,fsdev={tag},mount_tag={tag}"]
    argv += ["-device", "virtio-serial-pci"]
    for number in range(EXEC_PORTS):
        argv += ["-chardev", f"socket,id=e{number},path=exec-{number}.sock,server=on,wait=off"]
        argv += ["-device", f"virtserialport,chardev=e{number},name=mdo.exec.{number}"]
    return argv


def _comma(path: Path) -> str:
    return str(path).replace(",", ",,")


def init_script(kernel: Kernel, insmod: list[str], *, with_systemd: bool = False) -> str:
    """``/init`` of L1: mounts, then the first process, which is the agent or systemd."""
    q = shlex.quote
    here = str(driver.checkout())
    venv = str(Path(sys.executable).parent.parent)
    setup = [["busybox", "ip", "link", "set", "lo", "up"]]
    if not with_systemd:
        setup += [["/lib/systemd/systemd-udevd", "--daemon"], insmod]
    variables = {**ENVIRONMENT, "PYTHONPATH": f"{here}/python"}
    if with_systemd:
        variables["MDO_STATE_DIR"] = systemd.STATE
    agent = ["/usr/bin/env", "-i", *(f"{key}={value}" for key, value in variables.items())]
    agent += [sys.executable, "-S", "-m", "mdev_orchestrator.lab.agent", json.dumps(setup)]
    memory = "-t ext4 /dev/vda" if with_systemd else "-t tmpfs -o mode=0755 memory"
    first = [systemd.INIT] if with_systemd else agent
    prepare = systemd.prepare(agent, insmod) if with_systemd else ""
    return f"""#!/bin/busybox sh
b() {{ /bin/busybox "$@"; }}
b mount -t proc proc /proc
b mount -t sysfs sys /sys
b mount -t devtmpfs dev /dev
exec </dev/console >/dev/console 2>&1
for m in $(b cat /modules/order); do
    case $m in  # to be refused takes a second
    kvm-amd.ko) b grep -qw svm /proc/cpuinfo || continue ;;
    kvm-intel.ko) b grep -qw vmx /proc/cpuinfo || continue ;;
    esac
    b insmod "/modules/$m" || echo "$m is not for this machine"
done 2>/dev/null
b mkdir /lower /memory /new
b mount -t 9p -o ro,trans=virtio,version=9p2000.L,cache=loose,msize=512000 root /lower
b mount {memory} /memory
b mkdir -p /memory/upper /memory/work
b mount -t overlay -o lowerdir=/lower,upperdir=/memory/upper,workdir=/memory/work root /new
for d in proc sys dev; do b mount --move /$d /new/$d; done
b mount -t tmpfs -o mode=0755 run /new/run
b mkdir -p /new/dev/pts /new/dev/shm /new/run/venv
b mkdir -m 1777 /new/run/tmp
b mount -t devpts devpts /new/dev/pts
b mount -t tmpfs shm /new/dev/shm
b mount -t debugfs debugfs /new/sys/kernel/debug
b mkdir -p /new/usr/lib/modules
b ln -sf {q(str(kernel.modules))} /new/usr/lib/modules/
b mount --bind /new{q(venv)} /new/run/venv
b mount -t 9p -o rw,trans=virtio,version=9p2000.L,msize=512000 checkout /new{q(here)}
b mount --bind /new/run/venv /new{q(venv)}
{prepare}exec /bin/busybox switch_root /new {shlex.join(first)}
"""
