# SPDX-License-Identifier: GPL-2.0-or-later
"""Other tools' files about mdevs: read, and written as they write them."""
