"""What both copy engines promise: programs and gates."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest
from native_tools import (
    INLINE,
    MIB,
    address_of,
    copier,
    finish,
    random_bytes,
    started,
    table,
)

from raynixl.native import CANCELLED, COPY, DONE, LOST, PENDING, STALE, Engine, Native

pytestmark = pytest.mark.pure

MakeEngine = Callable[..., Engine]


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
