"""What both cores promise over UCX when something goes wrong, or is made to end."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from native_tools import KIB, MIB, finish, random_bytes
from rail_tools import TIMEOUT as PATIENCE
from rail_tools import Side, Target, Way, moving, until

from raynixl.backends.ucx_presence import is_installed
from raynixl.native import CANCELLED, CLOSED, DONE, LOST, PENDING, RESET, STALE, TIMEOUT, Gate, Native

pytestmark = [pytest.mark.pure, pytest.mark.skipif(not is_installed(), reason="ucxx is not installed")]

MakeSide = Callable[[str], Side]
MakeTarget = Callable[..., Target]
both = pytest.mark.parametrize("tls", ["cma,tcp", "tcp"])
BLOCK = 16 * MIB
LONG = 200  # times a block: seconds of work


def test_a_late_job_ends_in_time_and_is_settled_by_a_reset(make_side: MakeSide, make_target: MakeTarget) -> None:
    side, target = make_side("tcp"), make_target("tcp", BLOCK)
    way, gate = side.reach(target.export), side.core.Gate()
    source = random_bytes(BLOCK)
    program = side.writer(source, way, [gate])
    assert finish(program.run(PATIENCE)) == DONE
    target.stop()
    began = time.monotonic()
    job = program.run(0.3)
    assert not isinstance(job, int)
    assert job.wait(PATIENCE)
    assert job.code == TIMEOUT
    assert 0.25 < time.monotonic() - began < 10.0
    assert not job.settled
    assert not job.wait_settled(0.05)
    assert gate.inflight == 1
    assert side.rail.sweep(1000.0)  # not yet
    assert way.endpoint.code == 0
    assert side.settle(job)
    assert (way.endpoint.code, job.code, gate.inflight) == (RESET, TIMEOUT, 0)
    assert program.run(1.0) == LOST
    assert until(lambda: way.endpoint.is_gone)
    target.resume()
    again = side.reach(target.export)
    assert finish(side.writer(source[::-1].copy(), again).run(PATIENCE)) == DONE
    assert np.array_equal(target.memory, source[::-1])


def test_a_sweep_ends_a_late_job_at_which_nobody_looks(make_side: MakeSide, make_target: MakeTarget) -> None:
    side, target = make_side("tcp"), make_target("tcp", BLOCK)
    program = side.writer(random_bytes(BLOCK), side.reach(target.export))
    assert finish(program.run(PATIENCE)) == DONE
    target.stop()
    drain(side)
    job = program.run(0.2)
    assert select.select([side.bell], [], [], PATIENCE)[0]
    bell = os.eventfd(0, os.EFD_NONBLOCK)
    assert job.arm(bell)
    deadline = time.monotonic() + PATIENCE
    while not select.select([bell], [], [], 0.02)[0]:
        assert side.rail.sweep(1000.0)
        assert time.monotonic() < deadline
    assert job.code == TIMEOUT
    assert side.settle(job)
    assert until(lambda: not side.rail.sweep(0.0))
    os.close(bell)


def drain(side: Side) -> None:
    """Sweep until nobody needs to, and silence the bell."""
    assert until(lambda: not side.rail.sweep(0.0))
    if select.select([side.bell], [], [], 0.0)[0]:
        os.eventfd_read(side.bell)


@both
def test_a_target_killed_before_the_first_transfer_is_lost(
    make_side: MakeSide, make_target: MakeTarget, tls: str
) -> None:
    side, target = make_side(tls), make_target(tls)
    way = side.reach(target.export)
    target.kill()
    assert finish(side.writer(random_bytes(KIB), way).run(PATIENCE)) == LOST
    assert way.endpoint.status


@both
def test_a_target_killed_during_transfers_is_lost(make_side: MakeSide, make_target: MakeTarget, tls: str) -> None:
    side, target = make_side(tls), make_target(tls, BLOCK)
    way, gate = side.reach(target.export), side.core.Gate()
    jobs = [moving(make(random_bytes(BLOCK), way, [gate], repeat=LONG)) for make in (side.writer, side.reader)]
    target.kill()
    assert [finish(job) for job in jobs] == [LOST] * 2
    assert way.endpoint.status
    assert select.select([side.bell], [], [], PATIENCE)[0]
    assert all(side.settle(job) for job in jobs)
    assert gate.inflight == 0
    way.endpoint.close(LOST)
    assert until(lambda: way.endpoint.is_gone)
    assert side.rail.close(10.0)


@both
def test_a_target_killed_after_a_transfer_rings(make_side: MakeSide, make_target: MakeTarget, tls: str) -> None:
    side, target = make_side(tls), make_target(tls)
    way = side.reach(target.export)
    program = side.writer(random_bytes(KIB), way)
    assert finish(program.run(PATIENCE)) == DONE
    drain(side)
    target.kill()
    assert select.select([side.bell], [], [], PATIENCE)[0]
    assert way.endpoint.status
    assert finish(program.run(PATIENCE)) == LOST


def test_an_endpoint_closed_during_a_transfer_ends_it(side: Side, target: Target) -> None:
    way, gate = side.reach(target.export), side.core.Gate()
    program = side.writer(random_bytes(BLOCK), way, [gate], repeat=LONG)
    job = moving(program)
    way.endpoint.close(RESET)
    assert job.wait(PATIENCE)
    assert job.code == RESET
    assert job.wait_settled(PATIENCE)
    assert gate.inflight == 0
    assert job.nbytes_done < program.nbytes
    assert until(lambda: way.endpoint.is_gone)


def test_a_cancelled_job_ends_at_once_and_its_endpoint_stays(side: Side, target: Target) -> None:
    way, gate = side.reach(target.export), side.core.Gate()
    source = random_bytes(BLOCK)
    program = side.writer(source, way, [gate], repeat=LONG)
    job = moving(program)
    bell = os.eventfd(0, os.EFD_NONBLOCK)
    assert job.arm(bell)
    assert job.cancel(CANCELLED)
    assert (job.code, os.eventfd_read(bell)) == (CANCELLED, 1)
    assert not job.cancel(TIMEOUT)
    assert not job.arm(bell)
    assert job.wait_settled(PATIENCE)  # what UCX has taken lands
    assert job.nbytes_done < program.nbytes
    assert gate.inflight == 0
    assert finish(side.writer(source, way).run(PATIENCE)) == DONE
    assert way.endpoint.code == 0
    os.close(bell)


def test_a_gate_closed_during_a_transfer_ends_it(side: Side, target: Target) -> None:
    first, gate = side.core.Gate(), side.core.Gate()
    way = side.reach(target.export)
    job = moving(side.writer(random_bytes(BLOCK), way, [first, gate], repeat=LONG))
    gate.close(STALE, abort=False)
    side.rail.sweep(1000.0)
    assert job.code == PENDING
    gate.close(LOST)
    side.rail.sweep(1000.0)
    assert job.code == STALE
    assert job.wait_settled(PATIENCE)
    assert gate.drain(PATIENCE)
    assert first.inflight == 0


@both
def test_the_failure_of_one_peer_leaves_the_other_alone(make_side: MakeSide, make_target: MakeTarget, tls: str) -> None:
    side, good, bad = make_side(tls), make_target(tls, BLOCK), make_target(tls, BLOCK)
    source = random_bytes(BLOCK)
    to_good, to_bad = side.reach(good.export), side.reach(bad.export)
    long = moving(side.writer(source, to_good, repeat=40))
    doomed = moving(side.writer(source, to_bad, repeat=LONG))
    bad.kill()
    assert finish(doomed) == LOST
    to_bad.endpoint.close(LOST)
    assert side.settle(doomed)
    assert finish(long) == DONE
    assert (to_good.endpoint.code, to_good.endpoint.status) == (0, "")
    assert np.array_equal(good.memory, source)
    back = np.zeros(BLOCK, dtype=np.uint8)
    assert finish(side.reader(back, to_good).run(PATIENCE)) == DONE
    assert np.array_equal(back, source)


def test_a_rail_closed_with_work_in_flight_ends_it(side: Side, target: Target) -> None:
    way, gate = side.reach(target.export), side.core.Gate()
    program = side.writer(random_bytes(BLOCK), way, [gate], repeat=LONG)
    jobs = [moving(program), program.run(PATIENCE), program.run(PATIENCE)]
    assert side.rail.close(10.0)
    assert all(job.wait_settled(10.0) for job in jobs)
    assert [job.code for job in jobs] == [CLOSED] * 3
    assert gate.inflight == 0
    assert way.endpoint.is_gone


def test_a_rail_closes_although_a_peer_is_frozen(make_side: MakeSide, make_target: MakeTarget) -> None:
    side, target = make_side("tcp"), make_target("tcp", BLOCK)
    program = side.writer(random_bytes(BLOCK), side.reach(target.export))
    assert finish(program.run(PATIENCE)) == DONE
    target.stop()
    job = program.run(PATIENCE)
    assert side.rail.close(10.0)
    assert finish(job) == CLOSED


def test_threads_that_post_are_refused_by_a_closed_endpoint(side: Side, target: Target) -> None:
    for _ in range(3):
        post_until_closed(side, side.reach(target.export))


def post_until_closed(side: Side, way: Way) -> None:
    """Close an endpoint over which several threads post, and see what they are told."""
    gate = side.core.Gate()
    with posting(side, way, gate) as codes:
        assert until(lambda: all(DONE in seen for seen in codes))
        way.endpoint.close(RESET)
    assert set().union(*codes) <= {DONE, RESET, LOST}
    assert all(seen[-1] == LOST for seen in codes)
    assert gate.drain(PATIENCE)
    assert until(lambda: way.endpoint.is_gone)


def test_threads_that_post_are_refused_by_a_closed_rail(side: Side, target: Target) -> None:
    way, gate = side.reach(target.export), side.core.Gate()
    with posting(side, way, gate) as codes:
        assert until(lambda: all(DONE in seen for seen in codes))
        assert side.rail.close(10.0)
    assert set().union(*codes) <= {DONE, CLOSED, LOST}
    assert gate.inflight == 0


@contextlib.contextmanager
def posting(side: Side, way: Way, gate: Gate) -> Iterator[list[list[int]]]:
    """Three threads that run programs of several sizes until one is refused; the value is the codes of each."""
    codes: list[list[int]] = [[], [], []]
    programs = [side.writer(random_bytes(nbytes), way, [gate]) for nbytes in (8, 200 * KIB, 4 * MIB)]

    def post(number: int) -> None:
        while not codes[number] or codes[number][-1] == DONE:
            codes[number].append(finish(programs[number].run(PATIENCE)))
        codes[number].append(finish(programs[number].run(PATIENCE)))

    threads = [threading.Thread(target=post, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    yield codes
    for thread in threads:
        thread.join()


SCRIPT = """
import os, sys
import numpy as np
sys.path.insert(0, {tests!r})
from rail_tools import Side, moving
from native_tools import random_bytes
from raynixl.native import CLOSED, DONE, PENDING, load
side = Side(load({native}), "cma,tcp")
memory, source = np.zeros(16 << 20, dtype=np.uint8), random_bytes(16 << 20)
way, gate = side.reach(side.export(memory)), side.core.Gate()
program = side.writer(source, way, [gate], repeat=100)
job = moving(program)
"""

FORK = """
pid = os.fork()
if pid == 0:
    ok = program.run(1.0) == CLOSED and program.run(1.0, out_of_line=True) == CLOSED
    ok = ok and job.wait(1.0) and job.wait_settled(1.0) and job.code == CLOSED and job.settled and not job.cancel(3)
    side.rail.sweep(0.0)
    way.endpoint.close(3)
    way.key.destroy()
    ok = ok and not side.rail.close(0.1) and way.endpoint.transports == []
    os._exit(0 if ok else 1)
status = os.waitpid(pid, 0)[1]
assert status == 0, status
assert job.wait(60.0) and job.code == DONE, job.code
assert gate.inflight == 0 and np.array_equal(memory, source)
side.close()
"""


def run_script(core: Native, body: str) -> int:
    """Run a script in a process of its own; return what it ended with."""
    head = SCRIPT.format(tests=str(Path(__file__).parent.parent), native=core.NAME == "native")
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", "UCX_LOG_LEVEL": "fatal"}  # forks with threads
    return subprocess.run([sys.executable, "-c", head + body], env=environment, timeout=60, check=False).returncode


def test_a_forked_child_is_refused_and_does_the_parent_no_harm(core: Native) -> None:
    assert run_script(core, FORK) == 0


def test_a_dead_target_is_refused_or_lost(make_side: MakeSide, make_target: MakeTarget) -> None:
    side, target = make_side("cma,tcp"), make_target("cma,tcp")
    target.kill()
    try:
        way = side.reach(target.export)
    except RuntimeError:
        return  # this host said at once that nobody listens
    assert finish(side.writer(random_bytes(KIB), way).run(PATIENCE)) == LOST


def test_an_idle_rail_uses_no_processor(side: Side, target: Target) -> None:
    way = side.reach(target.export)
    assert finish(side.writer(random_bytes(BLOCK), way).run(PATIENCE)) == DONE
    before, cpu = time.monotonic(), time.process_time()
    time.sleep(0.5)
    assert time.process_time() - cpu < 0.2 * (time.monotonic() - before)
