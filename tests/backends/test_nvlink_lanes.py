"""Lanes of a GPU: order with streams, captured programs, tables on their way, on a driver that is made up."""

from __future__ import annotations

import ctypes
import gc
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
from cuda_fake import FakeCuda
from mover_tools import (
    MIB,
    PATIENCE,
    WAYS,
    Pair,
    as_job,
    holds_in_child,
    wait_until,
)

from raynixl import BackendUnavailable, ConfigError, TransferTimeout, cuda
from raynixl.backends import nvlink_mover
from raynixl.backends.nvlink_kernel import NAMES
from raynixl.backends.nvlink_lane import Lane
from raynixl.backends.nvlink_mover import Mover
from raynixl.backends.nvlink_tiles import Tuning
from raynixl.native import DONE, PENDING, STALE, Gate

pytestmark = pytest.mark.pure


def test_a_program_follows_an_event_and_a_stream_follows_the_job(gpu: Mover, fake: FakeCuda, pair: Pair) -> None:
    stream = fake.work.stream(cuda.primary(0))
    seen: list[bool] = []
    rows = [(0, 0, MIB)]
    program = gpu.program(pair.table(rows), [])
    with fake.held():
        fake.work.put(stream, lambda: pair.data.__setitem__(slice(0, 100), 7))
        fake.work.put(stream, lambda: fake.view(pair.source, 100).__setitem__(slice(None), 7))
        job = as_job(program.run_after(PATIENCE, cuda.record(stream, 0)))
        job.order(stream, 0)  # type: ignore[attr-defined]
        fake.work.put(stream, lambda: seen.append(pair.has(rows)))
        while fake.step():
            pass
    assert job.wait(PATIENCE)
    assert seen == [True]


def test_streams_follow_one_lane_again_and_again(gpu: Mover, fake: FakeCuda, pair: Pair) -> None:
    program, stream = gpu.program(pair.table([(0, 0, 64)]), []), fake.work.stream(cuda.primary(0))
    before = fake.calls["cuEventCreate"]
    for _ in range(3):
        with fake.held():
            job = as_job(program.run(PATIENCE))
            job.order(stream, 0)  # type: ignore[attr-defined]
        assert job.wait(PATIENCE)
    assert fake.calls["cuEventCreate"] == before + 1


def test_a_lane_ends_its_jobs_by_their_numbers_in_whatever_order_threads_bring_them() -> None:
    word, ended = ctypes.c_uint64(0), []
    lane = Lane(1, ctypes.addressof(word), 0, 0)
    jobs = [
        SimpleNamespace(sequence=number, finish=lambda code, n=number: ended.append((n, code)) or [])
        for number in (2, 3, 1)
    ]
    for job in jobs:
        lane.add(job)  # type: ignore[arg-type]
    for reached, wanted in ((0, []), (1, [1]), (2, [1, 2]), (3, [1, 2, 3])):
        word.value = reached
        assert lane.has_ended == (reached > 0)
        lane.finish()
        assert ended == [(number, 0) for number in wanted]


def test_each_lane_and_captured_program_has_a_word_and_a_counter_of_its_own(
    gpu: Mover, fake: FakeCuda, pair: Pair
) -> None:
    program = gpu.program(pair.table([(0, 0, 64)]), [])
    captured = [program.capture(fake.work.stream(cuda.primary(0))) for _ in range(3)]
    with fake.held():
        jobs = [as_job(program.run(PATIENCE)) for _ in range(4)]
    lanes = [job.lane for job in jobs] + [one._lane for one in captured]  # type: ignore[attr-defined]
    for places in ([lane.address for lane in lanes], [lane.flag for lane in lanes], [lane.counter for lane in lanes]):
        assert len(set(places)) == 7
        assert min(abs(one - other) for one in places for other in places if one != other) >= 16
    assert all(job.wait(PATIENCE) for job in jobs)
    for one in captured:
        one.close()


def test_a_lane_that_takes_over_the_word_of_a_captured_program_begins_where_that_has_ended(
    gpu: Mover, fake: FakeCuda, pair: Pair
) -> None:
    program, stream = gpu.program(pair.table([(0, 0, 64)]), []), fake.work.stream(cuda.primary(0))
    captured = program.capture(stream)
    wait_until(lambda: captured.runs == 1)
    captured.close()
    with fake.held():
        fake.work.put(stream, lambda: None)
        job = as_job(program.run_after(PATIENCE, cuda.record(stream, 0)))
        assert job.code == PENDING, "it is taken for a replay"
    assert job.wait(PATIENCE)


def test_a_lists_table_stays_for_as_long_as_its_program(gpu: Mover, fake: FakeCuda, pair: Pair) -> None:
    program = gpu.program(pair.table(WAYS["narrow"]), [])
    for _ in range(2):  # by the second one its table is known to be there
        program.run(PATIENCE)
    other = gpu.program(pair.table(WAYS["tiles"]), [])
    gc.collect()
    program.run(PATIENCE)
    assert pair.has(WAYS["narrow"])
    assert other.run(PATIENCE) == DONE


def test_tables_that_are_on_their_way_at_once_are_kept_apart(gpu: Mover, fake: FakeCuda, pair: Pair) -> None:
    with fake.held():
        program = gpu.program(pair.table(WAYS["narrow"]), [])
        others = [gpu.program(pair.table(WAYS["tiles"]), []) for _ in range(3)]
        job = as_job(program.run(PATIENCE))
    assert job.wait(PATIENCE)
    assert pair.has(WAYS["narrow"])
    assert [other.run(PATIENCE) for other in others] == [DONE] * 3


def test_events_of_tables_that_have_come_are_used_again(gpu: Mover, fake: FakeCuda, pair: Pair) -> None:
    def prepare() -> None:
        program = gpu.program(pair.table(WAYS["narrow"]), [])
        kept.append(program)
        assert program.run(PATIENCE) == DONE
        program.run(PATIENCE)

    kept: list[object] = []
    prepare()
    before = fake.calls["cuEventCreate"]
    for _ in range(20):
        prepare()
    assert fake.calls["cuEventCreate"] <= before + 1, "programs that live hold no events"


def test_captures_that_fail_use_no_words_up(gpu: Mover, fake: FakeCuda, pair: Pair, gate: Gate) -> None:
    program, stream = gpu.program(pair.table([(0, 0, 64)]), [gate]), fake.work.stream(cuda.primary(0))
    before = len(gpu._marks)
    for _ in range(3):
        fake.fail("cuLaunchKernel", 1)
        with pytest.raises(ConfigError, match="cuLaunchKernel"):
            program.capture(stream)
    assert (len(gpu._marks), gate.inflight) == (before, 0)


def test_every_kernel_has_run_before_it_is_needed(gpu: Mover, fake: FakeCuda) -> None:
    assert set(fake.kernels.launches) == set(NAMES)


def test_what_waits_for_an_event_holds_up_nothing_else(gpu: Mover, fake: FakeCuda, pair: Pair) -> None:
    stream = fake.work.stream(cuda.primary(0))
    program = gpu.program(pair.table([(0, 0, 64)]), [])
    is_open = threading.Event()

    def spin() -> Iterator[None]:
        while not is_open.is_set():
            yield

    fake.work.put(stream, spin)
    event = cuda.record(stream, 0)
    waiting = [as_job(program.run_after(PATIENCE, event)) for _ in range(20)]
    others = [as_job(program.run(PATIENCE, out_of_line=True)) for _ in range(5)]
    assert all(job.wait(PATIENCE) and job.code == DONE for job in others)
    assert all(job.code == PENDING for job in waiting)
    is_open.set()
    assert all(job.wait(PATIENCE) and job.code == DONE for job in waiting)


def test_forty_transfers_that_wait_for_streams_wait_each_for_its_own(gpu: Mover, fake: FakeCuda, pair: Pair) -> None:
    program = gpu.program(pair.table([(0, 0, 64)]), [])
    streams = [fake.work.stream(cuda.primary(0)) for _ in range(40)]
    with fake.held():
        jobs = []
        for stream in streams:
            fake.work.put(stream, lambda: None)
            jobs.append(as_job(program.run_after(PATIENCE, cuda.record(stream, 0))))
        assert len({id(job.lane) for job in jobs}) == 40  # type: ignore[attr-defined]
    assert all(job.wait(PATIENCE) and job.code == DONE for job in jobs)


@pytest.mark.parametrize("way", ["tiles", "narrow"])
def test_preparing_and_posting_a_list_wait_for_no_gpu(
    gpu: Mover, fake: FakeCuda, pair: Pair, gate: Gate, way: str
) -> None:
    with fake.held():
        program = gpu.program(pair.table(WAYS[way]), [gate])
        jobs = [as_job(program.run(PATIENCE)) for _ in range(3)]
    assert all(job.wait(PATIENCE) and job.code == DONE for job in jobs)
    assert pair.has(WAYS[way])
    program.run(PATIENCE)
    assert not program.start.arrivals


def test_a_list_that_is_dropped_on_its_way_spoils_none_that_comes_after(gpu: Mover, fake: FakeCuda, pair: Pair) -> None:
    with fake.held():
        for _ in range(5):
            gpu.program(pair.table(WAYS["narrow"]), [])
            gc.collect()
        job = as_job(gpu.program(pair.table(WAYS["tiles"]), []).run(PATIENCE))
    assert job.wait(PATIENCE)
    assert pair.has(WAYS["tiles"])


def test_a_list_whose_table_does_not_come_is_not_captured(
    gpu: Mover, fake: FakeCuda, pair: Pair, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvlink_mover, "_WARM_SECONDS", 0.02)
    with fake.held():
        program = gpu.program(pair.table(WAYS["tiles"]), [gate])
        with pytest.raises(TransferTimeout):
            program.capture(fake.work.stream(cuda.primary(0)))
        assert gate.inflight == 0


def test_the_interpreter_is_let_go_where_a_stream_may_be_full(gpu: Mover, fake: FakeCuda, pair: Pair) -> None:
    rows = [(k * 16384, k * 16384, 8192) for k in range(60)]
    program = gpu.program(pair.table(rows), [], touches_host=True)
    many = Mover(0, Tuning(engine_nbytes=0), core=gpu.core).program(pair.table(rows), [])
    assert (program.start.entries, many.start.entries) == (1, 61)
    loads = []
    with fake.held():
        for _ in range(30):
            job = as_job(many.run(PATIENCE, out_of_line=True))
            loads.append(job.lane.load)  # type: ignore[attr-defined]
    many._mover.close()
    assert loads[:4] == [61] * 4  # a lane each
    assert max(loads) < 256 + 61


def test_ordering_after_a_job_that_has_ended_asks_nothing_of_the_driver(gpu: Mover, fake: FakeCuda, pair: Pair) -> None:
    job = as_job(gpu.program(pair.table([(0, 0, 64)]), []).run(PATIENCE, out_of_line=True))
    assert job.wait(PATIENCE)
    before = fake.calls["cuStreamWaitEvent"]
    job.order(fake.work.stream(cuda.primary(0)), 0)  # type: ignore[attr-defined]
    assert fake.calls["cuStreamWaitEvent"] == before


def test_many_threads_share_the_lanes(gpu: Mover, pair: Pair, gate: Gate) -> None:
    program = gpu.program(pair.table([(0, 0, 4096)]), [gate])
    codes: list[int] = []

    def work() -> None:
        for number in range(40):
            result = program.run(PATIENCE, out_of_line=number % 2 == 0)
            assert isinstance(result, int) or result.wait(PATIENCE)
            codes.append(result if isinstance(result, int) else result.code)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert codes == [DONE] * 240
    assert gate.inflight == 0


def test_lanes_are_shared_when_captured_programs_have_all_words(
    gpu: Mover, fake: FakeCuda, pair: Pair, gate: Gate
) -> None:
    stream = fake.work.stream(cuda.primary(0))
    program = gpu.program(pair.table([(0, 0, 64)]), [gate])
    kept = [program.capture(stream) for _ in range(2047)]
    with fake.held():
        jobs = [as_job(program.run(PATIENCE)) for _ in range(9)]
    assert all(job.wait(PATIENCE) and job.code == DONE for job in jobs)
    for captured in kept:
        captured.close()


@pytest.mark.parametrize("way", ["range", "tiles", "engine"])
def test_a_captured_program_runs_with_every_replay(
    gpu: Mover, fake: FakeCuda, pair: Pair, gate: Gate, way: str
) -> None:
    stream = fake.work.stream(cuda.primary(0))
    program = gpu.program(pair.table(WAYS[way]), [gate])
    fake.work.begin_capture(stream)
    captured = program.capture(stream)
    graph = fake.work.end_capture(stream)
    assert (captured.code, captured.runs, gate.inflight) == (0, 0, 1)
    assert pair.is_untouched
    for replay in (1, 2, 3):
        graph.launch()
        wait_until(lambda replay=replay: captured.runs == replay)
    assert pair.has(WAYS[way])
    captured.close()
    captured.close()
    assert gate.inflight == 0


def test_a_child_that_was_forked_sees_no_replays_and_gives_nothing_back(
    gpu: Mover, fake: FakeCuda, pair: Pair, gate: Gate
) -> None:
    stream = fake.work.stream(cuda.primary(0))
    captured = gpu.program(pair.table(WAYS["tiles"]), [gate]).capture(stream)
    wait_until(lambda: captured.runs == 1)
    piece = gpu.tables.take(1)
    with gpu.tables._lock:  # as another thread may hold it
        assert holds_in_child(lambda: captured.runs == 0 and returns(piece.close))
    captured.close()


def returns(run: Callable[[], object]) -> bool:
    """Whether another thread comes back from it soon."""
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(5.0)
    return not thread.is_alive()


def test_words_of_captured_programs_are_used_again(gpu: Mover, fake: FakeCuda, pair: Pair, gate: Gate) -> None:
    stream = fake.work.stream(cuda.primary(0))
    program = gpu.program(pair.table([(0, 0, 64)]), [gate])
    for _ in range(3000):
        captured = program.capture(stream)
        wait_until(lambda captured=captured: captured.runs == 1)
        captured.close()
    gate.close(STALE)
    assert program.capture(stream).code == STALE
    assert gate.drain(PATIENCE)


def test_too_many_captured_programs_are_refused_and_the_gate_is_left(
    gpu: Mover, fake: FakeCuda, pair: Pair, gate: Gate
) -> None:
    stream = fake.work.stream(cuda.primary(0))
    program = gpu.program(pair.table([(0, 0, 64)]), [gate])
    kept = [program.capture(stream) for _ in range(2047)]
    with pytest.raises(BackendUnavailable, match="close"):
        program.capture(stream)
    assert gate.inflight == len(kept)
    for captured in kept:
        captured.close()
    assert gate.inflight == 0


def test_preparing_again_and_again_takes_no_more_memory(gpu: Mover, fake: FakeCuda, pair: Pair) -> None:
    def prepare() -> None:
        assert gpu.program(pair.table(WAYS["tiles"]), []).run(PATIENCE, out_of_line=True)

    for _ in range(20):
        prepare()
    before = fake.calls["cuMemAlloc_v2"] + fake.calls["cuMemHostAlloc"]
    for _ in range(200):
        prepare()
    assert fake.calls["cuMemAlloc_v2"] + fake.calls["cuMemHostAlloc"] == before
