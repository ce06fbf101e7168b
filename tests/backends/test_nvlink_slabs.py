"""Pieces of slabs: apart from each other, used again, all given back."""

from __future__ import annotations

import gc
import itertools

import pytest

from raynixl.backends.nvlink_slabs import SLAB_NBYTES, Slabs

pytestmark = pytest.mark.pure


class Heap:
    """Hands out addresses, and knows which are still held."""

    def __init__(self) -> None:
        self._next = itertools.count(1)
        self.held: dict[int, int] = {}

    def allocate(self, nbytes: int) -> int:
        address = next(self._next) << 40
        self.held[address] = nbytes
        return address

    def free(self, address: int) -> None:
        del self.held[address]


@pytest.fixture
def heap() -> Heap:
    return Heap()


@pytest.fixture
def slabs(heap: Heap) -> Slabs:
    return Slabs(heap.allocate, heap.free)


def test_pieces_do_not_overlap_and_are_long_enough(slabs: Slabs, heap: Heap) -> None:
    wanted = [1, 4096, 4097, 100_000, 5_000_000, SLAB_NBYTES, SLAB_NBYTES + 1, 1]
    pieces = [slabs.take(nbytes) for nbytes in wanted]
    spans = sorted((piece.address, piece.address + piece.nbytes) for piece in pieces)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    for piece, nbytes in zip(pieces, wanted, strict=True):
        assert piece.nbytes >= nbytes
        assert piece.address % 4096 == 0
        assert any(slab <= piece.address and piece.address + piece.nbytes <= slab + n for slab, n in heap.held.items())


def test_what_is_forgotten_is_used_again(slabs: Slabs, heap: Heap) -> None:
    for _ in range(5000):
        slabs.take(20_000)
        gc.collect(0)
    assert sum(heap.held.values()) == SLAB_NBYTES


def test_closing_a_piece_twice_gives_it_back_once(slabs: Slabs) -> None:
    piece = slabs.take(5000)
    piece.close()
    piece.close()
    first, second = slabs.take(5000), slabs.take(5000)
    assert first.address == piece.address
    assert second.address != first.address


def test_all_is_freed_in_the_end_also_what_comes_back_later(slabs: Slabs, heap: Heap) -> None:
    kept = slabs.take(5000)
    slabs.close()
    assert not heap.held
    kept.close()
    slabs.close()
    assert not heap.held
