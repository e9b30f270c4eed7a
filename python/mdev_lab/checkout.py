# SPDX-License-Identifier: GPL-2.0-or-later
"""Where the project's source tree is. The lab is never installed outside of one."""

from pathlib import Path

#: The root of the source tree.
ROOT = Path(__file__).resolve().parents[2]
