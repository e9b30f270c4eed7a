# SPDX-License-Identifier: GPL-2.0-or-later
"""What fits: how parents fill, and where requests go. Pure functions over one scan of the host.

>>> from mdev_orchestrator.capacity.models import survey
>>> from mdev_orchestrator.capacity.planner import Request, plan
>>> answer = plan([Request("mine", "mvgpu-12", count=2, group="peers")], survey(host))
>>> answer.fits, [placement.parent for placement in answer.placements]  # doctest: +SKIP
(True, ['grid0', 'grid0'])

==========  ==================================================================
attributes  what vendors say about their types, as typed values
models      how one more device changes what else a parent can take
planner     where requests go, and what would remain
shortage    the error for what does not fit
==========  ==================================================================
"""
