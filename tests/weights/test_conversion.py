"""Conversion: what tensors are cast and quantised to, that ties survive it, and what is refused by name."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raynixl.errors import ConfigError
from raynixl.weights.conversion import Fp8, conversion, scale_shape
from raynixl.weights.converted import converted
from raynixl.weights.layout import build_layout
from raynixl.weights.pieces import Piece, Pieces, TensorInfo
from raynixl.weights.quantising import dequantise, quantise
from raynixl.weights.shards import Shards, from_pieces, replicated
from raynixl.weights.sharing import TensorSpec
from raynixl.weights.tensors import describe


def forms(shards):
    return {info.name: (info.dtype, info.shape) for info in shards.tensors}


def test_real_numbers_are_cast_and_others_stay():
    tensors = {"w": torch.zeros(4, 3), "n": torch.zeros(2, dtype=torch.int64), "h": torch.zeros(2).half()}
    shards = converted(replicated(describe(tensors)), conversion("bfloat16"))
    assert forms(shards) == {"w": ("bfloat16", (4, 3)), "n": ("int64", (2,)), "h": ("bfloat16", (2,))}
    assert {entry.name: entry.nbytes for entry in shards.layout.entries} == {"w": 24, "n": 16, "h": 4}
    assert Shards.from_bytes(shards.to_bytes()).layout == shards.layout


def test_the_first_glob_that_matches_decides_the_dtype():
    tensors = {"norm.weight": torch.zeros(4), "w": torch.zeros(4), "bias": torch.zeros(4)}
    casts = {"norm.*": "float32", "bias": "float16", "*": "bfloat16"}
    shards = converted(replicated(describe(tensors)), conversion(casts))
    assert [info.dtype for info in shards.tensors] == ["float32", "bfloat16", "float16"]


def test_ties_and_overlaps_survive_a_cast():
    def views(line):
        base = line[:16].view(4, 4)
        return {"a": base, "b": base, "t": base.t(), "left": line[16:22], "right": line[20:]}

    line = torch.randn(26)
    wanted = build_layout(describe(views(line.to(torch.bfloat16))))
    specs = describe(views(line))
    found = converted(replicated(specs), conversion("bfloat16")).layout
    assert [entry.sharing for entry in found.entries] == [entry.sharing for entry in wanted.entries]
    assert [entry.place for entry in found.entries] == [entry.place for entry in wanted.entries]


def test_tied_tensors_that_would_become_different_are_refused():
    weight = torch.zeros(4)
    specs = describe({"embed": weight, "head": weight})
    with pytest.raises(ConfigError, match="'embed' and 'head' share memory"):
        converted(replicated(specs), conversion({"head": "bfloat16"}))


def test_linear_weights_are_quantised_and_embeddings_norms_and_routers_are_not():
    shapes = {
        "embed_tokens.weight": (256, 128), "q_proj.weight": (300, 256), "q_proj.bias": (300,), "norm.weight": (256,),
        "mlp.gate.weight": (128, 256), "mlp.gate_proj.weight": (128, 256), "small.weight": (8, 256),
        "experts.w13_weight": (4, 256, 130), "lm_head.weight": (256, 128),
    }  # fmt: skip
    shards = converted(replicated([TensorSpec(n, "float32", s) for n, s in shapes.items()]), conversion(quantise="fp8"))
    found = forms(shards)
    quantised = {name for name, (dtype, _) in found.items() if dtype == "float8_e4m3fn"}
    assert quantised == {"q_proj.weight", "mlp.gate_proj.weight", "experts.w13_weight"}
    assert found["q_proj.weight_scale_inv"] == ("float32", (3, 2))
    assert found["experts.w13_weight_scale_inv"] == ("float32", (4, 2, 2))
    assert len(found) == len(shapes) + 3
    both = converted(
        replicated([TensorSpec(n, "float32", s) for n, s in shapes.items()]),
        conversion("bfloat16", Fp8("q_proj.weight")),
    )
    assert forms(both)["norm.weight"] == ("bfloat16", (256,))
    assert forms(both)["mlp.gate_proj.weight"][0] == "bfloat16"
    assert forms(both)["q_proj.weight_scale_inv"][0] == "float32"


def test_tied_weights_have_tied_scales():
    weight = torch.zeros(128, 256)
    shards = converted(replicated(describe({"a.weight": weight, "b.weight": weight})), conversion(quantise="fp8"))
    places = {entry.name: entry.place for entry in shards.layout.entries}
    assert places["a.weight"] == places["b.weight"]
    assert places["a.weight_scale_inv"] == places["b.weight_scale_inv"] != places["a.weight"]


def row_shard(first, rows, *, whole=(512, 256)):
    """Return the shards of a rank that holds some rows of one matrix."""
    layout = build_layout([TensorSpec("w", "float32", (rows, whole[1]))])
    piece = Piece(0, (first, 0), (rows, whole[1]), 0, 0, (whole[1], 1))
    return from_pieces([TensorInfo("up.weight", "float32", whole)], layout, Pieces.of([piece]))


def test_a_shard_of_whole_blocks_brings_its_own_scales():
    shards = converted(row_shard(256, 128), conversion(quantise="fp8"))
    assert [entry.name for entry in shards.layout.entries] == ["w", "w_scale_inv"]
    assert shards.layout.by_name["w_scale_inv"].shape == (1, 2)
    scales = shards.pieces[shards.pieces.tensor == 1]
    assert (scales.start.tolist(), scales.size.tolist(), scales.stride.tolist()) == ([[2, 0]], [[1, 2]], [[0, 1]])


def test_the_last_shard_may_end_with_the_tensor():
    shards = converted(row_shard(384, 100, whole=(484, 200)), conversion(quantise="fp8"))
    scales = shards.pieces[shards.pieces.tensor == 1]
    assert (scales.start.tolist(), scales.size.tolist()) == ([[3, 0]], [[1, 2]])


@pytest.mark.parametrize(("first", "rows"), [(64, 128), (128, 64), (0, 200)])
def test_a_shard_inside_a_block_is_refused_by_name(first, rows):
    with pytest.raises(ConfigError, match=r"'up\.weight' is sharded inside blocks"):
        converted(row_shard(first, rows), conversion(quantise="fp8"))


def test_a_flat_shard_is_refused_by_name():
    layout = build_layout([TensorSpec("flat", "float32", (128 * 256,))])
    piece = Piece(0, (0, 0), (128, 256), 0, 0, (256, 1))
    shards = from_pieces([TensorInfo("up.weight", "float32", (512, 256))], layout, Pieces.of([piece]))
    with pytest.raises(ConfigError, match=r"'up\.weight' is sharded inside blocks"):
        converted(shards, conversion(quantise="fp8"))


def test_a_fused_local_tensor_has_the_scales_of_each_part():
    layout = build_layout([TensorSpec("qkv", "float32", (384, 256))])
    infos = [TensorInfo(name, "float32", shape) for name, shape in (("q.weight", (512, 256)), ("k.weight", (128, 256)))]
    pieces = [Piece(0, (256, 0), (256, 256), 0, 0, (256, 1)), Piece(1, (0, 0), (128, 256), 0, 256 * 256, (256, 1))]
    shards = converted(from_pieces(infos, layout, Pieces.of(pieces)), conversion(quantise="fp8"))
    scales = shards.pieces[shards.pieces.tensor >= 2]
    assert [shards.tensors[number].name for number in scales.tensor] == ["q.weight_scale_inv", "k.weight_scale_inv"]
    assert (scales.start.tolist(), scales.size.tolist()) == ([[2, 0], [0, 0]], [[2, 2], [1, 2]])
    assert scales.offset.tolist() == [0, 4]


@pytest.mark.parametrize(
    ("cast", "quantised"),
    [("int8", None), ("fp8", None), ({3: "bfloat16"}, None), ({"*": "int8"}, None), (None, "fp4"), (None, 8)],
)
def test_unknown_conversions_are_refused(cast, quantised):
    with pytest.raises(ConfigError, match="not known"):
        conversion(cast, quantised)


def test_what_has_no_blocks_is_refused_if_it_is_selected():
    specs = [TensorSpec("bias", "float32", (300,)), TensorSpec("n", "int64", (4, 4))]
    for spec in specs:
        with pytest.raises(ConfigError, match=f"'{spec.name}'"):
            converted(replicated([spec]), conversion(quantise=Fp8("*")))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from([torch.float32, torch.bfloat16]), st.integers(0, 99))
def test_quantised_values_are_the_nearest_of_their_block(rows, columns, dtype, seed):
    source = (torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 3).to(dtype)
    stored, scales = torch.empty(rows, columns).to(torch.float8_e4m3fn), torch.empty(scale_shape((rows, columns)))
    quantise(source, stored, scales)
    for down in range(scales.shape[0]):
        for across in range(scales.shape[1]):
            block = (slice(128 * down, 128 * down + 128), slice(128 * across, 128 * across + 128))
            values = source[block].float()
            scale = values.abs().max() / 448
            scale = scale if scale > 0 else torch.tensor(1.0)
            assert scales[down, across] == scale
            assert torch.equal(stored[block].float(), (values / scale).to(torch.float8_e4m3fn).float())
    error = (dequantise(stored, scales) - source.float()).abs()
    assert (error <= source.float().abs() / 16 + scales.max() * 2**-9).all()


def test_stacked_and_strided_weights_are_quantised_matrix_by_matrix():
    source = torch.randn(3, 256, 130).transpose(1, 2)
    stored, scales = torch.empty(3, 130, 256).to(torch.float8_e4m3fn), torch.empty(3, 2, 2)
    quantise(source, stored, scales)
    for number in range(3):
        one, own = torch.empty(130, 256).to(torch.float8_e4m3fn), torch.empty(2, 2)
        quantise(source[number].contiguous(), one, own)
        assert torch.equal(one.view(torch.uint8), stored[number].view(torch.uint8))
        assert torch.equal(own, scales[number])


def test_zeros_have_a_scale_and_what_is_not_finite_stays_visible():
    source = torch.zeros(128, 384)
    source[:, 128:256] = float("nan")
    source[0, 256] = float("inf")
    source[5, 300] = 2.0
    stored, scales = torch.empty(128, 384).to(torch.float8_e4m3fn), torch.empty(1, 3)
    quantise(source, stored, scales)
    values = dequantise(stored, scales)
    assert (values[:, :128] == 0).all()
    assert scales[0, 0] == 1
    assert values[:, 128:256].isnan().all()
    assert not values[:, 256:].isfinite().all()
