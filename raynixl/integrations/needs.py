"""Needs: which parts of a checkpoint's tensors an engine's own loader uses, and tensors that hold just those."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from raynixl.weights.layout import build_layout
from raynixl.weights.pieces import Ints, Piece, Pieces
from raynixl.weights.shards import from_pieces
from raynixl.weights.tensors import describe

if TYPE_CHECKING:
    import torch

    from raynixl.weights.pieces import TensorInfo
    from raynixl.weights.recorder import Recording
    from raynixl.weights.shards import Shards


@dataclass(frozen=True, slots=True)
class Landing:
    """Tensors in which versions land: of each tensor of a checkpoint the box that an engine uses of it.

    `shards` say what of each box is pulled; the rest of it stays zero. Tensors that the engine does not use are left
    out.
    """

    tensors: dict[str, torch.Tensor]
    boxes: dict[str, tuple[slice, ...]]
    shapes: dict[str, tuple[int, ...]]
    shards: Shards

    def full(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Return tensors for the engine's loader: as large as the checkpoint's, right where the loader uses them."""
        for name, landed in self.tensors.items():
            if tuple(landed.shape) == self.shapes[name]:
                yield name, landed
            else:
                whole = landed.new_zeros(self.shapes[name])
                whole[self.boxes[name]] = landed
                yield name, whole


def landing(infos: Sequence[TensorInfo], recording: Recording | None, *, device: str = "cpu") -> Landing:
    """Make what versions land in on a device: of what a loader was seen to use, or whole tensors if it was not."""
    import torch

    tensors: dict[str, torch.Tensor] = {}
    boxes: dict[str, tuple[slice, ...]] = {}
    pieces: list[Piece] = []
    numbers = {info.name: number for number, info in enumerate(infos)}
    for info, used in _used(infos, recording):
        box = tuple(slice(*ends) for ends in zip(used[0].min(axis=0), (used[0] + used[1]).max(axis=0), strict=True))
        shape = [side.stop - side.start for side in box]
        tensors[info.name] = torch.zeros(shape, dtype=getattr(torch, info.dtype), device=device)
        boxes[info.name] = box
        pieces += _pieces(tensors[info.name], box, used, (numbers[info.name], len(boxes) - 1))
    layout = build_layout(describe(tensors))
    shapes = {info.name: tuple(info.shape) for info in infos}
    return Landing(tensors, boxes, shapes, from_pieces(infos, layout, Pieces.of(pieces)))


def _used(infos: Sequence[TensorInfo], recording: Recording | None) -> Iterator[tuple[TensorInfo, tuple[Ints, Ints]]]:
    """Give each tensor that is used with the starts and sizes of the boxes of it that are."""
    if recording is None:
        yield from ((info, _whole(info)) for info in infos)
        return
    own, known = recording.shards.pieces, recording.shards.tensors
    numbers = {known[number].name: number for number in np.unique(own.tensor).tolist()}
    for info in infos:
        if info.name in numbers:
            rows = own.tensor == numbers[info.name]
            dims = len(info.shape)
            boxes = np.unique(np.stack((own.start[rows, :dims], own.size[rows, :dims]), axis=1), axis=0)
            yield info, (boxes[:, 0], boxes[:, 1])


def _whole(info: TensorInfo) -> tuple[Ints, Ints]:
    size = np.array([info.shape], np.int64)
    return np.zeros_like(size), size


def _pieces(
    landed: torch.Tensor, box: tuple[slice, ...], used: tuple[Ints, Ints], of: tuple[int, int]
) -> Iterator[Piece]:
    """Say where the used boxes of a tensor lie in its landed box; as one, if they fill it or overlap."""
    strides = landed.stride()
    start, size = used
    first = np.array([side.start for side in box], np.int64)
    if int(size.prod(axis=1).sum()) == math.prod(landed.shape) or _do_overlap(start, size):
        start, size = first[None], np.array([landed.shape], np.int64)
    for begin, extent in zip(start.tolist(), size.tolist(), strict=True):
        offset = sum((at - zero) * stride for at, zero, stride in zip(begin, first.tolist(), strides, strict=True))
        kept = tuple(stride if length > 1 else 0 for stride, length in zip(strides, extent, strict=True))
        yield Piece(of[0], tuple(begin), tuple(extent), of[1], offset, kept)


def _do_overlap(start: Ints, size: Ints) -> bool:
    end = start + size
    meet = (start[:, None] < end[None]).all(axis=2) & (start[None] < end[:, None]).all(axis=2)
    return int(meet.sum()) > len(start)
