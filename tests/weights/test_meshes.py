"""Meshes of public models: what trainers give arrives at engines as vLLM would have cut and fused it."""

import math

import numpy as np
import pytest

from raynixl.errors import ConfigError
from raynixl.weights.architecture import Architecture, Experts, Grouped, Latent, parameters_of
from raynixl.weights.catalogue import parameters
from raynixl.weights.meshes import SOURCE_WORDS, parse_mesh, ranks_of_replica, source_shards, target_shards
from raynixl.weights.plan import plan

pytestmark = pytest.mark.pure

DENSE = Architecture(
    layers=2, hidden=32, inner=48, vocabulary=100, attention=Grouped(8, 2, 4, has_bias=True, has_norms=True)
)
MOE = Architecture(
    layers=3, hidden=32, inner=64, vocabulary=128,
    attention=Latent(4, 24, 16, 8, 4, 8), experts=Experts(8, 16, first=1, has_shared=True), mtp=1,
)  # fmt: skip


def _full(found):
    draw = np.random.default_rng(5)
    return {one.info.name: draw.integers(1, 1 << 16, one.info.shape, np.uint16) for one in found}


def _arenas(shards, full):
    arenas = [np.zeros(size // 2, np.uint16) for size in shards.layout.arenas]
    own = shards.pieces
    for row in range(len(own)):
        info, entry = shards.tensors[own.tensor[row]], shards.layout.entries[own.entry[row]]
        dims = len(info.shape)
        start, size, stride = own.start[row, :dims], own.size[row, :dims], own.stride[row, :dims]
        at = entry.offset // 2 + own.offset[row]
        for step in np.ndindex(*size[:-1]):
            source = full[info.name][tuple(start[:-1] + step)][start[-1] : start[-1] + size[-1]]
            first = at + int((np.array(step, int) * stride[:-1]).sum())
            arenas[entry.arena][first : first + len(source)] = source
    return arenas


def _synced(found, source, target, full):
    """Carry everything by the plan; return what each target then has, by name."""
    sources, targets = source_shards(found, source), target_shards(found, target)
    decided = plan(sources, targets)
    held = [_arenas(sources[members[0]], full) for members in decided.parts]
    images = []
    for number, layout in enumerate(decided.images):
        arenas = [np.zeros(size, np.uint8) for size in layout.arenas]
        for part, source_arena, source_offset, arena, offset, nbytes in decided.incoming(number).expand().tolist():
            given = held[part][source_arena].view(np.uint8)[source_offset : source_offset + nbytes]
            arenas[arena][offset : offset + nbytes] = given
        images.append(
            {
                entry.name: arenas[entry.arena][entry.offset : entry.offset + entry.nbytes]
                .view(np.uint16)
                .reshape(entry.shape)
                for entry in layout.entries
            }
        )
    return [images[image] for image in decided.image_of], decided


def _rows(tensor, rank, ranks):
    return np.split(tensor, ranks)[rank]


def _columns(tensor, rank, ranks):
    return np.split(tensor, ranks, axis=1)[rank]


@pytest.mark.parametrize("source", ["fsdp=3", "fsdp=2,tp=2", "flat=3", "pp=2,tp=4", "replicas=2,fsdp=2"])
def test_a_dense_model_arrives_fused(source):
    found = parameters_of(DENSE)
    full = _full(found)
    ranks, _ = _synced(found, source, "tp=4,replicas=2", full)
    assert len(ranks) == 8
    for number, have in enumerate(ranks):
        tp = number % 4
        layer = "model.layers.1."
        q, k, v = (full[f"{layer}self_attn.{name}_proj.weight"] for name in "qkv")
        wanted = np.concatenate((_rows(q, tp, 4), _rows(k, tp // 2, 2), _rows(v, tp // 2, 2)))  # 2 heads of keys
        assert np.array_equal(have[layer + "self_attn.qkv_proj.weight"], wanted)
        gate, up = (full[f"{layer}mlp.{name}_proj.weight"] for name in ("gate", "up"))
        wanted = np.concatenate((_rows(gate, tp, 4), _rows(up, tp, 4)))
        assert np.array_equal(have[layer + "mlp.gate_up_proj.weight"], wanted)
        assert np.array_equal(
            have[layer + "mlp.down_proj.weight"], _columns(full[layer + "mlp.down_proj.weight"], tp, 4)
        )
        assert np.array_equal(have[layer + "self_attn.q_norm.weight"], full[layer + "self_attn.q_norm.weight"])
        words = np.zeros((128, 32), np.uint16)
        words[:100] = full["model.embed_tokens.weight"]
        assert np.array_equal(have["model.embed_tokens.weight"], _rows(words, tp, 4))
        assert not any("q_proj" in name or "gate_proj" in name for name in have)


@pytest.mark.parametrize("source", ["fsdp=4", "fsdp=4,ep=4", "pp=2,fsdp=4,ep=2,tp=2", "flat=2"])
@pytest.mark.parametrize("target", ["tp=2,ep=4", "tp=2", "pp=2,tp=2,ep=2,replicas=2"])
def test_experts_arrive_stacked(source, target):
    found = parameters_of(MOE, mtp=True)
    full = _full(found)
    ranks, decided = _synced(found, source, target, full)
    sizes = parse_mesh(target, SOURCE_WORDS)
    tp, ep = sizes["tp"], sizes["ep"]
    seen = 0
    for number, have in enumerate(ranks):
        for layer in range(1, 4):
            prefix = f"model.layers.{layer}.mlp."
            if prefix + "experts.w13_weight" not in have:
                continue
            seen += 1
            per = 8 // ep
            first = number % max(ep, tp) * per if ep > 1 else 0
            parts = [
                [full[f"{prefix}experts.{expert}.{name}_proj.weight"] for name in ("gate", "up", "down")]
                for expert in range(first, first + per)
            ]
            if ep == 1:
                at = number % tp
                parts = [(_rows(a, at, tp), _rows(b, at, tp), _columns(c, at, tp)) for a, b, c in parts]
            assert np.array_equal(
                have[prefix + "experts.w13_weight"], np.stack([np.concatenate(part[:2]) for part in parts])
            )
            assert np.array_equal(have[prefix + "experts.w2_weight"], np.stack([part[2] for part in parts]))
            mla = f"model.layers.{layer}.self_attn."
            wanted = np.concatenate((full[mla + "q_a_proj.weight"], full[mla + "kv_a_proj_with_mqa.weight"]))
            assert np.array_equal(have[mla + "fused_qkv_a_proj.weight"], wanted)
    assert seen == len(ranks) * 3 // sizes["pp"]
    assert ranks_of_replica(target) * sizes["replicas"] == len(ranks)
    assert len(decided.nbytes) == ranks_of_replica(target)


def test_no_byte_is_pulled_twice_and_none_is_missed():
    found = parameters("qwen2.5-0.5b")
    decided = plan(source_shards(found, "fsdp=8"), target_shards(found, "tp=2,replicas=3"))
    whole = 24 * 2 * 896 * 2 + 896 * 2
    split = sum(math.prod(one.info.shape) * 2 for one in found) - whole
    assert decided.nbytes == (whole + split // 2,) * 2


def test_scales_of_fp8_are_spread_as_their_weights():
    model = Architecture(4, 512, 1024, 1000, Latent(16, 256, 128, 128, 64, 128), Experts(32, 256, has_shared=True))
    found = parameters_of(model, fp8=True)
    targets = target_shards(found, "tp=2,ep=4,replicas=2")
    decided = plan(source_shards(found, "fsdp=8,ep=4"), targets)
    assert (len(decided.parts), len(decided.targets), len(decided.nbytes)) == (8, 8, 4)
    shapes = {entry.name: (entry.dtype, entry.shape) for entry in targets[0].layout.entries}
    prefix = "model.layers.0."
    assert shapes[prefix + "mlp.experts.w13_weight"] == ("float8_e4m3fn", (8, 512, 512))
    assert shapes[prefix + "mlp.experts.w13_weight_scale_inv"] == ("float32", (8, 4, 4))
    assert shapes[prefix + "self_attn.fused_qkv_a_proj.weight_scale_inv"] == ("float32", (4, 4))
    assert shapes[prefix + "self_attn.o_proj.weight_scale_inv"] == ("float32", (4, 8))
    assert shapes[prefix + "mlp.gate.e_score_correction_bias"] == ("float32", (32,))


@pytest.mark.parametrize(
    ("model", "side", "text", "message"),
    [
        ("llama-3.1-8b", source_shards, "fsdp", "'fsdp' is no size"),
        ("llama-3.1-8b", source_shards, "", "'' is no size"),
        ("llama-3.1-8b", source_shards, "fsdp=0", "'fsdp=0' is no size"),
        ("llama-3.1-8b", source_shards, "zero=3", "'zero=3' is no size"),
        ("llama-3.1-8b", source_shards, "tp=2,tp=4", "tp is given twice"),
        ("llama-3.1-8b", target_shards, "fsdp=4", "'fsdp=4' is no size"),
        ("llama-3.1-8b", source_shards, "fsdp=4,flat=2", "flat goes with replicas and pp alone"),
        ("llama-3.1-8b", source_shards, "fsdp=99999999", "a mesh of"),
        ("llama-3.1-8b", target_shards, "tp=8,ep=8", "the model has no experts"),
        ("llama-3.1-8b", target_shards, "pp=33", "the model has 32 layers"),
        (
            "llama-3.1-8b",
            target_shards,
            "tp=3",
            "tp=3 does not divide model.layers.0.self_attn.q_proj.weight: 32 heads",
        ),
        ("qwen2.5-0.5b", target_shards, "tp=4", "14 heads"),
        ("qwen2.5-0.5b", target_shards, "pp=2", "the head of this model is its embedding"),
        ("qwen3-30b-a3b", target_shards, "tp=8,ep=12", "ep=12 is no multiple of tp=8"),
        ("qwen3-30b-a3b", target_shards, "tp=8,ep=256", "128 experts"),
        ("qwen3-30b-a3b", source_shards, "fsdp=12,ep=8", "ep=8 does not divide fsdp=12"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(model, side, text, message):
    with pytest.raises(ConfigError, match="(?s)" + message.replace("(", r"\(")):
        side(parameters(model), text)


def test_a_plan_says_how_much_comes_from_each_part():
    found = parameters_of(MOE)
    decided = plan(source_shards(found, "replicas=2,fsdp=4,ep=2"), target_shards(found, "tp=2,ep=4"))
    for image, shares in enumerate(decided.shares.tolist()):
        rows = decided.incoming(image)
        assert shares == [rows.rows[rows.rows[:, 0] == part, 5:7].prod(axis=1).sum() for part in range(4)]
    assert decided.nbytes == tuple(decided.shares.sum(axis=1))
