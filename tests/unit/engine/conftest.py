# SPDX-License-Identifier: GPL-2.0-or-later
"""A place for guests, and a QEMU."""

from __future__ import annotations

from unit.qemu.conftest import place, qemu

__all__ = ["place", "qemu"]
