"""Ctrl-C amid a post or a wait of the twin, wherever it strikes, leaves no gate entered and no lock held.

The compiled core posts and waits in one call of C, in which nothing is interrupted.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from interrupt_tools import interrupts
from native_tools import KIB, MIB, address_of, random_bytes, table

from raynixl.native import COPY, LOST, Engine, Gate, load

pytestmark = pytest.mark.pure

TWIN = load(native=False)


@dataclass
class Post:
    """A program of a fresh engine behind two fresh gates; large ones become jobs of one thread."""

    engine: Engine
    gates: list[Gate]
    program: Any

    @classmethod
    def of(cls, source: np.ndarray, target: np.ndarray) -> Post:
        engine, gates = TWIN.Engine(1, MIB), [TWIN.Gate(), TWIN.Gate()]
        rows = table((address_of(source), address_of(target), source.nbytes))
        return cls(engine, gates, engine.program(COPY, 0, rows, gates))

    def run(self) -> None:
        """Post and wait."""
        job = self.program.run(20.0)
        if not isinstance(job, int):
            job.wait(20.0)

    def is_over(self) -> bool:
        """Whether all gates are left and the engine lets go of its thread."""
        for gate in self.gates:
            gate.close(LOST)
        return all(gate.drain(10.0) for gate in self.gates) and self.engine.close(10.0)


def in_time(ask: Callable[[], bool]) -> bool:
    """Ask in a thread, which a lock that is held for ever would hold."""
    heard: list[bool] = []
    thread = threading.Thread(target=lambda: heard.append(ask()), daemon=True)
    thread.start()
    thread.join(30.0)
    return heard == [True]


@pytest.mark.parametrize("nbytes", [KIB, MIB, 3 * MIB], ids=["tiny", "inline", "job"])
def test_wherever_a_post_is_interrupted_all_gates_are_left(nbytes: int) -> None:
    source, target = random_bytes(nbytes), np.zeros(nbytes, np.uint8)
    post = Post.of(source, target)

    def run() -> None:
        post.run()

    seen = 0
    for place in interrupts(run):
        assert in_time(post.is_over), place
        post = Post.of(source, target)
        seen += 1
    assert seen > 20
    assert np.array_equal(source, target)
    assert in_time(post.is_over)
