"""Tensors: the edge to torch, which is imported when the first model comes. Collects, describes and copies."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from raynixl.errors import ConfigError
from raynixl.native import COPY, DONE
from raynixl.weights.layout import itemsize
from raynixl.weights.sharing import TensorSpec
from raynixl.weights.space import gpus_of, space_of
from raynixl.weights.streams import on_ours

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from raynixl.agents import Agent

    Model: TypeAlias = torch.nn.Module | Mapping[str, torch.Tensor]
    Tensors: TypeAlias = dict[str, torch.Tensor]

logger = logging.getLogger(__name__)
_COMPILED = "_orig_mod"
_COPY_SECONDS = 3600.0  # a copy in this process always ends; it is never left half done


def collect(model: Model) -> Tensors:
    """Return the tensors of a module or state dict by name, in order: parameters and persistent buffers.

    They are those of `state_dict()`, tied ones under each of their names; extra state of modules is left out, and so
    is what torch.compile puts into names: compiled and plain modules hold the same tensors.

    Raises:
        ConfigError: it is neither, or holds what cannot be carried.
    """
    tensors = named_tensors(model)
    for name, tensor in tensors.items():
        _check(name, tensor)
    if not tensors:
        raise ConfigError("there are no tensors to carry", hint="give a model that has parameters")
    return tensors


def named_tensors(model: Model) -> Tensors:
    """Return what `collect` returns, whether it can be carried or not: meta tensors and DTensors too.

    Raises:
        ConfigError: it is neither a module nor a state dict.
    """
    import torch

    if isinstance(model, torch.nn.Module):
        return dict(_of_module(model))
    if isinstance(model, Mapping):
        return dict(model)
    raise ConfigError(f"{type(model).__name__} holds no weights", hint="give a torch module or a state dict")


def _of_module(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for prefix, part in module.named_modules(remove_duplicate=False):
        dot = "".join(f"{piece}." for piece in prefix.split(".") if piece not in ("", _COMPILED))
        for name, parameter in part._parameters.items():
            if parameter is not None:
                yield dot + name, parameter
        for name, buffer in part._buffers.items():
            if buffer is not None and name not in part._non_persistent_buffers_set:
                yield dot + name, buffer


def _check(name: str, tensor: Any) -> None:
    import torch

    why = ""
    if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
        why = f"is {type(tensor).__name__}, not a tensor"
    elif torch.nn.parameter.is_lazy(tensor):
        why = "has no shape yet: run the module once"
    elif tensor.layout is not torch.strided or tensor.is_quantized:
        why = f"has layout {tensor.layout}, which cannot be carried"
    elif tensor.device.type == "meta":
        why = "is on the meta device and has no values"
    elif type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        why = f"is a {type(tensor).__name__}, whose values lie elsewhere"
    if why:
        raise ConfigError(f"{name!r:.200} {why}", hint="give plain dense tensors with values")
    itemsize(dtype_name(tensor))


def dtype_name(tensor: torch.Tensor) -> str:
    """Return torch's short name of a tensor's dtype."""
    return str(tensor.dtype).removeprefix("torch.")


def describe(tensors: Tensors) -> list[TensorSpec]:
    """Return how tensors lie in memory."""
    return [
        TensorSpec(
            name,
            dtype_name(tensor),
            tuple(tensor.shape),
            tuple(tensor.stride()),
            str(tensor.device),
            tensor.data_ptr(),
            (tensor.is_conj(), tensor.is_neg()),
        )
        for name, tensor in tensors.items()
    ]


def is_writable_in_place(tensor: torch.Tensor) -> bool:
    """Whether no two elements of it share memory, as those of an expanded tensor do."""
    if tensor.numel() == 0:
        return True  # whatever its strides, which are 0 where numpy made it
    reach = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride < reach:
                return False
            reach = stride * (size - 1) + reach
    return True


def copy_tensors(agent: Agent, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Copy (destination, source) pairs: whatever is plain bytes in one batch by several threads, the rest by torch."""
    CopyJob(pairs).run(agent)


class CopyJob:
    """Copies of (destination, source) pairs, sorted out once; to be run while both lie where they lie now.

    Those on a GPU run on a stream of our own, which is waited for: order it with others' streams by `Streams.alone`.
    """

    def __init__(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        rows, self._plain, self._others = [], [], []
        for target, source in pairs:
            same = target.dtype == source.dtype and target.shape == source.shape
            if same and _is_plain(target) and _is_plain(source):
                rows.append((source.data_ptr(), target.data_ptr(), source.numel() * source.element_size()))
                self._plain.append((target, source))
            else:
                self._others.append((target, source))
        table = np.array(rows, np.uint64).reshape(-1, 3)
        self.rows = np.ascontiguousarray(table[table[:, 2] > 0])
        """What is plain bytes in host memory, as rows of (source, destination, nbytes)."""
        self._gpus = gpus_of(tensor for pair in self._others for tensor in pair)

    def run(self, agent: Agent) -> None:
        """Copy everything: plain bytes in host memory by the agent's threads, the rest by torch."""
        self.run_rows(agent, self.rows)
        self.run_others()

    def run_rows(self, agent: Agent, rows: NDArray[np.uint64]) -> None:
        """Copy rows of plain bytes, some of ours or all."""
        if len(rows) and not _copy_rows(agent, rows):
            _copy_by_torch(self._plain)

    def run_others(self) -> None:
        """Copy what is not plain bytes in host memory."""
        if self._others:
            with on_ours(self._gpus):
                _copy_by_torch(self._others)


def _copy_by_torch(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    import torch

    inference = any(target.is_inference() for target, _ in pairs)
    alike: dict[object, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for target, source in map(_as_bits, pairs):
        kinds = target.device, source.device, target.dtype, source.dtype, target.stride() == source.stride()
        alike.setdefault(kinds, []).append((target, source))
    with torch.inference_mode() if inference else torch.no_grad():
        for group in alike.values():
            # few launches for many tensors of a GPU if all are alike: 70,000 copies one by one take half a second.
            # Nobody waits here for what goes to a GPU or comes from one: who calls this does, for all of it.
            targets, sources = ([pair[side] for pair in group] for side in (0, 1))
            is_waited_for = {targets[0].device.type, sources[0].device.type} <= {"cpu", "cuda"}
            torch._foreach_copy_(targets, sources, non_blocking=is_waited_for)


def _as_bits(pair: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a pair of one dtype as integers: kernels that copy many tensors turn a NaN of 16 bits into another one."""
    import torch

    target, source = pair
    is_lazy = any(one.is_conj() or one.is_neg() for one in pair)
    if target.dtype != source.dtype or is_lazy or not (target.is_floating_point() or target.is_complex()):
        return pair
    if target.is_complex():
        return _as_bits((torch.view_as_real(target), torch.view_as_real(source)))
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[target.element_size()]
    return target.detach().view(integer), source.detach().view(integer)


def note_change(tensors: Sequence[torch.Tensor]) -> None:
    """Tell autograd: a backward whose forward saw the old values ends with an error, not with wrong gradients."""
    import torch

    torch.autograd.graph.increment_version([tensor for tensor in tensors if not tensor.is_inference()])


def memory_of(tensor: torch.Tensor) -> tuple[object, ...]:
    """Return what tells where and how a plain tensor lies in memory; equal for two that are the same memory."""
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.is_conj(), tensor.is_neg()


def is_tied(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors of one dtype and shape are the same memory, read in the same way."""
    return (one.data_ptr(), one.stride(), one.is_conj(), one.is_neg()) == (
        other.data_ptr(), other.stride(), other.is_conj(), other.is_neg(),
    )  # fmt: skip


def _is_plain(tensor: torch.Tensor) -> bool:
    return space_of(tensor).is_host and tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


def _copy_rows(agent: Agent, rows: NDArray[np.uint64]) -> bool:
    """Copy by the agent's engine; False if it did not, as when the agent is being closed."""
    result = agent.engine.program(COPY, 0, rows, []).run(_COPY_SECONDS)
    if not isinstance(result, int):
        result.wait(_COPY_SECONDS)
        result.wait_settled(_COPY_SECONDS)
        result = result.code
    if result != DONE:
        logger.warning("the engine of %r ended a copy with code %d; torch copies instead", agent.name, result)
    return result == DONE
