"""What both copy engines promise: programs, gates, jobs, deadlines, closing."""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from native_tools import INLINE, KIB, MIB, address_of, copier, finish, random_bytes, table, wait_threads_gone

from raynixl.native import CANCELLED, CLOSED, COPY, DONE, LOST, PENDING, STALE, TIMEOUT, Engine, Job, Native

BIG = 64 * MIB
MakeEngine = Callable[..., Engine]


@pytest.fixture(scope="module")
def big() -> tuple[np.ndarray, np.ndarray]:
    """A source and a target that take milliseconds to copy."""
    return random_bytes(BIG), np.zeros(BIG, dtype=np.uint8)


@pytest.fixture
def long_program(core: Native, engine: Engine, big: tuple[np.ndarray, np.ndarray]) -> Iterator[tuple]:
    """A program of about a second (the same bytes again and again), with its gate."""
    gate = core.Gate()
    source, target = big
    row = (address_of(source), address_of(target), BIG)
    yield engine.program(COPY, 0, table(*[row] * 200), [gate]), gate
    assert gate.drain(30.0)


def started(program: object) -> Job:
    """A job of which at least one piece is complete."""
    job = program.run(60.0)  # type: ignore[attr-defined]
    while job.nbytes_done == 0 and job.code == PENDING:
        time.sleep(0.001)
    assert job.code == PENDING
    return job


def test_the_wanted_implementation_is_loaded(core: Native) -> None:
    assert core.NAME in ("native", "ctypes")


# Programs


def test_a_program_knows_its_size(core: Native, engine: Engine) -> None:
    program = engine.program(COPY, 0, table((4096, 8192, 10), (4096, 8192, 20)), [])
    assert (program.nbytes, program.count, engine.threads) == (30, 2, 2)


@pytest.mark.parametrize("rows", [[], [(4096, 8192, 0)], [(2**64 - 8, 4096, 16)], [(4096, 2**64 - 8, 16)]])
def test_impossible_segments_are_refused(engine: Engine, rows: list) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - the two cores word it alike, but promise only the type
        engine.program(COPY, 0, table(*rows), [])


@pytest.mark.parametrize(
    "segments",
    [
        np.zeros((2, 3), dtype=np.int64),
        np.zeros((2, 2), dtype=np.uint64),
        np.zeros(3, dtype=np.uint64),
        np.zeros((3, 4), dtype=np.uint64).T[:, :3],
        [[1, 2, 3]],
    ],
    ids=["signed", "two columns", "flat", "strided", "a list"],
)
def test_segments_of_another_form_are_refused(engine: Engine, segments: object) -> None:
    with pytest.raises(TypeError):
        engine.program(COPY, 0, segments, [])  # type: ignore[arg-type]


def test_what_is_not_a_gate_or_a_mode_is_refused(engine: Engine) -> None:
    with pytest.raises(ValueError, match="mode"):
        engine.program(3, 0, table((4096, 8192, 1)), [])
    with pytest.raises((TypeError, RuntimeError)):
        engine.program(COPY, 0, table((4096, 8192, 1)), [object()])  # type: ignore[list-item]


def test_segments_are_copied_and_may_be_read_only(engine: Engine) -> None:
    source, target = random_bytes(64), np.zeros(64, dtype=np.uint8)
    segments = table((address_of(source), address_of(target), 64))
    segments.flags.writeable = False
    program = engine.program(COPY, 0, segments, [])
    segments.flags.writeable = True
    segments[:] = 0
    assert program.run(1.0) == DONE
    assert (source == target).all()


@pytest.mark.parametrize("threads", [0, -1])
def test_an_engine_needs_a_thread(core: Native, threads: int) -> None:
    with pytest.raises(ValueError, match="thread"):
        core.Engine(threads)


def test_small_programs_are_copied_by_the_caller(engine: Engine) -> None:
    source, target = random_bytes(INLINE), np.zeros(INLINE, dtype=np.uint8)
    assert copier(engine, source, target).run(1.0) == DONE
    assert (source == target).all()


def test_larger_programs_become_jobs(engine: Engine) -> None:
    source, target = random_bytes(INLINE + 1), np.zeros(INLINE + 1, dtype=np.uint8)
    job = copier(engine, source, target).run(10.0)
    assert not isinstance(job, int)
    assert job.wait(10.0)
    assert (job.code, job.nbytes_done, job.settled) == (DONE, INLINE + 1, True)
    assert (source == target).all()


def test_a_small_program_can_be_run_out_of_line(engine: Engine) -> None:
    source, target = random_bytes(8), np.zeros(8, dtype=np.uint8)
    job = copier(engine, source, target).run(10.0, out_of_line=True)
    assert finish(job) == DONE
    assert (source == target).all()


def test_a_dropped_job_goes_on_to_its_end(core: Native, engine: Engine) -> None:
    source, target, gate = random_bytes(8 * MIB), np.zeros(8 * MIB, dtype=np.uint8), core.Gate()
    program = copier(engine, source, target, [gate])
    job = program.run(10.0)
    del job, program
    assert gate.drain(10.0)
    assert (source == target).all()


def test_gates_live_as_long_as_their_programs(core: Native, engine: Engine) -> None:
    source, target = random_bytes(8 * MIB), np.zeros(8 * MIB, dtype=np.uint8)
    programs = [copier(engine, source, target, [core.Gate() for _ in range(3)]) for _ in range(20)]
    jobs = [program.run(10.0) for program in programs]
    programs.clear()
    assert [finish(job) for job in jobs] == [DONE] * 20


# Gates


def test_a_closed_gate_refuses_and_nothing_is_copied(core: Native, engine: Engine) -> None:
    source, target = random_bytes(64), np.zeros(64, dtype=np.uint8)
    first, second = core.Gate(), core.Gate()
    program = copier(engine, source, target, [first, second])
    second.close(STALE)
    assert program.run(1.0) == STALE
    assert program.run(1.0, out_of_line=True) == STALE
    assert not target.any()
    assert (first.inflight, second.inflight) == (0, 0)


def test_the_first_close_of_a_gate_wins(core: Native) -> None:
    gate = core.Gate()
    assert gate.code == 0
    gate.close(LOST)
    gate.close(STALE)
    assert gate.code == LOST


@pytest.mark.parametrize("code", [-1, DONE, PENDING, 1 << 30])
def test_a_gate_cannot_be_closed_with_a_code_of_the_engine(core: Native, code: int) -> None:
    with pytest.raises(ValueError, match="code"):
        core.Gate().close(code)


def test_closing_a_gate_ends_the_job_inside(long_program: tuple) -> None:
    program, gate = long_program
    job = started(program)
    assert gate.inflight == 1
    assert not gate.drain(0.0)
    gate.close(LOST)
    assert job.wait(10.0)
    assert job.code == LOST
    assert gate.drain(10.0)
    assert gate.inflight == 0
    assert job.wait_settled(10.0)
    assert job.nbytes_done < program.nbytes


def test_a_gate_can_let_the_job_inside_finish(core: Native, engine: Engine) -> None:
    source, target, gate = random_bytes(32 * MIB), np.zeros(32 * MIB, dtype=np.uint8), core.Gate()
    program = copier(engine, source, target, [gate])
    job = program.run(30.0)
    gate.close(STALE, abort=False)
    assert program.run(1.0) == STALE
    assert finish(job) == DONE
    assert gate.drain(10.0)
    assert (source == target).all()


def test_a_gate_that_lets_finish_can_still_abort(long_program: tuple) -> None:
    program, gate = long_program
    job = started(program)
    gate.close(STALE, abort=False)
    assert job.code == PENDING
    gate.close(LOST)
    assert job.wait(10.0)
    assert job.code == STALE


def test_many_may_drain_one_gate(long_program: tuple) -> None:
    program, gate = long_program
    job = started(program)
    drained: list[bool] = []
    threads = [threading.Thread(target=lambda: drained.append(gate.drain(30.0))) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert job.cancel(CANCELLED)
    for thread in threads:
        thread.join()
    assert drained == [True] * 4


# Jobs


def test_a_job_can_be_cancelled_in_flight(long_program: tuple) -> None:
    program, gate = long_program
    job = started(program)
    assert job.cancel(CANCELLED)
    assert job.code == CANCELLED
    assert not job.cancel(TIMEOUT)
    assert job.code == CANCELLED
    assert gate.drain(10.0)
    assert job.wait_settled(10.0)
    assert 0 < job.nbytes_done < program.nbytes


def test_a_finished_job_cannot_be_cancelled(engine: Engine) -> None:
    source, target = random_bytes(MIB), np.zeros(MIB, dtype=np.uint8)
    job = copier(engine, source, target).run(10.0)
    assert job.wait(10.0)
    assert not job.cancel(CANCELLED)
    assert job.code == DONE


def test_a_job_past_its_deadline_ends_by_being_looked_at(long_program: tuple) -> None:
    program, gate = long_program
    job = program.run(0.05)
    time.sleep(0.06)
    assert job.code == TIMEOUT
    assert gate.drain(10.0)


def test_waiting_ends_at_the_deadline_of_the_job(long_program: tuple) -> None:
    program, _gate = long_program
    job = program.run(0.05)
    assert job.wait(30.0)
    assert job.code == TIMEOUT
    assert job.wait_settled(10.0)


def test_waiting_ends_at_its_own_timeout(long_program: tuple) -> None:
    program, _gate = long_program
    job = program.run(60.0)
    assert not job.wait(0.02)
    assert not job.wait(0.0)
    assert job.code == PENDING
    assert not job.settled
    assert job.cancel(CANCELLED)


def test_a_waiter_that_gives_up_leaves_the_work_to_the_threads(make_engine: MakeEngine) -> None:
    engine = make_engine(threads=1)
    source, target = random_bytes(BIG), np.zeros(BIG, dtype=np.uint8)
    job = copier(engine, source, target).run(30.0)
    job.wait(0.001)
    while job.code == PENDING:
        time.sleep(0.01)
    assert job.code == DONE
    assert (source == target).all()


def test_a_queued_job_ends_at_its_deadline_behind_a_long_one(
    make_engine: MakeEngine, big: tuple[np.ndarray, np.ndarray]
) -> None:
    engine = make_engine(threads=1)
    rows = [(address_of(big[0]), address_of(big[1]), BIG)] * 400
    first = engine.program(COPY, 0, table(*rows), []).run(60.0)
    bell = os.eventfd(0, os.EFD_NONBLOCK)
    queued = copier(engine, big[0], big[1]).run(0.1)
    assert queued.arm(bell)
    assert select.select([bell], [], [], 10.0)[0]
    assert queued.code == TIMEOUT
    assert first.cancel(CANCELLED)
    os.close(bell)


def test_eventfds_are_written_once_when_a_job_ends(long_program: tuple) -> None:
    program, _gate = long_program
    job = started(program)
    bells = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2)]
    assert all(job.arm(bell) for bell in bells)
    assert select.select(bells, [], [], 0.0)[0] == []
    job.cancel(CANCELLED)
    for bell in bells:
        assert select.select([bell], [], [], 10.0)[0] == [bell]
        assert os.eventfd_read(bell) == 1
        os.close(bell)


def test_arming_refuses_an_ended_job_and_a_closed_descriptor(long_program: tuple) -> None:
    program, _gate = long_program
    job = started(program)
    with pytest.raises(OSError, match="descriptor"):
        job.arm(999_999)
    job.cancel(CANCELLED)
    bell = os.eventfd(0, os.EFD_NONBLOCK)
    assert not job.arm(bell)
    os.close(bell)


def test_an_armed_descriptor_may_be_closed_by_its_owner(engine: Engine, long_program: tuple) -> None:
    program, _gate = long_program
    job = started(program)
    bell = os.eventfd(0, os.EFD_NONBLOCK)
    assert job.arm(bell)
    os.close(bell)
    other = os.eventfd(0, os.EFD_NONBLOCK)  # takes the same number
    assert job.cancel(CANCELLED)
    assert job.wait_settled(10.0)
    with pytest.raises(BlockingIOError):
        os.eventfd_read(other)
    os.close(other)


def test_one_program_runs_many_times_at_once(core: Native, engine: Engine) -> None:
    source, target, gate = random_bytes(4 * MIB), np.zeros(4 * MIB, dtype=np.uint8), core.Gate()
    program = copier(engine, source, target, [gate])
    jobs = [program.run(30.0) for _ in range(20)]
    assert [finish(job) for job in jobs] == [DONE] * 20
    assert gate.drain(1.0)
    assert (source == target).all()


def test_sixteen_threads_post_at_once(core: Native, make_engine: MakeEngine) -> None:
    engine, gate = make_engine(threads=4), core.Gate()
    sizes = (8, 4 * KIB, 20 * KIB, INLINE, INLINE + 1, 3 * MIB)
    wrong: list[object] = []

    def post(seed: int) -> None:
        for size in sizes * 3:
            source, target = random_bytes(size, seed), np.zeros(size, dtype=np.uint8)
            code = finish(copier(engine, source, target, [gate]).run(30.0))
            if code != DONE or not (source == target).all():
                wrong.append((size, code))

    threads = [threading.Thread(target=post, args=(seed,)) for seed in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert gate.inflight == 0


def test_a_running_job_shares_its_engine(long_program: tuple, engine: Engine) -> None:
    program, _gate = long_program
    job = started(program)
    source, target = random_bytes(2 * MIB), np.zeros(2 * MIB, dtype=np.uint8)
    assert finish(copier(engine, source, target).run(30.0)) == DONE  # the waiter copies
    assert job.cancel(CANCELLED)


# Closing


def test_closing_ends_running_and_queued_jobs(
    core: Native, make_engine: MakeEngine, big: tuple[np.ndarray, np.ndarray]
) -> None:
    engine, gate = make_engine(threads=1), core.Gate()
    rows = [(address_of(big[0]), address_of(big[1]), BIG)] * 400
    program = engine.program(COPY, 0, table(*rows), [gate])
    jobs = [program.run(60.0) for _ in range(5)]
    bell = os.eventfd(0, os.EFD_NONBLOCK)
    assert jobs[4].arm(bell)
    assert engine.close(10.0)
    assert [job.code for job in jobs] == [CLOSED] * 5
    assert all(job.settled for job in jobs)
    assert os.eventfd_read(bell) == 1
    assert gate.inflight == 0
    assert engine.close(0.0)
    os.close(bell)


def test_a_closed_engine_refuses(core: Native, engine: Engine) -> None:
    source, target, gate = random_bytes(64), np.zeros(64, dtype=np.uint8), core.Gate()
    program = copier(engine, source, target, [gate])
    assert engine.close(1.0)
    assert program.run(1.0) == CLOSED
    assert program.run(1.0, out_of_line=True) == CLOSED
    assert not target.any()
    assert gate.inflight == 0


def test_threads_start_when_needed_and_go_when_closed(make_engine: MakeEngine) -> None:
    before = set(os.listdir("/proc/self/task"))
    engine = make_engine(threads=3)
    source, target = random_bytes(16 * MIB), np.zeros(16 * MIB, dtype=np.uint8)
    copier(engine, source[:64], target[:64]).run(1.0)
    assert set(os.listdir("/proc/self/task")) <= before
    assert finish(copier(engine, source, target).run(10.0)) == DONE
    assert 1 <= len(set(os.listdir("/proc/self/task")) - before) <= 3
    assert engine.close(10.0)
    wait_threads_gone(before)


def test_idle_threads_use_no_processor(make_engine: MakeEngine) -> None:
    engine = make_engine(threads=3)
    source, target = random_bytes(16 * MIB), np.zeros(16 * MIB, dtype=np.uint8)
    assert finish(copier(engine, source, target).run(10.0)) == DONE
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before < 0.1
