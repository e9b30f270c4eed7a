# SPDX-License-Identifier: GPL-2.0-or-later
"""What the kernel prints while a test runs, and which of it tells of a fault."""

from __future__ import annotations

import os
import re

#: What a kernel says when it has found a fault in itself. Soft lockups and stalls are left out: an
#: emulated processor that its host does not run for a while has them without any fault of ours.
COMPLAINT = re.compile(
    r"WARNING: (?!.*soft lockup)|BUG: (?!soft lockup|workqueue lockup)|Oops|general protection"
    r"|possible (circular|recursive|irq|deadlock)|refcount_t:|list_(add|del) corruption"
    r"|blocked for more than"
    # the checkers of a debug kernel, those that do not say BUG or WARNING
    r"|UBSAN: |kmemleak: \d+ new|kmemleak: .*disabled|trying to register non-static"
)


class KernelLog:
    """The lines that the kernel prints from now on.

    :ivar lost: Lines were overwritten before they were read.
    """

    def __init__(self) -> None:
        self._descriptor = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        os.lseek(self._descriptor, 0, os.SEEK_END)
        self._all: list[str] = []
        self.lost = False

    def close(self) -> None:
        """Look no further."""
        os.close(self._descriptor)

    def lines(self) -> list[str]:
        """What was printed since the last look."""
        begin = len(self._all)
        while True:
            try:
                record = os.read(self._descriptor, 8192)
            except BlockingIOError:
                return self._all[begin:]
            except BrokenPipeError:  # the oldest were overwritten meanwhile; go on with the rest
                self.lost = True
                continue
            text = record.decode(errors="replace").partition(";")[2]
            self._all.append(text.partition("\n")[0])

    def complaints(self) -> list[str]:
        """All from the beginning that tell of a fault of the kernel's or a driver's."""
        self.lines()
        return [line for line in self._all if COMPLAINT.search(line)]
