# SPDX-License-Identifier: GPL-2.0-or-later
"""The machine as the kernel shows it."""
