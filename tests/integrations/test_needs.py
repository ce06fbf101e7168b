"""Of a checkpoint's tensors only what an engine's loader uses lands, and the loader then does as with all of them."""

import numpy as np
import pytest
import torch

from raynixl.integrations.needs import landing
from raynixl.weights.pieces import TensorInfo
from raynixl.weights.plan import plan
from raynixl.weights.recorder import record
from raynixl.weights.shards import replicated
from raynixl.weights.tensors import describe

SHAPES = {"q": (8, 6), "k": (4, 6), "o": (6, 8), "norm": (6,), "qkv": (12, 6), "other": (5, 5), "scale": ()}
INFOS = [TensorInfo(name, "float32", shape) for name, shape in SHAPES.items()]
FULL = {
    name: torch.arange(1, 1 + int(np.prod(shape)), dtype=torch.float32).reshape(shape) for name, shape in SHAPES.items()
}


class _Engine(torch.nn.Module):
    """A worker of two, number `rank`; "qkv" is fused in the checkpoint, so that it uses three pieces of it."""

    def __init__(self, rank):
        super().__init__()
        self.rank = rank
        for name, shape in {"qk": (6, 6), "o": (6, 4), "norm": (6,), "fused": (6, 6), "scale": ()}.items():
            self.register_parameter(name, torch.nn.Parameter(torch.zeros(shape), requires_grad=False))

    def load_weights(self, weights):
        rank = self.rank
        for name, full in weights:
            if name == "q":
                self.qk.data[:4].copy_(full.narrow(0, rank * 4, 4))
            elif name == "k":
                self.qk.data[4:].copy_(full.chunk(2)[rank])
            elif name == "o":
                self.o.data.copy_(full[:, rank * 4 : rank * 4 + 4])
            elif name in ("norm", "scale"):
                getattr(self, name).data.copy_(full)
            elif name == "qkv":
                for place in range(3):
                    part = full.narrow(0, place * 4 + rank * 2, 2)
                    self.fused.data[place * 2 : place * 2 + 2].copy_(part)


def _pulled(made):
    """Bring what a plan brings, by its pieces."""
    decided = plan([replicated(describe(FULL))], [made.shards])
    own = made.shards.pieces
    landed = list(made.tensors.values())
    for row in range(len(own)):
        info = made.shards.tensors[own.tensor[row]]
        dims = len(info.shape)
        box = tuple(slice(at, at + n) for at, n in zip(own.start[row, :dims], own.size[row, :dims], strict=True))
        given = FULL[info.name][box]
        landed[own.entry[row]].as_strided(given.shape, own.stride[row, :dims].tolist(), int(own.offset[row])).copy_(
            given
        )
    return decided.nbytes[0]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_worker_of_two_pulls_its_half_and_loads_it_as_from_the_whole(rank):
    engine, other = _Engine(rank), _Engine(rank)
    made = landing(INFOS, record(engine.load_weights, INFOS, engine))
    assert {name: tuple(one.shape) for name, one in made.tensors.items()} == {
        "q": (4, 6), "k": (2, 6), "o": (6, 4), "norm": (6,), "qkv": (10, 6), "scale": (),
    }  # fmt: skip
    assert _pulled(made) == sum(one.numel() * 4 for one in engine.parameters())  # no row of qkv between its pieces
    engine.load_weights(made.full())
    other.load_weights(FULL.items())
    for name, parameter in engine.named_parameters():
        assert torch.equal(parameter, other.get_parameter(name)), name
        assert parameter.count_nonzero() == parameter.numel()


def test_what_is_used_twice_is_pulled_once():
    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a = torch.nn.Parameter(torch.zeros(5, 6), requires_grad=False)
            self.b = torch.nn.Parameter(torch.zeros(5, 6), requires_grad=False)

        def load_weights(self, weights):
            for name, full in weights:
                if name == "q":
                    self.a.data.copy_(full[:5])
                    self.b.data.copy_(full[3:])

    engine = Twice()
    made = landing(INFOS, record(engine.load_weights, INFOS, engine))
    assert list(made.tensors) == ["q"]
    assert _pulled(made) == 8 * 6 * 4


def test_without_a_recording_everything_lands():
    made = landing(INFOS, None)
    assert {name: tuple(one.shape) for name, one in made.tensors.items()} == SHAPES
    assert _pulled(made) == sum(one.numel() * 4 for one in FULL.values())
    assert all(torch.equal(one, FULL[name]) for name, one in made.full())


def test_versions_may_land_on_another_device():
    made = landing(INFOS, None, device="meta")
    assert {one.device.type for one in made.tensors.values()} == {"meta"}
    assert {one.device.type for _, one in made.full()} == {"meta"}
