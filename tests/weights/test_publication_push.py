"""What a source may publish, pushed end to end: converted, selected, in place, sharded by torch or by declaration."""

import threading

import pytest
import torch
from weights_tools import Policy, fill, same

from raynixl.errors import ConfigError
from raynixl.weights import WeightSync, publish, subscribe
from raynixl.weights.declare import Concat, declare
from raynixl.weights.pieces import TensorInfo
from raynixl.weights.placement import Mesh, Shard
from raynixl.weights.quantising import dequantise


def connect(fleet, source, target, **options):
    publication = publish(fleet("trainer"), "w", source, **options)
    subscription = subscribe(fleet("rollout"), "w", target)
    return publication, subscription, WeightSync(fleet("pusher"), "w", ["trainer"], ["rollout"], timeout=20)


def test_a_float32_trainer_pushes_to_a_bfloat16_engine(fleet):
    source, target = Policy(value=1.0), Policy().to(torch.bfloat16)
    target.norm.running_mean = target.norm.running_mean.float()
    casts = {"norm.running_mean": "float32", "*": "bfloat16"}
    _, _, sync = connect(fleet, source, target, cast=casts)
    for version in (1, 2, 3):
        with torch.no_grad():
            for tensor in source.state_dict().values():
                tensor.copy_(torch.randn(tensor.shape) * 10)
        assert not sync.push(version).excluded
        wanted = {name: tensor.to(target.state_dict()[name].dtype) for name, tensor in source.state_dict().items()}
        assert same(target.state_dict(), wanted)


def test_without_a_cast_other_dtypes_are_a_table_of_differences(fleet):
    _, _, sync = connect(fleet, Policy(), Policy().to(torch.bfloat16))
    with pytest.raises(ConfigError, match=r"embedding\.weight .*float32 .*bfloat16"):
        sync.push(1)


class Quantised(torch.nn.Module):
    """A layer as an engine has it after quantising."""

    def __init__(self):
        super().__init__()
        self.register_buffer("up_proj_weight", torch.zeros(300, 256).to(torch.float8_e4m3fn))
        self.register_buffer("up_proj_weight_scale_inv", torch.zeros(3, 2))
        self.bias = torch.nn.Parameter(torch.zeros(300, dtype=torch.bfloat16))


def test_an_engine_of_fp8_gets_weights_and_scales(fleet):
    source, target = {"up_proj_weight": torch.randn(300, 256), "bias": torch.randn(300)}, Quantised()
    _, _, sync = connect(fleet, source, target, cast="bfloat16", quantise="fp8")
    for version in (1, 2):
        source["up_proj_weight"].normal_()
        assert not sync.push(version).excluded
        values = dequantise(target.up_proj_weight, target.up_proj_weight_scale_inv)
        assert (values - source["up_proj_weight"]).abs().max() <= source["up_proj_weight"].abs().max() / 16
        assert torch.equal(target.bias, source["bias"].bfloat16())


def test_adapters_alone_are_pushed_and_the_rest_of_the_engine_stays(fleet):
    source, target = Policy(value=1.0), Policy(value=9.0)
    publish(fleet("trainer"), "adapter", source, select="layers.*")
    subscribe(fleet("rollout"), "adapter", target, select="layers.*")
    report = WeightSync(fleet("pusher"), "adapter", ["trainer"], ["rollout"]).push(1)
    assert not report.excluded
    assert report.nbytes < 3 * (64 * 64 + 64) * 4 + 1000
    assert target.layers[2].weight.unique().tolist() == [1.0]
    assert target.embedding.weight.unique().tolist() == [9.0]


def test_a_trainer_in_place_trains_on_as_soon_as_it_is_released(fleet):
    source, target = Policy(value=1.0), Policy().eval()
    publication, _, sync = connect(fleet, source, target, copy_out=False)
    stop = threading.Event()

    def train():
        step = 1
        while not stop.is_set():
            step += 1
            with publication.updating():
                fill(source, step)

    trainer = threading.Thread(target=train)
    trainer.start()
    try:
        for version in range(1, 11):
            assert not sync.push(version).excluded
            assert len(target()) == 1
    finally:
        stop.set()
        trainer.join(10)


@pytest.mark.parametrize("while_busy", ["wait", "refuse", "copy"])
def test_pushes_one_after_the_other_never_find_the_source_busy(fleet, while_busy):
    source, target = Policy(), Policy().eval()
    publication, subscription, sync = connect(fleet, source, target, while_busy=while_busy)
    for version in range(1, 6):
        fill(source, version)
        assert not sync.push(version).excluded
        assert target() == {float(version)}
    assert (publication.version, subscription.version) == (5, 5)


def test_little_changes_travel_as_deltas_to_a_target_of_another_sharding(fleet):
    infos = [TensorInfo(name, "float32", (64, 256)) for name in ("q", "k", "v")]
    weights = {info.name: torch.randn(64, 256) for info in infos}
    models = [{name: tensor.chunk(3)[rank].clone() for name, tensor in weights.items()} for rank in range(3)]
    publications = [
        publish(fleet(f"trainer-{rank}"), "w", model, shards=declare(infos, Mesh((("fsdp", 3),)), (Shard(0),), (rank,)))
        for rank, model in enumerate(models)
    ]
    targets = [{"qkv": torch.zeros(3 * 32, 256)} for _ in range(2)]
    fused = {"qkv": Concat(0, ("q", "k", "v"))}
    for rank, target in enumerate(targets):
        shards = declare(infos, Mesh((("tp", 2),)), (Shard(0),), (rank,), fused=fused)
        subscribe(fleet(f"rollout-{rank}"), "w", target, shards=shards)
    sources = [f"trainer-{rank}" for rank in range(3)]
    sync = WeightSync(fleet("pusher"), "w", sources, [["rollout-0", "rollout-1"]], timeout=20)
    deltas = 0
    for version in range(1, 8):
        weights["k"][version, :5] += 1
        for rank, model in enumerate(models):
            model["k"].copy_(weights["k"].chunk(3)[rank])
        report = sync.push(version)
        assert not report.excluded
        deltas += report.deltas
        for rank, target in enumerate(targets):
            assert torch.equal(target["qkv"], torch.cat([weights[name].chunk(2)[rank] for name in "qkv"]))
    assert deltas >= 2
    assert {publication.version for publication in publications} == {7}
