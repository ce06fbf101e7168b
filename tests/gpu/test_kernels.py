"""The kernels that move block lists: every byte where it belongs, none beside it, ends that tell the truth."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
from kernel_tools import (
    PATIENCE,
    POISON,
    copied,
    end_of,
    expected,
    keep_busy,
    moving,
    new_gate,
    random_bytes,
    settle,
    uploaded,
)

from raynixl import cuda
from raynixl.backends.nvlink_mover import mover
from raynixl.backends.nvlink_tiles import Way
from raynixl.native import DONE, PENDING, STALE, TIMEOUT

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(120)]

KIB, MIB = 1 << 10, 1 << 20
SLOT = 256
LENGTHS = [1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 79, 80, 81, 127, 128, 129, 200, 1000, 4099, 65536]


def rows_of(*columns: Any) -> Any:
    return np.stack([np.asarray(column).reshape(-1) for column in np.broadcast_arrays(*columns)], axis=1)


@pytest.mark.parametrize("way", [Way.TILES, Way.NARROW])
def test_blocks_of_every_alignment_and_length_land_and_nothing_beside_them(way: Way) -> None:
    source, target, nbytes = np.meshgrid(np.arange(16), np.arange(16), np.arange(1, 201), indexing="ij")
    slots = np.arange(source.size).reshape(source.shape) * SLOT + 16
    rows = rows_of(slots + source, slots + target, nbytes)
    data = random_bytes(source.size * SLOT)
    with moving(way) as gpu:
        found = copied(gpu, data, rows, len(data))
    assert (found == expected(data, rows, len(data))).all()


@pytest.mark.parametrize("way", [Way.SMALL, Way.RANGE, Way.ENGINE])
def test_a_single_block_of_every_alignment_lands_and_nothing_beside_it(way: Way) -> None:
    import cupy

    data = random_bytes(70 * KIB)
    source, target = uploaded(data), cupy.empty(70 * KIB, cupy.uint8)
    rng = np.random.default_rng(1)
    with moving(way) as gpu:
        for ours in range(16):
            for theirs in range(16):
                nbytes = int(rng.choice(LENGTHS))
                target.fill(POISON)
                settle()
                row = [source.data.ptr + 64 + ours, target.data.ptr + 64 + theirs, nbytes]
                assert end_of(gpu.program(np.array([row], np.uint64), []).run(PATIENCE)) == DONE
                wanted = expected(data, np.array([[64 + ours, 64 + theirs, nbytes]]), 70 * KIB)
                assert (target.get() == wanted).all(), (ours, theirs, nbytes)


@pytest.mark.parametrize("way", [Way.RANGE, Way.TILES])
@pytest.mark.parametrize("skew", [(0, 0), (3, 3), (5, 0), (0, 9), (13, 6), (2, 14)])
def test_a_long_block_is_whole_across_the_edges_of_its_tiles(way: Way, skew: tuple[int, int]) -> None:
    nbytes = 5 * MIB + 13
    data = random_bytes(nbytes + 64)
    rows = np.array([[skew[0], 4096 - 7 + skew[1], nbytes], [0, 0, 5]])[: 1 if way is Way.RANGE else 2]
    with moving(way) as gpu:
        found = copied(gpu, data, rows, nbytes + 8 * KIB)
    assert (found == expected(data, rows, nbytes + 8 * KIB)).all()


def test_random_blocks_of_all_sizes_are_gathered_and_scattered_by_one_launch() -> None:
    rng = np.random.default_rng(7)
    nbytes = np.concatenate([rng.integers(0, 200, 3000), rng.integers(0, 9000, 2000), rng.integers(0, 300_000, 100)])
    rng.shuffle(nbytes)
    ends = np.cumsum(nbytes + rng.integers(0, 40, len(nbytes)))
    target = ends - nbytes
    data = random_bytes(32 * MIB)
    rows = rows_of(rng.integers(0, len(data) - 300_000, len(nbytes)), target, nbytes)
    found = copied(mover(0), data, rows, int(ends[-1]) + 64)
    assert (found == expected(data, rows, int(ends[-1]) + 64)).all()


def test_a_hundred_thousand_blocks_are_permuted() -> None:
    blocks, nbytes = 100_000, 512
    data = random_bytes(blocks * nbytes)
    order = np.random.default_rng(3).permutation(blocks)
    rows = rows_of(order * nbytes, np.arange(blocks) * nbytes, nbytes)
    found = copied(mover(0), data, rows, len(data))
    assert (found.reshape(blocks, nbytes) == data.reshape(blocks, nbytes)[order]).all()


@pytest.mark.parametrize("rows", [[], [[0, 0, 0]], [[5, 9, 1]], [[0, 0, 0], [5, 9, 1], [7, 7, 0]]])
def test_lists_of_no_block_or_of_one_are_lists(rows: list[list[int]]) -> None:
    data = random_bytes(64)
    table = np.array(rows, np.uint64).reshape(-1, 3)
    assert (copied(mover(0), data, table, 64) == expected(data, table, 64)).all()


def test_host_memory_that_is_pinned_is_read_and_written() -> None:
    nbytes = 8 * MIB
    with cuda.on(0):
        host = cuda.host_alloc(nbytes)
    view = np.frombuffer(cuda.host_bytes(host, nbytes), np.uint8)
    at, data = cuda.host_device_address(host), random_bytes(nbytes)
    view[:] = data
    there = uploaded(np.full(nbytes, POISON, np.uint8))
    gpu = mover(0)
    pages = np.random.default_rng(2).permutation(nbytes // 4096).astype(np.uint64) * np.uint64(4096)
    lists = [np.array([[at, there.data.ptr, nbytes]], np.uint64)]
    lists.append(rows_of(pages + np.uint64(at), np.arange(len(pages)) * 4096 + there.data.ptr, 4096).astype(np.uint64))
    for rows in lists:
        assert end_of(gpu.program(rows, [], touches_host=True).run(PATIENCE)) == DONE
        found, wanted = there.get(), np.concatenate([data[r - at : r - at + n] for r, _, n in rows.tolist()])
        assert (found == wanted).all()
        back = rows[:, [1, 0, 2]].copy()
        view[:] = 0
        assert end_of(gpu.program(back, [], touches_host=True).run(PATIENCE)) == DONE
        assert (view == data).all()
    del view
    with cuda.on(0):
        cuda.host_free(host)


def test_transfers_of_many_threads_end_each_for_itself_and_leave_their_gates() -> None:
    import cupy

    gpu, gate = mover(0), new_gate()
    sizes = [8, 300, 5000, 60_000, 200_000, 3 * MIB]
    data = random_bytes(4 * MIB)
    source = uploaded(data)
    targets = cupy.zeros((8, 4 * MIB), cupy.uint8)
    settle()
    wrong: list[str] = []

    def work(number: int) -> None:
        rng = np.random.default_rng(number)
        for _ in range(60):
            nbytes, at = int(rng.choice(sizes)), int(rng.integers(0, 1000))
            row = [source.data.ptr + at, targets[number].data.ptr + at, nbytes]
            result = gpu.program(np.array([row], np.uint64), [gate]).run(PATIENCE)
            if end_of(result) != DONE:
                wrong.append(f"{nbytes} bytes: {result}")
            with cupy.cuda.Stream(non_blocking=True) as mine:
                found = targets[number][at : at + nbytes].get(stream=mine)
            if not (found == data[at : at + nbytes]).all():
                wrong.append(f"{nbytes} bytes are not there when the transfer has ended")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert not wrong
    assert gate.inflight == 0


def test_a_transfer_follows_a_stream_and_a_stream_follows_the_transfer() -> None:
    import cupy

    gpu, gate = mover(0), new_gate()
    stream = cupy.cuda.Stream(non_blocking=True)
    source, target = uploaded(np.zeros(MIB, np.uint8)), uploaded(np.zeros(MIB, np.uint8))
    program = gpu.program(np.array([[source.data.ptr, target.data.ptr, MIB]], np.uint64), [gate])
    keep_busy(stream, 0.0)
    with stream:  # cupy compiles at first use
        source += 7
        target *= 3
        after = target * 3
    source.fill(0)
    settle()
    keep_busy(stream, 0.05)
    with stream:
        source += 7
    job = program.run_after(PATIENCE, cuda.record(stream, 0))
    assert not isinstance(job, int)
    job.order(stream.ptr, 0)
    with stream:
        after = target * 3
    assert job.code == PENDING  # nobody has waited yet
    assert gate.inflight == 1
    stream.synchronize()
    assert (after.get() == 21).all()
    assert end_of(job) == DONE
    assert job.wait_settled(PATIENCE)
    assert gate.inflight == 0


def test_a_deadline_ends_the_transfer_and_the_gate_is_left_when_the_gpu_is_through() -> None:
    import cupy

    gpu, gate = mover(0), new_gate()
    stream = cupy.cuda.Stream(non_blocking=True)
    source, target = uploaded(random_bytes(64)), uploaded(np.zeros(64, np.uint8))
    program = gpu.program(np.array([[source.data.ptr, target.data.ptr, 64]], np.uint64), [gate])
    keep_busy(stream, 0.0)
    settle()
    keep_busy(stream, 0.3)
    job = program.run_after(0.02, cuda.record(stream, 0))
    assert end_of(job) == TIMEOUT
    assert gate.inflight == 1
    assert end_of(program.run(PATIENCE)) == DONE  # others are not held up by it
    gate.close(STALE)
    assert gate.drain(PATIENCE)  # nobody looks at the job
    assert not isinstance(job, int)
    assert job.settled
    assert program.run(PATIENCE) == STALE


@pytest.mark.parametrize("blocks", [1, 500])
def test_a_captured_transfer_runs_with_every_replay_of_its_graph(blocks: int) -> None:
    import cupy

    gpu, gate = mover(0), new_gate()
    stream = cupy.cuda.Stream(non_blocking=True)
    nbytes = 3000
    source = uploaded(np.zeros(blocks * nbytes, np.uint8))
    target = uploaded(np.zeros(blocks * nbytes, np.uint8))
    at = np.arange(blocks) * nbytes
    order = np.random.default_rng(5).permutation(blocks)
    rows = rows_of(at[order] + source.data.ptr, at + target.data.ptr, nbytes).astype(np.uint64)
    program = gpu.program(rows, [gate])
    with stream:
        source += 0  # cupy compiles at first use
        stream.synchronize()
        stream.begin_capture()
        source += 1
        captured = program.capture(stream.ptr)
        graph = stream.end_capture()
    assert captured.code == 0
    assert gate.inflight == 1
    for replay in range(1, 6):
        graph.launch(stream)
        stream.synchronize()
        assert (target.get() == replay).all()
        assert captured.runs == replay
    captured.close()
    assert gate.inflight == 0
