# SPDX-License-Identifier: GPL-2.0-or-later
"""``python -m mdev_orchestrator.spec`` prints the JSON Schema, for ``docs/spec.schema.json``."""

import sys

from mdev_orchestrator.spec.json_schema import schema_text

sys.stdout.write(schema_text())
