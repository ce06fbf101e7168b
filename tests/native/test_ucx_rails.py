"""Programs over several rails at once: which bytes move, and what becomes of them when one rail fails."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from native_tools import KIB, MIB, address_of, finish, random_bytes
from rail_tools import INLINE, Side, Target, Way, moving, rma_rows, until
from rail_tools import TIMEOUT as PATIENCE

from raynixl.backends.ucx_presence import is_installed
from raynixl.native import CLOSED, DONE, LOST, RESET, Gate, Program

pytestmark = [pytest.mark.pure, pytest.mark.skipif(not is_installed(), reason="ucxx is not installed")]

SPACE = 32 * MIB
Rails = tuple[list[Side], list[Way], Target]


@pytest.fixture
def rails(target: Target, make_side: Callable[[str], Side]) -> Rails:
    """Two rails of this process, and the way to one target over each."""
    return two_rails(target, make_side)


def two_rails(target: Target, make_side: Callable[[str], Side]) -> Rails:
    """Make two rails, and the way to one target over each."""
    sides = [make_side(target.tls) for _ in range(2)]
    return sides, [side.reach(target.export) for side in sides], target


def striped(rails: Rails, ours: np.ndarray, is_write: bool, piece: int, gates: list[Gate], repeat: int = 1) -> Program:
    """A program that moves an array in pieces, by the one rail and the other in turn."""
    sides, ways, _target = rails
    rows = [
        (at // piece % 2, address_of(ours) + at, ways[0].address + at, min(piece, ours.nbytes - at))
        for at in range(0, ours.nbytes, piece)
    ]
    paths = [(side.map(ours), way.key) for side, way in zip(sides, ways, strict=True)]
    return sides[0].core.rma(is_write, paths, rma_rows(*rows * repeat), gates, INLINE)


@pytest.mark.parametrize(("nbytes", "piece"), [(100, 50), (8 * MIB, 4 * KIB), (SPACE, MIB)])
def test_bytes_go_over_both_rails(rails: Rails, nbytes: int, piece: int) -> None:
    source, back, target = random_bytes(nbytes), np.zeros(nbytes, dtype=np.uint8), rails[2]
    gate = rails[0][0].core.Gate()
    for _ in range(3):
        target.memory[:] = 0
        assert finish(striped(rails, source, True, piece, [gate]).run(PATIENCE)) == DONE
        assert np.array_equal(target.memory[:nbytes], source)
    assert finish(striped(rails, back, False, piece, [gate]).run(PATIENCE)) == DONE
    assert np.array_equal(back, source)
    assert gate.inflight == 0


@pytest.mark.parametrize("failing", [0, 1])
def test_closing_an_endpoint_of_one_rail_ends_the_job(rails: Rails, failing: int) -> None:
    sides, ways, target = rails
    gate, source = sides[0].core.Gate(), random_bytes(SPACE)
    program = striped(rails, source, True, MIB, [gate], repeat=1000)
    job = moving(program)
    ways[failing].endpoint.close(RESET)
    assert finish(job) == RESET
    assert job.wait_settled(PATIENCE)
    assert gate.inflight == 0
    assert program.run(1.0) == LOST
    other = 1 - failing
    assert ways[other].endpoint.code == 0
    assert finish(sides[other].writer(source, ways[other]).run(PATIENCE)) == DONE
    assert np.array_equal(target.memory[:SPACE], source)


@pytest.mark.parametrize("closing", [0, 1])
def test_a_rail_can_be_closed_before_the_other(rails: Rails, closing: int) -> None:
    sides, ways, _target = rails
    gate, source = sides[0].core.Gate(), random_bytes(SPACE)
    program = striped(rails, source, True, MIB, [gate], repeat=1000)
    job = moving(program)
    assert sides[closing].rail.close(10.0)
    assert finish(job) == CLOSED
    assert until(lambda: job.settled)
    assert gate.inflight == 0
    assert program.run(1.0) == CLOSED
    assert ways[1 - closing].endpoint.code == 0


def test_a_job_over_both_rails_is_reset_on_both(
    make_side: Callable[[str], Side], make_target: Callable[..., Target]
) -> None:
    rails = sides, ways, target = two_rails(make_target("tcp", SPACE), make_side)
    gate, source = sides[0].core.Gate(), random_bytes(SPACE)
    program = striped(rails, source, True, MIB, [gate], repeat=1000)
    job = moving(program)
    target.stop()
    assert job.cancel(RESET)
    assert sides[0].settle(job)
    assert gate.inflight == 0
    assert all(way.endpoint.code in (0, RESET) for way in ways)
