"""Sources that have replicas: what one of them does not give, or gives damaged, comes from the other, and is told."""

import pytest
import torch

from raynixl.errors import IntegrityError
from raynixl.weights import WeightSync, publish, subscribe
from raynixl.weights.declare import declare
from raynixl.weights.pieces import TensorInfo
from raynixl.weights.placement import Mesh, Replicate, Shard
from raynixl.weights.publication import Publication

CHUNK = 4096
ELEMENTS = 12 * CHUNK // 4


def damage(monkeypatch, *names):
    """Have what these sources serve differ from what they say that it is, in every chunk."""
    freeze = Publication.freeze

    def damaging(publication, *arguments):
        frozen = freeze(publication, *arguments)
        if publication._agent.name in names:
            for arena in publication._copies.base(arguments[0].version).arenas.arrays:
                arena[::CHUNK] ^= 1
        return frozen

    monkeypatch.setattr(Publication, "freeze", damaging)


def replicas(fleet, count):
    for number in range(count):
        publish(fleet(f"trainer-{number}"), "w", {"w": torch.arange(float(ELEMENTS))}, chunk_nbytes=CHUNK)
    return [f"trainer-{number}" for number in range(count)]


def halves(fleet):
    """Two sources of the first half and two of the second; each chunk has bytes of both."""
    infos = [TensorInfo("w", "float32", (ELEMENTS // 16, 16))]
    mesh = Mesh((("copies", 2), ("parts", 2)))
    names = []
    for copy in range(2):
        for part in range(2):
            own = torch.arange(float(ELEMENTS)).reshape(-1, 16).chunk(2, dim=1)[part].contiguous()
            shards = declare(infos, mesh, (Replicate(), Shard(1)), (copy, part))
            names.append(f"trainer-{copy}{part}")
            publish(fleet(names[-1]), "w", {"w": own}, shards=shards, chunk_nbytes=CHUNK)
    return names


def rollouts(fleet, shape, count):
    targets = {f"rollout-{number}": {"w": torch.zeros(shape)} for number in range(count)}
    for name, target in targets.items():
        subscribe(fleet(name), "w", target)
    return targets


def all_right(targets):
    wanted = torch.arange(float(ELEMENTS))
    return all(torch.equal(target["w"].flatten(), wanted) for target in targets.values())


@pytest.mark.parametrize("topology", ["direct", "relay"])
def test_a_source_that_serves_damaged_chunks_is_named_and_its_replica_gives_them(fleet, monkeypatch, topology):
    sources, targets = replicas(fleet, 2), rollouts(fleet, ELEMENTS, 3)
    damage(monkeypatch, "trainer-1")
    report = WeightSync(fleet.agents[0], "w", sources, list(targets), topology=topology, timeout=20).push(1)
    assert set(report.ranks) == set(targets)
    assert all_right(targets)
    assert report.liars == ("trainer-1",)
    assert isinstance(report.excluded["trainer-1"], IntegrityError)
    assert report.replans == 1


def test_of_the_sources_of_a_chunk_that_is_damaged_the_one_that_did_it_is_named(fleet, monkeypatch):
    sources, targets = halves(fleet), rollouts(fleet, (ELEMENTS // 16, 16), 1)
    damage(monkeypatch, "trainer-01")
    report = WeightSync(fleet.agents[0], "w", sources, list(targets), timeout=20).push(1)
    assert set(report.ranks) == set(targets)
    assert all_right(targets)
    assert report.liars == ("trainer-01",)


def test_where_one_source_of_each_half_is_damaged_the_others_give_all(fleet, monkeypatch):
    sources, targets = halves(fleet), rollouts(fleet, (ELEMENTS // 16, 16), 1)
    damage(monkeypatch, "trainer-00", "trainer-11")
    report = WeightSync(fleet.agents[0], "w", sources, list(targets), timeout=20).push(1)
    assert set(report.ranks) == set(targets)
    assert all_right(targets)


def test_where_all_replicas_are_damaged_the_old_version_stays_and_the_error_names_who_gave(fleet, monkeypatch):
    sources, targets = replicas(fleet, 2), rollouts(fleet, ELEMENTS, 1)
    damage(monkeypatch, *sources)
    report = WeightSync(fleet.agents[0], "w", sources, list(targets), topology="direct", timeout=20).push(1)
    assert isinstance(report.excluded["rollout-0"], IntegrityError)
    assert "'trainer-" in str(report.excluded["rollout-0"])
    assert not targets["rollout-0"]["w"].any()
