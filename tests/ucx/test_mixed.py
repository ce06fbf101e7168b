"""Reads and writes of all sizes at the same time, over one lane: what UCX alone does not survive over TCP."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np
from agent_tools import MIB, PATIENCE, random_bytes
from lane_tools import LaneWorld

from raynixl import RaynixlError

ROUNDS = 5
ROUND_SECONDS = 0.4
BIG = 32 * MIB


def repeat(action: Callable[[], None], until: float, errors: list[RaynixlError]) -> threading.Thread:
    """Do something again and again on a thread of its own."""

    def work() -> None:
        try:
            while time.monotonic() < until:
                action()
        except RaynixlError as exc:
            errors.append(exc)

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def test_reads_and_writes_of_all_sizes_disturb_neither_each_other_nor_the_target(world: LaneWorld) -> None:
    near = world.near
    read_only, target = world.theirs("user", nbytes=BIG), world.victim
    target.ask("make", "sink", BIG, "user", 9)
    sink = near.peer("victim")["sink"]
    source = near.register(random_bytes(BIG, seed=3))
    large, small = world.mine(BIG), near.register(np.zeros(MIB, np.uint8))
    near.write(source, sink).wait(PATIENCE)
    for _ in range(ROUNDS):
        errors: list[RaynixlError] = []
        until = time.monotonic() + ROUND_SECONDS
        threads = [
            repeat(lambda: near.write(source, sink, timeout=PATIENCE).wait(), until, errors),
            repeat(lambda: near.write(source[:64], sink[:64], timeout=PATIENCE).wait(), until, errors),
            repeat(lambda: near.read(read_only[:MIB], small, timeout=PATIENCE).wait(), until, errors),
            repeat(lambda: near.read(read_only, large, timeout=PATIENCE).wait(), until, errors),
        ]
        for thread in threads:
            thread.join(2 * PATIENCE)
        assert not errors
    content = np.frombuffer(target.ask("content", read_only.name), np.uint8)
    assert np.array_equal(small.array(), content[:MIB])
    assert np.array_equal(large.array(), content)
    assert np.array_equal(np.frombuffer(target.ask("content", "sink"), np.uint8), source.array())
