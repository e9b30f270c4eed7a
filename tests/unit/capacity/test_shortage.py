# SPDX-License-Identifier: GPL-2.0-or-later
"""What is said of devices that do not fit: the words of ``mdo create``."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from mdev_orchestrator.capacity.models import survey
from mdev_orchestrator.capacity.planner import Request, plan
from mdev_orchestrator.capacity.shortage import capacity_error
from mdev_orchestrator.model import Host
from unit.capacity import drivers


def full() -> Host:
    igd = drivers.igd()
    for type_ in ("mvgpu-512M", "mvgpu-128M"):
        igd.create(type_)
    return drivers.host(igd, drivers.grid())


def said(host: Host, *requests: Request) -> str:
    answer = plan(requests, survey(host))
    assert not answer.fits
    return str(capacity_error(answer, requests))


def want(type_id: str | None, count: int = 1, parent: str | None = None, key: str = "r") -> Request:
    return Request(key, type_id, count=count, parent=parent)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (
            want("mvgpu-12", 17, "grid0"),
            "17 of mvgpu-12 do not fit on grid0: 16 would; nothing was created (-n 16)",
        ),
        (
            want("mvgpu-512M", 1, "igd0"),
            (
                "no instance of mvgpu-512M is left on igd0: in use there 1 of mvgpu-128M, "
                "1 of mvgpu-512M; nothing was created "
                "(3 of mvgpu-128M, 1 of mvgpu-256M would fit instead)"
            ),
        ),
        (
            want("mvgpu-11", 17),
            (
                "17 x mvgpu-11 do not fit: only 16 can be created on grid0; nothing was created "
                "(ask for 16)"
            ),
        ),
        (
            want("mvgpu-11", 1, "igd0"),
            (
                "1 x mvgpu-11 do not fit: parent igd0 does not offer mvgpu-11; nothing was created "
                "(it is offered by grid0)"
            ),
        ),
    ],
)
def test_one_request(request_: Request, message: str) -> None:
    assert said(full(), request_) == message


def test_a_device_that_is_being_removed_is_in_use_and_nothing_else_fits() -> None:
    mdpy = drivers.mdpy()
    for _ in range(4):
        mdpy.create("mdpy-hd")
    host = drivers.host(mdpy)
    leaving = replace(host, mdevs=(replace(host.mdevs[0], type_id=None), *host.mdevs[1:]))
    assert said(leaving, want("mdpy-hd", 1, "mdpy")) == (
        "no instance of mdpy-hd is left on mdpy: in use there 3 of mdpy-hd, 1 being removed; "
        "nothing was created (remove a device first)"
    )


def test_several_requests_that_fit_one_by_one() -> None:
    host = drivers.host(drivers.igd())
    large = want("mvgpu-512M", 2, "igd0", "a")
    small = want("mvgpu-128M", 1, "igd0", "b")
    assert said(host, large, small).startswith("1 of mvgpu-128M do not fit on igd0: only 0 fit")
    many = [want("mvgpu-512M", 3, "igd0", key) for key in "ab"]
    assert said(host, *many) == (
        "3 of mvgpu-512M do not fit on igd0: 2 would; 1 more request does not fit; "
        "nothing was created (-n 2)"
    )
