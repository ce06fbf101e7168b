"""Overlap: which rows lie over each other."""

from __future__ import annotations

import pytest
import torch

from raynixl.moe.overlap import rows_overlap, share_memory

MEMORY = torch.zeros(96)
GRID = MEMORY.view(12, 8)

PAIRS = {
    "one tensor": (GRID, GRID, True),
    "rows behind rows": (GRID[:4], GRID[4:], False),
    "one row of both": (GRID[:5], GRID[4:], True),
    "columns beside columns": (GRID[:, :4], GRID[:, 4:], False),
    "columns beside columns further down": (GRID[:6, 4:], GRID[3:, :4], False),
    "one column of both": (GRID[:, :5], GRID[:, 4:], True),
    "the last column of both, further down": (GRID[:6, 3:], GRID[3:, :4], True),
    "a row amid": (GRID[4], GRID, True),
    "a row before": (GRID[0], GRID[1:], False),
    "two rows": (GRID[0], GRID[1], False),
    "two parts of a row": (GRID[0, :5], GRID[0, 4:], True),
    "other memory": (GRID, torch.zeros(12, 8), False),
    "nothing": (GRID[:0], GRID, False),
    "no columns": (GRID[:, :0], GRID, False),
    "one row for all": (GRID[3:4].expand(6, 8), GRID[3:5], True),
    "one row for all, elsewhere": (GRID[3:4].expand(6, 8), GRID[4:], False),
    "other dtypes": (GRID.view(torch.bfloat16)[:, :8], GRID[:, 4:], False),
    "other dtypes over each other": (GRID.view(torch.bfloat16)[:, :10], GRID[:, 4:], True),
    "other steps, which may be": (GRID[::2], MEMORY.view(6, 16)[:, 8:], False),
    "other steps": (GRID[::2, :4], MEMORY.view(4, 24)[:, 8:12], True),
}


@pytest.mark.parametrize("what", PAIRS)
def test_bytes_that_two_tensors_share_are_seen(what):
    one, other, shared = PAIRS[what]
    assert share_memory(one, other) == shared
    assert share_memory(other, one) == shared


@pytest.mark.parametrize(
    ("rows", "meet"),
    [
        (GRID, False),
        (GRID[::2, :3], False),
        (GRID[:1].expand(4, 8), True),
        (MEMORY.as_strided((4, 8), (7, 1)), True),
        (MEMORY.as_strided((1, 8), (1, 1)), False),
        (MEMORY.as_strided((0, 8), (0, 1)), False),
    ],
)
def test_rows_that_lie_over_each_other_are_seen(rows, meet):
    assert rows_overlap(rows) == meet
