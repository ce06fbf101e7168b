"""Witness: watches every torch operation of a weight loader and enters copies in the ledger instead of doing them."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from raynixl.errors import ConfigError
from raynixl.weights.ledger import ZEROS, Blot, Memory, View, Zeros
from raynixl.weights.movements import MOVEMENTS, bare, line
from raynixl.weights.nests import Grid

aten = torch.ops.aten
_BLANK = {aten.empty.memory_format, aten.empty_strided.default, aten.new_empty.default, aten.empty_like.default,
          aten.new_empty_strided.default}  # fmt: skip
_ZEROED = {aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default}
_HARMLESS = {aten.is_same_size.default, aten.is_pinned.default}
_VIEWS = {aten._unsafe_view.default: aten.view.default, aten._reshape_alias.default: aten.as_strided.default}


class ValueNeeded(Exception):
    """A loader asked for the values of a tensor, and there are none while it is recorded."""


class Witness(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Knows what every memory that a loader touches holds. Writes into the model are entered, never done."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.needed: Blot | None = None
        self.read: set[int] = set()
        self.landed: set[int] = set()
        self._memories: dict[int, tuple[StorageWeakRef, Memory]] = {}
        self._blank: dict[int, tuple[StorageWeakRef, bool]] = {}

    def watch(self, tensors: Sequence[torch.Tensor]) -> None:
        """Watch the tensors of a model."""
        strides: dict[int, list[int]] = {}
        for tensor in tensors:
            strides.setdefault(_key(tensor), []).extend(_strides(tensor))
        for tensor in tensors:
            if _key(tensor) not in self._memories:
                self._enter(tensor, strides[_key(tensor)]).is_model = True

    def source(self, number: int, tensor: torch.Tensor) -> None:
        """Let a contiguous tensor be full tensor number `number`."""
        self._enter(tensor, _strides(tensor)).cover(number)

    def memory(self, tensor: torch.Tensor) -> Memory | None:
        """Return what a tensor's memory holds, or None if it is not watched."""
        known = self._memories.get(_key(tensor))
        return known[1] if known else None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        hot = [tensor for tensor in _tensors((*args, *kwargs.values())) if self._is_hot(tensor)]
        written = _written(func, args, kwargs)
        if not hot and not any(self.memory(tensor) for tensor in written):
            return self._pass(func, args, kwargs, written)
        if func in _HARMLESS or _is_view(func):
            return func(*args, **kwargs)
        if func in _VIEWS:
            return _VIEWS[func](*args, **kwargs)
        if func in _BLANK or func in _ZEROED:
            return self._made(self._shapes(func, args, kwargs, Blot("")), ZEROS if func in _ZEROED else None)
        handler = MOVEMENTS.get(func)
        if handler is not None:
            result = handler(self, *args, **kwargs)
            if result is not NotImplemented:
                return result
        return self._spoil(func, args, kwargs, hot)

    def _is_hot(self, tensor: torch.Tensor) -> bool:
        memory = self.memory(tensor)
        return memory is not None and not memory.is_empty

    def transfer(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Enter a copy, one of the operations that are understood."""
        near, far = self._memory_or_scratch(target), self.memory(source)
        to, of = _view(target), _view(source.expand(target.shape))
        if far is None or far.is_empty:
            return near.put(to, Blot("takes values that come from no weight", line=line()))
        origins = far.origins(of)
        self.read |= origins
        if near.is_model:
            self.landed |= origins
        why = _misfit(near, to, far, of)
        if not why and far.is_model and not far.is_covered(of):
            why = "takes what the model held before"
        try:
            if not why:
                return near.copy(to, far, of)
        except ConfigError as error:
            why = error.message
        return near.put(to, Blot(why, origins, line()))

    def fresh(self, like: torch.Tensor, shape: Sequence[int], *, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return a tensor without memory, watched and blank."""
        made = torch.empty(tuple(shape), dtype=dtype or like.dtype, device="meta")
        self._enter(made, _strides(made))
        return made

    def put(self, target: torch.Tensor, origin: Any) -> None:
        """Enter zeros or a blot."""
        self._memory_or_scratch(target).put(_view(target), origin)

    def _enter(self, tensor: torch.Tensor, strides: Sequence[int]) -> Memory:
        nelements = tensor.untyped_storage().nbytes() // max(1, tensor.element_size())
        memory = Memory(Grid.of(max(1, nelements), tuple(strides)), _dtype(tensor))
        self._memories[_key(tensor)] = (_weak(tensor), memory)
        return memory

    def _memory_or_scratch(self, tensor: torch.Tensor) -> Memory:
        known = self.memory(tensor)
        if known is not None:
            return known
        base = tensor._base if tensor._base is not None else tensor
        memory = self._enter(tensor, _strides(base))
        blank = self._blank.pop(_key(tensor), None)
        if blank is None:
            memory.cover(Blot("takes values that come from no weight", line=line()))
        elif blank[1]:
            memory.cover(ZEROS)
        return memory

    def _pass(self, func: Any, args: Any, kwargs: Any, written: Sequence[torch.Tensor]) -> Any:
        """Do what concerns no weight, and note which new memory is blank or zero."""
        result = func(*args, **kwargs)
        for tensor in written:
            if func is not aten.zero_.default or tensor.numel() * tensor.element_size() < _nbytes(tensor):
                self._blank.pop(_key(tensor), None)
        if func in _BLANK or func in _ZEROED:
            self._blank[_key(result)] = (_weak(result), func in _ZEROED)
        return result

    def _spoil(self, func: Any, args: Any, kwargs: Any, hot: Sequence[torch.Tensor]) -> Any:
        """Enter that an operation makes values: what it writes can come from full tensors only."""
        blot = self._blot(f"{func.overloadpacket} makes values", hot)
        self.read |= blot.tensors
        written = _written(func, args, kwargs)
        for tensor in written:
            memory = self._memory_or_scratch(tensor)
            memory.put(_view(tensor), blot)
            if memory.is_model:
                self.landed |= blot.tensors
        if written:
            return written[0] if len(func._schema.returns) == 1 else None
        result = self._shapes(func, args, kwargs, blot)
        made = list(_tensors([result]))
        if not made:
            raise self._need(blot)
        for leaf in made:
            self._made(leaf, blot)
        return result

    def _made(self, tensor: torch.Tensor, origin: Blot | Zeros | None) -> torch.Tensor:
        memory = self._enter(tensor, _strides(tensor))
        if origin is not None:
            memory.cover(origin)
        return tensor

    def _shapes(self, func: Any, args: Any, kwargs: Any, blot: Blot) -> Any:
        if torch.Tag.data_dependent_output in func.tags:
            raise self._need(blot)
        bare_args, bare_kwargs = tree_map_only(torch.Tensor, bare, (args, kwargs))
        if "device" in bare_kwargs:
            bare_kwargs["device"] = torch.device("meta")
        try:
            return func(*bare_args, **bare_kwargs)
        except NotImplementedError as exc:  # the shape of the result depends on values
            raise self._need(blot) from exc

    def _need(self, blot: Blot) -> ValueNeeded:
        self.needed = Blot(blot.why.replace("makes values", "needs values"), blot.tensors, blot.line)
        return ValueNeeded(f"{self.needed.why} at {blot.line}")

    def _blot(self, why: str, tensors: Sequence[torch.Tensor]) -> Blot:
        found: set[int] = set()
        for tensor in tensors:
            memory = self.memory(tensor)
            if memory is not None:
                found |= memory.origins(_view(tensor))
        return Blot(why, frozenset(found), line())


def _key(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _weak(tensor: torch.Tensor) -> StorageWeakRef:
    """Return what keeps a storage's key from being used again, and not its memory."""
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]


def _nbytes(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage().nbytes())


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _strides(tensor: torch.Tensor) -> list[int]:
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]


def _view(tensor: torch.Tensor) -> View:
    return View(tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()), _dtype(tensor))


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


@functools.cache
def _is_view(func: Any) -> bool:
    arguments = func._schema.arguments
    return bool(arguments) and arguments[0].alias_info is not None and not arguments[0].alias_info.is_write


@functools.cache
def _outputs(func: Any) -> tuple[tuple[int, str], ...]:
    """Return which arguments of an operation it writes into: position and name."""
    return tuple(
        (number, argument.name)
        for number, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )


def _written(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    values = (args[number] if number < len(args) else kwargs.get(name) for number, name in _outputs(func))
    return list(_tensors(values))


def _misfit(near: Memory, to: View, far: Memory, of: View) -> str:
    if to.dtype != of.dtype:
        return f"casts {of.dtype} to {to.dtype}"
    if to.dtype != near.dtype or of.dtype != far.dtype:
        return f"reads {far.dtype} as {near.dtype}"
    return ""
