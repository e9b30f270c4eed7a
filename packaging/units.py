# SPDX-License-Identifier: GPL-2.0-or-later
"""Writes the units of systemd and the rule of udev where debhelper takes them from.

usage: units.py PREFIX     for instance debian/mdev-orchestrator

They are what ``mdo service install`` writes, for ``/usr/bin/mdo``.
"""

import sys
from pathlib import Path

from mdev_orchestrator.host import service

for name, text in service.files(["/usr/bin/mdo"], {}).items():
    path = Path(name)
    # 90-mdo.rules: debhelper is told the number
    kind = "mdo.udev" if path.suffix == ".rules" else path.name
    Path(f"{sys.argv[1]}.{kind}").write_text(text, encoding="utf-8")
