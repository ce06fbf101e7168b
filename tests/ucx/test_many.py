"""Many peers: agents that come and go leave nothing, one process has 64 of them, and 16 processes talk all to all."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import pytest
import warm
from agent_tools import PATIENCE, eventually, introduce
from lane_tools import CMA, TCP, config_for
from liveness_tools import pattern

from raynixl import Agent
from raynixl.backends.ucx import UcxBackend
from raynixl.testing.places import FarProcess

N = 1 << 16
CALM = {"transfer_timeout": PATIENCE, "connect_timeout": PATIENCE, "heartbeat_timeout": PATIENCE}
"""Deadlines that a crowd on two cores keeps."""


def holdings_of(pid: int) -> tuple[int, int, int]:
    """Memory that a process holds, its descriptors and its threads, those of the core included."""
    with open(f"/proc/{pid}/statm", encoding="ascii") as file:
        nbytes = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return nbytes, len(os.listdir(f"/proc/{pid}/fd")), len(os.listdir(f"/proc/{pid}/task"))


def visit(name: str, record: bytes, tls: str) -> None:
    """Make an agent, read what the one that stays has, let it read back, and close."""
    with Agent(name, config=config_for(tls, **CALM)) as guest:
        mine = guest.register(np.zeros(N, np.uint8))
        guest.read(guest.peer(record)["there"], mine).wait()
        assert np.array_equal(mine.array(), pattern(N, 1))


def visits(count: int, record: bytes, tls: str, name: str) -> None:
    """Come and go so many times."""
    for number in range(count):
        visit(f"{name}-{number}", record, tls)


class Comings:
    """Four threads whose agents come and go against one that stays."""

    def __init__(self, record: bytes, tls: str) -> None:
        self._record = record
        self._tls = tls
        self._turn = 0

    def go(self, count: int) -> None:
        """Have so many agents come and go."""
        self._turn += 1
        errors: list[BaseException] = []

        def run(number: int) -> None:
            try:
                visits(count // 4, self._record, self._tls, f"guest-{self._turn}-{number}")
            except BaseException as exc:  # noqa: BLE001 - handed to the test
                errors.append(exc)

        threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors, errors[0]


def check_no_growth(tls: str, count: int) -> None:
    """After a warm-up nothing of the one that stays grows with the number of agents that were here."""
    with crowd(tls, 1) as (far,):
        far.ask("make", "there", N, "user", 1)
        comings = Comings(far.ask("record"), tls)
        comings.go(40)
        nbytes, fds, threads = holdings_of(far.pid)
        comings.go(count)
        eventually(lambda: holdings_of(far.pid)[1] <= fds, "descriptors to be given back")
        eventually(lambda: holdings_of(far.pid)[2] <= threads, "threads to end")
        grown = holdings_of(far.pid)[0] - nbytes
        print(f"{count} agents came and went over {tls}: {grown / count:.0f} bytes each")
        assert grown < count * 8192 + (1 << 20)


@pytest.mark.parametrize("tls", [TCP], ids=["tcp"])
def test_agents_that_come_and_go_leave_nothing_behind(tls: str) -> None:
    check_no_growth(tls, 80)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("tls", [CMA, TCP], ids=["cma", "tcp"])
def test_a_thousand_agents_come_and_go(tls: str) -> None:
    check_no_growth(tls, 1000)


def test_one_process_has_64_peers() -> None:
    with ExitStack() as stack:
        config = config_for(TCP, **CALM)
        hub = stack.enter_context(Agent("hub", config=config))
        mine = [hub.register(np.zeros(N, np.uint8)) for _ in range(64)]
        for number in range(64):
            spoke = stack.enter_context(Agent(f"spoke-{number}", config=config))
            spoke.register(pattern(N, number), name="there")
            introduce(hub, spoke)
        transfers = [hub.read(hub.peer(f"spoke-{number}")["there"], mine[number]) for number in range(64)]
        for transfer in transfers:
            transfer.wait()
        assert all(np.array_equal(mine[number].array(), pattern(N, number)) for number in range(64))


@contextmanager
def crowd(tls: str, count: int) -> Iterator[list[FarProcess]]:
    """So many processes with an agent each that know each other."""
    members = [FarProcess(UcxBackend, config_for(tls, **CALM), is_busy=False, launch=warm.popen) for _ in range(count)]
    try:
        together(members, lambda far, number: far.open(f"member-{number}"))
        records = [far.ask("record") for far in members]
        for far in members:
            for record in records:
                far.ask("meet", record)
        yield members
    finally:
        for far in members:
            far.close_agent()
        for far in members:
            far.close()


def together(members: list[FarProcess], act: Callable[[FarProcess, int], object]) -> None:
    """Have every process do something at the same time."""
    errors: list[BaseException] = []

    def run(far: FarProcess, number: int) -> None:
        try:
            act(far, number)
        except BaseException as exc:  # noqa: BLE001 - handed to the test
            errors.append(exc)

    threads = [threading.Thread(target=run, args=(far, number)) for number, far in enumerate(members)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors[0]


@pytest.mark.parametrize("tls", [TCP], ids=["tcp"])
def test_sixteen_processes_write_all_to_all(tls: str) -> None:
    count = 16

    def prepare(far: FarProcess, number: int) -> None:
        far.ask("make", "mine", N, "user", number)
        for other in range(count):
            far.ask("make", f"from-{other}", N, "user", 1000)

    def write(far: FarProcess, number: int) -> None:
        for step in range(1, count):
            far.ask("copy", "write", "mine", f"member-{(number + step) % count}", f"from-{number}")

    def check(far: FarProcess, number: int) -> None:
        for other in set(range(count)) - {number}:
            assert far.ask("content", f"from-{other}") == pattern(N, other).tobytes()

    with crowd(tls, count) as members:
        for act in (prepare, write, check):
            together(members, act)
