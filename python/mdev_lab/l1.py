# SPDX-License-Identifier: GPL-2.0-or-later
"""L1, the nested machine: booted, and commands run in it.

How L1 sees the host's files decides how fast Python starts there (``import qemu.qmp, pyudev`` under
TCG on two cores):

===================================================== ==================================
9p as virtme-ng mounts it                              7 to 8 s, at every start
9p with ``cache=loose``, but not for the packages      2.4 to 2.6 s
an erofs image of Python and its packages, 333 MB      1.5 s, then 1.3 s
===================================================== ==================================

So the root is one read-only 9p export that L1's page cache serves, below an overlay in memory:
commands may write anywhere in L1, and the host's files stay as they are. Only the checkout is
mounted again, writable and uncached, so that edits and results pass through.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from mdev_lab import client, debug_kernel, initramfs, iommufd_kernel, l2, sample_drivers, systemd
from mdev_lab.checkout import ROOT
from mdev_lab.kernel_modules import build_modules
from mdev_lab.kernels import DEFAULT_SERIES, IOMMUFD, Kernel, fetch_kernel, series_of
from mdev_lab.labs import (
    RECORD,
    STOP_SECONDS,
    Lab,
    check_name,
    claim,
    down,
    labs_dir,
    lookup,
    remove_directory,
    write_record,
)
from mdev_orchestrator.errors import (
    DeadlineError,
    HostError,
    MdoError,
    QemuError,
    RequestError,
)
from mdev_orchestrator.state import cache_dir, private_dir
from mdev_orchestrator.system.children import run
from mdev_orchestrator.system.processes import boot_id, start_time
from mdev_orchestrator.system.progress import Progress

QEMU = "qemu-system-x86_64"
EXEC_PORTS = 8
BOOT_SECONDS = {"tcg": 90.0, "kvm": 20.0}
CPU = {"tcg": "max,-erms,-fsrm", "kvm": "host"}
"""For TCG without the flags of fast string copies. A kernel that sees them copies and clears pages
by ``rep movsb``, which TCG carries out byte by byte, in two and a half times the time."""
CHECKED_FACTOR = 6
"""How many times longer a kernel with checkers may take to boot."""
CR8 = Path(__file__).with_name("cr8")
"""Source of a module without which a guest that boots by UEFI ends the lab."""
SYSTEMD_SECONDS = 120.0
"""Added for what systemd does before the agent starts."""

FUNCTIONS = (("pci-testdev", 0x10), ("edu", 0x12), ("pci-testdev", 0x11), ("edu", 0x13))
"""QEMU's devices that mvgpu takes as parents, and where they are: a grid, an igd, and a second of
each. Every L1 has them; ``driver_override`` keeps mvgpu from those that were not asked for."""

#: Loaded from the initramfs, where they are uncompressed. Some kernels have virtio's PCI transport
#: built in; modprobe leaves it out then.
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

#: The environment of the agent, and so of all commands.
ENVIRONMENT = {
    "HOME": "/root",
    "LANG": "C.UTF-8",
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "MDO_STATE_DIR": "/run/mdev-orchestrator",
    "TMPDIR": "/run/tmp",  # files in /tmp are the host's, and may be another user's
}


def up(
    name: str = "default",
    *,
    series: str = DEFAULT_SERIES,
    memory: str = "4G",
    module_options: str = "",
    pci: int = 0,
    iommufd: bool = False,
    bound: bool = False,
    disk: Path | None = None,
    progress: Progress = lambda _: None,
) -> Lab:
    """Bring a lab up, or return it if it is up already.

    :param series: Kernel of L1.
    :param memory: Of L1, in QEMU's notation.
    :param module_options: Parameters of mvgpu, as insmod takes them.
    :param pci: How many parents of each kind are PCI functions, up to 2. With any, there are no
        others, unless ``module_options`` ask for them.
    :param iommufd: Whether L1 has ``/dev/iommu`` and the devices' own nodes.
    :param bound: Whether L1 ends with this process, even if that is killed.
    :param disk: File that L1 boots systemd with, see :mod:`.systemd`; it is made if needed.
    :raise MdoError: The lab cannot be brought up; nothing of it is left.
    """
    directory = labs_dir() / check_name(name)
    if "MDO_LAB" in os.environ:
        raise RequestError("this is inside a lab already", "run it on the host")
    if shutil.which(QEMU) is None:
        raise HostError(f"{QEMU} is not installed", "apt-get install qemu-system-x86")
    if (lab := lookup(name)) is not None:
        if series_of(lab.release) != series:
            raise RequestError(
                f"lab {name} is up with kernel {lab.release}", f"'mdo lab down --name {name}'"
            )
        if lab.iommufd != iommufd:
            state = "with" if lab.iommufd else "without"
            raise RequestError(f"lab {name} is up {state} iommufd", f"'mdo lab down --name {name}'")
        return lab
    source = ROOT / "kernel"
    fetch = iommufd_kernel.build if iommufd else debug_kernel.fetch
    kernel = fetch(series, progress)
    modules = build_modules(source, kernel, progress)
    # Guests boot Debian's kernel: without checkers they are quick.
    guest = kernel if kernel.series == kernel.base else fetch_kernel(kernel.base, progress)
    guest_modules = build_modules(source, guest, progress)
    files = {
        "MDO_LAB_KERNEL": str(guest.image),
        "MDO_LAB_INITRD": str(l2.image(guest, guest_modules, progress)),
        "MDO_LAB_MODULES": str(modules),
    }
    if kernel.checked:
        files["MDO_LAB_CHECKERS"] = str(build_modules(debug_kernel.FAULTS, kernel, progress))
    if (drivers := sample_drivers.built(kernel)) is not None:
        files["MDO_LAB_SAMPLES"] = str(drivers)
    others = ["grid_parents=0", "igd_parents=0"] if pci else []
    insmod = ["insmod", str(modules / "mvgpu.ko"), *others, *shlex.split(module_options)]
    private_dir(labs_dir())
    claim(directory)
    try:
        needed = run(["modinfo", "-F", "depends", insmod[1]]).strip().split(",")
        initramfs.build(
            directory / "initramfs",
            init=init_script(kernel, insmod, with_systemd=disk is not None, pci=pci),
            kernel=kernel,
            modules=(*MODULES, *filter(None, needed), *(systemd.MODULES if disk else ())),
            files={"modules/lab-cr8.ko": build_modules(CR8, kernel, progress) / "lab-cr8.ko"},
        )
        if disk is not None:
            disk = systemd.make_disk(disk)
        boot = _Boot(directory, kernel, memory, files, bound, disk, progress)
        return _boot_kvm_or_tcg(boot)
    except BaseException:
        remove_directory(directory)
        raise


@contextlib.contextmanager
def running(name: str, **options: object) -> Iterator[Lab]:
    """Bring a lab up for the block. It ends with the block, or with this process if that is killed.

    :raise MdoError: It cannot be brought up.
    """
    lab = up(name, bound=True, **options)  # type: ignore[arg-type]
    try:
        yield lab
    finally:
        down(lab)


def environment(lab: Lab) -> dict[str, str]:
    """Return what a command in L1 gets of the caller's environment, and what describes the lab."""
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
    """Run a command in a lab, in the current directory; return its exit status.

    :param terminal: Whether the command gets a terminal; for interactive use.
    :param output: Called with what the command prints, instead of this process's standard output.
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
    """What :func:`up` boots."""

    directory: Path
    kernel: Kernel
    memory: str
    files: dict[str, str]
    bound: bool
    disk: Path | None
    progress: Progress


def _boot_kvm_or_tcg(boot: _Boot) -> Lab:
    """Boot with KVM where that works, else with TCG.

    A ``/dev/kvm`` that opens proves nothing, so the probe is the boot itself, with a deadline. A
    file in the cache says that it failed, until the host boots again.
    """
    mark = cache_dir() / "kvm-does-not-work"
    known_bad = mark.exists() and mark.read_text().strip() == boot_id()
    if os.access("/dev/kvm", os.R_OK | os.W_OK) and not known_bad:
        try:
            return _boot(boot, "kvm")
        except (QemuError, DeadlineError) as error:
            boot.progress(f"KVM does not work here, which is no fault: {error.message[:120]}")
            mark.write_text(boot_id() + "\n")
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
            iommufd=boot.kernel.series.endswith(IOMMUFD),
            ready=False,
        )
        write_record(directory, lab)  # QEMU runs only after this
        if process.stdin is not None:
            with contextlib.suppress(BrokenPipeError), process.stdin:
                process.stdin.write(b"go\n")
        _wait_up(boot, accel, process)
        lab = replace(lab, ready=True)
        write_record(directory, lab)
    except BaseException:
        process.kill()
        process.wait()
        for path in (*directory.glob("exec-*"), directory / RECORD):
            path.unlink(missing_ok=True)
        raise
    return lab


def gated(argv: list[str], *, bound: bool) -> list[str]:
    """Return a command that runs ``argv`` after it has read a line, unless this process has ended.

    :param bound: Whether the kernel kills it when this process ends. The shell checks whether this
        process ended before ``setpriv`` took effect. ``preexec_fn`` is no alternative: Python runs
        its fork hooks with it, and a ctrl-C in one of those is lost.
    """
    gate = '[ "$PPID" = "$1" ] && shift && read -r _ && exec "$@" </dev/null'
    binding = ["setpriv", "--pdeathsig", "KILL"] if bound else []
    return [*binding, "sh", "-c", gate, "sh", str(os.getpid()), *argv]


def _wait_up(boot: _Boot, accel: str, process: subprocess.Popen[bytes]) -> None:
    directory = boot.directory

    def alive() -> None:
        if process.poll() is not None:
            words = _tail(directory / "qemu.log") or _tail(directory / "console.log")
            raise QemuError(f"L1 ended while booting: {words or 'no output'}")

    seconds = BOOT_SECONDS[accel] * (CHECKED_FACTOR if boot.kernel.checked else 1)
    started = time.monotonic()
    last = directory / f"exec-{EXEC_PORTS - 1}.sock"
    while not last.exists():
        alive()
        if time.monotonic() - started > seconds:
            raise DeadlineError("QEMU did not create its sockets")
        select.select([], [], [], 0.02)  # QEMU does not report that it listens
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
    """Return QEMU's arguments for L1.

    It has one processor: with two, 6.12's text patching fails under QEMU 7.2's TCG.
    """
    argv = ["-name", f"guest=mdo-lab-{name}", "-M", "q35", "-accel", accel]
    argv += ["-cpu", CPU[accel], "-smp", "1", "-m", memory]
    argv += ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
    argv += ["-chardev", "file,id=console,path=console.log", "-serial", "chardev:console"]
    argv += ["-kernel", str(kernel.image), "-initrd", "initramfs"]
    argv += ["-append", f"console=ttyS0 quiet panic=-1 mitigations=off {systemd.COMMAND_LINE}"]
    for tag, path, mode in (
        ("root", Path("/"), "readonly=on"),
        ("checkout", ROOT, "readonly=off"),
    ):
        argv += [
            "-fsdev",
            f"local,id={tag},path={_comma(path)},security_model=none,{mode},multidevs=remap",
        ]
        argv += ["-device", f"virtio-9p-pci,fsdev={tag},mount_tag={tag}"]
    for model, slot in FUNCTIONS:
        argv += ["-device", f"{model},addr={slot:x}"]
    argv += ["-device", "virtio-serial-pci"]
    for number in range(EXEC_PORTS):
        argv += ["-chardev", f"socket,id=e{number},path=exec-{number}.sock,server=on,wait=off"]
        argv += ["-device", f"virtserialport,chardev=e{number},name=mdo.exec.{number}"]
    return argv


def functions() -> list[str]:
    """Return the addresses of the functions that mvgpu takes as parents."""
    return [f"0000:00:{slot:02x}.0" for _, slot in FUNCTIONS]


def _comma(path: Path) -> str:
    return str(path).replace(",", ",,")


def init_script(
    kernel: Kernel, insmod: list[str], *, with_systemd: bool = False, pci: int = 0
) -> str:
    """Return ``/init`` of L1: mounts, then the first process, which is the agent or systemd.

    :param pci: How many functions of each kind mvgpu may take.
    """
    q = shlex.quote
    here = str(ROOT)
    venv = str(Path(sys.executable).parent.parent)
    setup = [["busybox", "ip", "link", "set", "lo", "up"]]
    if not with_systemd:
        setup += [["/lib/systemd/systemd-udevd", "--daemon"], insmod]
    variables = {**ENVIRONMENT, "PYTHONPATH": f"{here}/python"}
    if with_systemd:
        variables["MDO_STATE_DIR"] = systemd.STATE
    agent = ["/usr/bin/env", "-i", *(f"{key}={value}" for key, value in variables.items())]
    agent += [sys.executable, "-S", "-m", "mdev_lab.agent", json.dumps(setup)]
    memory = "-t ext4 /dev/vda" if with_systemd else "-t tmpfs -o mode=0755 memory"
    first = [systemd.INIT] if with_systemd else agent
    prepare = systemd.prepare(agent, insmod) if with_systemd else ""
    spare = " ".join(functions()[2 * pci :])
    return f"""#!/bin/busybox sh
b() {{ /bin/busybox "$@"; }}
b mount -t proc proc /proc
b mount -t sysfs sys /sys
b mount -t devtmpfs dev /dev
b ln -s /proc/self/fd /dev/fd
for n in 0:stdin 1:stdout 2:stderr; do b ln -s "fd/${{n%:*}}" "/dev/${{n#*:}}"; done
exec </dev/console >/dev/console 2>&1
for m in $(b cat /modules/order); do
    case $m in  # a refusal takes a second
    kvm-amd.ko) b grep -qw svm /proc/cpuinfo || continue ;;
    kvm-intel.ko) b grep -qw vmx /proc/cpuinfo || continue ;;
    esac
    b insmod "/modules/$m" || echo "$m is not for this machine"
done 2>/dev/null
for f in {spare}; do echo none > "/sys/bus/pci/devices/$f/driver_override"; done
b grep -q ^kvm_amd /proc/modules && b insmod /modules/lab-cr8.ko
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
