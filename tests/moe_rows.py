"""Rows of tokens: drawn from a seed, packed so that they travel and can be compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from raynixl.moe.quantising import quantise

Packed = tuple[str, tuple[int, ...], bytes]
"""A tensor: dtype, shape, bytes."""


def packed(value: Any) -> Any:
    """Turn results into what travels and can be compared."""
    if isinstance(value, torch.Tensor):
        flat = torch.empty(value.numel(), dtype=value.dtype).copy_(value.detach().reshape(-1))
        return str(value.dtype), tuple(value.shape), flat.view(torch.uint8).numpy().tobytes()
    if isinstance(value, tuple):
        return value if value and isinstance(value[0], str) else tuple(packed(each) for each in value)
    if value is None or isinstance(value, dict):
        return value
    names = ("x", "scales", "topk_idx", "topk_weights", "counts", "offsets")
    whence = {name: packed(_filled(getattr(value, name))) for name in ("sources", "tokens")}
    return {name: packed(getattr(value, name)) for name in names} | whence | {"lost": tuple(getattr(value, "lost", ()))}


def _filled(whence: torch.Tensor) -> torch.Tensor:
    """What is told of rows, where GPUs tell it of all fixed places."""
    return whence[whence >= 0] if whence.dim() == 2 else whence


def unpacked(value: Packed) -> torch.Tensor:
    """Turn a packed tensor back."""
    dtype, shape, data = value
    kind = getattr(torch, dtype.removeprefix("torch."))
    return torch.frombuffer(bytearray(data), dtype=kind).reshape(shape) if data else torch.empty(shape, dtype=kind)


def draw_ids(rng: np.random.Generator, shape: tuple[int, int], pool: Sequence[int], has_duplicates: bool) -> np.ndarray:
    """Draw ids from a pool, -1 where it does not suffice."""
    ids = np.full(shape, -1, np.int64)
    if not pool or not ids.size:
        return ids
    if has_duplicates:
        return rng.choice(np.asarray(pool), shape)
    order = np.argsort(rng.random((shape[0], len(pool))), axis=1)[:, : shape[1]]
    ids[:, : order.shape[1]] = np.asarray(pool)[order]
    return ids


def draw_rows(
    rng: np.random.Generator, count: int, hidden: int, dtype: torch.dtype, kind: str
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Draw rows, and their scales if they are in float8."""
    if kind == "bits":
        width = hidden * dtype.itemsize
        raw = torch.from_numpy(rng.integers(0, 256, (count, width), dtype=np.uint8))
        x = raw.view(dtype) if count else torch.empty((0, hidden), dtype=dtype)
        scales = torch.from_numpy(rng.random((count, hidden // 128), dtype=np.float32))
        return x, scales if dtype == torch.float8_e4m3fn else None
    wide = torch.from_numpy(rng.standard_normal((count, 2 * hidden)))
    part = wide[:, ::2] if kind == "strided" else wide[:, :hidden].contiguous()
    if dtype == torch.float8_e4m3fn:
        x, scales = quantise(part.to(torch.bfloat16))
        return (x.t().contiguous().t(), scales.t().contiguous().t()) if kind == "strided" else (x, scales)
    converted = (wide * 40).clamp(-128, 127).to(dtype) if dtype == torch.int8 else wide.to(dtype)
    return (converted[:, ::2] if kind == "strided" else converted[:, :hidden].contiguous()), None


def same_numbers(mine: Packed, theirs: Packed) -> bool:
    """Whether two packed tensors have the same bits, but that NaN is NaN."""
    if mine == theirs:
        return True
    if mine[:2] != theirs[:2]:
        return False
    one, two = unpacked(mine), unpacked(theirs)
    both = torch.isnan(one) & torch.isnan(two)
    zero = torch.zeros((), dtype=one.dtype)
    return packed(torch.where(both, zero, one)) == packed(torch.where(both, zero, two))
