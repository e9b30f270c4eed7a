# SPDX-License-Identifier: GPL-2.0-or-later
"""One guest process: its command line, its life, its monitor, and what is plugged into it."""
