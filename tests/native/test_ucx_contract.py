"""What both cores promise over UCX: which bytes move, what is refused, and how runs end that go well."""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable

import numpy as np
import pytest
from native_tools import KIB, MIB, address_of, finish, random_bytes
from rail_tools import INLINE, Side, Target, Way, rma_rows

from raynixl.backends.ucx_presence import is_installed
from raynixl.native import CANCELLED, CLOSED, DONE, LOST, STALE
from raynixl.native.ucx import HOST_MEMORY

pytestmark = [pytest.mark.pure, pytest.mark.skipif(not is_installed(), reason="ucxx is not installed")]

SPACE = 32 * MIB


@pytest.fixture
def alone(make_side: Callable[[str], Side]) -> tuple[Side, np.ndarray, Way]:
    """A rail with a way to some memory of its own process."""
    side, memory = make_side("cma,tcp"), np.zeros(MIB, dtype=np.uint8)
    return side, memory, side.reach(side.export(memory))


# Bytes


@pytest.mark.parametrize("nbytes", [1, 7, 4 * KIB, 100_001, INLINE, 3 * MIB + 5, SPACE])
def test_bytes_are_written_and_read_back(side: Side, way: Way, target: Target, nbytes: int) -> None:
    source, back = random_bytes(nbytes), np.zeros(nbytes, dtype=np.uint8)
    assert finish(side.writer(source, way).run(30.0)) == DONE
    assert np.array_equal(target.memory[:nbytes], source)
    assert not target.memory[nbytes:].any()
    target.memory[:nbytes] ^= 0xFF
    assert finish(side.reader(back, way).run(30.0)) == DONE
    assert np.array_equal(back, source ^ 0xFF)


@pytest.mark.parametrize(("count", "block"), [(3, 20), (5000, 24), (5000, 4 * KIB), (9, 3 * MIB)])
@pytest.mark.parametrize("is_write", [True, False], ids=["write", "read"])
def test_scattered_blocks_land_where_they_belong(
    side: Side, way: Way, target: Target, is_write: bool, count: int, block: int
) -> None:
    ours, order = random_bytes(count * block), np.random.default_rng(2).permutation(count).astype(np.uint64)
    theirs = target.memory[: count * block]
    theirs[:] = random_bytes(count * block, seed=1)
    source, sink = (ours.copy(), theirs) if is_write else (theirs.copy(), ours)
    rows = np.zeros((count, 4), dtype=np.uint64)
    rows[:, 1] = address_of(ours) + np.arange(count, dtype=np.uint64) * np.uint64(block)
    rows[:, 2] = way.address + order * np.uint64(block)
    rows[:, 3] = block
    program = side.core.rma(is_write, [(side.map(ours), way.key)], rows, [], INLINE)
    assert (program.nbytes, program.count) == (count * block, count)
    for _ in range(2):
        assert finish(program.run(30.0)) == DONE
        blocks, landed = source.reshape(count, block), sink.reshape(count, block)
        assert np.array_equal(*((landed[order], blocks) if is_write else (landed, blocks[order])))
        sink[:] = 0


def test_rows_take_the_path_they_name(side: Side, way: Way, target: Target) -> None:
    first, second = random_bytes(100, seed=1), random_bytes(200, seed=2)
    paths = [(side.map(first), way.key), (side.map(second), side.reach(target.export).key)]
    rows = rma_rows((1, address_of(second), way.address + 500, 200), (0, address_of(first), way.address, 100))
    assert finish(side.core.rma(True, paths, rows, [], INLINE).run(30.0)) == DONE
    assert np.array_equal(target.memory[:100], first)
    assert np.array_equal(target.memory[500:700], second)


def test_a_process_reaches_its_own_memory(alone: tuple[Side, np.ndarray, Way]) -> None:
    side, memory, way = alone
    source, back = random_bytes(MIB), np.zeros(MIB, dtype=np.uint8)
    assert finish(side.writer(source, way).run(30.0)) == DONE
    assert np.array_equal(memory, source)
    assert finish(side.reader(back, way).run(30.0)) == DONE
    assert np.array_equal(back, source)


def test_the_lanes_are_named(way: Way, target: Target) -> None:
    names = {name.partition("/")[0] for name in way.endpoint.transports}
    assert names == set(target.tls.split(","))


# What is refused


@pytest.mark.parametrize(
    "change",
    [
        (1, 0, 0, 8),  # a path that there is not
        (0, 0, 0, 0),
        (0, -1, 0, 8),
        (0, 0, -1, 8),
        (0, 0, 0, 101),
        (0, 93, 0, 8),
        (0, 0, MIB - 7, 8),
        (0, 2**64 - 1, 0, 8),
        (0, 0, 0, 2**64 - 1),
    ],
)
def test_rows_outside_the_memory_of_their_path_are_refused(alone: tuple[Side, np.ndarray, Way], change: tuple) -> None:
    side, _memory, way = alone
    ours = np.zeros(100, dtype=np.uint8)
    path, local, remote, nbytes = change
    good = (0, address_of(ours), way.address, 100)
    bad = (path, (address_of(ours) + local) % 2**64, (way.address + remote) % 2**64, nbytes)
    paths = [(side.map(ours), way.key)]
    for rows in ([bad], [good, bad], [bad, good]):
        with pytest.raises(ValueError):  # noqa: PT011 - the two cores word it alike, but promise only the type
            side.core.rma(True, paths, rma_rows(*rows), [], INLINE)


def test_no_rows_and_no_paths_are_refused(alone: tuple[Side, np.ndarray, Way]) -> None:
    side, memory, way = alone
    with pytest.raises(ValueError):  # noqa: PT011
        side.core.rma(True, [(side.map(memory), way.key)], rma_rows(), [], INLINE)
    with pytest.raises(ValueError):  # noqa: PT011
        side.core.rma(True, [], rma_rows((0, address_of(memory), way.address, 1)), [], INLINE)


@pytest.mark.parametrize(
    "rows",
    [
        np.zeros((2, 4), dtype=np.int64),
        np.zeros((2, 3), dtype=np.uint64),
        np.zeros(4, dtype=np.uint64),
        np.zeros((4, 8), dtype=np.uint64)[:, ::2],
        [[0, 1, 2, 3]],
    ],
    ids=["signed", "three columns", "flat", "strided", "a list"],
)
def test_rows_of_another_form_are_refused(alone: tuple[Side, np.ndarray, Way], rows: object) -> None:
    side, memory, way = alone
    with pytest.raises(TypeError):
        side.core.rma(True, [(side.map(memory), way.key)], rows, [], INLINE)  # type: ignore[arg-type]


def test_what_is_no_path_and_no_gate_is_refused(alone: tuple[Side, np.ndarray, Way]) -> None:
    side, memory, way = alone
    mapping, rows = side.map(memory), rma_rows((0, address_of(memory), way.address, 1))
    for path in [(way.key, mapping), (mapping, None), (mapping,), 5]:
        with pytest.raises(TypeError):
            side.core.rma(True, [path], rows, [], INLINE)  # type: ignore[list-item]
    with pytest.raises(TypeError):
        side.core.rma(True, [(mapping, way.key)], rows, [object()], INLINE)  # type: ignore[list-item]


def test_rows_are_copied_and_may_be_read_only(alone: tuple[Side, np.ndarray, Way]) -> None:
    side, memory, way = alone
    source = random_bytes(64)
    rows = rma_rows((0, address_of(source), way.address, 64))
    rows.flags.writeable = False
    program = side.core.rma(True, [(side.map(source), way.key)], rows, [], INLINE)
    rows.flags.writeable = True
    rows[:] = 0
    assert finish(program.run(10.0)) == DONE
    assert np.array_equal(memory[:64], source)


# Runs that go well


def test_a_closed_gate_refuses_and_nothing_is_written(side: Side, way: Way, target: Target) -> None:
    first, second = side.core.Gate(), side.core.Gate()
    program = side.writer(random_bytes(64), way, [first, second])
    second.close(STALE)
    assert program.run(1.0) == STALE
    assert program.run(1.0, out_of_line=True) == STALE
    assert (first.inflight, second.inflight) == (0, 0)
    assert not target.memory.any()


@pytest.mark.parametrize("nbytes", [8, 2 * MIB])
def test_a_run_out_of_line_is_a_job_that_rings(side: Side, way: Way, target: Target, nbytes: int) -> None:
    source, gate = random_bytes(nbytes), side.core.Gate()
    job = side.writer(source, way, [gate]).run(30.0, out_of_line=True)
    assert not isinstance(job, int)
    bell = os.eventfd(0, os.EFD_NONBLOCK)
    if job.arm(bell):
        assert select.select([bell], [], [], 30.0)[0] == [bell]
        assert os.eventfd_read(bell) == 1
    assert (job.code, job.nbytes_done) == (DONE, nbytes)
    assert job.wait_settled(10.0)
    assert job.settled
    assert gate.inflight == 0
    assert not job.arm(bell)
    assert not job.cancel(CANCELLED)
    assert np.array_equal(target.memory[:nbytes], source)
    os.close(bell)


def test_arming_with_a_closed_descriptor_is_an_error(side: Side, way: Way) -> None:
    job = side.writer(random_bytes(16 * MIB), way, repeat=20).run(30.0, out_of_line=True)
    assert not isinstance(job, int), f"it was refused with {job}"
    with pytest.raises(OSError, match="descriptor"):
        job.arm(999_999)
    with pytest.raises(ValueError, match="code"):
        job.cancel(1)
    assert finish(job) == DONE


def test_a_dropped_job_goes_on_to_its_end(side: Side, way: Way, target: Target) -> None:
    source, gate = random_bytes(SPACE), side.core.Gate()
    program = side.writer(source, way, [gate])
    job = program.run(30.0)
    del job, program
    assert gate.drain(30.0)
    assert np.array_equal(target.memory, source)


def test_one_program_runs_many_times_at_once(side: Side, way: Way, target: Target) -> None:
    source, gate = random_bytes(2 * MIB), side.core.Gate()
    program = side.writer(source, way, [gate])
    jobs = [program.run(30.0) for _ in range(10)]
    assert [finish(job) for job in jobs] == [DONE] * 10
    assert gate.drain(10.0)
    assert np.array_equal(target.memory[: 2 * MIB], source)


def test_threads_post_at_once(side: Side, way: Way, target: Target) -> None:
    sizes, wrong = (8, 4 * KIB, 200 * KIB, 3 * MIB), []
    room = 4 * MIB

    def post(seed: int) -> None:
        for size in sizes * 2:
            source, back, at = random_bytes(size, seed), np.zeros(size, dtype=np.uint8), way.address + seed * room
            for is_write, array in ((True, source), (False, back)):
                mapping = side.rail.map(address_of(array), size, HOST_MEMORY)
                rows = rma_rows((0, address_of(array), at, size))
                code = finish(side.core.rma(is_write, [(mapping, way.key)], rows, [], INLINE).run(30.0))
                mapping.unmap()
                if code != DONE:
                    wrong.append((seed, size, code))
            if not np.array_equal(source, back):
                wrong.append((seed, size, "bytes"))

    threads = [threading.Thread(target=post, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# Giving back


def test_what_was_given_back_can_be_given_back_again(side: Side, way: Way) -> None:
    mapping = side.map(np.zeros(100, dtype=np.uint8))
    assert mapping.key
    for _ in range(2):
        mapping.unmap()
        way.key.destroy()
    with pytest.raises(RuntimeError):
        _ = mapping.key


def test_a_closed_endpoint_keeps_its_first_code_and_lets_go(side: Side, way: Way) -> None:
    program = side.writer(random_bytes(8), way)
    assert finish(program.run(10.0)) == DONE
    assert (way.endpoint.code, way.endpoint.status, way.endpoint.is_gone) == (0, "", False)
    way.endpoint.close(LOST)
    way.endpoint.close(STALE)
    assert way.endpoint.code == LOST
    assert program.run(1.0) == LOST
    assert way.endpoint.transports == []
    with pytest.raises(RuntimeError):
        way.endpoint.unpack(b"", 0, 0)
    assert side.rail.close(10.0)
    assert way.endpoint.is_gone


def test_a_closed_rail_refuses(side: Side, way: Way, target: Target) -> None:
    source, gate = random_bytes(64), side.core.Gate()
    program = side.writer(source, way, [gate])
    assert side.rail.close(10.0)
    assert side.rail.close(0.0)
    assert program.run(1.0) == CLOSED
    assert program.run(1.0, out_of_line=True) == CLOSED
    assert gate.inflight == 0
    assert way.endpoint.code == CLOSED
    for refused in (lambda: side.map(source), lambda: side.reach(target.export)):
        with pytest.raises(RuntimeError):
            refused()
