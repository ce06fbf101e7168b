"""Sharded sources in processes of their own: what whoever pulls sees when one dies, leaves or comes back."""

import time

import pytest
import torch
from weights_sources import Puller
from weights_tools import same

from raynixl.agents import Agent
from raynixl.config import AgentConfig, from_env
from raynixl.errors import PeerLost, PeerRestarted, PeerUnknown, RegionStale, RegionUnknown
from raynixl.weights import WeightSync, subscribe
from raynixl.weights.shards import replicated
from raynixl.weights.sourcing import Release
from raynixl.weights.tensors import describe

TENSORS, ELEMENTS, RANKS = 3, 20_000, 2
GONE = (PeerLost, PeerRestarted, PeerUnknown)


@pytest.fixture
def engine():
    with Agent("engine", config=from_env(AgentConfig(heartbeat_timeout=60))) as agent:
        yield agent


def start(children, engine, ranks=range(RANKS)):
    """Start trainers, each with its number in all its weights."""
    trainers = children(*(f"trainer-{rank}" for rank in ranks), known=[engine])
    for rank, child in zip(ranks, trainers, strict=True):
        child.ask("make", tensors=TENSORS, elements=ELEMENTS)
        child.ask("fill", value=float(rank + 1))
        child.ask("publish_shard", rank=rank, ranks=RANKS)
    return trainers


def puller_of(engine):
    target = {f"w{number}": torch.zeros(RANKS * ELEMENTS) for number in range(TENSORS)}
    return Puller(engine, "w", [f"trainer-{rank}" for rank in range(RANKS)], [replicated(describe(target))])


def values(image):
    return [{value for tensor in image.values() for value in half(tensor, rank)} for rank in range(RANKS)]


def half(tensor, rank):
    return tensor[rank * ELEMENTS : (rank + 1) * ELEMENTS].unique().tolist()


def test_every_rank_gives_its_own_part_and_one_that_leaves_in_a_pull_is_a_typed_error(engine, children):
    trainers = start(children, engine)
    puller = puller_of(engine)
    assert values(puller.push(1)[0]) == [{1.0}, {2.0}]
    trainers[1].ask("fill", value=5.0)
    assert values(puller.push(2)[0]) == [{1.0}, {5.0}]
    _, frozen = puller.freeze(3)
    trainers[0].ask("unpublish")
    with pytest.raises(RegionStale):
        puller.pull(3, frozen)
    with pytest.raises(RegionUnknown):
        puller.freeze(4)


def test_a_trainer_killed_in_a_pull_or_before_a_freeze_is_a_typed_error_and_pulled_from_again_once_it_is_back(
    engine, children
):
    trainers = start(children, engine)
    puller = puller_of(engine)
    push, frozen = puller.freeze(1)
    trainers[1].kill()
    with pytest.raises((*GONE, RegionStale)):
        puller.pull(1, frozen)
    puller.ask("trainer-0", "release", Release(push=push, committed=False).to_bytes())
    (again,) = start(children, engine, [1])
    fresh = puller_of(engine)
    assert fresh.plan == puller.plan
    assert values(fresh.push(1)[0]) == [{1.0}, {2.0}]
    again.kill()
    began = time.monotonic()
    with pytest.raises(GONE):
        fresh.freeze(2)
    assert time.monotonic() - began < 10


def ask_all(children, do, **arguments):
    """Have children do at once what they can only do together."""
    for rank, child in enumerate(children):
        child.send(do, **{name: rank if value is None else value for name, value in arguments.items()})
    assert all(child.hear() for child in children)


def test_a_module_that_torch_shards_is_published_by_each_rank_as_it_is(engine, children, tmp_path):
    trainers = children("trainer-0", "trainer-1", known=[engine])
    ask_all(trainers, "publish_fsdp", rank=None, ranks=2, store=str(tmp_path / "store"))
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(33, 51), torch.nn.Linear(51, 17))
    puller = Puller(engine, "w", ["trainer-0", "trainer-1"], [replicated(describe(dict(model.state_dict())))])
    assert same(puller.push(1)[0], model)
    ask_all(trainers, "train")
    model(torch.ones(2, 33)).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.5).step()
    (image,) = puller.push(2)
    assert all(torch.allclose(image[name], tensor) for name, tensor in model.state_dict().items())
    other = torch.nn.Sequential(torch.nn.Linear(33, 51), torch.nn.Linear(51, 17))
    with subscribe(engine, "w", other):
        assert not WeightSync(engine, "w", ["trainer-0", "trainer-1"], ["engine"], timeout=20).push(3).excluded
    assert same(dict(other.state_dict()), image)
