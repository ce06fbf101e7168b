"""`synchronise` where nobody has a GPU: ranks agree on who takes part, and who waits is let in without a dispatch."""

from __future__ import annotations

import pytest
import torch

from raynixl import Masked
from raynixl.errors import ConfigError

OPTIONS = {"experts": 4, "hidden": 8, "topk": 1, "max_tokens": 4, "dtype": torch.float32}


def step(rank, ep):
    x = torch.full((4, 8), float(rank + 1))
    r = ep.dispatch(x, torch.arange(4)[:, None])
    return ep.combine(r.x, r.handle)


def test_it_lets_in_who_waits_and_changes_nothing_else(crew):
    with crew.experts(3, **OPTIONS) as layer:
        layer.run(lambda _, ep: ep.synchronise())
        assert all(torch.equal(out, torch.full((4, 8), rank + 1.0)) for rank, out in enumerate(layer.run(step)))
        layer.run(lambda _, ep: ep.mask(2), [0, 1])
        layer.run(step, [0, 1])
        with pytest.raises(Masked):
            step(2, layer.eps[2])

        def back(rank, ep):
            if rank == 2:
                ep.rejoin()
                ep.synchronise()
            else:
                ep.unmask(2)
                while ep.active != (0, 1, 2):
                    ep.synchronise()
            return step(rank, ep)

        assert all(torch.equal(out, torch.full((4, 8), rank + 1.0)) for rank, out in enumerate(layer.run(back)))
        assert "no tensors on a GPU so far" in layer.eps[0].explain()


def test_ranks_that_call_something_else_raise_alike(crew):
    with crew.experts(2, **OPTIONS) as layer:
        errors = layer.errors(lambda rank, ep: ep.synchronise() if rank else step(rank, ep))
        assert [type(error) for error in errors] == [ConfigError] * 2
        assert all(torch.equal(out, torch.full((4, 8), rank + 1.0)) for rank, out in enumerate(layer.run(step)))
        with pytest.raises(ConfigError):
            layer.eps[0].synchronise(deadline=-1.0)
