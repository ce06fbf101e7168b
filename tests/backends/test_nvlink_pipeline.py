"""Staging, step by step: which buffer is filled and emptied when, and what becomes of gates and buffers in the end."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from raynixl.backends.nvlink_job import StagedJob
from raynixl.backends.nvlink_staging import PIECE_NBYTES, Hung, StagedProgram, Staging
from raynixl.native import CANCELLED, CLOSED, DONE, PENDING, STALE, Gate, load

pytestmark = pytest.mark.pure

PIECES, PATIENCE = 5, 10.0
BOUNCE: Any = SimpleNamespace(host=(100, 200), device=(1000, 2000), close=lambda: None)


class Part:
    """What the host or the GPU does with one piece: a program and its job at once, over when it is looked at again."""

    def __init__(self, name: str, log: list[tuple[str, str]], *, code: int = DONE, looks: int = 3) -> None:
        self.name, self._log, self._end, self._looks = name, log, code, looks
        self.code = PENDING

    def run(self, timeout: float) -> Part:
        self._log.append(("begins", self.name))
        return self

    def wait(self, timeout: float) -> bool:
        self._looks -= 1
        if self._looks <= 0 and self.code == PENDING:
            self.code = self._end
            self._log.append(("ends", self.name))
        return self.code != PENDING

    def wait_settled(self, timeout: float) -> bool:
        while not self.wait(timeout):
            continue
        return True

    def cancel(self, code: int) -> bool:
        return False


def staged(is_upload: bool, gates: list[Gate], *, codes: dict[str, int] | None = None) -> tuple[StagedProgram, Any]:
    """A program whose parts are noted in a log, by name: 'host 0', 'gpu 0', ..."""
    table = np.array([[1 << 40, 1 << 41, PIECES * PIECE_NBYTES - 5]], np.uint64)
    program, log = StagedProgram(Any, 0, table, gates, is_upload=is_upload), []  # type: ignore[arg-type]
    made = [
        [Part(f"{who} {n}", log, code=(codes or {}).get(f"{who} {n}", DONE)) for n in range(PIECES)]
        for who in ("host", "gpu")
    ]
    program._compiled = lambda number, bounce: (made[0][number], made[1][number])  # type: ignore[method-assign,assignment,return-value]
    return program, log


def place(log: list[tuple[str, str]], what: str, name: str) -> int:
    return log.index((what, name))


@pytest.mark.parametrize("is_upload", [True, False])
def test_a_buffer_is_used_by_one_at_a_time_and_the_other_meanwhile(is_upload: bool) -> None:
    program, log = staged(is_upload, [])
    job = StagedJob(PATIENCE)
    assert program._move(job, BOUNCE) == DONE
    first, second = ("host", "gpu") if is_upload else ("gpu", "host")
    for n in range(PIECES):
        assert place(log, "ends", f"{first} {n}") < place(log, "begins", f"{second} {n}")
        if n >= 2:
            assert place(log, "ends", f"{second} {n - 2}") < place(log, "begins", f"{first} {n}")
        if n >= 1:
            assert place(log, "begins", f"{first} {n}") < place(log, "ends", f"{second} {n - 1}"), "they take turns"
    assert job.nbytes_done == program.nbytes
    assert {name for what, name in log if what == "ends"} == {name for what, name in log if what == "begins"}


@pytest.mark.parametrize("is_upload", [True, False])
@pytest.mark.parametrize("who", ["host", "gpu"])
@pytest.mark.parametrize("number", range(PIECES))
def test_whatever_fails_is_the_end_and_is_told(is_upload: bool, who: str, number: int) -> None:
    name = f"{who} {number}"
    program, log = staged(is_upload, [], codes={name: -errno.EIO})
    assert program._move(StagedJob(PATIENCE), BOUNCE) == -errno.EIO
    assert {one for what, one in log if what == "ends"} == {one for what, one in log if what == "begins"}
    after = [one for _, one in log[place(log, "ends", name) :]]
    assert all(int(one.split()[1]) <= number + 1 for one in after), "it went on"


@pytest.mark.parametrize("is_upload", [True, False])
def test_a_gate_that_is_closed_with_abort_ends_it_at_the_next_piece(is_upload: bool) -> None:
    gate = load(native=True).Gate()
    program, log = staged(is_upload, [gate])
    part = program._compiled(1, BOUNCE)[0]
    run = part.run
    part.run = lambda timeout: (gate.close(STALE), run(timeout))[1]  # type: ignore[method-assign]
    assert program._move(StagedJob(PATIENCE), BOUNCE) == STALE
    assert ("begins", "host 2") not in log


def test_each_buffer_has_its_halves_and_pieces_their_places() -> None:
    seen: list[tuple[str, list[list[int]]]] = []
    engine = SimpleNamespace(program=lambda mode, pid, rows, gates: seen.append(("host", rows.tolist())))
    gpu = SimpleNamespace(program=lambda rows, gates, touches_host: seen.append(("gpu", rows.tolist())))
    staging: Any = SimpleNamespace(local=SimpleNamespace(engine=engine))
    table = np.array([[1 << 40, 1 << 41, PIECE_NBYTES + 7], [1 << 42, 1 << 43, 9]], np.uint64)
    for is_upload in (True, False):
        program = StagedProgram(staging, 0, table, [], is_upload=is_upload)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("raynixl.backends.nvlink_staging.mover", lambda device: gpu)
            for number in (0, 1):
                program._compiled(number, BOUNCE)
                program._compiled(number, BOUNCE)
    (up_in, up_out, up_in2, up_out2, down_in, down_out, down_in2, down_out2) = seen
    assert up_in == ("host", [[1 << 40, 100, PIECE_NBYTES]])
    assert up_out == ("gpu", [[1000, 1 << 41, PIECE_NBYTES]])
    far, into = (1 << 40) + PIECE_NBYTES, (1 << 41) + PIECE_NBYTES
    assert up_in2 == ("host", [[far, 200, 7], [1 << 42, 207, 9]])
    assert up_out2 == ("gpu", [[2000, into, 7], [2007, 1 << 43, 9]])
    assert down_in == ("host", [[100, 1 << 41, PIECE_NBYTES]])
    assert down_out == ("gpu", [[1 << 40, 1000, PIECE_NBYTES]])
    assert down_in2 == ("host", [[200, into, 7], [207, 1 << 43, 9]])
    assert down_out2 == ("gpu", [[far, 2000, 7], [1 << 42, 2007, 9]])


@pytest.fixture
def staging() -> Iterator[tuple[Staging, list[Any]]]:
    """The threads of staging, and the buffers that were made for them."""
    made: list[Any] = []

    def make() -> Any:
        made.append(SimpleNamespace(closed=0))
        made[-1].close = lambda one=made[-1]: setattr(one, "closed", one.closed + 1)
        return made[-1]

    one = Staging(Any, make)  # type: ignore[arg-type]
    yield one, made
    one.close(PATIENCE)


def run(staging: Staging, work: Callable[[StagedJob, Any], int], job: StagedJob | None = None) -> tuple[StagedJob, Any]:
    """Have work done; return its job and the codes that its gates were left at."""
    left: list[int] = []
    job = StagedJob(PATIENCE) if job is None else job
    staging.start(job, work, lambda: left.append(job._code))
    assert job.wait(PATIENCE)
    return job, left


def test_gates_are_left_before_the_end_can_be_seen(staging: tuple[Staging, list[Any]]) -> None:
    job, left = run(staging[0], lambda _job, _bounce: DONE)
    assert job.wait_settled(PATIENCE)
    assert (job.code, left) == (DONE, [PENDING])


def test_what_hangs_keeps_its_gates_and_its_buffers(staging: tuple[Staging, list[Any]], caplog: Any) -> None:
    def hang(_job: StagedJob, _bounce: Any) -> int:
        raise Hung("for ever")

    job, left = run(staging[0], hang)
    assert (job.code, left, job.settled) == (-errno.EIO, [], False)
    run(staging[0], lambda _job, _bounce: DONE)
    assert len(staging[1]) == 2, "a buffer is used again that a GPU may still touch"
    staging[0].close(0.1)
    assert [one.closed for one in staging[1]] == [0, 1]
    assert "does not end a copy" in caplog.text


def test_work_that_breaks_is_an_error_and_its_buffer_is_used_again(
    staging: tuple[Staging, list[Any]], caplog: Any
) -> None:
    job, left = run(staging[0], lambda _job, _bounce: 1 // 0)
    assert job.wait_settled(PATIENCE)
    assert (job.code, left) == (-errno.EIO, [PENDING])
    run(staging[0], lambda _job, _bounce: DONE)
    assert len(staging[1]) == 1
    assert "staging failed" in caplog.text


def test_two_at_a_time_have_buffers_of_their_own(staging: tuple[Staging, list[Any]]) -> None:
    meeting, seen = threading.Barrier(2), []

    def work(_job: StagedJob, bounce: Any) -> int:
        seen.append(id(bounce))
        meeting.wait(PATIENCE)
        return DONE

    jobs = [StagedJob(PATIENCE) for _ in range(2)]
    for _ in range(2):
        jobs = [StagedJob(PATIENCE) for _ in range(2)]
        for job in jobs:
            staging[0].start(job, work, lambda: None)
        assert all(job.wait_settled(PATIENCE) for job in jobs)
    assert len(set(seen[:2])) == len(set(seen[2:])) == 2
    assert len(staging[1]) == 2


def test_closing_waits_for_what_is_staged_and_then_lets_go(staging: tuple[Staging, list[Any]]) -> None:
    begun, over, ended = threading.Event(), threading.Event(), []

    def work(job: StagedJob, _bounce: Any) -> int:
        begun.set()
        assert over.wait(PATIENCE)
        ended.append(job.code)
        return DONE

    job = StagedJob(PATIENCE)
    staging[0].start(job, work, lambda: None)
    assert begun.wait(PATIENCE)
    closing = threading.Thread(target=lambda: (staging[0].close(PATIENCE), ended.append(CLOSED)))
    closing.start()
    assert job.wait(PATIENCE)
    assert not ended
    assert [one.closed for one in staging[1]] == [0]
    over.set()
    closing.join(PATIENCE)
    assert ended == [CANCELLED, CLOSED]
    assert [one.closed for one in staging[1]] == [1]
