# SPDX-License-Identifier: GPL-2.0-or-later
"""What a vendor says about a type: description, name and attributes, as a scan lets them pass."""

from fuzz import harness
from mdev_orchestrator.capacity import attributes
from mdev_orchestrator.capacity.attributes import TypeFacts
from mdev_orchestrator.capacity.models import infer, kind_of
from mdev_orchestrator.model import MdevType, Parent
from mdev_orchestrator.spec import ResolutionCondition, SizeCondition


def one(data: bytes) -> None:
    """The input: the description; further records are attributes, ``name`` the name."""
    parts = harness.records(b"--- description\n" + data)
    texts = {name: text.decode("utf-8", "replace") for name, text in parts}
    description = texts.pop("description")
    type_ = MdevType(
        id="vendor-1",
        parent="0000:00:02.0",
        name=texts.pop("name", None),
        available_instances=1,
        device_api="vfio-pci",
        description=description,
        attributes=texts,
    )
    facts = attributes.facts_of(type_)
    _check(facts)
    parent = Parent(name="0000:00:02.0", path=harness.HERE, types=(type_, type_))
    kind_of(parent)
    infer(parent, {"vendor-1": 1})


def _check(facts: TypeFacts) -> None:
    """What was understood is a sane value, and what is shown of it is understood again."""
    for name in TypeFacts.__struct_fields__:
        value = getattr(facts, name)
        if value is None:
            continue
        text = attributes.shown(name, value)
        if isinstance(value, tuple):
            assert ResolutionCondition(text).holds(value), text
        else:
            assert 0 <= value < 1 << 63
            if name in {"framebuffer", "low_gm_size", "high_gm_size"}:
                assert SizeCondition(text).holds(value), text
        assert attributes.meets(facts, ())
