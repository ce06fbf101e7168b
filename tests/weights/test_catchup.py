"""Catching up: a target that joins gets the bytes that it needs, and those only from peers that need the same."""

import torch

from raynixl.weights import WeightSync, publish, subscribe
from raynixl.weights.declare import declare
from raynixl.weights.pieces import TensorInfo
from raynixl.weights.placement import Mesh, Shard

INFOS = [TensorInfo("w", "float32", (8, 4))]
FULL = torch.arange(32, dtype=torch.float32).reshape(8, 4)


def _subscribe(fleet, name, rank):
    agent, own = fleet(name), {"w": torch.zeros(4, 4)}
    subscribe(agent, "model", own, shards=declare(INFOS, Mesh((("tp", 2),)), (Shard(0),), (rank,)))
    return own["w"]


def test_ranks_that_join_get_their_own_part_though_parts_are_laid_out_alike(fleet):
    trainer = fleet("trainer")
    publish(trainer, "model", {"w": FULL.clone()})
    for rank in range(2):
        _subscribe(fleet, f"old-{rank}", rank)
    sync = WeightSync(trainer, "model", ["trainer"], [["old-0", "old-1"]])
    sync.push(1).raise_for_excluded()
    new = [_subscribe(fleet, f"new-{rank}", rank) for rank in range(2)]
    assert sync.join([["new-0", "new-1"]]) == {}
    assert [part.tolist() for part in new] == [part.tolist() for part in FULL.chunk(2)]


def test_a_rank_whose_part_nobody_holds_is_not_given_another(fleet):
    trainer = fleet("trainer")
    publish(trainer, "model", {"w": FULL.clone()})
    _subscribe(fleet, "old-0", 0)
    sync = WeightSync(trainer, "model", ["trainer"], ["old-0"])
    sync.push(1).raise_for_excluded()
    other = _subscribe(fleet, "new-1", 1)
    assert list(sync.join(["new-1"])) == ["new-1"]
    assert not other.any()
    assert not sync.push(2).excluded
    assert torch.equal(other, FULL[4:])
