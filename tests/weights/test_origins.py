"""Origins: what whoever pushes learns of its sources, what it tells them, and how their answers add up."""

import dataclasses
import time

import numpy as np
import pytest
import torch
from weights_sources import Puller

from raynixl.errors import IntegrityError, PeerLost, PeerUnknown, RegionUnknown, TransferTimeout
from raynixl.weights import origins as origins_module
from raynixl.weights import publish
from raynixl.weights.declare import declare
from raynixl.weights.digest import digest_chunks
from raynixl.weights.origins import Origins
from raynixl.weights.pieces import TensorInfo
from raynixl.weights.placement import Mesh, Replicate, Shard
from raynixl.weights.plan import plan
from raynixl.weights.sourcing import Freeze, Frozen

INFOS = [TensorInfo("a", "float32", (1200, 8)), TensorInfo("b", "float32", (64,))]
MESH = Mesh((("replica", 2), ("fsdp", 2)))
NAMES = [f"trainer-{number}" for number in range(4)]
CHUNK = 4096
TARGET = declare(INFOS, Mesh((("tp", 1),)), (Replicate(),), (0,))


class Trainers:
    """Four sources: two replicas of two halves."""

    def __init__(self, fleet):
        torch.manual_seed(0)
        self.weights = {info.name: torch.randn(info.shape) for info in INFOS}
        self.fleet = fleet
        self.models, self.publications = {}, {}
        for number, name in enumerate(NAMES):
            self.models[name] = {key: tensor.chunk(2)[number % 2].clone() for key, tensor in self.weights.items()}
            self.publish(name)

    def publish(self, name, number=None):
        number = NAMES.index(name) if number is None else number
        shards = declare(INFOS, MESH, (Replicate(), Shard(0)), (number // 2, number % 2))
        self.publications[name] = publish(self.fleet(name), "w", self.models[name], shards=shards, chunk_nbytes=CHUNK)

    def agent(self, name):
        return self.publications[name]._agent


@pytest.fixture
def trainers(fleet):
    return Trainers(fleet)


@pytest.fixture
def origins(fleet, trainers):
    return Origins(fleet("pusher"), "w", NAMES)


def soon(seconds=10.0):
    return time.monotonic() + seconds


def freeze(origins, version, *, base=0, push=None):
    made = plan(list(origins.planned.values()), [TARGET])
    push = f"{version:032x}" if push is None else push
    request = Freeze(push=push, version=version, seconds=10.0, plan=made.key(origins.chunk_nbytes), base=base)
    return made, origins.freeze(request, made, origins.chunk_nbytes, soon())


def check(trainers, origins, made, version, frozen):
    """The sums are the digests of the image that the sources' bytes make."""
    puller = Puller(origins._agent, "w", NAMES, [TARGET], chunk_nbytes=CHUNK)
    arrays = [np.zeros(size, np.uint8) for size in made.images[0].arenas]
    for entry in made.images[0].entries:
        raw = trainers.weights[entry.name].numpy().view(np.uint8).reshape(-1)
        arrays[entry.arena][entry.offset : entry.offset + entry.nbytes] = raw
    chunks = made.images[0].chunks(CHUNK)
    assert np.array_equal(frozen.digests[0], digest_chunks(arrays, chunks, threads=1, seed=version))
    assert puller.plan == made


def test_sources_are_described_once_and_their_answers_add_up(trainers, origins, monkeypatch):
    assert origins.describe(soon()) == {}
    assert list(origins.planned) == NAMES
    asked = []
    for name in ("ask_all", "ask_running"):
        monkeypatch.setattr(f"raynixl.weights.origins.{name}", counting(asked, getattr(origins_module, name)))
    for version in (1, 2):
        assert origins.describe(soon()) == {}
        made, frozen = freeze(origins, version)
        assert made.parts == ((0, 2), (1, 3))
        assert [[holder.name for holder in own] for own in frozen.holders] == [
            ["trainer-0", "trainer-2"],
            ["trainer-1", "trainer-3"],
        ]
        assert (frozen.failed, frozen.nbytes, frozen.version) == ({}, (1200 * 8 + 64) * 4, version)
        if version == 1:
            check(trainers, origins, made, version, frozen)
        origins.release(f"{version:032x}", committed=True)
    sent = [(topic.rpartition("/")[2], len(payloads)) for topic, payloads in asked if payloads]
    assert sent == [("outgoing", 4), ("freeze", 4), ("release", 4), ("freeze", 4), ("release", 4)]
    assert {publication.version for publication in trainers.publications.values()} == {2}


def counting(asked, real):
    def ask(agent, topic, payloads, deadline, **options):
        asked.append((topic, dict(payloads)))
        return real(agent, topic, payloads, deadline, **options)

    return ask


def test_a_replica_that_is_gone_costs_nothing_and_the_last_one_of_a_part_is_an_error(trainers, origins):
    origins.describe(soon())
    trainers.agent("trainer-2").close()
    made, frozen = freeze(origins, 1)
    assert [len(own) for own in frozen.holders] == [1, 2]
    assert isinstance(frozen.failed["trainer-2"], PeerLost | PeerUnknown)
    check_names = [holder.name for own in frozen.holders for holder in own]
    assert "trainer-2" not in check_names
    origins.release(f"{1:032x}", committed=True)
    trainers.agent("trainer-0").close()
    with pytest.raises((PeerLost, PeerUnknown)):
        freeze(origins, 2)
    origins.release(f"{2:032x}", committed=False)
    assert set(origins.gone(NAMES, soon(2))) == {"trainer-0", "trainer-2"}
    assert made.parts == ((0, 2), (1, 3))


def test_a_source_that_restarts_is_described_and_told_again_under_the_same_plan(trainers, origins):
    origins.describe(soon())
    made, _ = freeze(origins, 1)
    origins.release(f"{1:032x}", committed=True)
    trainers.agent("trainer-1").close()
    trainers.publish("trainer-1")
    assert origins.describe(soon()) == {}
    again, frozen = freeze(origins, 2)
    assert again == made
    assert [len(own) for own in frozen.holders] == [2, 2]


def test_a_source_that_has_forgotten_the_plan_is_told_again(trainers, origins):
    origins.describe(soon())
    freeze(origins, 1)
    origins.release(f"{1:032x}", committed=True)
    for publication in trainers.publications.values():
        publication._served._plans.clear()
    _, frozen = freeze(origins, 2)
    assert not frozen.failed


def test_replicas_that_hold_different_weights_are_refused(trainers, origins):
    origins.describe(soon())
    trainers.models["trainer-3"]["b"][5] += 1
    with pytest.raises(IntegrityError, match="'trainer-1' and 'trainer-3' hold different weights"):
        freeze(origins, 1)


def test_sources_that_do_not_publish_or_are_not_there_are_named(fleet, trainers):
    fleet("idle")
    origins = Origins(fleet("pusher"), "w", [*NAMES, "idle", "nobody"])
    failed = origins.describe(soon(3))
    assert isinstance(failed["idle"], RegionUnknown)
    assert "does not publish the weights 'w'" in str(failed["idle"])
    assert isinstance(failed["nobody"], PeerUnknown)
    assert list(origins.planned) == NAMES
    assert freeze(origins, 1)[1].failed == {}


def test_an_answer_to_another_question_is_no_answer(trainers, origins, monkeypatch):
    from raynixl.weights.publication import Publication

    origins.describe(soon())
    fine = Publication.freeze

    def older(publication, request, peer):
        return fine(publication, request.model_copy(update={"version": request.version + 5}), peer)

    monkeypatch.setattr(Publication, "freeze", older)
    with pytest.raises(IntegrityError, match="something else"):
        freeze(origins, 1)


def test_a_source_that_names_memory_of_another_life_of_it_is_left_out_for_its_replica(trainers, origins, monkeypatch):
    from raynixl.weights.publication import Publication

    origins.describe(soon())
    fine = Publication.freeze

    def haunted(publication, request, peer):
        frozen = Frozen.from_bytes(fine(publication, request, peer))
        if publication._agent.name == NAMES[1]:
            holder = frozen.holder.model_copy(update={"incarnation": "0" * 32})
            frozen = dataclasses.replace(frozen, holder=holder)
        return frozen.to_bytes()

    monkeypatch.setattr(Publication, "freeze", haunted)
    made, frozen = freeze(origins, 1)
    assert list(frozen.failed) == [NAMES[1]]
    assert isinstance(frozen.failed[NAMES[1]], IntegrityError)
    check(trainers, origins, made, 1, frozen)


def test_a_busy_source_times_out_by_name(trainers, origins):
    origins.describe(soon())
    with trainers.publications["trainer-0"].updating(), trainers.publications["trainer-2"].updating():
        made = plan(list(origins.planned.values()), [TARGET])
        request = Freeze(push="0" * 32, version=1, seconds=0.3, plan=made.key(CHUNK))
        with pytest.raises(TransferTimeout):
            origins.freeze(request, made, CHUNK, soon(0.5))


def test_deltas_are_there_if_every_part_offers_one(trainers, origins):
    origins.describe(soon())
    for version in (1, 2):
        freeze(origins, version, base=version - 1)
        origins.release(f"{version:032x}", committed=True)
    end = soon()
    while any(len(publication._copies._copies) < 2 for publication in trainers.publications.values()):
        assert time.monotonic() < end
        time.sleep(0.01)
    for name in NAMES:
        trainers.models[name]["a"][3] += 1
    _, frozen = freeze(origins, 3, base=2)
    (first, second) = frozen.deltas[0]
    assert (first.part, second.part) == (0, 1)
    assert [len(part.holders) for part in (first, second)] == [2, 2]
    assert first.nbytes < 100 + 5 * 32
    origins.release(f"{3:032x}", committed=True)
    trainers.models["trainer-1"]["a"].add_(1)
    trainers.models["trainer-3"]["a"].add_(1)
    _, frozen = freeze(origins, 4, base=3)
    assert frozen.deltas == {}


def test_a_source_that_was_there_and_is_gone_is_not_waited_for(trainers, origins):
    origins.describe(soon())
    trainers.agent("trainer-2").close()
    began = time.monotonic()
    assert set(origins.describe(soon(90), until=soon(60))) == {"trainer-2"}
    assert time.monotonic() - began < 30  # a moment, but for what else runs on the machine
