"""The digest of tensors, wherever each of them lies: what tells whether a version was installed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from raynixl.weights.device_digest import digest_device
from raynixl.weights.digest import ARENA_BIT, digest_rows
from raynixl.weights.space import Space, space_of
from raynixl.weights.streams import on_ours

if TYPE_CHECKING:
    import torch

    from raynixl.native import Native
    from raynixl.weights.layout import Entry

U64 = NDArray[np.uint64]
_BATCH_NBYTES = 256 << 20
"""Of tensors that do not lie in one piece so many bytes are copied aside at a time."""


def can_digest(tensor: torch.Tensor) -> bool:
    """Whether its bytes can be looked at: those on the host and on GPUs."""
    space = space_of(tensor)
    return space.is_host or space.is_gpu


def digest_tensors(placed: Iterable[tuple[torch.Tensor, Entry]], *, seed: int, native: Native) -> U64:
    """Return the sum (1, 2) of the digests of tensors, each at the place of its entry; others are left out."""
    return Placed(list(placed)).digest(seed=seed, native=native)


class Placed:
    """Tensors, each at the place of an entry, to be digested again and again; those that cannot be are left out.

    They may lie elsewhere each time, but have the same dtypes, shapes and strides.
    """

    def __init__(self, placed: Sequence[tuple[torch.Tensor, Entry]]) -> None:
        plain = [(tensor, entry) for tensor, entry in placed if space_of(tensor).is_host and _is_plain(tensor)]
        known = {id(tensor) for tensor, _ in plain}
        self._plain = [tensor for tensor, _ in plain]
        self._rows = _rows(plain)
        self._others: dict[Space, list[tuple[torch.Tensor, Entry]]] = {}
        for tensor, entry in placed:
            if id(tensor) not in known and can_digest(tensor):
                self._others.setdefault(space_of(tensor), []).append((tensor, entry))

    def digest(self, *, seed: int, native: Native) -> U64:
        """Return the sum (1, 2) of the digests of all."""
        out = np.zeros((1, 2), np.uint64)
        self._rows[:, 0] = np.fromiter((tensor.data_ptr() for tensor in self._plain), np.uint64, len(self._plain))
        digest_rows(self._rows, out, seed=seed, native=native)
        for space, mine in self._others.items():
            for batch in _batches(mine):
                with on_ours((space,)):
                    flats = [(_flat(tensor), entry) for tensor, entry in batch]
                    rows = _rows(flats)
                    if space.is_host:
                        digest_rows(rows, out, seed=seed, native=native)
                    else:
                        digest_device([flat for flat, _ in flats], rows, out, seed=seed)
        return out


def _batches(placed: Sequence[tuple[torch.Tensor, Entry]]) -> Iterable[list[tuple[torch.Tensor, Entry]]]:
    """Cut a list where the tensors that must be copied to be digested would take much memory."""
    batch: list[tuple[torch.Tensor, Entry]] = []
    room = _BATCH_NBYTES
    for tensor, entry in placed:
        room -= 0 if _is_plain(tensor) else entry.nbytes
        if room < 0 and batch:
            yield batch
            batch, room = [], _BATCH_NBYTES
        batch.append((tensor, entry))
    if batch:
        yield batch


def _is_plain(tensor: torch.Tensor) -> bool:
    return tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bytes of a tensor in order."""
    import torch

    plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
    return plain.view(-1).view(torch.uint8)


def _rows(placed: Sequence[tuple[torch.Tensor, Entry]]) -> U64:
    rows = [
        (tensor.data_ptr(), tensor.numel() * tensor.element_size(), entry.arena << ARENA_BIT | entry.offset, 0)
        for tensor, entry in placed
    ]
    return np.array(rows, np.uint64).reshape(-1, 4)
