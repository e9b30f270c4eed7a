# SPDX-License-Identifier: GPL-2.0-or-later
"""From what is asked to what is so."""
