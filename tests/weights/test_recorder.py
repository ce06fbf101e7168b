"""What a recorded loader does with values is what the loader itself does with them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loader_tools import Engine, Parallel, checkpoint, numbered
from recorder_tools import Holder, check, infos_of
from torch import nn

from raynixl.errors import ConfigError
from raynixl.weights.pieces import TensorInfo
from raynixl.weights.recorder import FULL, record

pytestmark = pytest.mark.pure

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
    "compared": lambda p, w: p.data.copy_(w if torch.equal(w, p) else w.clone()),
    "positions of values": lambda p, w: p.data[: w.nonzero().shape[0] // 12].copy_(w[:1]),
    "sorted": lambda p, w: p.data.copy_(w.sort(0, descending=True)[0]),
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


def test_a_view_of_another_parameter_gets_its_part_and_is_known_to_share_memory():
    model = Holder(p=(4, 3), q=(4,))
    model.q = nn.Parameter(model.p.data[:, 1], requires_grad=False)
    recording = record(
        lambda weights: [model.p.data.copy_(w) for _, w in weights], [TensorInfo("w", "float32", (4, 3))], model
    )
    pieces = recording.shards.pieces
    assert recording.full == ()
    assert [entry.sharing[:1] for entry in recording.shards.layout.entries] == [(0,), (0,)]
    assert (pieces.start.tolist(), pieces.size.tolist()) == ([[0, 0], [0, 1]], [[4, 3], [4, 1]])


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
    with pytest.raises(ConfigError, match=r"failed at 'w'.*declare"):
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
    assert str(recording.unsupported[0]).startswith(
        "no parameter: aten._local_scalar_dense needs values of layers.0.scale at test_recorder.py:"
    )
    assert len(recording.full) == 50


def test_a_sharded_model_is_refused_since_its_loader_sees_only_the_whole():
    class Wrapped(torch.Tensor):
        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            raise AssertionError("is never asked")

    model = {"p": torch.Tensor._make_wrapper_subclass(Wrapped, (4, 3))}
    with pytest.raises(ConfigError, match="'p' is a Wrapped"):
        record(list, [TensorInfo("w", "float32", (4, 3))], model)


def test_an_operation_that_does_not_fit_fails_as_it_does_with_values():
    model = Holder(p=(4, 3))
    with pytest.raises(ConfigError, match="failed at 'w' without values: RuntimeError"):
        record(
            lambda weights: [model.p.data.copy_(w + torch.ones(5)) for _, w in weights],
            [TensorInfo("w", "float32", (4, 3))],
            model,
        )


def test_a_dtype_that_cannot_be_carried_is_refused():
    with pytest.raises(ConfigError, match="dtype 'int3'"):
        record(list, [TensorInfo("w", "int3", (4, 3))], Holder(p=(4, 3)))


def tiny(kind, **settings):
    """A small model of transformers, and its state with a value of its own in every element."""
    import transformers

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = getattr(transformers, f"{kind}Config")(**sizes, num_key_value_heads=2, vocab_size=40, **settings)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).requires_grad_(False)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return model, shapes


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("Llama", {}),
        ("Qwen2", {"tie_word_embeddings": True}),
        ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    ],
)
def test_transformers_models_load_their_state(kind, settings):
    _, shapes = tiny(kind, **settings)
    values = numbered(shapes)
    if settings.get("tie_word_embeddings"):
        values["lm_head.weight"] = values["model.embed_tokens.weight"]
    load = lambda made, weights: made.load_state_dict(dict(weights), strict=False)  # noqa: E731
    recording = check(lambda: tiny(kind, **settings)[0], values, load)
    assert (recording.full, recording.untouched, recording.partial) == ((), (), ())
