"""What both copy engines promise: jobs, deadlines, event descriptors, many at once, closing."""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
from native_tools import (
    BIG,
    INLINE,
    KIB,
    MIB,
    address_of,
    copier,
    finish,
    random_bytes,
    started,
    table,
    wait_threads_gone,
)

from raynixl.native import CANCELLED, CLOSED, COPY, DONE, PENDING, TIMEOUT, Engine, Native

pytestmark = pytest.mark.pure

MakeEngine = Callable[..., Engine]


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
