"""How host memory is cut into pieces for staging: every byte in one piece, in place, and no piece over its size."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from agent_tools import PATIENCE, eventually, introduce
from hypothesis import given, settings
from hypothesis import strategies as st
from vram_tools import gpu_agent, made_up_gpus, make_region

from raynixl.backends.nvlink_staging import cut
from raynixl.native import DONE, PENDING


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


def test_a_transfer_that_ends_early_leaves_its_gates_when_its_copy_in_the_host_is_over() -> None:
    with made_up_gpus(), gpu_agent("near") as near, gpu_agent("far") as far:
        introduce(near, far)
        make_region(far, "vram", 4096, name="theirs")
        mine = make_region(near, "user", 4096, seed=1)
        plan = near.prepare("write", mine, near.peer("far")["theirs"])
        plan.post().wait(PATIENCE)
        (program,) = plan._route.programs
        slow = _Slow()
        for key, (_, on_gpu) in list(program._programs.items()):
            program._programs[key] = (slow, on_gpu)
        transfer = plan.post(timeout=0.05)
        eventually(lambda: transfer.done, "its deadline ends it")
        assert mine.gate.inflight == 1
        slow.over.set()
        eventually(lambda: mine.gate.inflight == 0, "the copy is over")


class _Slow:
    """A copy in the host that lasts until it is told to end: a program and its job at once."""

    def __init__(self) -> None:
        self.over = threading.Event()

    @property
    def code(self) -> int:
        return DONE if self.over.is_set() else PENDING

    def run(self, timeout: float) -> _Slow:
        return self

    def wait(self, timeout: float) -> bool:
        return self.over.wait(timeout)

    def wait_settled(self, timeout: float) -> bool:
        return self.over.wait(timeout)

    def cancel(self, code: int) -> bool:
        return False
