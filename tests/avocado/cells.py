# SPDX-License-Identifier: GPL-2.0-or-later
"""Tables: a method that is a test of its own, with a name of its own, for each of many cells.

Each cell is one of avocado's variants: its values are the test's ``params``, and joined by dashes
they are the end of its name, as in ``test_table.py:Table.test_online;explicit-10.0-cold-3``.
"""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

Method = Callable[..., Any]
Value = str | int


def cells(**columns: Iterable[Value]) -> Callable[[Method], Method]:
    """Make a test a table: it runs once for each combination of the columns' values.

    The method is called with those columns that it has parameters for; the others are for
    ``setUp``, which finds them in ``self.params``.
    """
    rows = itertools.product(*columns.values())  # the first column changes slowest
    combinations = [dict(zip(columns, row, strict=True)) for row in rows]

    def mark(method: Method) -> Method:
        wanted = inspect.signature(method).parameters.keys() & columns.keys()

        def call(self: Any) -> Any:  # noqa: ANN401 - avocado has no types
            return method(self, **{name: self.params.get(name) for name in wanted})

        async def call_and_wait(self: Any) -> Any:  # noqa: ANN401
            return await call(self)

        # avocado awaits a method only if it can see that it must
        test = functools.wraps(method)(
            call_and_wait if inspect.iscoroutinefunction(method) else call
        )
        test.cells = combinations  # type: ignore[attr-defined]
        return test

    return mark


def expand(runnable: Any, method: Method) -> Iterator[Any]:  # noqa: ANN401
    """The tests that a test of avocado's is: one for each cell, itself if it is no table."""
    from avocado.core.varianter import dump_variant
    from avocado.plugins.dict_variants import DictVariants

    table = getattr(method, "cells", None)
    if table is None:
        yield runnable
        return
    variants = DictVariants()
    variants.initialize({"run.dict_variants": table})
    for variant in variants:
        test = copy.deepcopy(runnable)
        test.variant = dump_variant(variant)
        yield test


def name(test: Any) -> str:  # noqa: ANN401
    """Name of a cell; empty for what is none."""
    return test.variant["variant_id"] if test.variant else ""
