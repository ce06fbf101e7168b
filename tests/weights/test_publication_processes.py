"""Sharded sources in processes of their own: what whoever pulls sees when one dies, leaves or comes back."""

import threading
import time

import pytest
import torch
from weights_sources import Puller

from raynixl.agents import Agent
from raynixl.config import AgentConfig, from_env
from raynixl.errors import PeerLost, PeerRestarted, PeerUnknown, RaynixlError, RegionStale, RegionUnknown
from raynixl.weights.shards import replicated
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


def test_every_rank_of_processes_gives_its_own_part(engine, children):
    trainers = start(children, engine)
    puller = puller_of(engine)
    assert values(puller.push(1)[0]) == [{1.0}, {2.0}]
    trainers[1].ask("fill", value=5.0)
    assert values(puller.push(2)[0]) == [{1.0}, {5.0}]


def test_a_trainer_killed_before_it_is_frozen_is_a_typed_error(engine, children):
    trainers = start(children, engine)
    puller = puller_of(engine)
    trainers[1].process.kill()
    began = time.monotonic()
    with pytest.raises(GONE):
        puller.freeze(1)
    assert time.monotonic() - began < 10


def test_a_trainer_killed_while_it_is_pulled_from_is_a_typed_error_and_a_restarted_one_is_pulled_from_again(
    engine, children
):
    trainers = start(children, engine)
    puller = puller_of(engine)
    push, frozen = puller.freeze(1)
    trainers[1].process.kill()
    trainers[1].process.wait(10)
    with pytest.raises((*GONE, RegionStale)):
        puller.pull(1, frozen)
    puller.ask("trainer-0", "release", b'{"push":"%s","committed":false}' % push.encode())
    start(children, engine, [1])
    again = puller_of(engine)
    assert again.plan == puller.plan
    assert values(again.push(1)[0]) == [{1.0}, {2.0}]


def test_a_publication_closed_while_it_is_pulled_from_is_a_typed_error(engine, children):
    trainers = start(children, engine)
    puller = puller_of(engine)
    _, frozen = puller.freeze(1)
    trainers[0].ask("unpublish")
    with pytest.raises(RegionStale):
        puller.pull(1, frozen)
    with pytest.raises(RegionUnknown):
        puller.freeze(2)


def test_a_publication_closed_in_the_middle_of_a_freeze_answers_with_a_typed_error(engine, children):
    trainers = start(children, engine)
    puller = puller_of(engine)
    outcomes = []

    def freeze():
        for version in range(1, 200):
            try:
                push, _ = puller.freeze(version)
                puller.release(push)
            except RaynixlError as exc:
                outcomes.append(type(exc))
                return

    freezing = threading.Thread(target=freeze)
    freezing.start()
    trainers[1].ask("unpublish")
    freezing.join(30)
    assert not freezing.is_alive()
    assert not outcomes or outcomes[0] is not RaynixlError
