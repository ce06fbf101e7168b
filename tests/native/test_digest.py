"""The digest of weights in both cores: its definition, what adds up, what is noticed and what is refused."""

from __future__ import annotations

import itertools
import os
import threading

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from native_tools import MIB, address_of, random_bytes

from raynixl.native import COPY, DONE, VM_READ, Engine, Native
from raynixl.native.twin_digest import CONSTANTS, block_factors

pytestmark = pytest.mark.pure

BLOCK = 4096
EDGES = [0, 1, 2, 3, 4, 5, 31, 32, 33, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 7]
SPACE = 64 * 1024

sizes = st.one_of(st.integers(0, 200), st.sampled_from(EDGES), st.integers(0, 5 * BLOCK))
positions = st.one_of(
    st.integers(0, 2 * BLOCK), st.integers(0, 2**63), st.integers(0, 1000).map(lambda arena: (arena << 48) + arena)
)
quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def rows_of(*rows: tuple[int, int, int, int]) -> np.ndarray:
    """Rows of (address, nbytes, position, index)."""
    return np.array(rows, np.uint64).reshape(-1, 4)


def digest(core: Native, data: np.ndarray, position: int = 0, seed: int = 1) -> tuple[int, int]:
    """The digest of one range."""
    out = np.zeros((1, 2), np.uint64)
    core.digest_rows(rows_of((address_of(data), data.nbytes, position, 0)), out, seed)
    return tuple(out[0].tolist())


def defined(data: np.ndarray, position: int, seed: int) -> tuple[int, int]:
    """The same by its definition, byte by byte, in Python's numbers."""
    lanes = [0, 0]
    for at, byte in enumerate(data.tolist()):
        block, offset = divmod(position + at, BLOCK)
        factors = block_factors(np.array([block], np.uint64), seed)[0]
        for lane in (0, 1):
            word = byte << 8 * (offset % 4)
            lanes[lane] += int(factors[lane]) * int(CONSTANTS[lane, offset // 4]) * word
    return lanes[0] % 2**64, lanes[1] % 2**64


def test_constants_lose_no_change_of_one_word_and_no_swap_of_two() -> None:
    for lane in CONSTANTS:
        assert lane.all()
        assert len(np.unique(lane)) == len(lane)
        assert int(lane.max()) < 2**32


def test_blocks_and_seeds_have_factors_of_their_own() -> None:
    blocks = np.concatenate([np.arange(2000, dtype=np.uint64), (np.arange(20, dtype=np.uint64) << np.uint64(36))[1:]])
    factors = np.concatenate([block_factors(blocks, seed) for seed in (0, 1, 2, 2**64 - 1)])
    assert (factors % np.uint64(2) == 1).all()
    assert len(np.unique(factors)) == factors.size


@pytest.mark.parametrize("seed", [0, 2**64 - 1])
def test_a_digest_is_what_is_defined(core: Native, seed: int) -> None:
    memory = random_bytes(3 * BLOCK)
    for start, nbytes, position in [(0, 9, 0), (1, 30, 4090), (3, 4200, 4091), (5, 2, 1), (0, 1, (7 << 48) + 3)]:
        data = memory[start : start + nbytes]
        assert digest(core, data, position, seed) == defined(data, position, seed)


def test_values_stay_the_same_from_release_to_release(core: Native) -> None:
    data = (np.arange(10_001, dtype=np.uint32) * np.uint32(2_654_435_761)).view(np.uint8)[1:-2]
    assert digest(core, data, (3 << 48) + 5, 77) == (0xB8D07F8F3B3F88FB, 0x519DA9212A0E3082)


@quick
@given(data=st.data(), start=st.integers(0, 40), nbytes=sizes, position=positions, seed=st.integers(0, 2**64 - 1))
def test_digests_of_any_partition_add_up(
    core: Native, data: st.DataObject, start: int, nbytes: int, position: int, seed: int
) -> None:
    memory = random_bytes(SPACE, seed=nbytes)[start : start + nbytes]
    cuts = sorted({0, nbytes, *data.draw(st.lists(st.integers(0, nbytes), max_size=12))})
    parts = [(address_of(memory) + a, b - a, position + a, 1) for a, b in itertools.pairwise(cuts)]
    order = data.draw(st.permutations(parts))
    out = np.full((3, 2), 5, np.uint64)
    core.digest_rows(rows_of(*order), out, seed)
    assert tuple((out[1] - np.uint64(5)).tolist()) == digest(core, memory, position, seed)
    assert (out[[0, 2]] == 5).all(), "a sum of another index was touched"


@quick
@given(data=st.data(), count=st.integers(0, 30), seed=st.integers(0, 2**64 - 1))
def test_rows_of_all_kinds_get_the_same_from_compiled_and_twin(
    both: tuple[Native, Native], data: st.DataObject, count: int, seed: int
) -> None:
    memory = random_bytes(SPACE)
    row = st.tuples(st.integers(0, SPACE // 2), sizes, positions, st.integers(0, 3))
    rows = rows_of(*[(address_of(memory) + a, n, p, i) for a, n, p, i in data.draw(st.lists(row, max_size=count))])
    first, second = np.zeros((4, 2), np.uint64), np.zeros((4, 2), np.uint64)
    both[0].digest_rows(rows, first, seed)
    both[1].digest_rows(rows, second, seed)
    assert np.array_equal(first, second)


def test_large_ranges_get_the_same_from_compiled_and_twin(both: tuple[Native, Native]) -> None:
    memory = random_bytes(9 * MIB + 5)
    for start, position in [(0, 0), (3, 1001), (64, 4096 * 3 + 2)]:
        assert digest(both[0], memory[start:], position) == digest(both[1], memory[start:], position)


# What is noticed


@quick
@given(at=st.integers(0, 3 * BLOCK - 1), bit=st.integers(0, 7), position=positions)
def test_every_single_bit_is_noticed_in_both_lanes(core: Native, at: int, bit: int, position: int) -> None:
    memory = random_bytes(3 * BLOCK)
    before = digest(core, memory, position)
    memory[at] ^= 1 << bit
    after = digest(core, memory, position)
    assert before[0] != after[0]
    assert before[1] != after[1]


@quick
@given(
    places=st.lists(st.integers(0, 4 * BLOCK // 2 - 1), min_size=2, max_size=2, unique=True),
    bits=st.lists(st.integers(0, 15), min_size=2, max_size=2),
)
def test_two_bits_are_noticed_signs_of_bf16_too(core: Native, places: list[int], bits: list[int]) -> None:
    values = random_bytes(4 * BLOCK).view(np.uint16)
    before = digest(core, values.view(np.uint8))
    for flipped in (bits, [15, 15]):
        changed = values.copy()
        for place, bit in zip(places, flipped, strict=True):
            changed[place] ^= np.uint16(1 << bit)
        assert digest(core, changed.view(np.uint8)) != before


def test_two_signs_anywhere_in_a_block_are_noticed_by_each_lane() -> None:
    for lane in CONSTANTS:
        sums = (lane[:, None] + lane[None, :])[~np.eye(len(lane), dtype=bool)]
        gaps = (lane[:, None] - lane[None, :])[~np.eye(len(lane), dtype=bool)]
        for change in (sums, gaps):
            for sign in (15, 31):  # of the lower and the upper bf16 of a word
                assert (change << np.uint64(sign)).all()


@pytest.mark.parametrize("nbytes", [4, BLOCK, 8 * BLOCK], ids=["words", "blocks", "chunks"])
def test_swapped_neighbours_are_noticed(core: Native, nbytes: int) -> None:
    memory = random_bytes(32 * BLOCK)
    before = digest(core, memory)
    for at in range(0, len(memory) - nbytes, max(nbytes, len(memory) // 40 // nbytes * nbytes)):
        swapped = memory.copy()
        swapped[at : at + nbytes] = memory[at + nbytes : at + 2 * nbytes]
        swapped[at + nbytes : at + 2 * nbytes] = memory[at : at + nbytes]
        assert digest(core, swapped) != before


def test_position_arena_and_seed_count(core: Native) -> None:
    memory = random_bytes(3 * BLOCK)
    places = [(position, seed) for position in (0, 4, BLOCK, 1 << 48, 2 << 48) for seed in (1, 2, 3)]
    assert len({digest(core, memory, position, seed) for position, seed in places}) == len(places)


def test_zeros_add_nothing(core: Native) -> None:
    assert digest(core, np.zeros(2 * BLOCK + 3, np.uint8), 17, 3) == (0, 0)


# What is refused


@pytest.mark.parametrize(
    "row",
    [(8, 16, 0, 1), (8, 16, 0, 2**64 - 1), (2**64 - 8, 16, 0, 0), (8, 16, 2**64 - 8, 0)],
    ids=["no such sum", "far index", "past memory", "past positions"],
)
def test_impossible_rows_are_refused_before_anything_is_read(core: Native, row: tuple) -> None:
    memory, out = random_bytes(64), np.zeros((1, 2), np.uint64)
    with pytest.raises(ValueError):  # noqa: PT011 - the two cores word it alike, but promise only the type
        core.digest_rows(rows_of((address_of(memory), 64, 0, 0), row), out, 1)
    assert not out.any()


@pytest.mark.parametrize(
    ("rows", "out", "seed"),
    [
        (np.zeros((1, 4), np.int64), np.zeros((1, 2), np.uint64), 1),
        (np.zeros((1, 3), np.uint64), np.zeros((1, 2), np.uint64), 1),
        (np.zeros((2, 8), np.uint64)[:, ::2], np.zeros((1, 2), np.uint64), 1),
        ([[0, 0, 0, 0]], np.zeros((1, 2), np.uint64), 1),
        (np.zeros((1, 4), np.uint64), np.zeros((1, 2), np.int64), 1),
        (np.zeros((1, 4), np.uint64), np.zeros(2, np.uint64), 1),
        (np.zeros((1, 4), np.uint64), np.frombuffer(bytes(16), np.uint64).reshape(1, 2), 1),
        (np.zeros((1, 4), np.uint64), np.zeros((1, 2), np.uint64), -1),
        (np.zeros((1, 4), np.uint64), np.zeros((1, 2), np.uint64), 2**64),
        (np.zeros((1, 4), np.uint64), np.zeros((1, 2), np.uint64), "1"),
    ],
)
def test_arguments_of_another_form_are_refused(core: Native, rows: object, out: object, seed: object) -> None:
    with pytest.raises(TypeError):
        core.digest_rows(rows, out, seed)  # type: ignore[arg-type]


def test_nothing_adds_nothing(core: Native) -> None:
    out = np.full((1, 2), 9, np.uint64)
    core.digest_rows(rows_of(), out, 1)
    core.digest_rows(rows_of((0, 0, 0, 0), (2**64 - 1, 0, 2**64 - 1, 0)), out, 1)
    core.digest_rows(rows_of(), np.zeros((0, 2), np.uint64), 1)
    assert (out == 9).all()


def test_threads_digest_beside_each_other(core: Native) -> None:
    memory = random_bytes(4 * MIB)
    alone = digest(core, memory, 3)
    results: list[tuple[int, int]] = []
    threads = [threading.Thread(target=lambda: results.append(digest(core, memory, 3))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [alone] * 4


@quick
@given(sizes, positions, st.integers(0, 40), st.integers(0, 40), st.integers(0, 2**64 - 1))
def test_what_is_copied_and_digested_in_one_pass_is_both(
    core: Native, nbytes: int, position: int, from_skew: int, to_skew: int, seed: int
) -> None:
    source = random_bytes(SPACE + 64)[from_skew : from_skew + nbytes]
    around = np.full(nbytes + 128, 0xA5, np.uint8)
    target = around[to_skew : to_skew + nbytes]
    out = np.zeros((2, 2), np.uint64)
    core.digest_copy(np.array([(address_of(source), address_of(target), nbytes, position, 1)], np.uint64), out, seed)
    assert (target == source).all()
    assert (around[:to_skew] == 0xA5).all()
    assert (around[to_skew + nbytes :] == 0xA5).all()
    assert tuple(out[1].tolist()) == digest(core, source, position, seed)
    assert not out[0].any()


def test_copies_with_digests_refuse_what_they_cannot_do(core: Native) -> None:
    out, high = np.zeros((1, 2), np.uint64), 2**64 - 1
    for row in ((1, 1, 1, 0, 1), (high, 1, 2, 0, 0), (1, high, 2, 0, 0), (1, 1, 2, high, 0)):
        with pytest.raises(ValueError, match="row"):
            core.digest_copy(np.array([row], np.uint64), out, 1)
    with pytest.raises(TypeError):
        core.digest_copy(np.zeros((1, 4), np.uint64), out, 1)


@pytest.mark.parametrize("nbytes", [1, 4097, 3 * MIB + 5, 9 * MIB])
def test_programs_digest_what_they_copy(core: Native, engine: Engine, nbytes: int) -> None:
    source, target = random_bytes(nbytes), np.zeros(nbytes, np.uint8)
    half = nbytes // 2
    rows = [
        (address_of(source), address_of(target), half),
        (address_of(source) + half, address_of(target) + half, nbytes - half),
    ]
    program = engine.program(COPY, 0, np.array([row for row in rows if row[2]], np.uint64), [])
    shift = (5000 - address_of(target)) % 2**64
    job = program.run_digesting(10.0, shift, 3)
    assert job.wait(10.0)
    assert job.code == DONE
    assert (source == target).all()
    assert job.digest == digest(core, source, 5000, 3)
    plain = program.run(10.0, True)
    assert plain.wait(10.0)
    assert plain.digest is None


def test_programs_that_ask_the_kernel_digest_nothing(core: Native, engine: Engine) -> None:
    source, target = random_bytes(100), np.zeros(100, np.uint8)
    program = engine.program(
        VM_READ, os.getpid(), np.array([(address_of(source), address_of(target), 100)], np.uint64), []
    )
    job = program.run_digesting(10.0, 0, 1)
    assert job.wait(10.0)
    assert (source == target).all()
    assert job.digest is None


def test_a_digesting_run_passes_the_gates(core: Native, engine: Engine) -> None:
    gate = core.Gate()
    gate.close(5)
    source = random_bytes(10)
    program = engine.program(COPY, 0, np.array([(address_of(source), address_of(source), 10)], np.uint64), [gate])
    assert program.run_digesting(1.0, 0, 1) == 5
