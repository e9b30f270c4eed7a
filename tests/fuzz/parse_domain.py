# SPDX-License-Identifier: GPL-2.0-or-later
"""The XML of a libvirt domain."""

from fuzz import harness
from mdev_orchestrator.errors import MdoError
from mdev_orchestrator.interop import domain_xml
from mdev_orchestrator.spec import parse, to_toml


def one(data: bytes) -> None:
    try:
        spec, left_out = domain_xml.to_spec(data, "domain.xml")
    except MdoError as error:
        harness.check_message(error)
        return
    assert parse(to_toml(spec)).spec == spec
    harness.check_shown(map(str, left_out))
