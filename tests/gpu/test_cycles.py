"""Memory that comes and goes ten thousand times, at both ends: device memory does not grow. Takes half a minute."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from gpu_far import PATIENCE, digest
from gpu_tools import Far, repeat_without_growth

from raynixl import Agent

pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.timeout(300)]

BACKENDS = ["nvlink", "shm"]
CYCLES = 10_000
NBYTES = 2 << 20


def test_ten_thousand_regions_that_are_made_opened_read_and_withdrawn_leave_no_memory_behind(
    make_near: Callable[..., Agent], make_far: Callable[..., Far]
) -> None:
    near, far = make_near(backends=tuple(BACKENDS)), make_far(backends=BACKENDS)
    peer = near.peer(far.record)

    def cycle(number: int) -> None:
        far.ask("nvlink_far:make_bare", names=["memory"], nbytes=NBYTES)
        mine = near.empty(NBYTES, kind="vram")
        near.read(peer["memory"], mine).wait(PATIENCE)
        near.deregister(mine)
        far.ask("drop", name="memory")

    began = time.monotonic()
    repeat_without_growth(cycle, CYCLES, [far])
    print(f"{(time.monotonic() - began) / CYCLES * 1e3:.2f} ms a cycle")
    mine = near.empty(NBYTES, kind="vram")
    there = far.ask("make", name="last", kind="vram", nbytes=NBYTES, seed=3)
    near.read(peer["last"], mine).wait(PATIENCE)
    assert digest(mine) == there
