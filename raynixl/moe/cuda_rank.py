"""Ranks whose tensors may be on a GPU: what is done there, when windows are agreed on, what the host carries."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from raynixl.config import check_timeout
from raynixl.errors import ConfigError, Masked, RaynixlError
from raynixl.moe import cuda_device
from raynixl.moe.checks import CombineArguments, DispatchArguments, Sizes
from raynixl.moe.cuda_checks import cuda_combine_call, cuda_dispatch_call
from raynixl.moe.cuda_need import Need
from raynixl.moe.cuda_path import CudaPath, Facts
from raynixl.moe.cuda_staged import (
    StagedHandle,
    fetched_combine,
    fetched_dispatch,
    put_added,
    put_combined,
    put_dispatched,
)
from raynixl.moe.cuda_structs import Kind
from raynixl.moe.rank import OnLost, Rank
from raynixl.moe.result import Combined, Dispatched

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


class GpuRank(Rank):
    """One rank of a group, some of whose operations may be on tensors of a GPU."""

    _path: CudaPath | None = None
    _opened_at = 0

    def synchronise(self, device: torch.device | int | None = None, *, deadline: float | None = None) -> None:
        """Agree with all ranks, which call this between the same two operations, on who takes part and on windows.

        On GPUs ranks that wait are let in here, and nowhere else: operations there have no exchange on the host. The
        first operation on a GPU does this by itself, and each that needs larger windows. `device` is the GPU that
        tensors will be on: that of earlier ones, or torch's current one, if not given.

        Raises:
            Masked: the others have gone on without this rank. ConfigError: another rank calls something else.
        """
        number = device if isinstance(device, int) else None if device is None else device.index
        used = cuda_device.used_gpu()  # of this thread, whichever carries it out

        def synchronise() -> None:
            until, error = self._until(deadline)
            if error is not None:
                raise error
            self._agree(Need(), used if number is None and self._known_gpu() is None else number, until)

        known = self._known_gpu()
        self._submit(self._as_here(used if known is None else known, synchronise))

    def settle(self) -> None:
        """Wait until what this rank has put on a GPU is through, and hear who was lost in it: `active` says so then.

        No other rank need call it. In memory of the host an operation has said so when it returns.

        Raises:
            Masked: the others have gone on without this rank.
        """

        def settle() -> None:
            self._check_active()
            path = self._path
            if path is not None:
                self._on_gpu(lambda: path.settle(time.monotonic() + 2 * self.deadline))

        self._submit(self._as_here(self._known_gpu(), settle))

    @property
    def is_direct(self) -> bool | None:
        """Whether kernels put rows on a GPU into the peers' memory, alike on all ranks; None before an agreement."""
        path = self._path
        return None if path is None or path.gpu is None else not path.reason

    def explain(self) -> str:
        """Say which way rows of tensors on a GPU go, and why."""
        path = self._path
        if path is None or path.gpu is None:
            return "no tensors on a GPU so far: rows go through memory of the host"
        if path.reason:
            return f"rows on GPU {path.gpu} go through memory of the host: {path.reason}"
        return f"kernels on GPU {path.gpu} put rows into the peers' memory"

    def __repr__(self) -> str:
        way = "" if self._known_gpu() is None else f", {self.explain()}"
        return f"{super().__repr__()[:-1]}{way})"

    # Within

    @abstractmethod
    def _dispatch_on_host(
        self, arguments: DispatchArguments, deadline: float | None, failed: RaynixlError | None = None
    ) -> Dispatched: ...

    @abstractmethod
    def _combine_on_host(
        self, arguments: CombineArguments, deadline: float | None, failed: RaynixlError | None = None
    ) -> Combined: ...

    def _open(self, deadline: float) -> None:
        self._path = None
        super()._open(deadline)
        self._opened_at = self._session.phase

    def _shut(self) -> None:
        path, self._path = self._path, None
        if path is not None:
            path.close()
        super()._shut()

    def _known_gpu(self) -> int | None:
        return None if self._path is None else self._path.gpu

    def _gpu_of(self, tensor: Any, failed: RaynixlError | None) -> int | None:
        """Return the GPU that an operation is on; who takes part with an error alone does as it did before."""
        first = tensor[0] if isinstance(tensor, tuple) and tensor else tensor
        gpu, path = cuda_device.gpu_of(first), self._path
        if path is not None and failed is not None and path.is_used:
            return path.gpu
        if path is not None:
            path.is_used = gpu is not None
        return gpu

    def _dispatch_on_gpu(
        self, gpu: int, arguments: DispatchArguments, deadline: float | None, failed: RaynixlError | None
    ) -> Dispatched:
        with self._turn:
            self._check_active()
            call, error = cuda_dispatch_call(arguments, self._sizes(), gpu)
            until, late = self._until(deadline)
            error = failed or error or late or self._other_gpu(gpu)
            path = self._agreed_path(Need() if error else call.need(self.topk, 1), Kind.DISPATCH, gpu, until)
            path.is_used = True
            if path.reason:
                there = cuda_device.gpu(gpu)
                fetched, wrong = fetched_dispatch(arguments, there)
                made = self._dispatch_on_host(fetched, deadline, failed or wrong)
                put_added(arguments, fetched, ("stats", "waited"))
                return put_dispatched(made, there)
            result = self._on_gpu(lambda: path.dispatch(call, error, until - time.monotonic()))
            self._counts["dispatches"] += 1
            self._counts["rows"] += result.handle.rows
            if arguments.stats is not None:
                arguments.stats.add_(result.counts)
            return result

    def _combine_on_gpu(
        self, gpu: int, arguments: CombineArguments, deadline: float | None, failed: RaynixlError | None
    ) -> Combined:
        with self._turn:
            self._check_active()
            until, late = self._until(deadline)
            if isinstance(arguments.handle, StagedHandle) or (self._path is not None and self._path.reason):
                there = cuda_device.gpu(gpu)
                fetched, wrong = fetched_combine(arguments, there)
                made = self._combine_on_host(fetched, deadline, failed or wrong)
                put_added(arguments, fetched, ("stats",))
                return put_combined(made, arguments, there)
            call, error = cuda_combine_call(arguments, self._sizes(), gpu)
            error = failed or error or late or self._other_gpu(gpu)
            need = Need() if error else call.need(self.max_tokens, self.topk)
            path = self._agreed_path(need, Kind.COMBINE, gpu, until)
            path.is_used = True
            combined = self._on_gpu(lambda: path.combine(call, error, until - time.monotonic()))
            self._counts["combines"] += 1
            return combined

    def _agreed_path(self, need: Need, kind: Kind, gpu: int, until: float) -> CudaPath:
        """Return the path, its windows large enough. All ranks come to an agreement in the same operation."""
        path = self._path
        if path is not None and not path.is_ready(need):
            self._on_gpu(lambda: path.grows(kind, until - time.monotonic()))
        if path is None or not path.is_ready(need):
            self._agree(need, gpu, until)
        assert self._path is not None
        return self._path

    def _other_gpu(self, gpu: int) -> RaynixlError | None:
        known = self._known_gpu()
        if known in (None, gpu):
            return None
        return ConfigError(
            f"tensors are on GPU {gpu}, those before were on GPU {known}",
            hint="have all ranks call synchronise(device=) where tensors move to another GPU",
        )

    def _agree(self, need: Need, gpu: int | None, until: float) -> None:
        self._check_active()
        self._session.begin()
        if self._path is None:
            facts = Facts(
                self.topk, self.max_tokens, self.hidden, self.dtype.itemsize, self.on_lost is OnLost.RENORMALISE
            )
            self._path = CudaPath(
                self._session, self._meeting, facts, lambda: self.placement, let_in_at=self._opened_at
            )
        path = self._path
        self._guarded(lambda: path.synchronise(need, gpu, until))

    def _on_gpu(self, operation: Callable[[], T | RaynixlError]) -> T:
        """Carry out an operation. Of an error that it returns all hear; what it raises leaves us out of step."""
        try:
            made = operation()
        except Masked as exc:
            self._masked = exc
            raise
        except BaseException as exc:
            self._masked = self._out_of_step(exc)
            raise
        if isinstance(made, RaynixlError):
            raise made
        return made

    def _guarded(self, operation: Callable[[], T]) -> T:
        """Carry out an operation. If it ends here alone, amid its exchanges, this rank is out of step for good."""
        session = self._session
        session.is_amid = True
        try:
            return operation()
        except Masked as exc:
            self._masked = exc
            raise
        except BaseException as exc:
            if session.is_amid:
                self._masked = self._out_of_step(exc)
            raise

    def _out_of_step(self, error: BaseException) -> Masked:
        return Masked(
            f"rank {self.rank} ({self.agent.name!r}) has left an operation amid its exchanges: {error!r:.200}",
            hint="the other ranks mask it by their deadline; rejoin() brings it back",
        )

    def _until(self, deadline: float | None) -> tuple[float, RaynixlError | None]:
        """Return when an operation's time is up, and what is wrong with what was asked for."""
        now = time.monotonic()
        try:
            return now + check_timeout(deadline, self.deadline, what="deadline"), None
        except ConfigError as exc:
            return now + self.deadline, exc

    def _sizes(self) -> Sizes:
        placement, local_experts = self.placement.digest, len(self.local_experts)
        return Sizes(
            self.topk, self.max_tokens, self.hidden, placement, local_experts, self._limit, self._session.key
        )  # fmt: skip
