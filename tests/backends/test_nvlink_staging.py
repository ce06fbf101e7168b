"""How host memory is cut into pieces for staging: every byte in one piece, in place, and no piece over its size."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raynixl.backends.nvlink_staging import cut


def rows(*lengths: int) -> np.ndarray:
    """Rows of these lengths, apart from each other at both ends."""
    table = np.zeros((len(lengths), 3), np.uint64)
    table[:, 2] = lengths
    table[:, 0] = 1000 + np.arange(len(lengths)) * 100_000
    table[:, 1] = 5_000_000 + np.arange(len(lengths))[::-1] * 100_000
    return table


@settings(deadline=None)
@given(st.lists(st.integers(1, 5000), min_size=1, max_size=60), st.integers(1, 3000))
def test_every_byte_is_in_one_piece_and_finds_its_place(lengths: list[int], size: int) -> None:
    table, seen = rows(*lengths), {}
    pieces = cut(table, size)
    assert all(piece.total == size for piece in pieces[:-1])
    assert 0 < pieces[-1].total <= size
    for piece in pieces:
        assert int(piece.offset[0]) == 0
        assert (piece.offset[1:] == np.cumsum(piece.nbytes)[:-1]).all()
        for source, target, nbytes in zip(piece.source, piece.target, piece.nbytes, strict=True):
            for step in range(int(nbytes)):
                assert seen.setdefault(int(source) + step, int(target) + step) == int(target) + step
    wanted = {int(s) + i: int(t) + i for s, t, n in table for i in range(int(n))}
    assert seen == wanted


@pytest.mark.parametrize("lengths", [(8,), (7, 1), (1, 1, 1, 1, 1, 1, 1, 1), (24,), (3, 21)])
def test_pieces_end_where_the_size_says_wherever_rows_end(lengths: tuple[int, ...]) -> None:
    assert [piece.total for piece in cut(rows(*lengths), 8)] == [8] * (sum(lengths) // 8)
