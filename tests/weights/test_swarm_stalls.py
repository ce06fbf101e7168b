"""Receivers that finish nothing: what they were bringing in is given to others, sooner or later."""

import pytest

from raynixl.weights.assignment import Policy
from raynixl.weights.swarm import Swarm


def test_what_a_silent_receiver_was_bringing_in_is_given_to_others_but_not_twice_to_itself():
    swarm = Swarm(4, origin_hosts=["t"], topology="relay", policy=Policy(stall_seconds=2.0))
    swarm.join("silent", "h1")
    swarm.join("b", "h2")
    given = swarm.next("silent", 4, 0.0)
    assert len(given) == 4
    assert swarm.next("b", 4, 1.0) == []
    assert swarm.tick(1.5) == []
    assert {item for _, item in swarm.tick(2.5)} == set(given)
    assert swarm.tick(2.6) == []
    assert [name for name, _ in swarm.dispatch(2.6)] == ["b"]
    assert swarm.next("silent", 4, 3.0) == []
    swarm.done("silent", {item.chunk for item in given}, 3.0)  # it was only slow
    assert swarm.is_complete("silent")


@pytest.mark.parametrize(("chunk_seconds", "stalls_after"), [(0.01, 2.0), (0.4, 4.0), (3.0, 20.0)])
def test_the_faster_chunks_come_the_sooner_a_receiver_counts_as_stalled(chunk_seconds, stalls_after):
    swarm = Swarm(8, origin_hosts=["t"], topology="relay", policy=Policy(stall_seconds=20.0))
    swarm.join("silent", "h1")
    given = swarm.next("silent", 4, 0.0)
    swarm.done("silent", [given[0].chunk], chunk_seconds)
    assert swarm.tick(chunk_seconds + stalls_after - 0.1) == []
    assert {item for _, item in swarm.tick(chunk_seconds + stalls_after + 0.1)} == set(given[1:])
