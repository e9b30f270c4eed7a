# SPDX-License-Identifier: GPL-2.0-or-later
"""Our QEMU: Debian's source of a series with our patches and files, built and cached.

============= ========================================================================
patches.py    our patches and files, applied to a source tree or exported for ``git am``
source.py     Debian's source of a series, or a tree that the user names
builds.py     configure, compile, and what the cache has
============= ========================================================================

All that belongs to a series is below ``cache_dir()/qemu/SERIES``:

============= =====================================================================
source/       the patched tree
pristine/     the files that patches change, as they were
build/        QEMU's build directory, kept so that the next build is short
bin/          the program; replaced at once, so that it can be started at any time
firmware/     links to the firmware of Debian's packages, for QEMU's ``-L``
build.log     the output of configure and ninja
build.json    what was built, see :class:`builds.Build`
============= =====================================================================

A build writes only those files into ``source`` whose content changed, and a change of a patch
touches only the files that it changes, so that ninja does the rest only.
"""
