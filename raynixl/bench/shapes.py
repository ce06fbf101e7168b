"""Shapes: what parameters the benchmarked models have, and a module that has just those."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING

from raynixl.errors import ConfigError

if TYPE_CHECKING:
    import torch

Shapes = Mapping[str, tuple[int, ...]]
ITEM_NBYTES = 2
"""All of them are bfloat16."""


def _qwen2(layers: int, hidden: int, inner: int, vocabulary: int, *, heads: int, kv_heads: int) -> Shapes:
    """Return the parameters of a Qwen2 model whose embedding is its head, too."""
    head = hidden // heads
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        for name, rows in (("q", heads * head), ("k", kv_heads * head), ("v", kv_heads * head)):
            shapes[f"{prefix}.self_attn.{name}_proj.weight"] = (rows, hidden)
            shapes[f"{prefix}.self_attn.{name}_proj.bias"] = (rows,)
        shapes[f"{prefix}.self_attn.o_proj.weight"] = (hidden, heads * head)
        shapes[f"{prefix}.mlp.gate_proj.weight"] = shapes[f"{prefix}.mlp.up_proj.weight"] = (inner, hidden)
        shapes[f"{prefix}.mlp.down_proj.weight"] = (hidden, inner)
        shapes[f"{prefix}.input_layernorm.weight"] = shapes[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
    return shapes | {"model.norm.weight": (hidden,)}


_MODELS = {
    "qwen2.5-0.5b": lambda: _qwen2(24, 896, 4864, 151_936, heads=14, kv_heads=2),
    "tiny": lambda: _qwen2(2, 64, 160, 500, heads=4, kv_heads=2),
}


def shapes_of(model: str) -> Shapes:
    """Return the parameters of a model by name.

    Raises:
        ConfigError: there is no such model here.
    """
    if model not in _MODELS:
        raise ConfigError(f"there are no shapes of {model!r}", hint=f"known are: {', '.join(_MODELS)}")
    return _MODELS[model]()


def count_nbytes(shapes: Shapes) -> int:
    """Return the bytes of all parameters together."""
    return sum(prod(shape) for shape in shapes.values()) * ITEM_NBYTES


def make_module(shapes: Shapes) -> torch.nn.Module:
    """Return a module with these parameters, touched and zero, at these names; it computes nothing."""
    import torch

    root = torch.nn.Module()
    for name, shape in shapes.items():
        *path, last = name.split(".")
        part = root
        for step in path:
            if step not in part._modules:
                part.add_module(step, torch.nn.Module())
            part = part.get_submodule(step)
        data = torch.zeros(shape, dtype=torch.bfloat16)
        part.register_parameter(last, torch.nn.Parameter(data, requires_grad=False))
    return root
