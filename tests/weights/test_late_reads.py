"""A read that was given up may still write, as a GPU cannot be stopped: never does that come after what was checked."""

import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from agent_tools import eventually

from raynixl import Agent
from raynixl.errors import IntegrityError, PeerLost, RaynixlError, TransferCancelled, TransferTimeout
from raynixl.weights.bank import HostBank
from raynixl.weights.cargo import DeltaCargo, Giver
from raynixl.weights.digest import digest_rows
from raynixl.weights.reads import Reads
from raynixl.weights.receiver import Place, Receiver
from raynixl.weights.throttle import Throttle

N = 4096
RIGHT, WRONG = 7, 9


class Job:
    """What a GPU does: it writes when it is let, whoever has given it up."""

    def __init__(self, write):
        self.write = write
        self._is_through = threading.Event()

    def happen(self):
        self.write()
        self._is_through.set()

    def wait_settled(self, seconds):
        return self._is_through.wait(seconds)


class Read:
    """A prepared read: each of its posts ends as the test has said."""

    count = 1

    def __init__(self, ends):
        self._ends = ends

    def post(self, **_):
        write, error = self._ends.pop(0)
        job = Job(write)
        if error is None or isinstance(error, IntegrityError):
            job.happen()
        return Transfer(job, error)


class Transfer:
    digest = None

    def __init__(self, job, error):
        self.jobs, self._error = [job], error
        STARTED.append(self)

    def wait(self):
        if self._error is not None:
            raise self._error

    def cancel(self):
        self._error = TransferCancelled("given up")


STARTED = []


@pytest.fixture(autouse=True)
def _none_started():
    STARTED.clear()


@pytest.fixture
def slot():
    with Agent("rollout") as agent:
        region = agent.empty(N)
        yield region
        agent.deregister(region)


def receiver(slot, ends, *, seconds=20.0, reads=None, givers=("a", "b")):
    """A receiver of one chunk, whose reads end as they are told to, in their order."""

    def fill(value):
        slot.array()[:] = value

    told = [(lambda value=value: fill(value), error) for value, error in ends]
    agent = SimpleNamespace(name="rollout", is_closed=False, prepare=lambda *_: Read(told))
    cargo = DeltaCargo([SimpleNamespace(nbytes=N)], N)
    digests = np.zeros((1, 2), np.uint64)
    wanted = np.full(N, RIGHT, np.uint8)
    digest_rows(np.array([[wanted.ctypes.data, N, 0, 0]], np.uint64), digests, seed=1)
    sources = {0: tuple(Giver(name, [slot.describe()]) for name in givers)}
    place = Place([slot], HostBank([slot.array()]), Reads() if reads is None else reads)
    return Receiver(
        agent, cargo, place, 1, digests, sources, time.monotonic() + seconds, threading.Event(), str, Throttle(None)
    )


def in_background(call):
    found = []

    def run():
        try:
            found.append(call())
        except RaynixlError as exc:
            found.append(exc)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, found


def check_that_it_waits_for_the_first_read(thread, found, slot):
    """Nothing else is read while that may still write; then what is right comes."""
    thread.join(0.4)
    assert thread.is_alive()
    assert len(STARTED) == 1
    STARTED[0].jobs[0].happen()
    thread.join(20)
    assert found == [None]
    assert set(slot.array()) == {RIGHT}


@pytest.mark.parametrize("error", [TransferTimeout("slow"), PeerLost("gone")])
def test_the_next_source_is_asked_when_what_the_first_one_gave_too_late_is_through(slot, error):
    pull = receiver(slot, [(WRONG, error), (RIGHT, None)])
    thread, found = in_background(lambda: pull.from_origin(0))
    eventually(lambda: STARTED, "the first source is asked")
    check_that_it_waits_for_the_first_read(thread, found, slot)


def test_a_read_that_never_ends_fails_the_pull_at_its_deadline_and_is_waited_for_by_the_next_one(slot):
    reads = Reads()
    late = receiver(slot, [(WRONG, TransferTimeout("slow")), (RIGHT, None)], seconds=0.5, reads=reads)
    with pytest.raises(TransferTimeout):
        late.from_origin(0)
    pull = receiver(slot, [], reads=reads)  # goes on with the same prepared reads
    thread, found = in_background(lambda: pull.from_origin(0))
    check_that_it_waits_for_the_first_read(thread, found, slot)


def test_a_chunk_of_another_receiver_is_waited_for_as_well(slot):
    pull = receiver(slot, [(WRONG, TransferTimeout("slow")), (RIGHT, None)])
    giver = Giver("peer", [slot.describe()])
    with pytest.raises(TransferTimeout):
        pull.from_peer(0, giver)
    thread, found = in_background(lambda: pull.from_peer(0, giver))
    thread.join(0.4)
    assert thread.is_alive()
    STARTED[0].jobs[0].happen()
    thread.join(20)
    assert found == [None]
    assert set(slot.array()) == {RIGHT}


def test_what_a_delta_has_made_is_looked_at_when_nothing_writes_there_any_more(slot):
    pull = receiver(slot, [(WRONG, TransferTimeout("slow"))])
    with pytest.raises(TransferTimeout):
        pull.from_peer(0, Giver("peer", [slot.describe()]))
    slot.array()[:] = RIGHT
    thread, found = in_background(lambda: pull.is_whole(0))
    thread.join(0.3)
    assert thread.is_alive()
    STARTED[0].jobs[0].happen()
    thread.join(20)
    assert found == [False]


def test_reads_that_end_with_their_error_hold_nothing_up(slot):
    pull = receiver(slot, [(WRONG, IntegrityError("no")), (RIGHT, None)])
    giver = Giver("peer", [slot.describe()])
    with pytest.raises(IntegrityError):
        pull.from_peer(0, giver)
    pull.from_peer(0, giver)
    assert set(slot.array()) == {RIGHT}
