"""torch.distributed's all-to-all over gloo, for the MoE benchmark."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class GlooExchange:
    """The default process group's all-to-all, which knows no gaps."""

    skips_own = False

    def begin_equal(self, source: torch.Tensor, into: torch.Tensor) -> Callable[[], object]:
        """Begin to exchange one row with each rank; return what waits for the end."""
        import torch.distributed as dist

        work = dist.all_to_all_single(into, source, async_op=True)
        assert work is not None
        wait: Callable[[], object] = work.wait
        return wait

    def rows(self, source: torch.Tensor, sent: list[int], into: torch.Tensor, received: list[int]) -> None:
        """Exchange so many rows with each rank, ourselves among them."""
        import torch.distributed as dist

        dist.all_to_all_single(into, source, received, sent)
