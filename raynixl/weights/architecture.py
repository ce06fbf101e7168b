"""Architecture: the numbers of a public configuration, and the parameters that its checkpoint then holds."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass

from raynixl.weights.pieces import TensorInfo

FP8_BLOCK = 128
FP8_DTYPE = "float8_e4m3fn"


class Split(enum.Enum):
    """How tensor parallelism cuts a parameter."""

    WHOLE = "on every rank"
    COLUMN = "along its outputs, dimension 0"
    ROW = "along its inputs, dimension 1"
    VOCABULARY = "along the words, dimension 0, padded"


@dataclass(frozen=True, slots=True)
class Parameter:
    """One tensor of a checkpoint. `units` are heads that must not be cut; `layer` and `expert` say whose it is."""

    info: TensorInfo
    split: Split = Split.WHOLE
    units: int | None = None
    layer: int | None = None
    expert: int | None = None


@dataclass(frozen=True, slots=True)
class Grouped:
    """Attention whose keys and values serve groups of heads."""

    heads: int
    kv_heads: int
    head_dim: int
    has_bias: bool = False
    has_norms: bool = False


@dataclass(frozen=True, slots=True)
class Latent:
    """Attention over compressed keys and values (MLA)."""

    heads: int
    q_rank: int
    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int


@dataclass(frozen=True, slots=True)
class Experts:
    """Routed experts of each layer from `first` on; `has_shared`: one more that is always used, and a gate's bias."""

    count: int
    inner: int
    first: int = 0
    has_shared: bool = False


@dataclass(frozen=True, slots=True)
class Architecture:
    """The numbers of a model; `is_tied`: its embedding is its head; `mtp`: layers that predict further tokens."""

    layers: int
    hidden: int
    inner: int
    vocabulary: int
    attention: Grouped | Latent
    experts: Experts | None = None
    is_tied: bool = False
    mtp: int = 0


# A parameter of a layer, still without its prefix: (name, shape, split, units).
_Row = tuple[str, tuple[int, ...], Split, int | None]


def parameters_of(model: Architecture, *, fp8: bool = False, mtp: bool = False) -> tuple[Parameter, ...]:
    """Return all parameters of a checkpoint, in its order, bfloat16 as published.

    `fp8` gives linear layers as e4m3 with a float32 scale for each block of 128 x 128, as DeepSeek-V3 and Kimi-K2 are
    published; `mtp` adds the layers that predict further tokens.
    """
    layers = model.layers + (model.mtp if mtp else 0)
    found = [_vocabulary("model.embed_tokens.weight", model)]
    for layer in range(layers):
        found += _layer(model, layer, fp8=fp8)
    found.append(_plain("model.norm.weight", (model.hidden,)))
    if not model.is_tied:
        found.append(_vocabulary("lm_head.weight", model))
    return tuple(found)


def _plain(name: str, shape: tuple[int, ...], layer: int | None = None) -> Parameter:
    return Parameter(TensorInfo(name, "bfloat16", shape), layer=layer)


def _vocabulary(name: str, model: Architecture, layer: int | None = None) -> Parameter:
    info = TensorInfo(name, "bfloat16", (model.vocabulary, model.hidden))
    return Parameter(info, Split.VOCABULARY, layer=layer)


def _layer(model: Architecture, layer: int, *, fp8: bool) -> Iterator[Parameter]:
    prefix = f"model.layers.{layer}"
    attention = model.attention
    own = _grouped(model, attention) if isinstance(attention, Grouped) else _latent(model, attention)
    for row in own:
        yield from _parameters(f"{prefix}.self_attn.", row, (layer, None), fp8=fp8)
    experts = model.experts
    if experts is None or layer < experts.first:
        for row in _mlp(model.hidden, model.inner):
            yield from _parameters(f"{prefix}.mlp.", row, (layer, None), fp8=fp8)
    else:
        yield from _moe(model, experts, layer, fp8=fp8)
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield _plain(f"{prefix}.{name}.weight", (model.hidden,), layer)
    if layer >= model.layers:
        yield from _further(model, layer)


def _further(model: Architecture, layer: int) -> Iterator[Parameter]:
    """Give what a layer that predicts further tokens has besides; its embedding and head are copies."""
    prefix, hidden = f"model.layers.{layer}", model.hidden
    yield _vocabulary(f"{prefix}.embed_tokens.weight", model, layer)
    yield _plain(f"{prefix}.enorm.weight", (hidden,), layer)
    yield _plain(f"{prefix}.hnorm.weight", (hidden,), layer)
    yield _plain(f"{prefix}.eh_proj.weight", (hidden, 2 * hidden), layer)
    yield _plain(f"{prefix}.shared_head.norm.weight", (hidden,), layer)
    yield _vocabulary(f"{prefix}.shared_head.head.weight", model, layer)


def _grouped(model: Architecture, own: Grouped) -> Iterator[_Row]:
    for name, heads in (("q", own.heads), ("k", own.kv_heads), ("v", own.kv_heads)):
        yield f"{name}_proj.weight", (heads * own.head_dim, model.hidden), Split.COLUMN, heads
        if own.has_bias:
            yield f"{name}_proj.bias", (heads * own.head_dim,), Split.COLUMN, heads
    yield "o_proj.weight", (model.hidden, own.heads * own.head_dim), Split.ROW, own.heads
    if own.has_norms:
        yield "q_norm.weight", (own.head_dim,), Split.WHOLE, None
        yield "k_norm.weight", (own.head_dim,), Split.WHOLE, None


def _latent(model: Architecture, own: Latent) -> Iterator[_Row]:
    heads = own.heads
    yield "q_a_proj.weight", (own.q_rank, model.hidden), Split.WHOLE, None
    yield "q_a_layernorm.weight", (own.q_rank,), Split.WHOLE, None
    yield "q_b_proj.weight", (heads * (own.nope_dim + own.rope_dim), own.q_rank), Split.COLUMN, heads
    yield "kv_a_proj_with_mqa.weight", (own.kv_rank + own.rope_dim, model.hidden), Split.WHOLE, None
    yield "kv_a_layernorm.weight", (own.kv_rank,), Split.WHOLE, None
    yield "kv_b_proj.weight", (heads * (own.nope_dim + own.value_dim), own.kv_rank), Split.COLUMN, heads
    yield "o_proj.weight", (model.hidden, heads * own.value_dim), Split.ROW, heads


def _mlp(hidden: int, inner: int) -> Iterator[_Row]:
    yield "gate_proj.weight", (inner, hidden), Split.COLUMN, None
    yield "up_proj.weight", (inner, hidden), Split.COLUMN, None
    yield "down_proj.weight", (hidden, inner), Split.ROW, None


def _moe(model: Architecture, experts: Experts, layer: int, *, fp8: bool) -> Iterator[Parameter]:
    prefix = f"model.layers.{layer}.mlp"
    yield _plain(f"{prefix}.gate.weight", (experts.count, model.hidden), layer)
    if experts.has_shared:
        bias = TensorInfo(f"{prefix}.gate.e_score_correction_bias", "float32" if fp8 else "bfloat16", (experts.count,))
        yield Parameter(bias, layer=layer)
    for expert in range(experts.count):
        for row in _mlp(model.hidden, experts.inner):
            yield from _parameters(f"{prefix}.experts.{expert}.", row, (layer, expert), fp8=fp8)
    if experts.has_shared:
        for row in _mlp(model.hidden, experts.inner):
            yield from _parameters(f"{prefix}.shared_experts.", row, (layer, None), fp8=fp8)


def _parameters(prefix: str, row: _Row, of: tuple[int, int | None], *, fp8: bool) -> Iterator[Parameter]:
    """Give a parameter of a layer, and its scales where it is one that FP8 is for."""
    (name, shape, split, units), (layer, expert) = row, of
    is_quantised = fp8 and len(shape) == 2
    info = TensorInfo(prefix + name, FP8_DTYPE if is_quantised else "bfloat16", shape)
    yield Parameter(info, split, units, layer, expert)
    if is_quantised:
        blocks = tuple(-(-size // FP8_BLOCK) for size in shape)
        scales = TensorInfo(f"{prefix}{name}_scale_inv", "float32", blocks)
        yield Parameter(scales, split, None, layer, expert)
