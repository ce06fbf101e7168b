"""Pushes between agents of one process: every kind of tensor, and every tie, arrives bit by bit."""

import pytest
import torch
from weights_tools import INSTALLS, Cluster, Policy, same

from raynixl.weights import WeightSync, subscribe


@pytest.mark.parametrize("install", INSTALLS)
def test_a_push_brings_every_bit_to_every_target(fleet, install):
    source, targets = Policy(), [Policy().eval(), Policy().eval()]
    cluster = Cluster(fleet, source, targets, install=install)
    for version in (1, 2, 5):
        with torch.no_grad():
            for tensor in source.state_dict().values():
                tensor.copy_(torch.randn(tensor.shape) * 10)
        report = cluster.sync.push(version)
        assert not report.excluded
        assert sorted(report.ranks) == ["rollout-0", "rollout-1"]
        assert report.nbytes == cluster.publication.layout.nbytes
        for target, subscription in zip(targets, cluster.subscriptions, strict=True):
            assert same(source, target)
            assert subscription.version == version
    assert cluster.publication.version == 5
    text = str(report)
    assert "version 5" in text
    assert "rollout-1" in text
    assert "GB/s" in text


KINDS = {
    "bfloat16": torch.randn(7, 5).to(torch.bfloat16),
    "float16": torch.randn(3).half(),
    "float64": torch.randn(9).double(),
    "fp8": torch.randn(16).to(torch.float8_e4m3fn),
    "fp8 scales": torch.arange(16, dtype=torch.uint8).view(torch.float8_e8m0fnu),
    "fp8 strided": torch.randn(6, 8).to(torch.float8_e5m2).t(),
    "fp4 packed": torch.arange(64, dtype=torch.uint8).view(torch.float4_e2m1fn_x2).view(4, 16),
    "fp4 strided": torch.arange(64, dtype=torch.uint8).view(torch.float4_e2m1fn_x2).view(4, 16).t(),
    "int4 packed": torch.arange(256, dtype=torch.uint8).view(16, 16),
    "nan payloads": torch.tensor([0x7FC01234, -0x3FFFFF, 1, -1], dtype=torch.int32).view(torch.float32),
    "complex128": torch.randn(3, 2, dtype=torch.complex128).t(),
    "imaginary of conjugate": torch.randn(6, dtype=torch.complex64).conj().imag,
    "uint64 strided": torch.arange(12).to(torch.uint64).view(3, 4).t(),
    "empty scalar row": torch.empty(1, 0, 3),
    "bool": torch.rand(33) > 0.5,
    "complex": torch.randn(5, dtype=torch.complex64),
    "conjugate": torch.randn(6, dtype=torch.complex64).conj(),
    "int8": torch.randint(-128, 127, (11,), dtype=torch.int8),
    "int64": torch.randint(-(2**60), 2**60, (4, 4)),
    "uint16": torch.arange(9).to(torch.uint16),
    "empty": torch.empty(0, 4),
    "scalar": torch.tensor(3.5),
    "transposed": torch.randn(8, 3).t(),
    "strided": torch.randn(10, 10)[::2, 1:7:3],
    "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "expanded": torch.randn(4, 1).expand(4, 3),
    "large": torch.randn(5000),
}


@pytest.mark.parametrize("install", ["auto", "swap", "copy"])
def test_every_kind_of_tensor_arrives(fleet, install):
    source = dict(KINDS)
    target = {name: torch.zeros_like(tensor) for name, tensor in KINDS.items()}
    assert not torch.is_conj(target["conjugate"])
    target["transposed"] = torch.zeros(8, 3).t()
    target["strided"] = torch.zeros(10, 10)[::2, 1:7:3]
    target["expanded"] = torch.zeros(4, 3)
    kept = dict(target)
    strides = {name: tensor.stride() for name, tensor in target.items()}
    cluster = Cluster(fleet, source, [target], install=install)
    for version in (1, 2):
        assert not cluster.sync.push(version).excluded
        assert same(source, target)
    assert all(target[name] is kept[name] and target[name].stride() == strides[name] for name in kept)


class Tied(torch.nn.Module):
    """Tied three ways: one parameter twice, a transposed view, and overlapping slices."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(6, 4))
        self.same = self.table
        base = torch.randn(4, 4)
        self.square = torch.nn.Parameter(base)
        self.turned = torch.nn.Parameter(self.square.detach().t())
        line = torch.randn(10)
        self.left, self.right = torch.nn.Parameter(line[:6]), torch.nn.Parameter(line[4:])


@pytest.mark.parametrize("install", INSTALLS)
def test_ties_stay_tied_at_the_target(fleet, install):
    source, target = Tied(), Tied()
    cluster = Cluster(fleet, source, [target], install=install)
    for version in (1, 2, 3):
        with torch.no_grad():
            source.table.add_(1)
            source.square.mul_(2)
            source.left.sub_(3)
        assert not cluster.sync.push(version).excluded
        assert same(source, target)
        assert target.same is target.table
    with torch.no_grad():
        target.square[0, 1] = 77
        target.left[5] = 78
    assert target.turned[1, 0] == 77
    assert target.right[1] == 78


def test_what_is_tied_at_the_source_alone_stays_apart_at_the_target(fleet):
    shared = torch.ones(5)
    target = torch.nn.ParameterDict({"a": torch.zeros(5), "b": torch.zeros(5)})
    cluster = Cluster(fleet, {"a": shared, "b": shared}, [target])
    for version in (1, 2):
        shared.fill_(version)
        assert not cluster.sync.push(version).excluded
        with torch.no_grad():
            target["a"][0] = 9
        assert target["b"].tolist() == [version] * 5


def test_identity_gradients_and_device_are_kept(fleet):
    target = Policy()
    target.embedding.weight.requires_grad_(False)
    target.layers[0].weight.grad = torch.ones(64, 64)
    kept = dict(target.named_parameters())
    cluster = Cluster(fleet, Policy(value=3.0), [target], install="swap")
    cluster.sync.push(1)
    assert all(dict(target.named_parameters())[name] is tensor for name, tensor in kept.items())
    assert not target.embedding.weight.requires_grad
    assert target.layers[0].weight.requires_grad
    assert target.layers[0].weight.grad.sum() == 64 * 64
    target.layers[0](torch.ones(1, 64)).sum().backward()


def test_buffers_come_along_but_not_those_that_are_not_saved(fleet):
    source, target = Policy(), Policy().eval()
    source.norm.num_batches_tracked.fill_(41)
    source.scratch.fill_(5)
    cluster = Cluster(fleet, source, [target])
    cluster.sync.push(1)
    assert target.norm.num_batches_tracked.item() == 41
    assert target.scratch.tolist() == [0, 0, 0]


def test_a_model_made_in_inference_mode_is_a_target(fleet):
    with torch.inference_mode():
        targets = [torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)]
    source = torch.nn.Linear(4, 4)
    cluster = Cluster(fleet, source, targets[:1], install="swap")
    agent = fleet("other")
    with subscribe(agent, "policy", targets[1], install="copy"):
        WeightSync(cluster.trainer, "policy", ["trainer"], ["rollout-0", "other"]).push(1)
    assert torch.equal(targets[0].weight, source.weight)
    assert torch.equal(targets[1].weight, source.weight)


def test_a_sharded_arena_carries_tensors_of_any_size(fleet, monkeypatch):
    for name in ("layout.build_layout", "table.pack"):
        monkeypatch.setattr(f"raynixl.weights.{name}.__kwdefaults__", {"arena_nbytes": 8192})
    source = {f"w{n}": torch.randn(n * 700 + 1) for n in range(8)}
    target = {name: torch.zeros_like(tensor) for name, tensor in source.items()}
    cluster = Cluster(fleet, source, [target])
    assert len(cluster.publication.layout.arenas) > 3
    assert not cluster.sync.push(1).excluded
    assert same(source, target)


def test_a_model_of_empty_tensors_is_pushed(fleet):
    source, target = {"e": torch.empty(0)}, {"e": torch.empty(0)}
    cluster = Cluster(fleet, source, [target])
    assert not cluster.sync.push(1).excluded
    assert cluster.subscriptions[0].version == 1


@pytest.mark.parametrize("count", [1, 3])
def test_a_target_that_has_subscribed_anew_takes_part_in_the_next_push(fleet, count):
    source, targets = Policy(), [Policy() for _ in range(count)]
    cluster = Cluster(fleet, source, targets)
    assert not cluster.sync.push(1).excluded
    cluster.subscriptions[0].close()
    targets[0] = Policy()
    again = subscribe(cluster.subscriptions[0]._agent, cluster.sync.name, targets[0])
    with torch.no_grad():
        for tensor in source.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape))
    report = cluster.sync.push(2)
    assert not report.excluded
    assert again.version == 2
    assert all(same(source, target) for target in targets)
    assert not cluster.sync.push(3).excluded


def test_a_target_that_has_subscribed_anew_with_another_model_is_left_out_of_one_push(fleet):
    source, targets = Policy(), [Policy() for _ in range(2)]
    cluster = Cluster(fleet, source, targets)
    assert not cluster.sync.push(1).excluded
    cluster.subscriptions[0].close()
    part = {name: torch.zeros_like(tensor) for name, tensor in list(source.state_dict().items())[:1]}
    again = subscribe(cluster.subscriptions[0]._agent, cluster.sync.name, part)
    assert list(cluster.sync.push(2).excluded) == [again._agent.name]
    assert not cluster.sync.push(3).excluded
    assert again.version == 3
