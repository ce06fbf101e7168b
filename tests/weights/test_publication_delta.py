"""Deltas at the source: what changed is offered bit by bit if it is little, and never against a wrong base."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from weights_sources import Puller
from weights_tools import same

from raynixl.errors import RangeError
from raynixl.weights import publish
from raynixl.weights.bank import HostBank
from raynixl.weights.changes import Changes
from raynixl.weights.declare import declare
from raynixl.weights.delta import apply
from raynixl.weights.digest import digest_chunks
from raynixl.weights.layout import build_layout
from raynixl.weights.outgoing import OutgoingRows
from raynixl.weights.pieces import TensorInfo
from raynixl.weights.placement import Mesh, Replicate, Shard
from raynixl.weights.ranges import Ranges
from raynixl.weights.shards import replicated
from raynixl.weights.sharing import TensorSpec
from raynixl.weights.sourcing import ImageRows, Outgoing
from raynixl.weights.tensors import describe

INFOS = [
    TensorInfo("up", "bfloat16", (300, 256)),
    TensorInfo("norm", "float32", (512,)),
    TensorInfo("down", "bfloat16", (256, 300)),
    TensorInfo("steps", "int64", (3, 3)),
]


def full(seed=0):
    torch.manual_seed(seed)
    return {
        "up": torch.randn(300, 256).bfloat16(), "norm": torch.randn(512), "down": torch.randn(256, 300).bfloat16(),
        "steps": torch.arange(9).view(3, 3),
    }  # fmt: skip


def touch(tensors, share, seed):
    """Change about this share of all elements."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in tensors.values():
        where = torch.rand(tensor.shape, generator=generator) < share
        tensor[where] = tensor[where] + 1


def rebuild(puller, frozen, image, base):
    """Return an image from its base version's bytes and the deltas of all parts, whose digests are checked."""
    arrays = [array.copy() for array in base]
    for place, part in enumerate(puller.plan.incoming(image).parts):
        said = frozen[puller.plan.parts[part][0]]
        offer, remote = said.deltas[image], said.holder.remotes()[0]
        remote = type(remote)(remote.owner, remote.incarnation, said.delta_region)
        blob = np.zeros(offer.nbytes, np.uint8)
        local = puller.agent.register(blob)
        puller.agent.read(remote.span(offer.offset, offer.nbytes), local.span(), timeout=20).wait()
        puller.agent.deregister(local)
        offsets = range(0, offer.nbytes, puller.chunk_nbytes)
        chunks = np.array([(place, at, min(puller.chunk_nbytes, offer.nbytes - at)) for at in offsets], np.int64)
        digests = digest_chunks([np.zeros(0, np.uint8)] * place + [blob], chunks, threads=1, seed=said.version)
        assert np.array_equal(digests, offer.digests)
        apply(blob, arrays)
    return arrays


def tensors_of(layout, arrays):
    return {entry.name: HostBank(arrays).tensor(entry) for entry in layout.entries}


def raw(puller, frozen, version):
    """Pull a version in full, and return the bytes of the first image."""
    pulled, layout = puller.pull(version, frozen)[0], puller.images[0]
    arrays = [np.zeros(size, np.uint8) for size in layout.arenas]
    for name, tensor in tensors_of(layout, arrays).items():
        tensor.copy_(pulled[name])
    return arrays


@pytest.fixture
def sharded(fleet):
    """Two sources of halves, each in a mesh of two replicas, and an engine that wants other halves."""
    weights, models, publications = full(), [], []
    mesh = Mesh((("replica", 2), ("fsdp", 2)))
    for number in range(4):
        model = {name: tensor.chunk(2)[number % 2].clone() for name, tensor in weights.items()}
        shards = declare(INFOS, mesh, (Replicate(), Shard(0)), (number // 2, number % 2))
        publications.append(publish(fleet(f"trainer-{number}"), "w", model, shards=shards))
        models.append(model)
    placements = {info.name: (Shard(1),) if info.name == "down" else (Replicate(),) for info in INFOS}
    target = declare(INFOS, Mesh((("tp", 2),)), placements, (1,))
    puller = Puller(fleet("engine"), "w", [f"trainer-{n}" for n in range(4)], [target])
    puller.warm(*publications)
    return models, puller


def change(models, share, seed):
    for number, model in enumerate(models):
        touch(model, share, seed + number % 2)


def test_a_chain_of_deltas_is_bit_equal_to_full_versions_and_small(sharded):
    models, puller = sharded
    push, frozen = puller.freeze(3)
    base = raw(puller, frozen, 3)
    puller.release(push)
    for version in (4, 5, 6):
        change(models, 0.01, 10 * version)
        push, frozen = puller.freeze(version, base=version - 1)
        rebuilt = rebuild(puller, frozen, 0, base)
        base = raw(puller, frozen, version)
        puller.release(push)
        assert all(np.array_equal(one, other) for one, other in zip(rebuilt, base, strict=True))
        nbytes = sum(frozen[number].deltas[0].nbytes for number in (0, 1))
        assert nbytes <= 0.025 * puller.plan.nbytes[0] + 4 * 24
        for replica in (2, 3):
            one, other = frozen[replica].deltas[0], frozen[replica - 2].deltas[0]
            assert np.array_equal(one.digests, other.digests)


def test_nothing_changed_is_next_to_nothing_and_much_changed_is_not_offered(sharded):
    models, puller = sharded
    push, frozen = puller.freeze(3, base=2)
    assert all(said.deltas[0].nbytes < 100 for said in frozen)
    puller.release(push)
    change(models, 0.9, 5)
    push, frozen = puller.freeze(4, base=3)
    assert not any(said.deltas for said in frozen)
    assert not any(said.delta_region for said in frozen)
    puller.release(push)


def test_a_base_that_is_not_here_is_answered_without_a_delta(sharded):
    _, puller = sharded
    push, frozen = puller.freeze(5, base=4)
    assert not any(said.deltas for said in frozen)
    puller.release(push)
    puller.push(6, base=5)
    push, frozen = puller.freeze(7, base=5)
    assert all(said.deltas[0].base == 5 for said in frozen)
    puller.release(push, committed=False)
    push, frozen = puller.freeze(7, base=6)
    assert not any(said.deltas for said in frozen)
    puller.release(push)


def test_a_version_of_a_failed_push_is_no_base_for_what_was_pushed_under_its_number_later(fleet):
    source = {"w": torch.zeros(5000)}
    publish(fleet("trainer"), "w", source, while_busy="copy")
    puller = Puller(fleet("engine"), "w", ["trainer"], [replicated(describe(source))])
    source["w"][:10] = 2
    failed, _ = puller.freeze(1)
    source["w"][:10] = 3
    push, frozen = puller.freeze(1)
    base = raw(puller, frozen, 1)
    puller.release(failed, committed=False)
    puller.release(push)
    source["w"][10:20] = 4
    push, frozen = puller.freeze(2, base=1)
    assert same(tensors_of(puller.images[0], rebuild(puller, frozen, 0, base)), source)
    puller.release(push)


def test_a_publication_without_deltas_offers_none(fleet):
    source = {"w": torch.zeros(5000)}
    publish(fleet("trainer"), "w", source, delta="off")
    puller = Puller(fleet("engine"), "w", ["trainer"], [replicated(describe(source))])
    puller.push(1)
    for version in (2, 3, 4):
        push, frozen = puller.freeze(version, base=version - 1)
        assert not frozen[0].deltas
        puller.release(push)
    assert fleet.agents[0].statistics().regions == 1


def test_without_memory_for_the_blobs_the_version_is_still_frozen(fleet, monkeypatch):
    source = {"w": torch.zeros(5000)}
    publication = publish(fleet("trainer"), "w", source)
    puller = Puller(fleet("engine"), "w", ["trainer"], [replicated(describe(source))])
    puller.warm(publication)

    def refuse(*_arguments):
        raise RangeError("no memory")

    monkeypatch.setattr("raynixl.weights.copies.Copy.delta_region", refuse)
    push, frozen = puller.freeze(3, base=2)
    assert not frozen[0].deltas
    assert same(puller.pull(3, frozen)[0], source)
    puller.release(push)


DTYPES = ["uint8", "bfloat16", "float32", "float64", "complex128"]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(DTYPES), st.integers(1, 700)), min_size=1, max_size=6), st.integers(0, 2**30))
def test_tensors_of_several_dtypes_are_compared_element_by_element(tensors, seed):
    layout = build_layout([TensorSpec(f"t{n}", dtype, (size,)) for n, (dtype, size) in enumerate(tensors)])
    random = np.random.default_rng(seed)
    old = [random.integers(0, 256, size, np.uint8) for size in layout.arenas]
    new = [array.copy() for array in old]
    for entry in layout.entries:
        if random.random() < 0.5:
            new[entry.arena][entry.offset + int(random.integers(entry.nbytes))] ^= 1
    rows = np.array([(0, 0, 0, 0, 0, layout.arenas[0], 1, 0, 0)], np.int64)
    message = Outgoing("a" * 32, 4096, (ImageRows(0, 0, layout.arenas, Ranges(rows).to_bytes()),))
    blobs = Changes(OutgoingRows(message, layout.arenas), layout).encode(HostBank(old), HostBank(new), threads=2)
    if blobs:
        apply(blobs[0], old)
        assert all(np.array_equal(one, other) for one, other in zip(old, new, strict=True))
        assert len(blobs[0]) <= layout.nbytes / 4
    else:
        assert layout.nbytes < 4 * (24 + 20) * len(DTYPES)
