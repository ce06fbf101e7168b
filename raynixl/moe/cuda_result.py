"""Results on a GPU: the handle of a dispatch there, and who was lost, as far as that is known when it is asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, overload

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from raynixl.moe.cuda_calls import CudaDispatchCall
    from raynixl.moe.cuda_device import Gpu


@dataclass(frozen=True, slots=True, eq=False)
class CudaHandle:
    """The layout of one dispatch on a GPU: what its combine needs, and a cached dispatch. A value.

    Its tensors are on the GPU, and hold what kernels have written: nothing here waits for them.
    """

    call: CudaDispatchCall
    """What was asked for, with the ids and weights of the source."""
    ranks: int
    """How many ranks the tables below have places for."""
    row_of: Tensor
    """By token and rank: the row's number among ours there, or -1. int32."""
    holder_of: Tensor
    """By token and k: the rank that got it; -1 nobody was named, -2 nobody takes part who has it. int32."""
    sent: Tensor
    """By rank: how many of our rows went there. int32."""
    counts: Tensor
    """By source: how many rows came from there. int32."""
    row_ids: Tensor
    """By row that came and k: the local id of the expert, or -1. int32; in layout "slots" beyond the rows, too."""
    row_weights: Tensor | None
    positions: Tensor | None
    """Layout "experts": by row and k, where the pair lies. int32."""
    padded: int
    """Layout "experts": rows, padding included."""
    loads: tuple[int, ...] | None
    """How many pairs each local expert has, where the host knows it."""
    placement: int
    """The digest of the placement that it was made under."""
    number: int
    """Another one for each dispatch, the same on all ranks."""
    session: int
    world: int
    max_tokens: int
    stream: int
    """On which its tensors were made."""
    is_packed: bool
    """Whether rows lie end to end, rather than in fixed places of their sources."""
    lost: Sequence[int] = ()

    @property
    def layout(self) -> str:
        """That of the dispatch."""
        return self.call.layout

    @property
    def weights_at(self) -> str:
        """Where weights are multiplied by."""
        return self.call.weights_at

    @property
    def alignment(self) -> int:
        """That of each expert's rows in layout "experts"."""
        return self.call.alignment

    @property
    def weights(self) -> Tensor | None:
        """The source's weights [tokens, topk], float32, if any."""
        return self.call.weights

    @property
    def topk(self) -> int:
        """Experts of a token."""
        return int(self.row_ids.shape[1])

    @property
    def rows(self) -> int:
        """How many rows there are; in layout "slots" how many there can be."""
        return len(self.row_ids)

    @property
    def sources(self) -> Tensor:
        """By row: the rank that it came from; in layout "slots" [world, max_tokens], -1 beyond a source's rows."""
        ranks = torch.arange(self.ranks, dtype=torch.int32, device=self.counts.device)
        if self.layout != "slots":
            return ranks.repeat_interleave(self.counts, output_size=self.rows)
        places = torch.arange(self.max_tokens, dtype=torch.int32, device=self.counts.device)
        return torch.where(places < self.counts[: self.world, None], ranks[: self.world, None], -1)

    def use_on(self, gpu: Gpu) -> None:
        """Have its tensors live until what is put on the current stream is through."""
        if gpu.stream() != self.stream:
            mine = (self.row_of, self.holder_of, self.sent, self.counts, self.row_ids, self.row_weights, self.positions)
            gpu.use((*mine, self.call.ids, self.call.weights))

    def plain(self) -> CudaHandle:
        """Return the same layout without weights: combine adds up what it is given."""
        return replace(self, call=replace(self.call, weights=None), row_weights=None)

    def for_ranks(self, ranks: int) -> CudaHandle:
        """Return the same with places for more ranks, who have joined since."""
        more = ranks - self.ranks
        if more <= 0:
            return self
        none, zeros = torch.nn.functional.pad(self.row_of, (0, more), value=-1), (0, more)
        return replace(
            self, ranks=ranks, row_of=none, sent=torch.nn.functional.pad(self.sent, zeros),
            counts=torch.nn.functional.pad(self.counts, zeros),
        )  # fmt: skip


class LostRanks(Sequence[int]):
    """Ranks that were lost in an operation on a GPU, as far as it has come when they are looked at. Like a tuple."""

    def __init__(self, look: Callable[[], tuple[int, ...]]) -> None:
        self._look = look

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[int, ...]: ...
    def __getitem__(self, index: int | slice) -> Any:
        return self._look()[index]

    def __len__(self) -> int:
        return len(self._look())

    def __iter__(self) -> Iterator[int]:
        return iter(self._look())

    def __eq__(self, other: object) -> bool:
        return self._look() == (tuple(other) if isinstance(other, Sequence) else other)

    def __hash__(self) -> int:
        return hash(self._look())

    def __repr__(self) -> str:
        return repr(self._look())
