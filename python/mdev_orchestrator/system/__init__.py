# SPDX-License-Identifier: GPL-2.0-or-later
"""What any program needs of its operating system: files, waits, processes, and blocking writes.

Nothing in here knows what an mdev or a guest is.
"""
