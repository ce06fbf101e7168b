"""A process that may start no more threads: what needs one is refused with a typed error, and all goes on later."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from agent_tools import PATIENCE, error_of, random_bytes

from raynixl import Agent, BackendUnavailable, TransferTimeout

N = 4096


@contextmanager
def no_threads() -> Iterator[None]:
    """Refuse every new thread of this process, as the kernel does at its limit."""

    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        yield


def test_a_transfer_that_gets_no_thread_fails_and_the_next_one_works(pair: tuple[Agent, Agent]) -> None:
    alice, bob = pair
    mine, bobs = alice.register(random_bytes(N)), bob.empty(N)
    with no_threads():
        error = error_of(alice.write(mine, bobs.describe()))
    assert isinstance(error, BackendUnavailable)
    assert "ulimit" in error.hint
    alice.write(mine, bobs.describe()).wait(PATIENCE)
    assert bobs.array().tolist() == mine.array().tolist()


def test_an_agent_closes_after_a_transfer_got_no_thread(pair: tuple[Agent, Agent]) -> None:
    alice, bob = pair
    mine, theirs = alice.register(random_bytes(N)), bob.empty(N).describe()
    with no_threads():
        alice.write(mine, theirs)
    alice.close()
    assert alice.is_closed


def test_a_request_whose_handler_gets_no_thread_is_refused_and_takes_no_place(pair: tuple[Agent, Agent]) -> None:
    alice, bob = pair
    bob.serve("same", lambda _peer, payload: payload)
    alice.peer("bob").connect()
    with no_threads(), pytest.raises(TransferTimeout, match="can't start new thread"):
        alice.ask("bob", "same").wait(PATIENCE)
    assert bob.control._busy == 0
    assert alice.ask("bob", "same", b"later").wait(PATIENCE) == b"later"
