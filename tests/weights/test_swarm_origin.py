"""When the origin gives what it gives: after all others, to those who reach nobody else, and little to who is late."""

import pytest

from raynixl.weights.assignment import ORIGIN, Policy, Topology, Why
from raynixl.weights.swarm import Swarm, bitmap

pytestmark = pytest.mark.pure

CHUNKS = 4


def relay(**options):
    return Swarm(CHUNKS, origin_hosts=["o"], topology=Topology.RELAY, **options)


def every(chunks=CHUNKS):
    return bitmap(range(chunks), CHUNKS)


@pytest.mark.parametrize("host", ["a", "b"])
def test_who_cannot_reach_the_others_gets_from_the_origin_what_they_have(host):
    swarm = relay()
    swarm.join("near", "a", every())
    swarm.join("cut off", host)
    (first,) = swarm.next("cut off", 1, 0.0)
    assert first.holder == "near"
    swarm.failed("cut off", first.chunk, "near", Why.LOST, 0.0)
    assert swarm.has_rebuffed
    assert {one.holder for one in swarm.next("cut off", 2, 0.0)} == {ORIGIN}


def test_a_held_origin_gives_nothing_before_it_is_opened():
    swarm = relay(holds_origin=True)
    swarm.join("a", "a")
    assert swarm.next("a", 4, 0.0) == []
    assert swarm.is_held
    assert swarm.is_scarce
    assert not swarm.lost
    swarm.open_origin()
    ((name, found),) = swarm.dispatch(0.0)
    assert name == "a"
    assert {one.holder for one in found} == {ORIGIN}


def test_who_is_late_gets_from_the_origin_only_what_nobody_has_and_keeps_it_from_nobody():
    swarm = relay(policy=Policy(extra_share=1.0))
    swarm.join("a", "a", every(CHUNKS - 1))
    swarm.join("late", "b", is_late=True)
    found = {one.chunk: one.holder for one in swarm.next("late", CHUNKS, 0.0)}
    assert found.pop(CHUNKS - 1) == ORIGIN
    assert set(found.values()) == {"a"}
    swarm.done("a", [CHUNKS - 1], 0.0)
    assert swarm.is_released
