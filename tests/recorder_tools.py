"""Carry a recording out on values, through a plan, and compare it with the loader itself."""

from __future__ import annotations

import copy

import numpy as np
import torch
from loader_tools import numbered, parameter
from torch import nn

from raynixl.weights.bank import HostBank
from raynixl.weights.pieces import TensorInfo
from raynixl.weights.plan import plan
from raynixl.weights.recorder import FULL, record
from raynixl.weights.shards import replicated
from raynixl.weights.sharing import TensorSpec


def infos_of(values):
    return [
        TensorInfo(name, str(value.dtype).removeprefix("torch."), tuple(value.shape)) for name, value in values.items()
    ]


def carried(shards, values):
    """The local tensors that a rank with these shards gets from a source that has everything whole."""
    source = replicated([TensorSpec(info.name, info.dtype, info.shape) for info in infos_of(values)])
    arenas = [np.zeros(nbytes, np.uint8) for nbytes in source.layout.arenas]
    for entry in source.layout.entries:
        if entry.nbytes:
            HostBank(arenas).tensor(entry).copy_(values[entry.name])
    made = plan([source], [shards])
    image, ranges = made.images[0], made.incoming(0)
    target = [np.zeros(nbytes, np.uint8) for nbytes in image.arenas]
    for _, source_arena, source_offset, arena, offset, nbytes in ranges.expand().tolist():
        target[arena][offset : offset + nbytes] = arenas[source_arena][source_offset : source_offset + nbytes]
    distinct = {entry.place: entry.nbytes for entry in image.entries if entry.nbytes}
    assert ranges.nbytes == made.nbytes[0] <= sum(distinct.values())
    return {entry.name: HostBank(target).tensor(entry) for entry in image.entries}


def check(make, values, load=None):
    """Record a loader of a model, carry the recording out on values, and compare with the loader on values."""
    load = load or (lambda made, weights: made.load_weights(weights))
    model, loaded, synced = make(), make(), make()
    before = copy.deepcopy(model.state_dict())
    recording = record(lambda weights: load(model, weights), infos_of(values), model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        load(loaded, iter(values.items()))
        got = carried(recording.shards, values)
        for name, tensor in got.items():
            if not name.startswith(FULL):
                synced.get_parameter(name).copy_(tensor)
        load(synced, recording.to_load(got))
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(synced.state_dict()[name], tensor), name
    return recording


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
