# SPDX-License-Identifier: GPL-2.0-or-later
"""Creates mediated devices, launches QEMU guests with them and drives their hotplug."""
