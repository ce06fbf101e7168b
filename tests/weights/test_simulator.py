"""The simulator: it agrees with closed forms, and plays the swarm through deaths, freezes, lies and joins."""

import math
import random
from dataclasses import replace

import numpy as np
import pytest

from raynixl.errors import ConfigError
from raynixl.weights.assignment import Policy, Topology
from raynixl.weights.prediction import direct, lower_bound, swarm
from raynixl.weights.scenario import GBPS, Node, Rank, Scenario, uniform, with_deaths
from raynixl.weights.simulator import simulate

pytestmark = pytest.mark.pure

CHUNK = 16 << 20
LINK = 400 * GBPS


def relayed(chunks, receivers, **options):
    scenario = uniform(chunks * CHUNK, receivers, up=LINK, per_node=options.pop("per_node", 1))
    return replace(scenario, topology=Topology.RELAY, **options)


# against what can be worked out by hand


def test_one_receiver_takes_as_long_as_its_bytes_take():
    scenario = uniform(100 * CHUNK, 1, up=LINK)
    run = simulate(scenario)
    assert run.seconds == pytest.approx(100 * CHUNK / LINK, rel=0.01)
    assert run.release_seconds >= run.seconds
    assert run.origin_nbytes == 100 * CHUNK
    assert run.peer_nbytes == run.local_nbytes == run.failures == 0


def test_an_image_that_ends_within_a_chunk_is_counted_to_the_byte():
    run = simulate(replace(uniform(3 * CHUNK + 5, 3, up=LINK), topology=Topology.RELAY))
    assert run.origin_nbytes + run.peer_nbytes == 3 * (3 * CHUNK + 5)


@pytest.mark.parametrize("receivers", [2, 5, 16])
def test_a_star_takes_as_long_as_the_origin_needs_for_all(receivers):
    scenario = replace(uniform(50 * CHUNK, receivers, up=LINK), topology=Topology.DIRECT)
    run = simulate(scenario)
    assert run.seconds == pytest.approx(direct(scenario).seconds, rel=0.01)
    assert run.origin_nbytes == direct(scenario).origin_nbytes == receivers * 50 * CHUNK


def test_the_slowest_link_on_the_way_counts():
    node = Node(LINK, LINK, rank=LINK / 3)
    scenario = Scenario((60 * CHUNK,), (node,), (Rank(0),), origin=LINK)
    assert simulate(scenario).seconds == pytest.approx(60 * CHUNK / (LINK / 3), rel=0.01)


def test_ranks_of_one_node_share_its_network():
    images = (40 * CHUNK,) * 4
    scenario = Scenario(images, (Node(LINK, LINK),), tuple(Rank(0, image) for image in range(4)), origin=10 * LINK)
    assert simulate(scenario).seconds == pytest.approx(160 * CHUNK / LINK, rel=0.02)


def test_copies_inside_a_node_take_their_time():
    scenario = relayed(64, 2, per_node=2)
    run = simulate(replace(scenario, nodes=(Node(LINK, LINK, local=LINK / 4),)))
    assert run.local_nbytes == run.origin_nbytes == 64 * CHUNK
    half = 32 * CHUNK / (LINK / 4)  # at best, each copies the half that the other brought in
    assert half <= run.seconds <= 2.1 * half


def test_latency_and_control_count():
    slow = replace(uniform(CHUNK, 1, up=LINK), latency=1.0, control=10.0)
    assert simulate(slow).seconds == pytest.approx(CHUNK / LINK + 12.0)


@pytest.mark.parametrize(
    "scenario",
    [
        relayed(128, 2),
        relayed(128, 32),
        relayed(128, 40, per_node=8),
        replace(relayed(128, 24), origin=4 * LINK),
        replace(relayed(128, 24), origin=LINK / 4),
        replace(relayed(128, 16), nodes=(Node(LINK / 2, LINK),) * 16),
        replace(relayed(128, 16), nodes=(Node(LINK, LINK), Node(LINK / 3, LINK / 3)) * 8),
    ],
    ids=["2", "32", "nodes of 8", "fast origin", "slow origin", "slow up", "half of them slow"],
)
def test_a_swarm_is_never_faster_than_the_bound_and_about_as_predicted(scenario):
    run = simulate(scenario)
    assert lower_bound(scenario) <= run.seconds <= swarm(scenario).seconds * 1.12
    assert run.origin_nbytes <= 1.05 * 128 * CHUNK


# what the swarm must show


@pytest.mark.parametrize("receivers", [1, 2, 4, 8, 16])
def test_the_origin_gives_at_most_a_tenth_more_than_one_model(receivers):
    run = simulate(relayed(118, receivers))  # Qwen2.5-0.5B in bf16, in chunks of 8 MiB
    assert run.origin_nbytes <= 1.05 * 118 * CHUNK


many = pytest.mark.parametrize("receivers", [256, pytest.param(1024, marks=pytest.mark.slow)])


@many
def test_hundreds_of_receivers_are_within_15_percent_of_the_bound(receivers):
    scenario = relayed(240, receivers)
    run = simulate(scenario)
    assert run.seconds <= 1.15 * lower_bound(scenario)
    assert run.origin_nbytes <= 1.05 * 240 * CHUNK
    assert run.release_seconds < run.seconds


@many
def test_hundreds_of_receivers_of_which_a_tenth_dies_midway_are_within_30_percent(receivers):
    bound = lower_bound(relayed(240, receivers))
    doomed = random.Random(1).sample(range(receivers), receivers // 10)
    run = simulate(with_deaths(relayed(240, receivers, detection=0.05 * bound), doomed, at=bound / 2))
    assert run.failures >= len(doomed)
    assert run.seconds <= 1.3 * bound
    assert run.origin_nbytes <= 1.1 * 240 * CHUNK
    assert np.count_nonzero(np.isnan(run.finished)) == len(doomed)


# faults


@pytest.mark.parametrize("origin_seconds", [0.3, 3.0])
def test_one_that_dies_midway_costs_the_others_little(origin_seconds):
    scenario = relayed(100, 4, detection=0.02)
    scenario = replace(
        scenario, origin=100 * CHUNK / origin_seconds, nodes=(Node(*(100 * CHUNK / origin_seconds,) * 2),) * 4
    )
    calm = simulate(scenario).seconds
    struck = simulate(with_deaths(scenario, [2], at=origin_seconds / 2)).seconds
    assert struck <= calm * 1.1 + 0.02


def test_a_frozen_holder_delays_nobody_for_longer_than_its_timeout():
    scenario = relayed(100, 6, read_timeout=0.05, policy=Policy(stall_seconds=0.1, pause_seconds=10.0))
    ranks = tuple(replace(rank, freezes=0.015) if number == 1 else rank for number, rank in enumerate(scenario.ranks))
    run = simulate(replace(scenario, ranks=ranks))
    assert math.isnan(run.finished[1])
    assert run.seconds < 0.6  # of ticks and timeouts; 0.035 without
    assert run.failures > 0


def test_a_liar_is_found_and_everybody_else_completes():
    scenario = relayed(100, 8)
    ranks = (replace(scenario.ranks[0], is_lying=True), *scenario.ranks[1:])
    run = simulate(replace(scenario, ranks=ranks))
    assert run.liars == (0,)
    assert not np.isnan(run.finished).any()
    assert run.seconds < 1.5 * lower_bound(scenario)


def test_a_joiner_midway_completes_and_late_ones_take_nothing_from_the_origin():
    scenario = relayed(100, 4)
    bound = lower_bound(scenario)
    ranks = (*scenario.ranks[:3], replace(scenario.ranks[3], joins=bound / 2))
    run = simulate(replace(scenario, ranks=ranks))
    assert run.origin_nbytes <= 1.05 * 100 * CHUNK
    late = (*(replace(rank, is_holding=True) for rank in scenario.ranks[:3]), replace(scenario.ranks[3], joins=1.0))
    run = simulate(replace(scenario, ranks=late))
    assert run.origin_nbytes == 0
    assert run.finished[3] == pytest.approx(1.0 + bound, rel=0.1)


def test_a_push_that_nobody_can_complete_ends():
    scenario = relayed(10, 2)
    ranks = tuple(replace(rank, freezes=0.0) for rank in scenario.ranks)
    assert simulate(replace(scenario, ranks=ranks)).seconds == 0.0  # nobody stays
    alone = (Rank(0, dies=0.0002), Rank(1, joins=1.0))  # the first has a little, the origin the rest
    run = simulate(replace(scenario, ranks=alone, origin_hosts=0))
    assert math.isnan(run.seconds)


def test_the_same_scenario_gives_the_same_figures():
    first, second = (simulate(relayed(64, 12)) for _ in range(2))
    assert first.seconds == second.seconds
    assert first.messages == second.messages
    assert simulate(relayed(64, 12, policy=Policy(seed=1))).finished.tolist() != first.finished.tolist()


def test_a_scenario_that_makes_no_sense_is_refused():
    with pytest.raises(ConfigError, match="node or an image"):
        Scenario((1,), (Node(1.0, 1.0),), (Rank(1),), origin=1.0)
    with pytest.raises(ConfigError, match="positive"):
        uniform(1, 1, up=1.0, origin=0.0)
