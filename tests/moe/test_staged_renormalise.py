"""Two stages that make up for what is missing do so as flat ones do, to the bit where sums are exact."""

from __future__ import annotations

import pytest
import torch
from moe_fault_rows import EXPERTS, HIDDEN, TOKENS, TOPK, explain, given, run_experts

from raynixl.errors import ConfigError, RaynixlError
from raynixl.moe import ExpertParallel, OnLost, TwoLevel
from raynixl.moe.grid import Grid

WORLD = 5
GRID = Grid(((0, 1, 2), (3, 4)))
OPTIONS = {
    "experts": EXPERTS, "hidden": HIDDEN, "topk": TOPK, "max_tokens": TOKENS, "dtype": torch.float32,
    "eager_nbytes": 0, "on_lost": OnLost.RENORMALISE,
}  # fmt: skip
KINDS = {"flat": {"kind": ExpertParallel}, "staged": {"kind": TwoLevel, "grid": GRID}}
WAYS = [(layout, at) for layout in ("tokens", "experts", "slots") for at in ("holder", "source")]
every_way = pytest.mark.parametrize("way", WAYS, ids="-".join)


def dispatch(rank, ep, way, **more):
    one = given(rank, 7)
    if "handle" in more:
        return ep.dispatch(one.x, layout=way[0], weights_at=way[1], **more)
    return ep.dispatch(one.x, one.ids, one.weights, layout=way[0], weights_at=way[1])


@every_way
@pytest.mark.parametrize("gone", [(4,), (0,), (3, 4), (1, 2, 4)], ids=str)
def test_the_rest_makes_up_for_ranks_that_are_masked(crew, way, gone):
    rest = [rank for rank in range(WORLD) if rank not in gone]
    found = []
    for options in KINDS.values():
        with crew.experts(WORLD, **OPTIONS, **options) as layer:
            before = layer.run(lambda rank, ep: dispatch(rank, ep, way))
            whole = layer.run(lambda rank, ep, rs=before: ep.combine(run_experts(ep, rs[rank]), rs[rank].handle))
            assert all(explain(out, given(rank, 7), layer.eps[rank]) == () for rank, out in enumerate(whole))
            layer.run(lambda _, ep: [ep.mask(rank) for rank in gone], rest)
            made = layer.run(lambda rank, ep: dispatch(rank, ep, way), rest)
            rows = dict(zip(rest, made, strict=True))
            outs = layer.run(lambda rank, ep, rs=rows: ep.combine(run_experts(ep, rs[rank]), rs[rank].handle), rest)
            outs += layer.run(lambda rank, ep, rs=before: ep.combine(run_experts(ep, rs[rank]), rs[rank].handle), rest)
            again = layer.run(lambda rank, ep, rs=before: dispatch(rank, ep, way, handle=rs[rank].handle), rest)
            rows = dict(zip(rest, again, strict=True))
            outs += layer.run(lambda rank, ep, rs=rows: ep.combine(run_experts(ep, rs[rank]), rs[rank].handle), rest)
            for number, out in enumerate(outs):
                rank = rest[number % len(rest)]
                assert explain(out, given(rank, 7), layer.eps[rank]) == gone
            found.append(outs)
    assert all(torch.equal(flat, staged) for flat, staged in zip(*found, strict=True))


def test_ranks_that_do_otherwise_are_refused(crew):
    with crew.experts(2, **OPTIONS, kind=TwoLevel) as layer:

        def make(rank, _ep):
            on_lost = OnLost.DROP if rank else OnLost.RENORMALISE
            TwoLevel(layer.groups[rank], **{**OPTIONS, "on_lost": on_lost}, name="other", deadline=1.0)

        errors = layer.errors(make)
    assert all(isinstance(error, RaynixlError) for error in errors)
    assert any(isinstance(error, ConfigError) and "on_lost=drop" in str(error) for error in errors), errors
