"""What each rank of a layer has, flat or in two stages: sizes, a placement, and operations carried out in turn."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar, overload

import torch

from raynixl.config import check_timeout
from raynixl.errors import ConfigError
from raynixl.moe import cuda_device
from raynixl.moe.checks import dtype_of, positive
from raynixl.moe.pending import Pending
from raynixl.moe.placement import Placement
from raynixl.record import check_name

if TYPE_CHECKING:
    from raynixl.collectives import Group

T = TypeVar("T")


class LayerRank(ABC):
    """One rank of a layer. Its operations go through `_submit`, in the order in which they were called."""

    def __init__(  # noqa: PLR0913 - the sizes of a layer
        self, group: Group, *, experts: int, hidden: int, topk: int, max_tokens: int, dtype: torch.dtype,
        placement: Placement | Sequence[int] | None, name: str, deadline: float | None, max_ranks: int | None,
    ) -> None:  # fmt: skip
        self.agent = group.agent
        self.name = check_name(name, "name of an expert-parallel group")
        self.rank = group.rank
        self.experts, self.hidden = positive(experts, "experts"), positive(hidden, "hidden")
        self.topk, self.max_tokens = positive(topk, "topk"), positive(max_tokens, "max_tokens")
        self.dtype = dtype_of(dtype)
        self.deadline = check_timeout(deadline, self.agent.config.transfer_timeout, what="deadline")
        members = len(group.members)
        self._limit = _default_limit(members) if max_ranks is None else positive(max_ranks, "max_ranks")
        if members > self._limit:
            raise ConfigError(f"{members} members with max_ranks={max_ranks}", hint="raise max_ranks")
        given = Placement.even(self.experts, members) if placement is None else placement
        self.placement = self._checked(given, members)
        self._turn = threading.RLock()  # held through each operation: they are carried out one after another
        self._worker: ThreadPoolExecutor | None = None
        self._is_closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def local_experts(self) -> tuple[int, ...]:
        """The physical experts that this rank holds; their place here is their local id."""
        return self.placement.experts_of(self.rank)

    def close(self) -> None:
        """Withdraw this rank's memory; idempotent. Results that live keep theirs."""
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.shutdown()
        with self._turn:
            if not self._is_closed:
                self._is_closed = True
                self._shut()

    @abstractmethod
    def _shut(self) -> None:
        """Let go of everything."""

    @overload
    def _submit(self, operation: Callable[[], T], async_: Literal[False] = False) -> T: ...
    @overload
    def _submit(self, operation: Callable[[], T], async_: bool) -> T | Pending[T]: ...
    def _submit(self, operation: Callable[[], T], async_: bool = False) -> T | Pending[T]:
        """Carry out an operation behind all that were called before; in this thread if none is asynchronous."""
        self._check_open()
        if self._worker is None and not async_:
            with self._turn:
                return operation()
        if self._worker is None:
            self._worker = ThreadPoolExecutor(1, thread_name_prefix="raynixl-moe")
        pending = Pending(self._worker.submit(operation))
        return pending if async_ else pending.wait()

    def _within(self, tensor: Any, operation: Callable[[], T], async_: bool) -> Callable[[], T]:
        """Return an operation as it is done by another thread: on the stream that is this one's now."""
        first = tensor[0] if isinstance(tensor, tuple) and tensor else tensor
        return self._as_here(cuda_device.gpu_of(first), operation, async_)

    def _as_here(self, gpu: int | None, operation: Callable[[], T], async_: bool = False) -> Callable[[], T]:
        """Return the same of what is on a GPU, or on none."""
        if gpu is None or not (async_ or self._worker is not None):
            return operation
        here = cuda_device.gpu(gpu).here()

        def within() -> T:
            with here():
                return operation()

        return within

    def _checked(self, given: Placement | Sequence[int], ranks: int) -> Placement:
        placement = given if isinstance(given, Placement) else Placement(given)
        placement.check(experts=self.experts, ranks=ranks)
        return placement

    def _check_open(self) -> None:
        if self._is_closed:
            raise ConfigError(f"the {type(self).__name__} {self.name!r} is closed", hint="make a new one on every rank")


def _default_limit(members: int) -> int:
    """Return how many ranks there may be by default: some more than there are."""
    limit = 16
    while limit < members + 4:
        limit *= 2
    return limit
