# SPDX-License-Identifier: GPL-2.0-or-later
"""What all steps have in common; :mod:`.steps` lists them."""

from __future__ import annotations

import msgspec

from mdev_orchestrator.engine.context import Context
from mdev_orchestrator.engine.records import Change


class Step(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="do"):
    """One change to one object.

    :ivar unrecorded: The object is not managed here, and the step does not change that: a device of
        another program that a user names, or a guest that a user starts by hand.
    """

    unrecorded: bool = False

    @property
    def claims(self) -> tuple[str, ...]:
        """The objects that it changes, as the journal claims them."""
        raise NotImplementedError

    @property
    def on_begin(self) -> Change:
        """The records that are valid as soon as it may have begun."""
        return Change()

    @property
    def on_done(self) -> Change:
        """The records that change when it is done."""
        return Change()

    @property
    def on_no_effect(self) -> Change:
        """The records that change back when it has had no effect."""
        return Change()

    @property
    def batch(self) -> str | None:
        """Steps of one kind with the same value are better made together, by
        :func:`.steps.act_together`.

        ``None`` for a step that is made by itself.
        """
        return None

    async def act(self, context: Context) -> None:
        """Make it so.

        :raise MdoError: It is not so; the error's outcome says what is known.
        """
        raise NotImplementedError
