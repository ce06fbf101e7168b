"""A combine on a GPU: what goes back, and the sum, two kernels and no word of the host's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from raynixl.errors import ConfigError, RaynixlError
from raynixl.moe.calls import CODES
from raynixl.moe.cuda_dispatch import refusal_of
from raynixl.moe.cuda_layer import address, nanoseconds
from raynixl.moe.cuda_nothing import arrive_at, give_nothing, sum_nothing
from raynixl.moe.cuda_structs import Give, Giving, Kind, Sum, Summing
from raynixl.moe.result import Combined

if TYPE_CHECKING:
    from torch import Tensor

    from raynixl.moe.cuda_calls import CudaCombineCall
    from raynixl.moe.cuda_layer import Call, GpuLayer
    from raynixl.moe.cuda_result import CudaHandle


@dataclass(slots=True, eq=False)
class CudaCombine:
    """One combine of one rank."""

    layer: GpuLayer
    call: CudaCombineCall
    topk: int
    renormalises: bool
    seconds: float
    error: RaynixlError | None

    def run(self, mask: int) -> Combined | RaynixlError:
        """Put it on the current stream; return what is wrong with our call, if anything is."""
        with self.layer.begin(mask) as op:
            if self.error is not None:
                self._skip(op)
                return self.error
            call = self.call
            if op.is_captured and not call.is_summed:
                return ConfigError(
                    "pairs that come back as they are cannot be captured", hint="leave summed=False away"
                )
            assert call.y is not None
            assert call.handle is not None
            handle = call.handle.for_ranks(self.layer.ranks)
            handle.use_on(self.layer.gpu)
            self._give(op, call.y, handle)
            return self._sum(op, call.y, handle)

    def _give(self, op: Call, y: Tensor, handle: CudaHandle) -> None:
        call, layer = self.call, self.layer
        beside_at, nbytes = call.items()
        made = Give(
            layer=layer.address, y=address(y), y_stride=y.stride(0) * y.element_size() if len(y) else 0,
            beside=address(call.weights), row_ids=address(handle.row_ids), counts=address(handle.counts),
            signature=call.signature(), hidden=y.shape[1], dtype=CODES[y.dtype], item_nbytes=nbytes,
            beside_at=beside_at, topk=handle.topk, ranks=layer.ranks, mode=_giving(handle),
            is_packed=handle.is_packed, y_rows=len(y),
        )  # fmt: skip
        pairs = None
        if made.mode != Giving.ROWS:
            pairs = handle.positions if handle.layout == "experts" else pair_table(handle.row_ids)
            made.pairs = address(pairs)
            made.weights = address(handle.row_weights) if made.mode == Giving.SUMS else 0
        rows = handle.max_tokens
        op.launch("give", made, layer.grid("give", rows=rows, nbytes=nbytes * (handle.topk if call.by_pair else 1)))

    def _sum(self, op: Call, y: Tensor, handle: CudaHandle) -> Combined:
        call, layer = self.call, self.layer
        tokens, hidden = handle.call.tokens, y.shape[1]
        rows = tokens if call.is_summed else tokens * handle.topk
        out = layer.gpu.empty((rows, hidden), y.dtype) if call.out is None or not call.is_summed else call.out
        back = None if call.weights is None else layer.gpu.empty((tokens, handle.topk), torch.float32)
        beside_at, nbytes = call.items()
        waits = not layer.waits_apart(rows * nbytes * handle.topk)
        if not waits:
            first = arrive_at(layer, Kind.COMBINE, nanoseconds(self.seconds), signature=call.signature())
            op.launch("arrive", first, (1, 1, 1))
        made = Sum(
            layer=layer.address, row_of=address(handle.row_of), holder_of=address(handle.holder_of),
            sent=address(handle.sent), weights=address(handle.weights if call.by_pair or self.renormalises else None),
            out=address(out), out_stride=out.stride(0) * out.element_size() if rows else 0, out_weights=address(back),
            signature=call.signature(), deadline=nanoseconds(self.seconds), tokens=tokens, topk=handle.topk,
            ranks=layer.ranks, hidden=hidden, dtype=CODES[y.dtype], out_dtype=CODES[out.dtype],
            bias_count=len(call.biases), item_nbytes=nbytes, beside_at=beside_at,
            mode=Summing.ROWS if not call.by_pair else Summing.PAIRS if call.is_summed else Summing.APART,
            renormalises=self.renormalises, waits=waits, waited=address(call.waited),
            waited_count=0 if call.waited is None else len(call.waited),
        )  # fmt: skip
        for number, bias in enumerate(call.biases if call.is_summed else ()):
            made.biases[number], made.bias_dtype = address(bias), CODES[bias.dtype]
            made.bias_strides[number] = bias.stride(0) * bias.element_size() if bias.dim() == 2 and tokens else 0
        op.launch("sum", made, layer.grid("sum", rows=rows, nbytes=nbytes, waits=waits))
        if not call.is_summed:
            out = out[(handle.holder_of >= 0).flatten()]
        return Combined(out, back, ())

    def _skip(self, op: Call) -> None:
        """Take part with nothing."""
        layer = self.layer
        none = give_nothing(layer, self.topk, refusal_of(self.error))
        op.launch("give", none, layer.grid("give", rows=0, nbytes=0))
        nothing = sum_nothing(layer, self.topk, nanoseconds(self.seconds))
        op.launch("sum", nothing, layer.grid("sum", rows=0, nbytes=0))


def pair_table(row_ids: Tensor) -> Tensor:
    """Return by row and k the number of its pair among those that have an expert, -1 for none."""
    valid = row_ids >= 0
    numbers = valid.flatten().cumsum(0, dtype=torch.int32).view(row_ids.shape) - 1
    return torch.where(valid, numbers, -1).to(torch.int32)


def _giving(handle: CudaHandle) -> Giving:
    if handle.weights_at == "source":
        return Giving.PAIRS
    return Giving.SUMS if handle.layout == "experts" else Giving.ROWS
