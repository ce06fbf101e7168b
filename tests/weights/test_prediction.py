"""Predictions: closed forms agree with schedules played by hand, and with what links must carry."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raynixl.weights.prediction import chain, direct, lower_bound, swarm, tree
from raynixl.weights.scenario import Node, Rank, Scenario, uniform

pytestmark = pytest.mark.pure

CHUNK = 10


def play(children: dict[int, list[int]], chunks: int, *, origin: float, up: float) -> float:
    """Seconds until all have all, where each node passes each chunk on to its children as soon as it has it.

    Node 0 is fed by the origin; children have higher numbers than their parents; downlinks are as fast as need be.
    """
    has = {0: [(number + 1) * CHUNK / origin for number in range(chunks)]}
    for node in sorted(children):
        free = 0.0
        for number in range(chunks):
            for child in children[node]:
                free = max(free, has[node][number]) + CHUNK / up
                has.setdefault(child, []).append(free)
    return max(times[-1] for times in has.values())


@given(nodes=st.integers(1, 40), chunks=st.integers(1, 60), origin=st.sampled_from([5.0, 10.0]))
def test_a_chain_takes_as_long_as_the_schedule_played_by_hand(nodes, chunks, origin):
    scenario = replace(uniform(chunks * CHUNK, nodes, up=10.0, origin=origin), chunk_nbytes=CHUNK)
    played = play({node: [node + 1] for node in range(nodes - 1)}, chunks, origin=origin, up=10.0)
    assert played <= chain(scenario).seconds * (1 + 1e-9)
    if origin == 10.0:
        assert chain(scenario).seconds == pytest.approx(played)


@given(levels=st.integers(2, 6), chunks=st.integers(20, 80))
def test_a_tree_takes_as_long_as_the_schedule_played_by_hand(levels, chunks):
    nodes = 2**levels - 1
    children = {node: [2 * node + 1, 2 * node + 2] for node in range(nodes // 2)}
    scenario = replace(uniform(chunks * CHUNK, nodes, up=10.0), chunk_nbytes=CHUNK)
    assert tree(scenario).seconds == pytest.approx(play(children, chunks, origin=10.0, up=10.0), rel=3 / chunks)


def test_bytes_are_counted_by_link():
    scenario = uniform(100, 12, up=1.0, per_node=4)  # 3 nodes of 4 ranks
    assert direct(scenario).origin_nbytes == 1200
    assert direct(scenario).node_in_nbytes == 400
    for way, out in ((chain, 100), (swarm, 100), (tree, 200)):
        found = way(scenario)
        assert (found.origin_nbytes, found.node_in_nbytes, found.node_out_nbytes, found.local_nbytes) == (
            100, 100, out, 300,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("scenario", "seconds"),
    [
        (uniform(100, 1, up=10.0), 10.0),
        (uniform(100, 8, up=10.0), 10.0),
        (uniform(100, 8, up=10.0, origin=5.0), 20.0),  # the origin's link
        (uniform(100, 8, up=10.0, down=4.0), 25.0),  # the nodes' links
        (uniform(100, 30, up=1.0, down=100.0, origin=10.0), 75.0),  # all that is given: 3000 bytes a 40 a second
        (uniform(100, 8, up=10.0, per_node=8), 10.0),  # a node brings it in once
        (Scenario((100, 50), (Node(10.0, 10.0),), (Rank(0, 0), Rank(0, 1)), origin=30.0), 15.0),  # two images
        (Scenario((100,), (Node(10.0, 10.0, rank=2.0),), (Rank(0),), origin=30.0), 50.0),  # the rank's own link
        (Scenario((100, 70), (Node(10.0, 10.0),), (Rank(0, 0),), origin=5.0), 20.0),  # an image that nobody needs
    ],
)
def test_the_lower_bound_is_that_of_the_busiest_link(scenario, seconds):
    assert lower_bound(scenario) == pytest.approx(seconds)


def test_a_star_is_as_slow_as_the_origins_link_for_all():
    assert direct(uniform(100, 16, up=10.0)).seconds == pytest.approx(160.0)
    assert direct(uniform(100, 16, up=10.0, origin=1000.0)).seconds == pytest.approx(10.0)


def test_chunks_larger_than_the_image_are_one_chunk():
    scenario = replace(uniform(100, 5, up=10.0), chunk_nbytes=1 << 20)
    assert chain(scenario).seconds == pytest.approx(5 * 10.0)


@settings(max_examples=50)
@given(
    nodes=st.integers(1, 200),
    per_node=st.integers(1, 8),
    chunks=st.integers(1, 200),
    origin=st.floats(0.1, 100.0),
    up=st.floats(0.1, 100.0),
)
def test_nothing_is_predicted_below_the_bound(nodes, per_node, chunks, origin, up):
    scenario = uniform(chunks * CHUNK, nodes * per_node, up=up, down=10.0, origin=origin, per_node=per_node)
    bound = lower_bound(replace(scenario, chunk_nbytes=CHUNK)) * (1 - 1e-9)
    for way in (direct, chain, tree, swarm):
        assert way(replace(scenario, chunk_nbytes=CHUNK)).seconds >= bound


def test_a_swarm_beats_the_others_where_there_are_many():
    scenario = uniform(1000 << 24, 1024, up=5e10)
    assert swarm(scenario).seconds < min(way(scenario).seconds for way in (direct, chain, tree))
