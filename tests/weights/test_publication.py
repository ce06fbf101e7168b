"""Publications: sources of any sharding, converted and selected tensors, pushes that find them busy."""

import threading
import time

import pytest
import torch
from weights_sources import Puller
from weights_tools import Policy, fill, same

from raynixl.errors import ConfigError, PeerRestarted, RangeError, RaynixlError, TransferTimeout
from raynixl.weights import publish
from raynixl.weights.conversion import Fp8
from raynixl.weights.declare import Concat, declare
from raynixl.weights.pieces import TensorInfo
from raynixl.weights.placement import Mesh, Owner, Replicate, Shard
from raynixl.weights.quantising import dequantise
from raynixl.weights.shards import Shards, replicated
from raynixl.weights.tensors import collect, describe

HIDDEN = 32
INFOS = [
    TensorInfo("q.weight", "float32", (40, HIDDEN)),
    TensorInfo("k.weight", "float32", (16, HIDDEN)),
    TensorInfo("v.weight", "float32", (16, HIDDEN)),
    TensorInfo("o.weight", "float32", (HIDDEN, 40)),
    TensorInfo("norm.weight", "float32", (HIDDEN,)),
]
ROWS, COLUMNS = ("q.weight", "k.weight", "v.weight"), ("o.weight",)


def full(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {info.name: torch.randn(info.shape, generator=generator) for info in INFOS}


def fsdp(rank, ranks):
    """Return the shards of an FSDP rank, every tensor split along its first dimension."""
    return declare(INFOS, Mesh((("fsdp", ranks),)), (Shard(0),), (rank,))


def tensor_parallel(rank, ranks):
    """Return the shards of a rank of an engine: q, k and v fused, o split along its input."""
    placements = {name: (Shard(0),) for name in ROWS} | {name: (Shard(1),) for name in COLUMNS}
    placements["norm.weight"] = (Replicate(),)
    return declare(INFOS, Mesh((("tp", ranks),)), placements, (rank,), fused={"qkv.weight": Concat(0, ROWS)})


def local(tensors, ranks, rank):
    """Return what torch's chunks give to a rank."""
    found = {}
    for name, tensor in tensors.items():
        pieces = tensor.chunk(ranks)
        found[name] = (pieces[rank] if rank < len(pieces) else tensor[:0]).clone()
    return found


def expected(tensors, ranks, rank):
    """Return what a rank of the engine loads from full tensors."""
    qkv = torch.cat([tensors[name].chunk(ranks)[rank] for name in ROWS])
    return {
        "qkv.weight": qkv,
        "o.weight": tensors["o.weight"].chunk(ranks, 1)[rank],
        "norm.weight": tensors["norm.weight"],
    }


def test_sharded_sources_serve_an_engine_that_is_sharded_in_another_way(fleet):
    weights = full()
    models = [local(weights, 3, rank) for rank in range(3)]
    agents = [fleet(f"trainer-{rank}") for rank in range(3)]
    for rank, (agent, model) in enumerate(zip(agents, models, strict=True)):
        publish(agent, "w", model, shards=fsdp(rank, 3), chunk_nbytes=4096)
    targets = [tensor_parallel(rank, 2) for rank in range(2)]
    puller = Puller(fleet("engine"), "w", [agent.name for agent in agents], targets)
    for version in (1, 2):
        images = puller.push(version)
        for rank in range(2):
            assert same(images[puller.plan.image_of[rank]], expected(weights, 2, rank))
        weights = full(version)
        for rank, model in enumerate(models):
            for name, tensor in local(weights, 3, rank).items():
                model[name].copy_(tensor)


def test_replicas_of_a_part_answer_the_same_digests(fleet):
    weights = full()
    mesh = Mesh((("replica", 2), ("fsdp", 2)))
    for number in range(4):
        shards = declare(INFOS, mesh, (Replicate(), Shard(0)), (number // 2, number % 2))
        publish(fleet(f"trainer-{number}"), "w", local(weights, 2, number % 2), shards=shards)
    puller = Puller(fleet("engine"), "w", [f"trainer-{n}" for n in range(4)], [tensor_parallel(0, 1)])
    assert puller.plan.parts == ((0, 2), (1, 3))
    assert same(puller.push(1)[0], expected(weights, 1, 0))


def test_shards_that_the_model_does_not_have_are_refused(fleet):
    weights = full()
    with pytest.raises(ConfigError, match=r"2 tensors of 'w' are not what its shards name: k\.weight, q\.weight|q\.w"):
        publish(fleet("a"), "w", local(weights, 2, 0), shards=fsdp(0, 3))
    missing = {name: tensor for name, tensor in weights.items() if name != "norm.weight"}
    with pytest.raises(ConfigError, match=r"norm\.weight"):
        publish(fleet("b"), "w", missing, shards=fsdp(0, 1))


def test_a_sharded_source_is_cast_on_its_way_out(fleet):
    weights = full()
    for rank in range(2):
        publish(fleet(f"trainer-{rank}"), "w", local(weights, 2, rank), shards=fsdp(rank, 2), cast="bfloat16")
    cast = {name: tensor.to(torch.bfloat16) for name, tensor in weights.items()}
    target = replicated(describe(cast))
    puller = Puller(fleet("engine"), "w", ["trainer-0", "trainer-1"], [target])
    assert same(puller.push(1)[0], cast)
    assert len({shards.table.digest for shards in puller.plan.sources}) == 1


class Block(torch.nn.Module):
    """A model with what is quantised, and what is not."""

    def __init__(self):
        super().__init__()
        self.embed_tokens = torch.nn.Embedding(200, 256)
        self.up_proj = torch.nn.Linear(256, 300)
        self.same = torch.nn.Linear(256, 300)
        self.same.weight = self.up_proj.weight


def test_weights_are_quantised_on_their_way_out_and_the_rest_is_cast(fleet):
    source = Block()
    with publish(fleet("trainer"), "w", source, cast="bfloat16", quantise="fp8") as publication:
        target = {entry.name: publication_zeros(entry) for entry in publication.layout.entries}
        puller = Puller(fleet("engine"), "w", ["trainer"], [replicated(describe(target))])
        for version in (1, 2):
            (image,) = puller.push(version)
            weight = source.up_proj.weight.detach()
            stored, scales = image["up_proj.weight"], image["up_proj.weight_scale_inv"]
            assert (stored.dtype, scales.shape) == (torch.float8_e4m3fn, (3, 2))
            assert (dequantise(stored, scales) - weight).abs().max() <= weight.abs().max() / 16
            assert torch.equal(image["same.weight"].view(torch.uint8), stored.view(torch.uint8))
            assert torch.equal(image["embed_tokens.weight"], source.embed_tokens.weight.to(torch.bfloat16))
            assert torch.equal(image["up_proj.bias"], source.up_proj.bias.to(torch.bfloat16))
            fill(source, version)


def publication_zeros(entry):
    return torch.zeros(entry.shape).to(getattr(torch, entry.dtype))


def test_sharded_weights_are_quantised_as_the_full_ones_are(fleet):
    weight = torch.randn(512, 256)
    infos = [TensorInfo("up.weight", "float32", (512, 256))]
    for rank in range(2):
        shards = declare(infos, Mesh((("fsdp", 2),)), (Shard(0),), (rank,))
        model = {"up.weight": weight.chunk(2)[rank].clone()}
        publish(fleet(f"trainer-{rank}"), "w", model, shards=shards, quantise="fp8")
    whole = publish(fleet("whole"), "w", {"up.weight": weight}, quantise=Fp8())
    target = replicated(describe({entry.name: publication_zeros(entry) for entry in whole.layout.entries}))
    engine = fleet("engine")
    one = Puller(engine, "w", ["whole"], [target]).push(1)
    two = Puller(engine, "w", ["trainer-0", "trainer-1"], [target]).push(1)
    assert same(one[0], two[0])


class Adapted(torch.nn.Module):
    """A layer with an adapter."""

    def __init__(self):
        super().__init__()
        self.base = torch.nn.Linear(64, 64)
        self.lora_A = torch.nn.Linear(64, 4, bias=False)
        self.lora_B = torch.nn.Linear(4, 64, bias=False)


@pytest.mark.parametrize("select", ["lora_*", ["lora_A.*", "lora_B.*"], lambda name: "lora" in name])
def test_adapters_alone_are_published(fleet, select):
    source = Adapted()
    with publish(fleet("trainer"), "w", source, select=select) as publication:
        assert list(publication.layout.by_name) == ["lora_A.weight", "lora_B.weight"]
        assert publication.layout.nbytes == 2 * 64 * 4 * 4
        wanted = {name: tensor for name, tensor in collect(source).items() if "lora" in name}
        puller = Puller(fleet("engine"), "w", ["trainer"], [replicated(describe(wanted))])
        assert same(puller.push(1)[0], wanted)


def test_arguments_that_cannot_be_meant_are_refused(fleet):
    agent = fleet("trainer")
    for wrong in (
        {"select": "nothing*"}, {"select": []}, {"select": 5}, {"while_busy": "skip"}, {"delta": True},
        {"cast": "int8"}, {"quantise": "int4"}, {"chunk_nbytes": 100}, {"copy_threads": 0},
    ):  # fmt: skip
        with pytest.raises((ConfigError, TypeError)):
            publish(agent, "w", Policy(), **wrong)
    publish(agent, "w", Policy()).close()


def puller_of(fleet, source, **options):
    publication = publish(fleet("trainer"), "w", source, **options)
    return publication, Puller(fleet("engine"), "w", ["trainer"], [replicated(describe(collect(source)))])


def test_a_freeze_under_an_unknown_plan_says_that_the_rows_are_to_be_sent_again(fleet):
    source = Policy()
    publication, puller = puller_of(fleet, source)
    publication.close()
    with publish(fleet.agents[0], "w", source):
        with pytest.raises(PeerRestarted):
            puller.freeze(1)
        puller.send_rows(0)
        assert same(puller.push(1)[0], source)


def test_busy_weights_refuse_a_push_at_once_if_they_are_told_to(fleet):
    source = Policy(value=1.0)
    _, puller = puller_of(fleet, source, while_busy="refuse")
    push, frozen = puller.freeze(1)
    with pytest.raises(TransferTimeout, match="still being pulled"):
        puller.freeze(2)
    assert same(puller.pull(1, frozen)[0], source)
    puller.release(push)
    puller.push(2)


def test_a_copy_out_that_outlasts_its_push_makes_no_version(fleet, monkeypatch):
    source = Policy(value=1.0)
    publication, puller = puller_of(fleet, source)
    copy_out = publication._original.copy_out

    def slow(*arguments):
        copy_out(*arguments)
        time.sleep(0.5)

    monkeypatch.setattr(publication._original, "copy_out", slow)
    with pytest.raises(TransferTimeout, match="not copied out in time"):
        puller.freeze(1, seconds=0.3)
    assert publication._copies.base(1) is None
    monkeypatch.undo()
    assert same(puller.push(2)[0], source)


def test_busy_weights_are_copied_aside_and_the_old_version_can_still_be_pulled(fleet):
    source, old = Policy(value=1.0), Policy(value=1.0)
    publication, puller = puller_of(fleet, source, while_busy="copy")
    first, frozen = puller.freeze(1)
    fill(source, 2.0)
    second, again = puller.freeze(2)
    assert same(puller.pull(1, frozen)[0], old)
    assert same(puller.pull(2, again)[0], source)
    with pytest.raises(TransferTimeout, match="not over"):
        puller.freeze(3, seconds=0.3)
    puller.release(second)
    puller.release(first)
    assert publication.version == 2
    puller.push(3)


def test_busy_weights_are_waited_for(fleet):
    _, puller = puller_of(fleet, Policy())
    push, _ = puller.freeze(1)
    done = []
    waiter = threading.Thread(target=lambda: done.append(puller.push(2)))
    waiter.start()
    waiter.join(0.2)
    assert not done
    puller.release(push)
    waiter.join(20)
    assert done


def test_a_source_released_early_may_freeze_again_and_learns_later_that_the_version_was_taken(fleet):
    source = Policy(value=1.0)
    publication, puller = puller_of(fleet, source, while_busy="refuse")
    first, frozen = puller.freeze(1)
    puller.pull(1, frozen)
    puller.release(first, committed=False)
    assert publication.version == 0
    second, _ = puller.freeze(2)
    puller.release(first, committed=True)
    assert publication.version == 1
    with pytest.raises(TransferTimeout):
        puller.freeze(3)
    puller.release(second)
    assert publication.version == 2
    with pytest.raises(ConfigError, match="not above 2"):
        puller.freeze(2)


def test_no_memory_for_a_base_version_means_no_delta_and_no_failure(fleet, monkeypatch):
    source = Policy(value=1.0)
    _, puller = puller_of(fleet, source)
    asked = threading.Event()

    def refuse(*_arguments, **_options):
        asked.set()
        raise RangeError("no memory")

    monkeypatch.setattr("raynixl.weights.copies.Arenas", refuse)
    puller.push(1)
    assert not asked.is_set()
    puller.push(2, base=1)
    assert asked.wait(10)
    fill(source, 2.0)
    push, frozen = puller.freeze(3, base=2)
    assert not frozen[0].deltas
    assert same(puller.pull(3, frozen)[0], source)
    puller.release(push)


def test_shards_travel_with_the_tables_digest_alone(fleet):
    publication = publish(fleet("trainer"), "w", local(full(), 2, 1), shards=fsdp(1, 2))
    puller = Puller(fleet("engine"), "w", ["trainer"], [fsdp(1, 2)])
    assert isinstance(puller.plan.sources[0], Shards)
    assert puller.plan.sources[0].rank == 1
    assert puller.plan.sources[0].layout == publication.layout


def test_a_publication_closed_in_the_middle_of_freezes_answers_with_a_typed_error(fleet):
    publication, puller = puller_of(fleet, Policy(width=512))
    outcomes = []

    def freeze():
        for version in range(1, 2000):
            try:
                puller.release(puller.freeze(version, base=version - 1)[0])
            except RaynixlError as exc:
                outcomes.append(type(exc))
                return

    freezing = threading.Thread(target=freeze)
    freezing.start()
    while publication.version < 3:
        time.sleep(0.01)
    publication.close()
    freezing.join(30)
    assert len(outcomes) == 1
    assert outcomes[0] is not RaynixlError
    assert fleet.agents[0].statistics().regions == 0


def test_pipeline_stages_quantise_what_they_own(fleet):
    infos = [TensorInfo(f"layers.{n}.up.weight", "float32", (256, 128)) for n in range(2)]
    weights = {info.name: torch.randn(256, 128) for info in infos}
    placements = {info.name: (Owner(number),) for number, info in enumerate(infos)}
    for rank, info in enumerate(infos):
        shards = declare(infos, Mesh((("pp", 2),)), placements, (rank,))
        publish(fleet(f"stage-{rank}"), "w", {info.name: weights[info.name].clone()}, shards=shards, quantise="fp8")
    with publish(fleet("whole"), "w", weights, quantise="fp8") as whole:
        target = replicated(describe({entry.name: publication_zeros(entry) for entry in whole.layout.entries}))
        engine = fleet("engine")
        one = Puller(engine, "w", ["whole"], [target]).push(1)
        two = Puller(engine, "w", ["stage-0", "stage-1"], [target]).push(1)
    assert same(one[0], two[0])
