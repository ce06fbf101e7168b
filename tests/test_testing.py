"""The conformance suite catches broken backends, says in which check, and reads well."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from raynixl.backends.base import Link, Request
from raynixl.backends.loopback import _HERE, LoopbackBackend, LoopbackLink
from raynixl.backends.shm import addresses
from raynixl.errors import ConfigError
from raynixl.memory import Memory, MemoryKind
from raynixl.native import COPY, DONE, Program
from raynixl.record import AgentRecord
from raynixl.testing import ConformanceError, Outcome, Place, Report, backend_checks, check_backend

HERE = (Place.HERE,)


class DropsTheLastByte(LoopbackBackend):
    """Copies all but the last byte of each request."""

    def prepare(self, request: Request) -> list[Program]:
        table = addresses(request)
        if table[-1, 2] > 1:
            table[-1, 2] -= 1
        return [self._local.engine.program(COPY, 0, table, request.gates)]


class WritesOneMore(LoopbackBackend):
    """Copies one byte beside the blocks, where there is one."""

    def prepare(self, request: Request) -> list[Program]:
        table = addresses(request)
        if table[:, 2].min() < 12:
            table[table[:, 2].argmin(), 2] += 1
        return [self._local.engine.program(COPY, 0, table, request.gates)]


class IgnoresGates(LoopbackBackend):
    """Copies whether or not the region is still there."""

    def prepare(self, request: Request) -> list[Program]:
        return [self._local.engine.program(COPY, 0, addresses(request), [])]


class _Late:
    """A program that says that it is done before it is."""

    def __init__(self, program: Program, memories: list[Memory]) -> None:
        self._program = program
        self._memories = memories  # broken as it is, it shall not bring the process down
        self.nbytes, self.count = program.nbytes, program.count

    def run(self, timeout: float, out_of_line: bool = False) -> int:
        threading.Timer(0.05, self._copy, (timeout,)).start()
        return DONE

    def _copy(self, timeout: float) -> None:
        self._program.run(timeout)


class NotifiesEarly(LoopbackBackend):
    """Says that the data has landed while it has not."""

    def prepare(self, request: Request) -> list[Program]:
        memories = [region.memory for region in request.local]
        remotes = [binding.remote for binding in request.remote]
        memories += [_HERE[remote.incarnation]._memories[remote.id] for remote in remotes]
        return [_Late(program, memories) for program in super().prepare(request)]


class TakesAnything(LoopbackBackend):
    """Registers memory of kinds that it cannot carry."""

    def register(self, region_id: int, memory: Memory) -> dict[str, str | int]:
        return super().register(region_id, replace(memory, kind=MemoryKind.DRAM))


class _HastyLink(LoopbackLink):
    def send(self, message: bytes, fds: Sequence[int] = ()) -> None:
        if message.endswith(b"500"):
            self.held = message
            return
        super().send(message, fds)
        if message.endswith(b"501"):
            super().send(self.held)


class SwapsMessages(LoopbackBackend):
    """Delivers one message after the next one."""

    def connect(self, record: AgentRecord, deadline: float) -> Link:
        link: Any = super().connect(record, deadline)
        link.__class__ = _HastyLink
        return link


class ReachesNobody(LoopbackBackend):
    """Refuses every peer."""

    def reaches(self, record: AgentRecord) -> str:
        return "the wire is not plugged in"


@pytest.mark.parametrize(
    ("factory", "check"),
    [
        (DropsTheLastByte, "moves_whole_regions"),
        (WritesOneMore, "moves_odd_aligned_blocks"),
        (WritesOneMore, "moves_one_byte"),
        (IgnoresGates, "refuses_stale_regions"),
        (SwapsMessages, "keeps_messages_in_order"),
        (NotifiesEarly, "notifies_after_the_data"),
        (TakesAnything, "refuses_kinds_it_does_not_carry"),
    ],
)
def test_a_broken_backend_is_caught(factory: type, check: str) -> None:
    (found,) = [one for one in backend_checks(places=HERE) if one.name == check]
    with pytest.raises(ConformanceError, match=check) as caught:
        found(factory)
    assert isinstance(caught.value, AssertionError)


def test_every_failure_is_in_the_report_and_the_other_checks_went_on() -> None:
    with pytest.raises(ConformanceError) as caught:
        check_backend(DropsTheLastByte, places=HERE)
    report: Report = caught.value.report
    failed = {result.check for result in report.failures}
    passed = {result.check for result in report.results if result.outcome is Outcome.PASSED}
    assert {"moves_whole_regions", "moves_large_blocks", "notifies_after_the_data"} <= failed
    assert {"keeps_messages_in_order", "answers_requests", "refuses_kinds_it_does_not_carry"} <= passed
    assert "moves_whole_regions in this process" in str(caught.value)
    assert "first at 100002" in str(caught.value)
    assert "FAILED moves_whole_regions" in str(report)


def test_a_backend_that_reaches_nobody_does_not_pass_unchecked() -> None:
    with pytest.raises(ConformanceError, match="the wire is not plugged in"):
        check_backend(ReachesNobody, places=HERE)


def test_a_factory_that_another_process_cannot_import_is_refused_with_a_remedy() -> None:
    with pytest.raises(ConfigError, match=r"places=\(Place.HERE,\)"):
        check_backend(type("Local", (LoopbackBackend,), {}), places=(Place.IDLE,))


def test_a_place_that_is_not_reached_is_skipped_with_the_reason(nothing_left: Callable[[], list[str]]) -> None:
    one = backend_checks(places=(Place.IDLE,))[0]
    result = one(LoopbackBackend)
    assert result.outcome is Outcome.SKIPPED
    assert "another process" in result.reason


def test_checks_have_names_of_their_own() -> None:
    names = [str(check) for check in backend_checks()]
    assert len(set(names)) == len(names) > 60
    assert "moves_one_byte-here" in names


def test_the_suite_needs_no_test_framework() -> None:
    code = "import sys, raynixl.testing; assert not {'pytest', 'hypothesis', 'ray', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
