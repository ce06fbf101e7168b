"""Shapes: what parameters the benchmarked models have, and a module that has just those."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING

from raynixl.weights.architecture import Architecture, Grouped, parameters_of
from raynixl.weights.catalogue import parameters

if TYPE_CHECKING:
    import torch

Shapes = Mapping[str, tuple[int, ...]]
ITEM_NBYTES = 2
"""All of them are bfloat16."""


_TINY = Architecture(
    layers=2, hidden=64, inner=160, vocabulary=500, attention=Grouped(4, 2, 16, has_bias=True), is_tied=True
)


def shapes_of(model: str) -> Shapes:
    """Return the parameters of a model of the catalogue by name, or of "tiny".

    Raises:
        ConfigError: there is no such model.
    """
    found = parameters_of(_TINY) if model == "tiny" else parameters(model)
    return {one.info.name: one.info.shape for one in found}


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
