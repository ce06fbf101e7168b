"""Lines in both cores: what is said is seen, no wake-up is lost between processes, and waits end when they should."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import moe_lines_process
import numpy as np
import pytest
import warm
from native_tools import address_of

from raynixl.native import DONE, STALE, Native
from raynixl.native.moe import BELL_NBYTES

pytestmark = pytest.mark.pure

LONG = 30.0
TESTS = Path(__file__).parent.parent


class Board:
    """A bell and a few words in this process."""

    def __init__(self, lines: int) -> None:
        self.memory = np.zeros(8 * (1 + lines * 8), np.uint64)
        self.bell = address_of(self.memory)
        self.addresses = self.bell + 8 * 8 * np.arange(1, lines + 1, dtype=np.uint64)
        self.numbers = np.ones(lines, np.uint64)

    def wait(self, core: Native, timeout: float, spin: float = 0.0) -> int:
        """Wait for all lines."""
        return core.wait_lines(self.addresses, self.numbers, self.bell, timeout, spin)

    def post(self, core: Native, line: int, number: int = 1) -> None:
        """Post a line without payload."""
        assert core.post_line(int(self.addresses[line]), b"", number, self.bell) == DONE


def waiting(core: Native, board: Board, timeout: float = LONG) -> tuple[threading.Thread, list[int]]:
    """A thread that waits for all lines of a board, asleep or soon to be, and what it will have got."""
    got: list[int] = []
    thread = threading.Thread(target=lambda: got.append(board.wait(core, timeout)))
    thread.start()
    deadline = time.monotonic() + LONG
    while ctypes.c_uint32.from_address(board.bell + 4).value == 0:
        assert time.monotonic() < deadline
    return thread, got


def ended(thread: threading.Thread) -> bool:
    """Whether a thread has ended, waited for."""
    thread.join(LONG)
    return not thread.is_alive()


# What is written


@pytest.mark.parametrize("payload", [b"", b"x", bytes(range(256)) * 3, np.arange(77, dtype=np.uint8)])
def test_a_line_is_its_number_and_behind_it_what_it_says(core: Native, payload: bytes | np.ndarray) -> None:
    memory = np.full(1024, 9, np.uint8)
    assert core.post_line(address_of(memory) + 8, payload, (1 << 64) - 2, 0) == DONE
    said = bytes(payload)
    expected = bytes([9] * 8) + ((1 << 64) - 2).to_bytes(8, sys.byteorder) + said
    assert memory.tobytes() == expected + bytes([9]) * (1024 - len(expected))


def test_a_closed_gate_refuses_a_line(core: Native) -> None:
    board, gates = Board(1), [core.Gate(), core.Gate()]
    line = int(board.addresses[0])
    assert core.post_line(line, b"one", 1, board.bell, gates) == DONE
    gates[1].close(STALE)
    before = board.memory.copy()
    assert core.post_line(line, b"two", 2, board.bell, gates) == STALE
    assert np.array_equal(board.memory, before)
    assert [gate.inflight for gate in gates] == [0, 0]


@pytest.mark.parametrize(
    "call",
    [
        lambda core, at: core.post_line(at + 4, b"", 1, 0),
        lambda core, at: core.post_line(at, b"", 1, at + 4),
        lambda core, at: core.ring(at + 4),
        lambda core, at: core.wait_lines(np.array([at + 1], np.uint64), np.ones(1, np.uint64), at, 0.0, 0.0),
        lambda core, at: core.wait_lines(np.array([at], np.uint64), np.ones(1, np.uint64), at + 4, 0.0, 0.0),
        lambda core, at: core.wait_lines(np.array([at], np.uint64), np.ones(1, np.uint64), 0, 0.0, 0.0),
        lambda core, at: core.wait_lines(np.array([at], np.uint64), np.ones(2, np.uint64), at, 0.0, 0.0),
    ],
    ids=["a line", "its bell", "a bell", "a word", "a waiter's bell", "no bell", "more numbers than words"],
)
def test_what_does_not_fit_is_refused(core: Native, call: Callable[[Native, int], object]) -> None:
    memory = np.zeros(64, np.uint64)
    with pytest.raises(ValueError):  # noqa: PT011 - the two cores word it alike, but promise only the type
        call(core, address_of(memory))
    assert not memory.any()


def test_arguments_of_another_form_are_refused(core: Native) -> None:
    memory = np.zeros(64, np.uint64)
    at = address_of(memory)
    for payload in ("text", 7, np.zeros((4, 4), np.uint8)[:, ::2]):
        with pytest.raises(TypeError):
            core.post_line(at, payload, 1, 0)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        core.wait_lines(np.array([at], np.int64), np.ones(1, np.uint64), at, 0.0, 0.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        core.wait_lines(np.array([at], np.uint64), np.ones(1, np.int32), at, 0.0, 0.0)  # type: ignore[arg-type]


# Waiting


def test_a_wait_counts_what_has_come(core: Native) -> None:
    board = Board(3)
    assert board.wait(core, 0.0) == 0
    board.post(core, 1, number=5)
    assert board.wait(core, 0.01, spin=0.005) == 1
    board.numbers[:] = 0
    assert board.wait(core, 0.0) == 3
    assert core.wait_lines(board.addresses[:0], board.numbers[:0], board.bell, 0.0, 0.0) == 0


@pytest.mark.parametrize("spin", [0.0, 60.0])
def test_a_wait_ends_at_its_timeout(core: Native, spin: float) -> None:
    board, began = Board(2), time.monotonic()
    board.post(core, 0)
    assert board.wait(core, 0.05, spin) == 1
    assert 0.05 <= time.monotonic() - began < LONG


def test_who_sleeps_wakes_when_all_lines_are_there(core: Native) -> None:
    board = Board(3)
    thread, got = waiting(core, board)
    for line in (2, 0, 1):
        assert thread.is_alive()
        board.post(core, line)
    assert ended(thread)
    assert got == [3]


def test_several_may_sleep_on_one_bell(core: Native) -> None:
    board, other = Board(4), Board(0)
    other.bell, other.addresses, other.numbers = board.bell, board.addresses[:2], board.numbers[:2]
    threads = [waiting(core, which) for which in (board, other, other, board)]
    for line in range(4):
        board.post(core, line)
    assert all(ended(thread) for thread, _ in threads)
    assert [got for _, got in threads] == [[4], [2], [2], [4]]


def test_a_ring_makes_a_sleeper_look_again(core: Native) -> None:
    board = Board(5)
    board.post(core, 0)
    thread, got = waiting(core, board)
    board.memory[8 * np.arange(1, 5)] = 1  # without a bell
    core.ring(board.bell)
    core.post_line(int(board.addresses[4]), b"", 1, 0)
    core.ring(board.bell)
    assert ended(thread)
    assert got == [5]


def test_a_word_can_be_excused_by_another_thread(core: Native) -> None:
    board = Board(2)
    thread, got = waiting(core, board)
    board.post(core, 1)
    board.numbers[0] = 0
    core.ring(board.bell)
    assert ended(thread)
    assert got == [2]


def test_a_word_that_is_waited_for_twice_rings_once(core: Native) -> None:
    board = Board(3)
    board.addresses[1] = board.addresses[0]
    thread, got = waiting(core, board)
    board.post(core, 0)
    board.post(core, 2)
    assert ended(thread)
    assert got == [3]


@pytest.mark.parametrize("rings", [0xFFFFFFFE, 0xFFFFFFFF, 0x7FFFFFFE, 0x7FFFFFFF, 0x3FFFFFFF])
def test_the_count_of_rings_may_wrap(core: Native, rings: int) -> None:
    board = Board(3)
    ctypes.c_uint32.from_address(board.bell).value = rings
    for number in range(1, 5):
        board.numbers[:] = number
        ctypes.c_uint32.from_address(board.bell + 4).value = 0
        thread, got = waiting(core, board)
        for line in range(3):
            board.post(core, line, number)
        assert ended(thread)
        assert got == [3]


def test_signals_are_handled_while_it_sleeps(core: Native) -> None:
    board, heard = Board(1), []
    before = signal.signal(signal.SIGUSR1, lambda *_: heard.append(board.post(core, 0)))
    try:
        sender = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGUSR1))
        sender.start()
        assert board.wait(core, LONG) == 1
        sender.join()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert len(heard) == 1


def test_a_bell_is_as_large_as_it_says(core: Native) -> None:
    memory = np.full(3, 1 << 63, np.uint64)
    memory[1] = 0
    for _ in range(3):
        core.ring(address_of(memory) + BELL_NBYTES)
    assert memory[0] == memory[2] == 1 << 63
    assert memory[1] != 0


# Processes


def processes(cores: list[str], rounds: int, spin: float) -> None:
    """Let processes exchange lines; a lost wake-up, or a line that says something else, fails one of them."""
    fd = os.memfd_create("lines")
    os.ftruncate(fd, moe_lines_process.board_nbytes(len(cores)) * len(cores))
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([str(TESTS.parent), *sys.path]))
    command = [sys.executable, str(TESTS / "moe_lines_process.py"), str(fd), ",".join(cores)]
    running = [
        warm.popen([*command, str(rank), str(rounds), str(spin)], pass_fds=[fd], env=environment)
        for rank in range(len(cores))
    ]
    os.close(fd)
    try:
        codes = [process.wait(90.0) for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait(10.0)
    assert codes == [0] * len(cores)


@pytest.mark.parametrize("spin", [0.0, 3e-6, 5e-5])
def test_no_wake_up_is_lost_between_two_processes(core: Native, spin: float) -> None:
    processes([core.NAME] * 2, 20_000 if core.NAME == "native" else 4_000, spin)


@pytest.mark.parametrize("spin", [0.0, 1e-5])
def test_no_wake_up_is_lost_among_four_processes(core: Native, spin: float) -> None:
    processes([core.NAME] * 4, 4_000 if core.NAME == "native" else 1_000, spin)


@pytest.mark.parametrize("spin", [0.0, 2e-5])
def test_the_two_cores_understand_each_other(both: tuple[Native, Native], spin: float) -> None:
    processes(["native", "ctypes"], 5_000, spin)
    processes(["ctypes", "native", "native", "ctypes"], 1_000, spin)
