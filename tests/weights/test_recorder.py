"""What a recorded loader does with values is what the loader itself does with them."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loader_tools import Engine, Parallel, checkpoint, numbered, parameter
from torch import nn

from raynixl.errors import ConfigError
from raynixl.weights.pieces import TensorInfo
from raynixl.weights.recorder import FULL, record


def infos_of(values):
    return [
        TensorInfo(name, str(value.dtype).removeprefix("torch."), tuple(value.shape)) for name, value in values.items()
    ]


def local_tensors(shards, values):
    """The local tensors that a rank gets: each piece copied out of its full tensor, zeros elsewhere."""
    entries, pieces = shards.layout.entries, shards.pieces
    locals_ = [torch.zeros(max(1, int(np.prod(entry.shape))), dtype=getattr(torch, entry.dtype)) for entry in entries]
    for row in range(len(pieces)):
        full = values[shards.tensors[int(pieces.tensor[row])].name]
        start, size = pieces.start[row].tolist()[: full.dim()], pieces.size[row].tolist()[: full.dim()]
        box = full[tuple(slice(at, at + count) for at, count in zip(start, size, strict=True))]
        local = locals_[int(pieces.entry[row])]
        local.as_strided(size, pieces.stride[row].tolist()[: full.dim()], int(pieces.offset[row])).copy_(box)
    return {e.name: local[: int(np.prod(e.shape))].view(e.shape) for e, local in zip(entries, locals_, strict=True)}


def check(make, values, load=None):
    """Record a loader of a model, carry the recording out on values, and compare with the loader on values."""
    load = load or (lambda made, weights: made.load_weights(weights))
    model, loaded, synced = make(), make(), make()
    before = copy.deepcopy(model.state_dict())
    recording = record(lambda weights: load(model, weights), infos_of(values), model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        load(loaded, iter(values.items()))
        got = local_tensors(recording.shards, values)
        for name, tensor in got.items():
            if not name.startswith(FULL):
                synced.get_parameter(name).copy_(tensor)
        load(synced, [(name, got[FULL + name].clone()) for name in recording.full])
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(synced.state_dict()[name], tensor), name
    return recording


SIZES = st.fixed_dictionaries(
    {
        "width": st.sampled_from([4, 6]),
        "inner": st.sampled_from([8, 16]),
        "head": st.sampled_from([2, 4]),
        "heads": st.sampled_from([4, 8]),
        "kv_heads": st.sampled_from([1, 2, 4]),
        "experts": st.sampled_from([0, 0, 4]),
        "rows": st.integers(9, 40),
        "layers": st.integers(1, 2),
        "tied": st.booleans(),
    }
)


@settings(max_examples=60, deadline=None)
@given(sizes=SIZES, size=st.sampled_from([1, 2, 4]), expert_size=st.sampled_from([1, 2]), data=st.data())
def test_an_engine_gets_what_its_loader_would_give_it_on_any_rank(sizes, size, expert_size, data):
    rank, expert = data.draw(st.integers(0, size - 1)), data.draw(st.integers(0, expert_size - 1))
    at = Parallel(rank, size, expert, expert_size)
    recording = check(lambda: Engine(sizes, at), checkpoint(sizes))
    assert recording.full == ()
    assert recording.unsupported == ()
    assert recording.untouched == ()
    rows = {"embed.weight", "head.weight"}  # a rank of many may have nothing but padding
    unused = {name for name in recording.ignored if ".experts." not in name} - rows
    assert unused == {f"layers.{layer}.rotary.inv_freq" for layer in range(sizes["layers"])}


class Holder(nn.Module):
    """A module of some parameters."""

    def __init__(self, **shapes):
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, parameter(*shape))


def one(shape, into, load):
    """Record a loader of one full tensor `w` into one parameter `p`."""
    return check(
        lambda: Holder(p=into), numbered({"w": shape}), lambda made, weights: [load(made.p, w) for _, w in weights]
    )


COPIES = {
    "transposed": ((4, 6), (6, 4), lambda p, w: p.data.copy_(w.t())),
    "transposed and made contiguous": ((4, 6), (6, 4), lambda p, w: p.data.copy_(w.t().contiguous())),
    "transposed and flattened": ((4, 6), (24,), lambda p, w: p.data.copy_(w.t().reshape(-1))),
    "flattened into a part": ((4, 6), (40,), lambda p, w: p.data[3:27].copy_(w.flatten())),
    "a run of the flat tensor": ((4, 6), (13,), lambda p, w: p.data.copy_(w.flatten()[5:18])),
    "reshaped": ((4, 6), (3, 8), lambda p, w: p.data.copy_(w.reshape(3, 8))),
    "reshaped at both ends": ((4, 6), (3, 8), lambda p, w: p.data.view(2, 12).copy_(w.view(2, 12))),
    "every second row": ((8, 3), (4, 3), lambda p, w: p.data.copy_(w[1::2])),
    "interleaved": ((8, 3), (8, 3), lambda p, w: (p.data[::2].copy_(w[:4]), p.data[1::2].copy_(w[4:]))),
    "heads interleaved": (
        (12, 5),
        (12, 5),
        lambda p, w: p.data.copy_(w.view(2, 3, 2, 5).transpose(0, 1).reshape(12, 5)),
    ),
    "a rank's heads out of interleaved ones": (
        (12, 5),
        (6, 5),
        lambda p, w: p.data.copy_(w.view(2, 3, 2, 5).transpose(0, 1).reshape(12, 5)[3:9]),
    ),
    "chosen rows": ((8, 3), (4, 3), lambda p, w: p.data.copy_(w[torch.tensor([6, 0, 1, 7])])),
    "selected columns": ((3, 8), (3, 2), lambda p, w: p.data.copy_(w.index_select(1, torch.tensor([5, 2])))),
    "masked rows": ((4, 3), (2, 3), lambda p, w: p.data.copy_(w[torch.tensor([True, False, False, True])])),
    "into chosen rows": ((2, 3), (5, 3), lambda p, w: p.data.index_copy_(0, torch.tensor([4, 1]), w)),
    "one row put at chosen rows": ((1, 1, 3), (5, 3), lambda p, w: p.data.__setitem__(torch.tensor([0, 3]), w)),
    "put at chosen rows": ((2, 3), (5, 3), lambda p, w: p.data.__setitem__(torch.tensor([0, 3]), w)),
    "joined": ((4, 3), (6, 3), lambda p, w: p.data.copy_(torch.cat([w[3:], w, w[:1]]))),
    "stacked": (
        (4, 3),
        (2, 4, 3),
        lambda p, w: p.data.copy_(torch.stack([w, w])),
    ),
    "repeated": ((2, 3), (4, 9), lambda p, w: p.data.copy_(w.repeat(2, 3))),
    "repeated row by row": ((2, 3), (4, 3), lambda p, w: p.data.copy_(w.repeat_interleave(2, 0))),
    "broadcast": ((3,), (4, 3), lambda p, w: p.data.copy_(w)),
    "one value everywhere": ((), (4, 3), lambda p, w: p.data.fill_(w)),
    "through a buffer": (
        (4, 3),
        (6, 3),
        lambda p, w: (buffer := torch.zeros(6, 3), buffer[1:5].copy_(w), p.data.copy_(buffer)),
    ),
    "written twice": ((4, 3), (4, 3), lambda p, w: (p.data.copy_(w), p.data[1:3, 1:].copy_(w[2:, :2]))),
    "padded by zeros": (
        (4, 3),
        (6, 4),
        lambda p, w: ((p.data.zero_(), p.data[:4, :3].copy_(w))),
    ),
    "split, unbound and put by parts": (
        (4, 3),
        (4, 3),
        lambda p, w: [
            row.copy_(part)
            for row, part in zip(
                p.data.unbind(0), w[1:].split([1, 2])[0].unbind(0) + w.chunk(2)[1].unbind(0), strict=False
            )
        ],
    ),
    "to another device": ((4, 3), (4, 3), lambda p, w: p.data.copy_(w.to("cpu").clone())),
    "by foreach": ((4, 3), (4, 3), lambda p, w: torch._foreach_copy_([p.data[:1], p.data[1:]], [w[:1], w[1:]])),
    "a diagonal": ((4, 4), (4,), lambda p, w: p.data.copy_(w.diagonal())),
}


@pytest.mark.parametrize("way", COPIES)
def test_a_way_of_copying_is_understood(way):
    recording = one(*COPIES[way])
    assert recording.full == ()
    assert recording.unsupported == ()


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_chain_of_views_and_copies_is_understood(data):
    shape = data.draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4))
    steps = data.draw(st.lists(st.sampled_from(sorted(STEPS)), max_size=5))
    seeds = data.draw(st.lists(st.integers(0, 1000), min_size=5, max_size=5))

    def change(w):
        for step, seed in zip(steps, seeds, strict=False):
            w = STEPS[step](w, seed)
        return w

    into = tuple(change(torch.zeros(shape)).shape)
    recording = one(tuple(shape), into, lambda p, w: p.data.copy_(change(w)))
    assert recording.full == ()
    assert recording.unsupported == ()


def _narrow(w, seed):
    dim = seed % max(1, w.dim())
    if w.dim() == 0 or w.shape[dim] == 0:
        return w
    first = seed // 7 % w.shape[dim]
    return w.narrow(dim, first, 1 + seed // 49 % (w.shape[dim] - first))


def _regroup(w, seed):
    count = w.numel()
    inner = [size for size in range(1, count + 1) if count % size == 0] or [1]
    return w.reshape(-1, inner[seed % len(inner)])


STEPS = {
    "narrow": _narrow,
    "turn": lambda w, seed: w.permute([(at + seed) % w.dim() for at in range(w.dim())]) if w.dim() else w,
    "swap": lambda w, seed: w.transpose(0, -1) if w.dim() else w,
    "regroup": _regroup,
    "flatten": lambda w, seed: w.reshape(-1),
    "step": lambda w, seed: w[seed % 2 :: 2] if w.dim() and w.shape[0] > 1 else w,
    "own": lambda w, seed: w.contiguous().clone(),
    "join": lambda w, seed: torch.cat([w[:1], w]) if w.dim() else w,
    "pick": lambda w, seed: w[torch.arange(w.shape[0] - 1, -1, -1)] if w.dim() else w,
    "widen": lambda w, seed: w.unsqueeze(0).expand(2, *w.shape),
}

VALUES = {
    "cast": lambda p, w: p.data.copy_(w.double()),
    "scaled": lambda p, w: p.data.copy_(w * 2),
    "added in place": lambda p, w: p.data.add_(w),
    "scaled in place": lambda p, w: p.data.copy_(w.clone().mul_(3)),
    "with a tensor of values": lambda p, w: p.data.copy_(w + torch.ones(4, 3)),
    "largest": lambda p, w: p.data.copy_(torch.maximum(p.data, w)),
    "by an output": lambda p, w: torch.mul(w, 2, out=p.data),
    "filled by a value": lambda p, w: p.data.fill_(w[0, 0].item()),
    "asked": lambda p, w: p.data.copy_(w if (w > 0).all() else -w),
    "rows chosen by values": lambda p, w: p.data[:2].copy_(w[w[:, 0] > 5][:2]),
}


@pytest.mark.parametrize("way", VALUES)
def test_a_parameter_that_takes_more_than_copies_gets_the_full_tensor_for_it_alone(way):
    def load(made, weights):
        for name, w in weights:
            VALUES[way](made.p, w) if name == "w" else made.q.data.copy_(w.t())

    recording = check(lambda: Holder(p=(4, 3), q=(3, 4)), numbered({"w": (4, 3), "other": (4, 3)}), load)
    assert recording.full == ("w",)
    (refused,) = recording.unsupported
    assert refused.tensors == ("w",)
    assert "test_recorder.py" in refused.line
    assert "w" in refused.line.split(": ", 1)[1]
    assert [entry.name for entry in recording.shards.layout.entries] == ["q", FULL + "w"]


def test_a_refusal_names_parameter_operation_tensor_and_line():
    def load(made, weights):
        for _, w in weights:
            made.p.data.copy_(w.half().float())

    recording = check(lambda: Holder(p=(4, 3)), numbered({"layer.w": (4, 3)}), load)
    text = str(recording.unsupported[0])
    assert text.startswith("p: ")
    assert " of layer.w at test_recorder.py:" in text
    assert "made.p.data.copy_(w.half().float())" in text


def test_all_tensors_of_a_parameter_are_full_if_one_of_them_is_more_than_copied():
    def load(made, weights):
        for name, w in weights:
            made.p.data["ab".index(name)].copy_(w if name == "a" else w * 2)

    assert check(lambda: Holder(p=(2, 3)), numbered({"a": (3,), "b": (3,)}), load).full == ("a", "b")


def test_what_is_overwritten_by_a_copy_is_not_missed():
    def load(made, weights):
        for _, w in weights:
            made.p.data.copy_(w * 2)
            made.p.data.copy_(w)

    assert check(lambda: Holder(p=(4, 3)), numbered({"w": (4, 3)}), load).full == ()


def test_a_tensor_that_goes_into_no_parameter_is_full():
    class Model(Holder):
        scale = torch.zeros(3)

    def load(made, weights):
        for name, w in weights:
            (made.scale if name == "scale" else made.p.data).copy_(w)

    recording = check(lambda: Model(p=(3,)), numbered({"w": (3,), "scale": (3,)}), load)
    assert recording.full == ("scale",)
    assert "no parameter" in recording.unsupported[0].why


def test_values_of_the_loader_itself_are_refused_and_zeros_are_not():
    def load(made, weights):
        for _, w in weights:
            made.p.data.fill_(1)
            made.p.data[:4].copy_(w)
            made.q.data.zero_()
            made.q.data[:4].copy_(w)

    recording = check(lambda: Holder(p=(6, 3), q=(6, 3)), numbered({"w": (4, 3)}), load)
    assert [refused.parameter for refused in recording.unsupported] == ["p"]
    assert recording.partial == ()


def test_what_is_left_over_is_reported():
    def load(made, weights):
        for name, w in weights:
            if name == "w":
                made.p.data[:4].copy_(w)

    recording = check(lambda: Holder(p=(6, 3), q=(2,)), numbered({"w": (4, 3), "v": (2,)}), load)
    assert (recording.partial, recording.untouched, recording.ignored) == (("p",), ("q",), ("v",))


def test_tied_parameters_lie_in_one_place():
    def tied():
        model = Holder(p=(4, 3), q=(4, 3))
        model.q = model.p
        return model

    recording = check(tied, numbered({"w": (4, 3)}), lambda made, weights: [made.q.data.copy_(w) for _, w in weights])
    first, second = recording.shards.layout.entries
    assert (first.name, second.name) == ("p", "q")
    assert first.place == second.place


def test_a_view_of_another_parameter_gets_its_part():
    def overlapping():
        model = Holder(p=(4, 3), q=(4,))
        model.q = nn.Parameter(model.p.data[:, 1], requires_grad=False)
        return model

    recording = check(
        overlapping, numbered({"w": (4, 3)}), lambda made, weights: [made.p.data.copy_(w) for _, w in weights]
    )
    assert recording.full == ()
    assert len(recording.shards.layout.entries) == 2


def test_a_model_on_the_meta_device_records_the_same():
    sizes = {
        "width": 4,
        "inner": 8,
        "head": 2,
        "heads": 4,
        "kv_heads": 2,
        "experts": 4,
        "rows": 11,
        "layers": 1,
        "tied": True,
    }
    values = checkpoint(sizes)
    real = Engine(sizes, Parallel(1, 2))
    with torch.device("meta"):
        bare = Engine(sizes, Parallel(1, 2))
    digests = {record(model.load_weights, infos_of(values), model).shards.digest for model in (real, bare)}
    assert len(digests) == 1
    assert all(tensor.is_meta for tensor in bare.state_dict().values())


def test_a_loader_that_replaces_parameters_leaves_the_model_as_it_was():
    def load(made, weights):
        for _, w in weights:
            made.p = nn.Parameter(w.clone(), requires_grad=False)

    model = Holder(p=(4, 3))
    kept = model.p
    recording = record(lambda weights: load(model, weights), [TensorInfo("w", "float32", (4, 3))], model)
    assert recording.full == ()
    assert model.p is kept
    assert not kept.is_meta


@pytest.mark.parametrize(("rows", "full"), [(4, ()), (2, ("w",))])
def test_data_of_a_bare_model_may_be_replaced_by_its_like(rows, full):
    def load(made, weights):
        for _, w in weights:
            made.p.data = w[:rows]

    model = Holder(p=(4, 3)).to("meta")
    recording = record(lambda weights: load(model, weights), [TensorInfo("w", "float32", (4, 3))], model)
    assert recording.full == full
    assert model.p.shape == (4, 3)
    assert all("another shape" in refused.why for refused in recording.unsupported)


def test_a_loader_that_feeds_nothing_is_an_error():
    with pytest.raises(ConfigError, match="no parameter"):
        record(list, [TensorInfo("w", "float32", (5, 3))], Holder(p=(4, 3)))


def test_a_loader_that_fails_is_an_error_that_names_the_tensor():
    model = Holder(p=(4, 3))
    with pytest.raises(ConfigError, match="failed at 'w'.*declare"):
        record(lambda weights: [model.p.data.copy_(w) for _, w in weights], [TensorInfo("w", "float32", (5, 3))], model)
    with pytest.raises(ConfigError, match="failed at 'w'"):
        record(lambda weights: [w.numpy() for _, w in weights], [TensorInfo("w", "float32", (5, 3))], model)


def test_values_asked_of_every_layer_take_two_runs_alone():
    calls = []

    def load(weights):
        calls.append(1)
        for name, w in weights:
            if name.endswith("scale"):
                model.p.data.fill_(w.item())
            else:
                model.q.data.copy_(w)

    model = Holder(p=(), q=(2,))
    infos = [
        TensorInfo(f"layers.{n}.{kind}", "float32", (2,) * (kind == "w")) for n in range(50) for kind in ("scale", "w")
    ]
    recording = record(load, infos, model)
    assert len(calls) == 2
    assert len(recording.full) == 50
