"""Shapes: what parameters the benchmarked models have, and a module that has just those."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING

from raynixl.weights.architecture import Architecture, Grouped, parameters_of
from raynixl.weights.catalogue import parameters
from raynixl.weights.layout import itemsize
from raynixl.weights.pieces import TensorInfo

if TYPE_CHECKING:
    import torch

_TINY = Architecture(
    layers=2, hidden=64, inner=160, vocabulary=500, attention=Grouped(4, 2, 16, has_bias=True), is_tied=True
)


def infos_of(model: str) -> tuple[TensorInfo, ...]:
    """Return the parameters of a model of the catalogue, or of 'tiny'.

    Raises:
        ConfigError: there is no such model.
    """
    found = parameters_of(_TINY) if model == "tiny" else parameters(model)
    return tuple(parameter.info for parameter in found)


def count_nbytes(infos: Sequence[TensorInfo]) -> int:
    """Return the bytes of all parameters together."""
    return sum(prod(info.shape) * itemsize(info.dtype) for info in infos)


def make_module(infos: Sequence[TensorInfo]) -> torch.nn.Module:
    """Return a module with these parameters, touched and zero, at these names; it computes nothing."""
    import torch

    root = torch.nn.Module()
    for info in infos:
        *path, last = info.name.split(".")
        part = root
        for step in path:
            if step not in part._modules:
                part.add_module(step, torch.nn.Module())
            part = part.get_submodule(step)
        data = torch.zeros(info.shape, dtype=getattr(torch, info.dtype))
        part.register_parameter(last, torch.nn.Parameter(data, requires_grad=False))
    return root
