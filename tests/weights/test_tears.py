"""Tears: no reader sees half a version, across tensors or inside one, and no damaged byte is ever served."""

import asyncio
import threading

import numpy as np
import pytest
import torch
from weights_tools import INSTALLS, Cluster

from raynixl.errors import IntegrityError, PeerRestarted
from raynixl.weights import WeightSync
from raynixl.weights.protocol import Answer
from raynixl.weights.publication import Publication
from raynixl.weights.targeting import Step

FLIPS, READERS = 120, 3


class Wide(torch.nn.Module):
    """Tensors of several chunks, one strided: a reader sums up which values it sees in all of them."""

    def __init__(self):
        super().__init__()
        self.parts = torch.nn.ParameterList(torch.zeros(9000) for _ in range(2))
        self.turned = torch.nn.Parameter(torch.zeros(60, 50).t())

    def forward(self):
        return {(part.min().item(), part.max().item()) for part in self.parameters()}

    def fill(self, value):
        with torch.no_grad():
            for part in self.parameters():
                part.fill_(value)


@pytest.mark.parametrize("install", INSTALLS)
def test_many_readers_during_hundreds_of_flips_see_whole_versions_in_rising_order(fleet, install):
    source, target = Wide(), Wide()
    cluster = Cluster(fleet, source, [target], install=install)
    subscription, stop, wrong, counts = cluster.subscriptions[0], threading.Event(), [], []

    def read():
        last, count = 0.0, 0
        while not stop.is_set():
            with subscription.pinned() as version:
                seen = target() | target.forward()
            count += 1
            if seen != {(float(version), float(version))} or version < last:
                wrong.append((version, last, seen))
            last = version
        counts.append(count)

    readers = [threading.Thread(target=read) for _ in range(READERS)]
    for reader in readers:
        reader.start()
    try:
        for version in range(1, FLIPS + 1):
            source.fill(version)
            cluster.sync.push(version).raise_for_excluded()
    finally:
        stop.set()
        for reader in readers:
            reader.join(20)
    assert not wrong
    assert len(counts) == READERS
    assert min(counts) > 0


DAMAGES = {
    "a bit": lambda arena: arena.__setitem__(20_000, arena[20_000] ^ 4),
    "swapped chunks": lambda arena: arena.__setitem__(slice(0, 8192), np.roll(arena[:8192], 4096)),
    "the last byte": lambda arena: arena.__setitem__(-1, arena[-1] ^ 128),
    "zeroed": lambda arena: arena.__setitem__(slice(None), 0),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_between_freeze_and_pull_is_reported_and_the_old_version_stays(fleet, damage, monkeypatch):
    source = {"a": torch.arange(3000.0), "b": torch.rand(5000), "c": torch.rand(16)}
    target = {name: tensor.clone() for name, tensor in source.items()}
    kept = {name: tensor.clone() for name, tensor in source.items()}
    cluster = Cluster(fleet, source, [target])
    freeze = Publication.freeze

    def damaging(publication, *arguments):
        frozen = freeze(publication, *arguments)
        DAMAGES[damage](publication._copies.base(arguments[0].version).arenas.arrays[0])
        return frozen

    for tensor in source.values():
        tensor.add_(1)
    monkeypatch.setattr(Publication, "freeze", damaging)
    report = cluster.sync.push(1)
    error = report.excluded["rollout-0"]
    assert isinstance(error, IntegrityError)
    assert any(f"'{name}'" in str(error) for name in source)
    assert "excluded rollout-0: IntegrityError" in str(report)
    assert all(torch.equal(target[name], kept[name]) for name in kept)
    monkeypatch.undo()
    cluster.sync.push(1).raise_for_excluded()
    assert all(torch.equal(target[name], source[name]) for name in source)


def test_a_torn_shadow_is_not_served_even_if_it_is_asked_for(fleet, monkeypatch):
    pushes = []
    source, target = {"a": torch.ones(9000)}, {"a": torch.zeros(9000)}
    cluster = Cluster(fleet, source, [target])
    freeze = Publication.freeze

    def damaging(publication, request, peer):
        pushes.append(request.push)
        frozen = freeze(publication, request, peer)
        publication._copies.base(request.version).arenas.arrays[0][100] ^= 1
        return frozen

    monkeypatch.setattr(Publication, "freeze", damaging)
    assert cluster.sync.push(1).excluded
    request = Step(push=pushes[0], seconds=5.0).to_bytes()
    answer = Answer.from_bytes(cluster.trainer.ask("rollout-0", "weights/policy/flip", request, timeout=5).wait())
    assert isinstance(answer.fault.error(), PeerRestarted)
    assert target["a"].unique().tolist() == [0.0]


async def test_a_push_whose_waiter_is_cancelled_ends_by_itself(fleet):
    source, target = {"a": torch.ones(9000)}, {"a": torch.zeros(9000)}
    cluster = Cluster(fleet, source, [target])
    with cluster.subscriptions[0].pinned():
        task = asyncio.create_task(cluster.sync.push_async(1))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    report = await cluster.sync.push_async(2)
    assert not report.excluded
    assert cluster.subscriptions[0].version == 2


def test_the_report_adds_up_and_counts_targets_alone(fleet):
    source, targets = {"a": torch.ones(1 << 20)}, [{"a": torch.zeros(1 << 20)} for _ in range(2)]
    cluster = Cluster(fleet, source, targets)
    sync = WeightSync(cluster.trainer, "policy", ["trainer", "nobody"], ["rollout-0", "rollout-1"])
    report = sync.push(np.int64(1), timeout=5)
    assert type(report.version) is int
    assert list(report.excluded) == ["nobody"]
    assert "to 2 of 2 in" in str(report)
    assert report.nbytes == 4 << 20
    assert report.gbps == pytest.approx(2 * report.nbytes / report.seconds / 1e9)
    for rank in report.ranks.values():
        assert rank.nbytes == report.nbytes
        assert 0 < rank.seconds <= report.seconds
        assert rank.pull_seconds + rank.verify_seconds <= rank.seconds
    assert report.flip_seconds == max(rank.flip_seconds for rank in report.ranks.values())
    assert report.copy_out_seconds + report.digest_seconds < report.seconds
