"""The cost model: its counts agree with what is drawn, and it prefers what is cheaper."""

import numpy as np
import pytest

from raynixl.moe.cost import (
    Exchange,
    Fabric,
    Shape,
    Topology,
    choose,
    exchange_seconds,
    expected_distinct,
    flat,
    miss_probability,
    predict,
    two_level,
)
from raynixl.moe.grid import make_grid
from raynixl.moe.placement import Placement
from raynixl.moe.simulator import Draw, simulate_flat, simulate_two_level

pytestmark = pytest.mark.pure


def shape_of(world, *, tokens=128, topk=8, experts=256, hidden=7168):
    return Shape(tokens, topk, Placement.even(experts, world).holders, 2 * hidden + 80, 2 * hidden)


@pytest.mark.parametrize(
    ("held", "experts", "topk"),
    [([64] * 4, 256, 8), ([1] * 256, 256, 8), ([3, 0, 1, 7], 11, 4), ([2, 2], 4, 4), ([5], 5, 1), ([1, 9], 10, 9)],
)
def test_a_token_has_as_many_distinct_holders_as_drawn_ones_have(held, experts, topk):
    ids = Draw(seed=3).experts(40_000, experts, topk)
    holders = np.repeat(np.arange(len(held)), held)[ids]
    hit = np.array([(holders == holder).any(1).mean() for holder in range(len(held))])
    assert 1 - miss_probability(np.array(held), experts, topk) == pytest.approx(hit, abs=0.01)
    assert expected_distinct(np.array(held), experts, topk) == pytest.approx(hit.sum(), rel=0.01)


def test_all_experts_are_at_all_holders_and_one_expert_at_one():
    assert expected_distinct(np.full(8, 32), 256, 256) == pytest.approx(8)
    assert expected_distinct(np.full(8, 32), 256, 1) == pytest.approx(1)


@pytest.mark.parametrize(("world", "hosts"), [(16, 4), (15, None), (13, None), (32, 2)])
def test_expected_rows_and_messages_are_those_of_a_simulation(world, hosts):
    grid = make_grid(world, None if hosts is None else [rank * hosts // world for rank in range(world)])
    shape = shape_of(world, tokens=256, experts=64)
    ids = Draw(seed=1).experts(256 * world, 64, 8)
    for expected, drawn in (
        (flat(world, shape), simulate_flat(world, ids, shape.holders)),
        (two_level(grid, shape), simulate_two_level(grid, ids, shape.holders)),
    ):
        for ours, theirs in zip(expected, drawn.stages, strict=True):
            assert np.array_equal(ours.linked, theirs.linked)
            assert np.array_equal(ours.rows > 0, theirs.rows > 0)
            assert ours.rows.sum() == pytest.approx(theirs.rows.sum(), rel=0.02)
            assert ours.rows.sum(0) == pytest.approx(theirs.rows.sum(0), rel=0.1)
            assert ours.rows.sum(1) == pytest.approx(theirs.rows.sum(1), rel=0.1)
            assert ours.messages().sum() == pytest.approx(theirs.messages().sum(), rel=0.01)


def test_few_tokens_make_as_many_puts_as_are_drawn():
    shape = shape_of(64, tokens=4)
    ids = Draw(seed=2).experts(4 * 64, 256, 8)
    (expected,), (drawn,) = flat(64, shape), simulate_flat(64, ids, shape.holders).stages
    assert expected.messages().sum() == pytest.approx(drawn.messages().sum(), rel=0.02)


def test_an_exchange_takes_as_long_as_its_busiest_resource():
    fabric = Fabric(
        call_seconds=0, message_seconds=1e-6, network_message_seconds=1e-5, latency=1e-4, network_latency=1e-3,
        rank_gbps=10.0, host_gbps=20.0, rank_network_gbps=2.0, host_network_gbps=3.0,
    )  # fmt: skip
    linked = ~np.eye(4, dtype=bool)
    hosts = np.array([0, 0, 1, 1])

    def seconds(rows, *, phases=1):
        rows = np.array(rows, float)
        return exchange_seconds(Exchange(rows, (rows > 0) * 1.0, linked, phases), 1e9, hosts, fabric)

    lines = 1e-6 + 2e-5
    nothing = np.zeros((4, 4))
    assert seconds(nothing) == pytest.approx(1e-3 + lines)
    assert seconds(nothing, phases=2) == pytest.approx(2e-3 + 2 * lines)
    one = nothing.copy()
    one[0, 1] = 1
    assert seconds(one) == pytest.approx(1e-3 + 0.1 + lines + 1e-6)  # copied by rank 0
    both = one.copy()
    both[[0, 1], [0, 0]] = 2
    assert seconds(both) == pytest.approx(1e-3 + 0.3 + lines + 1e-6)
    assert seconds(10 * both) == pytest.approx(1e-3 + 3.0 + lines + 1e-6)
    assert seconds([[3, 3, 0, 0], [3, 3, 0, 0], *nothing[:2]]) == pytest.approx(1e-3 + 0.6 + lines + 1e-6, rel=1e-3)
    far = nothing.copy()
    far[0, 2] = 1
    assert seconds(far) == pytest.approx(1e-3 + 0.5)  # the rank's share of the network
    far[1, 3] = 1
    assert seconds(far) == pytest.approx(1e-3 + 2 / 3)  # the host's, both ways alike
    assert seconds(far.T) == pytest.approx(1e-3 + 2 / 3)


def test_two_stages_send_less_between_hosts_and_more_inside():
    hosts = np.arange(64) // 8
    shape, grid = shape_of(64), make_grid(64, hosts.tolist())
    is_far = hosts[:, None] != hosts[None, :]
    (plain,), (across, inside) = flat(64, shape), two_level(grid, shape)
    assert (across.rows * is_far).sum() < 0.8 * (plain.rows * is_far).sum()
    assert not (inside.rows * is_far).any()
    assert inside.rows.sum() == pytest.approx(plain.rows.sum())


@pytest.mark.parametrize(
    ("world", "hosts", "options", "chosen"),
    [
        (4, 1, {}, Topology.FLAT),
        (8, 1, {"tokens": 4096}, Topology.FLAT),
        (1024, 128, {"experts": 1024}, Topology.TWO_LEVEL),
        (64, 8, {"tokens": 8}, Topology.TWO_LEVEL),
        (256, 32, {"tokens": 1}, Topology.TWO_LEVEL),
    ],
)
def test_the_cheaper_topology_is_chosen(world, hosts, options, chosen):
    numbers = [rank * hosts // world for rank in range(world)]
    choice = choose(make_grid(world, numbers), shape_of(world, **options), numbers)
    assert choice.topology is chosen
    assert "ms flat" in choice.reason


def test_a_cached_layout_saves_a_phase():
    shape, hosts = shape_of(16, tokens=0), np.zeros(16, np.int64)
    two, one = (predict(flat(16, shape, phases=phases), shape, hosts, Fabric()) for phases in (2, 1))
    assert two.dispatch_seconds - one.dispatch_seconds == pytest.approx(15 * 5e-6 + 20e-6)
    assert two.combine_seconds == one.combine_seconds
