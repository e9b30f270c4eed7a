# SPDX-License-Identifier: GPL-2.0-or-later
"""The programs of tools/, for tests of what is in them."""

from __future__ import annotations

from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

TOOLS = Path(__file__).resolve().parents[1] / "tools"


def load(name: str) -> ModuleType:
    """Import one of them, whose file has no ending."""
    loader = SourceFileLoader(name, str(TOOLS / name))
    spec = spec_from_loader(name, loader)
    assert spec
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module
