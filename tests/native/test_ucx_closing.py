"""Closing an endpoint by force lets go, by itself, of what is in flight on it."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest
from native_tools import MIB
from rail_tools import TIMEOUT as PATIENCE
from rail_tools import Side, Target, moving, until

from raynixl.backends.ucx_presence import is_installed
from raynixl.native import LOST

pytestmark = [pytest.mark.pure, pytest.mark.skipif(not is_installed(), reason="ucxx is not installed")]

BLOCK = 16 * MIB


def test_a_read_under_way_from_a_stopped_target_is_settled_by_closing_its_endpoint(
    make_side: Callable[[str], Side], make_target: Callable[..., Target]
) -> None:
    side, target = make_side("tcp"), make_target("tcp", BLOCK)
    way, gate = side.reach(target.export), side.core.Gate()
    job = moving(side.reader(np.zeros(BLOCK, np.uint8), way, [gate], repeat=200))
    target.stop()
    seen = -1
    while seen != (seen := job.nbytes_done):
        time.sleep(0.2)  # what the target had sent before it was stopped is still coming in
    way.endpoint.close(LOST)
    assert job.wait_settled(PATIENCE)
    assert until(lambda: gate.inflight == 0)
    target.resume()
