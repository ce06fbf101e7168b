"""What the host hears of lines that kernels refused: each once, whenever it looks, without a word of its own."""

from __future__ import annotations

import pytest

from raynixl.moe.cuda_layer import GpuLayer
from raynixl.moe.cuda_structs import RANKS, STATUSES, Page, Refusal

pytestmark = pytest.mark.pure


@pytest.fixture
def layer() -> GpuLayer:
    """A layer that no GPU has to do with, at its beginning."""
    made = GpuLayer.__new__(GpuLayer)
    made.page, made.ranks = Page(), 3
    made.known_refusals = made._refused = 0
    made._refusals = [0] * RANKS
    return made


def refuse(layer: GpuLayer, rank: int, status: Refusal, operation: int, *, is_end: bool = True) -> None:
    """What kernels write, those that end an operation or those amid it."""
    layer.told.refusals[rank] = operation * STATUSES + status
    layer.told.refused = 2 * operation + is_end


def test_a_refusal_is_told_once(layer):
    assert layer.take_refusal() is None
    refuse(layer, 2, Refusal.RANGE, 7)
    assert layer.take_refusal() == (2, Refusal.RANGE)
    assert layer.take_refusal() is None
    refuse(layer, 2, Refusal.RANGE, 8)
    assert layer.take_refusal() == (2, Refusal.RANGE)


def test_what_is_told_amid_an_operation_and_at_its_end_is_told_once(layer):
    refuse(layer, 0, Refusal.CONFIG, 7, is_end=False)
    assert layer.take_refusal() == (0, Refusal.CONFIG)
    refuse(layer, 0, Refusal.CONFIG, 7)
    assert layer.take_refusal() is None


def test_another_rank_that_is_told_at_the_end_is_not_missed(layer):
    refuse(layer, 0, Refusal.CONFIG, 7, is_end=False)
    assert layer.take_refusal() == (0, Refusal.CONFIG)
    refuse(layer, 1, Refusal.DIFFERS, 7)
    assert layer.take_refusal() == (1, Refusal.DIFFERS)


def test_what_the_caller_knows_is_not_told_again(layer):
    layer.known_refusals = 1 << 1
    refuse(layer, 1, Refusal.RANGE, 7)
    assert layer.take_refusal() is None
    refuse(layer, 1, Refusal.RANGE, 9)
    assert layer.take_refusal() == (1, Refusal.RANGE)


def test_what_kernels_write_the_host_leaves_alone(layer):
    for rank in (0, 2):
        refuse(layer, rank, Refusal.RANGE, 7)
    before = bytes(layer.told)
    assert layer.take_refusal() == (0, Refusal.RANGE)
    assert bytes(layer.told) == before
