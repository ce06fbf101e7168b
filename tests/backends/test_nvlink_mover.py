"""Programs of a GPU and their jobs: ends, gates, deadlines, failures, on a driver that is made up."""

from __future__ import annotations

import errno
import gc
import os
import threading

import numpy as np
import pytest
from cuda_fake import FakeCuda
from mover_tools import (
    PATIENCE,
    WAYS,
    Pair,
    as_job,
    holds_in_child,
    is_readable,
    wait_until,
)

from raynixl import ConfigError
from raynixl.backends.nvlink_mover import Mover, mover
from raynixl.backends.nvlink_watch import Watch
from raynixl.native import CANCELLED, CLOSED, DONE, PENDING, STALE, TIMEOUT, Gate, Launcher, load

pytestmark = pytest.mark.pure


@pytest.mark.parametrize("way", WAYS)
def test_every_way_moves_the_blocks_and_leaves_the_gate(
    gpu: Mover, fake: FakeCuda, pair: Pair, gate: Gate, way: str
) -> None:
    program = gpu.program(pair.table(WAYS[way]), [gate])
    fake.kernels.launches.clear()
    result = program.run(PATIENCE)
    assert isinstance(result, int) or result.wait(PATIENCE)
    assert (result if isinstance(result, int) else result.code) == DONE
    assert pair.has(WAYS[way])
    assert gate.inflight == 0
    assert (program.count, program.nbytes) == (len(WAYS[way]), sum(row[2] for row in WAYS[way]))
    assert fake.kernels.launches == ["raynixl_signal" if way == "engine" else f"raynixl_copy_{way}"]


def test_nothing_to_move_is_done(gpu: Mover, gate: Gate) -> None:
    assert gpu.program(np.empty((0, 3), np.uint64), [gate]).run(PATIENCE) == DONE
    assert gpu.program(np.array([[4096, 8192, 0]], np.uint64), [gate]).run(PATIENCE) == DONE


def test_what_is_small_ends_inside_the_post_unless_it_must_not(gpu: Mover, pair: Pair) -> None:
    program = gpu.program(pair.table([(0, 0, 64)]), [])
    assert program.run(PATIENCE) == DONE
    job = as_job(program.run(PATIENCE, out_of_line=True))
    assert job.wait(PATIENCE)
    assert job.code == DONE


@pytest.mark.parametrize("way", WAYS)
def test_a_job_ends_when_the_gpu_is_through_and_the_gate_is_left_then(
    gpu: Mover, fake: FakeCuda, pair: Pair, gate: Gate, way: str
) -> None:
    program = gpu.program(pair.table(WAYS[way]), [gate])
    with fake.held():
        job = as_job(program.run(PATIENCE))
        assert (job.code, job.settled, job.nbytes_done, gate.inflight) == (PENDING, False, 0, 1)
        assert not job.wait(0.005)
        assert not job.wait_settled(0.005)
    assert job.wait(PATIENCE)
    assert (job.code, job.settled, job.nbytes_done, gate.inflight) == (DONE, True, program.nbytes, 0)
    assert pair.has(WAYS[way])


def test_a_closed_gate_refuses_and_those_before_it_are_left(gpu: Mover, pair: Pair, gate: Gate) -> None:
    closed = load(native=True).Gate()
    closed.close(STALE)
    assert gpu.program(pair.table([(0, 0, 64)]), [gate, closed, gate]).run(PATIENCE) == STALE
    assert gate.inflight == 0
    assert pair.is_untouched


def test_a_deadline_ends_the_job_and_the_gate_stays_entered_while_the_gpu_works(
    gpu: Mover, fake: FakeCuda, pair: Pair, gate: Gate
) -> None:
    program = gpu.program(pair.table([(0, 0, 64)]), [gate])
    with fake.held():
        job = as_job(program.run(0.01))
        assert job.wait(PATIENCE)
        assert (job.code, job.settled, gate.inflight) == (TIMEOUT, False, 1)
        assert not job.cancel(CANCELLED)
        assert not gate.drain(0.01)
    assert gate.drain(PATIENCE)
    assert job.settled
    assert job.code == TIMEOUT


def test_cancelling_ends_the_job_for_its_user_only(gpu: Mover, fake: FakeCuda, pair: Pair, gate: Gate) -> None:
    program = gpu.program(pair.table([(0, 0, 64)]), [gate])
    with fake.held():
        job = as_job(program.run(PATIENCE))
        with pytest.raises(ValueError, match="2 or more"):
            job.cancel(DONE)
        assert job.cancel(CANCELLED)
        assert not job.cancel(STALE)
        assert (job.code, job.settled, gate.inflight) == (CANCELLED, False, 1)
    assert job.wait_settled(PATIENCE)
    assert gate.inflight == 0
    assert pair.has([(0, 0, 64)])


def test_a_gate_that_is_closed_with_abort_ends_the_job(gpu: Mover, fake: FakeCuda, pair: Pair, gate: Gate) -> None:
    program = gpu.program(pair.table([(0, 0, 64)]), [gate])
    with fake.held():
        job = as_job(program.run(PATIENCE))
        gate.close(STALE, abort=False)
        assert job.code == PENDING
        gate.close(STALE)
        assert job.wait(PATIENCE)
        assert job.code == STALE
        assert gate.inflight == 1
    assert gate.drain(PATIENCE)


def test_an_armed_descriptor_is_told_of_the_end_that_nobody_waits_for(gpu: Mover, fake: FakeCuda, pair: Pair) -> None:
    bell = os.eventfd(0, os.EFD_NONBLOCK)
    program = gpu.program(pair.table([(0, 0, 64)]), [])
    with fake.held():
        jobs = [as_job(program.run(PATIENCE)) for _ in range(3)]
        assert all(job.arm(bell) for job in jobs)
        assert not is_readable(bell, 0.01)
    assert is_readable(bell)
    wait_until(lambda: all(job.settled for job in jobs))
    assert os.eventfd_read(bell) == 3
    assert not jobs[0].arm(bell)
    os.close(bell)


def test_a_deadline_is_told_to_an_armed_descriptor(gpu: Mover, fake: FakeCuda, pair: Pair) -> None:
    bell = os.eventfd(0, os.EFD_NONBLOCK)
    program = gpu.program(pair.table([(0, 0, 64)]), [])
    with fake.held():
        job = as_job(program.run(0.5))
        assert job.arm(bell)
        assert is_readable(bell)
        assert job.code == TIMEOUT
    assert job.wait_settled(PATIENCE)
    os.close(bell)


def test_a_descriptor_that_is_not_open_is_refused(gpu: Mover, fake: FakeCuda, pair: Pair) -> None:
    program = gpu.program(pair.table([(0, 0, 64)]), [])
    with fake.held():
        job = as_job(program.run(PATIENCE))
        with pytest.raises(OSError, match="Bad file descriptor"):
            job.arm(1 << 20)
    assert job.wait(PATIENCE)


def test_jobs_that_nobody_holds_leave_their_gates(gpu: Mover, fake: FakeCuda, pair: Pair, gate: Gate) -> None:
    program = gpu.program(pair.table([(0, 0, 2 * 4096)]), [gate])
    with fake.held():
        for _ in range(20):
            program.run(PATIENCE)
        assert gate.inflight == 20
    assert gate.drain(PATIENCE)


def test_a_program_that_is_dropped_keeps_its_table_until_the_gpu_is_through(
    gpu: Mover, fake: FakeCuda, pair: Pair
) -> None:
    rows = WAYS["tiles"]
    program = gpu.program(pair.table(rows), [])
    with fake.held():
        job = as_job(program.run(PATIENCE))
        del program
        gc.collect()
    assert job.wait(PATIENCE)
    assert pair.has(rows)


def test_without_a_thread_those_who_wait_look_and_the_next_job_tries_again(
    gpu: Mover,
    fake: FakeCuda,
    pair: Pair,
    gate: Gate,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    program = gpu.program(pair.table([(0, 0, 64)]), [gate])
    with monkeypatch.context() as patch, fake.held():
        patch.setattr(threading.Thread, "start", no_more_threads)
        job = as_job(program.run(PATIENCE))
    assert "not watched" in caplog.text
    assert job.wait(PATIENCE)
    with fake.held():
        program.run(PATIENCE)
    assert gate.drain(PATIENCE)


def no_more_threads(_: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


def test_a_launch_that_fails_is_an_error_code_and_leaves_the_gate(
    gpu: Mover, fake: FakeCuda, pair: Pair, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    program = gpu.program(pair.table([(0, 0, 64)]), [gate])
    fake.fail("cuLaunchKernel", 719)
    assert program.run(PATIENCE) == -errno.EIO
    assert gate.inflight == 0
    assert "does not take a transfer" in caplog.text
    assert program.run(PATIENCE) == DONE


def test_a_gpu_that_fails_ends_its_jobs(
    gpu: Mover, fake: FakeCuda, pair: Pair, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    program = gpu.program(pair.table([(0, 0, 64)]), [gate])
    with fake.held():
        jobs = [as_job(program.run(PATIENCE)) for _ in range(3)]
        fake.fail("cuStreamQuery", 700, times=len(jobs))
        assert all(job.wait(PATIENCE) for job in jobs)
        assert [job.code for job in jobs] == [-errno.EIO] * 3
        assert gate.inflight == 0
    assert "failed" in caplog.text


def test_what_has_ended_before_the_gpu_fails_has_ended_well(gpu: Mover, fake: FakeCuda, pair: Pair) -> None:
    program = gpu.program(pair.table([(0, 0, 64)]), [])
    with fake.held():
        jobs = [as_job(program.run(PATIENCE)) for _ in range(5)]
        lane = jobs[0].lane  # type: ignore[attr-defined]
        assert jobs[4].lane is lane  # type: ignore[attr-defined]
        assert [fake.step() for _ in range(4)] == [True] * 4
        fake.fail("cuStreamQuery", 700, times=1000)
        gpu.check(lane)
        fake.forgive("cuStreamQuery")
    assert [job.code for job in jobs] == [DONE, DONE, DONE, DONE, -errno.EIO]


def test_a_job_that_ends_while_it_is_armed_is_not_armed(
    gpu: Mover, fake: FakeCuda, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, bell, dup = gpu.program(pair.table([(0, 0, 64)]), []), os.eventfd(0, os.EFD_NONBLOCK), os.dup
    with fake.held():
        job = as_job(program.run(PATIENCE))

        def ends(fd: int) -> int:
            assert job.cancel(CANCELLED)
            return dup(fd)

        monkeypatch.setattr(os, "dup", ends)
        assert not job.arm(bell)
        monkeypatch.undo()
    assert job.wait_settled(PATIENCE)
    os.close(bell)


def test_gates_stay_entered_while_a_part_of_what_failed_is_on_the_lane(
    gpu: Mover, fake: FakeCuda, pair: Pair, gate: Gate
) -> None:
    program = gpu.program(pair.table(WAYS["engine"]), [gate])
    with fake.held():
        fake.fail("cuLaunchKernel", 1)
        assert program.run(PATIENCE) == -errno.EIO  # its copy is on the lane
        assert gate.inflight == 1
        assert not gate.drain(0.01)
    assert gate.drain(PATIENCE)
    fake.fail("cuLaunchKernel", 719, times=2)
    assert program.run(PATIENCE) == -errno.EIO
    assert gate.inflight == 0


def test_a_copy_that_cuda_does_not_take_is_an_error_and_no_end(
    gpu: Mover, fake: FakeCuda, pair: Pair, gate: Gate
) -> None:
    program = gpu.program(pair.table(WAYS["engine"]), [gate])
    fake.fail("cuMemcpyAsync", 1)
    assert program.run(PATIENCE) == -errno.EIO
    assert gate.drain(PATIENCE)
    assert pair.is_untouched


def test_gates_stay_entered_also_while_nothing_says_when_what_failed_is_through(
    gpu: Mover, fake: FakeCuda, pair: Pair, gate: Gate
) -> None:
    program, small = gpu.program(pair.table(WAYS["engine"]), [gate]), gpu.program(pair.table([(0, 0, 64)]), [])
    with fake.held():
        fake.fail("cuLaunchKernel", 719, times=2)  # its kernel, and the signal instead
        assert program.run(PATIENCE) == -errno.EIO
        assert gate.inflight == 1, "its copy is on the lane"
        assert not gate.drain(0.05)
    assert gate.drain(PATIENCE)
    assert small.run(PATIENCE) == DONE
    assert all(lane.is_idle for lane in gpu._all_lanes())


class Interrupted:
    """A launcher that the user interrupts, before or after CUDA has the kernel."""

    def __init__(self, launcher: Launcher, *, is_launched: bool) -> None:
        self._launcher, self._is_launched = launcher, is_launched

    def run(self, *arguments: int) -> int:
        if self._is_launched:
            assert self._launcher.run(*arguments) == 0  # type: ignore[arg-type]
        raise KeyboardInterrupt


@pytest.mark.parametrize("is_launched", [True, False])
def test_an_interrupted_post_leaves_its_gate_when_the_gpu_is_through_and_its_number_to_nobody(
    gpu: Mover, fake: FakeCuda, pair: Pair, gate: Gate, is_launched: bool
) -> None:
    program, other = gpu.program(pair.table([(0, 0, 64)]), [gate]), gpu.program(pair.table([(100, 100, 64)]), [])
    rows = [(0, 0, 64), (100, 100, 64)] if is_launched else [(100, 100, 64)]
    program.start.launcher = Interrupted(program.start.launcher, is_launched=is_launched)
    with fake.held():
        with pytest.raises(KeyboardInterrupt):
            program.run(PATIENCE)
        assert gate.inflight == 1
        job = as_job(other.run(PATIENCE, out_of_line=True))
        while fake.step():
            assert not job.settled or (fake.view(pair.target + 100, 64) == pair.data[100:164]).all()
    assert gate.drain(PATIENCE)
    assert job.wait(PATIENCE)
    assert pair.has(rows)


@pytest.mark.parametrize("call", ["cuCtxPushCurrent_v2", "cuStreamQuery"])
def test_a_gpu_that_fails_whatever_is_asked_ends_jobs_that_nobody_waits_for(
    gpu: Mover, fake: FakeCuda, pair: Pair, gate: Gate, call: str
) -> None:
    program = gpu.program(pair.table([(0, 0, 64)]), [gate])
    with fake.held():
        for _ in range(2):  # the watch goes on after the first
            bell = os.eventfd(0, os.EFD_NONBLOCK)
            job = as_job(program.run(PATIENCE))
            assert job.arm(bell)
            fake.fail(call, 700, times=1)
            assert is_readable(bell)
            assert job.code == -errno.EIO
            wait_until(lambda: gate.inflight == 0)
            os.close(bell)


def test_a_watch_goes_on_when_a_look_fails(caplog: pytest.LogCaptureFixture) -> None:
    looks: list[int] = []

    def look() -> bool:
        looks.append(1)
        if len(looks) < 3:
            raise RuntimeError("as it should")
        return len(looks) < 6

    watch = Watch(look, "watched")
    watch.wake()
    wait_until(lambda: len(looks) > 6)
    watch.close(PATIENCE)
    assert caplog.text.count("Traceback") == 1


def test_a_child_that_was_forked_cannot_use_the_gpu(gpu: Mover, fake: FakeCuda, pair: Pair) -> None:
    program = gpu.program(pair.table([(0, 0, 64)]), [])
    with fake.held():
        job = as_job(program.run(PATIENCE))
        assert holds_in_child(
            lambda: (job.code, job.settled, job.cancel(CANCELLED), program.run(1.0)) == (CLOSED, True, False, CLOSED)
        )
    assert job.wait(PATIENCE)


def test_there_is_one_mover_for_each_gpu(fake: FakeCuda) -> None:
    assert mover(0) is mover(0)
    assert mover(0) is not mover(1)
    assert (mover(0).device, mover(1).device) == (0, 1)


def test_a_gpu_that_is_not_there_is_refused(fake: FakeCuda) -> None:
    with pytest.raises(ConfigError, match="GPU 7"):
        mover(7)
