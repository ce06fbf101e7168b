"""Real processes whose agents reach each other over UCX only, by one lane or another."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from agent_tools import MIB, PATIENCE
from liveness_tools import QUICK, World

from raynixl import Agent, AgentConfig, Region, RemoteRegion, Transfer
from raynixl.backends.ucx import UcxBackend

CMA, TCP = LANES = ("cma,tcp", "tcp")
SECRET = b"of this job"
NOTICE_SECONDS = {CMA: 0.1, TCP: 1.0}
"""How long the death of a peer may stay unnoticed on a machine of one's own."""
BUSY_FACTOR = 10
"""How much longer it may take on a machine that others share."""


def config_for(tls: str, **changes: Any) -> AgentConfig:
    """A configuration with short deadlines for one lane."""
    return QUICK.model_copy(update={"backends": ("ucx",), "ucx": {"TLS": tls}, **changes})


class LaneWorld(World):
    """Near, victim and bystander, which reach each other by the same lane."""

    def __init__(self, config: AgentConfig) -> None:
        super().__init__(UcxBackend, config)
        self.tls = config.ucx["TLS"]

    def gigabytes(self, op: str, mine: Region, theirs: RemoteRegion) -> list[Transfer]:
        """Start to move the same regions again and again: more than will be through before anything happens."""
        source, target = (theirs, mine) if op == "read" else (mine, theirs)
        plan = self.near.prepare(op, source, target)
        plan.post(timeout=PATIENCE).wait()
        return [plan.post(timeout=60.0) for _ in range((4 << 30) // mine.nbytes)]


def noticed_in(seconds: float, tls: str, what: str) -> None:
    """Report how soon a death was noticed, and check it with a bound that a busy machine keeps."""
    print(f"{what} over {tls}: noticed in {1000 * seconds:.1f} ms")
    assert seconds < BUSY_FACTOR * NOTICE_SECONDS[tls], f"{what}: {seconds:.3f} s"
