# SPDX-License-Identifier: GPL-2.0-or-later
"""The drivers whose capacity the models describe, each as its own source counts.

Written from the drivers' sources and not from the models: kernel/mvgpu-types.c, and mbochs.c,
mtty.c and mdpy.c of the kernel's samples/vfio-mdev.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID, uuid4

from mdev_orchestrator.model import Host, Mdev, MdevType, Parent

MIB = 1 << 20
GRID = {  # by type: name, heads, frame rate, MiB, resolution, instances
    "mvgpu-11": ("GRID M60-0B", 2, 45, 512, "2560x1600", 16),
    "mvgpu-12": ("GRID M60-0Q", 2, 60, 512, "2560x1600", 16),
    "mvgpu-13": ("GRID M60-1B", 2, 45, 1024, "2560x1600", 8),
    "mvgpu-14": ("GRID M60-1Q", 2, 60, 1024, "2560x1600", 8),
    "mvgpu-15": ("GRID M60-2B", 2, 45, 2048, "2560x1600", 4),
    "mvgpu-16": ("GRID M60-2Q", 4, 60, 2048, "2560x1600", 4),
    "mvgpu-17": ("GRID M60-4Q", 4, 60, 4096, "3840x2160", 2),
    "mvgpu-18": ("GRID M60-8Q", 4, 60, 8192, "3840x2160", 1),
}
IGD = {
    "mvgpu-128M": ("IGD 128M", 1, 60, 128, "1024x768", 8),
    "mvgpu-256M": ("IGD 256M", 1, 60, 256, "1920x1200", 4),
    "mvgpu-512M": ("IGD 512M", 1, 60, 512, "1920x1200", 2),
}
GVTG: dict[str, tuple[int, int, int]] = {  # by type: low MB, high MB, fences
    "i915-GVTg_V5_1": (512, 2048, 4),
    "i915-GVTg_V5_2": (256, 1024, 4),
    "i915-GVTg_V5_4": (128, 512, 4),
    "i915-GVTg_V5_8": (64, 384, 4),
}
Texts = tuple[str | None, str | None, dict[str, str]]  # name, description, files


@dataclass
class Driver:
    """One parent: ``left`` says what the driver's source says."""

    name: str
    texts: dict[str, Texts]
    left: Callable[[Counter[str], str], int]
    devices: list[tuple[UUID, str]] = field(default_factory=list)

    @property
    def used(self) -> Counter[str]:
        return Counter(type_ for _, type_ in self.devices)

    def counts(self) -> dict[str, int]:
        return {type_: self.left(self.used, type_) for type_ in self.texts}

    def create(self, type_: str) -> bool:
        if self.left(self.used, type_) < 1:
            return False
        self.devices.append((uuid4(), type_))
        return True

    def parent(self) -> Parent:
        types = tuple(
            MdevType(
                id_, self.name, name, self.left(self.used, id_), "vfio-pci", description, files
            )
            for id_, (name, description, files) in self.texts.items()
        )
        return Parent(self.name, Path("/sys/devices") / self.name, types)


def host(*drivers: Driver) -> Host:
    mdevs = tuple(
        Mdev(uuid, f"/sys/bus/mdev/devices/{uuid}", driver.name, type_, "vfio-pci")
        for driver in drivers
        for uuid, type_ in driver.devices
    )
    return Host(tuple(driver.parent() for driver in drivers), mdevs)


def _nvidia_text(row: tuple[str, int, int, int, str, int]) -> str:
    _, heads, rate, mib, resolution, most = row
    return (
        f"num_heads={heads}, frl_config={rate}, framebuffer={mib}M, "
        f"max_resolution={resolution}, max_instance={most}"
    )


def _mvgpu_texts(table: dict[str, tuple[str, int, int, int, str, int]]) -> dict[str, Texts]:
    return {
        id_: (
            row[0],
            _nvidia_text(row),
            {"framebuffer": str(row[3] * MIB), "num_heads": str(row[1])},
        )
        for id_, row in table.items()
    }


def grid(name: str = "grid0") -> Driver:
    def left(used: Counter[str], type_: str) -> int:
        if any(n and other != type_ for other, n in used.items()):
            return 0
        free = 8192 - sum(GRID[t][3] * n for t, n in used.items())
        return min(GRID[type_][5] - used[type_], free // GRID[type_][3])

    return Driver(name, _mvgpu_texts(GRID), left)


def nvidia(name: str = "0000:86:00.0") -> Driver:
    """The same as NVIDIA's own driver shows it: no attribute files."""
    like = grid()
    texts: dict[str, Texts] = {
        id_.replace("mvgpu", "nvidia"): (row[0], _nvidia_text(row), {}) for id_, row in GRID.items()
    }

    def left(used: Counter[str], type_: str) -> int:
        ours = Counter({t.replace("nvidia", "mvgpu"): n for t, n in used.items()})
        return like.left(ours, type_.replace("nvidia", "mvgpu"))

    return Driver(name, texts, left)


def igd(name: str = "igd0") -> Driver:
    def left(used: Counter[str], type_: str) -> int:
        free = 1024 - sum(IGD[t][3] * n for t, n in used.items())
        return min(IGD[type_][5] - used[type_], free // IGD[type_][3])

    return Driver(name, _mvgpu_texts(IGD), left)


def mbochs(name: str = "mbochs", total: int = 256) -> Driver:
    sizes = {"mbochs-small": 4, "mbochs-medium": 16, "mbochs-large": 64}

    def left(used: Counter[str], type_: str) -> int:
        return (total - sum(sizes[t] * n for t, n in used.items())) // sizes[type_]

    texts: dict[str, Texts] = {
        id_: (id_, f"virtual display, {mib} MB video memory", {}) for id_, mib in sizes.items()
    }
    return Driver(name, texts, left)


def mtty(name: str = "mtty") -> Driver:
    ports = {"mtty-1": 1, "mtty-2": 2}

    def left(used: Counter[str], type_: str) -> int:
        return (24 - sum(ports[t] * n for t, n in used.items())) // ports[type_]

    texts: dict[str, Texts] = {
        "mtty-1": ("Single port serial", None, {}),
        "mtty-2": ("Dual port serial", None, {}),
    }
    return Driver(name, texts, left)


def mdpy(name: str = "mdpy") -> Driver:
    sizes = {"mdpy-vga": "640x480", "mdpy-xga": "1024x768", "mdpy-hd": "1920x1080"}
    texts: dict[str, Texts] = {
        id_: (id_, f"virtual display, {size} framebuffer", {}) for id_, size in sizes.items()
    }
    return Driver(name, texts, lambda used, _: 4 - sum(used.values()))


def gvtg(name: str = "0000:00:02.0") -> Driver:
    """i915 with a smaller aperture than any type divides evenly."""
    total = (64 * 9, 2048, 28)

    def left(used: Counter[str], type_: str) -> int:
        free = [have - sum(GVTG[t][i] * n for t, n in used.items()) for i, have in enumerate(total)]
        return min(have // take for have, take in zip(free, GVTG[type_], strict=True))

    texts: dict[str, Texts] = {
        id_: (
            None,
            f"low_gm_size: {low}MB\nhigh_gm_size: {high}MB\nfence: {fence}\nweight: 4\n",
            {},
        )
        for id_, (low, high, fence) in GVTG.items()
    }
    return Driver(name, texts, left)


def independent(name: str = "cards") -> Driver:
    total = {"acme-a": 2, "acme-b": 3}
    texts: dict[str, Texts] = {
        id_: (None, None, {"max_instance": str(n)}) for id_, n in total.items()
    }
    return Driver(name, texts, lambda used, type_: total[type_] - used[type_])


EXACT = (grid, nvidia, igd, mbochs, mtty, mdpy)
"""Drivers whose models answer exactly from one scan."""
