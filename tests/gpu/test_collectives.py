"""Groups of two processes with CUDA tensors of one GPU: what kernels are still to make is what the others get."""

from __future__ import annotations

import base64
from collections.abc import Callable
from types import SimpleNamespace

import pytest
from gpu_tools import Fars, skip_without_gpu

from raynixl import Agent

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(180)]

BACKENDS = ["nvlink", "shm"]


def test_every_operation_follows_the_streams_of_its_callers(fars: Fars, make_near: Callable[..., Agent]) -> None:
    skip_without_gpu("torch")
    from gpu_collectives import take_part

    near, far, name = make_near(backends=tuple(BACKENDS)), fars(backends=BACKENDS), fars.name()
    members = [near.name, far.name]
    record = base64.b64encode(near.record()).decode()
    far.tell("gpu_collectives:take_part", members=members, record=record, name=name)
    mine = take_part(SimpleNamespace(agent=near), members, base64.b64encode(far.record).decode(), name)
    theirs = far.hear()
    both = {"direct": [11], "chain": [11], "allgather": [20, 21], "scatter": [30]}
    assert mine == {**both, "gather": [40, 41]}
    assert theirs == {**both, "gather": []}
