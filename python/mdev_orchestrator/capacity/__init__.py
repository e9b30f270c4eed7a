# SPDX-License-Identifier: GPL-2.0-or-later
"""What fits: how parents fill, and where requests go. Pure functions over one scan of the host."""
