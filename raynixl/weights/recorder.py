"""Recorder: runs an engine's own weight loader once over tensors without memory, and learns what goes where."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from raynixl.errors import ConfigError
from raynixl.weights.layout import build_layout, itemsize
from raynixl.weights.ledger import Blot, View, boxes_of_full, numbers
from raynixl.weights.nests import Nest
from raynixl.weights.pieces import Piece, Pieces, TensorInfo
from raynixl.weights.shards import Shards, from_pieces
from raynixl.weights.sharing import TensorSpec
from raynixl.weights.tensors import dtype_name, named_tensors

if TYPE_CHECKING:
    import torch

    from raynixl.weights.tensors import Model, Tensors
    from raynixl.weights.witness import Witness

FULL = "full:"
"""What the names of full tensors begin with among the local ones."""
_RUNS = 64
"""How often a loader that asks for values is run again without those tensors."""

Loader = Callable[[Iterable[tuple[str, Any]]], Any]


@dataclass(frozen=True, slots=True)
class Unsupported:
    """A parameter that copies do not explain: the operation, the full tensors behind it and the loader's line.

    `parameter` is empty where a tensor goes into none, or the loader asks for its values before that is known.
    """

    parameter: str
    why: str
    tensors: tuple[str, ...]
    line: str

    def __str__(self) -> str:
        of = f" of {', '.join(self.tensors)}" if self.tensors else ""
        at = f" at {self.line}" if self.line else ""
        return f"{self.parameter if self.parameter else 'no parameter'}: {self.why}{of}{at}"


@dataclass(frozen=True)
class Recording:
    """What a loader does with each full tensor.

    `full` are those that it must get whole at every install, by `load_weights`, since `unsupported` says why copies do
    not do; they are local tensors named `FULL + name`. `ignored` go nowhere, `untouched` parameters get nothing,
    `partial` ones get only some of their elements and zeros elsewhere.
    """

    shards: Shards = field(repr=False)
    full: tuple[str, ...]
    unsupported: tuple[Unsupported, ...]
    ignored: tuple[str, ...]
    untouched: tuple[str, ...]
    partial: tuple[str, ...]

    def to_load(self, local: Mapping[str, torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
        """Return what must go through `load_weights` at an install, out of the local tensors that came."""
        return [(name, local[FULL + name]) for name in self.full]


def record(load_weights: Loader, infos: Sequence[TensorInfo], model: Model) -> Recording:
    """Run a loader over tensors without memory and return what of them lands where in the model.

    The model may be real or on the meta device; it stays as it is. The loader must do the same at every call.

    Raises:
        ConfigError: the loader fails without values.
    """
    asked: dict[int, Blot] = {}
    for _ in range(_RUNS):
        run = _Run(infos, model, frozenset(asked))
        run.load(load_weights)
        if run.witness.needed is None:
            return _conclude(run, asked)
        asked.update(_alike(infos, run.witness.needed))
    raise ConfigError(f"the loader asks for the values of {len(asked)} tensors", hint="declare the shards instead")


class _Run:
    """One run of a loader."""

    def __init__(self, infos: Sequence[TensorInfo], model: Model, left_out: frozenset[int]) -> None:
        from raynixl.weights.witness import Witness

        self.infos = infos
        self.witness: Witness = Witness()
        self.given = ""
        self._left_out = left_out
        self._model = model
        self.before = named_tensors(model)
        self.after: Tensors = {}
        _check(infos, self.before)
        self.witness.watch([tensor for tensor in self.before.values() if not _is_lazy(tensor)])

    def load(self, load_weights: Loader) -> None:
        from raynixl.weights.witness import ValueNeeded

        with _Kept(self._model):
            try:
                with self.witness:
                    load_weights(self._tensors())
            except ValueNeeded:
                pass
            except Exception as exc:
                if self.witness.needed is None:
                    raise ConfigError(
                        f"the loader failed at {self.given!r} without values: {type(exc).__name__}: {exc}",
                        hint="declare the shards instead",
                    ) from exc
            self.after = {name: tensor.detach() for name, tensor in named_tensors(self._model).items()}

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        import torch

        for number, info in enumerate(self.infos):
            if number not in self._left_out:
                tensor = torch.empty(info.shape, dtype=getattr(torch, info.dtype), device="meta")
                self.witness.source(number, tensor)
                self.given = info.name
                yield info.name, tensor


class _Kept:
    """Puts a model's tensors back as they were, whatever a loader has made of them."""

    def __init__(self, model: Model) -> None:
        import torch

        parts = list(model.modules()) if isinstance(model, torch.nn.Module) else []
        self._owners: list[tuple[dict[str, Any], dict[str, Any]]] = [
            (part._parameters, dict(part._parameters)) for part in parts
        ]
        self._owners += [(part._buffers, dict(part._buffers)) for part in parts]
        self._data = [(tensor, tensor.data) for tensor in named_tensors(model).values() if not _is_lazy(tensor)]

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        for owner, saved in self._owners:
            owner.clear()
            owner.update(saved)
        for tensor, data in self._data:
            if tensor.untyped_storage()._cdata != data.untyped_storage()._cdata or tensor.shape != data.shape:
                tensor.data = data


class _Findings:
    """What is known of each parameter after a run."""

    def __init__(self, run: _Run) -> None:
        self.infos = run.infos
        self.specs: list[TensorSpec] = []
        self.pieces: list[Piece] = []
        self.full: set[int] = set()
        self.unsupported: list[Unsupported] = []
        self.untouched: list[str] = []
        self.partial: list[str] = []
        self._run = run
        self._storages: dict[int, int] = {}

    def add(self, name: str, before: torch.Tensor, after: torch.Tensor | None) -> None:
        """Take a parameter in, as it was before the loader ran and as it is after."""
        memory = None if after is None else self._run.witness.memory(after)
        if after is None or (after.shape, after.dtype) != (before.shape, before.dtype):
            tensors = memory.origins() if memory else frozenset()
            self.refuse(name, Blot("is replaced by a tensor of another shape or dtype", tensors))
        elif memory is None or not (parts := list(memory.under(view := _view(after), _dense(view)))):
            self.untouched.append(name)
        elif blots := [origin for _, origin in parts if isinstance(origin, Blot)]:
            self.refuse(name, Blot(blots[0].why, numbers(origin for _, origin in parts), blots[0].line))
        else:
            if not memory.is_covered(view):
                self.partial.append(name)
            pairs = [(nest, origin) for nest, origin in parts if isinstance(origin, int)]
            self._accept(name, before, pairs)

    def refuse(self, name: str, blot: Blot) -> None:
        """Note that full tensors must be loaded at every install."""
        self.full |= blot.tensors
        names = tuple(self.infos[number].name for number in sorted(blot.tensors))
        self.unsupported.append(Unsupported(name, blot.why, names, blot.line))

    def shards(self) -> Shards:
        """Return all that was found, and the full tensors, as shards."""
        for number in sorted(self.full):
            info = self.infos[number]
            whole, strides = (0,) * len(info.shape), _contiguous(info.shape)
            self.pieces.append(Piece(number, whole, tuple(info.shape), len(self.specs), 0, strides))
            self.specs.append(TensorSpec(FULL + info.name, info.dtype, tuple(info.shape)))
        if not self.pieces:
            raise ConfigError("the loader fills no parameter", hint="give it the checkpoint's names of the tensors")
        return from_pieces(self.infos, build_layout(self.specs), Pieces.of(self.pieces))

    def _accept(self, name: str, tensor: torch.Tensor, parts: Sequence[tuple[Nest, int]]) -> None:
        number = len(self.specs)
        for nest, origin in parts:
            for start, size, offset, strides in boxes_of_full(nest, self.infos[origin].shape):
                self.pieces.append(Piece(origin, start, size, number, offset, tuple(strides)))
        storage = self._storages.setdefault(tensor.untyped_storage()._cdata, len(self._storages) + 1)
        view = _view(tensor)
        address = (storage << 44) + view.offset * tensor.element_size()
        self.specs.append(TensorSpec(name, view.dtype, view.shape, view.strides, str(tensor.device), address))


def _conclude(run: _Run, asked: dict[int, Blot]) -> Recording:
    found, witness = _Findings(run), run.witness
    for name, before in run.before.items():
        if not _is_lazy(before):
            found.add(name, before, run.after.get(name))
    for name, tensor in run.after.items():
        if name not in run.before and (memory := witness.memory(tensor)) is not None:
            found.refuse(name, Blot("was not in the model before", memory.origins()))
    for number, blot in asked.items():
        found.refuse("", Blot(blot.why, frozenset({number}), blot.line))
    landed = witness.landed | {piece.tensor for piece in found.pieces}
    if lost := frozenset(witness.read - landed - found.full):
        found.refuse("", Blot("goes into what is no parameter", lost))
    used = found.full | landed
    ignored = tuple(info.name for number, info in enumerate(run.infos) if number not in used)
    return Recording(
        shards=found.shards(),
        full=tuple(run.infos[number].name for number in sorted(found.full)),
        unsupported=tuple(found.unsupported),
        ignored=ignored,
        untouched=tuple(found.untouched),
        partial=tuple(found.partial),
    )


def _check(infos: Sequence[TensorInfo], tensors: Tensors) -> None:
    import torch

    for info in infos:
        itemsize(info.dtype)
    for name, tensor in tensors.items():
        if type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
            raise ConfigError(
                f"{name!r:.200} is a {type(tensor).__name__}, whose values lie elsewhere",
                hint="only loaders of plain tensors are recorded; for DTensors use dtensor.shards_of",
            )


def _alike(infos: Sequence[TensorInfo], needed: Blot) -> dict[int, Blot]:
    """Return the tensors whose values are asked for, with those of other layers: they take the same path."""
    kinds = {_kind(infos[number].name) for number in needed.tensors}
    if not kinds:
        raise ConfigError(f"the loader {needed.why} at {needed.line}", hint="declare the shards instead")
    return {number: needed for number, info in enumerate(infos) if _kind(info.name) in kinds}


def _kind(name: str) -> str:
    return re.sub(r"\d+", "#", name)


def _is_lazy(tensor: torch.Tensor) -> bool:
    import torch

    return torch.nn.parameter.is_lazy(tensor)


def _view(tensor: torch.Tensor) -> View:
    return View(tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()), dtype_name(tensor))


def _contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


def _dense(view: View) -> View:
    return View(view.shape, _contiguous(view.shape), 0, view.dtype)
