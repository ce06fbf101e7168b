"""A mixture-of-experts layer whose experts lie on many ranks, and which trains.

router = Router(hidden=64, experts=8, topk=2)
layer = MoELayer(router, {expert: make_expert(expert) for expert in ep.local_experts}, ep=ep)
y = layer(x)                                    # x [..., hidden]; every rank of ep calls it, with tokens of its own
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from raynixl.errors import ConfigError
from raynixl.moe.functional import combine, dispatch
from raynixl.moe.local import LocalParallel

if TYPE_CHECKING:
    from raynixl.moe.functional import Parallel


class Scores(enum.Enum):
    """How a router's logits become weights."""

    SOFTMAX = enum.auto()
    SIGMOID = enum.auto()


class Router(nn.Module):
    """Choose the best `topk` of all experts for each token, with a weight for each.

    `normalised` weights of a token sum to one; with softmax that is the softmax over the chosen alone.
    """

    def __init__(
        self, *, hidden: int, experts: int, topk: int, scores: Scores = Scores.SOFTMAX, normalised: bool = True
    ) -> None:
        super().__init__()
        if not 1 <= topk <= experts:
            raise ConfigError(f"top {topk} of {experts} experts", hint=f"give a topk of 1 to {experts}")
        self.hidden, self.experts, self.topk, self.scores, self.normalised = hidden, experts, topk, scores, normalised
        self.linear = nn.Linear(hidden, experts, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the ids and the weights, both [tokens, topk], best first."""
        logits = self.linear(x)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        scores = logits.softmax(dim=1) if self.scores is Scores.SOFTMAX else logits.sigmoid()
        if self.scores is Scores.SOFTMAX and self.normalised:
            best, chosen = logits.topk(self.topk, dim=1)
            return chosen, best.softmax(dim=1)
        best, chosen = scores.topk(self.topk, dim=1)
        return chosen, best / best.sum(dim=1, keepdim=True) if self.normalised else best

    def extra_repr(self) -> str:
        return f"top {self.topk}, {self.scores.name.lower()}{', normalised' if self.normalised else ''}"


class MoELayer(nn.Module):
    """Each token's sum, by the router's weights, of what its experts make of it.

    `experts` holds the modules of this rank's experts by physical id: `ep.local_experts`, or all of them where there
    is no `ep`. The state dict has them under `experts.<physical id>.`, whatever the rank, so what one rank has saved
    another can load. Without `ep` the layer computes the same in one process, and with weights at the source, which
    is what it is made with unless told otherwise, that is the same to the bit: values and gradients, for any number
    of ranks, as long as each expert sees the same rows in the same order (by source rank, then token).

    Forward and backward are collective: see `raynixl.moe.functional`. An expert that no token has chosen sees zero
    rows, and its gradients are zeros. The router's are those of this rank's tokens: sum them over the ranks, as
    those of everything else that all ranks have alike. Those of an expert are complete: it has seen all its tokens.
    """

    def __init__(
        self,
        router: Router,
        experts: Mapping[int, nn.Module],
        *,
        ep: Parallel | None = None,
        weights_at: str = "source",
        alignment: int = 1,
    ) -> None:
        super().__init__()
        if ep is None:
            ep = LocalParallel(experts=router.experts, hidden=router.hidden, topk=router.topk)
        self.ep, self.router, self.weights_at, self.alignment = ep, router, weights_at, alignment
        self.hold(experts)

    def hold(self, experts: Mapping[int, nn.Module]) -> None:
        """Hold these modules from now on, such as after `ep.place(placement)`; loads are counted from zero.

        Raises:
            ConfigError: they are not those that `ep` has on this rank.
        """
        if tuple(sorted(experts)) != tuple(self.ep.local_experts):
            raise ConfigError(
                f"rank {self.ep.rank} has experts {list(self.ep.local_experts)}, given are {sorted(experts)}",
                hint="give a module for each of ep.local_experts",
            )
        self.experts = nn.ModuleDict({str(expert): experts[expert] for expert in self.ep.local_experts})
        self._last = torch.zeros(len(self.experts), dtype=torch.int64)
        self._total = torch.zeros_like(self._last)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output for this rank's tokens x [..., hidden]."""
        tokens = x.reshape(-1, x.shape[-1])
        return self.mix(tokens, *self.router(tokens)).reshape(x.shape)

    def mix(self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor) -> Tensor:
        """Return the sums for tokens that are routed already: x [tokens, hidden], the others [tokens, topk]."""
        r = dispatch(
            self.ep, x, topk_idx, topk_weights,
            layout="experts", alignment=self.alignment, weights_at=self.weights_at,
        )  # fmt: skip
        self._last = r.counts.clone()
        self._total = self._total.to(r.counts.device) + r.counts
        assert r.offsets is not None
        sizes = cast("list[int]", r.offsets.diff().tolist())
        parts = [expert(rows) for expert, rows in zip(self.experts.values(), torch.split(r.x, sizes), strict=True)]
        return combine(self.ep, torch.cat(parts) if parts else r.x, r.handle)

    def loads(self) -> dict[int, int]:
        """Return how many pairs of a token and an expert each expert here has seen since it is held, by physical id."""
        return self._by_expert(self._total)

    def last_loads(self) -> dict[int, int]:
        """Return the same of the last forward alone."""
        return self._by_expert(self._last)

    def _by_expert(self, counts: Tensor) -> dict[int, int]:
        return dict(zip(self.ep.local_experts, cast("list[int]", counts.tolist()), strict=True))

    def extra_repr(self) -> str:
        return f"rank {self.ep.rank} of {self.ep.world}, weights at the {self.weights_at}"
