"""Staged: operations on a GPU that go through memory of the host: where kernels do not reach all peers' memory.

What a caller gives is fetched on his current stream, once for all, and what comes back is brought there on it. Nothing
waits for another stream, or for the device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor

from raynixl import cuda
from raynixl.errors import ConfigError
from raynixl.moe import cuda_device
from raynixl.moe.calls import check_place
from raynixl.moe.checks import CombineArguments, DispatchArguments
from raynixl.moe.result import Combined, Dispatched

if TYPE_CHECKING:
    from raynixl.moe.cuda_device import Gpu

D = TypeVar("D", bound=Dispatched)


@dataclass(frozen=True, slots=True, eq=False)
class StagedHandle:
    """The handle of a dispatch of tensors on a GPU that went through the host: that of the host's own."""

    host: Any
    """A `Handle`, or a `TwoLevelHandle`."""
    gpu: Gpu

    @property
    def counts(self) -> Any:
        """By source: how many rows came from there."""
        return self.host.counts

    @property
    def rows(self) -> int:
        """How many rows came."""
        return int(self.host.rows)

    @property
    def lost(self) -> Sequence[int]:
        """Who did not deliver."""
        return cast("Sequence[int]", self.host.lost)

    @property
    def sources(self) -> Tensor:
        """By row: the rank that it came from. On the GPU."""
        return self.gpu.bring(self.host.sources)

    @property
    def layout(self) -> str:
        """How rows lie at their holder."""
        return str(self.host.layout)

    @property
    def weights_at(self) -> str:
        """Who multiplies by the weights."""
        return str(self.host.weights_at)

    @property
    def placement(self) -> int:
        """The digest of the placement that it was made under."""
        return int(self.host.placement)

    def plain(self) -> StagedHandle:
        """Return the same layout without weights."""
        return replace(self, host=self.host.plain())


@dataclass(frozen=True, slots=True)
class Fetched:
    """What a caller has given, in memory of the host, by name; what is no tensor, or elsewhere, is as it was."""

    given: Mapping[str, Any]
    error: ConfigError | None
    """What is wrong with where it was; the other ranks must hear of it."""

    def __getitem__(self, name: str) -> Any:
        return self.given[name]


def fetched(given: Mapping[str, Any], gpu: Gpu) -> Fetched:
    """Fetch all tensors that are given, also those within tuples; they may be changed from now on."""
    if cuda.stream_is_capturing(gpu.stream()):
        error = ConfigError(
            "rows that go through memory of the host cannot be captured",
            hint="capture steps of ranks whose kernels reach each other: see explain()",
        )
        return Fetched(given, error)
    try:
        for name, value in given.items():
            for one in _tensors(value):
                check_place(one, name, gpu.number)
    except ConfigError as exc:
        return Fetched(given, exc)
    found = iter(gpu.fetch_all([one for value in given.values() for one in _tensors(value)]))
    return Fetched({name: _mapped(value, lambda _: next(found)) for name, value in given.items()}, None)


def brought(value: Any, gpu: Gpu) -> Any:
    """Return the same on the GPU; of a tuple all that are tensors."""
    return _mapped(value, gpu.bring)


def fetched_dispatch(given: DispatchArguments, gpu: Gpu) -> tuple[DispatchArguments, ConfigError | None]:
    """Return the arguments in memory of the host, without what results are added to, and what is wrong with them."""
    names = ("x", "topk_idx", "topk_weights", "extra", "stats", "waited")
    found = fetched({name: getattr(given, name) for name in names}, gpu)
    return replace(given, **found.given, handle=host_handle(given.handle)), found.error


def put_dispatched(made: D, gpu: Gpu) -> D:
    """Return a result on the GPU; nothing of it lies in registered memory any more."""
    moved = {one.name: brought(getattr(made, one.name), gpu) for one in fields(made)}
    return replace(made, **{**moved, "handle": StagedHandle(made.handle, gpu)})


def fetched_combine(given: CombineArguments, gpu: Gpu) -> tuple[CombineArguments, ConfigError | None]:
    """Return the arguments in memory of the host, and what is wrong with them."""
    names = ("y", "weights", "bias", "stats")
    found = fetched({name: getattr(given, name) for name in names}, gpu)
    out, error = host_out(given.out, gpu)
    return replace(given, **found.given, out=out, handle=host_handle(given.handle)), found.error or error


def put_combined(made: Combined, given: CombineArguments, gpu: Gpu) -> Combined:
    """Return a result on the GPU, where the caller wants it if he says so."""
    out = put_out(made.out, given.out if given.summed else None, gpu)
    return Combined(out, brought(made.topk_weights, gpu), made.lost)


def host_out(out: Any, gpu: Gpu) -> tuple[Any, ConfigError | None]:
    """Return memory of the host that is in all that is checked as what the caller gives for the result."""
    if not isinstance(out, Tensor) or out.layout is not torch.strided:
        return out, None
    try:
        check_place(out, "out", gpu.number)
    except ConfigError as exc:
        return out, exc
    return torch.empty_strided(out.shape, out.stride(), dtype=out.dtype), None


def put_out(made: Tensor, out: Tensor | None, gpu: Gpu) -> Tensor:
    """Return sums on the GPU: in the caller's memory, if he gives some."""
    if out is None:
        return gpu.bring(made)
    out.detach().copy_(made)
    return out


def put_added(given: Any, made: Any, names: Sequence[str]) -> None:
    """Give the caller what was added to the copies of his tensors."""
    for name in names:
        if isinstance(getattr(given, name), Tensor):
            getattr(given, name).detach().copy_(getattr(made, name))


def host_handle(handle: Any) -> Any:
    """Return the host's own handle."""
    return handle.host if isinstance(handle, StagedHandle) else handle


def gpu_of_call(given: Any) -> Gpu | None:
    """Return the GPU that an operation is on, by its first argument: rows, or rows and their scales."""
    number = cuda_device.gpu_of(given[0] if isinstance(given, tuple) and given else given)
    return None if number is None else cuda_device.gpu(number)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, tuple | list):
        return [one for each in value for one in _tensors(each)]
    return [value] if _is_plain(value) else []


def _mapped(value: Any, change: Any) -> Any:
    if isinstance(value, tuple | list):
        return tuple(_mapped(one, change) for one in value)
    return change(value) if _is_plain(value) else value


def _is_plain(value: Any) -> bool:
    """Whether it is a tensor that lies in memory as others do; what is not is refused on the host."""
    return isinstance(value, Tensor) and value.layout is torch.strided
