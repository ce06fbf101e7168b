"""Deltas in a relay: receivers give each other what has changed, and the sources give it about once."""

import threading

import pytest
import torch

from raynixl.weights import WeightSync, publish, subscribe
from raynixl.weights.assignment import Topology
from raynixl.weights.protocol import Holder
from raynixl.weights.pulling import Blobs, Pulling

COUNT = 1 << 18
RECEIVERS = 4


@pytest.fixture
def synced(fleet):
    """Return a source's tensor, its publication, what follows it, and a relaying sync that has pushed two versions."""
    trainer = fleet("trainer")
    weights = {"w": torch.randn(COUNT).to(torch.bfloat16)}
    publication = publish(trainer, "policy", weights, chunk_nbytes=4096)
    models = [{"w": torch.zeros(COUNT, dtype=torch.bfloat16)} for _ in range(RECEIVERS)]
    agents = [fleet(f"rollout-{number}") for number in range(RECEIVERS)]
    followers = [subscribe(agent, "policy", model, keep=2) for agent, model in zip(agents, models, strict=True)]
    names = [agent.name for agent in agents]
    sync = WeightSync(trainer, "policy", ["trainer"], names, topology="relay", timeout=30)
    for version in (1, 2):
        change(publication, weights["w"], version)
        sync.push(version).raise_for_excluded()
    wait_for_base()
    yield weights["w"], publication, models, sync, followers
    for follower in followers:
        follower.close()
    publication.close()


def change(publication, tensor, version, *, every=100):
    with publication.updating(), torch.no_grad():
        tensor[version::every] += 1.0


def wait_for_base():
    """The memory of the base version is made after the first push that asks for a delta."""
    for thread in [one for one in threading.enumerate() if one.name == "raynixl-spare"]:
        thread.join(10)


def push_delta(synced, first):
    """Push until a delta has come, which needs one whole version in the second copy; return its report."""
    tensor, publication, _, sync, _ = synced
    for version in range(first, first + 3):
        change(publication, tensor, version)
        report = sync.push(version)
        report.raise_for_excluded()
        if report.deltas:
            return report
    raise AssertionError("no delta came in three pushes")


def test_receivers_of_a_delta_feed_each_other_and_end_with_the_right_bytes(synced):
    tensor, _, models, _, _ = synced
    report = push_delta(synced, 3)
    assert report.deltas == RECEIVERS
    assert report.peer_nbytes > 0
    blob = (report.origin_nbytes + report.peer_nbytes) / RECEIVERS
    assert blob < 2 * COUNT * 0.025
    assert report.origin_nbytes <= 2 * blob
    for model in models:
        assert torch.equal(model["w"].view(torch.int16), tensor.view(torch.int16))


def test_a_base_that_an_engine_has_changed_is_mended_from_the_sources_in_a_relay_too(synced):
    tensor, _, models, _, followers = synced
    slot = followers[1]._follower._slots.find(2)
    slot.arenas.arrays[0][:8192] ^= 255
    report = push_delta(synced, 3)
    assert (report.version, report.deltas) == (3, RECEIVERS), "the slot that was changed is not the delta's base"
    for model in models:
        assert torch.equal(model["w"].view(torch.int16), tensor.view(torch.int16))
    assert all(follower.held_versions[-1] == 3 for follower in followers)


def test_blobs_are_let_go_of_after_the_flip(synced):
    push_delta(synced, 3)
    assert [len(follower._follower._filler.blobs) for follower in synced[4]] == [0] * RECEIVERS


def serve_instead(monkeypatch, liar, *, is_gone):
    """Have one receiver offer, in place of its blobs, noise, or memory that it has let go of."""
    honest = Blobs.holder

    def holder(self, agent):
        if agent.name != liar:
            return honest(self, agent)
        regions = [agent.empty(region.nbytes) for region in self.regions]
        for region in regions:
            region.array()[:] = 0x5A
        records = tuple(region.record() for region in regions)
        for region in regions if is_gone else []:
            agent.deregister(region)
        return Holder(name=agent.name, incarnation=agent.incarnation, regions=records)

    monkeypatch.setattr(Blobs, "holder", holder)


def test_a_peer_that_gives_corrupt_blobs_is_reported_and_left_out_and_the_others_get_them_elsewhere(
    synced, monkeypatch
):
    tensor, publication, models, sync, _ = synced
    serve_instead(monkeypatch, "rollout-0", is_gone=False)
    for version in range(3, 9):  # whom the others ask is up to the swarm: until one has asked the liar
        change(publication, tensor, version, every=20)
        report = sync.push(version)
        assert report.deltas == RECEIVERS
        if report.liars:
            break
    assert report.liars == ("rollout-0",)
    assert set(report.ranks) == {"rollout-1", "rollout-2", "rollout-3"}
    for model in models[1:]:
        assert torch.equal(model["w"].view(torch.int16), tensor.view(torch.int16))


def test_blobs_that_a_peer_has_let_go_of_are_had_elsewhere_and_nobody_is_left_out(synced, monkeypatch):
    tensor, publication, models, sync, _ = synced
    serve_instead(monkeypatch, "rollout-0", is_gone=True)
    change(publication, tensor, 3)
    report = sync.push(3)
    report.raise_for_excluded()
    assert (report.deltas, report.liars) == (RECEIVERS, ())
    for model in models:
        assert torch.equal(model["w"].view(torch.int16), tensor.view(torch.int16))


@pytest.mark.parametrize("topology", ["relay", "auto"])
def test_who_has_another_base_gets_everything_from_those_who_applied_the_delta(synced, topology):
    tensor, publication, models, sync, followers = synced
    push_delta(synced, 3)
    sync._topology = Topology(topology)
    followers[3].close()
    models[3]["w"].zero_()
    followers[3] = subscribe(followers[3]._agent, "policy", models[3], keep=2)
    change(publication, tensor, 7)
    report = sync.push(7)
    report.raise_for_excluded()
    assert report.deltas == RECEIVERS - 1
    assert report.ranks["rollout-3"].nbytes == 2 * COUNT
    assert report.ranks["rollout-3"].origin_nbytes == 0
    for model in models:
        assert torch.equal(model["w"].view(torch.int16), tensor.view(torch.int16))


def test_sources_are_released_before_a_slow_receiver_of_a_delta_ends(synced, monkeypatch):
    tensor, publication, models, _, _ = synced
    delta, freed = Pulling.delta, []

    def slow(pulling, *arguments):
        if pulling.agent.name == "rollout-2":
            freed.append(publication._copies.wait_free(10.0))
        return delta(pulling, *arguments)

    monkeypatch.setattr(Pulling, "delta", slow)
    report = push_delta(synced, 3)
    assert freed[-1]
    assert report.deltas == RECEIVERS
    assert report.release_seconds < report.seconds
    for model in models:
        assert torch.equal(model["w"].view(torch.int16), tensor.view(torch.int16))


def test_a_base_that_an_engine_has_changed_is_mended_by_peers_once_the_sources_are_free(synced, monkeypatch):
    tensor, publication, models, _, followers = synced
    mend, freed = Pulling.mend, []

    def slow(pulling, *arguments):
        freed.append(publication._copies.wait_free(10.0))
        return mend(pulling, *arguments)

    monkeypatch.setattr(Pulling, "mend", slow)
    followers[1]._follower._slots.find(2).arenas.arrays[0][:8192] ^= 255
    report = push_delta(synced, 3)
    assert (report.version, freed) == (3, [True])
    assert report.ranks["rollout-1"].origin_nbytes < 2 * COUNT * 0.025
    for model in models:
        assert torch.equal(model["w"].view(torch.int16), tensor.view(torch.int16))
