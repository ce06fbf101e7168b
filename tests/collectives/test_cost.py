"""The cost model."""

import pytest

from raynixl.collectives.cost import NETWORK, ONE_HOST, chain_seconds, choose_broadcast, direct_seconds

MIB = 1 << 20


@pytest.mark.parametrize(
    ("nbytes", "world", "links", "chosen"),
    [
        (256 * MIB, 2, NETWORK, "direct"),  # one reader: a chain of one link is the same thing, with more steps
        (256 * MIB, 5, ONE_HOST, "direct"),
        (256 * MIB, 5, NETWORK, "chain"),
        (64 * 1024, 5, NETWORK, "direct"),  # latency, not bytes
        (0, 5, NETWORK, "direct"),
        (1024 * MIB, 33, NETWORK, "chain"),
    ],
)
def test_the_cheaper_broadcast_is_chosen(nbytes, world, links, chosen):
    assert choose_broadcast(nbytes, world, links) == chosen


def test_a_chain_costs_little_more_for_each_further_rank():
    four, eight = (chain_seconds(1024 * MIB, world, NETWORK) for world in (5, 9))
    assert eight < 1.1 * four
    assert direct_seconds(1024 * MIB, 9, NETWORK) > 1.9 * direct_seconds(1024 * MIB, 5, NETWORK)
